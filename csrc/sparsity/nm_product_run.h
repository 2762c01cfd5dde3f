// The host's side of products with a packed N:M weight: checks, and the sharing out of work.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "memory.h"
#include "sparsity/nm_places.h"

namespace tersor::nm_product {
namespace {

constexpr int64_t TILE_BYTES = 24 << 10;  // of the transposed input: half of an L1 cache of 48 KiB
constexpr int64_t MOST_TILE = 768;        // columns of a unit with matrix tiles
constexpr int64_t SUMS = 256 << 10;       // of a unit: 1 MiB, half of an L2 cache

inline Activation activation_of(const std::string& name) {
  STD_TORCH_CHECK(name == "none" || name == "relu" || name == "gelu", "activation must be none, relu or gelu");
  return name == "relu" ? Activation::relu : name == "gelu" ? Activation::gelu : Activation::none;
}

// The operands of a product, checked and dense. Python has said the same in better words; this guards the memory.
struct Operands {
  Tensor values, index;
  std::optional<Tensor> bias;

  Operands(const Tensor& input, const Tensor& given_values, const Tensor& given_index,
           const std::optional<Tensor>& given_bias, int64_t n, int64_t m, const std::string& activation, Task& task)
      : values(torch::stable::contiguous(given_values)), index(torch::stable::contiguous(given_index)) {
    const ScalarType dtype = input.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                    "input must be float16, bfloat16 or float32");
    STD_TORCH_CHECK(n >= 1 && n < m && m <= 16, "n and m must satisfy 1 <= n < m <= 16");
    STD_TORCH_CHECK(values.is_cpu() && values.scalar_type() == dtype && values.dim() == 3 && values.size(2) == n,
                    "values must be (O, K / m, n), of the input's dtype and on the CPU");
    task.index_row = (values.size(1) * index_bits(n, m) + 7) / 8;
    STD_TORCH_CHECK(index.is_cpu() && index.scalar_type() == ScalarType::Byte && index.dim() == 2 &&
                        index.size(0) == values.size(0) && index.size(1) == task.index_row,
                    "index must be uint8, a row of bytes for each row of values");
    task.n = n, task.m = m, task.places = places_of(n, m), task.activation = activation_of(activation);
    task.values = values.const_data_ptr(), task.index = static_cast<const uint8_t*>(index.const_data_ptr());
    if (!given_bias) return;
    bias = torch::stable::contiguous(*given_bias);
    STD_TORCH_CHECK(bias->is_cpu() && bias->scalar_type() == dtype && bias->dim() == 1 && bias->size(0) == values.size(0),
                    "bias must have one element per output, of the input's dtype and on the CPU");
    task.bias = bias->const_data_ptr();
  }
};

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Two tiles of columns are a unit: the values come from the L2 cache for the second one, and its offsets are found.
inline void choose_tile(Task& task) {
  task.pitch = task.columns > NARROW_TILE ? TILE : NARROW_TILE;
  task.tile = task.columns > TILE ? 2 * TILE : task.pitch;
  const int64_t elements = TILE_BYTES / (task.pitch * static_cast<int64_t>(sizeof(float)));
  task.chunk = std::max<int64_t>(1, elements / task.places->elements) * task.places->elements;
}

// Runs `do_unit` on all tiles of columns, groups and parts of the outputs. Where there are few tiles, and not as much to
// do for every thread, each has its part of the outputs of all of them.
inline void run_units(const Task& task, void (*do_unit)(const Task&, const Unit&, void*),
                      int64_t (*scratch)(const Task&, int64_t)) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tiles = (task.columns + task.tile - 1) / task.tile * task.groups;
  int64_t parts = (task.outputs * task.tile + SUMS - 1) / SUMS;
  const bool even = tiles * parts % threads == 0 && task.columns % task.tile == 0;
  if (!even && tiles * parts < 8 * threads) parts *= std::max<int64_t>(1, std::min(threads, task.outputs / parts / 32));
  const int64_t size = round_up((task.outputs + parts - 1) / parts, 16), bytes = scratch(task, size);
  parts = (task.outputs + size - 1) / size;
  torch::stable::parallel_for(0, tiles * parts, 1, [&](int64_t begin, int64_t end) {
    const auto memory = allocate(bytes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i / tiles, tile = i % tiles / task.groups;
      const Unit unit{i % task.groups, tile * task.tile, std::min(task.columns, (tile + 1) * task.tile),
                      part * size, std::min(task.outputs, (part + 1) * size)};
      do_unit(task, unit, memory.get());
    }
  });
}

// With the kernels of one kept of many, where the level has them and all that is side by side in memory is a channel.
inline bool run_lone(Task& task, const UnitKernels& kernels) {
  if (!kernels.unit || task.n != 1 || task.m < 5 || task.input_c != 1 || task.output_c != 1) return false;
  task.tile = std::min(task.columns, kernels.columns);
  run_units(task, kernels.unit, kernels.scratch);
  return true;
}

inline bool has_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  // TERSOR_CPU_AMX=0 leaves the extension aside, so that tests reach the kernels of processors without it.
  static const bool has = [] {
    const char* const wanted = std::getenv("TERSOR_CPU_AMX");
    if (wanted && std::strcmp(wanted, "0") == 0) return false;
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    constexpr unsigned bfloat16 = 1u << 22, tile = 1u << 24, vbmi2 = 1u << 6;
    if (!(edx & bfloat16) || !(edx & tile) || !(ecx & vbmi2)) return false;
    constexpr long request = 0x1023, tile_data = 18;  // the kernel gives a process the tiles' state on request only
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
  }();
  return has && cpu_isa() == Isa::x86_64_v4;
#else
  return false;
#endif
}

// With matrix tiles, for patterns whose groups fill them. A unit has as many columns as half of an L2 cache holds.
inline bool run_tiles(Task& task, const UnitKernels& kernels, int64_t fewest) {
  const bool fits = task.m == 2 || task.m == 4 || task.m == 8 || task.m == 16;
  if (!kernels.unit || !fits || task.input_c != 1 || task.output_c != 1 || task.columns < fewest || !has_tiles()) return false;
  const int64_t most = (512 << 10) / std::max<int64_t>(1, 2 * task.row()) / 32 * 32;
  task.tile = std::min(round_up(task.columns, 32), std::min<int64_t>(MOST_TILE, std::max<int64_t>(32, most)));
  run_units(task, kernels.unit, kernels.scratch);
  return true;
}

}  // namespace
}  // namespace tersor::nm_product

// A linear layer of signs on the CPU (specification: pyops/binary/binary_packed_linear.py). One unit of work is a few
// rows of the input and some of the outputs: its thread takes the rows' signs and counts.

#include "binary/binary_packed_linear.h"

#include "arena.h"

#define TERSOR_BODY "binary/binary_packed_linear_kernels.h"
#include "foreach_isa.h"

namespace tersor::binary {
namespace {

constexpr int64_t GRAIN_STEPS = 1 << 13;  // counts of 512 bits that are worth a thread's waking, 4 us

Rows make_rows(const Tensor& input, const Tensor& blocks, const Tensor& sums) {
  STD_TORCH_CHECK(input.is_cpu() && input.dim() > 0 && input.scalar_type() != ScalarType::Double &&
                      is_floating(input.scalar_type()),
                  "input must be a CPU tensor (..., C) of float16, bfloat16 or float32");
  Rows rows{};
  Task& task = rows.task;
  task.channels = input.size(input.dim() - 1), task.words = words_for(task.channels);
  STD_TORCH_CHECK(sums.dim() == 3 && sums.size(0) > 0, "weight_sums must be (O, 1, 1)");
  task.outputs = sums.size(0), task.blocks = (task.outputs + BLOCK - 1) / BLOCK;
  STD_TORCH_CHECK(task.channels > 0 && task.channels <= MOST_TERMS && blocks.is_cpu() && blocks.dim() == 7 &&
                      blocks.scalar_type() == ScalarType::Long && (blocks.size(0) == 1 || blocks.size(0) == 2) &&
                      blocks.numel() == blocks.size(0) * task.blocks * task.words * BLOCK &&
                      blocks.size(2) == task.blocks && blocks.size(5) == task.words,
                  "weight must be int64 blocks (planes, 1, ceil(O / 8), 1, 1, ceil(C / 64), 8) on the CPU");
  rows.count = input.numel() / task.channels;
  task.kernel_h = task.kernel_w = 1, task.steps = task.words;
  task.weight = static_cast<const int64_t*>(blocks.const_data_ptr());
  task.weight_planes = blocks.size(0), task.weight_plane = blocks.numel() / blocks.size(0);
  choose_multiply(task);
  const int64_t near = NEAR_WEIGHT / (8 * task.block_words() * task.weight_planes) / task.tile_blocks;
  rows.near_blocks = std::min(std::max<int64_t>(1, near) * task.tile_blocks, MOST_NEAR);
  return rows;
}

void run(Rows& rows, ScalarType dtype) {
  Task& task = rows.task;
  std::vector<int64_t> offsets(task.words);
  for (int64_t i = 0; i < task.words; ++i) offsets[i] = i;
  task.offsets = offsets.data();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tiles = (task.blocks + task.tile_blocks - 1) / task.tile_blocks;
  // Whole tiles of rows, shared out evenly.
  const int64_t row_tiles = (rows.count + task.tile_pixels - 1) / task.tile_pixels;
  const int64_t strip = std::min((row_tiles + threads - 1) / threads * task.tile_pixels, STRIP_ROWS);
  const int64_t strips = (rows.count + strip - 1) / strip;
  const int64_t parts = strips >= threads ? 1 : std::min(tiles, threads);
  const int64_t steps = std::max<int64_t>(1, std::min(strip, rows.count) * task.blocks * task.words / parts);
  task.scratch_plane = strip * task.words;
  with_type(dtype, [&](auto type) {
    using T = std::conditional_t<std::is_same_v<decltype(type), double>, float, decltype(type)>;  // never double
    const auto rows_of = TERSOR_FOR_ISA(do_rows<T>);
    const int64_t grain = (GRAIN_STEPS + steps - 1) / steps;
    torch::stable::parallel_for(0, strips * parts, grain, [&](int64_t begin, int64_t end) {
      const Memory memory = allocate(16 * task.scratch_plane);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i / parts * strip, part = i % parts;
        const RowUnit unit{first, std::min(rows.count, first + strip),
                           tiles * part / parts * task.tile_blocks,
                           std::min(task.blocks, tiles * (part + 1) / parts * task.tile_blocks)};
        rows_of(rows, unit, reinterpret_cast<int64_t*>(memory.get()));
      }
    });
  });
}

Tensor forward(const Tensor& given, const Tensor& given_blocks, const Tensor& sums, const Maybe& given_affine) {
  const Tensor input = as_contiguous(given), blocks = as_contiguous(given_blocks);
  Rows rows = make_rows(input, blocks, sums);
  Tensor affine;
  if (given_affine) {
    STD_TORCH_CHECK(given_affine->is_cpu() && given_affine->scalar_type() == ScalarType::Float &&
                        given_affine->dim() == 2 && given_affine->size(0) == 2 &&
                        given_affine->size(1) == rows.task.outputs,
                    "affine must be float32 (2, O) on the CPU");
    affine = as_contiguous(*given_affine);
    rows.affine = static_cast<const float*>(affine.const_data_ptr());
  }
  const auto given_sizes = input.sizes();
  Sizes sizes(given_sizes.begin(), given_sizes.end());
  sizes.back() = rows.task.outputs;
  Tensor output = new_tensor(sizes, input.scalar_type());
  rows.input = input.const_data_ptr(), rows.output = output.mutable_data_ptr();
  if (output.numel() > 0) run(rows, input.scalar_type());
  return output;
}

}  // namespace
}  // namespace tersor::binary

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("binary_packed_linear", TORCH_BOX(&tersor::binary::forward));
}

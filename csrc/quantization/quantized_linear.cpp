// Linear layer on quantised rows with quantised weights on the CPU (specification:
// pyops/quantization/quantized_linear.py). One unit of work is a number of rows and a number of output channels: its
// thread quantises the rows and then multiplies their codes.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "arena.h"
#include "memory.h"
#include "quantization/quantized_input.h"

namespace tersor::quantized_linear {
using namespace tersor::quantized;

constexpr int ROWS = 6;          // that are multiplied at once: 24 sums in 32 registers
constexpr int PAIR = 2 * BLOCK;  // output channels that are

struct Task;
using Multiply = void (*)(const Task&, const char* codes, int rows, const int8_t* first, const int8_t* second,
                          int32_t* tile);

struct Task {
  int64_t rows, rows_per_sample, inputs, outputs, blocks, runs;
  const void* input;
  void* output;
  const int8_t* weight;
  const int32_t* weight_sums;
  const float *weight_scale, *weight_zero, *bias;
  const Quantizer* quantizers;
  int64_t quantizer_count;
  bool bytes;  // codes of 8 bits, or of 16
  Multiply multiply;
  int64_t pitch, rows_at_once;  // bytes from one row's codes to the next; rows of a unit
};

struct Unit {
  int64_t first_row, last_row, first_block, last_block;
};

}  // namespace tersor::quantized_linear

#define TERSOR_BODY "quantization/quantized_linear_kernels.h"
#include "foreach_isa.h"

namespace tersor::quantized_linear {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t CACHE = 256 << 10;       // bytes of the level-2 cache that a unit's codes may fill
constexpr int64_t MOST_ROWS = 96;          // of a unit
constexpr int64_t WORTH_A_THREAD = 1 << 20;  // products: about 5 us of one

// The sizes of the problem, with all that protects memory checked.
Task make_task(const Tensor& input, const Tensor& weight, const Tensor& sums) {
  STD_TORCH_CHECK(input.dim() >= 1 && input.is_cpu(), "input must be a CPU tensor (..., C)");
  STD_TORCH_CHECK(weight.dim() == 7 && weight.is_cpu() && weight.scalar_type() == ScalarType::Char &&
                      weight.size(0) == 1 && weight.size(2) == 1 && weight.size(3) == 1 && weight.size(5) == BLOCK &&
                      weight.size(6) == RUN,
                  "weight must be int8 blocks (1, blocks, 1, 1, runs, 8, 16) on the CPU");
  STD_TORCH_CHECK(sums.dim() == 3 && sums.is_cpu() && sums.scalar_type() == ScalarType::Int && sums.size(0) > 0 &&
                      sums.numel() == sums.size(0),
                  "weight_sums must be int32 (O, 1, 1) on the CPU");
  Task task{};
  task.inputs = input.size(input.dim() - 1), task.outputs = sums.size(0);
  task.blocks = weight.size(1), task.runs = weight.size(4);
  STD_TORCH_CHECK(task.inputs > 0 && task.runs * RUN == round_up(task.inputs, RUN) &&
                      task.blocks * BLOCK == round_up(task.outputs, BLOCK),
                  "weight must have blocks for the channels of input and weight_sums");
  STD_TORCH_CHECK(task.inputs <= 65536, "weight must have at most 65536 codes per output channel");
  task.rows = input.numel() / task.inputs;
  return task;
}

// Rows that units have, of one sample if each has its own quantiser; as many for each thread.
void choose_rows(Task& task, int64_t threads) {
  const int64_t whole = task.rows_per_sample;
  int64_t most = std::max<int64_t>(ROWS, std::min(MOST_ROWS, CACHE / task.pitch / ROWS * ROWS));
  int64_t units = (whole + most - 1) / most;
  if (units > 1) units = round_up(units, threads);
  task.rows_at_once = std::min(whole, round_up((whole + units - 1) / units, ROWS));
}

template <class T>
void run(const Task& task, int64_t threads) {
  const auto unit_of = TERSOR_FOR_ISA(do_unit<T>);
  const int64_t bytes = TERSOR_FOR_ISA(scratch)(task);
  const int64_t each = (task.rows_per_sample + task.rows_at_once - 1) / task.rows_at_once;
  const int64_t units = task.rows / task.rows_per_sample * each, pairs = (task.blocks + 1) / 2;
  // Output channels are shared out only where rows are few: each part quantises them anew.
  const int64_t parts = std::min(pairs, std::max<int64_t>(1, threads / units));
  const bool small = task.rows * task.inputs * task.outputs < 2 * WORTH_A_THREAD;
  torch::stable::parallel_for(0, units * parts, small ? units * parts : 1, [&](int64_t begin, int64_t end) {
    const Memory memory = allocate(bytes);
    for (int64_t i = begin; i < end; ++i) {
#ifdef TERSOR_POISON
      std::memset(memory.get(), 0xff, bytes);
#endif
      const int64_t part = i % parts, unit = i / parts, sample = unit / each;
      const int64_t first = sample * task.rows_per_sample + unit % each * task.rows_at_once;
      const int64_t last = std::min((sample + 1) * task.rows_per_sample, first + task.rows_at_once);
      const int64_t end_block = std::min(task.blocks, pairs * (part + 1) / parts * 2);
      unit_of(task, Unit{first, last, pairs * part / parts * 2, end_block}, memory.get());
    }
  });
}

Tensor forward(const Tensor& input, const Tensor& weight, const Tensor& weight_sums, const Tensor& weight_scale,
               const std::optional<Tensor>& weight_zero, const Tensor& lower, const Tensor& upper,
               const std::optional<Tensor>& bias, int64_t bits, bool relu) {
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "quantized_linear: input must be float16, bfloat16 or float32");
  Task task = make_task(input, weight, weight_sums);
  const int64_t samples = input.dim() > 1 ? input.size(0) : 1;
  const std::vector<Quantizer> all = quantizers("quantized_linear", lower, upper, samples, bits, relu);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < input.dim(); ++i) sizes.push_back(input.size(i));
  sizes.push_back(task.outputs);
  Tensor output = torch::stable::new_empty(input, sizes, dtype);
  if (task.rows == 0) return output;
  const auto dense = [](const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); };
  const Tensor x = dense(input), blocks = dense(weight), sums = dense(weight_sums), scale = dense(weight_scale);
  std::optional<Tensor> zero, shift;
  if (weight_zero) zero = dense(*weight_zero), task.weight_zero = floats(*zero, task.outputs, "weight_zero");
  if (bias) shift = dense(*bias), task.bias = floats(*shift, task.outputs, "bias");
  task.weight_scale = floats(scale, task.outputs, "weight_scale");
  task.weight_sums = static_cast<const int32_t*>(sums.const_data_ptr());
  task.weight = static_cast<const int8_t*>(blocks.const_data_ptr());
  task.input = x.const_data_ptr(), task.output = output.mutable_data_ptr();
  task.quantizers = all.data(), task.quantizer_count = static_cast<int64_t>(all.size());
  task.rows_per_sample = task.quantizer_count == 1 ? task.rows : task.rows / samples;

  task.multiply = TERSOR_FOR_ISA(multiply_pairs);
#if defined(__x86_64__)
  if (has_byte_products()) task.multiply = x86_64_v4::vnni::multiply_bytes, task.bytes = true;
#endif
  // A cache line more than the codes, so that rows do not fall into few of the cache's sets.
  task.pitch = round_up(task.runs * RUN * (task.bytes ? 1 : 2), 64) + 64;
  const int64_t threads = torch::stable::get_num_threads();
  choose_rows(task, threads);
  if (dtype == ScalarType::Float) run<float>(task, threads);
  if (dtype == ScalarType::Half) run<Half>(task, threads);
  if (dtype == ScalarType::BFloat16) run<BFloat16>(task, threads);
  return output;
}

}  // namespace
}  // namespace tersor::quantized_linear

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("quantized_linear", TORCH_BOX(&tersor::quantized_linear::forward));
}

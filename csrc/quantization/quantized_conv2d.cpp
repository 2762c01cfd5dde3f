// Convolution of quantised activations with quantised weights on the CPU (specification:
// pyops/quantization/quantized_conv2d.py). One unit of work is a band of output rows of one image: its thread quantises
// the input rows that the band's windows reach and then computes all output channels from the codes.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <vector>

#include "arena.h"
#include "memory.h"
#include "quantization/quantized_input.h"
#include "window.h"

namespace tersor::quantized_conv2d {
using namespace tersor::quantized;

constexpr int64_t SLACK = 64;       // words that a tile may read beyond its row

struct Task;
using Multiply = void (*)(const Task&, const int32_t* codes, const void* weight, int vectors, int32_t* tile);

struct Task {
  int64_t batch, groups, in_channels, out_channels;  // channels of one group
  int64_t height, width, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  const void* input;
  void* output;
  int64_t input_n, input_c, input_h, input_w, output_n, output_c, output_h, output_w;  // strides
  const void* weight;
  const int32_t* weight_sums;  // [O][taps]
  const float *weight_scale, *weight_zero, *bias;
  const void* residual;  // with the output's dtype and strides; or none
  bool output_relu;
  const Quantizer* quantizers;
  int64_t quantizer_count;
  Multiply multiply;

  // The layout of the codes of a band of `rows` output rows. With a stride of s, rows are sorted by their phase modulo
  // s, as columns are: neighbours in the output are neighbours then.
  bool flat;                       // whether a tile runs on from row to row
  int per_word;                    // channels
  int64_t rows, row_slots_per_phase, columns, column_slots_per_phase, pitch;
  int64_t words, word_step, row_step;
  int64_t taps, blocks;
  const int64_t *offsets, *sum_offsets;  // of the taps

  // Whether a tap reads row r of a band: with a stride beyond the kernel not all are.
  bool reads_row(int64_t r) const {
    for (int64_t t = 0; t < kernel_h; ++t) {
      if ((r - t * dilation_h) % stride_h == 0) return true;
    }
    return false;
  }
  int64_t row_slot(int64_t r) const { return r % stride_h * row_slots_per_phase + r / stride_h; }
  int64_t column_slot(int64_t c) const { return c % stride_w * column_slots_per_phase + c / stride_w; }
  int64_t slots() const { return stride_h * row_slots_per_phase; }
  int64_t left() const { return std::min(padding_w, columns); }
  int64_t inside() const { return std::min(width, columns - left()); }

  int64_t bytes_per_block() const {
    const int64_t runs = (in_channels + RUN - 1) / RUN;
    return per_word == 4 ? taps * runs * BLOCK * RUN : taps * words * BLOCK * 4;
  }
  const void* packed_block(int64_t group, int64_t block) const {
    return static_cast<const char*>(weight) + (group * blocks + block) * bytes_per_block();
  }
};

struct Unit {  // blocks of output channels are counted through all groups
  int64_t image, first_row, last_row, first, last;

  int64_t first_block(const Task& task, int64_t group) const {
    return std::max<int64_t>(0, first - group * task.blocks);
  }
  int64_t last_block(const Task& task, int64_t group) const {
    return std::min(task.blocks, last - group * task.blocks);
  }
};

template <int PER_WORD>
inline int32_t pad_word(const Quantizer& q) {
  return static_cast<int32_t>(static_cast<uint32_t>(q.pad) * (PER_WORD == 4 ? 0x01010101u : 0x00010001u));
}

}  // namespace tersor::quantized_conv2d

#define TERSOR_BODY "quantization/quantized_conv2d_kernels.h"
#include "foreach_isa.h"

namespace tersor::quantized_conv2d {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t CACHE = 512 << 10;  // bytes of the level-2 cache that a band's codes may fill
constexpr int64_t MOST_SCRATCH = int64_t{2} << 30;

// The sizes of the problem, with all that protects memory checked.
Task make_task(const Tensor& input, const Tensor& weight, const Tensor& sums, const std::vector<int64_t>& stride,
               const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  STD_TORCH_CHECK(input.dim() == 4 && input.is_cpu(), "input must be a CPU tensor (N, C, H, W)");
  STD_TORCH_CHECK(weight.dim() == 7 && weight.is_cpu() && weight.scalar_type() == ScalarType::Char &&
                      weight.size(5) == BLOCK && weight.size(6) == RUN,
                  "weight must be int8 blocks (groups, blocks, KH, KW, runs, 8, 16) on the CPU");
  STD_TORCH_CHECK(sums.dim() == 3 && sums.is_cpu() && sums.scalar_type() == ScalarType::Int &&
                      sums.size(1) == weight.size(2) && sums.size(2) == weight.size(3),
                  "weight_sums must be int32 (O, KH, KW) on the CPU");
  Task task{};
  task.batch = input.size(0), task.height = input.size(2), task.width = input.size(3);
  task.groups = weight.size(0), task.blocks = weight.size(1);
  task.kernel_h = weight.size(2), task.kernel_w = weight.size(3), task.taps = task.kernel_h * task.kernel_w;
  STD_TORCH_CHECK(task.groups > 0 && task.taps > 0 && sums.size(0) > 0 && input.size(1) % task.groups == 0 &&
                      sums.size(0) % task.groups == 0,
                  "the weight must not be empty, and its groups must divide the channels");
  task.in_channels = input.size(1) / task.groups, task.out_channels = sums.size(0) / task.groups;
  STD_TORCH_CHECK(weight.size(4) * RUN == round_up(task.in_channels, RUN) && task.in_channels > 0 &&
                      task.blocks * BLOCK == round_up(task.out_channels, BLOCK),
                  "weight must have blocks for the channels of input and weight_sums");
  STD_TORCH_CHECK(task.in_channels * task.taps <= 65536, "weight must have at most 65536 codes per output channel");
  set_window(task, stride, padding, dilation);
  return task;
}

// The layout of the codes for bands of `rows` output rows.
void lay_out(Task& task, int64_t rows, bool flat) {
  task.rows = rows, task.flat = flat;
  const int64_t in_rows = (rows - 1) * task.stride_h + (task.kernel_h - 1) * task.dilation_h + 1;
  task.row_slots_per_phase = (in_rows + task.stride_h - 1) / task.stride_h;
  task.columns = (task.out_width - 1) * task.stride_w + (task.kernel_w - 1) * task.dilation_w + 1;
  task.column_slots_per_phase = (task.columns + task.stride_w - 1) / task.stride_w;
  task.pitch = task.stride_w * task.column_slots_per_phase;
  task.words = (task.in_channels + task.per_word - 1) / task.per_word;
  if (flat) {
    task.row_step = task.pitch;
    // An odd number of cache lines, so that the words of a position do not fall into few of the cache's sets.
    task.word_step = round_up(task.slots() * task.pitch, 16);
    task.word_step += task.word_step / 16 % 2 ? 0 : 16;
  } else {
    task.row_step = task.words * task.pitch, task.word_step = task.pitch;
  }
}

int64_t code_bytes(Task& task, int64_t rows, bool flat) {
  lay_out(task, rows, flat);
  return 4 * task.words * task.slots() * task.pitch;
}

// Chooses the bands: as many rows as the cache has room for, or as few as keep the threads busy.
void choose_bands(Task& task, int lanes) {
  lay_out(task, 1, false);
  const bool flat = task.pitch < round_up(task.out_width, lanes);
  int64_t rows = task.out_height;
  while (rows > 1 && code_bytes(task, rows, flat) > CACHE) rows = (rows + 1) / 2;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t bands = std::max((task.out_height + rows - 1) / rows, std::min(task.out_height, threads / task.batch));
  lay_out(task, (task.out_height + bands - 1) / bands, flat);
}

std::vector<int64_t> tap_offsets(const Task& task, int64_t row_step) {
  std::vector<int64_t> offsets;
  for (int64_t t = 0; t < task.taps; ++t) {
    offsets.push_back(task.row_slot(t / task.kernel_w * task.dilation_h) * row_step +
                      task.column_slot(t % task.kernel_w * task.dilation_w));
  }
  return offsets;
}

// The blocks' codes in pairs of 16 bits: [groups * blocks][taps][words][8].
std::vector<int32_t> pair_weights(const Task& task, const int8_t* blocks) {
  std::vector<int32_t> pairs(task.groups * task.blocks * task.taps * task.words * BLOCK);
  const int64_t runs = (task.in_channels + RUN - 1) / RUN;
  torch::stable::parallel_for(0, task.groups * task.blocks * task.taps, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t w = 0; w < task.words; ++w) {
        const int8_t* const from = blocks + (i * runs + w * 2 / RUN) * BLOCK * RUN + w * 2 % RUN;
        for (int o = 0; o < BLOCK; ++o) {
          const uint32_t low = static_cast<uint16_t>(from[o * RUN]), high = static_cast<uint16_t>(from[o * RUN + 1]);
          pairs[(i * task.words + w) * BLOCK + o] = static_cast<int32_t>(low | high << 16);
        }
      }
    }
  });
  return pairs;
}

template <class T>
void run(const Task& task) {
  const auto unit_of = TERSOR_FOR_ISA(do_unit<T>);
  const int64_t bytes = TERSOR_FOR_ISA(scratch)(task);
  STD_TORCH_CHECK(bytes > 0 && bytes <= MOST_SCRATCH,
                  "quantized_conv2d: a window of this size on an image of this size needs ", bytes >> 20,
                  " MiB of working memory a thread; at most ", MOST_SCRATCH >> 20, " are taken");
  const int64_t bands = (task.out_height + task.rows - 1) / task.rows, blocks = task.groups * task.blocks;
  // Blocks of channels are shared out only where images and rows are fewer than threads: each part quantises anew.
  const int64_t threads = torch::stable::get_num_threads(), units = task.batch * bands;
  const int64_t parts = std::min(blocks, std::max<int64_t>(1, threads / units));
  torch::stable::parallel_for(0, units * parts, 1, [&](int64_t begin, int64_t end) {
    const Memory memory = allocate(bytes);
    for (int64_t i = begin; i < end; ++i) {
#ifdef TERSOR_POISON
      std::memset(memory.get(), 0xff, bytes);
#endif
      const int64_t part = i % parts, band = i / parts % bands;
      const Unit unit{i / parts / bands, band * task.rows, std::min(task.out_height, (band + 1) * task.rows),
                      blocks * part / parts, blocks * (part + 1) / parts};
      unit_of(task, unit, memory.get());
    }
  });
}

Tensor new_output(const Task& task, const Tensor& input, bool channels_last) {
  const int64_t channels = task.groups * task.out_channels;
  const ScalarType dtype = input.scalar_type();
  if (!channels_last) {
    return torch::stable::new_empty(input, {task.batch, channels, task.out_height, task.out_width}, dtype);
  }
  const Tensor points = torch::stable::new_empty(input, {task.batch, task.out_height, task.out_width, channels}, dtype);
  return torch::stable::transpose(torch::stable::transpose(points, 1, 3), 2, 3);
}

void check_residual(const Tensor& residual, const Tensor& output) {
  bool same = residual.is_cpu() && residual.scalar_type() == output.scalar_type() && residual.dim() == 4;
  for (int64_t i = 0; same && i < 4; ++i) {
    same = residual.size(i) == output.size(i) && (output.size(i) < 2 || residual.stride(i) == output.stride(i));
  }
  STD_TORCH_CHECK(same, "residual must be a CPU tensor of the output's dtype, shape and strides");
}

Tensor forward(const Tensor& input, const Tensor& weight, const Tensor& weight_sums, const Tensor& weight_scale,
               const std::optional<Tensor>& weight_zero, const Tensor& lower, const Tensor& upper,
               const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, int64_t bits,
               const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
               const std::vector<int64_t>& dilation, bool relu, bool output_relu, bool channels_last) {
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "quantized_conv2d: input must be float16, bfloat16 or float32");
  Task task = make_task(input, weight, weight_sums, stride, padding, dilation);
  const std::vector<Quantizer> all = quantizers("quantized_conv2d", lower, upper, task.batch, bits, relu);
  Tensor output = new_output(task, input, channels_last);
  if (residual) check_residual(*residual, output), task.residual = residual->const_data_ptr();
  task.output_relu = output_relu;
  if (task.batch == 0) return output;
  const auto dense = [](const Tensor& t) { return torch::stable::contiguous(t); };
  const Tensor x = input.stride(3) == 1 || input.size(3) == 1 || input.stride(1) == 1 ? input : dense(input);
  const Tensor blocks = dense(weight), sums = dense(weight_sums), scale = dense(weight_scale);
  const int64_t outputs = task.groups * task.out_channels;
  std::optional<Tensor> zero, shift;
  if (weight_zero) zero = dense(*weight_zero), task.weight_zero = floats(*zero, outputs, "weight_zero");
  if (bias) shift = dense(*bias), task.bias = floats(*shift, outputs, "bias");
  task.weight_scale = floats(scale, outputs, "weight_scale");
  task.weight_sums = static_cast<const int32_t*>(sums.const_data_ptr());
  task.input = x.const_data_ptr(), task.output = output.mutable_data_ptr();
  task.input_n = x.stride(0), task.input_c = x.stride(1), task.input_h = x.stride(2);
  task.input_w = x.size(3) > 1 ? x.stride(3) : x.stride(1) == 1 ? 0 : 1;  // of one column, any will do
  task.output_n = output.stride(0), task.output_c = output.stride(1), task.output_h = output.stride(2);
  task.output_w = output.stride(3);
  task.quantizers = all.data(), task.quantizer_count = static_cast<int64_t>(all.size());

  task.multiply = TERSOR_FOR_ISA(multiply_pairs), task.per_word = 2, task.weight = blocks.const_data_ptr();
#if defined(__x86_64__)
  if (has_byte_products()) task.multiply = x86_64_v4::vnni::multiply_bytes, task.per_word = 4;
#endif
  choose_bands(task, TERSOR_FOR_ISA(LANES));
  std::vector<int32_t> pairs;
  if (task.per_word == 2) {
    pairs = pair_weights(task, static_cast<const int8_t*>(task.weight));
    task.weight = pairs.data();
  }
  const std::vector<int64_t> offsets = tap_offsets(task, task.row_step), sum_offsets = tap_offsets(task, task.pitch);
  task.offsets = offsets.data(), task.sum_offsets = sum_offsets.data();
  if (dtype == ScalarType::Float) run<float>(task);
  if (dtype == ScalarType::Half) run<Half>(task);
  if (dtype == ScalarType::BFloat16) run<BFloat16>(task);
  return output;
}

}  // namespace
}  // namespace tersor::quantized_conv2d

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("quantized_conv2d", TORCH_BOX(&tersor::quantized_conv2d::forward));
}

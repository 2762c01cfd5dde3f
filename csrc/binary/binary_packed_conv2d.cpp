// Convolution of signs with signs on the CPU (specification: pyops/binary/binary_packed_conv2d.py). One unit of work is
// a band of output rows of one image and some of the output channels: its thread copies the input's bits with the
// padding around them, and counts for tiles of a few pixels and up to 32 channels.

#include "binary/binary_packed_conv2d.h"

#include <cstdlib>
#include <numeric>
#include <string>

#include "arena.h"
#include "window.h"

#define TERSOR_BODY "binary/binary_packed_conv2d_kernels.h"
#include "foreach_isa.h"

namespace tersor::binary {
namespace {

constexpr int64_t CACHE = 256 << 10;             // bytes of a padded copy
constexpr int64_t MOST_SCRATCH = int64_t{2} << 30;

bool has_word_counts() {
#if defined(__x86_64__)
  // TERSOR_CPU_VPOPCNTDQ=0 leaves the extension aside, so that tests reach the kernels of processors without it.
  static const char* const wanted = std::getenv("TERSOR_CPU_VPOPCNTDQ");
  static const bool has = __builtin_cpu_supports("avx512vpopcntdq") && !(wanted && std::strcmp(wanted, "0") == 0);
  return has && cpu_isa() == Isa::x86_64_v4;
#else
  return false;
#endif
}

// The sizes of the problem, with all that protects memory checked.
Task make_task(const Tensor& signs, const Weight& weight, int64_t channels, const Sizes& stride, const Sizes& padding,
               const Sizes& dilation) {
  const Tensor &blocks = weight.blocks, &sums = weight.sums;
  STD_TORCH_CHECK(blocks.dim() == 7 && blocks.is_cpu() && blocks.scalar_type() == ScalarType::Long &&
                      blocks.size(6) == BLOCK && (blocks.size(0) == 1 || blocks.size(0) == 2) && blocks.size(1) > 0 &&
                      channels > 0 && blocks.size(5) == words_for(channels),
                  "weight must be int64 blocks (planes, groups, blocks, KH, KW, words, 8) on the CPU");
  STD_TORCH_CHECK(sums.dim() == 3 && sums.is_cpu() && sums.scalar_type() == ScalarType::Int && sums.size(0) > 0 &&
                      sums.size(1) == blocks.size(3) && sums.size(2) == blocks.size(4) && sums.size(1) > 0 &&
                      sums.size(2) > 0 && sums.size(0) % blocks.size(1) == 0,
                  "weight_sums must be int32 (O, KH, KW) on the CPU");
  Task task{};
  task.groups = blocks.size(1), task.blocks = blocks.size(2);
  check_words(signs, channels * task.groups);
  STD_TORCH_CHECK(signs.size(4) == task.groups, "signs must have the groups of weight");
  task.batch = signs.size(1), task.height = signs.size(2), task.width = signs.size(3), task.words = signs.size(5);
  task.channels = channels, task.outputs = sums.size(0) / task.groups;
  STD_TORCH_CHECK(task.blocks == (task.outputs + BLOCK - 1) / BLOCK, "weight must have a block for 8 outputs each");
  task.kernel_h = sums.size(1), task.kernel_w = sums.size(2);
  STD_TORCH_CHECK(channels * task.taps() <= MOST_TERMS, "a sum must have at most 2^23 terms");
  set_window(task, stride, padding, dilation);
  task.signs = static_cast<const int64_t*>(signs.const_data_ptr()), task.signs_plane = signs.numel() / 2;
  task.weight = static_cast<const int64_t*>(blocks.const_data_ptr());
  task.weight_planes = blocks.size(0), task.weight_plane = blocks.numel() / blocks.size(0);
  task.sums = static_cast<const int32_t*>(sums.const_data_ptr());
  return task;
}

// Where nothing is padded and each pixel stands alone, all pixels are the rows of one image.
void merge_pixels(Task& task) {
  if (task.taps() != 1 || task.stride_h * task.stride_w != 1 || task.pads()) return;
  const int64_t area = task.height * task.width;
  if (area == 1) task.channels_last = true;  // the same place in memory
  if (task.channels_last || task.out_signs != nullptr) {
    task.height = task.out_height = task.batch * area, task.batch = 1;
  } else {
    task.height = task.out_height = area;
  }
  task.width = task.out_width = 1;
}

void choose_bands(Task& task) {
  task.columns = (task.out_width - 1) * task.stride_w + (task.kernel_w - 1) * task.dilation_w + 1;
  const auto lay_out = [&](int64_t band) {
    task.band = band;
    task.rows = (band - 1) * task.stride_h + (task.kernel_h - 1) * task.dilation_h + 1;
    task.scratch_plane = task.rows * task.columns * task.words;
    return 16 * task.scratch_plane;
  };
  int64_t band = task.out_height;
  while (band > 1 && lay_out(band) > CACHE) band = (band + 1) / 2;
  STD_TORCH_CHECK(lay_out(band) <= MOST_SCRATCH, "a window of this size on an image of this size needs ",
                  (16 * task.scratch_plane) >> 20, " MiB of working memory a thread; at most ", MOST_SCRATCH >> 20,
                  " are taken");
}

Scratch lay_out_scratch(const Task& task, char* memory, int64_t* bytes, int64_t element) {
  Arena arena{memory};
  const int64_t pixels = task.band * task.out_width;
  Scratch scratch{};
  scratch.words = arena.take<int64_t>(2 * task.scratch_plane), scratch.places = arena.take<int64_t>(pixels);
  scratch.zeros = arena.take<bool>(task.rows * task.columns);
  scratch.meets = arena.take<bool>(pixels), scratch.border = arena.take<bool>(pixels);
  const int64_t tiles = (task.blocks + task.tile_blocks - 1) / task.tile_blocks;
  scratch.tiles = arena.take<Tile>(tiles);
  scratch.tap_sums = arena.take<int32_t>(task.pads() ? tiles * task.taps() * MOST_OUTPUTS : 0);
  scratch.thresholds = arena.take<int32_t>(task.out_signs != nullptr ? tiles * 3 * MOST_OUTPUTS : 0);
  if (task.out_signs == nullptr && !task.channels_last) {
    scratch.columns = arena.take<char>(pixels * MOST_OUTPUTS * element);
  }
  *bytes = arena.used;
  return scratch;
}

// How the output channels are shared out where images and bands do not keep all threads busy.
struct Parts {
  int64_t count, blocks;  // blocks that a part's border is a multiple of
};

Parts choose_parts(Task& task) {
  const int64_t threads = torch::stable::get_num_threads(), all = task.groups * task.blocks;
  const int64_t units = task.batch * task.bands(), wanted = threads / std::gcd(threads, units);
  // Threads must not write into the same word of signs.
  const bool words_apart = task.groups == 1 && task.out_groups == 1;
  const int64_t least = task.out_signs == nullptr ? task.tile_blocks : words_apart ? WORD / BLOCK : all;
  if (wanted == 1 || units >= 8 * threads) return {1, all};
  if (all / least >= wanted) return {wanted, least};
  task.band = std::max<int64_t>(1, task.out_height / (task.bands() * wanted));
  return {1, all};
}

template <class T>
void run_units(const Task& task, const Parts& parts, int64_t element) {
  const auto unit_of = TERSOR_FOR_ISA(do_unit<T>);
  const int64_t bands = task.bands(), all = task.groups * task.blocks;
  const int64_t borders = (all + parts.blocks - 1) / parts.blocks;
  int64_t bytes = 0;
  lay_out_scratch(task, nullptr, &bytes, element);
  const int64_t counts = task.band * task.out_width * all * task.taps() * task.words / parts.count;
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, counts));
  torch::stable::parallel_for(0, task.batch * bands * parts.count, grain, [&](int64_t begin, int64_t end) {
    const Memory memory = allocate(bytes);
    int64_t unused = 0;
    const Scratch scratch = lay_out_scratch(task, memory.get(), &unused, element);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % parts.count, band = i / parts.count % bands;
      const Unit unit{i / parts.count / bands, band * task.band, std::min(task.out_height, (band + 1) * task.band),
                      borders * part / parts.count * parts.blocks,
                      std::min(all, borders * (part + 1) / parts.count * parts.blocks)};
      unit_of(task, unit, scratch);
    }
  });
}

// The blocks in which a weight is zero: only they take more than their signs.
std::vector<char> find_zeros(const Task& task) {
  std::vector<char> found(task.groups * task.blocks);
  for (int64_t b = 0; b < task.groups * task.blocks; ++b) found[b] = has_zero_weight(task, b);
  return found;
}

void run(Task& task, ScalarType dtype) {
  choose_multiply(task);
  merge_pixels(task);
  choose_bands(task);
  const Parts parts = choose_parts(task);
  std::vector<int64_t> offsets;
  for (int64_t i = 0; i < task.taps() * task.words; ++i) {
    const int64_t tap = i / task.words, row = tap / task.kernel_w * task.dilation_h;
    offsets.push_back((row * task.columns + tap % task.kernel_w * task.dilation_w) * task.words + i % task.words);
  }
  task.offsets = offsets.data(), task.steps = static_cast<int64_t>(offsets.size());
  std::vector<char> block_zeros;
  if (task.weight_planes == 2) block_zeros = find_zeros(task), task.block_zeros = block_zeros.data();
  with_type(dtype, [&](auto type) { run_units<decltype(type)>(task, parts, sizeof(type)); });
}

Tensor new_output(const Task& task, ScalarType dtype, bool channels_last) {
  return new_map({task.batch, task.all_outputs(), task.out_height, task.out_width}, dtype, channels_last);
}

Weight contiguous_weight(const Tensor& blocks, const Tensor& sums) {
  return {as_contiguous(blocks), as_contiguous(sums)};
}

Activation activation_of(const std::string& name) {
  STD_TORCH_CHECK(name == "none" || name == "hardtanh" || name == "prelu",
                  "activation must be none, hardtanh or prelu");
  return name == "none" ? Activation::none : name == "hardtanh" ? Activation::hardtanh : Activation::prelu;
}

Tensor forward(const Tensor& given_signs, const Tensor& blocks, const Tensor& sums, int64_t channels,
               const Sizes& stride, const Sizes& padding, const Sizes& dilation, const Maybe& given_rows, bool relu,
               std::string activation, const Maybe& given_residual, ScalarType dtype, bool channels_last) {
  const Tensor signs = as_contiguous(given_signs);
  const Weight weight = contiguous_weight(blocks, sums);
  Task task = make_task(signs, weight, channels, stride, padding, dilation);
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "dtype must be float16, bfloat16 or float32");
  task.activation = activation_of(activation), task.relu = relu, task.channels_last = channels_last;
  Tensor output = new_output(task, dtype, channels_last), rows, residual;
  if (given_rows) {
    STD_TORCH_CHECK(given_rows->is_cpu() && given_rows->scalar_type() == ScalarType::Float && given_rows->dim() == 2 &&
                        given_rows->size(0) == 7 && given_rows->size(1) == task.all_outputs(),
                    "rows must be float32 (7, O) on the CPU");
    rows = as_contiguous(*given_rows), task.epilogue = static_cast<const float*>(rows.const_data_ptr());
  }
  if (given_residual && task.epilogue != nullptr) {
    bool fits = given_residual->is_cpu() && given_residual->scalar_type() == dtype && given_residual->dim() == 4;
    for (int64_t i = 0; i < 4 && fits; ++i) fits = given_residual->size(i) == output.size(i);
    STD_TORCH_CHECK(fits, "residual must be a CPU tensor of the shape and dtype of the output");
    residual = in_format(*given_residual, true), task.residual = residual.const_data_ptr();
  }
  task.output = output.mutable_data_ptr();
  if (output.numel() > 0) run(task, dtype);
  return output;
}

Tensor forward_signs(const Tensor& given_signs, const Tensor& blocks, const Tensor& sums, int64_t channels,
                     const Sizes& stride, const Sizes& padding, const Sizes& dilation, const Tensor& given_thresholds,
                     int64_t groups) {
  const Tensor signs = as_contiguous(given_signs), thresholds = as_contiguous(given_thresholds);
  const Weight weight = contiguous_weight(blocks, sums);
  Task task = make_task(signs, weight, channels, stride, padding, dilation);
  STD_TORCH_CHECK(thresholds.is_cpu() && thresholds.scalar_type() == ScalarType::Int && thresholds.dim() == 2 &&
                      thresholds.size(0) == 3 && thresholds.size(1) == task.all_outputs(),
                  "thresholds must be int32 (3, O) on the CPU");
  STD_TORCH_CHECK(groups > 0 && task.all_outputs() % groups == 0, "groups must divide the output channels");
  task.thresholds = static_cast<const int32_t*>(thresholds.const_data_ptr());
  task.out_groups = groups, task.out_words = words_for(task.all_outputs() / groups);
  Tensor output = torch::stable::new_zeros(
      signs, {2, task.batch, task.out_height, task.out_width, groups, task.out_words}, ScalarType::Long);
  task.out_signs = static_cast<int64_t*>(output.mutable_data_ptr()), task.out_signs_plane = output.numel() / 2;
  if (output.numel() > 0) run(task, ScalarType::Float);
  return output;
}

}  // namespace

void choose_multiply(Task& task) {
  task.multiply = TERSOR_FOR_ISA(multiply_bytes);
  task.tile_pixels = TERSOR_FOR_ISA(TILE_PIXELS), task.tile_blocks = TERSOR_FOR_ISA(TILE_BLOCKS);
#if defined(__x86_64__)
  if (has_word_counts()) {
    task.multiply = x86_64_v4::vpopcntdq::multiply, task.tile_pixels = MOST_PIXELS, task.tile_blocks = MOST_BLOCKS;
  }
#endif
}

Tensor scaled_numbers(const Tensor& signs, const Weight& weight, const Maybe& given_scale, int64_t channels,
                      const Sizes& stride, const Sizes& padding, const Sizes& dilation, ScalarType dtype,
                      bool channels_last) {
  Task task = make_task(signs, weight, channels, stride, padding, dilation);
  Tensor scale;
  if (given_scale) {
    STD_TORCH_CHECK(given_scale->is_cpu() && given_scale->scalar_type() == dtype && given_scale->dim() == 1 &&
                        given_scale->size(0) == task.all_outputs(),
                    "scale must be a CPU tensor (O,) of the dtype of input");
    scale = as_contiguous(*given_scale), task.scale = scale.const_data_ptr();
  }
  task.channels_last = channels_last;
  Tensor output = new_output(task, dtype, channels_last);
  task.output = output.mutable_data_ptr();
  if (output.numel() > 0) run(task, dtype);
  return output;
}

}  // namespace tersor::binary

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("binary_packed_conv2d", TORCH_BOX(&tersor::binary::forward));
  module.impl("binary_packed_conv2d_signs", TORCH_BOX(&tersor::binary::forward_signs));
}

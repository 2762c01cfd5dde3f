// The kernels of quantized_conv2d.cpp, compiled once per instruction set (foreach_isa.h includes this file).
//
// The codes of a band of rows are laid out in words of 32 bits: the same position of four neighbouring channels (two,
// where there is no instruction for bytes), with the border around the image. A vector holds neighbouring positions,
// so that a tap is a shifted load, the weights are broadcast, and the result is written along a row of the output.
// Sums are whole numbers and each result is computed by one unit: the same bits for any number of threads.

namespace tersor::quantized_conv2d {
namespace TERSOR_ISA {
using namespace tersor::TERSOR_ISA;
using Ints = Simd<float>::Mask;

constexpr int LANES = Simd<float>::lanes;
constexpr int VECTORS = TERSOR_ISA_LEVEL == 2 ? 3 : 1;  // of positions: 24 sums in 32 registers, 8 in 16
constexpr int TILE = VECTORS * LANES;                   // positions of one tile
constexpr float MAGIC = 12582912.0f;                    // 1.5 * 2^23: adding it rounds to a whole number, ties to even
constexpr int32_t MAGIC_BITS = 0x4b400000;

struct Workspace {
  int32_t *codes, *tile, *row;  // row: one line of words before its columns are sorted by phase
  float *sums, *tile_sums, *values;
  double* outside;

  Workspace(const Task& task, Arena& arena) {
    codes = arena.take<int32_t>(task.words * task.word_step + task.last_row * task.row_step + task.pitch + SLACK);
    sums = arena.take<float>(task.slots() * task.pitch + SLACK);
    row = arena.take<int32_t>(task.columns + LANES);
    tile = arena.take<int32_t>(BLOCK * TILE + LANES), tile_sums = arena.take<float>(TILE + LANES);
    values = arena.take<float>(BLOCK * TILE), outside = arena.take<double>(TILE + LANES);
  }
};

static int64_t scratch(const Task& task) {
  Arena arena{nullptr};
  Workspace(task, arena);
  return arena.used;
}

// ---- The input's codes ----

// Rounds v = s x - z within the levels, as fake_quantize_bounds does: all its steps are monotone, so clipping v between
// the images of the bounds is the same as clipping x. NaN stays NaN; its code is anything.
TERSOR_INLINE Vec<float> rounded(Vec<float> x, const Quantizer& q) {
  Vec<float> v = x * q.scale - q.zero;
  v = q.least > v ? splat(q.least) : v;
  v = q.greatest < v ? splat(q.greatest) : v;
  return v + MAGIC;
}

// `count` positions in a row, of the first `channels` channels of a word; their sum is added to `sums`.
template <class T>
TERSOR_INLINE void quantize_line(const T* input, int64_t channel_step, int channels, int64_t count, const Quantizer& q,
                                 int bits, int32_t* words, float* sums) {
  const int32_t base = MAGIC_BITS - q.half;
  const float magic = MAGIC - static_cast<float>(q.half);
  for (int64_t x = 0; x < count; x += LANES) {
    const int present = static_cast<int>(std::min<int64_t>(LANES, count - x));
    Ints word{};
    Vec<float> sum{};
    for (int c = 0; c < channels; ++c) {
      const Vec<float> r = rounded(load_as<float>(input + c * channel_step + x, present), q);
      word += ((Ints)r - base) << (c * bits);
      sum += r - magic;
    }
    if (__builtin_expect(present == LANES, 1)) {
      __builtin_memcpy(words + x, &word, sizeof word);
      store<float>(sums + x, load(sums + x) + sum);
    } else {
      for (int i = 0; i < present; ++i) words[x + i] = word[i], sums[x + i] += sum[i];
    }
  }
}

TERSOR_INLINE void fill(int32_t* words, int64_t count, int32_t value) {
  for (int64_t i = 0; i < count; ++i) words[i] = value;
}

// The image's columns in a padded row.
struct Columns {
  int64_t left, inside, right;

  explicit Columns(const Task& task) {
    left = std::min(task.padding_w, task.columns);
    inside = std::min(task.width, task.columns - left);
    right = task.columns - left - inside;
  }
};

TERSOR_INLINE void fill_sums(const Task& task, const Columns& columns, const Quantizer& q, bool inside, float* sums) {
  const float pad = static_cast<float>(q.pad * task.in_channels);
  for (int64_t c = 0; c < task.columns; ++c) {
    const bool present = inside && c >= columns.left && c < columns.left + columns.inside;
    sums[task.column_slot(c)] = present ? 0.0f : pad;
  }
}

// Word by word, where the columns lie side by side in the input.
template <class T>
static void quantize_planes(const Task& task, const T* input, int64_t first, int64_t rows, const Quantizer& q,
                            const Workspace& space) {
  const int per_word = task.per_word, bits = 32 / per_word;
  const Columns columns(task);
  const int32_t pad = static_cast<int32_t>(q.pad * (per_word == 4 ? 0x01010101 : 0x00010001));
  for (int64_t w = 0; w < task.words; ++w) {
    const int channels = static_cast<int>(std::min<int64_t>(per_word, task.in_channels - w * per_word));
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t y = first + r, slot = task.row_slot(r);
      int32_t* const place = space.codes + w * task.word_step + slot * task.row_step;
      float* const sums = space.sums + slot * task.pitch;
      const bool inside = y >= 0 && y < task.height;
      if (w == 0) fill_sums(task, columns, q, inside, sums);
      int32_t* const line = task.stride_w == 1 ? place : space.row;
      if (!inside) {
        fill(line, task.columns, pad);
      } else {
        const T* const from = input + w * per_word * task.input_c + y * task.input_h;
        fill(line, columns.left, pad);
        fill(line + columns.left + columns.inside, columns.right, pad);
        if (task.stride_w == 1) {
          int32_t* const to = line + columns.left;
          float* const total = sums + columns.left;
          if (channels == 4) quantize_line(from, task.input_c, 4, columns.inside, q, bits, to, total);
          else if (channels == 2) quantize_line(from, task.input_c, 2, columns.inside, q, bits, to, total);
          else quantize_line(from, task.input_c, channels, columns.inside, q, bits, to, total);
          continue;
        }
        float* const total = space.values_row(task);
        for (int64_t c = 0; c < columns.inside; ++c) total[c] = 0;
        quantize_line(from, task.input_c, channels, columns.inside, q, bits, line + columns.left, total);
        for (int64_t c = 0; c < columns.inside; ++c) sums[task.column_slot(columns.left + c)] += total[c];
      }
      if (task.stride_w == 1) continue;
      for (int64_t c = 0; c < task.columns; ++c) place[task.column_slot(c)] = line[c];
    }
  }
}

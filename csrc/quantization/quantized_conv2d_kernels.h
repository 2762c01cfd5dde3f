// The kernels of quantized_conv2d.cpp, compiled once per instruction set (foreach_isa.h includes this file).
//
// The codes of a band of rows lie in words of 32 bits: one position of four neighbouring channels (of two, where there
// is no instruction for bytes), with the border around the image. A vector holds neighbouring positions, so that a tap
// is a shifted load, the weights are broadcast, and the result is written along a row of the output. Sums are whole
// numbers and each result is computed by one unit: the same bits for any number of threads.

#include "quantization/quantized_input_kernels.h"

namespace tersor::quantized_conv2d {
namespace TERSOR_ISA {
using namespace tersor::quantized::TERSOR_ISA;

constexpr int VECTORS = TERSOR_ISA_LEVEL == 2 ? 3 : 1;  // of positions: 24 sums in 32 registers, 8 in 16
constexpr int TILE = VECTORS * LANES;                   // most positions of a tile

// One thread's memory. A line is a row of the padded image before its columns are sorted by their phase.
struct Workspace {
  int32_t *codes, *line, *tile;
  float *sums, *line_sums, *tile_sums, *values;
  double *factor, *constant, *outside;

  Workspace(const Task& task, Arena& arena) {
    codes = arena.take<int32_t>((task.words - 1) * task.word_step + (task.slots() - 1) * task.row_step + task.pitch +
                                SLACK);
    sums = arena.take<float>(task.slots() * task.pitch + SLACK);
    line = arena.take<int32_t>(task.columns), line_sums = arena.take<float>(task.columns);
    tile = arena.take<int32_t>(BLOCK * TILE + LANES), tile_sums = arena.take<float>(TILE + LANES);
    values = arena.take<float>(BLOCK * TILE), outside = arena.take<double>(TILE + LANES);
    factor = arena.take<double>(task.blocks * BLOCK), constant = arena.take<double>(task.blocks * BLOCK);
  }
};

static int64_t scratch(const Task& task) {
  Arena arena{nullptr};
  Workspace(task, arena);
  return arena.used;
}

// ---- The input's codes ----

// `count` neighbouring positions of `channels` planes, to words; the codes' sum over the channels is added to `sums`.
template <int PER_WORD, class T>
TERSOR_INLINE void quantize_line(const T* input, int64_t plane, int channels, int64_t count, const Quantizer& q,
                                 int32_t* words, float* sums) {
  const int32_t base = MAGIC_BITS - q.half;
  const float magic = MAGIC - static_cast<float>(q.half);
  for (int64_t x = 0; x < count; x += LANES) {
    const int present = static_cast<int>(std::min<int64_t>(LANES, count - x));
    Ints word{};
    Vec<float> sum{};
    for (int c = 0; c < channels; ++c) {
      const Vec<float> r = rounded(load_as<float>(input + c * plane + x, present), q);
      word += ((Ints)r - base) << (c * 32 / PER_WORD);
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

// Word `w` of one row of the image, to a padded line.
template <int PER_WORD, class T>
static void quantize_row(const Task& task, const T* row, int64_t w, const Quantizer& q, int32_t* words, float* sums) {
  const int64_t left = task.left(), inside = task.inside();
  const int channels = static_cast<int>(std::min<int64_t>(PER_WORD, task.in_channels - w * PER_WORD));
  const T* const from = row + w * PER_WORD * task.input_c;
  fill(words, left, pad_word<PER_WORD>(q));
  if (channels == PER_WORD) quantize_line<PER_WORD>(from, task.input_c, PER_WORD, inside, q, words + left, sums + left);
  else quantize_line<PER_WORD>(from, task.input_c, channels, inside, q, words + left, sums + left);
  fill(words + left + inside, task.columns - left - inside, pad_word<PER_WORD>(q));
}

// Where the columns lie side by side in the input.
template <int PER_WORD, class T>
static void quantize_planes(const Task& task, const T* image, int64_t y, int64_t slot, const Quantizer& q, int64_t w,
                            const Workspace& space) {
  int32_t* const words = space.codes + w * task.word_step + slot * task.row_step;
  float* const sums = space.sums + slot * task.pitch;
  const T* const row = image + y * task.input_h;
  if (task.stride_w == 1) return quantize_row<PER_WORD>(task, row, w, q, words, sums);
  for (int64_t c = 0; c < task.columns; ++c) space.line_sums[c] = 0;
  quantize_row<PER_WORD>(task, row, w, q, space.line, space.line_sums);
  for (int64_t c = 0; c < task.columns; ++c) {
    words[task.column_slot(c)] = space.line[c];
    sums[task.column_slot(c)] += space.line_sums[c];
  }
}

// Where the channels do: all words of one row.
template <int PER_WORD, class T>
static void quantize_points(const Task& task, const T* image, int64_t y, int64_t slot, const Quantizer& q,
                            const Workspace& space) {
  typedef std::conditional_t<PER_WORD == 4, int8_t, int16_t> Code;
  typedef Code Codes __attribute__((vector_size(LANES * sizeof(Code))));
  constexpr int words = LANES / PER_WORD > 0 ? LANES / PER_WORD : 1;
  const int32_t base = MAGIC_BITS - q.half;
  const float magic = MAGIC - static_cast<float>(q.half);
  int32_t* const row = space.codes + slot * task.row_step;
  for (int64_t c = 0; c < task.columns; ++c) {
    const int64_t x = c - task.left(), place = task.column_slot(c);
    if (x < 0 || x >= task.inside()) {
      for (int64_t w = 0; w < task.words; ++w) row[w * task.word_step + place] = pad_word<PER_WORD>(q);
      continue;
    }
    const T* const point = image + y * task.input_h + x * task.input_w;
    Vec<float> sum{};
    for (int64_t first = 0; first < task.in_channels; first += LANES) {
      const int present = static_cast<int>(std::min<int64_t>(LANES, task.in_channels - first));
      const Vec<float> r = rounded(load_as<float>(point + first, present), q);
      sum += keep_first<float>(r - magic, present);
      const Codes codes = __builtin_convertvector((Ints)r - base, Codes);
      int32_t parts[words];
      __builtin_memcpy(parts, &codes, sizeof codes);
      for (int i = 0; i * PER_WORD < present; ++i) row[(first / PER_WORD + i) * task.word_step + place] = parts[i];
    }
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += sum[i];
    space.sums[slot * task.pitch + place] = total;
  }
}

// The band of input rows from `first` on: its codes, and their sums over the channels, which NaN goes with.
template <int PER_WORD, class T>
static void quantize_band(const Task& task, const T* image, int64_t first, int64_t rows, const Quantizer& q,
                          const Workspace& space) {
  const bool points = task.input_c == 1 && task.input_w != 1;
  const float pad = static_cast<float>(q.pad * task.in_channels);
  for (int64_t r = 0; r < rows; ++r) {
    if (!task.reads_row(r)) continue;
    const bool inside = first + r >= 0 && first + r < task.height;
    float* const sums = space.sums + task.row_slot(r) * task.pitch;
    for (int64_t c = 0; c < task.columns; ++c) {
      const bool present = inside && c >= task.left() && c < task.left() + task.inside();
      sums[task.column_slot(c)] = present ? 0.0f : pad;
    }
    if (inside && points) quantize_points<PER_WORD>(task, image, first + r, task.row_slot(r), q, space);
  }
  for (int64_t w = 0; w < task.words; ++w) {  // plane by plane, as they lie in memory
    for (int64_t r = 0; r < rows; ++r) {
      if (!task.reads_row(r)) continue;
      const bool inside = first + r >= 0 && first + r < task.height;
      const int64_t slot = task.row_slot(r);
      if (!inside) fill(space.codes + w * task.word_step + slot * task.row_step, task.pitch, pad_word<PER_WORD>(q));
      else if (!points) quantize_planes<PER_WORD>(task, image, first + r, slot, q, w, space);
    }
  }
}

// ---- The sums of products: tile[8][TILE], for one block of output channels ----

// Pairs of 16-bit numbers: exact on any processor.
TERSOR_INLINE Ints add_products(Ints sum, Ints codes, Ints weights) {
#if TERSOR_ISA_LEVEL == 2
  return sum + (Ints)_mm512_madd_epi16((__m512i)codes, (__m512i)weights);
#elif TERSOR_ISA_LEVEL == 1
  return sum + (Ints)_mm256_madd_epi16((__m256i)codes, (__m256i)weights);
#elif defined(__x86_64__)
  return sum + (Ints)_mm_madd_epi16((__m128i)codes, (__m128i)weights);
#else
  return sum + ((codes << 16) >> 16) * ((weights << 16) >> 16) + (codes >> 16) * (weights >> 16);
#endif
}

template <int P>
static void multiply_pairs_by(const Task& task, const int32_t* codes, const void* weight, int32_t* tile) {
  Ints sum[BLOCK][P] = {};
  const int32_t* pair = static_cast<const int32_t*>(weight);
  for (int64_t t = 0; t < task.taps; ++t) {
    const int32_t* word = codes + task.offsets[t];
    for (int64_t w = 0; w < task.words; ++w, word += task.word_step, pair += BLOCK) {
      Ints x[P];
      for (int p = 0; p < P; ++p) __builtin_memcpy(&x[p], word + p * LANES, sizeof x[p]);
#pragma GCC unroll 8
      for (int o = 0; o < BLOCK; ++o) {
        const Ints weights = pair[o] - Ints{};
        for (int p = 0; p < P; ++p) sum[o][p] = add_products(sum[o][p], x[p], weights);
      }
    }
  }
  for (int o = 0; o < BLOCK; ++o) {
    for (int p = 0; p < P; ++p) __builtin_memcpy(tile + o * TILE + p * LANES, &sum[o][p], sizeof sum[o][p]);
  }
}

static void multiply_pairs(const Task& task, const int32_t* codes, const void* weight, int vectors, int32_t* tile) {
  if (vectors == 1) multiply_pairs_by<1>(task, codes, weight, tile);
#if TERSOR_ISA_LEVEL == 2
  else if (vectors == 2) multiply_pairs_by<2>(task, codes, weight, tile);
  else multiply_pairs_by<3>(task, codes, weight, tile);
#endif
}

#if TERSOR_ISA_LEVEL == 2
namespace vnni {  // an extension that level 4 does not have: asked for at run time
#if defined(__clang__)
#define TERSOR_VNNI __attribute__((target("arch=x86-64-v4,avx512vnni")))
#else
#define TERSOR_VNNI __attribute__((target("avx512vnni")))  // gcc adds it to the pragma's level
#endif

template <int P>
TERSOR_VNNI static void multiply_bytes_by(const Task& task, const int32_t* codes, const void* weight, int32_t* tile) {
  __m512i sum[BLOCK][P];
#pragma GCC unroll 8
  for (int o = 0; o < BLOCK; ++o) {
    for (int p = 0; p < P; ++p) sum[o][p] = _mm512_setzero_si512();
  }
  const int8_t* bytes = static_cast<const int8_t*>(weight);
  const int64_t words = task.words, step = task.word_step, per_tap = (words + 3) / 4 * BLOCK * RUN;
  for (int64_t t = 0; t < task.taps; ++t, bytes += per_tap) {
    const int32_t* word = codes + task.offsets[t];
    for (int64_t w = 0; w < words; ++w, word += step) {
      const int8_t* const at = bytes + (w >> 2) * (BLOCK * RUN) + (w & 3) * 4;
      __m512i x[P];
      for (int p = 0; p < P; ++p) x[p] = _mm512_loadu_si512(word + p * LANES);
#pragma GCC unroll 8
      for (int o = 0; o < BLOCK; ++o) {
        int32_t four;
        __builtin_memcpy(&four, at + o * RUN, 4);
        const __m512i weights = _mm512_set1_epi32(four);
        for (int p = 0; p < P; ++p) sum[o][p] = _mm512_dpbusd_epi32(sum[o][p], x[p], weights);
      }
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < BLOCK; ++o) {
    for (int p = 0; p < P; ++p) _mm512_storeu_si512(tile + o * TILE + p * LANES, sum[o][p]);
  }
}

TERSOR_VNNI static void multiply_bytes(const Task& task, const int32_t* codes, const void* weight, int vectors,
                                       int32_t* tile) {
  if (vectors == 1) multiply_bytes_by<1>(task, codes, weight, tile);
  else if (vectors == 2) multiply_bytes_by<2>(task, codes, weight, tile);
  else multiply_bytes_by<3>(task, codes, weight, tile);
}
#undef TERSOR_VNNI
}  // namespace vnni
#endif

// ---- From sums of products to the output ----

// factor (sums of products + constant + zero * sums of codes - outside) + bias; float64 holds all but the end exactly.
// Then the residual is added, and what is negative becomes 0. `sums`, `outside` and `residual` may be missing.
template <class T>
TERSOR_INLINE void put_row(const int32_t* products, const float* sums, const double* outside, double factor,
                           double constant, double zero, double bias, const T* residual, bool relu, int64_t count,
                           T* output) {
  constexpr int half = LANES / 2;
  for (int64_t x = 0; x < count; x += LANES) {
    Vec<double> part[2];
    for (int i = 0; i < 2; ++i) {
      Vec<double> d = to_double(products + x + i * half) + constant;
      if (sums) d += to_double(sums + x + i * half) * zero;
      if (outside) d -= load(outside + x + i * half);
      part[i] = d * factor + bias;
    }
    const int present = static_cast<int>(std::min<int64_t>(LANES, count - x));
    Vec<float> v = join(part[0], part[1]);
    if (residual) v += load_as<float>(residual + x, present);
    if (relu) v = v < 0 ? splat(0.0f) : v;  // NaN stays
    store_as<float>(output + x, v, present);
  }
}

// What the taps outside the image have added by a code for 0 that is not quite 0 (there is none beyond the bounds).
static void add_outside(const Task& task, const Quantizer& q, int64_t channel, double zero, int64_t y, int64_t x,
                        int64_t count, double* outside) {
  const double zeros = zero * static_cast<double>(task.in_channels);
  const int64_t top = y * task.stride_h - task.padding_h, reach = (task.kernel_w - 1) * task.dilation_w;
  const bool rows_inside = top >= 0 && top + (task.kernel_h - 1) * task.dilation_h < task.height;
  for (int64_t i = 0; i < count; ++i) {
    outside[i] = 0;
    const int64_t left = (x + i) * task.stride_w - task.padding_w;
    if (rows_inside && left >= 0 && left + reach < task.width) continue;
    for (int64_t t = 0; t < task.taps; ++t) {
      const int64_t row = y * task.stride_h - task.padding_h + t / task.kernel_w * task.dilation_h;
      const int64_t column = (x + i) * task.stride_w - task.padding_w + t % task.kernel_w * task.dilation_w;
      if (row >= 0 && row < task.height && column >= 0 && column < task.width) continue;
      outside[i] += q.excess * (task.weight_sums[channel * task.taps + t] + zeros);
    }
  }
}

// `count` positions of one row of the output from column x on, for the channels of one block.
template <class T>
static void put_block(const Task& task, const Unit& unit, const Quantizer& q, int64_t group, int64_t block, int64_t y,
                      int64_t x, int64_t count, const int32_t* tile, const float* sums, const Workspace& space) {
  const int64_t first = group * task.out_channels + block * BLOCK;
  const int64_t channels = std::min<int64_t>(BLOCK, task.out_channels - block * BLOCK);
  const int64_t place = unit.image * task.output_n + first * task.output_c + y * task.output_h + x * task.output_w;
  T* const output = static_cast<T*>(task.output) + place;
  const T* const residual = task.residual ? static_cast<const T*>(task.residual) + place : nullptr;
  const bool relu = task.output_relu;
  const bool along = task.output_w == 1;
  for (int64_t o = 0; o < channels; ++o) {
    const double zero = task.weight_zero ? task.weight_zero[first + o] : 0.0;
    const double bias = task.bias ? task.bias[first + o] : 0.0;
    const double factor = space.factor[block * BLOCK + o], constant = space.constant[block * BLOCK + o];
    const double* outside = nullptr;
    if (q.excess != 0) add_outside(task, q, first + o, zero, y, x, count, space.outside), outside = space.outside;
    const int32_t* const products = tile + o * TILE;
    if (along) {
      const T* const added = residual ? residual + o * task.output_c : nullptr;
      put_row(products, sums, outside, factor, constant, zero, bias, added, relu, count, output + o * task.output_c);
    } else {
      const float* const none = nullptr;
      put_row(products, sums, outside, factor, constant, zero, bias, none, false, count, space.values + o * TILE);
    }
  }
  if (along) return;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t o = 0; o < channels; ++o) {
      const int64_t at = i * task.output_w + o * task.output_c;
      float v = space.values[o * TILE + i];
      if (residual) v += static_cast<float>(residual[at]);
      output[at] = static_cast<T>(relu && v < 0 ? 0.0f : v);
    }
  }
}

// What a tile holds of row y of the output: from position `start` of the tile and column x on.
struct Segment {
  int64_t start, count, y, x;
};

// All of a tile for the channels of one block, whose rows lie along the output: numbers first, over the columns between
// rows too, then row by row.
template <class T>
static void put_rows(const Task& task, const Unit& unit, int64_t group, int64_t block, const Segment* segments,
                     int rows, int64_t count, const float* sums, const Workspace& space) {
  const int64_t first = group * task.out_channels + block * BLOCK;
  const int64_t channels = std::min<int64_t>(BLOCK, task.out_channels - block * BLOCK);
  const int64_t image = unit.image * task.output_n + first * task.output_c;
  for (int64_t o = 0; o < channels; ++o) {
    const double zero = task.weight_zero ? task.weight_zero[first + o] : 0.0;
    const double bias = task.bias ? task.bias[first + o] : 0.0;
    const double factor = space.factor[block * BLOCK + o], constant = space.constant[block * BLOCK + o];
    const float* const none = nullptr;
    put_row(space.tile + o * TILE, sums, nullptr, factor, constant, zero, bias, none, false, count, space.values);
    for (int s = 0; s < rows; ++s) {
      const int64_t at = image + o * task.output_c + segments[s].y * task.output_h + segments[s].x;
      T* const output = static_cast<T*>(task.output) + at;
      const T* const residual = task.residual ? static_cast<const T*>(task.residual) + at : nullptr;
      for (int64_t x = 0; x < segments[s].count; x += LANES) {
        const int present = static_cast<int>(std::min<int64_t>(LANES, segments[s].count - x));
        Vec<float> v = load(space.values + segments[s].start + x);
        if (residual) v += load_as<float>(residual + x, present);
        if (task.output_relu) v = v < 0 ? splat(0.0f) : v;
        store_as<float>(output + x, v, present);
      }
    }
  }
}

TERSOR_INLINE bool any_nan(const float* values, int64_t count) {
  bool found = false;
  for (int64_t i = 0; i < count; ++i) found |= values[i] != values[i];
  return found;
}

// `vectors` vectors of positions from `start` on, for all of the unit's blocks in the group. In a flat band they run
// on from row to row, over the columns between them too.
template <class T>
static void do_tile(const Task& task, const Unit& unit, const Quantizer& q, int64_t group, int64_t start, int vectors,
                    int64_t line, const Workspace& space) {
  const int64_t count = static_cast<int64_t>(vectors) * LANES;
  for (int64_t i = 0; i < count; ++i) space.tile_sums[i] = 0;
  for (int64_t t = 0; t < task.taps; ++t) {
    const float* const sums = space.sums + task.sum_offsets[t] + line * task.pitch + start;
    for (int64_t i = 0; i < count; ++i) space.tile_sums[i] += sums[i];
  }
  const bool with_sums = task.weight_zero || any_nan(space.tile_sums, count);
  const int64_t last_row = unit.last_row - unit.first_row - 1;
  Segment segments[TILE];
  int rows = 0;
  for (int64_t i = 0; i < count;) {
    const int64_t row = task.flat ? (start + i) / task.pitch : line;
    const int64_t x = task.flat ? (start + i) % task.pitch : start + i;
    if (row > last_row) break;
    const int64_t wide = std::min(count - i, task.out_width - x);
    if (wide > 0) segments[rows++] = {i, wide, unit.first_row + row, x};
    i += task.flat ? std::min(count - i, task.pitch - x) : count;
  }
  const float* const sums = with_sums ? space.tile_sums : nullptr;
  const bool whole = task.flat && task.output_w == 1 && q.excess == 0;
  for (int64_t b = unit.first_block(task, group); b < unit.last_block(task, group); ++b) {
    task.multiply(task, space.codes + line * task.row_step + start, task.packed_block(group, b), vectors, space.tile);
    if (whole) put_rows<T>(task, unit, group, b, segments, rows, count, sums, space);
    for (int r = 0; !whole && r < rows; ++r) {
      const Segment& s = segments[r];
      put_block<T>(task, unit, q, group, b, s.y, s.x, s.count, space.tile + s.start, sums ? sums + s.start : nullptr,
                   space);
    }
  }
}

template <class T>
static void do_unit(const Task& task, const Unit& unit, char* memory) {
  Arena arena{memory};
  const Workspace space(task, arena);
  const Quantizer& q = task.quantizers[task.quantizer_count == 1 ? 0 : unit.image];
  const int64_t rows = unit.last_row - unit.first_row;
  const int64_t in_rows = (rows - 1) * task.stride_h + (task.kernel_h - 1) * task.dilation_h + 1;
  const int64_t length = task.flat ? (rows - 1) * task.pitch + task.out_width : task.out_width;
  for (int64_t g = unit.first / task.blocks; g <= (unit.last - 1) / task.blocks; ++g) {
    const T* const image = static_cast<const T*>(task.input) + unit.image * task.input_n +
                           g * task.in_channels * task.input_c;
    const int64_t first = unit.first_row * task.stride_h - task.padding_h;
    if (task.per_word == 4) quantize_band<4>(task, image, first, in_rows, q, space);
    else quantize_band<2>(task, image, first, in_rows, q, space);
    for (int64_t o = 0; o < task.out_channels; ++o) {
      const int64_t channel = g * task.out_channels + o;
      const double terms = static_cast<double>(task.taps * task.in_channels);
      double total = task.weight_zero ? terms * task.weight_zero[channel] : 0.0;
      for (int64_t t = 0; t < task.taps; ++t) total += task.weight_sums[channel * task.taps + t];
      space.factor[o] = task.weight_scale[channel] / static_cast<double>(q.scale);
      space.constant[o] = q.shift * total;
    }
    for (int64_t line = 0; line < (task.flat ? 1 : rows); ++line) {
      const int64_t all = (length + LANES - 1) / LANES;
      for (int64_t v = 0; v < all;) {
        const int64_t left = all - v;
        const int vectors = VECTORS == 1 ? 1 : static_cast<int>(left == 4 ? 2 : std::min<int64_t>(left, VECTORS));
        do_tile<T>(task, unit, q, g, v * LANES, vectors, line, space);
        v += vectors;
      }
    }
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::quantized_conv2d

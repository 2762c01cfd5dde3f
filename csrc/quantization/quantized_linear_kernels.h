// The kernels of quantized_linear.cpp, compiled once per instruction set (foreach_isa.h includes this file).
//
// A row's codes lie side by side, as do 16 codes of each of a block's 8 output channels. So a vector of weights holds 16
// input channels of a few outputs, a row's 16 codes are broadcast to it, and up to six rows share what was loaded. The
// partial sums of an output are added at the end. All are whole numbers and each result is computed by one unit: the
// same bits for any number of threads.

#include "quantization/quantized_input_kernels.h"

namespace tersor::quantized_linear {
namespace TERSOR_ISA {
using namespace tersor::quantized::TERSOR_ISA;

// One thread's memory.
struct Workspace {
  char* codes;  // [rows][task.pitch bytes]
  float* sums;  // of the codes, which NaN goes with
  double *factor, *constant, *zero, *bias;
  int32_t* tile;

  Workspace(const Task& task, Arena& arena) {
    codes = arena.take<char>(task.rows_at_once * task.pitch);
    sums = arena.take<float>(task.rows_at_once);
    const int64_t outputs = round_up(task.blocks, 2) * BLOCK;
    for (double** each : {&factor, &constant, &zero, &bias}) *each = arena.take<double>(outputs);
    tile = arena.take<int32_t>(ROWS * PAIR);
  }
};

static int64_t scratch(const Task& task) {
  Arena arena{nullptr};
  Workspace(task, arena);
  return arena.used;
}

// One row's codes and their sum; what lies beyond its channels meets weights of zero.
template <class Code, class T>
TERSOR_INLINE float quantize_row(const T* row, int64_t channels, int64_t padded, const Quantizer& q, Code* codes) {
  typedef Code Codes __attribute__((vector_size(LANES * sizeof(Code))));
  const int32_t base = MAGIC_BITS - q.half;
  const float magic = MAGIC - static_cast<float>(q.half);
  Vec<float> sum{};
  int64_t c = 0;
  for (; c < channels; c += LANES) {
    const int present = static_cast<int>(std::min<int64_t>(LANES, channels - c));
    const Vec<float> r = rounded(load_as<float>(row + c, present), q);
    sum += keep_first<float>(r - magic, present);
    const Codes few = __builtin_convertvector((Ints)r - base, Codes);
    __builtin_memcpy(codes + c, &few, sizeof few);
  }
  for (; c < padded; ++c) codes[c] = 0;
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += sum[i];
  return total;
}

// ---- The sums of products: tile[row][16], for `rows` rows and two blocks of output channels ----

#if TERSOR_ISA_LEVEL >= 1
typedef __m256i Sixteen;  // numbers of 16 bits

TERSOR_INLINE Sixteen sixteen_weights(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
TERSOR_INLINE Sixteen sixteen_codes(const int16_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
TERSOR_INLINE Sixteen add_products(Sixteen sum, Sixteen codes, Sixteen weights) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(codes, weights));
}
TERSOR_INLINE void add_up(const Sixteen sum[4], int32_t* total) {
  const __m256i halves = _mm256_hadd_epi32(_mm256_hadd_epi32(sum[0], sum[1]), _mm256_hadd_epi32(sum[2], sum[3]));
  const __m128i all = _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(total), all);
}
#elif defined(__x86_64__)
struct Sixteen {
  __m128i low, high;
};

TERSOR_INLINE Sixteen sixteen_weights(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8), _mm_srai_epi16(_mm_unpackhi_epi8(bytes, bytes), 8)};
}
TERSOR_INLINE Sixteen sixteen_codes(const int16_t* p) {
  return {_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8))};
}
TERSOR_INLINE Sixteen add_products(Sixteen sum, Sixteen codes, Sixteen weights) {
  return {_mm_add_epi32(sum.low, _mm_madd_epi16(codes.low, weights.low)),
          _mm_add_epi32(sum.high, _mm_madd_epi16(codes.high, weights.high))};
}
TERSOR_INLINE void add_up(const Sixteen sum[4], int32_t* total) {
  for (int o = 0; o < 4; ++o) {
    const __m128i all = _mm_add_epi32(sum[o].low, sum[o].high);
    const __m128i half = _mm_add_epi32(all, _mm_shuffle_epi32(all, 0x4e));
    total[o] = _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
  }
}
#else
struct Sixteen {
  int32_t lane[16];
};

TERSOR_INLINE Sixteen sixteen_weights(const int8_t* p) {
  Sixteen v;
  for (int i = 0; i < 16; ++i) v.lane[i] = p[i];
  return v;
}
TERSOR_INLINE Sixteen sixteen_codes(const int16_t* p) {
  Sixteen v;
  for (int i = 0; i < 16; ++i) v.lane[i] = p[i];
  return v;
}
TERSOR_INLINE Sixteen add_products(Sixteen sum, Sixteen codes, Sixteen weights) {
  for (int i = 0; i < 16; ++i) sum.lane[i] += codes.lane[i] * weights.lane[i];
  return sum;
}
TERSOR_INLINE void add_up(const Sixteen sum[4], int32_t* total) {
  for (int o = 0; o < 4; ++o) {
    total[o] = 0;
    for (int i = 0; i < 16; ++i) total[o] += sum[o].lane[i];
  }
}
#endif

// Numbers of 16 bits: exact on any processor. Four outputs of R rows at a time.
template <int R>
static void multiply_pairs_by(const Task& task, const char* codes, const int8_t* weight, int32_t* tile) {
  for (int four = 0; four < BLOCK; four += 4) {
    Sixteen sum[R][4] = {};
    for (int64_t run = 0; run < task.runs; ++run) {
      Sixteen x[R];
      for (int r = 0; r < R; ++r) {
        x[r] = sixteen_codes(reinterpret_cast<const int16_t*>(codes + r * task.pitch) + run * RUN);
      }
#pragma GCC unroll 4
      for (int o = 0; o < 4; ++o) {
        const Sixteen w = sixteen_weights(weight + (run * BLOCK + four + o) * RUN);
        for (int r = 0; r < R; ++r) sum[r][o] = add_products(sum[r][o], x[r], w);
      }
    }
    for (int r = 0; r < R; ++r) add_up(sum[r], tile + r * PAIR + four);
  }
}

static void multiply_pairs(const Task& task, const char* codes, int rows, const int8_t* first, const int8_t* second,
                           int32_t* tile) {
  for (int r = 0; r < rows; r += 2) {
    const char* const from = codes + r * task.pitch;
    int32_t* const to = tile + r * PAIR;
    if (rows - r == 1) {
      multiply_pairs_by<1>(task, from, first, to), multiply_pairs_by<1>(task, from, second, to + BLOCK);
    } else {
      multiply_pairs_by<2>(task, from, first, to), multiply_pairs_by<2>(task, from, second, to + BLOCK);
    }
  }
}

#if TERSOR_ISA_LEVEL == 2
namespace vnni {  // an extension that level 4 does not have: asked for at run time
#if defined(__clang__)
#define TERSOR_VNNI __attribute__((target("arch=x86-64-v4,avx512vnni")))
#else
#define TERSOR_VNNI __attribute__((target("avx512vnni")))  // gcc adds it to the pragma's level
#endif

// Vector v of the four holds outputs 4 v to 4 v + 3, each as four numbers side by side, which are added up. Shuffles by
// gcc's own names: the intrinsics' make it warn of what they leave undefined.
TERSOR_INLINE Ints add_up(__m512i a, __m512i b, __m512i c, __m512i d) {
#define TERSOR_ADD_HALVES(x, y)                                                                                     \
  (__builtin_shufflevector((Ints)x, (Ints)y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +            \
   __builtin_shufflevector((Ints)x, (Ints)y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31))
  const Ints ab = TERSOR_ADD_HALVES(a, b), cd = TERSOR_ADD_HALVES(c, d);
#undef TERSOR_ADD_HALVES
  const Ints all = __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                   __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return __builtin_shufflevector(all, all, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}

template <int R>
TERSOR_VNNI static void multiply_bytes_by(const Task& task, const char* codes, const int8_t* first,
                                          const int8_t* second, int32_t* tile) {
  __m512i sum[R][4];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_setzero_si512();
  }
  for (int64_t run = 0; run < task.runs; ++run) {
    __m512i w[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      w[v] = _mm512_loadu_si512((v < 2 ? first : second) + run * (BLOCK * RUN) + v % 2 * 64);
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m128i few = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + r * task.pitch + run * RUN));
      const __m512i x = _mm512_broadcast_i32x4(few);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_dpbusd_epi32(sum[r][v], x, w[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) asm("" : "+v"(sum[r][v]));  // or gcc keeps two copies of each, the loop's and this
    const Ints total = add_up(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
    __builtin_memcpy(tile + r * PAIR, &total, sizeof total);
  }
}

TERSOR_VNNI static void multiply_bytes(const Task& task, const char* codes, int rows, const int8_t* first,
                                       const int8_t* second, int32_t* tile) {
  if (rows == 6) multiply_bytes_by<6>(task, codes, first, second, tile);
  if (rows == 5) multiply_bytes_by<5>(task, codes, first, second, tile);
  if (rows == 4) multiply_bytes_by<4>(task, codes, first, second, tile);
  if (rows == 3) multiply_bytes_by<3>(task, codes, first, second, tile);
  if (rows == 2) multiply_bytes_by<2>(task, codes, first, second, tile);
  if (rows == 1) multiply_bytes_by<1>(task, codes, first, second, tile);
}
#undef TERSOR_VNNI
}  // namespace vnni
#endif

// factor (sums of products + constant + zero * sum of codes) + bias; float64 holds all but the end exactly.
template <class T>
TERSOR_INLINE void put_row(const Workspace& space, int64_t place, const int32_t* products, float sum, bool with_sum,
                           int64_t count, T* output) {
  constexpr int half = LANES / 2;
  for (int64_t o = 0; o < count; o += LANES) {
    Vec<double> part[2];
    for (int i = 0; i < 2; ++i) {
      const int64_t at = place + o + i * half;
      Vec<double> d = to_double(products + o + i * half) + load(space.constant + at);
      if (with_sum) d += load(space.zero + at) * static_cast<double>(sum);
      part[i] = d * load(space.factor + at) + load(space.bias + at);
    }
    store_as<float>(output + o, join(part[0], part[1]), static_cast<int>(std::min<int64_t>(LANES, count - o)));
  }
}

// What a unit's outputs have in common, at their places from the first of its blocks on.
static void set_numbers(const Task& task, const Unit& unit, const Quantizer& q, const Workspace& space) {
  const int64_t first = unit.first_block * BLOCK;
  const int64_t outputs = std::min(task.outputs, unit.last_block * BLOCK) - first;
  const double terms = static_cast<double>(task.inputs), scale = static_cast<double>(q.scale);
  for (int64_t i = 0; i < outputs; ++i) {
    const int64_t o = first + i;
    space.zero[i] = task.weight_zero ? task.weight_zero[o] : 0.0;
    space.bias[i] = task.bias ? task.bias[o] : 0.0;
    space.factor[i] = task.weight_scale[o] / scale;
    space.constant[i] = q.shift * (task.weight_sums[o] + terms * space.zero[i]);
  }
  for (int64_t i = outputs; i < round_up(outputs, PAIR); ++i) {  // read, not written
    space.zero[i] = space.bias[i] = space.factor[i] = space.constant[i] = 0;
  }
}

template <class T>
static void do_unit(const Task& task, const Unit& unit, char* memory) {
  Arena arena{memory};
  const Workspace space(task, arena);
  const Quantizer& q = task.quantizers[task.quantizer_count == 1 ? 0 : unit.first_row / task.rows_per_sample];
  const int64_t rows = unit.last_row - unit.first_row, padded = task.runs * RUN;
  for (int64_t r = 0; r < rows; ++r) {
    const T* const row = static_cast<const T*>(task.input) + (unit.first_row + r) * task.inputs;
    char* const codes = space.codes + r * task.pitch;
    space.sums[r] = task.bytes ? quantize_row(row, task.inputs, padded, q, reinterpret_cast<int8_t*>(codes))
                               : quantize_row(row, task.inputs, padded, q, reinterpret_cast<int16_t*>(codes));
  }
  set_numbers(task, unit, q, space);
  const int64_t block_bytes = task.runs * BLOCK * RUN;
  for (int64_t b = unit.first_block; b < unit.last_block; b += 2) {
    const int8_t* const first = task.weight + b * block_bytes;
    const int8_t* const second = b + 1 < unit.last_block ? first + block_bytes : first;
    const int64_t count = std::min<int64_t>(task.outputs, std::min(unit.last_block, b + 2) * BLOCK) - b * BLOCK;
    for (int64_t r = 0; r < rows; r += ROWS) {
      const int some = static_cast<int>(std::min<int64_t>(ROWS, rows - r));
      task.multiply(task, space.codes + r * task.pitch, some, first, second, space.tile);
      for (int i = 0; i < some; ++i) {
        const float sum = space.sums[r + i];
        T* const output = static_cast<T*>(task.output) + (unit.first_row + r + i) * task.outputs + b * BLOCK;
        put_row(space, (b - unit.first_block) * BLOCK, space.tile + i * PAIR, sum, task.weight_zero || sum != sum, count,
                output);
      }
    }
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::quantized_linear

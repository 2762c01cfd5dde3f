// The kernels of nm_product.h for few columns, compiled once per instruction set (foreach_isa.h includes this file).
//
// The weight is read once and bounds the time; the columns are in the cache, and their elements are taken to the values.

namespace tersor::nm_product {
namespace TERSOR_ISA {
using namespace ::tersor::TERSOR_ISA;

constexpr int64_t SPAN = 4096;  // elements of a row whose offsets are found at a time
constexpr int64_t AHEAD = 4096;  // bytes of values asked for early: the hardware stops at the end of each page

// Elements x[offset] of a column.
TERSOR_INLINE Vec<float> take(const float* x, const uint16_t* offsets) {
#if TERSOR_ISA_LEVEL == 2
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(offsets)));
  return (Vec<float>)_mm512_i32gather_ps(wide, x, 4);
#elif TERSOR_ISA_LEVEL == 1
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(offsets)));
  return (Vec<float>)_mm256_i32gather_ps(x, wide, 4);
#else
  return Vec<float>{x[offsets[0]], x[offsets[1]], x[offsets[2]], x[offsets[3]]};
#endif
}

// One row of the weight times COLUMNS columns, `pitch` apart.
template <class T, int COLUMNS>
static void multiply_any(const Task& task, const T* values, const uint8_t* index, const uint16_t* table,
                         const float* columns, int64_t pitch, float* sums) {
  constexpr int lanes = Simd<float>::lanes;
  const int64_t span = SPAN / (8 * task.m) * (8 * task.m);
  uint16_t offsets[SPAN + SLACK];
  Vec<float> sum[COLUMNS] = {};
  float rest[COLUMNS] = {};
  const Places& places = *task.places;
  for (int64_t first = 0; first < task.row(); first += span) {
    const int64_t last = std::min(task.row(), first + span), count = (last - first) / task.m * task.n;
    const int64_t bytes = (last - first + places.elements - 1) / places.elements * (places.wide ? 2 : 1);
    find_offsets(task, table, 1, index, bytes, offsets);
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      const Vec<float> value = widen(values + i);
      for (int c = 0; c < COLUMNS; ++c) {
        sum[c] = fma<float>(value, take(columns + c * pitch + first, offsets + i), sum[c]);
      }
    }
    for (; i < count; ++i) {
      for (int c = 0; c < COLUMNS; ++c) rest[c] += static_cast<float>(values[i]) * columns[c * pitch + first + offsets[i]];
    }
    values += count, index += bytes;
  }
  for (int c = 0; c < COLUMNS; ++c) sums[c] = total(sum[c]) + rest[c];
}

#if TERSOR_ISA_LEVEL == 2
// One or two kept of four: 16 values belong to 64 or 32 elements, among which permutations choose. Lane i has its place
// in bits 2 i and 2 i + 1 of a word of the index.
template <class T, int KEPT, int COLUMNS>
static void multiply_fours(const Task& task, const T* values, const uint8_t* index, const float* columns, int64_t pitch,
                           float* sums) {
  constexpr int elements = 64 / KEPT;
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i shift = _mm512_slli_epi32(lane, 1), three = _mm512_set1_epi32(3);
  // The group's first element, of the 32 that a permutation reaches.
  const __m512i start = _mm512_and_si512(_mm512_slli_epi32(KEPT == 2 ? _mm512_srli_epi32(lane, 1) : lane, 2),
                                         _mm512_set1_epi32(31));
  __m512 sum[COLUMNS][2] = {};
  const int64_t words = task.row() / elements;
  const float* x = columns;
  const auto multiply = [&](int64_t i, int chain) __attribute__((always_inline)) {
    int32_t word;
    __builtin_memcpy(&word, index + 4 * i, 4);
    const __m512i place = _mm512_srlv_epi32(_mm512_set1_epi32(word), shift);
    const __m512i from = _mm512_ternarylogic_epi32(place, three, start, 0xEA);  // place & 3 | start
    __builtin_prefetch(values + 16 * i + AHEAD / sizeof(T));
    const __m512 value = (__m512)widen(values + 16 * i);
    for (int c = 0; c < COLUMNS; ++c) {
      const float* const at = x + c * pitch;
      __m512 taken = _mm512_permutex2var_ps(_mm512_loadu_ps(at), from, _mm512_loadu_ps(at + 16));
      if constexpr (KEPT == 1) {
        const __m512 upper = _mm512_permutex2var_ps(_mm512_loadu_ps(at + 32), from, _mm512_loadu_ps(at + 48));
        taken = _mm512_mask_blend_ps(0xFF00, taken, upper);
      }
      sum[c][chain] = _mm512_fmadd_ps(value, taken, sum[c][chain]);
    }
    x += elements;
  };
  int64_t i = 0;
  for (; i + 2 <= words; i += 2) multiply(i, 0), multiply(i + 1, 1);
  if (i < words) multiply(i++, 0);
  float rest[COLUMNS] = {};
  for (int64_t k = 16 * i; k < task.kept(); ++k) {
    const int place = index[k / 4] >> (2 * (k % 4)) & 3;
    const int64_t at = k / KEPT * 4 + place;
    for (int c = 0; c < COLUMNS; ++c) rest[c] += static_cast<float>(values[k]) * columns[c * pitch + at];
  }
  for (int c = 0; c < COLUMNS; ++c) sums[c] = total((Vec<float>)(sum[c][0] + sum[c][1])) + rest[c];
}
#endif

#if TERSOR_ISA_LEVEL == 2
// Some of the elements in float32, zeros for the others, which are not read.
TERSOR_INLINE __m512 load_some(const float* p, __mmask16 some) { return _mm512_maskz_loadu_ps(some, p); }
TERSOR_INLINE __m512 load_some(const Half* p, __mmask16 some) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, p));
}
TERSOR_INLINE __m512 load_some(const BFloat16* p, __mmask16 some) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p)), 16);
}

// Masks of groups of 4, 8 or 16: two bytes are the mask of 16 elements, to which their values are spread.
template <class T, int COLUMNS>
static void multiply_masks(const Task& task, const T* values, const uint8_t* index, const float* columns, int64_t pitch,
                           float* sums) {
  const int each = static_cast<int>(16 / task.m * task.n);
  const __mmask16 some = static_cast<__mmask16>((1u << each) - 1);
  __m512 sum[COLUMNS][2] = {};
  const int64_t row = task.row(), whole = row / 16 * 16;
  const auto multiply = [&](int64_t k, __mmask16 mask, __mmask16 present, int chain) __attribute__((always_inline)) {
    const __m512 value = _mm512_maskz_expand_ps(mask, load_some(values, present));
    for (int c = 0; c < COLUMNS; ++c) {
      const __m512 x = _mm512_maskz_loadu_ps(mask, columns + c * pitch + k);
      sum[c][chain] = _mm512_fmadd_ps(value, x, sum[c][chain]);
    }
    values += each;
  };
  const auto mask_at = [&](int64_t k) __attribute__((always_inline)) {
    uint16_t mask;
    __builtin_memcpy(&mask, index + k / 8, 2);
    return static_cast<__mmask16>(mask);
  };
  int64_t k = 0;
  for (; k + 32 <= whole; k += 32) {
    __builtin_prefetch(values + AHEAD / sizeof(T));
    multiply(k, mask_at(k), some, 0), multiply(k + 16, mask_at(k + 16), some, 1);
  }
  if (k < whole) multiply(k, mask_at(k), some, 0);
  if (whole < row) {
    uint32_t mask = index[whole / 8];
    if (row - whole > 8) mask |= static_cast<uint32_t>(index[whole / 8 + 1]) << 8;
    const int64_t left = (row - whole) / task.m * task.n;
    mask &= (1u << (row - whole)) - 1;
    multiply(whole, static_cast<__mmask16>(mask), static_cast<__mmask16>((1u << left) - 1), 0);
  }
  for (int c = 0; c < COLUMNS; ++c) sums[c] = total((Vec<float>)(sum[c][0] + sum[c][1]));
}
#endif

template <class T, int COLUMNS>
TERSOR_INLINE void multiply_row(const Task& task, const T* values, const uint8_t* index, const uint16_t* table,
                                const float* columns, int64_t pitch, float* sums) {
#if TERSOR_ISA_LEVEL == 2
  if (task.m == 4 && task.n == 2) return multiply_fours<T, 2, COLUMNS>(task, values, index, columns, pitch, sums);
  if (task.m == 4 && task.n == 1) return multiply_fours<T, 1, COLUMNS>(task, values, index, columns, pitch, sums);
  const bool masks = !task.places->bits && (task.m == 4 || task.m == 8 || task.m == 16);
  if (masks) return multiply_masks<T, COLUMNS>(task, values, index, columns, pitch, sums);
#endif
  multiply_any<T, COLUMNS>(task, values, index, table, columns, pitch, sums);
}

// Rows [from, to) of the weight; the columns, float32, lie `pitch` apart.
template <class T>
static void multiply_vectors(const Task& task, const float* columns, int64_t pitch, int64_t from, int64_t to) {
  alignas(64) uint16_t table[TABLE];
  make_table(task, 1, table);
  for (int64_t o = from; o < to; ++o) {
    const T* const values = static_cast<const T*>(task.values) + o * task.kept();
    const uint8_t* const index = task.index + o * task.index_row;
    const float bias = task.bias ? static_cast<float>(static_cast<const T*>(task.bias)[o]) : 0.0f;
    for (int64_t c = 0; c < task.columns;) {
      const int64_t left = task.columns - c;
      const float* const at = columns + c * pitch;
      float sums[4];
      int count = 1;
      if (left >= 4) multiply_row<T, 4>(task, values, index, table, at, pitch, sums), count = 4;
      else if (left >= 2) multiply_row<T, 2>(task, values, index, table, at, pitch, sums), count = 2;
      else multiply_row<T, 1>(task, values, index, table, at, pitch, sums);
      Vec<float> all{};
      for (int i = 0; i < count; ++i) all[i] = sums[i] + bias;
      all = activate(all, task.activation);
      for (int i = 0; i < count; ++i, ++c) {
        static_cast<T*>(task.output)[c * task.output_w + o] = static_cast<T>(all[i]);
      }
    }
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::nm_product

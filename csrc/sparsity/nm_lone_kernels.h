// The kernels of nm_product.h where one of 5 to 16 elements is kept, compiled once per instruction set. Only for vectors
// that hold a whole group; foreach_isa.h includes this file for all.
//
// A vector holds 16 rows of the weight at one group: of a column's group, a permutation takes to every row its element.
// Nothing is transposed but the values, and a product needs one load, one permutation and one addition.

namespace tersor::nm_product {
namespace TERSOR_ISA {
#if TERSOR_ISA_LEVEL == 2
using namespace ::tersor::TERSOR_ISA;

// Columns of a unit, and how far apart they lie in 24 KiB, half of an L1 cache.
constexpr int MOST_COLUMNS = 24, MOST_PITCH = 256;  // 24 sums in 32 registers
constexpr int FEW_COLUMNS = 4, FEW_PITCH = 1536;

// One thread's memory.
struct LoneWorkspace {
  float *input, *sums;
  const void** pixels;
  int64_t columns_pitch, sums_pitch;

  LoneWorkspace(int64_t columns, int64_t outputs, Arena& arena)
      : columns_pitch(columns > FEW_COLUMNS ? MOST_PITCH : FEW_PITCH), sums_pitch((outputs + 15) / 16 * 16) {
    input = arena.take<float>(columns * columns_pitch + 16), sums = arena.take<float>(columns * sums_pitch);
    pixels = arena.take<const void*>(MOST_COLUMNS + LANES);
  }
};

static int64_t lone_scratch(const Task& task, int64_t outputs) {
  Arena arena{nullptr};
  LoneWorkspace(std::min<int64_t>(MOST_COLUMNS, task.columns), outputs, arena);
  return arena.used;
}

// The index of 8 groups of 16 rows, 4 bits each, of which `bytes` bytes are there. `rows` says where the rows begin.
TERSOR_INLINE __m512i eight_places(const uint8_t* index, __m512i rows, int64_t bytes) {
  if (__builtin_expect(bytes >= 4, 1)) return _mm512_i32gather_epi32(rows, index, 1);
  alignas(64) int32_t start[16], word[16];
  _mm512_store_si512(start, rows);
  for (int r = 0; r < 16; ++r) {
    word[r] = 0;
    for (int64_t b = 0; b < bytes; ++b) word[r] |= index[start[r] + b] << (8 * b);
  }
  return _mm512_load_si512(word);
}

// 16 rows of the weight, `groups` groups of a chunk, times COLUMNS columns.
template <class T, int COLUMNS, int PITCH>
static void multiply_lone(const Task& task, const T* values, const uint8_t* index, int rows, int64_t groups,
                          const float* input, float* sums, int64_t pitch, bool first) {
  __m512 sum[COLUMNS];
#pragma GCC unroll 32
  for (int c = 0; c < COLUMNS; ++c) sum[c] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + c * pitch);
  const int64_t kept = task.kept();
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i starts = _mm512_mullo_epi32(_mm512_maskz_min_epi32(0xFFFF, lane, _mm512_set1_epi32(rows - 1)),
                                            _mm512_set1_epi32(static_cast<int32_t>(task.index_row)));
  for (int64_t g = 0; g < groups; g += 8) {
    __m512i place = eight_places(index + g / 2, starts, (groups - g + 1) / 2);
    // The same part of the next rows, 8 lines of theirs: runs this short the hardware does not see coming.
    const T* const next = values + (16 + g / 8 % 2 * 8) * kept + g;
    for (int r = 0; r < 8; ++r) __builtin_prefetch(next + r * kept);
    for (int64_t four = g; four < std::min(groups, g + 8); four += 4) {
      Vec<float> value[4];
      const int there = static_cast<int>(std::min<int64_t>(4, groups - four));
      load_tokens(values + four, kept, rows, there, value);
      const float* at = input + four * task.m;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, at += task.m) {
        if (i >= there) break;
#pragma GCC unroll 32
        for (int c = 0; c < COLUMNS; ++c) {
          const __m512 taken = _mm512_maskz_permutexvar_ps(0xFFFF, place, _mm512_loadu_ps(at + c * PITCH));
          sum[c] = _mm512_fmadd_ps((__m512)value[i], taken, sum[c]);
        }
        place = _mm512_srli_epi32(place, 4);
      }
    }
  }
#pragma GCC unroll 32
  for (int c = 0; c < COLUMNS; ++c) _mm512_storeu_ps(sums + c * pitch, sum[c]);
}

// Elements [first, last) of the columns, as they lie in memory; zeros where a permutation reaches beyond.
template <class T>
static void copy_columns(const Task& task, const Unit& unit, int64_t first, int64_t last, const LoneWorkspace& space) {
  for (int64_t k = first; k < last;) {
    const int64_t tap = k / task.channels, end = std::min(last, (tap + 1) * task.channels);
    find_pixels<T>(task, unit, tap, space.pixels);
    for (int64_t c = 0; c < unit.last - unit.first; ++c) {
      const T* const from = static_cast<const T*>(space.pixels[c]) + (k - tap * task.channels);
      float* const to = space.input + c * space.columns_pitch + (k - first);
      for (int64_t i = 0; i < end - k; i += LANES) {
        const int count = static_cast<int>(std::min<int64_t>(LANES, end - k - i));
        if (count == LANES) store<float>(to + i, widen(from + i));
        else for (int j = 0; j < count; ++j) to[i + j] = static_cast<float>(from[i + j]);
      }
    }
    k = end;
  }
}

// Bias and activation on the sums, and these to the output, whose columns have their outputs side by side.
template <class T>
static void write_lone(const Task& task, const Unit& unit, const LoneWorkspace& space) {
  const int64_t row = unit.group * task.outputs;
  for (int64_t c = unit.first; c < unit.last; ++c) {
    T* const to = static_cast<T*>(task.output) + c / task.pixels() * task.output_n + c % task.pixels() * task.output_w;
    const float* const sums = space.sums + (c - unit.first) * space.sums_pitch;
    for (int64_t o = unit.from; o < unit.to; o += LANES) {
      const int count = static_cast<int>(std::min<int64_t>(LANES, unit.to - o));
      Vec<float> v = load(sums + o - unit.from);
      if (task.bias) v += load_as<float>(static_cast<const T*>(task.bias) + row + o, count);
      store_as<float>(to + row + o, activate(v, task.activation), count);
    }
  }
}

template <class T>
using MultiplyLone = void (*)(const Task&, const T*, const uint8_t*, int, int64_t, const float*, float*, int64_t, bool);

template <class T>
static void do_lone_unit(const Task& task, const Unit& unit, void* memory) {
  Arena arena{static_cast<char*>(memory)};
  const int64_t columns = unit.last - unit.first;
  const LoneWorkspace space(columns, unit.to - unit.from, arena);
  const int64_t pitch = space.columns_pitch, chunk = pitch / (2 * task.m) * 2 * task.m;
  std::fill(space.input, space.input + columns * pitch + 16, 0.0f);
  if (task.row() == 0) std::fill(space.sums, space.sums + columns * space.sums_pitch, 0.0f);
  constexpr int sizes[] = {24, 16, 8, 4, 2, 1};
  const MultiplyLone<T> most[] = {multiply_lone<T, 24, MOST_PITCH>, multiply_lone<T, 16, MOST_PITCH>,
                                  multiply_lone<T, 8, MOST_PITCH>,  multiply_lone<T, 4, MOST_PITCH>,
                                  multiply_lone<T, 2, MOST_PITCH>,  multiply_lone<T, 1, MOST_PITCH>};
  const MultiplyLone<T> few[] = {nullptr, nullptr, nullptr, multiply_lone<T, 4, FEW_PITCH>,
                                 multiply_lone<T, 2, FEW_PITCH>, multiply_lone<T, 1, FEW_PITCH>};
  for (int64_t first = 0; first < task.row(); first += chunk) {
    const int64_t last = std::min(task.row(), first + chunk), groups = (last - first) / task.m;
    copy_columns<T>(task, unit, first, last, space);
    for (int64_t o = unit.from; o < unit.to; o += 16) {
      const int64_t row = unit.group * task.outputs + o;
      const int rows = static_cast<int>(std::min<int64_t>(16, unit.to - o));
      const T* const values = static_cast<const T*>(task.values) + row * task.kept() + first / task.m;
      const uint8_t* const index = task.index + row * task.index_row + first / task.m / 2;
      for (int64_t c = 0; c < columns;) {
        int size = 0;
        while (sizes[size] > columns - c) ++size;
        (columns > FEW_COLUMNS ? most : few)[size](task, values, index, rows, groups, space.input + c * pitch,
                                                   space.sums + c * space.sums_pitch + (o - unit.from),
                                                   space.sums_pitch, first == 0);
        c += sizes[size];
      }
    }
  }
  write_lone<T>(task, unit, space);
}

template <class T>
static UnitKernels lone_kernels() {
  return {do_lone_unit<T>, lone_scratch, MOST_COLUMNS};
}
#else
template <class T>
static UnitKernels lone_kernels() {
  return {};
}
#endif

}  // namespace TERSOR_ISA
}  // namespace tersor::nm_product

// The kernels of nm_product.h for many columns, compiled once per instruction set (foreach_isa.h includes this file).
//
// A chunk of the input is transposed into the L1 cache, column beside column; then every row of the weight adds its
// products with the chunk to its sums. Each sum runs over the row in order: the same bits however work is shared out.

namespace tersor::nm_product {
namespace TERSOR_ISA {
using namespace ::tersor::TERSOR_ISA;

constexpr int LANES = Simd<float>::lanes;
constexpr int MOST_VECTORS = TERSOR_ISA_LEVEL == 2 ? 8 : 4;  // of columns at a time: 16 sums in 32 registers, 8 in 16

constexpr int TABLE = 256 * 8;  // places of every byte of the index

// One thread's memory.
struct Workspace {
  float *input, *sums, *values;
  uint16_t *offsets, *table;
  const void** pixels;

  Workspace(const Task& task, int64_t outputs, Arena& arena) {
    const int64_t kept = task.chunk / task.m * task.n + SLACK;
    input = arena.take<float>((task.chunk + 16) * task.tile);  // a damaged mask may point up to 16 rows too far
    sums = arena.take<float>((outputs + 4) * task.tile + LANES);
    values = arena.take<float>(4 * kept), offsets = arena.take<uint16_t>(4 * kept);
    table = arena.take<uint16_t>(TABLE), pixels = arena.take<const void*>(task.tile + LANES);
  }
};

static int64_t scratch(const Task& task, int64_t outputs) {
  Arena arena{nullptr};
  Workspace(task, outputs, arena);
  return arena.used;
}

// ---- The input ----

// Where the elements of the unit's columns at one tap are.
template <class T>
static void find_pixels(const Task& task, const Unit& unit, int64_t tap, const void** pixels) {
  const T* const base = static_cast<const T*>(task.input) + unit.group * task.channels * task.input_c;
  const int64_t dy = tap / task.kernel_w * task.dilation_h - task.padding_h;
  const int64_t dx = tap % task.kernel_w * task.dilation_w - task.padding_w;
  int64_t n = unit.first / task.pixels(), y = unit.first % task.pixels() / task.out_width;
  int64_t x = unit.first % task.out_width;
  for (int64_t c = unit.first; c < unit.last; ++c) {
    const int64_t row = y * task.stride_h + dy, column = x * task.stride_w + dx;
    const bool inside = row >= 0 && row < task.height && column >= 0 && column < task.width;
    *pixels++ = inside ? base + n * task.input_n + row * task.input_h + column * task.input_w : task.zeros;
    if (++x == task.out_width) x = 0, ++y;
    if (y == task.out_height) y = 0, ++n;
  }
  // Whole vectors are read: the last column stands in for those beyond it.
  for (int i = 0; i < LANES; ++i) pixels[i] = pixels[-1];
}

// Channels [first, last) of the columns, one row of the tile each; where channels lie side by side.
template <class T>
static void fill_points(const Task& task, const void* const* pixels, int64_t columns, int64_t first, int64_t last,
                        float* tile) {
  constexpr int parts = LANES / 4;
  for (int64_t c = 0; c < columns; c += LANES) {
    const T* point[4][parts];
    for (int i = 0; i < 4; ++i) {
      for (int part = 0; part < parts; ++part) point[i][part] = static_cast<const T*>(pixels[c + 4 * part + i]) + first;
    }
    float* to = tile + c;
    int64_t k = first;
    for (; k + 4 <= last; k += 4, to += 4 * task.tile) {
      Vec<float> v[4];
      for (int i = 0; i < 4; ++i) {
        v[i] = gather_quarters(point[i]);
        for (int part = 0; part < parts; ++part) point[i][part] += 4;
      }
      transpose_quarters(v);
      for (int i = 0; i < 4; ++i) store<float>(to + i * task.tile, v[i]);
    }
    for (; k < last; ++k, to += task.tile) {
      for (int i = 0; i < LANES; ++i) to[i] = static_cast<float>(static_cast<const T*>(pixels[c + i])[k]);
    }
  }
}

// The same where the columns of a row of the image do, or nothing does.
template <class T>
static void fill_planes(const Task& task, const void* const* pixels, int64_t columns, int64_t first, int64_t last,
                        float* tile) {
  for (int64_t c = 0; c < columns; c += LANES) {
    const T* const* point = reinterpret_cast<const T* const*>(pixels + c);
    bool border = false, dense = true;
    for (int i = 0; i < LANES; ++i) border |= point[i] == task.zeros, dense &= point[i] == point[0] + i;
    float* to = tile + c;
    for (int64_t k = first; k < last; ++k, to += task.tile) {
      const int64_t step = k * task.input_c;
      if (dense) store<float>(to, widen(point[0] + step));
      else if (!border) for (int i = 0; i < LANES; ++i) to[i] = static_cast<float>(point[i][step]);
      else for (int i = 0; i < LANES; ++i) to[i] = point[i] == task.zeros ? 0.0f : static_cast<float>(point[i][step]);
    }
  }
}

// Elements [first, last) of the columns.
template <class T>
static void fill(const Task& task, const Unit& unit, int64_t first, int64_t last, const Workspace& space) {
  for (int64_t k = first; k < last;) {
    const int64_t tap = k / task.channels, end = std::min(last, (tap + 1) * task.channels);
    if (k == first || k == tap * task.channels) find_pixels<T>(task, unit, tap, space.pixels);
    float* const to = space.input + (k - first) * task.tile;
    const int64_t from = k - tap * task.channels, until = end - tap * task.channels, columns = unit.last - unit.first;
    if (task.input_c == 1) fill_points<T>(task, space.pixels, columns, from, until, to);
    else fill_planes<T>(task, space.pixels, columns, from, until, to);
    k = end;
  }
}

// ---- The weight ----

// What finding offsets needs, made once per unit: the places of every byte times `scale`; or, where 32 places of a few
// bits are found at a time, vectors: the two bytes that hold each one, its shift among their bits, its group's offset,
// how far 32 of them reach, the mask of its bits, and the scale.
static void make_table(const Task& task, int scale, uint16_t* table) {
  const Places& places = *task.places;
  for (int i = 0; i < TABLE; ++i) table[i] = static_cast<uint16_t>(places.place[i / 8][i % 8] * scale);
  if (TERSOR_ISA_LEVEL < 2 || !places.bits) return;
  const int per_word = 16 / places.bits;
  for (int i = 0; i < 32; ++i) {
    const int word = i / per_word;
    table[i] = static_cast<uint16_t>((2 * word + 1) << 8 | 2 * word);
    table[32 + i] = static_cast<uint16_t>(i % per_word * places.bits);
    table[64 + i] = static_cast<uint16_t>(i / task.n * task.m * scale);
    table[96 + i] = static_cast<uint16_t>(32 / task.n * task.m * scale);
    table[128 + i] = static_cast<uint16_t>((1 << places.bits) - 1), table[160 + i] = static_cast<uint16_t>(scale);
  }
}

#if TERSOR_ISA_LEVEL == 2
// 32 places from 4, 8 or 16 bytes of the index, of which every quarter of a vector gets all.
TERSOR_INLINE void find_offsets_of_places(const Places& places, const uint16_t* table, const uint8_t* index,
                                          int64_t bytes, uint16_t* offsets) {
  const __m512i from = _mm512_load_si512(table), shifts = _mm512_load_si512(table + 32);
  const __m512i step = _mm512_load_si512(table + 96), mask = _mm512_load_si512(table + 128);
  const __m512i factor = _mm512_load_si512(table + 160);
  __m512i base = _mm512_load_si512(table + 64);
  const int64_t taken = 4 * places.bits;
  for (int64_t i = 0; i < bytes; i += taken, offsets += 32) {
    const __mmask16 there = static_cast<__mmask16>((1u << std::min(taken, bytes - i)) - 1);
    const __m512i all = _mm512_broadcast_i32x4(_mm_maskz_loadu_epi8(there, index + i));
    const __m512i place = _mm512_and_si512(_mm512_srlv_epi16(_mm512_shuffle_epi8(all, from), shifts), mask);
    _mm512_storeu_si512(offsets, _mm512_add_epi16(_mm512_mullo_epi16(place, factor), base));
    base = _mm512_add_epi16(base, step);
  }
}
#endif

// The offsets of `bytes` bytes of the index: where in the tile each place is, `scale` for an element.
TERSOR_INLINE void find_offsets(const Task& task, const uint16_t* table, int scale, const uint8_t* index, int64_t bytes,
                                uint16_t* offsets) {
  typedef uint16_t Eight __attribute__((vector_size(16)));
  typedef uint16_t Loose __attribute__((vector_size(16), aligned(2), may_alias));
  const Places& places = *task.places;
#if TERSOR_ISA_LEVEL == 2
  if (places.bits) return find_offsets_of_places(places, table, index, bytes, offsets);
#endif
  const auto eight = [&](uint8_t i) { return *reinterpret_cast<const Eight*>(table + 8 * i); };
  uint16_t base = 0;
  const uint16_t step = static_cast<uint16_t>(places.elements * scale);
  if (places.wide) {
    for (int64_t i = 0; i < bytes; i += 2, base += step, offsets += places.values) {
      *reinterpret_cast<Loose*>(offsets) = eight(index[i]) + base;
      *reinterpret_cast<Loose*>(offsets + places.count[index[i]]) =
          eight(index[i + 1]) + static_cast<uint16_t>(base + 8 * scale);
    }
    return;
  }
  for (int64_t i = 0; i < bytes; ++i, base += step, offsets += places.values) {
    *reinterpret_cast<Loose*>(offsets) = eight(index[i]) + base;
  }
}

// The products of ROWS rows of the weight with VECTORS vectors of columns, added to the sums. Unrolled before anything
// else: otherwise the sums go through memory on their way in and out.
template <int ROWS, int VECTORS, bool FIRST>
TERSOR_INLINE void multiply_rows(const float* input, const uint16_t* offsets, int64_t offsets_row,
                                 const float* const* values, int64_t count, float* sums, int64_t pitch) {
  Vec<float> sum[ROWS][VECTORS];
  const float* value[ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    value[r] = values[r];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = FIRST ? Vec<float>{} : load(sums + r * pitch + v * LANES);
  }
  for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const Vec<float> factor = splat(value[r][i]);
      const float* at = reinterpret_cast<const float*>(reinterpret_cast<const char*>(input) + offsets[r * offsets_row + i]);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = fma<float>(factor, load(at + v * LANES), sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) store<float>(sums + r * pitch + v * LANES, sum[r][v]);
  }
}

template <int ROWS, int VECTORS>
static void multiply(const float* input, const uint16_t* offsets, int64_t offsets_row, const float* const* values,
                     int64_t count, float* sums, int64_t pitch, bool first) {
  if (first) multiply_rows<ROWS, VECTORS, true>(input, offsets, offsets_row, values, count, sums, pitch);
  else multiply_rows<ROWS, VECTORS, false>(input, offsets, offsets_row, values, count, sums, pitch);
}

using Multiply = void (*)(const float*, const uint16_t*, int64_t, const float* const*, int64_t, float*, int64_t, bool);

// By rows (ROWS or 1) and vectors.
template <int ROWS>
static Multiply multiply_for(int vectors) {
  switch (vectors) {
    case 1: return multiply<ROWS, 1>;
    case 2: return multiply<ROWS, 2>;
    case 3: return multiply<ROWS, 3>;
    case 4: return multiply<ROWS, 4>;
#if TERSOR_ISA_LEVEL == 2
    case 5: return multiply<std::min(ROWS, 2), 5>;
    case 6: return multiply<std::min(ROWS, 2), 6>;
    case 7: return multiply<std::min(ROWS, 2), 7>;
    case 8: return multiply<std::min(ROWS, 2), 8>;
#endif
  }
  return nullptr;
}

// Rows of the weight [from, to) times elements [first, last) of the columns.
template <class T>
static void multiply_chunk(const Task& task, const Unit& unit, int64_t first, int64_t last, const Workspace& space) {
  const int64_t columns = (unit.last - unit.first + LANES - 1) / LANES, kept = task.kept();
  const int64_t count = (last - first) / task.m * task.n, skipped = first / task.m * task.n;
  const int64_t offsets_row = task.chunk / task.m * task.n + SLACK;
  const int64_t first_byte = first / task.places->elements * (task.places->wide ? 2 : 1);
  const int64_t bytes = (last - first + task.places->elements - 1) / task.places->elements * (task.places->wide ? 2 : 1);
  const int scale = static_cast<int>(task.tile * sizeof(float));
  const int most = columns > 4 && MOST_VECTORS > 4 ? 2 : TERSOR_ISA_LEVEL == 2 ? 4 : 2;
  const int64_t row = unit.group * task.outputs;
  for (int64_t o = unit.from; o < unit.to;) {
    const int rows = unit.to - o >= most ? most : 1;
    const float* values[4];
    for (int r = 0; r < rows; ++r) {
      const T* const from = static_cast<const T*>(task.values) + (row + o + r) * kept + skipped;
      if constexpr (std::is_same_v<T, float>) {
        values[r] = from;
      } else {
        float* const to = space.values + r * offsets_row;
        for (int64_t i = 0; i < count; i += LANES) {
          store<float>(to + i, load_as<float>(from + i, static_cast<int>(std::min<int64_t>(LANES, count - i))));
        }
        values[r] = to;
      }
      find_offsets(task, space.table, scale, task.index + (row + o + r) * task.index_row + first_byte, bytes,
                   space.offsets + r * offsets_row);
    }
    // What the next rows need: these are short runs, far apart, which the hardware does not see coming.
    for (int64_t next = o + rows; next < std::min(unit.to, o + 2 * rows); ++next) {
      const char* const ahead = reinterpret_cast<const char*>(static_cast<const T*>(task.values) + (row + next) * kept + skipped);
      for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(ahead + i);
      __builtin_prefetch(task.index + (row + next) * task.index_row + first_byte);
      const float* const sums = space.sums + (next - unit.from) * task.tile;
      for (int64_t i = 0; i < task.tile; i += 16) __builtin_prefetch(sums + i, 1);
    }
    for (int64_t v = 0; v < columns; v += MOST_VECTORS) {
      const int vectors = static_cast<int>(std::min<int64_t>(MOST_VECTORS, columns - v));
      const Multiply product = rows == 1   ? multiply_for<1>(vectors)
                               : rows == 2 ? multiply_for<2>(vectors)
                                           : multiply_for<4>(vectors);
      product(space.input + v * LANES, space.offsets, offsets_row, values, count,
              space.sums + (o - unit.from) * task.tile + v * LANES, task.tile, first == 0);
    }
    o += rows;
  }
}

// ---- The output ----

// x Phi(x) to 1e-7 of |x|: with erfc(z) = exp(-q(z)) it is max(x, 0) - |x| erfc(|x| / sqrt 2) / 2. The polynomial q was
// fitted on [0, 4], beyond which erfc is below 2e-8.
TERSOR_INLINE Vec<float> gelu(Vec<float> x) {
  const Vec<float> size = x < 0.0f ? -x : x, z = size * 0.70710678f;
  Vec<float> q = splat(-8.04369756e-6f);
  q = fma<float>(q, z, splat(1.06025567e-4f));
  q = fma<float>(q, z, splat(-5.87946910e-4f));
  q = fma<float>(q, z, splat(1.57675322e-3f));
  q = fma<float>(q, z, splat(-5.87743889e-5f));
  q = fma<float>(q, z, splat(-1.92171466e-2f));
  q = fma<float>(q, z, splat(1.02799214e-1f));
  q = fma<float>(q, z, splat(6.36616111e-1f));
  q = fma<float>(q, z, splat(1.12837934f));
  const Vec<float> below = z > 4.0f ? Vec<float>{} : size * 0.5f * exp(-q * z);
  return (x < 0.0f ? Vec<float>{} : x) - below;
}

TERSOR_INLINE Vec<float> activate(Vec<float> x, Activation activation) {
  if (activation == Activation::relu) return x < 0.0f ? Vec<float>{} : x;
  return activation == Activation::gelu ? gelu(x) : x;
}

// Bias and activation on four outputs of one vector of columns.
template <class T>
TERSOR_INLINE void finish(const Task& task, int64_t output, int rows, const float* sums, Vec<float> v[4]) {
  for (int r = 0; r < 4; ++r) {
    v[r] = Vec<float>{};
    if (r >= rows) continue;
    v[r] = load(sums + r * task.tile);
    if (task.bias) v[r] += static_cast<float>(static_cast<const T*>(task.bias)[output + r]);
    v[r] = activate(v[r], task.activation);
  }
}

// `count` columns beside each other in the output, whose outputs lie side by side. Where the distance of columns is a
// power of two they share a set of the cache, so that each line of it is written at once: it would not stay.
template <class T>
static void write_points(const Task& task, const Unit& unit, const float* sums, int count, T* to) {
  constexpr int block = 64 / sizeof(T);
  const int64_t row = unit.group * task.outputs;
  alignas(64) T line[LANES * block];
  for (int64_t o = unit.from; o < unit.to; o += block, sums += block * task.tile) {
    const int outputs = static_cast<int>(std::min<int64_t>(block, unit.to - o));
    for (int i = 0; i < outputs; i += 4) {
      Vec<float> v[4];
      const int rows = std::min(4, outputs - i);
      finish<T>(task, row + o + i, rows, sums + i * task.tile, v);
      store_tokens(line + i, block, LANES, rows, v);
    }
    for (int c = 0; c < count; ++c) {
      if (outputs == block) __builtin_memcpy(to + c * task.output_w + row + o, line + c * block, 64);
      else std::copy(line + c * block, line + c * block + outputs, to + c * task.output_w + row + o);
    }
  }
}

// The same where the columns lie side by side.
template <class T>
static void write_planes(const Task& task, const Unit& unit, const float* sums, int count, T* to) {
  const int64_t row = unit.group * task.outputs;
  for (int64_t o = unit.from; o < unit.to; o += 4, sums += 4 * task.tile) {
    Vec<float> v[4];
    const int rows = static_cast<int>(std::min<int64_t>(4, unit.to - o));
    finish<T>(task, row + o, rows, sums, v);
    for (int r = 0; r < rows; ++r) store_as<float>(to + (row + o + r) * task.output_c, v[r], count);
  }
}

// The sums of a unit to the output.
template <class T>
static void write(const Task& task, const Unit& unit, const float* sums) {
  const int64_t pixels = task.pixels();
  for (int64_t c = unit.first; c < unit.last;) {
    const int64_t image = c / pixels, pixel = c % pixels, left = std::min(pixels - pixel, unit.last - c);
    const int count = static_cast<int>(std::min<int64_t>(LANES, left));  // of one image
    T* const to = static_cast<T*>(task.output) + image * task.output_n + pixel * task.output_w;
    if (task.output_c == 1) write_points(task, unit, sums + (c - unit.first), count, to);
    else write_planes(task, unit, sums + (c - unit.first), count, to);
    c += count;
  }
}

template <class T>
static void do_unit(const Task& task, const Unit& unit, void* memory) {
  Arena arena{static_cast<char*>(memory)};
  const Workspace space(task, unit.to - unit.from, arena);
  const int scale = static_cast<int>(task.tile * sizeof(float));
  make_table(task, scale, space.table);
  std::fill(space.offsets, space.offsets + 4 * (task.chunk / task.m * task.n + SLACK), uint16_t(0));
  if (task.row() == 0) std::fill(space.sums, space.sums + (unit.to - unit.from) * task.tile, 0.0f);
  for (int64_t first = 0; first < task.row(); first += task.chunk) {
    const int64_t last = std::min(task.row(), first + task.chunk);
    fill<T>(task, unit, first, last, space);
    multiply_chunk<T>(task, unit, first, last, space);
  }
  write<T>(task, unit, space.sums);
}

}  // namespace TERSOR_ISA
}  // namespace tersor::nm_product

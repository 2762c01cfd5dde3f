// The kernels of nm_product.h for many columns, compiled once per instruction set (foreach_isa.h includes this file).
//
// A chunk of the input is transposed into the L1 cache, column beside column; then every row of the weight adds its
// products with the chunk to its sums. Each sum runs over the row in order: the same bits however work is shared out.

namespace tersor::nm_product {
namespace TERSOR_ISA {
using namespace ::tersor::TERSOR_ISA;

constexpr int LANES = Simd<float>::lanes;
constexpr int MOST_ROWS = TERSOR_ISA_LEVEL == 2 ? 4 : 2;  // at a time: with 4 vectors, 16 sums in 32 registers, 8 in 16
constexpr int TABLE = 256 * 8;  // places of every byte of the index

// One thread's memory. The sums of each tile of columns lie together.
struct Workspace {
  float *input, *sums, *values;
  uint16_t *offsets, *table;
  const void** pixels;
  int64_t tile_sums, offsets_row;

  Workspace(const Task& task, int64_t outputs, Arena& arena)
      : tile_sums((outputs + 4) * task.pitch + LANES), offsets_row((task.chunk / task.m * task.n + SLACK + 7) / 32 * 32) {
    input = arena.take<float>((task.chunk + 16) * task.pitch);  // a damaged mask may point up to 16 rows too far
    sums = arena.take<float>(task.tile / task.pitch * tile_sums);
    values = arena.take<float>(4 * offsets_row), offsets = arena.take<uint16_t>(outputs * offsets_row + SLACK);
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
static void fill_points(const void* const* pixels, int64_t columns, int64_t pitch, int64_t first, int64_t last,
                        float* tile) {
  constexpr int parts = LANES / 4;
  for (int64_t c = 0; c < columns; c += LANES) {
    const T* point[4][parts];
    for (int i = 0; i < 4; ++i) {
      for (int part = 0; part < parts; ++part) point[i][part] = static_cast<const T*>(pixels[c + 4 * part + i]) + first;
    }
    float* to = tile + c;
    int64_t k = first;
    for (; k + 4 <= last; k += 4, to += 4 * pitch) {
      Vec<float> v[4];
      for (int i = 0; i < 4; ++i) {
        v[i] = gather_quarters(point[i]);
        for (int part = 0; part < parts; ++part) point[i][part] += 4;
      }
      transpose_quarters(v);
      for (int i = 0; i < 4; ++i) store<float>(to + i * pitch, v[i]);
    }
    for (; k < last; ++k, to += pitch) {
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
    for (int64_t k = first; k < last; ++k, to += task.pitch) {
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
    float* const to = space.input + (k - first) * task.pitch;
    const int64_t from = k - tap * task.channels, until = end - tap * task.channels, columns = unit.last - unit.first;
    if (task.input_c == 1) fill_points<T>(space.pixels, columns, task.pitch, from, until, to);
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
template <int ROWS, int VECTORS, int PITCH, bool FIRST>
TERSOR_INLINE void multiply_rows(const float* input, const uint16_t* offsets, int64_t offsets_row,
                                 const float* const* values, int64_t count, float* sums) {
  Vec<float> sum[ROWS][VECTORS];
  const float* value[ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    value[r] = values[r];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = FIRST ? Vec<float>{} : load(sums + r * PITCH + v * LANES);
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
    for (int v = 0; v < VECTORS; ++v) store<float>(sums + r * PITCH + v * LANES, sum[r][v]);
  }
}

template <int ROWS, int VECTORS, int PITCH>
static void multiply(const float* input, const uint16_t* offsets, int64_t offsets_row, const float* const* values,
                     int64_t count, float* sums, bool first) {
  if (first) multiply_rows<ROWS, VECTORS, PITCH, true>(input, offsets, offsets_row, values, count, sums);
  else multiply_rows<ROWS, VECTORS, PITCH, false>(input, offsets, offsets_row, values, count, sums);
}

using Multiply = void (*)(const float*, const uint16_t*, int64_t, const float* const*, int64_t, float*, bool);

// For that many vectors of columns.
template <int ROWS, int PITCH>
static Multiply multiply_for(int vectors) {
  switch (vectors) {
    case 1: return multiply<ROWS, 1, PITCH>;
    case 2: return multiply<ROWS, 2, PITCH>;
    case 3: return multiply<ROWS, 3, PITCH>;
    case 4: return multiply<ROWS, 4, PITCH>;
  }
  return nullptr;
}

template <int ROWS>
static Multiply multiply_for(int64_t pitch, int vectors) {
  return pitch == NARROW_TILE ? multiply_for<ROWS, NARROW_TILE>(vectors) : multiply_for<ROWS, TILE>(vectors);
}

// The offsets of elements [first, last) of all rows of the unit.
static void find_all_offsets(const Task& task, const Unit& unit, int64_t first, int64_t last, const Workspace& space) {
  const int64_t per_byte = task.places->elements, wide = task.places->wide ? 2 : 1;
  const int64_t bytes = (last - first + per_byte - 1) / per_byte * wide;
  const uint8_t* index = task.index + (unit.group * task.outputs + unit.from) * task.index_row + first / per_byte * wide;
  uint16_t* offsets = space.offsets;
  for (int64_t o = unit.from; o < unit.to; ++o, index += task.index_row, offsets += space.offsets_row) {
    find_offsets(task, space.table, static_cast<int>(task.pitch * sizeof(float)), index, bytes, offsets);
  }
}

// Rows of the weight [from, to) times elements [first, last) of the columns of one tile.
template <class T>
static void multiply_chunk(const Task& task, const Unit& unit, int64_t first, int64_t last, const Workspace& space,
                           float* sums) {
  const int64_t columns = (unit.last - unit.first + LANES - 1) / LANES, kept = task.kept();
  const int64_t count = (last - first) / task.m * task.n;
  const T* from = static_cast<const T*>(task.values) + (unit.group * task.outputs + unit.from) * kept + first / task.m * task.n;
  const uint16_t* offsets = space.offsets;
  for (int64_t o = unit.from; o < unit.to;) {
    const int rows = unit.to - o >= MOST_ROWS ? MOST_ROWS : 1;
    const float* values[4];
    for (int r = 0; r < rows; ++r, from += kept) {
      if constexpr (std::is_same_v<T, float>) {
        values[r] = from;
      } else {
        float* const to = space.values + r * space.offsets_row;
        for (int64_t i = 0; i < count; i += LANES) {
          store<float>(to + i, load_as<float>(from + i, static_cast<int>(std::min<int64_t>(LANES, count - i))));
        }
        values[r] = to;
      }
    }
    for (int64_t v = 0; v < columns; v += 4) {
      const int vectors = static_cast<int>(std::min<int64_t>(4, columns - v));
      const Multiply product = rows == 1 ? multiply_for<1>(task.pitch, vectors) : multiply_for<MOST_ROWS>(task.pitch, vectors);
      product(space.input + v * LANES, offsets, space.offsets_row, values, count, sums + v * LANES, first == 0);
    }
    o += rows, offsets += rows * space.offsets_row, sums += rows * task.pitch;
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
    v[r] = load(sums + r * task.pitch);
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
  for (int64_t o = unit.from; o < unit.to; o += block, sums += block * task.pitch) {
    const int outputs = static_cast<int>(std::min<int64_t>(block, unit.to - o));
    for (int i = 0; i < outputs; i += 4) {
      Vec<float> v[4];
      const int rows = std::min(4, outputs - i);
      finish<T>(task, row + o + i, rows, sums + i * task.pitch, v);
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
  for (int64_t o = unit.from; o < unit.to; o += 4, sums += 4 * task.pitch) {
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
  const int64_t tiles = (unit.last - unit.first + task.pitch - 1) / task.pitch;
  const auto tile_of = [&](int64_t t) {
    return Unit{unit.group, unit.first + t * task.pitch, std::min(unit.last, unit.first + (t + 1) * task.pitch), unit.from, unit.to};
  };
  make_table(task, static_cast<int>(task.pitch * sizeof(float)), space.table);
  std::fill(space.offsets, space.offsets + (unit.to - unit.from) * space.offsets_row, uint16_t(0));
  if (task.row() == 0) std::fill(space.sums, space.sums + tiles * space.tile_sums, 0.0f);
  for (int64_t first = 0; first < task.row(); first += task.chunk) {
    const int64_t last = std::min(task.row(), first + task.chunk);
    find_all_offsets(task, unit, first, last, space);
    for (int64_t t = 0; t < tiles; ++t) {
      fill<T>(task, tile_of(t), first, last, space);
      multiply_chunk<T>(task, tile_of(t), first, last, space, space.sums + t * space.tile_sums);
    }
  }
  for (int64_t t = 0; t < tiles; ++t) write<T>(task, tile_of(t), space.sums + t * space.tile_sums);
}

}  // namespace TERSOR_ISA
}  // namespace tersor::nm_product

// The kernels of nm_product.h for bfloat16 on processors with matrix tiles (AMX), which no psABI level has: asked for at
// run time. foreach_isa.h includes this file for all levels.
//
// Tiles multiply dense matrices, zeros included, at many times the rate of vectors. The packed weight is read once, spread
// into tiles in the L1 cache, and used for all columns of the unit.

namespace tersor::nm_product {
namespace TERSOR_ISA {
#if TERSOR_ISA_LEVEL == 2
#if defined(__clang__)
#define TERSOR_AMX __attribute__((target("arch=x86-64-v4,amx-tile,amx-bf16,avx512vbmi2")))
#else
#define TERSOR_AMX __attribute__((target("amx-tile,amx-bf16,avx512vbmi2")))  // gcc adds it to the pragma's level
#endif
using namespace ::tersor::TERSOR_ISA;

constexpr int TILE_OUTPUTS = 32;     // rows of the weight at a time: two tiles of 16
constexpr int64_t TILE_CHUNK = 512;  // of their elements: 32 KiB of the L1 cache

// Elements of a row, up to whole tiles; a tile of zeros for a row of none.
static int64_t whole(const Task& task) { return std::max<int64_t>(32, (task.row() + 31) / 32 * 32); }

// One thread's memory.
struct TileWorkspace {
  BFloat16* input;   // the columns' elements, `pitch` apart
  uint32_t* weight;  // pairs of neighbouring elements of 16 rows side by side: a row of a tile
  float* sums;       // of a column, TILE_OUTPUTS
  uint32_t* masks;
  const void** pixels;
  BFloat16** outputs;  // where each column's begin
  int64_t pitch;

  TileWorkspace(const Task& task, Arena& arena) : pitch(whole(task) + 32) {  // no power of two
    input = arena.take<BFloat16>(task.tile * pitch), weight = arena.take<uint32_t>(TILE_OUTPUTS * TILE_CHUNK / 2);
    sums = arena.take<float>(task.tile * TILE_OUTPUTS), masks = arena.take<uint32_t>(256);
    pixels = arena.take<const void*>(task.tile + LANES), outputs = arena.take<BFloat16*>(task.tile);
  }
};

static int64_t tile_scratch(const Task& task, int64_t) {
  Arena arena{nullptr};
  TileWorkspace(task, arena);
  return arena.used;
}

// The columns' elements, zeros up to whole tiles.
static void copy_input(const Task& task, const Unit& unit, const TileWorkspace& space) {
  const int64_t columns = unit.last - unit.first, row = task.row();
  for (int64_t tap = 0; tap < task.taps; ++tap) {
    find_pixels<BFloat16>(task, unit, tap, space.pixels);
    for (int64_t c = 0; c < columns; ++c) {
      std::memcpy(static_cast<void*>(space.input + c * space.pitch + tap * task.channels), space.pixels[c],
                  task.channels * sizeof(BFloat16));
    }
  }
  for (int64_t c = 0; c < task.tile; ++c) {
    const int64_t there = c < columns ? row : 0;
    std::memset(static_cast<void*>(space.input + c * space.pitch + there), 0, (space.pitch - there) * sizeof(BFloat16));
  }
}

// Bit p of a byte's mask: whether place p of its elements is kept.
static void make_masks(const Places& places, uint32_t* masks) {
  for (int byte = 0; byte < 256; ++byte) {
    masks[byte] = 0;
    for (int i = 0; i < places.count[byte]; ++i) masks[byte] |= uint32_t(1) << places.place[byte][i];
  }
}

// 32 elements of a row, of which `there` exist; a byte of the index stands for ELEMENTS.
template <int ELEMENTS>
TERSOR_AMX TERSOR_INLINE __m512i spread(const BFloat16* values, int64_t kept, const uint8_t* index,
                                        const uint32_t* masks, int64_t there) {
  uint32_t mask = 0;
  if (__builtin_expect(there >= 32, 1)) {
#pragma GCC unroll 4
    for (int i = 0; i < 32 / ELEMENTS; ++i) mask |= masks[index[i]] << (i * ELEMENTS % 32);
  } else {
    for (int i = 0; i * ELEMENTS < there; ++i) mask |= masks[index[i]] << (i * ELEMENTS % 32);
    mask &= there > 0 ? (uint32_t(1) << there) - 1 : 0;
  }
  const __mmask32 present = (uint32_t(1) << kept) - 1;
  return _mm512_maskz_expand_epi16(mask, _mm512_maskz_loadu_epi16(present, values));
}

// Row r of 16 words becomes word r of 16 rows.
TERSOR_INLINE void transpose_words(__m512i v[16]) {
  __m512i a[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_maskz_unpacklo_epi32(0xFFFF, v[i], v[i + 1]), a[i + 1] = _mm512_maskz_unpackhi_epi32(0xFFFF, v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_maskz_unpacklo_epi64(0xFF, a[i], a[i + 2]), v[i + 1] = _mm512_maskz_unpackhi_epi64(0xFF, a[i], a[i + 2]);
    v[i + 2] = _mm512_maskz_unpacklo_epi64(0xFF, a[i + 1], a[i + 3]);
    v[i + 3] = _mm512_maskz_unpackhi_epi64(0xFF, a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_maskz_shuffle_i32x4(0xFFFF, v[i], v[i + 4], 0x88);
    a[i + 4] = _mm512_maskz_shuffle_i32x4(0xFFFF, v[i], v[i + 4], 0xDD);
    a[i + 8] = _mm512_maskz_shuffle_i32x4(0xFFFF, v[i + 8], v[i + 12], 0x88);
    a[i + 12] = _mm512_maskz_shuffle_i32x4(0xFFFF, v[i + 8], v[i + 12], 0xDD);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_maskz_shuffle_i32x4(0xFFFF, a[i], a[i + 8], 0x88);
    v[i + 8] = _mm512_maskz_shuffle_i32x4(0xFFFF, a[i], a[i + 8], 0xDD);
    v[i + 4] = _mm512_maskz_shuffle_i32x4(0xFFFF, a[i + 4], a[i + 12], 0x88);
    v[i + 12] = _mm512_maskz_shuffle_i32x4(0xFFFF, a[i + 4], a[i + 12], 0xDD);
  }
}

// Elements [first, first + count) of 16 rows from `output` on, as tiles; zeros for those that do not exist.
template <int ELEMENTS>
TERSOR_AMX static void spread_rows(const Task& task, const Unit& unit, int64_t output, int64_t first, int64_t count,
                                   const uint32_t* masks, uint32_t* to) {
  const int64_t each = 32 / task.m * task.n, kept = task.kept(), row = unit.group * task.outputs + output;
  const BFloat16* const values = static_cast<const BFloat16*>(task.values) + row * kept + first / task.m * task.n;
  const uint8_t* const index = task.index + row * task.index_row + first / ELEMENTS;
  const int rows = static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(16, unit.to - output)));
  for (int64_t k = 0; k < count; k += 32, to += 256) {
    const int64_t there = task.row() - first - k, own = std::min(each, there / task.m * task.n);
    const BFloat16* const value = values + k / 32 * each;
    const uint8_t* const byte = index + k / ELEMENTS;
    __m512i v[16];
    if (__builtin_expect(rows == 16, 1)) {
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) v[r] = spread<ELEMENTS>(value + r * kept, own, byte + r * task.index_row, masks, there);
    } else {
      for (int r = 0; r < 16; ++r) {
        v[r] = r < rows ? spread<ELEMENTS>(value + r * kept, own, byte + r * task.index_row, masks, there) : __m512i{};
      }
    }
    transpose_words(v);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) _mm512_storeu_si512(to + 16 * r, v[r]);
  }
}

// 32 columns times 32 rows of the weight over `count` elements, added to the sums.
TERSOR_AMX static void multiply_tiles(const BFloat16* input, int64_t pitch, const uint32_t* left, const uint32_t* right,
                                      int64_t count, float* sums, bool first) {
  constexpr int64_t bytes = TILE_OUTPUTS * sizeof(float);
  const int64_t step = pitch * static_cast<int64_t>(sizeof(BFloat16));
  const BFloat16* const lower = input + 16 * pitch;
  float* const below = sums + 16 * TILE_OUTPUTS;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, bytes);
    _tile_loadd(1, sums + 16, bytes);
    _tile_loadd(2, below, bytes);
    _tile_loadd(3, below + 16, bytes);
  }
  for (int64_t k = 0; k < count; k += 32, left += 256, right += 256) {
    _tile_loadd(6, left, 64);
    _tile_loadd(4, input + k, step);
    _tile_loadd(7, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, lower + k, step);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, bytes);
  _tile_stored(1, sums + 16, bytes);
  _tile_stored(2, below, bytes);
  _tile_stored(3, below + 16, bytes);
}

static void find_outputs(const Task& task, const Unit& unit, BFloat16** outputs) {
  BFloat16* const base = static_cast<BFloat16*>(task.output) + unit.group * task.outputs;
  for (int64_t c = unit.first; c < unit.last; ++c) {
    *outputs++ = base + c / task.pixels() * task.output_n + c % task.pixels() * task.output_w;
  }
}

// Bias and activation on the sums of TILE_OUTPUTS outputs of columns [first, last), and these to the output.
static void write_tiles(const Task& task, const Unit& unit, int64_t output, int64_t first, int64_t last,
                        const TileWorkspace& space) {
  const int64_t row = unit.group * task.outputs + output, left = unit.to - output;
  const BFloat16* const biases = task.bias ? static_cast<const BFloat16*>(task.bias) + row : nullptr;
  const int low = static_cast<int>(std::min<int64_t>(LANES, left));
  const int high = static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(LANES, left - LANES)));
  Vec<float> bias[2] = {};
  if (biases) bias[0] = load_as<float>(biases, low), bias[1] = load_as<float>(biases + LANES, high);
  for (int64_t c = first; c < last; ++c) {
    const float* const sums = space.sums + c * TILE_OUTPUTS;
    BFloat16* const to = space.outputs[c] + output;
    store_as<float>(to, activate(load(sums) + bias[0], task.activation), low);
    if (high > 0) store_as<float>(to + LANES, activate(load(sums + LANES) + bias[1], task.activation), high);
  }
}

TERSOR_AMX static void do_tile_unit(const Task& task, const Unit& unit, void* memory) {
  Arena arena{static_cast<char*>(memory)};
  const TileWorkspace space(task, arena);
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } tiles;
  _tile_loadconfig(&tiles);
  const int64_t row = whole(task), columns = unit.last - unit.first;
  const int bits = task.places->wide ? 8 : task.places->elements;
  const auto spread_to = bits == 8 ? spread_rows<8> : bits == 16 ? spread_rows<16> : spread_rows<32>;
  copy_input(task, unit, space);
  find_outputs(task, unit, space.outputs);
  make_masks(*task.places, space.masks);
  for (int64_t output = unit.from; output < unit.to; output += TILE_OUTPUTS) {
    for (int64_t first = 0; first < row; first += TILE_CHUNK) {
      const int64_t count = std::min(TILE_CHUNK, row - first);
      uint32_t* const right = space.weight + 8 * count;  // 16 rows of pairs
      spread_to(task, unit, output, first, count, space.masks, space.weight);
      spread_to(task, unit, output + 16, first, count, space.masks, right);
      for (int64_t c = 0; c < columns; c += 32) {
        multiply_tiles(space.input + c * space.pitch + first, space.pitch, space.weight, right, count,
                       space.sums + c * TILE_OUTPUTS, first == 0);
        // At once, so that the stores, a line each and far apart, are done while the next tiles multiply.
        if (first + count == row) write_tiles(task, unit, output, c, std::min(columns, c + 32), space);
      }
    }
  }
  _tile_release();
}

static UnitKernels tile_kernels() { return {do_tile_unit, tile_scratch, 0}; }
#undef TERSOR_AMX
#else
static UnitKernels tile_kernels() { return {}; }
#endif

}  // namespace TERSOR_ISA
}  // namespace tersor::nm_product

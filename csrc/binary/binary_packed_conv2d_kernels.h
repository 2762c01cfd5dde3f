#ifdef TERSOR_ISA

namespace tersor::binary {
namespace TERSOR_ISA {

using namespace tersor::TERSOR_ISA;

// ---- Sums of a tile, by counting the bits that differ ----

typedef uint64_t Bits __attribute__((vector_size(TERSOR_VECTOR_BYTES)));
typedef uint64_t LooseBits __attribute__((vector_size(TERSOR_VECTOR_BYTES), aligned(8), may_alias));
constexpr int PARTS = 64 / TERSOR_VECTOR_BYTES;  // vectors to a block of 8 outputs

TERSOR_INLINE Bits load_bits(const int64_t* p) { return *reinterpret_cast<const LooseBits*>(p); }

// The number of set bits of every byte.
TERSOR_INLINE Bits count_bytes(Bits v) {
#if TERSOR_ISA_LEVEL == 2
  const __m512i table = _mm512_set4_epi32(0x04030302, 0x03020201, 0x03020201, 0x02010100), four = _mm512_set1_epi8(15);
  const __m512i low = _mm512_and_si512((__m512i)v, four);
  const __m512i high = _mm512_and_si512(_mm512_srli_epi32((__m512i)v, 4), four);
  return (Bits)_mm512_add_epi8(_mm512_shuffle_epi8(table, low), _mm512_shuffle_epi8(table, high));
#elif TERSOR_ISA_LEVEL == 1
  const __m128i half = _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i table = _mm256_broadcastsi128_si256(half);
  const __m256i four = _mm256_set1_epi8(15);
  const __m256i low = _mm256_and_si256((__m256i)v, four);
  const __m256i high = _mm256_and_si256(_mm256_srli_epi32((__m256i)v, 4), four);
  return (Bits)_mm256_add_epi8(_mm256_shuffle_epi8(table, low), _mm256_shuffle_epi8(table, high));
#else
  v -= (v >> 1) & 0x5555555555555555u;
  v = (v & 0x3333333333333333u) + ((v >> 2) & 0x3333333333333333u);
  return (v + (v >> 4)) & 0x0f0f0f0f0f0f0f0fu;
#endif
}

// The sum of the eight bytes of every word.
TERSOR_INLINE Bits total_of_bytes(Bits v) {
#if TERSOR_ISA_LEVEL == 2
  return (Bits)_mm512_sad_epu8((__m512i)v, _mm512_setzero_si512());
#elif TERSOR_ISA_LEVEL == 1
  return (Bits)_mm256_sad_epu8((__m256i)v, _mm256_setzero_si256());
#else
  v = (v & 0x00ff00ff00ff00ffu) + ((v >> 8) & 0x00ff00ff00ff00ffu);
  v += v >> 16;
  return (v + (v >> 32)) & 0xffffu;
#endif
}

// P pixels and Q blocks. Bytes count up to 31 words before they are added up.
template <int P, int Q, bool ZEROS>
TERSOR_INLINE void multiply_by(const Task& task, const int64_t* const* pixels, const int64_t* weight, int32_t* sums) {
  constexpr int V = Q * PARTS;
  const int64_t block = task.block_words();
  const bool weight_zeros = ZEROS && task.weight_planes == 2;
  Bits total[P][V] = {};  // of differing bits; with zeros, of the products
  for (int64_t first = 0; first < task.steps; first += 31) {
    Bits differ[P][V] = {}, both[P][V] = {};
    for (int64_t i = first; i < std::min(task.steps, first + 31); ++i) {
      const int64_t at = task.offsets[i];
      for (int v = 0; v < V; ++v) {
        const int64_t* const from = weight + v / PARTS * block + v % PARTS * (BLOCK / PARTS);
        const Bits w = load_bits(from);
        for (int p = 0; p < P; ++p) {
          const Bits x = Bits{} + static_cast<uint64_t>(pixels[p][at]);
          if constexpr (ZEROS) {
            Bits any = Bits{} + static_cast<uint64_t>(pixels[p][task.scratch_plane + at]);
            if (weight_zeros) any &= load_bits(from + task.weight_plane);
            differ[p][v] += count_bytes((x ^ w) & any), both[p][v] += count_bytes(any);
          } else {
            differ[p][v] += count_bytes(x ^ w);
          }
        }
      }
      weight += BLOCK;
    }
    for (int p = 0; p < P; ++p) {
      for (int v = 0; v < V; ++v) {
        const Bits own = total_of_bytes(differ[p][v]);
        total[p][v] += ZEROS ? total_of_bytes(both[p][v]) - 2 * own : own;
      }
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int v = 0; v < V; ++v) {
      for (int i = 0; i < BLOCK / PARTS; ++i) {
        const auto sum = static_cast<int32_t>(static_cast<int64_t>(total[p][v][i]));
        sums[p * MOST_OUTPUTS + v * (BLOCK / PARTS) + i] = ZEROS ? sum : static_cast<int32_t>(task.terms()) - 2 * sum;
      }
    }
  }
}

constexpr int TILE_PIXELS = TERSOR_ISA_LEVEL == 2 ? 4 : TERSOR_ISA_LEVEL == 1 ? 2 : 1;
constexpr int TILE_BLOCKS = TERSOR_ISA_LEVEL == 2 ? 2 : 1;

template <int P>
static void multiply_blocks(const Task& task, const int64_t* const* pixels, const int64_t* weight, int blocks,
                            bool zeros, int32_t* sums) {
  if (blocks == TILE_BLOCKS && !zeros) return multiply_by<P, TILE_BLOCKS, false>(task, pixels, weight, sums);
  for (int q = 0; q < blocks; ++q, weight += task.block_words(), sums += BLOCK) {
    if (zeros) multiply_by<P, 1, true>(task, pixels, weight, sums);
    else multiply_by<P, 1, false>(task, pixels, weight, sums);
  }
}

static void multiply_bytes(const Task& task, bool one_pixel, const int64_t* const pixels[MOST_PIXELS],
                           const int64_t* weight, int blocks, bool zeros, int32_t* sums) {
  if (one_pixel) multiply_blocks<1>(task, pixels, weight, blocks, zeros, sums);
  else multiply_blocks<TILE_PIXELS>(task, pixels, weight, blocks, zeros, sums);
}

#if TERSOR_ISA_LEVEL == 2
// All of a tile stays in registers only if no loop over it is left.
#if defined(__clang__)
#define TERSOR_UNROLL _Pragma("unroll")
#else
#define TERSOR_UNROLL _Pragma("GCC unroll 8")
#endif
namespace vpopcntdq {  // an extension that level 4 does not have: asked for at run time
#if defined(__clang__)
#define TERSOR_VPOPCNTDQ __attribute__((target("arch=x86-64-v4,avx512vpopcntdq")))
#else
#define TERSOR_VPOPCNTDQ __attribute__((target("avx512vpopcntdq")))  // gcc adds it to the pragma's level
#endif

template <int P, int Q, bool ZEROS>
TERSOR_VPOPCNTDQ static void multiply_by(const Task& task, const int64_t* const* pixels, const int64_t* weight,
                                         int32_t* sums) {
  const int64_t block = task.block_words(), plane = task.scratch_plane, steps = task.steps;
  const bool weight_zeros = ZEROS && task.weight_planes == 2;
  const int64_t* from[P];
  __m512i total[P][Q];
  TERSOR_UNROLL for (int p = 0; p < P; ++p) {
    from[p] = pixels[p];
    TERSOR_UNROLL for (int q = 0; q < Q; ++q) total[p][q] = _mm512_setzero_si512();
  }
  for (int64_t i = 0; i < steps; ++i, weight += BLOCK) {
    const int64_t at = task.offsets[i];
    __m512i w[Q];
    TERSOR_UNROLL for (int q = 0; q < Q; ++q) w[q] = _mm512_loadu_si512(weight + q * block);
    TERSOR_UNROLL for (int p = 0; p < P; ++p) {
      const __m512i x = _mm512_set1_epi64(from[p][at]);
      if constexpr (ZEROS) {
        const __m512i own = _mm512_set1_epi64(from[p][plane + at]);
        TERSOR_UNROLL for (int q = 0; q < Q; ++q) {
          const __m512i any =
              weight_zeros ? _mm512_and_si512(own, _mm512_loadu_si512(weight + task.weight_plane + q * block)) : own;
          const __m512i differ = _mm512_popcnt_epi64(_mm512_and_si512(_mm512_xor_si512(x, w[q]), any));
          total[p][q] = _mm512_add_epi64(
              total[p][q], _mm512_sub_epi64(_mm512_popcnt_epi64(any), _mm512_add_epi64(differ, differ)));
        }
      } else {
        TERSOR_UNROLL for (int q = 0; q < Q; ++q) {
          total[p][q] = _mm512_add_epi64(total[p][q], _mm512_popcnt_epi64(_mm512_xor_si512(x, w[q])));
        }
      }
    }
  }
  // Two blocks to a store: a load that spans two stores would wait for both.
  const __m512i terms = _mm512_set1_epi32(static_cast<int>(task.terms()));
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  TERSOR_UNROLL for (int p = 0; p < P; ++p) {
    TERSOR_UNROLL for (int q = 0; q < Q; q += 2) {
      __m512i both = _mm512_permutex2var_epi32(total[p][q], even, total[p][std::min(q + 1, Q - 1)]);
      if constexpr (!ZEROS) both = _mm512_sub_epi32(terms, _mm512_add_epi32(both, both));
      _mm512_storeu_si512(sums + p * MOST_OUTPUTS + q * BLOCK, both);
    }
  }
}

template <int P, bool ZEROS>
TERSOR_VPOPCNTDQ static void multiply_blocks(const Task& task, const int64_t* const* pixels, const int64_t* weight,
                                             int blocks, int32_t* sums) {
  if (blocks == 4) multiply_by<P, 4, ZEROS>(task, pixels, weight, sums);
  else if (blocks == 3) multiply_by<P, 3, ZEROS>(task, pixels, weight, sums);
  else if (blocks == 2) multiply_by<P, 2, ZEROS>(task, pixels, weight, sums);
  else multiply_by<P, 1, ZEROS>(task, pixels, weight, sums);
}

TERSOR_VPOPCNTDQ static void multiply(const Task& task, bool one_pixel, const int64_t* const pixels[MOST_PIXELS],
                                      const int64_t* weight, int blocks, bool zeros, int32_t* sums) {
  constexpr int P = MOST_PIXELS;
  if (one_pixel && zeros) multiply_blocks<1, true>(task, pixels, weight, blocks, sums);
  else if (one_pixel) multiply_blocks<1, false>(task, pixels, weight, blocks, sums);
  else if (zeros) multiply_blocks<P, true>(task, pixels, weight, blocks, sums);
  else multiply_blocks<P, false>(task, pixels, weight, blocks, sums);
}
#undef TERSOR_VPOPCNTDQ
#undef TERSOR_UNROLL
}  // namespace vpopcntdq
#endif

// ---- A unit: the padded copy, the tiles, and what follows ----

// Whether a sign of these pixels is zero; `last` has the bits of the last word of each.
TERSOR_INLINE bool has_zero(const int64_t* nonzero, int64_t pixels, int64_t words, uint64_t last) {
  uint64_t missing = 0;
  if (last == ~uint64_t{0}) {
    for (int64_t i = 0; i < pixels * words; ++i) missing |= ~static_cast<uint64_t>(nonzero[i]);
    return missing != 0;
  }
  for (int64_t x = 0; x < pixels; ++x, nonzero += words) {
    missing |= static_cast<uint64_t>(nonzero[words - 1]) ^ last;
    for (int64_t w = 0; w + 1 < words; ++w) missing |= ~static_cast<uint64_t>(nonzero[w]);
  }
  return missing != 0;
}

// Copies the rows that a unit's windows reach, and marks where a sign inside the image is zero; returns whether any is.
static bool copy_padded(const Task& task, const Unit& unit, int64_t group, const Scratch& own) {
  int64_t* const scratch = own.words;
  const int64_t first = unit.first_row * task.stride_h - task.padding_h, words = task.words;
  const int64_t rows = (unit.end_row - unit.first_row - 1) * task.stride_h + (task.kernel_h - 1) * task.dilation_h + 1;
  const int64_t left = std::min(task.padding_w, task.columns), inside = std::min(task.width, task.columns - left);
  const int64_t step = task.groups * words;
  const uint64_t last = task.channels % WORD ? (uint64_t{1} << task.channels % WORD) - 1 : ~uint64_t{0};
  bool any = false;
  std::memset(own.zeros, 0, rows * task.columns);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t y = first + r;
    for (int plane = 0; plane < 2; ++plane) {
      int64_t* to = scratch + plane * task.scratch_plane + r * task.columns * words;
      if (y < 0 || y >= task.height) {
        std::memset(to, 0, task.columns * words * 8);
        continue;
      }
      std::memset(to, 0, left * words * 8);
      to += left * words;
      const int64_t* from =
          task.signs + plane * task.signs_plane + ((unit.image * task.height + y) * task.width) * step + group * words;
      if (task.groups == 1) {
        std::memcpy(to, from, inside * words * 8);
      } else {
        for (int64_t x = 0; x < inside; ++x) std::memcpy(to + x * words, from + x * step, words * 8);
      }
      if (plane == 1 && has_zero(to, inside, words, last)) {
        for (int64_t x = 0; x < inside; ++x) {
          own.zeros[r * task.columns + left + x] = has_zero(to + x * words, 1, words, last);
        }
        any = true;
      }
      to += inside * words;
      std::memset(to, 0, (task.columns - left - inside) * words * 8);
    }
  }
  return any;
}

// Whether `kernel` taps from `at` on lie inside [0, size).
TERSOR_INLINE bool lies_inside(int64_t at, int64_t kernel, int64_t dilation, int64_t size) {
  return at >= 0 && at + (kernel - 1) * dilation < size;
}

// Whether a window from that place of the copy on meets a zero.
static bool meets_zero(const Task& task, const bool* zeros, int64_t place) {
  for (int64_t kh = 0; kh < task.kernel_h; ++kh) {
    for (int64_t kw = 0; kw < task.kernel_w; ++kw) {
      if (zeros[place + kh * task.dilation_h * task.columns + kw * task.dilation_w]) return true;
    }
  }
  return false;
}

static int64_t place_pixels(const Task& task, const Unit& unit, const Scratch& scratch, bool any) {
  const int64_t pixels = (unit.end_row - unit.first_row) * task.out_width;
  std::memset(scratch.border, task.pads(), pixels), std::memset(scratch.meets, 0, pixels);
  // The columns of the output whose windows lie inside the image: [left, right).
  const int64_t left = std::min(task.out_width, (task.padding_w + task.stride_w - 1) / task.stride_w);
  const int64_t room = task.width + task.padding_w - (task.kernel_w - 1) * task.dilation_w - 1;
  const int64_t right = std::max(left, std::min(task.out_width, room < 0 ? 0 : room / task.stride_w + 1));
  int64_t* places = scratch.places;
  for (int64_t y = unit.first_row; y < unit.end_row; ++y, places += task.out_width) {
    const int64_t row = (y - unit.first_row) * task.stride_h * task.columns, pixel = places - scratch.places;
    for (int64_t x = 0; x < task.out_width; ++x) places[x] = (row + x * task.stride_w) * task.words;
    if (lies_inside(y * task.stride_h - task.padding_h, task.kernel_h, task.dilation_h, task.height)) {
      std::memset(scratch.border + pixel + left, 0, right - left);
    }
    for (int64_t x = 0; x < task.out_width && any; ++x) {
      scratch.meets[pixel + x] = meets_zero(task, scratch.zeros, row + x * task.stride_w);
    }
  }
  return pixels;
}

// Takes out the taps outside the image: their bits are 0, so that they differ from the positive weights.
TERSOR_INLINE void take_out_padding(const Task& task, const Unit& unit, const int32_t* tap_sums, int64_t pixel,
                                    int32_t* sums) {
  const int64_t y = (unit.first_row + pixel / task.out_width) * task.stride_h - task.padding_h;
  const int64_t x = pixel % task.out_width * task.stride_w - task.padding_w;
  for (int64_t kh = 0; kh < task.kernel_h; ++kh) {
    const int64_t row = y + kh * task.dilation_h;
    for (int64_t kw = 0; kw < task.kernel_w; ++kw) {
      const int64_t column = x + kw * task.dilation_w;
      if (row >= 0 && row < task.height && column >= 0 && column < task.width) continue;
      const int32_t* const own = tap_sums + (kh * task.kernel_w + kw) * MOST_OUTPUTS;
      for (int o = 0; o < MOST_OUTPUTS; ++o) sums[o] += own[o];
    }
  }
}

// a * b + c in one rounding at every level.
TERSOR_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
#if TERSOR_ISA_LEVEL > 0
  return fma<float>(a, b, c);
#else
  for (int i = 0; i < Simd<float>::lanes; ++i) a[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return a;
#endif
}

// The numbers of one pixel's outputs, from `channel` on.
template <class T>
TERSOR_INLINE void finish(const Task& task, const int32_t* sums, int64_t channel, int outputs, const T* residual,
                          T* to) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  constexpr int lanes = Simd<A>::lanes;
  const int64_t row = task.all_outputs();
  if constexpr (std::is_same_v<T, float>) {
    if (task.scale == nullptr && task.epilogue == nullptr) {
      int o = 0;
      for (; o + lanes <= outputs; o += lanes) {
        const auto own = *reinterpret_cast<const Simd<float>::Mask*>(sums + o);
        store<float>(to + o, __builtin_convertvector(own, Vec<float>));
      }
      for (; o < outputs; ++o) to[o] = static_cast<float>(sums[o]);
      return;
    }
  }
  for (int o = 0; o < outputs; o += lanes) {
    const int count = std::min(lanes, outputs - o);
    Vec<A> y{};
    if constexpr (std::is_same_v<A, float>) {
      y = __builtin_convertvector(*reinterpret_cast<const Simd<float>::Mask*>(sums + o), Vec<float>);
    } else {
      for (int i = 0; i < count; ++i) y[i] = static_cast<A>(sums[o + i]);
    }
    if (task.scale != nullptr) y *= load_as<A>(static_cast<const T*>(task.scale) + channel + o, count);
    if constexpr (std::is_same_v<A, float>) {
      if (task.epilogue != nullptr) {
        const float* const own = task.epilogue + channel + o;
        const auto at = [&](int r) { return load_as<float>(own + r * row, count); };
        y = at(0) * y + at(1);
        if (task.relu) y = y < 0 ? Vec<A>{} : y;
        y = multiply_add(at(2), y, at(3));
        if (residual != nullptr) y += load_as<float>(residual + o, count);
        if (task.activation == Activation::hardtanh) {
          y = y < -1 ? splat(-1.0f) : y;
          y = y > 1 ? splat(1.0f) : y;
        } else if (task.activation == Activation::prelu) {
          y += at(4);
          y = (y > 0 ? y : at(5) * y) + at(6);
        }
      }
    }
    store_as<A>(to + o, y, count);
  }
}

// The signs of one pixel's outputs.
TERSOR_INLINE void finish_signs(const Task& task, const Tile& tile, const int32_t* sums, int64_t pixel) {
  const int outputs = tile.outputs;
  const int64_t channel = tile.channel;
  const int64_t row = task.all_outputs(), own = row / task.out_groups;
  constexpr int lanes = Simd<float>::lanes;
  using Mask = Simd<float>::Mask;
  const auto load_numbers = [&](const int32_t* from) { return *reinterpret_cast<const Mask*>(from); };
  uint64_t positive = 0, nonzero = 0;
  for (int o = 0; o < outputs; o += lanes) {
    const Mask sum = load_numbers(sums + o), rising = load_numbers(tile.thresholds + o) > 0;
    const Mask above = sum > load_numbers(tile.thresholds + 2 * MOST_OUTPUTS + o);
    const Mask below = sum < load_numbers(tile.thresholds + MOST_OUTPUTS + o);
    const Mask any = above ^ below;
    positive |= static_cast<uint64_t>(to_bits<float>(((above & rising) | (below & ~rising)) & any)) << o;
    nonzero |= static_cast<uint64_t>(to_bits<float>(any)) << o;
  }
  const uint64_t known = outputs == 64 ? ~uint64_t{0} : (uint64_t{1} << outputs) - 1;
  positive &= known, nonzero &= known;
  int64_t* const to = task.out_signs + pixel * task.out_groups * task.out_words;
  for (int o = 0; o < outputs;) {  // as many as are left of a word and a group
    const int64_t group = (channel + o) / own, place = (channel + o) % own;
    const int bit = static_cast<int>(place % WORD);
    const int count = static_cast<int>(std::min({int64_t{outputs} - o, own - place, WORD - bit}));
    const uint64_t mask = count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
    const int64_t word = group * task.out_words + place / WORD;
    to[word] |= static_cast<int64_t>((positive >> o & mask) << bit);
    to[task.out_signs_plane + word] |= static_cast<int64_t>((nonzero >> o & mask) << bit);
    o += count;
  }
}

// Numbers of the unit's pixels, channel after channel, to an output that is not channels-last.
template <class T>
TERSOR_INLINE void spread(const Task& task, const Unit& unit, const T* columns, int64_t channel, int outputs,
                          int64_t pixels) {
  T* const output = static_cast<T*>(task.output);
  const int64_t area = task.out_height * task.out_width;
  for (int o = 0; o < outputs; ++o) {
    T* const to = output + (unit.image * task.all_outputs() + channel + o) * area + unit.first_row * task.out_width;
    for (int64_t p = 0; p < pixels; ++p) to[p] = columns[p * MOST_OUTPUTS + o];
  }
}

// What the tiles of output channels from block `first` on need again for every strip of pixels.
static void prepare_tiles(const Task& task, const Scratch& scratch, int64_t group, int64_t first, int64_t end) {
  const auto channels = static_cast<int32_t>(task.channels);
  Tile* tile = scratch.tiles;
  for (int64_t block = first; block < end; block += task.tile_blocks, ++tile) {
    const int64_t index = tile - scratch.tiles, channel = group * task.outputs + block * BLOCK;
    tile->blocks = static_cast<int>(std::min<int64_t>(task.tile_blocks, end - block));
    tile->outputs = static_cast<int>(std::min<int64_t>(tile->blocks * BLOCK, task.outputs - block * BLOCK));
    tile->channel = channel;
    tile->weight = task.weight + (group * task.blocks + block) * task.block_words();
    tile->zeros = false;
    for (int q = 0; q < tile->blocks && task.block_zeros != nullptr; ++q) {
      tile->zeros = tile->zeros || task.block_zeros[group * task.blocks + block + q];
    }
    tile->tap_sums = scratch.tap_sums + index * task.taps() * MOST_OUTPUTS;
    for (int64_t t = 0; t < task.taps() && !tile->zeros && task.pads(); ++t) {
      int32_t* const own = tile->tap_sums + t * MOST_OUTPUTS;
      const int32_t* const positive = task.sums + channel * task.taps() + t;
      for (int o = 0; o < MOST_OUTPUTS; ++o) own[o] = o < tile->outputs ? 2 * positive[o * task.taps()] - channels : 0;
    }
    tile->thresholds = scratch.thresholds + index * 3 * MOST_OUTPUTS;
    for (int r = 0; r < 3 && task.out_signs != nullptr; ++r) {
      for (int o = 0; o < tile->outputs; ++o) {
        tile->thresholds[r * MOST_OUTPUTS + o] = task.thresholds[r * task.all_outputs() + channel + o];
      }
    }
  }
}

// Pixels [first, end) of the unit, which has `pixels`, and the outputs of a tile.
template <class T>
TERSOR_INLINE void do_strip(const Task& task, const Unit& unit, const Scratch& scratch, const Tile& tile, int64_t first,
                            int64_t end, int64_t pixels, bool any) {
  const int64_t before = unit.image * task.out_height * task.out_width + unit.first_row * task.out_width;
  alignas(64) int32_t sums[MOST_PIXELS * MOST_OUTPUTS] = {};
  for (int64_t p = first; p < end; p += task.tile_pixels) {
    const int64_t* at[MOST_PIXELS];
    bool zeros = tile.zeros;
    for (int i = 0; i < MOST_PIXELS; ++i) {
      const int64_t pixel = std::min(p + i, pixels - 1);
      at[i] = scratch.words + scratch.places[pixel];
      zeros = zeros || (any && scratch.meets[pixel]);
    }
    task.multiply(task, pixels == p + 1, at, tile.weight, tile.blocks, zeros, sums);
    for (int64_t i = 0; i < std::min<int64_t>(task.tile_pixels, end - p); ++i) {
      int32_t* const own = sums + i * MOST_OUTPUTS;
      if (!zeros && scratch.border[p + i]) take_out_padding(task, unit, tile.tap_sums, p + i, own);
      if (task.out_signs != nullptr) {
        finish_signs(task, tile, own, before + p + i);
        continue;
      }
      const int64_t to = (before + p + i) * task.all_outputs() + tile.channel;
      const T* const residual = task.residual == nullptr ? nullptr : static_cast<const T*>(task.residual) + to;
      T* const numbers = task.channels_last ? static_cast<T*>(task.output) + to
                                            : static_cast<T*>(scratch.columns) + (p + i) * MOST_OUTPUTS;
      finish<T>(task, own, tile.channel, tile.outputs, residual, numbers);
    }
  }
}

template <class T>
static void do_blocks(const Task& task, const Unit& unit, const Scratch& scratch, int64_t group, int64_t first,
                      int64_t end, bool any) {
  const int64_t pixels = place_pixels(task, unit, scratch, any);
  prepare_tiles(task, scratch, group, first, end);
  const int64_t tiles = (end - first + task.tile_blocks - 1) / task.tile_blocks;
  // A few pixels get all of their channels at once: pieces of many rows of memory take up to 1.6 times as long.
  const bool by_pixel = task.out_signs == nullptr && task.channels_last;
  const int64_t strip = by_pixel ? STRIP : pixels;
  for (int64_t p = 0; p < pixels; p += strip) {
    for (int64_t t = 0; t < tiles; ++t) {
      const Tile& tile = scratch.tiles[t];
      do_strip<T>(task, unit, scratch, tile, p, std::min(pixels, p + strip), pixels, any);
      if (task.out_signs != nullptr || task.channels_last) continue;
      spread<T>(task, unit, static_cast<const T*>(scratch.columns), tile.channel, tile.outputs, pixels);
    }
  }
}

template <class T>
static void do_unit(const Task& task, const Unit& unit, const Scratch& scratch) {
  for (int64_t group = unit.first_block / task.blocks; group * task.blocks < unit.end_block; ++group) {
    const int64_t first = std::max<int64_t>(0, unit.first_block - group * task.blocks);
    const int64_t end = std::min(task.blocks, unit.end_block - group * task.blocks);
    const bool zeros = copy_padded(task, unit, group, scratch);
    do_blocks<T>(task, unit, scratch, group, first, end, zeros);
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::binary

#endif

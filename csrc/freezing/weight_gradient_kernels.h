// The kernels of weight_gradient.h, compiled once per instruction set (foreach_isa.h includes this file).

namespace tersor::weight_gradient {
namespace TERSOR_ISA {

using namespace ::tersor::TERSOR_ISA;

// Where channels lie side by side in memory: all of a pixel's at once.
template <class T, class A>
static void pack_rows_channels_last(const Task& task, int64_t tile, A* packed) {
  const T* base = static_cast<const T*>(task.grad_output);
  const int64_t* s = task.grad_strides;
  const int64_t first = tile * task.tile_rows, count = std::min(task.rows - first, task.tile_rows);
  const int64_t whole = count / PANEL * PANEL, panel = task.pixels * PANEL;
  for (int64_t i = 0; i < task.slab_count; ++i) {
    const Slab& slab = task.slabs[i];
    for (int64_t y = 0; y < slab.height; ++y) {
      const T* pixel = base + slab.n * s[0] + first + (slab.y + y) * s[2] + slab.x * s[3];
      for (int64_t x = 0; x < slab.width; ++x, pixel += s[3], packed += PANEL) {
        A* to = packed;
        for (int64_t c = 0; c < whole; c += PANEL, to += panel) {
          for (int64_t j = 0; j < PANEL; ++j) to[j] = static_cast<A>(pixel[c + j]);
        }
        if (whole == task.panels() * PANEL) continue;
        for (int64_t j = 0; j < PANEL; ++j) to[j] = whole + j < count ? static_cast<A>(pixel[whole + j]) : A(0);
        for (to += panel; to < packed + task.panels() * panel; to += panel) std::fill(to, to + PANEL, A(0));
      }
    }
  }
}

// Output channels of one tile, PANEL of them side by side, pixel after pixel; zero beyond the last channel.
template <class T, class A>
static void pack_rows(const Task& task, int64_t tile, A* packed) {
  const T* base = static_cast<const T*>(task.grad_output);
  const int64_t* s = task.grad_strides;
  if (s[1] == 1) return pack_rows_channels_last<T, A>(task, tile, packed);
  for (int64_t panel = 0; panel < task.panels(); ++panel) {
    const int64_t first = tile * task.tile_rows + panel * PANEL;
    const int64_t end = std::min({task.rows, (tile + 1) * task.tile_rows, first + PANEL});
    const int64_t count = std::max<int64_t>(0, end - first);
    for (int64_t i = 0; i < task.slab_count; ++i) {
      const Slab& slab = task.slabs[i];
      for (int64_t y = 0; y < slab.height; ++y, packed += slab.width * PANEL) {
        const T* row = base + slab.n * s[0] + first * s[1] + (slab.y + y) * s[2] + slab.x * s[3];
        for (int64_t c = 0; c < PANEL; ++c) {
          const T* channel = row + c * s[1];
          for (int64_t x = 0; x < slab.width; ++x) {
            packed[x * PANEL + c] = c < count ? static_cast<A>(channel[x * s[3]]) : A(0);
          }
        }
      }
    }
  }
}

// Input channels of one tile side by side, with the rows and columns that padding adds, and zeros there and beyond the
// last channel.
template <class T, class A>
static void pack_columns(const Task& task, int64_t tile, A* packed) {
  const T* base = static_cast<const T*>(task.input);
  const int64_t* s = task.input_strides;
  const int64_t first = tile * task.tile_columns, width = task.padded_columns;
  const int64_t count = std::min(task.columns - first, task.tile_columns);
  for (int64_t i = 0; i < task.slab_count; ++i) {
    const Slab& slab = task.slabs[i];
    const int64_t left = slab.x * task.stride[1] - task.padding[1];
    const int64_t begin = std::min(task.pitch, std::max<int64_t>(0, -left));
    const int64_t end = std::max(begin, std::min(task.pitch, task.input_width - left));
    for (int64_t r = 0; r < task.slab_rows(slab); ++r, packed += task.pitch * width) {
      const int64_t y = slab.y * task.stride[0] - task.padding[0] + r;
      const bool inside = y >= 0 && y < task.input_height && begin < end;
      if (!inside || begin > 0 || end < task.pitch || count < width) std::fill(packed, packed + task.pitch * width, A(0));
      if (!inside) continue;
      const T* row = base + slab.n * s[0] + first * s[1] + y * s[2] + left * s[3];
      if (s[1] == 1) {
        for (int64_t x = begin; x < end; ++x) {
          for (int64_t c = 0; c < count; ++c) packed[x * width + c] = static_cast<A>(row[x * s[3] + c]);
        }
        continue;
      }
      for (int64_t c = 0; c < count; ++c) {
        const T* channel = row + c * s[1];
        for (int64_t x = begin; x < end; ++x) packed[x * width + c] = static_cast<A>(channel[x * s[3]]);
      }
    }
  }
}

// PANEL output channels times VECTORS vectors of input channels, summed over the pixels of the chunk. `offsets` say
// where each vector lies from the pixel of its first tap.
template <class A, int VECTORS>
TERSOR_INLINE void multiply_panel(const Task& task, const A* a, const A* b, const int64_t* offsets, bool first, A* sums) {
  constexpr int lanes = Simd<A>::lanes;
  Vec<A> sum[PANEL][VECTORS];
  for (int i = 0; i < PANEL; ++i) {
    for (int v = 0; v < VECTORS; ++v) sum[i][v] = first ? Vec<A>{} : load(sums + (v * PANEL + i) * lanes);
  }
  const int64_t step = task.stride[1] * task.padded_columns;
  const int64_t row = task.pitch * task.padded_columns;
  const A* at[VECTORS];
  for (int64_t s = 0; s < task.slab_count; ++s) {
    const Slab slab = task.slabs[s];
    for (int64_t y = 0; y < slab.height; ++y) {
      for (int v = 0; v < VECTORS; ++v) at[v] = b + y * task.stride[0] * row + offsets[v];
      for (int64_t x = 0; x < slab.width; ++x, a += PANEL) {
        Vec<A> loaded[VECTORS];
        for (int v = 0; v < VECTORS; ++v) loaded[v] = load(at[v] + x * step);
        for (int i = 0; i < PANEL; ++i) {
          const Vec<A> factor = splat(a[i]);
          for (int v = 0; v < VECTORS; ++v) sum[i][v] = fma<A>(factor, loaded[v], sum[i][v]);
        }
      }
    }
    b += task.slab_rows(slab) * row;
  }
  for (int i = 0; i < PANEL; ++i) {
    for (int v = 0; v < VECTORS; ++v) store<A>(sums + (v * PANEL + i) * lanes, sum[i][v]);
  }
}

template <class A>
static void multiply(const Task& task, const A* packed_rows, const A* packed_columns, bool first, A* sums) {
  constexpr int lanes = Simd<A>::lanes;
  constexpr int most = TERSOR_ISA_LEVEL == 2 ? 3 : 1;  // 8 x 3 sums, 3 vectors and a factor in 32 registers; else of 16
  const int64_t per_tap = task.padded_columns / lanes, vectors = task.taps() * per_tap;
  const auto offset = [&](int64_t v) {
    const int64_t tap = v / per_tap, ky = tap / task.kernel[1], kx = tap % task.kernel[1];
    return (ky * task.dilation[0] * task.pitch + kx * task.dilation[1]) * task.padded_columns + v % per_tap * lanes;
  };
  for (int64_t panel = 0; panel < task.panels(); ++panel, packed_rows += task.pixels * PANEL) {
    for (int64_t v = 0; v < vectors;) {
      const int64_t left = vectors - v;
      const int count = static_cast<int>(std::min<int64_t>(left == 4 && most > 2 ? 2 : most, left));
      int64_t offsets[most];
      for (int i = 0; i < count; ++i) offsets[i] = offset(v + i);
      A* at = sums + (panel * vectors + v) * PANEL * lanes;
      if constexpr (most == 3) {
        if (count == 3) multiply_panel<A, 3>(task, packed_rows, packed_columns, offsets, first, at);
        if (count == 2) multiply_panel<A, 2>(task, packed_rows, packed_columns, offsets, first, at);
      }
      if (count == 1) multiply_panel<A, 1>(task, packed_rows, packed_columns, offsets, first, at);
      v += count;
    }
  }
}

TERSOR_INLINE bool any_frozen(const uint8_t* frozen, int64_t first, int64_t end) {
  int any = 0;
  for (int64_t byte = first / 8; byte <= (end - 1) / 8; ++byte) any |= frozen[byte];
  return any != 0;
}

// The sums of one tile to their places in the weight's gradient, zero where frozen.
template <class T, class A>
static void write(const Task& task, int64_t tile_row, int64_t tile_column, const A* sums, void* grad_weight) {
  constexpr int lanes = Simd<A>::lanes;
  const int64_t taps = task.taps(), per_tap = task.padded_columns / lanes, vectors = taps * per_tap;
  const int64_t first_row = tile_row * task.tile_rows, first_column = tile_column * task.tile_columns;
  const int64_t height = std::min(task.tile_rows, task.rows - first_row);
  const int64_t width = std::min(task.tile_columns, task.columns - first_column);
  for (int64_t r = 0; r < height; ++r) {
    const int64_t begin = ((first_row + r) * task.columns + first_column) * taps;
    T* out = static_cast<T*>(grad_weight) + begin;
    const A* panel = sums + (r / PANEL * vectors * PANEL + r % PANEL) * lanes;
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t j = 0; j < per_tap; ++j) {
        const A* vector = panel + (tap * per_tap + j) * PANEL * lanes;
        const int64_t count = std::min<int64_t>(lanes, width - j * lanes);
        for (int64_t c = 0; c < count; ++c) out[(j * lanes + c) * taps + tap] = static_cast<T>(vector[c]);
      }
    }
    if (task.frozen == nullptr || !any_frozen(task.frozen, begin, begin + width * taps)) continue;
    for (int64_t i = 0; i < width * taps; ++i) {
      if (task.frozen[(begin + i) / 8] >> (begin + i) % 8 & 1) out[i] = T(0);
    }
  }
}

template <class T, class A>
static Kernels<A> gradient_kernels() {
  return {pack_rows<T, A>, pack_columns<T, A>, multiply<A>, write<T, A>, Simd<A>::lanes};
}

}  // namespace TERSOR_ISA
}  // namespace tersor::weight_gradient

// Kernel bodies of dilated attention: a direct stencil, forward and backward in one launch each, without atomics.
//
// A block owns a tile of positions of one image and one head, and a group of `lanes` threads owns a position; the
// threads of a group share its channels in packs of four. The two tensors that neighbours read (key and value;
// query and grad_output for grad_key and grad_value) lie in shared memory with their halo where that fits, in the
// storage dtype: in float32, 9 taps of 2 values would need 72 bytes of shared memory traffic per element and take
// longer than the device memory traffic. Where it does not fit, taps are read through the caches.
#pragma once

#include <cfloat>
#include <cstdint>

#include "dilated_attention_plan.h"

namespace tersor::dilated_attention {

constexpr float log2_e = 1.4426950408889634f;
constexpr float ln_2 = 0.6931471805599453f;

struct Forward {
  Problem problem;
  Strided query, key, value;
  void* output;      // (B, H, W, heads, head_dim)
  float* logsumexp;  // (B, heads, H, W)
};

struct Backward {
  Problem problem;
  Strided grad_output, query, key, value, output;
  const float* logsumexp;  // (B, heads, H, W)
  void* grad_qkv;          // (B, H, W, 3, heads, head_dim)
};

// The tile of this block, and the part of the image that its taps reach.
struct Tile {
  int64_t batch;
  int head, dilation, reach;
  int top, left;
  int halo_top, halo_left, halo_rows, halo_columns;

  __device__ explicit Tile(const Problem& p) {
    unsigned index = blockIdx.x;  // heads are innermost: their slices of one cache line are wanted at the same time
    head = static_cast<int>(index % p.heads);
    index /= p.heads;
    left = static_cast<int>(index % p.tiles_x) * p.tile_width;
    index /= p.tiles_x;
    top = static_cast<int>(index % p.tiles_y) * p.tile_height;
    batch = index / p.tiles_y;
    dilation = p.dilation[head / p.heads_per_group];
    reach = dilation * (p.kernel_size - 1) / 2;
    halo_top = top > reach ? top - reach : 0;
    halo_left = left > reach ? left - reach : 0;
    const int bottom = top + p.tile_height + reach, right = left + p.tile_width + reach;
    halo_rows = (bottom < p.height ? bottom : p.height) - halo_top;
    halo_columns = (right < p.width ? right : p.width) - halo_left;
  }

  __device__ int halo_index(int y, int x) const { return (y - halo_top) * halo_columns + (x - halo_left); }
};

// Visits every position of an area, one per group of lanes. All threads make the same number of visits, the
// surplus ones with inside = false, so that `visit` may exchange values within the warp.
template <typename Visit>
__device__ inline void for_positions(int rows, int columns, int lanes, Visit&& visit) {
  const int groups = static_cast<int>(blockDim.x) / lanes, first = static_cast<int>(threadIdx.x) / lanes;
  const int row_step = groups / columns, column_step = groups - row_step * columns;
  int row = first / columns, column = first - row * columns;
#pragma unroll 1
  for (int begin = 0; begin < rows * columns; begin += groups) {
    visit(row < rows, row, column);
    row += row_step;
    column += column_step;
    if (column >= columns) {
      column -= columns;
      ++row;
    }
  }
}

// Visits the taps of position (y, x) with (tap, inside the image, row, column): all KERNEL * KERNEL of them, or
// with KERNEL = 0 those that lie in the image for any position of the tile. Warps do not diverge here.
template <int KERNEL, bool UNROLL, typename Visit>
__device__ inline void for_taps(const Problem& p, const Tile& tile, int y, int x, bool inside, Visit&& visit) {
  if constexpr (KERNEL > 0) {
#pragma unroll(UNROLL ? KERNEL : 1)
    for (int i = 0; i < KERNEL; ++i) {
      const int row = y + (i - KERNEL / 2) * tile.dilation;
      const bool row_inside = inside && row >= 0 && row < p.height;
#pragma unroll(UNROLL ? KERNEL : 1)
      for (int j = 0; j < KERNEL; ++j) {
        const int column = x + (j - KERNEL / 2) * tile.dilation;
        visit(i * KERNEL + j, row_inside && column >= 0 && column < p.width, row, column);
      }
    }
  } else {
    const int d = tile.dilation, r = tile.reach, last = p.kernel_size - 1;
    const int above = r - (tile.top + p.tile_height - 1), before = r - (tile.left + p.tile_width - 1);
    const int i_first = above > 0 ? (above + d - 1) / d : 0, j_first = before > 0 ? (before + d - 1) / d : 0;
    const int i_end = (p.height - 1 - tile.top + r) / d, j_end = (p.width - 1 - tile.left + r) / d;
#pragma unroll 1
    for (int i = i_first; i <= (i_end < last ? i_end : last); ++i) {
      const int row = y - r + i * d;
      const bool row_inside = inside && row >= 0 && row < p.height;
#pragma unroll 1
      for (int j = j_first; j <= (j_end < last ? j_end : last); ++j) {
        const int column = x - r + j * d;
        visit(0, row_inside && column >= 0 && column < p.width, row, column);
      }
    }
  }
}

// The taps of one axis that lie in the image.
__device__ inline int taps_inside(const Problem& p, const Tile& tile, int at, int size) {
  const int d = tile.dilation, first = tile.reach > at ? (tile.reach - at + d - 1) / d : 0;
  const int last = (size - 1 - at + tile.reach) / d;
  const int end = last < p.kernel_size - 1 ? last : p.kernel_size - 1;
  return end >= first ? end - first + 1 : 0;
}

// A thread's share of a position's channels: EACH packs, every `lanes`-th one of the head. LANES = 0 means any number
// of lanes and channels; with LANES > 0 the head has exactly LANES * EACH packs, all tensors are packed, and nothing
// needs a mask.
template <typename T, int LANES, int EACH>
struct Share {
  static constexpr int channels = EACH * pack_size;
  static constexpr int exact_pitch = LANES > 0 ? pitch_of(LANES * EACH, LANES) : 0;
  const Problem& p;
  int lanes, lane, pitch;

  __device__ explicit Share(const Problem& problem) : p(problem) {
    lanes = LANES > 0 ? LANES : problem.lanes;
    lane = static_cast<int>(threadIdx.x) % lanes;
    pitch = LANES > 0 ? exact_pitch : problem.pitch;
  }

  __device__ bool has(int each) const { return LANES > 0 || lane + each * lanes < p.packs; }
  __device__ int channel(int each) const { return (lane + each * lanes) * pack_size; }
  __device__ float sum(float value) const { return sum_over_lanes(value, lanes); }

  __device__ static const T* base(const Strided& tensor, const Tile& tile) {
    return static_cast<const T*>(tensor.data) + tile.batch * tensor.batch + tile.head * tensor.head;
  }

  // One pack of a position in device memory; channels beyond head_dim are zero.
  __device__ Pack<T> fetch(const T* base, const Strided& tensor, int y, int x, int each) const {
    const T* position = base + y * tensor.row + x * tensor.column;
    Pack<T> pack;
    if (LANES > 0 || tensor.packed) {
      pack = load_pack(position + channel(each));
    } else {
      const T* at = position + channel(each) * tensor.channel;
#pragma unroll
      for (int i = 0; i < pack_size; ++i, at += tensor.channel) {
        pack.value[i] = channel(each) + i < p.head_dim ? *at : static_cast<T>(0.0f);
      }
    }
    return pack;
  }

  __device__ void unpack(const Pack<T>& pack, int each, float (&to)[channels]) const {
#pragma unroll
    for (int i = 0; i < pack_size; ++i) to[each * pack_size + i] = static_cast<float>(pack.value[i]);
  }

  __device__ void clear(float (&values)[channels]) const {
#pragma unroll
    for (int c = 0; c < channels; ++c) values[c] = 0.0f;
  }

  // All of the thread's channels of a position in device memory, zero if the position is not wanted.
  __device__ void read(const Strided& tensor, const Tile& tile, bool wanted, int y, int x,
                       float (&to)[channels]) const {
    clear(to);
    if (!wanted) return;
#pragma unroll
    for (int each = 0; each < EACH; ++each) {
      if (has(each)) unpack(fetch(base(tensor, tile), tensor, y, x, each), each, to);
    }
  }

  // The same of a tap: from its tile in shared memory, or through the caches.
  template <bool SHARED>
  __device__ void read_tap(const T* cached, const Strided& tensor, const Tile& tile, int y, int x,
                           float (&to)[channels]) const {
    if constexpr (SHARED) {
      const T* position = cached + tile.halo_index(y, x) * pitch;
      clear(to);
#pragma unroll
      for (int each = 0; each < EACH; ++each) {
        if (has(each)) unpack(load_pack(position + channel(each)), each, to);
      }
    } else {
      read(tensor, tile, true, y, x, to);
    }
  }

  // The part of two tensors that the tile's taps reach, into shared memory.
  __device__ void load_halo(const Tile& tile, const Strided& a, T* to_a, const Strided& b, T* to_b) const {
    const T *const base_a = base(a, tile), *const base_b = base(b, tile);
    for_positions(tile.halo_rows, tile.halo_columns, lanes, [&](bool inside, int row, int column) {
      if (!inside) return;
      const int y = tile.halo_top + row, x = tile.halo_left + column;
      const int at = (row * tile.halo_columns + column) * pitch;
#pragma unroll
      for (int each = 0; each < EACH; ++each) {
        if (!has(each)) continue;
        store_pack(to_a + at + channel(each), fetch(base_a, a, y, x, each));
        store_pack(to_b + at + channel(each), fetch(base_b, b, y, x, each));
      }
    });
  }

  // factor * values, to a contiguous run of head_dim channels.
  __device__ void write(T* position, const float (&values)[channels], float factor) const {
#pragma unroll
    for (int each = 0; each < EACH; ++each) {
      if (!has(each)) continue;
      Pack<T> pack;
#pragma unroll
      for (int i = 0; i < pack_size; ++i) pack.value[i] = static_cast<T>(values[each * pack_size + i] * factor);
      if (LANES > 0 || p.head_dim % pack_size == 0) {
        store_pack(position + channel(each), pack);
      } else {
        for (int i = 0; i < pack_size; ++i) {
          if (channel(each) + i < p.head_dim) position[channel(each) + i] = pack.value[i];
        }
      }
    }
  }

  __device__ static float dot(const float (&a)[channels], const float (&b)[channels]) {
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < channels; ++c) sum = fmaf(a[c], b[c], sum);
    return sum;
  }

  __device__ static void add(float (&to)[channels], float factor, const float (&values)[channels]) {
#pragma unroll
    for (int c = 0; c < channels; ++c) to[c] = fmaf(factor, values[c], to[c]);
  }
};

template <typename T, int LANES, int EACH, int KERNEL, bool SHARED>
__global__ void __launch_bounds__(max_threads, LANES > 0 ? 4 : 2)
    forward_kernel(const __grid_constant__ Forward args) {
  TERSOR_DYNAMIC_SHARED(memory);
  using Own = Share<T, LANES, EACH>;
  const Problem& p = args.problem;
  const Tile tile(p);
  const Own own(p);
  T* const keys = reinterpret_cast<T*>(memory);
  T* const values = keys + tile.halo_rows * tile.halo_columns * own.pitch;
  if constexpr (SHARED) {
    own.load_halo(tile, args.key, keys, args.value, values);
    __syncthreads();
  }
  const float scale = p.scale * log2_e;  // exp2 needs one instruction less than exp

  for_positions(p.tile_height, p.tile_width, own.lanes, [&](bool inside, int row, int column) {
    const int y = tile.top + row, x = tile.left + column;
    inside = inside && y < p.height && x < p.width;
    float q[Own::channels], k[Own::channels], v[Own::channels], o[Own::channels];
    own.read(args.query, tile, inside, y, x, q);
    own.clear(o);
    float sum = 0.0f, largest = -FLT_MAX;  // finite, so that a first score of -inf has weight 0
    if constexpr (KERNEL > 0) {
      float scores[KERNEL * KERNEL];
      for_taps<KERNEL, true>(p, tile, y, x, inside, [&](int tap, bool tap_inside, int ty, int tx) {
        float score = 0.0f;  // of a tap outside the image
        if (tap_inside) {
          own.template read_tap<SHARED>(keys, args.key, tile, ty, tx, k);
          score = Own::dot(q, k);
        }
        scores[tap] = own.sum(score) * scale;
        largest = fmaxf(largest, scores[tap]);
      });
      for_taps<KERNEL, true>(p, tile, y, x, inside, [&](int tap, bool tap_inside, int ty, int tx) {
        const float weight = exp2f(scores[tap] - largest);
        sum += weight;
        if (tap_inside) {
          own.template read_tap<SHARED>(values, args.value, tile, ty, tx, v);
          Own::add(o, weight, v);
        }
      });
    } else {
      const int64_t taps = int64_t{p.kernel_size} * p.kernel_size;
      const int64_t rows = taps_inside(p, tile, y, p.height), columns = taps_inside(p, tile, x, p.width);
      const int64_t outside = inside ? taps - rows * columns : 0;
      if (outside > 0) {
        largest = 0.0f;
        sum = static_cast<float>(outside);
      }
      for_taps<KERNEL, true>(p, tile, y, x, inside, [&](int, bool tap_inside, int ty, int tx) {
        float score = 0.0f;
        if (tap_inside) {
          own.template read_tap<SHARED>(keys, args.key, tile, ty, tx, k);
          score = Own::dot(q, k);
        }
        score = own.sum(score) * scale;
        if (tap_inside) {
          const float before = largest;
          largest = fmaxf(largest, score);
          const float shrink = exp2f(before - largest), weight = exp2f(score - largest);
          own.template read_tap<SHARED>(values, args.value, tile, ty, tx, v);
          sum = fmaf(sum, shrink, weight);
#pragma unroll
          for (int c = 0; c < Own::channels; ++c) o[c] = fmaf(weight, v[c], o[c] * shrink);
        }
      });
    }
    if (inside) {
      const int64_t at = (tile.batch * p.height + y) * p.width + x;
      own.write(static_cast<T*>(args.output) + (at * p.heads + tile.head) * p.head_dim, o, 1.0f / sum);
      if (own.lane == 0) {
        const int64_t plane = (tile.batch * p.heads + tile.head) * p.height;
        args.logsumexp[(plane + y) * p.width + x] = (largest + log2f(sum)) * ln_2;
      }
    }
  });
}

// With n a query and m a key: P = exp(scale * <q_n, k_m> - lse_n), D_n = <g_n, o_n>, dS = P * (<g_n, v_m> - D_n);
// grad_query_n = scale * sum over its taps dS k_m; grad_key_m = scale * sum dS q_n and grad_value_m = sum P g_n over
// the same offsets, since they are symmetric. Both halves use the same shared memory, one after the other.
template <typename T, int LANES, int EACH, int KERNEL, bool SHARED>
__global__ void __launch_bounds__(max_threads, SHARED ? 2 : 1)
    backward_kernel(const __grid_constant__ Backward args) {
  TERSOR_DYNAMIC_SHARED(memory);
  using Own = Share<T, LANES, EACH>;
  const Problem& p = args.problem;
  const Tile tile(p);
  const Own own(p);
  const int halo = tile.halo_rows * tile.halo_columns;
  T* const first = reinterpret_cast<T*>(memory);  // keys, then queries
  T* const second = first + halo * own.pitch;     // values, then gradients of the output
  float* const offsets = reinterpret_cast<float*>(second + halo * own.pitch);  // lse_n and D_n of every position
  const float scale = p.scale * log2_e;
  const auto logsumexp = [&](int y, int x) {
    return args.logsumexp[((tile.batch * p.heads + tile.head) * p.height + y) * p.width + x] * log2_e;
  };
  const auto grad = [&](int y, int x, int which) {  // 0: query, 1: key, 2: value
    const int64_t position = (tile.batch * p.height + y) * p.width + x;
    return static_cast<T*>(args.grad_qkv) + ((position * 3 + which) * p.heads + tile.head) * p.head_dim;
  };

  if constexpr (SHARED) {
    own.load_halo(tile, args.key, first, args.value, second);
    __syncthreads();
  }
  for_positions(p.tile_height, p.tile_width, own.lanes, [&](bool inside, int row, int column) {
    const int y = tile.top + row, x = tile.left + column;
    inside = inside && y < p.height && x < p.width;
    float q[Own::channels], g[Own::channels], k[Own::channels], v[Own::channels], dq[Own::channels];
    own.read(args.output, tile, inside, y, x, k);
    own.read(args.grad_output, tile, inside, y, x, g);
    const float delta = own.sum(Own::dot(g, k));
    const float lse = inside ? logsumexp(y, x) : 0.0f;
    own.read(args.query, tile, inside, y, x, q);
    own.clear(dq);
    for_taps<KERNEL, false>(p, tile, y, x, inside, [&](int, bool tap_inside, int ty, int tx) {
      float score = 0.0f, grad_weight = 0.0f;
      if (tap_inside) {
        own.template read_tap<SHARED>(second, args.value, tile, ty, tx, v);
        grad_weight = Own::dot(g, v);
        own.template read_tap<SHARED>(first, args.key, tile, ty, tx, k);
        score = Own::dot(q, k);
      }
      score = own.sum(score);
      grad_weight = own.sum(grad_weight);
      if (tap_inside) Own::add(dq, exp2f(fmaf(score, scale, -lse)) * (grad_weight - delta), k);
    });
    if (inside) own.write(grad(y, x, 0), dq, p.scale);
  });

  if constexpr (SHARED) {
    __syncthreads();  // before the keys and values are overwritten
    const T *const query = Own::base(args.query, tile), *const gradient = Own::base(args.grad_output, tile);
    for_positions(tile.halo_rows, tile.halo_columns, own.lanes, [&](bool inside, int row, int column) {
      const int y = tile.halo_top + row, x = tile.halo_left + column, at = row * tile.halo_columns + column;
      float g[Own::channels], o[Own::channels];
      own.clear(g);
      own.read(args.output, tile, inside, y, x, o);
      if (inside) {
#pragma unroll
        for (int each = 0; each < EACH; ++each) {
          if (!own.has(each)) continue;
          store_pack(first + at * own.pitch + own.channel(each), own.fetch(query, args.query, y, x, each));
          const Pack<T> pack = own.fetch(gradient, args.grad_output, y, x, each);
          store_pack(second + at * own.pitch + own.channel(each), pack);
          own.unpack(pack, each, g);
        }
      }
      const float delta = own.sum(Own::dot(g, o));
      if (inside && own.lane == 0) {
        offsets[2 * at] = logsumexp(y, x);
        offsets[2 * at + 1] = delta;
      }
    });
    __syncthreads();
  }
  for_positions(p.tile_height, p.tile_width, own.lanes, [&](bool inside, int row, int column) {
    const int y = tile.top + row, x = tile.left + column;
    inside = inside && y < p.height && x < p.width;
    float k[Own::channels], v[Own::channels], q[Own::channels], g[Own::channels];
    float dk[Own::channels], dv[Own::channels];
    own.read(args.key, tile, inside, y, x, k);
    own.read(args.value, tile, inside, y, x, v);
    own.clear(dk);
    own.clear(dv);
    for_taps<KERNEL, false>(p, tile, y, x, inside, [&](int, bool tap_inside, int ty, int tx) {
      float score = 0.0f, grad_weight = 0.0f, lse = 0.0f, delta = 0.0f;
      if (tap_inside) {
        own.template read_tap<SHARED>(second, args.grad_output, tile, ty, tx, g);
        grad_weight = Own::dot(g, v);
        if constexpr (SHARED) {
          lse = offsets[2 * tile.halo_index(ty, tx)];
          delta = offsets[2 * tile.halo_index(ty, tx) + 1];
        } else {
          own.read(args.output, tile, true, ty, tx, q);
          delta = Own::dot(g, q);
          lse = logsumexp(ty, tx);
        }
        own.template read_tap<SHARED>(first, args.query, tile, ty, tx, q);
        score = Own::dot(q, k);
      }
      score = own.sum(score);
      grad_weight = own.sum(grad_weight);
      if constexpr (!SHARED) delta = own.sum(delta);
      if (tap_inside) {
        const float weight = exp2f(fmaf(score, scale, -lse));
        Own::add(dk, weight * (grad_weight - delta), q);
        Own::add(dv, weight, g);
      }
    });
    if (inside) {
      own.write(grad(y, x, 1), dk, p.scale);
      own.write(grad(y, x, 2), dv, 1.0f);
    }
  });
}

template <int LANES, int EACH, int KERNEL, bool SHARED>
struct Variant {
  static constexpr int lanes = LANES, each = EACH, kernel = KERNEL;
  static constexpr bool shared = SHARED;
};

// Calls run with the variant for this plan: the published head sizes have no masks, the published kernel no loop.
template <typename Run>
void choose_variant(const Plan& plan, Run&& run) {
  const Problem& p = plan.problem;
  if (!plan.shared) return run(Variant<0, 2, 0, false>{});
  if (p.kernel_size != 3) return run(Variant<0, 2, 0, true>{});
  if (p.head_dim == 24 && plan.exact) return run(Variant<2, 3, 3, true>{});
  if (p.head_dim == 32 && plan.exact) return run(Variant<4, 2, 3, true>{});
  if (p.head_dim == 64 && plan.exact) return run(Variant<8, 2, 3, true>{});
  return run(Variant<0, 2, 3, true>{});
}

}  // namespace tersor::dilated_attention

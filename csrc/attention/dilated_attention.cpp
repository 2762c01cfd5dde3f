// Dilated sliding-window attention on the CPU (specification: pyops/attention/dilated_attention.py).
//
// One unit of work is a block of rows of one image, with as many heads as the cache has room for. Rows of tokens are transposed on the fly into planes
// [channel][x] with zeros left and right, so that a vector holds neighbouring positions: scores need no reduction
// across lanes, a tap is a shifted load, and taps outside the image read the zeros that the formula asks for.
// A ring of planes holds the rows inside the window. Each result is computed by one unit, in an order that depends
// on nothing but the shape: the same bits for any number of threads.
#ifndef TERSOR_ISA

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace tersor::dilated_attention {

struct View {  // (B, H, W, heads, head_dim), head_dim contiguous; strides in elements
  const void* data;
  int64_t batch, row, column, head;
};

struct Task {
  int64_t batch, height, width, heads, head_dim, kernel_size;
  const int64_t* dilation;  // one per head
  int64_t largest_dilation;
  double scale;
  int64_t step_rows;  // query rows that are worked on together, while their keys are in the nearest cache
  View query, key, value, grad_output;
  void *output, *grad_qkv, *logsumexp;  // contiguous

  int64_t taps() const { return kernel_size * kernel_size; }
};

struct Unit {  // what one thread does in one go
  int64_t image, first_head, last_head, first_row, last_row;
};

}  // namespace tersor::dilated_attention

#define TERSOR_BODY "attention/dilated_attention.cpp"
#include "foreach_isa.h"

#else  // ---- once per instruction set ----

namespace tersor::dilated_attention {
namespace TERSOR_ISA {
using namespace tersor::TERSOR_ISA;

// Hands out the thread's scratch memory; with no memory it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class A>
  A* take(int64_t count) {
    A* taken = base ? reinterpret_cast<A*>(base + used) : nullptr;
    used += (count * static_cast<int64_t>(sizeof(A)) + 63) / 64 * 64;
    return taken;
  }
};

// Rings of planes of one head. `rows` says which image rows the key planes hold by now.
template <class A>
struct Head {
  static constexpr int64_t lanes = Simd<A>::lanes;
  int64_t head, dilation, reach, pad, width, stride, plane, slots, loaded;
  A *keys, *values, *queries, *grads, *weights, *grad_scores;

  Head(const Task& task, int64_t index, Arena& arena, bool backward) {
    const auto whole = [](int64_t n) { return (n + lanes - 1) / lanes * lanes; };
    head = index, dilation = task.dilation[index], reach = dilation * (task.kernel_size - 1) / 2;
    pad = whole(reach), width = whole(task.width), stride = pad + width + pad;
    plane = task.head_dim * stride;
    slots = std::min(2 * reach + task.step_rows, task.height);
    keys = arena.take<A>(slots * plane), values = arena.take<A>(slots * plane);
    if (!backward) return;
    queries = arena.take<A>(slots * plane), grads = arena.take<A>(slots * plane);
    weights = arena.take<A>(slots * task.taps() * stride), grad_scores = arena.take<A>(slots * task.taps() * stride);
  }

  void clear_pads(A* planes, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      std::memset(planes + r * stride, 0, pad * sizeof(A));
      std::memset(planes + r * stride + pad + width, 0, pad * sizeof(A));
    }
  }

  void clear(const Task& task, bool backward) const {
    const int64_t rows = slots * task.head_dim;
    clear_pads(keys, rows), clear_pads(values, rows);
    if (!backward) return;
    clear_pads(queries, rows), clear_pads(grads, rows);
    clear_pads(weights, slots * task.taps()), clear_pads(grad_scores, slots * task.taps());
  }

  A* row(A* ring, int64_t y) const { return ring + y % slots * plane; }
};

// What the heads of one unit share: zeros for rows outside the image, and the block of positions in hand.
template <class A>
struct Workspace {
  static constexpr int64_t lanes = Simd<A>::lanes;
  Head<A>* heads;
  int64_t count;
  A *zeros, *query, *grad, *sum, *scores, *grad_scores;
  const A **taps, **other_taps;  // taps() pointers for each row of a step

  Workspace(const Task& task, int64_t first, int64_t last, Arena& arena, bool backward) : count(last - first) {
    heads = arena.take<Head<A>>(count);
    int64_t widest = 0;
    for (int64_t h = first; h < last; ++h) {
      const Head<A> head(task, h, arena, backward);
      widest = std::max(widest, head.stride);
      if (arena.base) heads[h - first] = head;
    }
    const int64_t zero_rows = std::max(task.head_dim, task.taps()), block = lanes * (task.head_dim + 4);
    zeros = arena.take<A>(zero_rows * widest);
    query = arena.take<A>(block), grad = arena.take<A>(block), sum = arena.take<A>(block);
    scores = arena.take<A>(lanes * task.taps()), grad_scores = arena.take<A>(lanes * task.taps());
    taps = arena.take<const A*>(task.step_rows * task.taps());
    other_taps = arena.take<const A*>(task.step_rows * task.taps());
    if (!arena.base) return;
    std::memset(zeros, 0, zero_rows * widest * sizeof(A));
    for (int64_t h = 0; h < count; ++h) heads[h].clear(task, backward);
  }
};

// Bytes that one unit with the heads [first, last) needs.
template <class A>
int64_t scratch(const Task& task, int64_t first, int64_t last, bool backward) {
  Arena arena{nullptr};
  Workspace<A>(task, first, last, arena, backward);
  return arena.used;
}

template <class T>
TERSOR_INLINE const T* row_of(const View& view, int64_t b, int64_t y, int64_t head) {
  return static_cast<const T*>(view.data) + b * view.batch + y * view.row + head * view.head;
}

// Asks for one row of several heads ahead of its use: the strided reads of load_row are too sparse for the hardware.
template <class T>
void prefetch_row(const Task& task, const View& view, int64_t b, int64_t y, int64_t head, int64_t count) {
  if (y >= task.height) return;
  const T* row = row_of<T>(view, b, y, head);
  for (int64_t h = 0; h < count; h += view.head == task.head_dim ? count : 1) {
    const int64_t bytes = (view.head == task.head_dim ? count : 1) * task.head_dim * static_cast<int64_t>(sizeof(T));
    for (int64_t x = 0; x < task.width; ++x) {
      const char* token = reinterpret_cast<const char*>(row + x * view.column + h * view.head);
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(token + at, 0, 2);
    }
  }
}

// `lanes` tokens of one head, transposed: channel c goes to plane + c * plane_stride. Sizes come by value, since a
// vector store may alias anything that is read through a reference.
template <class T, class A>
TERSOR_INLINE void transpose_in(const T* token, int64_t token_stride, int tokens, int64_t head_dim, A* plane,
                                int64_t plane_stride) {
  Vec<A> v[4];
  int64_t c = 0;
  for (; c + 4 <= head_dim; c += 4, plane += 4 * plane_stride) {
    load_tokens(token + c, token_stride, tokens, 4, v);
    store<A>(plane, v[0]), store<A>(plane + plane_stride, v[1]);
    store<A>(plane + 2 * plane_stride, v[2]), store<A>(plane + 3 * plane_stride, v[3]);
  }
  if (c == head_dim) return;
  load_tokens(token + c, token_stride, tokens, static_cast<int>(head_dim - c), v);
  for (int i = 0; c + i < head_dim; ++i) store<A>(plane + i * plane_stride, v[i]);
}

template <class T, class A>
TERSOR_INLINE void transpose_out(T* token, int64_t token_stride, int tokens, int64_t head_dim, const A* block,
                                 Vec<A> factor) {
  constexpr int lanes = Simd<A>::lanes;
  for (int64_t c = 0; c < head_dim; c += 4, block += 4 * lanes) {
    Vec<A> v[4] = {load(block) * factor, load(block + lanes) * factor, load(block + 2 * lanes) * factor,
                   load(block + 3 * lanes) * factor};
    const int channels = static_cast<int>(head_dim - c);
    if (__builtin_expect(channels >= 4, 1)) store_tokens(token + c, token_stride, tokens, 4, v);
    else store_tokens(token + c, token_stride, tokens, channels, v);
  }
}

// One row of one head, transposed into a plane.
template <class T, class A>
void load_row(const Task& task, const Head<A>& head, const View& view, int64_t b, int64_t y, A* ring) {
  const T* row = row_of<T>(view, b, y, head.head);
  A* plane = head.row(ring, y) + head.pad;
  const int64_t width = task.width, head_dim = task.head_dim, column = view.column, stride = head.stride;
  int64_t x = 0;
  for (; x + head.lanes <= width; x += head.lanes) {
    transpose_in(row + x * column, column, head.lanes, head_dim, plane + x, stride);
  }
  if (x < width) transpose_in(row + x * column, column, static_cast<int>(width - x), head_dim, plane + x, stride);
}

// The key and value rows that the query rows up to `last` look at, as far as they are not in the ring yet.
template <class T, class A>
void load_keys(const Task& task, Head<A>& head, int64_t b, int64_t last) {
  for (; head.loaded <= std::min(task.height - 1, last + head.reach); ++head.loaded) {
    load_row<T>(task, head, task.key, b, head.loaded, head.keys);
    load_row<T>(task, head, task.value, b, head.loaded, head.values);
  }
}

// scores[t] = sum over channels of query[c] * taps[t][c], at `lanes` positions from x on.
template <class A, int N>
TERSOR_INLINE void dot(const A* query, const A* const* taps, int64_t stride, int64_t x, int64_t channels, A* scores) {
  constexpr int lanes = Simd<A>::lanes;
  const A* tap[N];
  Vec<A> sum[N];
  for (int t = 0; t < N; ++t) tap[t] = taps[t] + x, sum[t] = Vec<A>{};
  for (int64_t c = 0; c < channels; ++c) {
    const Vec<A> q = load(query + c * lanes);
#pragma GCC unroll 16
    for (int t = 0; t < N; ++t) sum[t] = fma<A>(q, load(tap[t] + c * stride), sum[t]);
  }
  for (int t = 0; t < N; ++t) store<A>(scores + t * lanes, sum[t]);
}

template <class A>
TERSOR_INLINE void dots(const A* query, const A* const* taps, int64_t count, int64_t stride, int64_t x,
                        int64_t channels, A* scores) {
  constexpr int lanes = Simd<A>::lanes;
  if (count == 9) return dot<A, 9>(query, taps, stride, x, channels, scores);
  int64_t t = 0;
  for (; t + 8 <= count; t += 8) dot<A, 8>(query, taps + t, stride, x, channels, scores + t * lanes);
  for (; t < count; ++t) dot<A, 1>(query, taps + t, stride, x, channels, scores + t * lanes);
}

// sum[c] (+)= sum over taps of weights[t] * taps[t][c].
template <class A, int N, bool FIRST>
TERSOR_INLINE void mix(const A* weights, const A* const* taps, int64_t stride, int64_t x, int64_t channels, A* sum) {
  constexpr int lanes = Simd<A>::lanes;
  const A* tap[N];
  Vec<A> weight[N];
  for (int t = 0; t < N; ++t) tap[t] = taps[t] + x, weight[t] = load(weights + t * lanes);
  for (int64_t c = 0; c < channels; ++c) {
    Vec<A> s = FIRST ? Vec<A>{} : load(sum + c * lanes);
#pragma GCC unroll 16
    for (int t = 0; t < N; ++t) s = fma<A>(weight[t], load(tap[t] + c * stride), s);
    store<A>(sum + c * lanes, s);
  }
}

template <class A>
TERSOR_INLINE void mixes(const A* weights, const A* const* taps, int64_t count, int64_t stride, int64_t x,
                         int64_t channels, A* sum) {
  constexpr int lanes = Simd<A>::lanes;
  if (count == 9) return mix<A, 9, true>(weights, taps, stride, x, channels, sum);
  mix<A, 1, true>(weights, taps, stride, x, channels, sum);
  int64_t t = 1;
  for (; t + 8 <= count; t += 8) mix<A, 8, false>(weights + t * lanes, taps + t, stride, x, channels, sum);
  for (; t < count; ++t) mix<A, 1, false>(weights + t * lanes, taps + t, stride, x, channels, sum);
}

// The tap pointers of the query row y into a ring of rows, at column 0; rows outside the image are zero.
template <class A>
void point_taps(const Task& task, const Head<A>& head, int64_t y, A* ring, const A* zeros, const A** taps) {
  for (int64_t i = 0; i < task.kernel_size; ++i) {
    const int64_t row = y - head.reach + i * head.dilation;
    const A* plane = row < 0 || row >= task.height ? zeros : head.row(ring, row);
    for (int64_t j = 0; j < task.kernel_size; ++j) *taps++ = plane + head.pad - head.reach + j * head.dilation;
  }
}

// The outputs of one query row at `lanes` positions from x on.
template <class T, class A>
TERSOR_INLINE void forward_block(const Task& task, const Head<A>& head, Workspace<A>& work, int64_t b, int64_t y,
                                 int64_t x, const A* const* taps, const A* const* value_taps) {
  constexpr int lanes = Simd<A>::lanes;
  const int tokens = static_cast<int>(std::min<int64_t>(lanes, task.width - x));
  const T* query = row_of<T>(task.query, b, y, head.head) + x * task.query.column;
  transpose_in(query, task.query.column, tokens, task.head_dim, work.query, lanes);
  const int64_t count = task.taps();
  dots<A>(work.query, taps, count, head.stride, x, task.head_dim, work.scores);
  const Vec<A> scale = splat(static_cast<A>(task.scale));
  Vec<A> largest = load(work.scores) * scale;
  for (int64_t t = 1; t < count; ++t) largest = max<A>(load(work.scores + t * lanes) * scale, largest);
  Vec<A> total{};
  for (int64_t t = 0; t < count; ++t) {
    const Vec<A> weight = exp(load(work.scores + t * lanes) * scale - largest);
    store<A>(work.scores + t * lanes, weight);
    total += weight;
  }
  A* logsumexp = static_cast<A*>(task.logsumexp) + ((b * task.heads + head.head) * task.height + y) * task.width + x;
  store_first<A>(logsumexp, largest + log(total), tokens);
  mixes<A>(work.scores, value_taps, count, head.stride, x, task.head_dim, work.sum);
  const int64_t token = (b * task.height + y) * task.width + x;
  T* output = static_cast<T*>(task.output) + (token * task.heads + head.head) * task.head_dim;
  transpose_out<T, A>(output, task.heads * task.head_dim, tokens, task.head_dim, work.sum, splat(A(1)) / total);
}

template <class T, class A>
void forward_unit(const Task& task, const Unit& unit, char* memory) {
  Arena arena{memory};
  Workspace<A> work(task, unit.first_head, unit.last_head, arena, false);
  for (int64_t h = 0; h < work.count; ++h) {
    work.heads[h].loaded = std::max<int64_t>(0, unit.first_row - work.heads[h].reach);
  }
  const int64_t ahead = task.step_rows + task.largest_dilation * (task.kernel_size - 1) / 2;
  for (int64_t y = unit.first_row; y < unit.last_row; y += task.step_rows) {
    const int64_t last = std::min(unit.last_row, y + task.step_rows);
    for (int64_t r = y; r < last; ++r) {
      prefetch_row<T>(task, task.key, unit.image, r + ahead, unit.first_head, work.count);
      prefetch_row<T>(task, task.value, unit.image, r + ahead, unit.first_head, work.count);
      prefetch_row<T>(task, task.query, unit.image, r + task.step_rows, unit.first_head, work.count);
    }
    for (int64_t h = 0; h < work.count; ++h) {
      Head<A>& head = work.heads[h];
      load_keys<T, A>(task, head, unit.image, last - 1);
      for (int64_t r = y; r < last; ++r) {
        point_taps<A>(task, head, r, head.keys, work.zeros, work.taps + (r - y) * task.taps());
        point_taps<A>(task, head, r, head.values, work.zeros, work.other_taps + (r - y) * task.taps());
      }
      for (int64_t x = 0; x < task.width; x += head.lanes) {
        for (int64_t r = y; r < last; ++r) {
          const int64_t at = (r - y) * task.taps();
          forward_block<T, A>(task, head, work, unit.image, r, x, work.taps + at, work.other_taps + at);
        }
      }
    }
  }
}

// Softmax weights and score gradients of one query row at `lanes` positions from x on, into the rings; the query's own
// gradient where this unit owns the row.
template <class T, class A>
TERSOR_INLINE void backward_query_block(const Task& task, const Head<A>& head, Workspace<A>& work, int64_t b, int64_t y,
                                        int64_t x, const A* const* taps, const A* const* value_taps, bool owned) {
  constexpr int lanes = Simd<A>::lanes;
  const int64_t count = task.taps();
  const int tokens = static_cast<int>(std::min<int64_t>(lanes, task.width - x));
  const A* query = head.row(head.queries, y) + head.pad + x;
  const A* grad = head.row(head.grads, y) + head.pad + x;
  for (int64_t c = 0; c < task.head_dim; ++c) {
    store<A>(work.query + c * lanes, load(query + c * head.stride));
    store<A>(work.grad + c * lanes, load(grad + c * head.stride));
  }
  dots<A>(work.query, taps, count, head.stride, x, task.head_dim, work.scores);
  dots<A>(work.grad, value_taps, count, head.stride, x, task.head_dim, work.grad_scores);
  const A* logsumexp =
      static_cast<A*>(task.logsumexp) + ((b * task.heads + head.head) * task.height + y) * task.width + x;
  const Vec<A> scale = splat(static_cast<A>(task.scale)), lse = load_first(logsumexp, tokens);
  Vec<A> mean{};  // <grad_output, output>, which is the weights' mean of <grad_output, value>
  for (int64_t t = 0; t < count; ++t) {
    const Vec<A> weight = exp(load(work.scores + t * lanes) * scale - lse);
    store<A>(work.scores + t * lanes, weight);
    mean = fma<A>(weight, load(work.grad_scores + t * lanes), mean);
  }
  A* weights = head.weights + y % head.slots * count * head.stride + head.pad + x;
  A* grad_scores = head.grad_scores + y % head.slots * count * head.stride + head.pad + x;
  for (int64_t t = 0; t < count; ++t) {
    const Vec<A> weight = load(work.scores + t * lanes);
    const Vec<A> grad_score = scale * weight * (load(work.grad_scores + t * lanes) - mean);
    store<A>(work.grad_scores + t * lanes, grad_score);
    store<A>(weights + t * head.stride, tokens < lanes ? keep_first<A>(weight, tokens) : weight);
    store<A>(grad_scores + t * head.stride, tokens < lanes ? keep_first<A>(grad_score, tokens) : grad_score);
  }
  if (!owned) return;
  mixes<A>(work.grad_scores, taps, count, head.stride, x, task.head_dim, work.sum);
  const int64_t token = (b * task.height + y) * task.width + x, stride = 3 * task.heads * task.head_dim;
  T* gradient = static_cast<T*>(task.grad_qkv) + token * stride + head.head * task.head_dim;
  transpose_out<T, A>(gradient, stride, tokens, task.head_dim, work.sum, splat(A(1)));
}

// Where a key row finds, for every tap, the query row that looks at it and that query's factor for it.
template <class A>
void point_sources(const Task& task, const Head<A>& head, int64_t m, A* sources, A* factors, const A* zeros,
                   const A** source_taps, const A** factor_taps) {
  const int64_t K = task.kernel_size, count = task.taps();
  for (int64_t t = 0; t < count; ++t) {
    const int64_t y = m + head.reach - t / K * head.dilation;
    const int64_t x = head.pad + head.reach - t % K * head.dilation;
    const bool outside = y < 0 || y >= task.height;
    source_taps[t] = (outside ? zeros : head.row(sources, y)) + x;
    factor_taps[t] = (outside ? zeros : factors + (y % head.slots * count + t) * head.stride) + x;
  }
}

// What the queries around one key row give to its keys (or values), once all of them are in the rings.
template <class T, class A>
TERSOR_INLINE void backward_key_block(const Task& task, const Head<A>& head, Workspace<A>& work, int64_t b, int64_t m,
                                      int64_t x, const A* const* sources, const A* const* factors, int64_t which) {
  constexpr int lanes = Simd<A>::lanes;
  const int tokens = static_cast<int>(std::min<int64_t>(lanes, task.width - x));
  for (int64_t t = 0; t < task.taps(); ++t) store<A>(work.scores + t * lanes, load(factors[t] + x));
  mixes<A>(work.scores, sources, task.taps(), head.stride, x, task.head_dim, work.sum);
  const int64_t token = (b * task.height + m) * task.width + x, stride = task.heads * task.head_dim;
  T* gradient = static_cast<T*>(task.grad_qkv) + (3 * token + which) * stride + head.head * task.head_dim;
  transpose_out<T, A>(gradient, 3 * stride, tokens, task.head_dim, work.sum, splat(A(1)));
}

template <class T, class A>
void backward_queries(const Task& task, const Unit& unit, Head<A>& head, Workspace<A>& work, int64_t first,
                      int64_t last) {
  load_keys<T, A>(task, head, unit.image, last - 1);
  for (int64_t r = first; r < last; ++r) {
    load_row<T>(task, head, task.query, unit.image, r, head.queries);
    load_row<T>(task, head, task.grad_output, unit.image, r, head.grads);
    point_taps<A>(task, head, r, head.keys, work.zeros, work.taps + (r - first) * task.taps());
    point_taps<A>(task, head, r, head.values, work.zeros, work.other_taps + (r - first) * task.taps());
  }
  for (int64_t x = 0; x < task.width; x += head.lanes) {
    for (int64_t r = first; r < last; ++r) {
      const int64_t at = (r - first) * task.taps();
      const bool owned = r >= unit.first_row && r < unit.last_row;
      backward_query_block<T, A>(task, head, work, unit.image, r, x, work.taps + at, work.other_taps + at, owned);
    }
  }
}

template <class T, class A>
void backward_keys(const Task& task, const Unit& unit, Head<A>& head, Workspace<A>& work, int64_t first,
                   int64_t last) {
  for (const int64_t which : {1, 2}) {
    A* sources = which == 1 ? head.queries : head.grads;
    A* factors = which == 1 ? head.grad_scores : head.weights;
    for (int64_t m = first; m < last; ++m) {
      const int64_t at = (m - first) * task.taps();
      point_sources<A>(task, head, m, sources, factors, work.zeros, work.taps + at, work.other_taps + at);
    }
    for (int64_t x = 0; x < task.width; x += head.lanes) {
      for (int64_t m = first; m < last; ++m) {
        const int64_t at = (m - first) * task.taps();
        backward_key_block<T, A>(task, head, work, unit.image, m, x, work.taps + at, work.other_taps + at, which);
      }
    }
  }
}

template <class T, class A>
void backward_unit(const Task& task, const Unit& unit, char* memory) {
  Arena arena{memory};
  Workspace<A> work(task, unit.first_head, unit.last_head, arena, true);
  const int64_t reach = task.largest_dilation * (task.kernel_size - 1) / 2;
  const int64_t ahead = task.step_rows + reach;
  for (int64_t h = 0; h < work.count; ++h) {
    const int64_t first = std::max<int64_t>(0, unit.first_row - work.heads[h].reach);
    work.heads[h].loaded = std::max<int64_t>(0, first - work.heads[h].reach);
  }
  for (int64_t y = std::max<int64_t>(0, unit.first_row - reach); y < unit.last_row + reach; y += task.step_rows) {
    for (int64_t r = y; r < y + task.step_rows; ++r) {
      prefetch_row<T>(task, task.key, unit.image, r + ahead, unit.first_head, work.count);
      prefetch_row<T>(task, task.value, unit.image, r + ahead, unit.first_head, work.count);
      prefetch_row<T>(task, task.query, unit.image, r + task.step_rows, unit.first_head, work.count);
      prefetch_row<T>(task, task.grad_output, unit.image, r + task.step_rows, unit.first_head, work.count);
    }
    for (int64_t h = 0; h < work.count; ++h) {
      Head<A>& head = work.heads[h];
      const int64_t first = std::max(y, unit.first_row - head.reach);
      const int64_t last = std::min({y + task.step_rows, unit.last_row + head.reach, task.height});
      if (first < last) backward_queries<T, A>(task, unit, head, work, first, last);
      const int64_t first_key = std::max(y - head.reach, unit.first_row);
      const int64_t last_key = std::min(y + task.step_rows - head.reach, unit.last_row);
      if (first_key < last_key) backward_keys<T, A>(task, unit, head, work, first_key, last_key);
    }
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::dilated_attention
#endif

#ifndef TERSOR_ISA  // ---- the operators ----

namespace tersor::dilated_attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Run = void (*)(const Task&, const Unit&, char*);
using Scratch = int64_t (*)(const Task&, int64_t, int64_t, bool);

constexpr int64_t STEP_ROWS = 4;
constexpr int64_t CACHE = 1 << 20;  // bytes of the level-2 cache that the planes of one unit may fill

struct Free {
  void operator()(void* p) const { std::free(p); }
};

View view_of(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

Tensor last_dim_contiguous(const Tensor& t) {
  return t.size(4) == 1 || t.stride(4) == 1 ? t : torch::stable::contiguous(t);
}

// What Python has checked already, once more where memory depends on it.
void check(const Tensor& query, const Tensor& other, const char* name) {
  bool same = other.dim() == 5 && other.scalar_type() == query.scalar_type() && other.is_cpu();
  for (int i = 0; same && i < 5; ++i) same = other.size(i) == query.size(i);
  STD_TORCH_CHECK(same, name, " must be a CPU tensor with the shape and dtype of query");
}

Task make_task(const Tensor& query, const Tensor& key, const Tensor& value, int64_t kernel_size,
               const std::vector<int64_t>& dilation, double scale, std::vector<int64_t>& per_head) {
  STD_TORCH_CHECK(query.dim() == 5 && query.is_cpu(), "query must be a CPU tensor (B, H, W, heads, head_dim)");
  check(query, key, "key");
  check(query, value, "value");
  Task task{};
  task.batch = query.size(0), task.height = query.size(1), task.width = query.size(2);
  task.heads = query.size(3), task.head_dim = query.size(4), task.kernel_size = kernel_size, task.scale = scale;
  task.step_rows = std::min(STEP_ROWS, task.height);
  const int64_t groups = static_cast<int64_t>(dilation.size());
  STD_TORCH_CHECK(task.height > 0 && task.width > 0 && task.head_dim > 0, "H, W and head_dim must be positive");
  STD_TORCH_CHECK(kernel_size > 0 && kernel_size < 32768, "kernel_size must lie in [1, 32767]");
  STD_TORCH_CHECK(groups > 0 && task.heads % groups == 0, "heads must be a multiple of the number of dilations");
  // Beyond twice the image every tap but the centre is outside, whatever the dilation (even, to keep the parity).
  const int64_t farthest = 2 * std::max(task.height, task.width);
  task.largest_dilation = 1;
  per_head.resize(task.heads);
  for (int64_t h = 0; h < task.heads; ++h) {
    const int64_t d = dilation[h / (task.heads / groups)];
    STD_TORCH_CHECK(d > 0 && (d % 2 == 0 || kernel_size % 2 == 1), "dilation * (kernel_size - 1) must be even");
    per_head[h] = std::min(d, farthest);
    task.largest_dilation = std::max(task.largest_dilation, per_head[h]);
  }
  task.dilation = per_head.data();
  task.query = view_of(query), task.key = view_of(key), task.value = view_of(value);
  return task;
}

// The planes' bytes of the largest group when the heads go in groups of `size`.
int64_t largest_group(const Task& task, int64_t size, Scratch scratch, bool backward) {
  int64_t bytes = 0;
  for (int64_t first = 0; first < task.heads; first += size) {
    bytes = std::max(bytes, scratch(task, first, std::min(task.heads, first + size), backward));
  }
  return bytes;
}

void run(const Task& task, Run kernel, Scratch scratch, bool backward) {
  // Neighbouring heads share cache lines, so a unit takes as many as fit.
  int64_t group = task.heads;
  while (group > 1 && largest_group(task, group, scratch, backward) > CACHE) group = (group + 1) / 2;
  const int64_t groups = (task.heads + group - 1) / group, bytes = largest_group(task, group, scratch, backward);
  // Blocks of rows only where images and groups do not keep the threads busy: neighbouring blocks share rows.
  const int64_t wanted = 2 * torch::stable::get_num_threads(), images = task.batch * groups;
  const int64_t reach = task.largest_dilation * (task.kernel_size - 1) / 2;
  const int64_t fewest = std::min(task.height, std::max<int64_t>(4, 2 * reach));
  const int64_t rows = std::max(fewest, (task.height * images + wanted - 1) / std::max(wanted, images));
  const int64_t blocks = (task.height + rows - 1) / rows;
  torch::stable::parallel_for(0, images * blocks, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char, Free> memory(static_cast<char*>(std::aligned_alloc(64, bytes)));
    if (!memory) throw std::bad_alloc();
    for (int64_t i = begin; i < end; ++i) {
#ifdef TERSOR_POISON
      std::memset(memory.get(), 0xff, bytes);  // NaN in every type
#endif
      const int64_t block = i % blocks, first = i / blocks % groups * group;
      const Unit unit{i / blocks / groups, first, std::min(task.heads, first + group), block * rows,
                      std::min(task.height, (block + 1) * rows)};
      kernel(task, unit, memory.get());
    }
  });
}

template <class T, class A>
void run_forward(const Task& task) {
  run(task, TERSOR_FOR_ISA(forward_unit<T, A>), TERSOR_FOR_ISA(scratch<A>), false);
}

template <class T, class A>
void run_backward(const Task& task) {
  run(task, TERSOR_FOR_ISA(backward_unit<T, A>), TERSOR_FOR_ISA(scratch<A>), true);
}

ScalarType checked_dtype(const Tensor& query) {
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Double,
                  "query must be float16, bfloat16, float32 or float64");
  return dtype;
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value, int64_t kernel_size,
                                   const std::vector<int64_t>& dilation, double scale) {
  const ScalarType dtype = checked_dtype(query);
  const Tensor q = last_dim_contiguous(query), k = last_dim_contiguous(key), v = last_dim_contiguous(value);
  std::vector<int64_t> per_head;
  Task task = make_task(q, k, v, kernel_size, dilation, scale, per_head);
  const ScalarType exact = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor output = torch::stable::new_empty(
      query, {task.batch, task.height, task.width, task.heads, task.head_dim}, dtype);
  Tensor logsumexp = torch::stable::new_empty(query, {task.batch, task.heads, task.height, task.width}, exact);
  if (task.batch == 0) return {output, logsumexp};
  task.output = output.mutable_data_ptr(), task.logsumexp = logsumexp.mutable_data_ptr();
  if (dtype == ScalarType::Float) run_forward<float, float>(task);
  if (dtype == ScalarType::Half) run_forward<Half, float>(task);
  if (dtype == ScalarType::BFloat16) run_forward<BFloat16, float>(task);
  if (dtype == ScalarType::Double) run_forward<double, double>(task);
  return {output, logsumexp};
}

// `output` is not read: <grad_output, output> follows from the weights at hand, for a fifth less traffic.
Tensor backward(const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor&,
                const Tensor& logsumexp, int64_t kernel_size, const std::vector<int64_t>& dilation, double scale) {
  const ScalarType dtype = checked_dtype(query);
  const Tensor q = last_dim_contiguous(query), k = last_dim_contiguous(key), v = last_dim_contiguous(value);
  const Tensor g = last_dim_contiguous(grad_output), lse = torch::stable::contiguous(logsumexp);
  std::vector<int64_t> per_head;
  Task task = make_task(q, k, v, kernel_size, dilation, scale, per_head);
  check(q, g, "grad_output");
  const ScalarType exact = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(lse.scalar_type() == exact && lse.is_cpu() && lse.dim() == 4 && lse.size(0) == task.batch &&
                      lse.size(1) == task.heads && lse.size(2) == task.height && lse.size(3) == task.width,
                  "logsumexp must be (B, heads, H, W) as the forward operator returns it");
  Tensor grad_qkv = torch::stable::new_empty(
      query, {task.batch, task.height, task.width, 3, task.heads, task.head_dim}, dtype);
  if (task.batch == 0) return grad_qkv;
  task.grad_output = view_of(g), task.grad_qkv = grad_qkv.mutable_data_ptr();
  task.logsumexp = const_cast<void*>(lse.const_data_ptr());
  if (dtype == ScalarType::Float) run_backward<float, float>(task);
  if (dtype == ScalarType::Half) run_backward<Half, float>(task);
  if (dtype == ScalarType::BFloat16) run_backward<BFloat16, float>(task);
  if (dtype == ScalarType::Double) run_backward<double, double>(task);
  return grad_qkv;
}

}  // namespace
}  // namespace tersor::dilated_attention

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("dilated_attention_forward", TORCH_BOX(&tersor::dilated_attention::forward));
  module.impl("dilated_attention_backward", TORCH_BOX(&tersor::dilated_attention::backward));
}
#endif

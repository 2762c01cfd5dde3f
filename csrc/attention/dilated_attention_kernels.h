// The kernels of dilated_attention.cpp, compiled once per instruction set (foreach_isa.h includes this file).
//
// Rows of tokens are transposed on the fly into planes [channel][x] with zeros left and right, so that a vector holds
// neighbouring positions: scores need no reduction across lanes, a tap is a shifted load, and taps outside the image
// read the zeros that the formula asks for. A ring of planes holds the rows inside the window. Each result is computed
// by one unit, in an order that depends on nothing but the shape: the same bits for any number of threads.

namespace tersor::dilated_attention {
namespace TERSOR_ISA {
using namespace tersor::TERSOR_ISA;

// Rings of planes of one head. `rows` says which image rows the key planes hold by now.
template <class A>
struct Head {
  static constexpr int64_t lanes = Simd<A>::lanes;
  int64_t head, dilation, reach, image, pad, stride, plane, slots, loaded;
  A *keys, *values, *queries, *grads, *weights, *grad_scores;

  Head(const Task& task, int64_t index, Arena& arena, bool backward) {
    const auto whole = [](int64_t n) { return (n + lanes - 1) / lanes * lanes; };
    head = index, dilation = task.dilation[index], reach = dilation * (task.kernel_size - 1) / 2;
    image = task.width, pad = whole(reach), stride = pad + whole(image) + pad;
    plane = task.head_dim * stride;
    slots = std::min(2 * reach + task.step_rows, task.height);
    keys = arena.take<A>(slots * plane), values = arena.take<A>(slots * plane);
    if (!backward) return;
    queries = arena.take<A>(slots * plane), grads = arena.take<A>(slots * plane);
    weights = arena.take<A>(slots * task.taps() * stride), grad_scores = arena.take<A>(slots * task.taps() * stride);
  }

  // Zeros left and right of the image, which no row overwrites.
  void clear_pads(A* planes, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      std::memset(planes + r * stride, 0, pad * sizeof(A));
      std::memset(planes + r * stride + pad + image, 0, (stride - pad - image) * sizeof(A));
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
  A *zeros, *query, *sum, *scores, *grad_scores, *totals;
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
    query = arena.take<A>(block), sum = arena.take<A>(block);
    scores = arena.take<A>(task.step_rows * lanes * task.taps()), totals = arena.take<A>(task.step_rows * lanes);
    grad_scores = arena.take<A>(lanes * task.taps());
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

// The same of one row of a view, where it has that row.
template <class T, class A>
TERSOR_INLINE void prefetch(const Task& task, const View& view, int64_t b, int64_t y, int64_t x, int64_t head) {
  if (y >= task.height) return;
  const int64_t tokens = std::min<int64_t>(Simd<A>::lanes, task.width);
  prefetch_tokens(row_of<T>(view, b, y, head) + x * view.column, view.column, tokens, task.head_dim);
}

// Visits a row in blocks of `lanes` positions. The last one starts early enough to be whole: what it does again gives
// the same bits. Only in an image narrower than a vector are there fewer tokens than lanes.
template <class A, class Visit>
TERSOR_INLINE void for_blocks(int64_t width, Visit&& visit) {
  constexpr int64_t lanes = Simd<A>::lanes;
  for (int64_t x = 0; x < width; x += lanes) visit(std::max<int64_t>(0, std::min(x, width - lanes)));
}

// One row of one head, transposed into a plane.
template <class T, class A>
void load_row(const Task& task, const Head<A>& head, const View& view, int64_t b, int64_t y, A* ring) {
  const T* row = row_of<T>(view, b, y, head.head);
  A* plane = head.row(ring, y) + head.pad;
  const int64_t width = task.width, head_dim = task.head_dim, column = view.column, stride = head.stride;
  const int tokens = static_cast<int>(std::min<int64_t>(head.lanes, width));
  for_blocks<A>(width, [&](int64_t x) __attribute__((always_inline)) {
    transpose_in(row + x * column, column, tokens, head_dim, plane + x, stride);
  });
}

// The key and value rows that the query rows up to `last` look at, as far as they are not in the ring yet.
template <class T, class A>
void load_keys(const Task& task, Head<A>& head, int64_t b, int64_t last) {
  for (; head.loaded <= std::min(task.height - 1, last + head.reach); ++head.loaded) {
    load_row<T>(task, head, task.key, b, head.loaded, head.keys);
    load_row<T>(task, head, task.value, b, head.loaded, head.values);
  }
}

// scores[t] = sum over channels c of query[c * query_stride] * taps[t][c * stride], at `lanes` positions from x on.
template <class A, int N>
TERSOR_INLINE void dot(const A* query, int64_t query_stride, const A* const* taps, int64_t stride, int64_t x,
                       int64_t channels, A* scores) {
  constexpr int lanes = Simd<A>::lanes;
  const A* tap[N];
  Vec<A> sum[N];
  for (int t = 0; t < N; ++t) tap[t] = taps[t] + x, sum[t] = Vec<A>{};
  for (int64_t c = 0; c < channels; ++c) {
    const Vec<A> q = load(query + c * query_stride);
#pragma GCC unroll 16
    for (int t = 0; t < N; ++t) sum[t] = fma<A>(q, load(tap[t] + c * stride), sum[t]);
  }
  for (int t = 0; t < N; ++t) store<A>(scores + t * lanes, sum[t]);
}

// The same for the nine taps of a 3x3 window: with three pointers and one distance, all addresses stay in registers.
template <class A>
TERSOR_INLINE void dot_3x3(const A* query, int64_t query_stride, const A* const* taps, int64_t stride, int64_t x,
                           int64_t channels, A* scores) {
  constexpr int lanes = Simd<A>::lanes;
  const A *top = taps[0] + x, *middle = taps[3] + x, *bottom = taps[6] + x;
  const int64_t d = taps[1] - taps[0];
  Vec<A> sum[9] = {};
  for (const A* end = query + channels * query_stride; query != end; query += query_stride) {
    const Vec<A> q = load(query);
    sum[0] = fma<A>(q, load(top), sum[0]);
    sum[1] = fma<A>(q, load(top + d), sum[1]);
    sum[2] = fma<A>(q, load(top + 2 * d), sum[2]);
    sum[3] = fma<A>(q, load(middle), sum[3]);
    sum[4] = fma<A>(q, load(middle + d), sum[4]);
    sum[5] = fma<A>(q, load(middle + 2 * d), sum[5]);
    sum[6] = fma<A>(q, load(bottom), sum[6]);
    sum[7] = fma<A>(q, load(bottom + d), sum[7]);
    sum[8] = fma<A>(q, load(bottom + 2 * d), sum[8]);
    top += stride, middle += stride, bottom += stride;
  }
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) store<A>(scores + t * lanes, sum[t]);
}

template <class A>
TERSOR_INLINE void dots(const A* query, int64_t query_stride, const A* const* taps, int64_t count, int64_t stride,
                        int64_t x, int64_t channels, A* scores) {
  constexpr int lanes = Simd<A>::lanes;
  if (count == 9) return dot_3x3<A>(query, query_stride, taps, stride, x, channels, scores);
  int64_t t = 0;
  for (; t + 8 <= count; t += 8) dot<A, 8>(query, query_stride, taps + t, stride, x, channels, scores + t * lanes);
  for (; t < count; ++t) dot<A, 1>(query, query_stride, taps + t, stride, x, channels, scores + t * lanes);
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
TERSOR_INLINE void mix_3x3(const A* weights, const A* const* taps, int64_t stride, int64_t x, int64_t channels,
                           A* sum) {
  constexpr int lanes = Simd<A>::lanes;
  const A *top = taps[0] + x, *middle = taps[3] + x, *bottom = taps[6] + x;
  const int64_t d = taps[1] - taps[0];
  Vec<A> w[9];
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) w[t] = load(weights + t * lanes);
  for (A* end = sum + channels * lanes; sum != end; sum += lanes) {
    // Three short chains of dependent sums, not a long one.
    Vec<A> s = w[0] * load(top), r = w[3] * load(middle), u = w[6] * load(bottom);
    s = fma<A>(w[1], load(top + d), s);
    r = fma<A>(w[4], load(middle + d), r);
    u = fma<A>(w[7], load(bottom + d), u);
    s = fma<A>(w[2], load(top + 2 * d), s);
    r = fma<A>(w[5], load(middle + 2 * d), r);
    u = fma<A>(w[8], load(bottom + 2 * d), u);
    store<A>(sum, s + (r + u));
    top += stride, middle += stride, bottom += stride;
  }
}

template <class A>
TERSOR_INLINE void mixes(const A* weights, const A* const* taps, int64_t count, int64_t stride, int64_t x,
                         int64_t channels, A* sum) {
  constexpr int lanes = Simd<A>::lanes;
  if (count == 9) return mix_3x3<A>(weights, taps, stride, x, channels, sum);
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

// Scores to softmax weights (not yet divided by their sum), in place. COUNT = 0: any number of them; a known one is
// unrolled, so that the exponentials of all taps run side by side.
template <class A, int COUNT>
TERSOR_INLINE void softmax(A* scores, int64_t any_count, A factor, Vec<A>& largest, Vec<A>& total) {
  constexpr int lanes = Simd<A>::lanes;
  const int64_t count = COUNT > 0 ? COUNT : any_count;
  const Vec<A> scale = splat(factor);
  largest = load(scores) * scale;
#pragma GCC unroll 9
  for (int64_t t = 1; t < count; ++t) largest = max<A>(load(scores + t * lanes) * scale, largest);
  total = Vec<A>{};
#pragma GCC unroll 9
  for (int64_t t = 0; t < count; ++t) {
    const Vec<A> weight = exp(load(scores + t * lanes) * scale - largest);
    store<A>(scores + t * lanes, weight);
    total += weight;
  }
}

// Scores and <grad_output, value> of every tap to weights and gradients of the scores, in place.
template <class A, int COUNT>
TERSOR_INLINE void softmax_backward(A* scores, A* grads, int64_t any_count, A factor, Vec<A> logsumexp) {
  constexpr int lanes = Simd<A>::lanes;
  const int64_t count = COUNT > 0 ? COUNT : any_count;
  const Vec<A> scale = splat(factor);
  Vec<A> mean{};  // <grad_output, output>, which is the weights' mean of <grad_output, value>
#pragma GCC unroll 9
  for (int64_t t = 0; t < count; ++t) {
    const Vec<A> weight = exp(load(scores + t * lanes) * scale - logsumexp);
    store<A>(scores + t * lanes, weight);
    mean = fma<A>(weight, load(grads + t * lanes), mean);
  }
#pragma GCC unroll 9
  for (int64_t t = 0; t < count; ++t) {
    store<A>(grads + t * lanes, scale * load(scores + t * lanes) * (load(grads + t * lanes) - mean));
  }
}

// Softmax weights (not yet divided by their sum) of one query row at `lanes` positions from x on.
template <class T, class A>
TERSOR_INLINE void score_block(const Task& task, const Head<A>& head, Workspace<A>& work, int64_t b, int64_t y,
                               int64_t x, const A* const* taps, A* scores, A* sum) {
  constexpr int lanes = Simd<A>::lanes;
  const int tokens = static_cast<int>(std::min<int64_t>(lanes, task.width));
  const T* query = row_of<T>(task.query, b, y, head.head) + x * task.query.column;
  transpose_in(query, task.query.column, tokens, task.head_dim, work.query, lanes);
  const int64_t count = task.taps(), token = (b * task.height + y) * task.width + x;
  prefetch_tokens(static_cast<T*>(task.output) + (token * task.heads + head.head) * task.head_dim,
                  task.heads * task.head_dim, tokens, task.head_dim);
  dots<A>(work.query, lanes, taps, count, head.stride, x, task.head_dim, scores);
  Vec<A> largest, total;
  const A scale = static_cast<A>(task.scale);
  if (count == 9) softmax<A, 9>(scores, count, scale, largest, total);
  else softmax<A, 0>(scores, count, scale, largest, total);
  store<A>(sum, total);
  A* logsumexp = static_cast<A*>(task.logsumexp) + ((b * task.heads + head.head) * task.height + y) * task.width + x;
  store_first<A>(logsumexp, largest + log(total), tokens);
}

// The outputs that follow from them.
template <class T, class A>
TERSOR_INLINE void output_block(const Task& task, const Head<A>& head, Workspace<A>& work, int64_t b, int64_t y,
                                int64_t x, const A* const* taps, const A* scores, const A* sum) {
  const int tokens = static_cast<int>(std::min<int64_t>(Simd<A>::lanes, task.width));
  const int64_t token = (b * task.height + y) * task.width + x;
  T* output = static_cast<T*>(task.output) + (token * task.heads + head.head) * task.head_dim;
  mixes<A>(scores, taps, task.taps(), head.stride, x, task.head_dim, work.sum);
  transpose_out<T, A>(output, task.heads * task.head_dim, tokens, task.head_dim, work.sum, splat(A(1)) / load(sum));
}

// Everything of one head for the query rows [first, last). Keys and values take turns in the nearest cache.
template <class T, class A>
void forward_rows(const Task& task, const Unit& unit, Head<A>& head, Workspace<A>& work, int64_t first, int64_t last) {
  constexpr int lanes = Simd<A>::lanes;
  const int64_t count = task.taps();
  load_keys<T, A>(task, head, unit.image, last - 1);
  for (int64_t r = first; r < last; ++r) {
    point_taps<A>(task, head, r, head.keys, work.zeros, work.taps + (r - first) * count);
    point_taps<A>(task, head, r, head.values, work.zeros, work.other_taps + (r - first) * count);
  }
  for_blocks<A>(task.width, [&](int64_t x) __attribute__((always_inline)) {
    for (int64_t r = first, i = 0; r < last; ++r, ++i) {
      const int64_t next = r + task.step_rows;
      prefetch<T, A>(task, task.query, unit.image, next, x, head.head);
      prefetch<T, A>(task, task.key, unit.image, next + head.reach, x, head.head);
      prefetch<T, A>(task, task.value, unit.image, next + head.reach, x, head.head);
      score_block<T, A>(task, head, work, unit.image, r, x, work.taps + i * count, work.scores + i * count * lanes,
                        work.totals + i * lanes);
    }
    for (int64_t r = first, i = 0; r < last; ++r, ++i) {
      output_block<T, A>(task, head, work, unit.image, r, x, work.other_taps + i * count,
                         work.scores + i * count * lanes, work.totals + i * lanes);
    }
  });
}

template <class T, class A>
void forward_unit(const Task& task, const Unit& unit, char* memory) {
  Arena arena{memory};
  Workspace<A> work(task, unit.first_head, unit.last_head, arena, false);
  for (int64_t h = 0; h < work.count; ++h) {
    work.heads[h].loaded = std::max<int64_t>(0, unit.first_row - work.heads[h].reach);
  }
  for (int64_t y = unit.first_row; y < unit.last_row; y += task.step_rows) {
    const int64_t last = std::min(unit.last_row, y + task.step_rows);
    for (int64_t h = 0; h < work.count; ++h) forward_rows<T, A>(task, unit, work.heads[h], work, y, last);
  }
}

// Softmax weights and score gradients of one query row at `lanes` positions from x on, into the rings; the query's own
// gradient where this unit owns the row.
template <class T, class A>
TERSOR_INLINE void backward_query_block(const Task& task, const Head<A>& head, Workspace<A>& work, int64_t b, int64_t y,
                                        int64_t x, const A* const* taps, const A* const* value_taps, bool owned) {
  constexpr int lanes = Simd<A>::lanes;
  const int64_t count = task.taps();
  const int tokens = static_cast<int>(std::min<int64_t>(lanes, task.width));
  const A* query = head.row(head.queries, y) + head.pad + x;
  const A* grad = head.row(head.grads, y) + head.pad + x;
  const int64_t token = (b * task.height + y) * task.width + x, stride = 3 * task.heads * task.head_dim;
  T* gradient = static_cast<T*>(task.grad_qkv) + token * stride + head.head * task.head_dim;
  if (owned) {  // the whole token's gradients: those of key and value follow when their row is complete
    for (int i = 0; i < 3; ++i) prefetch_tokens(gradient + i * stride / 3, stride, tokens, task.head_dim);
  }
  dots<A>(query, head.stride, taps, count, head.stride, x, task.head_dim, work.scores);
  dots<A>(grad, head.stride, value_taps, count, head.stride, x, task.head_dim, work.grad_scores);
  const A* logsumexp =
      static_cast<A*>(task.logsumexp) + ((b * task.heads + head.head) * task.height + y) * task.width + x;
  const Vec<A> lse = load_first(logsumexp, tokens);
  const A scale = static_cast<A>(task.scale);
  if (count == 9) softmax_backward<A, 9>(work.scores, work.grad_scores, count, scale, lse);
  else softmax_backward<A, 0>(work.scores, work.grad_scores, count, scale, lse);
  A* weights = head.weights + y % head.slots * count * head.stride + head.pad + x;
  A* grad_scores = head.grad_scores + y % head.slots * count * head.stride + head.pad + x;
  for (int64_t t = 0; t < count; ++t) {  // an image narrower than a vector has lanes that stand for no query
    const Vec<A> weight = load(work.scores + t * lanes), grad_score = load(work.grad_scores + t * lanes);
    store<A>(weights + t * head.stride, tokens < lanes ? keep_first<A>(weight, tokens) : weight);
    store<A>(grad_scores + t * head.stride, tokens < lanes ? keep_first<A>(grad_score, tokens) : grad_score);
  }
  if (!owned) return;
  mixes<A>(work.grad_scores, taps, count, head.stride, x, task.head_dim, work.sum);
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
  const int tokens = static_cast<int>(std::min<int64_t>(lanes, task.width));
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
  for_blocks<A>(task.width, [&](int64_t x) __attribute__((always_inline)) {
    for (int64_t r = first; r < last; ++r) {
      const int64_t at = (r - first) * task.taps();
      const bool owned = r >= unit.first_row && r < unit.last_row;
      const int64_t next = r + task.step_rows;
      prefetch<T, A>(task, task.query, unit.image, next, x, head.head);
      prefetch<T, A>(task, task.grad_output, unit.image, next, x, head.head);
      prefetch<T, A>(task, task.key, unit.image, next + head.reach, x, head.head);
      prefetch<T, A>(task, task.value, unit.image, next + head.reach, x, head.head);
      backward_query_block<T, A>(task, head, work, unit.image, r, x, work.taps + at, work.other_taps + at, owned);
    }
  });
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
    for_blocks<A>(task.width, [&](int64_t x) __attribute__((always_inline)) {
      for (int64_t m = first; m < last; ++m) {
        const int64_t at = (m - first) * task.taps();
        backward_key_block<T, A>(task, head, work, unit.image, m, x, work.taps + at, work.other_taps + at, which);
      }
    });
  }
}

template <class T, class A>
void backward_unit(const Task& task, const Unit& unit, char* memory) {
  Arena arena{memory};
  Workspace<A> work(task, unit.first_head, unit.last_head, arena, true);
  const int64_t reach = task.largest_dilation * (task.kernel_size - 1) / 2;
  for (int64_t h = 0; h < work.count; ++h) {
    const int64_t first = std::max<int64_t>(0, unit.first_row - work.heads[h].reach);
    work.heads[h].loaded = std::max<int64_t>(0, first - work.heads[h].reach);
  }
  for (int64_t y = std::max<int64_t>(0, unit.first_row - reach); y < unit.last_row + reach; y += task.step_rows) {
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

// The lone query of window_attention_kernels.h, which includes this file for one instruction set: what the vectors of
// queries do for the others, with its keys in vectors. Its weights end up in the column after theirs, so that the other
// products take it along.

namespace tersor::window_attention {
namespace TERSOR_ISA {

// to[key] += <a token's row, the key's row>; zero beyond the last key.
template <class A>
TERSOR_INLINE void add_lone_product(const Workspace<A>& work, const A* token, const A* keys, A* to) {
  const int64_t tokens = work.tokens, depth = work.depth;
  for (int64_t key = 0; key < tokens; ++key, keys += depth) {
    Vec<A> sum = load(token) * load(keys);
    for (int64_t c = work.lanes; c < depth; c += work.lanes) sum = fma<A>(load(token + c), load(keys + c), sum);
    to[key] += total(sum);
  }
  std::fill(to + tokens, to + work.pitch, A(0));
}

// For each key f(key, place of what it adds to the lone query in the head's spread table).
template <class A, class Visit>
TERSOR_INLINE void for_lone_bias(const Task& task, const Workspace<A>& work, Visit visit) {
  const int64_t w = task.window_w, column = task.bias_column();
  int64_t key = 0, place = (task.window_h - 1) * w + work.tokens - 1;
  for (int64_t y = 0; y < task.window_h; ++y, place -= w) {
    for (int64_t x = 0; x < w; ++x) visit(key++, place + x * column);
  }
}

// logits[key], into work.lone_weights.
template <class A>
TERSOR_INLINE void find_lone_logits(const Task& task, const Window& window, const Workspace<A>& work, int64_t head) {
  const int64_t query = work.tokens - 1;
  A* logits = work.lone_weights;
  if (task.bias) {
    const A* bias = static_cast<const A*>(task.bias) + head * task.bias_size();
    for_lone_bias(task, work, [=](int64_t key, int64_t place) { logits[key] = bias[place]; });
  } else {
    std::fill(logits, logits + work.tokens, A(0));
  }
  add_lone_product(work, work.query + query * work.depth, work.key, logits);
  if (!window.masked) return;
  const bool pairs = task.mask && task.mask_of_pairs;
  for (int64_t key = 0; key <= query; ++key) {
    A count = work.region[key] != work.region[query] ? A(1) : A(0);
    count += work.outside[key] * work.outside[query];
    if (pairs) count += work.pair_mask[key * work.pitch + query];
    logits[key] += static_cast<A>(task.mask_value) * count;
  }
}

template <class A>
TERSOR_INLINE void lone_softmax(const Workspace<A>& work, A* column) {
  const int64_t tokens = work.tokens, row = work.row;
  A* weights = work.lone_weights;
  std::fill(weights + tokens, weights + work.pitch, weights[0]);
  Vec<A> maxima = load(weights), sum{};
  for (int64_t key = work.lanes; key < tokens; key += work.lanes) maxima = max<A>(load(weights + key), maxima);
  A largest = maxima[0];
  for (int i = 1; i < work.lanes; ++i) largest = maxima[i] > largest ? maxima[i] : largest;
  for (int64_t key = 0; key < tokens; key += work.lanes) {
    const int present = static_cast<int>(std::min(work.lanes, tokens - key));
    const Vec<A> weight = keep_first<A>(exp(load(weights + key) - largest), present);
    store<A>(weights + key, weight);
    sum += weight;
  }
  const A all = total(sum);
  work.logsumexp[tokens - 1] = largest + log(splat(all))[0];
  work.factors[tokens - 1] = A(1) / all;
  for (int64_t key = 0; key < tokens; ++key) column[key * row] = weights[key];
}

// As softmax_backward, from the logits and <grad_output, value>.
template <class A>
TERSOR_INLINE void lone_softmax_backward(const Workspace<A>& work, A* weights_column, A* grads_column) {
  const int64_t tokens = work.tokens, row = work.row;
  const A logsumexp = work.logsumexp[tokens - 1];
  A *weights = work.lone_weights, *grads = work.lone_grads;
  Vec<A> sum{};
  for (int64_t key = 0; key < tokens; key += work.lanes) {
    const int present = static_cast<int>(std::min(work.lanes, tokens - key));
    const Vec<A> weight = keep_first<A>(exp(load(weights + key) - logsumexp), present);
    store<A>(weights + key, weight);
    sum = fma<A>(weight, load(grads + key), sum);
  }
  const A mean = total(sum);
  for (int64_t key = 0; key < tokens; key += work.lanes) {
    store<A>(grads + key, load(weights + key) * (load(grads + key) - mean));
  }
  for (int64_t key = 0; key < tokens; ++key) {
    weights_column[key * row] = weights[key], grads_column[key * row] = grads[key];
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::window_attention

// The kernels of prune_tokens.cpp, compiled once per instruction set (foreach_isa.h includes this file).
#include "tokens/rank_kernels.h"

namespace tersor::tokens {
namespace TERSOR_ISA {

// Mean and reciprocal deviation of a row, in two passes over it.
template <class A>
struct Moments {
  A mean, rstd;

  Moments(const A* row, int64_t channels, A eps) {
    constexpr int64_t lanes = Simd<A>::lanes;
    Vec<A> sum{}, square{};
    for (int64_t c = 0; c < channels; c += lanes) {
      sum += load_first(row + c, static_cast<int>(std::min(lanes, channels - c)));
    }
    mean = total(sum) / static_cast<A>(channels);
    for (int64_t c = 0; c < channels; c += lanes) {
      const int count = static_cast<int>(std::min(lanes, channels - c));
      const Vec<A> centred = keep_first<A>(load_first(row + c, count) - mean, count);
      square = fma<A>(centred, centred, square);
    }
    rstd = A(1) / static_cast<A>(__builtin_sqrt(total(square) / static_cast<A>(channels) + eps));
  }
};

// Units are the kept tokens of all images; `row` holds one of them.
template <class T, class A>
static void prune_units(const Prune& task, int64_t begin, int64_t end, A* row) {
  constexpr int64_t lanes = Simd<A>::lanes;
  const int64_t channels = task.channels, rows = task.kept_rows();
  const T *weight = static_cast<const T*>(task.weight), *bias = static_cast<const T*>(task.bias);
  const Vec<A> scale = splat(static_cast<A>(task.scale));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / rows, j = unit % rows;
    const int64_t token = j == 0 ? 0 : 1 + task.order[b * (task.length - 1) + j - 1];
    task.index[unit] = token;
    const T *x = task.input.at<T>(b, token), *y = task.branch.at<T>(b, token);
    T *kept = task.tokens.at<T>(b, j), *normalized = task.normalized.at<T>(b, j);
    for (int64_t c = 0; c < channels; c += lanes) {
      const int count = static_cast<int>(std::min(lanes, channels - c));
      const Vec<A> sum = load_as<A>(x + c, count) + scale * load_as<A>(y + c, count);
      store_first<A>(row + c, sum, count);
      store_as<A>(kept + c, sum, count);
    }
    const Moments<A> moments(row, channels, static_cast<A>(task.eps));
    for (int64_t c = 0; c < channels; c += lanes) {
      const int count = static_cast<int>(std::min(lanes, channels - c));
      const Vec<A> standard = (load_first(row + c, count) - moments.mean) * moments.rstd;
      store_as<A>(normalized + c, standard * load_as<A>(weight + c, count) + load_as<A>(bias + c, count), count);
    }
  }
}

// The gradient of one kept row: `row` holds the token and becomes its standardised self.
template <class T, class A>
TERSOR_INLINE void differentiate_row(const Prune& task, int64_t b, int64_t token, int64_t j, A* row, A* sums) {
  constexpr int64_t lanes = Simd<A>::lanes;
  const int64_t channels = task.channels;
  const T *kept = task.tokens_in.at<T>(b, j), *weight = static_cast<const T*>(task.weight);
  const T *direct = task.grad_tokens.at<T>(b, j), *grad = task.grad_normalized.at<T>(b, j);
  for (int64_t c = 0; c < channels; c += lanes) {
    const int count = static_cast<int>(std::min(lanes, channels - c));
    store_first<A>(row + c, load_as<A>(kept + c, count), count);
  }
  const Moments<A> moments(row, channels, static_cast<A>(task.eps));
  Vec<A> plain{}, along{};
  for (int64_t c = 0; c < channels; c += lanes) {
    const int count = static_cast<int>(std::min(lanes, channels - c));
    const Vec<A> standard = keep_first<A>((load_first(row + c, count) - moments.mean) * moments.rstd, count);
    const Vec<A> g = load_as<A>(grad + c, count), scaled = g * load_as<A>(weight + c, count);
    store_first<A>(row + c, standard, count);
    plain += scaled, along = fma<A>(scaled, standard, along);
    if (!sums) continue;
    store_first<A>(sums + c, load_first(sums + c, count) + g * standard, count);
    store_first<A>(sums + channels + c, load_first(sums + channels + c, count) + g, count);
  }
  const A mean = total(plain) / static_cast<A>(channels), slope = total(along) / static_cast<A>(channels);
  T* to_input = task.grad_input.at<T>(b, token);
  T* to_branch = task.grad_branch.data ? task.grad_branch.at<T>(b, token) : nullptr;
  const A scale = static_cast<A>(task.scale);
  for (int64_t c = 0; c < channels; c += lanes) {
    const int count = static_cast<int>(std::min(lanes, channels - c));
    const Vec<A> scaled = load_as<A>(grad + c, count) * load_as<A>(weight + c, count);
    const Vec<A> inner = (scaled - mean - load_first(row + c, count) * slope) * moments.rstd;
    const Vec<A> all = load_as<A>(direct + c, count) + inner;
    store_as<A>(to_input + c, all, count);
    if (to_branch) store_as<A>(to_branch + c, all * scale, count);
  }
}

// Units are blocks of the tokens of all images, in their own order; dropped tokens get zeros.
template <class T, class A>
static void prune_gradients(const Prune& task, int64_t begin, int64_t end, A* row) {
  const int64_t channels = task.channels, bytes = channels * static_cast<int64_t>(sizeof(T));
  for (int64_t block = begin; block < end; ++block) {
    A* sums = task.sums ? static_cast<A*>(task.sums) + block * 2 * channels : nullptr;
    if (sums) std::fill(sums, sums + 2 * channels, A(0));
    const int64_t last = std::min((block + 1) * Prune::BLOCK, task.batch * task.length);
    for (int64_t unit = block * Prune::BLOCK; unit < last; ++unit) {
      const int64_t b = unit / task.length, token = unit % task.length, j = task.kept[unit];
      if (j >= 0) {
        differentiate_row<T, A>(task, b, token, j, row, sums);
        continue;
      }
      std::memset(task.grad_input.at<T>(b, token), 0, bytes);
      if (task.grad_branch.data) std::memset(task.grad_branch.at<T>(b, token), 0, bytes);
    }
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::tokens

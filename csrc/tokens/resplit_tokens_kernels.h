// The kernels of resplit_tokens.cpp, compiled once per instruction set (foreach_isa.h includes this file).
#include "tokens/rank_kernels.h"

namespace tersor::tokens {
namespace TERSOR_ISA {

// out = one + other + another, in this order and rounded once; null stands for none.
template <class T, class A>
TERSOR_INLINE void add_rows(T* out, const T* one, const T* other, const T* another, int64_t channels) {
  constexpr int64_t lanes = Simd<A>::lanes;
  for (int64_t c = 0; c < channels; c += lanes) {
    const int count = static_cast<int>(std::min(lanes, channels - c));
    Vec<A> sum = load_as<A>(one + c, count);
    if (other) sum += load_as<A>(other + c, count);
    if (another) sum += load_as<A>(another + c, count);
    store_as<A>(out + c, sum, count);
  }
}

template <class T>
TERSOR_INLINE void fill_with_nan(T* out, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) out[c] = T(__builtin_nanf(""));
}

// Units are the ranks of all images, and behind an image's ranks its class token.
template <class T, class A>
static void resplit_units(const Resplit& task, int64_t begin, int64_t end) {
  const int64_t count = task.count(), channels = task.channels, bytes = channels * static_cast<int64_t>(sizeof(T));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / (count + 1), j = unit % (count + 1);
    if (j == count) {
      const T* position = task.position.data ? task.position.at<T>(b, 0) : nullptr;
      add_rows<T, A>(task.tokens.at<T>(b, 0), task.cls.at<T>(b, 0), position, nullptr, channels);
      continue;
    }
    const int64_t token = task.order[b * count + j];
    const bool inside = token >= 0 && token < count;
    if (j >= task.chosen) {
      T* to = task.tokens.at<T>(b, task.place_left(j));
      if (inside) std::memcpy(to, task.coarse.at<T>(b, 1 + token), bytes);
      else fill_with_nan(to, channels);
      continue;
    }
    for (int corner = 0; corner < 4; ++corner) {
      T* to = task.tokens.at<T>(b, task.place(j, corner));
      if (!inside) {
        fill_with_nan(to, channels);
        continue;
      }
      const int64_t child = task.child(token, corner);
      const T* fine = task.fine.at<T>(b, task.selected ? corner * task.chosen + j : child);
      const T* reuse = task.reuse.data ? task.reuse.at<T>(b, task.selected ? j : token) : nullptr;
      const T* position = task.position.data ? task.position.at<T>(b, 1 + child) : nullptr;
      add_rows<T, A>(to, fine, reuse, position, channels);
    }
  }
}

// The sum of a token's four rows.
template <class T, class A>
TERSOR_INLINE void add_corners(const Resplit& task, int64_t b, int64_t rank, T* out) {
  constexpr int64_t lanes = Simd<A>::lanes;
  const T* rows[4];
  for (int corner = 0; corner < 4; ++corner) rows[corner] = task.grad_tokens.at<T>(b, task.place(rank, corner));
  for (int64_t c = 0; c < task.channels; c += lanes) {
    const int count = static_cast<int>(std::min(lanes, task.channels - c));
    Vec<A> sum = load_as<A>(rows[0] + c, count);
    for (int i = 1; i < 4; ++i) sum += load_as<A>(rows[i] + c, count);
    store_as<A>(out + c, sum, count);
  }
}

template <class T, class A>
TERSOR_INLINE void add_to(A* sum, const T* row, int64_t channels) {
  constexpr int64_t lanes = Simd<A>::lanes;
  for (int64_t c = 0; c < channels; c += lanes) {
    const int count = static_cast<int>(std::min(lanes, channels - c));
    store_first<A>(sum + c, load_first(sum + c, count) + load_as<A>(row + c, count), count);
  }
}

template <class T, class A>
TERSOR_INLINE void round_row(T* out, const A* sum, int64_t channels) {
  constexpr int64_t lanes = Simd<A>::lanes;
  for (int64_t c = 0; c < channels; c += lanes) {
    const int count = static_cast<int>(std::min(lanes, channels - c));
    store_as<A>(out + c, load_first(sum + c, count), count);
  }
}

// Selected only: units are the chosen ranks of all images, whose gradients lie in the sequence's order.
template <class T, class A>
static void selected_gradients(const Resplit& task, int64_t begin, int64_t end) {
  const int64_t bytes = task.channels * static_cast<int64_t>(sizeof(T));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / task.chosen, j = unit % task.chosen;
    for (int corner = 0; task.grad_fine.data && corner < 4; ++corner) {
      T* to = task.grad_fine.at<T>(b, corner * task.chosen + j);
      std::memcpy(to, task.grad_tokens.at<T>(b, task.place(j, corner)), bytes);
    }
    if (task.grad_reuse.data) add_corners<T, A>(task, b, j, task.grad_reuse.at<T>(b, j));
  }
}

// What one coarse token of one image gives to the gradients of its own rows, zeros included.
template <class T, class A>
TERSOR_INLINE void own_gradients(const Resplit& task, int64_t b, int64_t token, int64_t rank) {
  const int64_t bytes = task.channels * static_cast<int64_t>(sizeof(T));
  const bool split = rank >= 0 && rank < task.chosen;
  if (task.grad_coarse.data) {
    T* to = task.grad_coarse.at<T>(b, 1 + token);
    if (rank >= task.chosen) std::memcpy(to, task.grad_tokens.at<T>(b, task.place_left(rank)), bytes);
    else std::memset(to, 0, bytes);
  }
  if (task.selected) return;
  for (int corner = 0; task.grad_fine.data && corner < 4; ++corner) {
    T* to = task.grad_fine.at<T>(b, task.child(token, corner));
    if (split) std::memcpy(to, task.grad_tokens.at<T>(b, task.place(rank, corner)), bytes);
    else std::memset(to, 0, bytes);
  }
  if (!task.grad_reuse.data) return;
  T* to = task.grad_reuse.at<T>(b, token);
  if (split) add_corners<T, A>(task, b, rank, to);
  else std::memset(to, 0, bytes);
}

// Units are the coarse tokens, each in all images, and behind them the class token: so each row of the position's
// gradient is added up by one unit, in the order of the images. `sums` holds four rows.
template <class T, class A>
static void resplit_gradients(const Resplit& task, int64_t begin, int64_t end, A* sums) {
  const int64_t count = task.count(), channels = task.channels, bytes = channels * static_cast<int64_t>(sizeof(T));
  for (int64_t token = begin; token < end; ++token) {
    std::fill(sums, sums + 4 * channels, A(0));
    if (token == count) {
      for (int64_t b = 0; b < task.batch; ++b) {
        const T* row = task.grad_tokens.at<T>(b, 0);
        add_to(sums, row, channels);
        if (task.grad_cls.data && task.own_cls) std::memcpy(task.grad_cls.at<T>(b, 0), row, bytes);
        if (task.grad_coarse.data) std::memset(task.grad_coarse.at<T>(b, 0), 0, bytes);
      }
      if (task.grad_cls.data && !task.own_cls) round_row(task.grad_cls.at<T>(0, 0), sums, channels);
      if (task.grad_position.data) round_row(task.grad_position.at<T>(0, 0), sums, channels);
      continue;
    }
    for (int64_t b = 0; b < task.batch; ++b) {
      const int64_t rank = task.rank[b * count + token];
      own_gradients<T, A>(task, b, token, rank);
      if (!task.grad_position.data || rank < 0 || rank >= task.chosen) continue;
      for (int corner = 0; corner < 4; ++corner) {
        add_to(sums + corner * channels, task.grad_tokens.at<T>(b, task.place(rank, corner)), channels);
      }
    }
    for (int corner = 0; task.grad_position.data && corner < 4; ++corner) {
      round_row(task.grad_position.at<T>(0, 1 + task.child(token, corner)), sums + corner * channels, channels);
    }
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::tokens

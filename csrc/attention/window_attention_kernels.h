// The kernels of window_attention.cpp, compiled once per instruction set (foreach_isa.h includes this file).
//
// One window of one head at a time, all in the nearest caches. A vector holds neighbouring queries, so that the softmax
// runs over vectors and never across one; keys are the rows. All products are broadcasts of one operand's elements times
// vectors of the other: see product.h. The bias of a key is a run of the spread table (window_attention.h), which the
// product starts from. Each result is computed by one unit, in an order that depends on nothing but the shapes.

#include "product.h"

namespace tersor::window_attention {
namespace TERSOR_ISA {
using namespace tersor::TERSOR_ISA;

// One thread's memory. `pitch` elements lie between the rows of what has a lane per query, `depth` between tokens.
template <class A>
struct Workspace {
  static constexpr int64_t lanes = Simd<A>::lanes;
  static constexpr int64_t most = lanes * (TERSOR_ISA_LEVEL == 2 ? 4 : 8);  // queries of one pass over the keys
  int64_t tokens, head_dim, pitch, depth, chunk;
  A *query, *key, *value, *grad, *out;               // [tokens][depth]
  A *query_planes, *grad_planes, *out_planes;        // [head_dim][pitch]
  A *weights, *grad_weights;                         // [tokens][chunk]
  A *logsumexp, *region, *outside, *pair_mask, *zeros;  // [pitch], pair_mask: [tokens][pitch]
  A *grad_key, *grad_value;                          // [tokens][depth]
  A* scales;                                         // [chunk]

  Workspace(const Task& task, Arena& arena, bool backward) {
    const auto whole = [](int64_t n) { return (n + lanes - 1) / lanes * lanes; };
    tokens = task.tokens(), head_dim = task.head_dim;
    pitch = whole(tokens), depth = whole(head_dim), chunk = std::min(most, pitch);
    query = arena.take<A>(pitch * depth), key = arena.take<A>(pitch * depth), value = arena.take<A>(pitch * depth);
    out = arena.take<A>(pitch * depth);
    query_planes = arena.take<A>(head_dim * pitch), out_planes = arena.take<A>((head_dim + 3) * pitch);
    weights = arena.take<A>(tokens * chunk);
    logsumexp = arena.take<A>(pitch), region = arena.take<A>(pitch), outside = arena.take<A>(pitch);
    zeros = arena.take<A>(pitch);
    pair_mask = arena.take<A>(task.mask && task.mask_of_pairs ? tokens * pitch : 0);
    if (backward) {
      grad = arena.take<A>(pitch * depth), grad_planes = arena.take<A>(head_dim * pitch);
      grad_weights = arena.take<A>(tokens * chunk);
      grad_key = arena.take<A>(pitch * depth), grad_value = arena.take<A>(pitch * depth);
      scales = arena.take<A>(chunk);
    }
    if (!arena.base) return;
    std::memset(zeros, 0, pitch * sizeof(A));
    // What lies beyond the last token and the last channel is multiplied, too, and left out of the results.
    for (A* rows : {query, key, value}) std::memset(rows, 0, pitch * depth * sizeof(A));
    if (backward) std::memset(grad, 0, pitch * depth * sizeof(A));
  }
};

template <class A>
int64_t scratch(const Task& task, bool backward) {
  Arena arena{nullptr};
  Workspace<A>(task, arena, backward);
  return arena.used;
}

// Where one window lies in its image, and what is special to it.
struct Window {
  int64_t image, index, top, left;  // of the rolled map
  bool masked;                      // some pairs are
};

// Visits the window's tokens in runs that are contiguous in the map: visit(token of the window, y, x, count).
template <class Visit>
TERSOR_INLINE void for_runs(const Task& task, const Window& window, Visit&& visit) {
  int64_t y = window.top + task.shift_h, first = window.left + task.shift_w;
  y += y < 0 ? task.height : y >= task.height ? -task.height : 0;
  first += first < 0 ? task.width : first >= task.width ? -task.width : 0;
  const int64_t before = std::min(task.window_w, task.width - first);
  for (int64_t i = 0; i < task.window_h; ++i) {
    visit(i * task.window_w, y, first, before);
    if (before < task.window_w) visit(i * task.window_w + before, y, int64_t{0}, task.window_w - before);
    if (++y == task.height) y = 0;
  }
}

// Asks for the places of a result ahead of its being written.
template <class T>
TERSOR_INLINE void prefetch_result(const Task& task, const Window& window, const T* base, int64_t column) {
  base += window.image * task.height * task.width * column;
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  const int64_t head_dim = task.head_dim;
  for_runs(task, window, [&](int64_t, int64_t y, int64_t x, int64_t count) __attribute__((always_inline)) {
    const T* to = base + (y * task.width + x) * column;
    for (int64_t t = 0; t < count; ++t, to += column) {
      for (int64_t c = 0; c < head_dim; c += line) __builtin_prefetch(to + c, 1, 2);
    }
  });
}

// The window's tokens of one head, widened, one row each. The next window's, to the right of them, are asked for on the
// way: its runs are too short for the hardware to see them coming.
template <class T, class A>
TERSOR_INLINE void load_rows(const Task& task, const Window& window, const View& view, int64_t head, A factor, A* rows,
                             int64_t depth) {
  constexpr int64_t lanes = Simd<A>::lanes, line = 64 / static_cast<int64_t>(sizeof(T));
  const T* base = static_cast<const T*>(view.data) + window.image * view.batch + head * view.head;
  const int64_t whole = task.head_dim / lanes * lanes, column = view.column, ahead = task.window_w * column;
  const int rest = static_cast<int>(task.head_dim - whole);
  for_runs(task, window, [&](int64_t token, int64_t y, int64_t x, int64_t count) __attribute__((always_inline)) {
    const T* from = base + y * view.row + x * column;
    A* to = rows + token * depth;
    for (int64_t t = 0; t < count; ++t, from += column, to += depth) {
      for (int64_t c = 0; c < whole; c += lanes) {
        if (c % line == 0) __builtin_prefetch(from + ahead + c, 0, 2);
        store<A>(to + c, widen(from + c) * factor);
      }
      if (rest) {
        __builtin_prefetch(from + ahead + whole, 0, 2);
        store<A>(to + whole, widen_first(from + whole, rest) * factor);
      }
    }
  });
}

template <class T, class A>
TERSOR_INLINE void store_rows(const Task& task, const Window& window, T* base, int64_t column, const A* rows,
                              int64_t depth) {
  constexpr int64_t lanes = Simd<A>::lanes;
  base += window.image * task.height * task.width * column;
  const int64_t whole = task.head_dim / lanes * lanes;
  const int rest = static_cast<int>(task.head_dim - whole);
  for_runs(task, window, [&](int64_t token, int64_t y, int64_t x, int64_t count) __attribute__((always_inline)) {
    T* to = base + (y * task.width + x) * column;
    const A* from = rows + token * depth;
    for (int64_t t = 0; t < count; ++t, from += depth, to += column) {
      for (int64_t c = 0; c < whole; c += lanes) narrow(to + c, load(from + c));
      if (rest) narrow_first(to + whole, load(from + whole), rest);
    }
  });
}

// [tokens][depth] to [head_dim][pitch], zero beyond the last token, and back.
template <class A>
TERSOR_INLINE void to_planes(const Workspace<A>& work, const A* rows, A* planes) {
  for (int64_t t = 0; t < work.tokens; t += work.lanes) {
    const int count = static_cast<int>(std::min(work.lanes, work.tokens - t));
    transpose_in(rows + t * work.depth, work.depth, count, work.head_dim, planes + t, work.pitch);
  }
}

// `planes` holds only the `width` queries from token `first` on.
template <class A>
TERSOR_INLINE void from_planes(const Workspace<A>& work, const A* planes, int64_t first, int64_t width,
                               const A* factors, A* rows) {
  for (int64_t t = 0; t < width; t += work.lanes) {
    const int count = static_cast<int>(std::min(work.lanes, work.tokens - first - t));
    if (count <= 0) return;
    const Vec<A> factor = load(factors + t);
    for (int64_t c = 0; c < work.head_dim; c += 4) {
      const int channels = static_cast<int>(std::min<int64_t>(4, work.head_dim - c));
      Vec<A> v[4];
      for (int i = 0; i < 4; ++i) v[i] = load(planes + (c + i) * work.chunk + t) * factor;
      store_tokens(rows + (first + t) * work.depth + c, work.depth, count, channels, v);
    }
  }
}

// What of the window's pairs is masked: regions on either side of a cut, tokens outside the picture, listed pairs.
template <class A>
void find_masks(const Task& task, Window& window, Workspace<A>& work) {
  // Only the windows across the edge of the map hold tokens from both of its sides.
  const auto cut = [](int64_t at, int64_t window_size, int64_t shift, int64_t size) {
    const int64_t from = at + shift, last = from + window_size - 1;
    return (from < 0 && last >= 0) || (from < size && last >= size);
  };
  const bool cut_h = cut(window.top, task.window_h, task.shift_h, task.height);
  const bool cut_w = cut(window.left, task.window_w, task.shift_w, task.width);
  window.masked = cut_h || cut_w || task.mask;
  if (!window.masked) return;
  for (int64_t t = 0; t < work.tokens; ++t) {
    const int64_t y = window.top + t / task.window_w + task.shift_h, x = window.left + t % task.window_w + task.shift_w;
    const bool wrapped_h = cut_h && (y < 0 || y >= task.height), wrapped_w = cut_w && (x < 0 || x >= task.width);
    work.region[t] = static_cast<A>(2 * wrapped_h + wrapped_w);
  }
  std::fill(work.region + work.tokens, work.region + work.pitch, A(0));
  std::fill(work.outside, work.outside + work.pitch, A(0));
  if (!task.mask) return;
  const bool* mask = task.mask + window.image * task.mask_batch;
  if (!task.mask_of_pairs) {
    for_runs(task, window, [&](int64_t token, int64_t y, int64_t x, int64_t count) {
      for (int64_t i = 0; i < count; ++i) work.outside[token + i] = static_cast<A>(mask[y * task.width + x + i]);
    });
    return;
  }
  mask += window.index * work.tokens * work.tokens;
  for (int64_t key = 0; key < work.tokens; ++key) {
    A* row = work.pair_mask + key * work.pitch;
    for (int64_t query = 0; query < work.tokens; ++query) row[query] = static_cast<A>(mask[query * work.tokens + key]);
    std::fill(row + work.tokens, row + work.pitch, A(0));
  }
}

template <class A>
void add_masks(const Task& task, const Workspace<A>& work, int64_t first, int64_t width) {
  const Vec<A> value = splat(static_cast<A>(task.mask_value));
  const bool pairs = task.mask && task.mask_of_pairs;
  for (int64_t key = 0; key < work.tokens; ++key) {
    const Vec<A> region = splat(work.region[key]), outside = splat(work.outside[key]);
    for (int64_t a = 0; a < width; a += work.lanes) {
      A* at = work.weights + key * work.chunk + a;
      Vec<A> count = load(work.region + first + a) != region ? splat(A(1)) : Vec<A>{};
      count += load(work.outside + first + a) * outside;
      if (pairs) count += load(work.pair_mask + key * work.pitch + first + a);
      store<A>(at, load(at) + value * count);
    }
  }
}

// logits[key][query] for the `width` queries from `first` on, into work.weights.
template <class A>
TERSOR_INLINE void find_logits(const Task& task, const Window& window, const Workspace<A>& work, int64_t head,
                               int64_t first, int64_t width) {
  const A* bias = task.bias ? static_cast<const A*>(task.bias) + head * task.bias_size() + first : nullptr;
  const int64_t w = task.window_w, column = task.bias_column(), last = task.window_h - 1;
  product_columns<A>(
      work.tokens, width, work.head_dim, work.key, work.depth, 1, work.query_planes + first, work.pitch,
      [=](int64_t key) { return bias ? bias + key % w * column + (last - key / w) * w : nullptr; }, work.weights,
      work.chunk);
  if (window.masked) add_masks(task, work, first, width);
}

// Logits to weights that are not yet divided by their sum; one over the sums goes to `factors`.
template <class A>
TERSOR_INLINE void softmax(const Workspace<A>& work, int64_t first, int64_t width, A* factors) {
  const int64_t tokens = work.tokens, chunk = work.chunk;
  for (int64_t a = 0; a < width; a += work.lanes) {
    A* at = work.weights + a;
    Vec<A> largest = load(at);
    for (int64_t key = 1; key < tokens; ++key) largest = max<A>(load(at + key * chunk), largest);
    // Two sums, so that one addition need not wait for the other.
    Vec<A> total = exp(load(at) - largest), other{};
    store<A>(at, total);
    int64_t key = 1;
    for (; key + 2 <= tokens; key += 2) {
      const Vec<A> one = exp(load(at + key * chunk) - largest), two = exp(load(at + (key + 1) * chunk) - largest);
      store<A>(at + key * chunk, one), store<A>(at + (key + 1) * chunk, two);
      other += one, total += two;
    }
    if (key < tokens) {
      const Vec<A> one = exp(load(at + key * chunk) - largest);
      store<A>(at + key * chunk, one);
      other += one;
    }
    total += other;
    store<A>(work.logsumexp + first + a, largest + log(total));
    store<A>(factors + a, A(1) / total);
  }
}

// Statistics of a window's queries, between their place in (B, heads, H, W) and the workspace.
template <class A, bool TO_WORKSPACE>
TERSOR_INLINE void move_statistics(const Task& task, const Window& window, const Workspace<A>& work, int64_t head) {
  A* base = static_cast<A*>(task.logsumexp) + (window.image * task.heads + head) * task.height * task.width;
  for_runs(task, window, [&](int64_t token, int64_t y, int64_t x, int64_t count) __attribute__((always_inline)) {
    A *place = base + y * task.width + x, *own = work.logsumexp + token;
    for (int64_t i = 0; i < count; i += work.lanes) {
      const int n = static_cast<int>(std::min(work.lanes, count - i));
      if (TO_WORKSPACE) store_as<A>(own + i, load_as<A>(place + i, n), n);
      else store_as<A>(place + i, load_as<A>(own + i, n), n);
    }
  });
}

TERSOR_INLINE Window find_window(const Task& task, int64_t index) {
  const int64_t windows = task.windows(), across = task.windows_across();
  Window window{index / windows, index % windows, 0, 0, false};
  window.top = window.index / across * task.window_h, window.left = window.index % across * task.window_w;
  return window;
}

// Windows and heads counted together, the heads of a window one after the other: they share cache lines.
template <class T, class A>
void forward_units(const Task& task, int64_t begin, int64_t end, char* memory) {
  Arena arena{memory};
  Workspace<A> work(task, arena, false);
  Window window{};
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t head = unit % task.heads;
    if (unit == begin || head == 0) {
      window = find_window(task, unit / task.heads);
      find_masks(task, window, work);
    }
    load_rows<T, A>(task, window, task.query, head, static_cast<A>(task.scale), work.query, work.depth);
    load_rows<T, A>(task, window, task.key, head, A(1), work.key, work.depth);
    T* output = static_cast<T*>(task.output) + head * task.head_dim;
    to_planes(work, work.query, work.query_planes);
    for (int64_t first = 0; first < work.tokens; first += work.chunk) {
      const int64_t width = std::min(work.chunk, work.pitch - first);
      A factors[Workspace<A>::most];
      find_logits(task, window, work, head, first, width);
      if (first == 0) {  // now, since memory answers best if it is not asked for all at once
        load_rows<T, A>(task, window, task.value, head, A(1), work.value, work.depth);
        prefetch_result(task, window, output, task.heads * task.head_dim);
      }
      softmax(work, first, width, factors);
      product_columns<A>(work.head_dim, width, work.tokens, work.value, 1, work.depth, work.weights, work.chunk,
                         [](int64_t) -> const A* { return nullptr; }, work.out_planes, work.chunk);
      from_planes(work, work.out_planes, first, width, factors, work.out);
    }
    store_rows<T, A>(task, window, output, task.heads * task.head_dim, work.out, work.depth);
    move_statistics<A, false>(task, window, work, head);
  }
}

// Weights from logits and <grad_output, value> to weights and gradients of the logits, in place.
template <class A>
TERSOR_INLINE void softmax_backward(const Workspace<A>& work, int64_t first, int64_t width) {
  const int64_t tokens = work.tokens, chunk = work.chunk;
  for (int64_t a = 0; a < width; a += work.lanes) {
    const int present = static_cast<int>(std::min(work.lanes, tokens - first - a));
    A *weights = work.weights + a, *grads = work.grad_weights + a;
    const Vec<A> logsumexp = load(work.logsumexp + first + a);
    Vec<A> mean{}, other{};  // <grad_output, output>, which is the weights' mean of <grad_output, value>
    int64_t key = 0;
    for (; key + 2 <= tokens; key += 2) {
      Vec<A> one = exp(load(weights + key * chunk) - logsumexp);
      Vec<A> two = exp(load(weights + (key + 1) * chunk) - logsumexp);
      if (present < work.lanes) one = keep_first<A>(one, present), two = keep_first<A>(two, present);
      store<A>(weights + key * chunk, one), store<A>(weights + (key + 1) * chunk, two);
      mean = fma<A>(one, load(grads + key * chunk), mean);
      other = fma<A>(two, load(grads + (key + 1) * chunk), other);
    }
    if (key < tokens) {
      Vec<A> one = exp(load(weights + key * chunk) - logsumexp);
      if (present < work.lanes) one = keep_first<A>(one, present);
      store<A>(weights + key * chunk, one);
      mean = fma<A>(one, load(grads + key * chunk), mean);
    }
    mean += other;
    for (key = 0; key < tokens; ++key) {
      store<A>(grads + key * chunk, load(weights + key * chunk) * (load(grads + key * chunk) - mean));
    }
  }
}

// The logits' gradients added to the spread table's.
template <class A>
TERSOR_INLINE void add_bias_gradient(const Task& task, const Workspace<A>& work, int64_t first, int64_t width,
                                     A* table) {
  const int64_t w = task.window_w, column = task.bias_column(), last = task.window_h - 1;
  for (int64_t key = 0; key < work.tokens; ++key) {
    A* to = table + key % w * column + (last - key / w) * w + first;
    const A* from = work.grad_weights + key * work.chunk;
    for (int64_t a = 0; a < width; a += work.lanes) store<A>(to + a, load(to + a) + load(from + a));
  }
}

// All gradients of one window and head; those of the bias are added to its table.
template <class T, class A>
void backward_window(const Task& task, const Window& window, Workspace<A>& work, int64_t head, A* table) {
  const auto nothing = [](int64_t) -> const A* { return nullptr; };
  const int64_t depth = work.depth;
  load_rows<T, A>(task, window, task.query, head, static_cast<A>(task.scale), work.query, depth);
  load_rows<T, A>(task, window, task.key, head, A(1), work.key, depth);
  to_planes(work, work.query, work.query_planes);
  std::fill(work.logsumexp + work.tokens, work.logsumexp + work.pitch, A(0));
  move_statistics<A, true>(task, window, work, head);
  const auto prefetch_gradient = [&](int i) {
    prefetch_result(task, window, static_cast<T*>(task.gradients[i]) + head * task.head_dim, task.gradient_columns[i]);
  };
  for (int64_t first = 0; first < work.tokens; first += work.chunk) {
    const int64_t width = std::min(work.chunk, work.pitch - first), queries = std::min(width, work.tokens - first);
    find_logits(task, window, work, head, first, width);
    if (first == 0) {  // now, since memory answers best if it is not asked for all at once
      load_rows<T, A>(task, window, task.value, head, A(1), work.value, depth);
      load_rows<T, A>(task, window, task.grad_output, head, A(1), work.grad, depth);
      to_planes(work, work.grad, work.grad_planes);
    }
    product_columns<A>(work.tokens, width, work.head_dim, work.value, depth, 1, work.grad_planes + first, work.pitch,
                       nothing, work.grad_weights, work.chunk);
    if (first == 0) prefetch_gradient(0);
    softmax_backward(work, first, width);
    if (first == 0) prefetch_gradient(1);
    if (table) add_bias_gradient(task, work, first, width, table);
    product_columns<A>(work.head_dim, width, work.tokens, work.key, 1, depth, work.grad_weights, work.chunk, nothing,
                       work.out_planes, work.chunk);
    from_planes(work, work.out_planes, first, width, work.scales, work.out);
    if (first == 0) prefetch_gradient(2);
    const auto sums = [=](const A* to) {
      return [=](int64_t row) { return first ? to + row * depth : nullptr; };
    };
    product_columns<A>(work.tokens, depth, queries, work.grad_weights, work.chunk, 1, work.query + first * depth, depth,
                       sums(work.grad_key), work.grad_key, depth);
    product_columns<A>(work.tokens, depth, queries, work.weights, work.chunk, 1, work.grad + first * depth, depth,
                       sums(work.grad_value), work.grad_value, depth);
  }
  const A* results[3] = {work.out, work.grad_key, work.grad_value};
  for (int i = 0; i < 3; ++i) {
    T* base = static_cast<T*>(task.gradients[i]) + head * task.head_dim;
    store_rows<T, A>(task, window, base, task.gradient_columns[i], results[i], depth);
  }
}

// Blocks of windows and groups of heads counted together.
template <class T, class A>
void backward_units(const Task& task, int64_t begin, int64_t end, char* memory) {
  Arena arena{memory};
  Workspace<A> work(task, arena, true);
  std::fill(work.scales, work.scales + work.chunk, static_cast<A>(task.scale));
  const int64_t groups = task.heads / task.head_group;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit / groups, first_head = unit % groups * task.head_group;
    A* tables = static_cast<A*>(task.grad_bias);
    if (tables) {
      tables += (block * task.heads + first_head) * task.bias_size();
      std::memset(tables, 0, task.head_group * task.bias_size() * sizeof(A));
    }
    const int64_t last = std::min(task.batch * task.windows(), (block + 1) * task.block_windows);
    for (int64_t index = block * task.block_windows; index < last; ++index) {
      Window window = find_window(task, index);
      find_masks(task, window, work);
      for (int64_t h = 0; h < task.head_group; ++h) {
        backward_window<T, A>(task, window, work, first_head + h, tables ? tables + h * task.bias_size() : nullptr);
      }
    }
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::window_attention

// The kernels of window_attention.cpp, compiled once per instruction set (foreach_isa.h includes this file).
//
// One window of one head at a time, all in the nearest caches. A vector holds neighbouring queries, so that the softmax
// runs over vectors and never across one; keys are the rows. A single query left over (of 7 x 7, say) would fill a vector
// of every key: its keys lie in vectors instead. All products are broadcasts of one operand's elements times
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
  int64_t tokens, head_dim, pitch, depth, chunk, row;
  int64_t columns;                                        // queries in vectors: all, rounded up, or all but the last
  bool lone;                                              // the last query is left over
  A *query, *key, *value, *grad, *out;                    // [tokens][depth]
  A *query_planes, *grad_planes;                          // [head_dim][pitch]
  A *weights, *grad_weights;                              // [tokens][row]: a chunk's, and those of a lone query
  A *logsumexp, *factors, *region, *outside, *pair_mask;  // [pitch], pair_mask: [tokens][pitch]
  A *grad_key, *grad_value;                               // [tokens][depth]
  A *lone_weights, *lone_grads;                           // [pitch], of the keys
  Place *places, *next_places;                            // [tokens]

  Workspace(const Task& task, Arena& arena, bool backward) {
    const auto whole = [](int64_t n) { return (n + lanes - 1) / lanes * lanes; };
    tokens = task.tokens(), head_dim = task.head_dim;
    pitch = whole(tokens), depth = whole(head_dim);
    lone = tokens > lanes && tokens % lanes == 1;
    columns = lone ? tokens - 1 : pitch, chunk = std::min(most, columns), row = whole(chunk + lone);
    query = arena.take<A>(pitch * depth), key = arena.take<A>(pitch * depth), value = arena.take<A>(pitch * depth);
    out = arena.take<A>(pitch * depth);
    query_planes = arena.take<A>(head_dim * pitch), weights = arena.take<A>(tokens * row);
    logsumexp = arena.take<A>(pitch), factors = arena.take<A>(pitch);
    region = arena.take<A>(pitch), outside = arena.take<A>(pitch);
    lone_weights = arena.take<A>(pitch), lone_grads = arena.take<A>(pitch);
    places = arena.take<Place>(tokens), next_places = arena.take<Place>(tokens);
    pair_mask = arena.take<A>(task.mask && task.mask_of_pairs ? tokens * pitch : 0);
    if (backward) {
      grad = arena.take<A>(pitch * depth), grad_planes = arena.take<A>(head_dim * pitch);
      grad_weights = arena.take<A>(tokens * row);
      grad_key = arena.take<A>(pitch * depth), grad_value = arena.take<A>(pitch * depth);
    }
    if (!arena.base) return;
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

// Where the window's tokens lie in the map that is not rolled.
TERSOR_INLINE void find_places(const Task& task, const Window& window, Place* places) {
  int64_t y = window.top + task.shift_h, first = window.left + task.shift_w;
  y += y < 0 ? task.height : y >= task.height ? -task.height : 0;
  first += first < 0 ? task.width : first >= task.width ? -task.width : 0;
  const int64_t before = std::min(task.window_w, task.width - first);
  for (int64_t i = 0; i < task.window_h; ++i) {
    for (int64_t j = 0; j < before; ++j) *places++ = {y, first + j};
    for (int64_t j = before; j < task.window_w; ++j) *places++ = {y, j - before};
    if (++y == task.height) y = 0;
  }
}

// What one head of a window will read or write, asked for ahead of time, a portion between two tiles of a product: the
// runs of tokens are too short for the hardware to see them coming, and memory answers few questions at once.
class Ahead {
 public:
  template <class A>
  explicit Ahead(const Workspace<A>& work) : tokens(work.tokens) {}

  template <class T>
  void add(const View& view, const Window& window, const Place* places, int64_t head, int64_t head_dim) {
    constexpr int64_t size = static_cast<int64_t>(sizeof(T));
    const T* base = static_cast<const T*>(view.data) + window.image * view.batch + head * view.head;
    parts[count++] = {reinterpret_cast<const char*>(base), places, view.row * size, view.column * size};
    bytes = head_dim * size;
    portion = std::max<int64_t>(1, PORTION * 64 / bytes);
  }

  void operator()() {
    if (part == count) return;
    const Part p = parts[part];
    const int64_t last = std::min(token + portion, tokens);
    for (; token < last; ++token) {
      const char* at = p.base + p.places[token].y * p.row + p.places[token].x * p.column;
      for (int64_t c = 0; c < bytes; c += 64) __builtin_prefetch(at + c, 0, 2);
    }
    if (token == tokens) ++part, token = 0;
  }

 private:
  static constexpr int64_t PORTION = 24;  // lines
  struct Part {
    const char* base;
    const Place* places;
    int64_t row, column;
  };
  Part parts[7];
  int64_t tokens, bytes = 0, portion = 0, token = 0;
  int count = 0, part = 0;
};

// The window's tokens of one head, widened, one row each.
template <class T, class A>
TERSOR_INLINE void load_rows(const Workspace<A>& work, const View& view, const Window& window, int64_t head, A factor,
                             A* rows) {
  constexpr int64_t lanes = Simd<A>::lanes;
  const T* base = static_cast<const T*>(view.data) + window.image * view.batch + head * view.head;
  const int64_t whole = work.head_dim / lanes * lanes, tokens = work.tokens, depth = work.depth;
  const int rest = static_cast<int>(work.head_dim - whole);
  const int64_t row = view.row, column = view.column;
  const Place* places = work.places;
  for (int64_t t = 0; t < tokens; ++t, rows += depth) {
    const T* from = base + places[t].y * row + places[t].x * column;
    for (int64_t c = 0; c < whole; c += lanes) store<A>(rows + c, widen(from + c) * factor);
    if (rest) store<A>(rows + whole, widen_first(from + whole, rest) * factor);
  }
}

// And back, times factor(token).
template <class T, class A, class Factor>
TERSOR_INLINE void store_rows(const Workspace<A>& work, const View& view, const Window& window, int64_t head,
                              const A* rows, Factor factor) {
  constexpr int64_t lanes = Simd<A>::lanes;
  T* base = static_cast<T*>(const_cast<void*>(view.data)) + window.image * view.batch + head * view.head;
  const int64_t whole = work.head_dim / lanes * lanes, tokens = work.tokens, depth = work.depth;
  const int rest = static_cast<int>(work.head_dim - whole);
  const int64_t row = view.row, column = view.column;
  const Place* places = work.places;
  for (int64_t t = 0; t < tokens; ++t, rows += depth) {
    T* to = base + places[t].y * row + places[t].x * column;
    const Vec<A> f = splat(factor(t));
    for (int64_t c = 0; c < whole; c += lanes) narrow(to + c, load(rows + c) * f);
    if (rest) narrow_first(to + whole, load(rows + whole) * f, rest);
  }
}

// [tokens][depth] to [head_dim][pitch], zero beyond the last token; a lone query has none.
template <class A>
TERSOR_INLINE void to_planes(const Workspace<A>& work, const A* rows, A* planes) {
  for (int64_t t = 0; t < work.columns; t += work.lanes) {
    const int count = static_cast<int>(std::min(work.lanes, work.tokens - t));
    transpose_in(rows + t * work.depth, work.depth, count, work.head_dim, planes + t, work.pitch);
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
    for (int64_t t = 0; t < work.tokens; ++t) {
      work.outside[t] = static_cast<A>(mask[work.places[t].y * task.width + work.places[t].x]);
    }
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
      A* at = work.weights + key * work.row + a;
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
                               int64_t first, int64_t width, Ahead& ahead) {
  const A* bias = task.bias ? static_cast<const A*>(task.bias) + head * task.bias_size() + first : nullptr;
  const int64_t w = task.window_w, column = task.bias_column(), last = task.window_h - 1;
  product_columns<A>(
      work.tokens, width, work.head_dim, work.key, work.depth, 1, work.query_planes + first, work.pitch,
      [=](int64_t key) { return bias ? bias + key % w * column + (last - key / w) * w : nullptr; }, work.weights,
      work.row, ahead);
  if (window.masked) add_masks(task, work, first, width);
}

// Logits to weights that are not yet divided by their sum; one over the sums goes to work.factors.
template <class A>
TERSOR_INLINE void softmax(const Workspace<A>& work, int64_t first, int64_t width) {
  const int64_t tokens = work.tokens, row = work.row;
  for (int64_t a = 0; a < width; a += work.lanes) {
    A* at = work.weights + a;
    Vec<A> largest = load(at);
    for (int64_t key = 1; key < tokens; ++key) largest = max<A>(load(at + key * row), largest);
    // Two sums, so that one addition need not wait for the other.
    Vec<A> total = exp(load(at) - largest), other{};
    store<A>(at, total);
    int64_t key = 1;
    for (; key + 2 <= tokens; key += 2) {
      const Vec<A> one = exp(load(at + key * row) - largest), two = exp(load(at + (key + 1) * row) - largest);
      store<A>(at + key * row, one), store<A>(at + (key + 1) * row, two);
      other += one, total += two;
    }
    if (key < tokens) {
      const Vec<A> one = exp(load(at + key * row) - largest);
      store<A>(at + key * row, one);
      other += one;
    }
    total += other;
    store<A>(work.logsumexp + first + a, largest + log(total));
    store<A>(work.factors + first + a, A(1) / total);
  }
}

// Statistics of a window's queries, between their place in (B, heads, H, W) and the workspace.
template <class A, bool TO_WORKSPACE>
TERSOR_INLINE void move_statistics(const Task& task, const Window& window, const Workspace<A>& work, int64_t head) {
  A* base = static_cast<A*>(task.logsumexp) + (window.image * task.heads + head) * task.height * task.width;
  const int64_t tokens = work.tokens, width = task.width;
  A* own = work.logsumexp;
  const Place* places = work.places;
  for (int64_t t = 0; t < tokens; ++t) {
    A& place = base[places[t].y * width + places[t].x];
    if (TO_WORKSPACE) own[t] = place;
    else place = own[t];
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::window_attention

#include "attention/window_attention_lone.h"

namespace tersor::window_attention {
namespace TERSOR_ISA {

TERSOR_INLINE Window find_window(const Task& task, int64_t index) {
  const int64_t windows = task.windows(), across = task.windows_across();
  Window window{index / windows, index % windows, 0, 0, false};
  window.top = window.index / across * task.window_h, window.left = window.index % across * task.window_w;
  return window;
}

// Windows and heads counted together, the heads of a window one after the other: they share cache lines.
template <class T, class A>
void forward_units(const Task& task, int64_t begin, int64_t end, char* memory) {
  const auto nothing = [](int64_t) -> const A* { return nullptr; };
  Arena arena{memory};
  Workspace<A> work(task, arena, false);
  Window window{}, next = find_window(task, begin / task.heads);
  find_places(task, next, work.next_places);
  const int64_t depth = work.depth;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t head = unit % task.heads, next_head = head + 1 == task.heads ? 0 : head + 1;
    if (unit == begin || head == 0) {
      window = next, std::swap(work.places, work.next_places);
      find_masks(task, window, work);
    }
    if (unit + 1 < end && next_head == 0) {
      next = find_window(task, (unit + 1) / task.heads);
      find_places(task, next, work.next_places);
    }
    Ahead ahead(work);
    ahead.add<T>(task.output, window, work.places, head, task.head_dim);
    if (unit + 1 < end) {
      for (const View* view : {&task.query, &task.key, &task.value}) {
        ahead.add<T>(*view, next_head ? window : next, next_head ? work.places : work.next_places, next_head,
                     task.head_dim);
      }
    }
    load_rows<T, A>(work, task.query, window, head, static_cast<A>(task.scale), work.query);
    load_rows<T, A>(work, task.key, window, head, A(1), work.key);
    load_rows<T, A>(work, task.value, window, head, A(1), work.value);
    to_planes(work, work.query, work.query_planes);
    for (int64_t first = 0; first < work.columns; first += work.chunk) {
      const int64_t width = std::min(work.chunk, work.columns - first);
      const bool lone = work.lone && first + width == work.columns;
      const int64_t queries = std::min(width, work.tokens - first) + lone;
      find_logits(task, window, work, head, first, width, ahead);
      softmax(work, first, width);
      if (lone) {
        find_lone_logits(task, window, work, head);
        lone_softmax(work, work.weights + width);
      }
      product_columns<A>(queries, depth, work.tokens, work.weights, 1, work.row, work.value, depth, nothing,
                         work.out + first * depth, depth, ahead);
    }
    store_rows<T, A>(work, task.output, window, head, work.out, [&](int64_t t) { return work.factors[t]; });
    move_statistics<A, false>(task, window, work, head);
  }
}

// Weights from logits and <grad_output, value> to weights and gradients of the logits, in place.
template <class A>
TERSOR_INLINE void softmax_backward(const Workspace<A>& work, int64_t first, int64_t width) {
  const int64_t tokens = work.tokens, row = work.row;
  for (int64_t a = 0; a < width; a += work.lanes) {
    const int present = static_cast<int>(std::min(work.lanes, tokens - first - a));
    A *weights = work.weights + a, *grads = work.grad_weights + a;
    const Vec<A> logsumexp = load(work.logsumexp + first + a);
    Vec<A> mean{}, other{};  // <grad_output, output>, which is the weights' mean of <grad_output, value>
    int64_t key = 0;
    for (; key + 2 <= tokens; key += 2) {
      Vec<A> one = exp(load(weights + key * row) - logsumexp);
      Vec<A> two = exp(load(weights + (key + 1) * row) - logsumexp);
      if (present < work.lanes) one = keep_first<A>(one, present), two = keep_first<A>(two, present);
      store<A>(weights + key * row, one), store<A>(weights + (key + 1) * row, two);
      mean = fma<A>(one, load(grads + key * row), mean);
      other = fma<A>(two, load(grads + (key + 1) * row), other);
    }
    if (key < tokens) {
      Vec<A> one = exp(load(weights + key * row) - logsumexp);
      if (present < work.lanes) one = keep_first<A>(one, present);
      store<A>(weights + key * row, one);
      mean = fma<A>(one, load(grads + key * row), mean);
    }
    mean += other;
    for (key = 0; key < tokens; ++key) {
      store<A>(grads + key * row, load(weights + key * row) * (load(grads + key * row) - mean));
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
    const A* from = work.grad_weights + key * work.row;
    for (int64_t a = 0; a < width; a += work.lanes) store<A>(to + a, load(to + a) + load(from + a));
  }
}

// All gradients of one window and head; those of the bias are added to its table.
template <class T, class A>
void backward_window(const Task& task, const Window& window, Workspace<A>& work, int64_t head, A* table, Ahead& ahead) {
  const auto nothing = [](int64_t) -> const A* { return nullptr; };
  const int64_t depth = work.depth, row = work.row, tokens = work.tokens;
  load_rows<T, A>(work, task.query, window, head, static_cast<A>(task.scale), work.query);
  load_rows<T, A>(work, task.key, window, head, A(1), work.key);
  load_rows<T, A>(work, task.value, window, head, A(1), work.value);
  load_rows<T, A>(work, task.grad_output, window, head, A(1), work.grad);
  to_planes(work, work.query, work.query_planes);
  to_planes(work, work.grad, work.grad_planes);
  std::fill(work.logsumexp + tokens, work.logsumexp + work.pitch, A(0));
  move_statistics<A, true>(task, window, work, head);
  for (int64_t first = 0; first < work.columns; first += work.chunk) {
    const int64_t width = std::min(work.chunk, work.columns - first);
    const bool lone = work.lone && first + width == work.columns;
    const int64_t queries = std::min(width, tokens - first) + lone;
    find_logits(task, window, work, head, first, width, ahead);
    product_columns<A>(tokens, width, work.head_dim, work.value, depth, 1, work.grad_planes + first, work.pitch,
                       nothing, work.grad_weights, row, ahead);
    softmax_backward(work, first, width);
    if (table) add_bias_gradient(task, work, first, width, table);
    if (lone) {
      find_lone_logits(task, window, work, head);
      std::fill(work.lone_grads, work.lone_grads + tokens, A(0));
      add_lone_product(work, work.grad + (tokens - 1) * depth, work.value, work.lone_grads);
      lone_softmax_backward(work, work.weights + width, work.grad_weights + width);
      const A* grads = work.lone_grads;
      if (table) for_lone_bias(task, work, [=](int64_t key, int64_t place) { table[place] += grads[key]; });
    }
    const auto sums = [=](const A* to) {
      return [=](int64_t key) { return first ? to + key * depth : nullptr; };
    };
    product_columns<A>(queries, depth, tokens, work.grad_weights, 1, row, work.key, depth, nothing,
                       work.out + first * depth, depth, ahead);
    product_columns<A>(tokens, depth, queries, work.grad_weights, row, 1, work.query + first * depth, depth,
                       sums(work.grad_key), work.grad_key, depth, ahead);
    product_columns<A>(tokens, depth, queries, work.weights, row, 1, work.grad + first * depth, depth,
                       sums(work.grad_value), work.grad_value, depth, ahead);
  }
  const auto one = [](int64_t) { return A(1); };
  store_rows<T, A>(work, task.gradients[0], window, head, work.out, [&](int64_t) { return static_cast<A>(task.scale); });
  store_rows<T, A>(work, task.gradients[1], window, head, work.grad_key, one);
  store_rows<T, A>(work, task.gradients[2], window, head, work.grad_value, one);
}

// Blocks of windows and groups of heads counted together.
template <class T, class A>
void backward_units(const Task& task, int64_t begin, int64_t end, char* memory) {
  Arena arena{memory};
  Workspace<A> work(task, arena, true);
  const int64_t groups = task.heads / task.head_group, windows = task.batch * task.windows();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit / groups, first_head = unit % groups * task.head_group;
    A* tables = static_cast<A*>(task.grad_bias);
    if (tables) {
      tables += (block * task.heads + first_head) * task.bias_size();
      std::memset(tables, 0, task.head_group * task.bias_size() * sizeof(A));
    }
    const int64_t last = std::min(windows, (block + 1) * task.block_windows);
    Window next = find_window(task, block * task.block_windows);
    find_places(task, next, work.next_places);
    for (int64_t index = block * task.block_windows; index < last; ++index) {
      Window window = next;
      std::swap(work.places, work.next_places);
      find_masks(task, window, work);
      next = find_window(task, std::min(index + 1, windows - 1));
      find_places(task, next, work.next_places);
      for (int64_t h = 0; h < task.head_group; ++h) {
        const bool same = h + 1 < task.head_group;
        Ahead ahead(work);
        for (const View& gradient : task.gradients) {
          ahead.add<T>(gradient, window, work.places, first_head + h, task.head_dim);
        }
        for (const View* view : {&task.query, &task.key, &task.value, &task.grad_output}) {
          ahead.add<T>(*view, same ? window : next, same ? work.places : work.next_places,
                       first_head + (same ? h + 1 : 0), task.head_dim);
        }
        backward_window<T, A>(task, window, work, first_head + h, tables ? tables + h * task.bias_size() : nullptr,
                              ahead);
      }
    }
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::window_attention

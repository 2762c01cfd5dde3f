// The kernels of leff.cpp, compiled once per instruction set (foreach_isa.h includes this file).
//
// Tokens of a strip of rows stream through in blocks, for one chunk of hidden channels at a time: what the convolution
// needs of the hidden map is a ring of a few rows in the caches. Each stage runs just far enough ahead of the next one,
// a row and a token. Products are those of product.h, hidden channels lie in the lanes.

#include "gelu.h"
#include "product.h"

namespace tersor::leff {
namespace TERSOR_ISA {
using namespace tersor::TERSOR_ISA;

// Rows of a strip, each with a zero token on either side; row r lies where rows that are no longer needed were.
template <class A>
struct Ring {
  A* data;
  int64_t rows, pitch, chunk;

  void take(Arena& arena, int64_t count, const Task& task) {
    rows = count, chunk = task.chunk, pitch = (task.width + 2) * chunk;
    data = arena.take<A>(rows * pitch);
    if (!data) return;
    for (int64_t r = 0; r < rows; ++r) {
      std::memset(data + r * pitch, 0, chunk * sizeof(A));
      std::memset(data + (r + 1) * pitch - chunk, 0, chunk * sizeof(A));
    }
  }
  A* row(int64_t y) const { return data + y % rows * pitch; }
  A* token(int64_t y, int64_t x) const { return row(y) + (x + 1) * chunk; }
};

// One thread's memory.
template <class A>
struct Workspace {
  Ring<A> active, slope, raw, gradient;  // convolution's input, gelu' before it, its input before the affine, dp2
  A *zeros;                              // a row outside of the map
  A *first, *second;                     // [BLOCK][chunk]
  A *input, *grad;                       // [BLOCK][channels], [BLOCK][outputs], where they need a copy
  A *result;                             // [tokens of a strip, or BLOCK where one chunk is all][pitch]

  Workspace(const Task& task, Arena& arena, bool backward) {
    const int64_t width = task.width;
    const int64_t rows = (BLOCK + width - 1) / width + 5;  // of a block, the two around it, and the token beyond
    active.take(arena, rows, task);
    zeros = arena.take<A>(active.pitch);
    if (backward) {
      gradient.take(arena, rows, task);
      slope.take(arena, rows + 2, task);
      raw.take(arena, task.affine ? rows + 2 : 0, task);
    }
    first = arena.take<A>(BLOCK * task.chunk), second = arena.take<A>(BLOCK * task.chunk);
    input = arena.take<A>(BLOCK * task.channels), grad = arena.take<A>(BLOCK * task.outputs);
    const int64_t kept = task.groups > 1 || !task.multiplies() ? 0 : task.chunks > 1 ? task.strip_rows * width : BLOCK;
    result = arena.take<A>(kept * (backward ? task.pitch_c : task.pitch_o));
    if (arena.base) std::memset(zeros, 0, active.pitch * sizeof(A));
  }
};

template <class A>
int64_t scratch(const Task& task, bool backward) {
  Arena arena{nullptr};
  Workspace<A>(task, arena, backward);
  return arena.used;
}

// ---- Packing ----

template <class T, class A>
void pack_vector(const Task& task, const void* from, A fill, void* to, int64_t first) {
  A* all = static_cast<A*>(to) + first;
  for (int64_t i = 0; i < task.chunk; ++i) {
    const bool present = from && first + i < task.hidden;
    all[i] = present ? static_cast<A>(static_cast<const T*>(from)[first + i]) : fill;
  }
}

// rows x columns with a row step into rows of `pitch`, zero beyond the columns.
template <class T, class A>
void pack_rows(const T* from, int64_t step, int64_t rows, int64_t columns, A* to, int64_t pitch) {
  constexpr int64_t lanes = Simd<A>::lanes;
  for (int64_t r = 0; r < rows; ++r, from += step, to += pitch) {
    for (int64_t c = 0; c < pitch; c += lanes) {
      const int64_t count = std::max<int64_t>(0, std::min(lanes, columns - c));
      store<A>(to + c, count ? load_as<A>(from + c, static_cast<int>(count)) : Vec<A>{});
    }
  }
}

// The same transposed: to[column][row].
template <class T, class A>
void pack_columns(const T* from, int64_t step, int64_t rows, int64_t columns, A* to, int64_t pitch) {
  constexpr int64_t lanes = Simd<A>::lanes;
  for (int64_t r = 0; r < pitch; r += lanes) {
    const int64_t count = std::min(lanes, rows - r);
    if (count > 0) {
      transpose_in(from + r * step, step, static_cast<int>(count), columns, to + r, pitch);
      continue;
    }
    for (int64_t c = 0; c < columns; ++c) store<A>(to + c * pitch + r, Vec<A>{});
  }
}

template <class T, class A>
void pack_chunks(const Task& task, int64_t begin, int64_t end) {
  const int64_t chunk = task.chunk, padded = task.padded_hidden();
  const T *weight1 = static_cast<const T*>(task.given.weight1), *weight2 = static_cast<const T*>(task.given.weight2);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i * chunk, present = std::min(chunk, task.hidden - first);
    if (task.columns1) {
      pack_columns(weight1 + first * task.channels, task.channels, present, task.channels,
                   static_cast<A*>(task.columns1) + first * task.channels, chunk);
    }
    if (task.rows2) {
      A* to = static_cast<A*>(task.rows2) + first * task.pitch_o;
      std::memset(to + present * task.pitch_o, 0, (chunk - present) * task.pitch_o * sizeof(A));
      pack_columns(weight2 + first, task.hidden, task.outputs, present, to, task.pitch_o);
    }
    if (task.columns2) {
      pack_rows(weight2 + first, task.hidden, task.outputs, present,
                static_cast<A*>(task.columns2) + first * task.outputs, chunk);
    }
    if (task.rows1 && task.rows1 != task.given.weight1) {
      A* to = static_cast<A*>(task.rows1) + first * task.pitch_c;
      std::memset(to + present * task.pitch_c, 0, (chunk - present) * task.pitch_c * sizeof(A));
      pack_rows(weight1 + first * task.channels, task.channels, present, task.channels, to, task.pitch_c);
    }
    pack_vector<T, A>(task, task.given.bias1, A(0), task.bias1, first);
    pack_vector<T, A>(task, task.given.tap_bias, A(0), task.tap_bias, first);
    pack_vector<T, A>(task, task.given.scale, A(1), task.scale, first);
    pack_vector<T, A>(task, task.given.shift, A(0), task.shift, first);
    const T* taps = static_cast<const T*>(task.given.taps);
    for (int64_t tap = 0; tap < 9; ++tap) {
      A* to = static_cast<A*>(task.taps) + tap * padded + first;
      for (int64_t e = 0; e < chunk; ++e) to[e] = e < present ? static_cast<A>(taps[(first + e) * 9 + tap]) : A(0);
    }
    if (i > 0) continue;
    A* bias2 = static_cast<A*>(task.bias2);
    const T* from = static_cast<const T*>(task.given.bias2);
    for (int64_t o = 0; o < task.pitch_o; ++o) bias2[o] = from && o < task.outputs ? static_cast<A>(from[o]) : A(0);
  }
}

// ---- Blocks of tokens ----

// Visits tokens first .. first + count of a map in runs that lie in one row: visit(token of the block, y, x, count).
template <class Visit>
TERSOR_INLINE void for_runs(const Task& task, int64_t first, int64_t count, Visit&& visit) {
  int64_t y = first / task.width, x = first % task.width;
  for (int64_t done = 0; done < count; ++y, x = 0) {
    const int64_t n = std::min(count - done, task.width - x);
    visit(done, y, x, n);
    done += n;
  }
}

template <class A>
struct Rows {
  const A* data;
  int64_t pitch;
};

// A block's tokens as rows of float or double: where they lie, or copied.
template <class T, class A>
TERSOR_INLINE Rows<A> tokens_of(const Task& task, const View& view, int64_t image, int64_t first, int64_t count,
                                int64_t channels, A* copy) {
  constexpr int64_t lanes = Simd<A>::lanes;
  const T* base = static_cast<const T*>(view.data) + image * view.batch;
  const int64_t y = first / task.width, x = first % task.width;
  if constexpr (std::is_same_v<T, A>) {
    if (view.row == task.width * view.column || x + count <= task.width) {
      return {base + y * view.row + x * view.column, view.column};
    }
  }
  for_runs(task, first, count, [&](int64_t at, int64_t row, int64_t column, int64_t n) {
    const T* from = base + row * view.row + column * view.column;
    A* to = copy + at * channels;
    for (int64_t t = 0; t < n; ++t, from += view.column, to += channels) {
      for (int64_t c = 0; c < channels; c += lanes) {
        const int some = static_cast<int>(std::min(lanes, channels - c));
        store_as<A>(to + c, load_as<A>(from + c, some), some);
      }
    }
  });
  return {copy, channels};
}

// A chunk's part of a block of a map [tokens][hidden], plus the bias, as [count][chunk]; and back.
template <class T, class A>
void load_map(const Task& task, const void* map, int64_t token, int64_t count, int64_t first, const A* bias, A* to) {
  constexpr int64_t lanes = Simd<A>::lanes;
  const T* from = static_cast<const T*>(map) + token * task.hidden + first;
  const int64_t chunk = task.chunk, present = std::min(chunk, task.hidden - first);
  for (int64_t t = 0; t < count; ++t, from += task.hidden, to += chunk) {
    for (int64_t e = 0; e < chunk; e += lanes) {
      const int some = static_cast<int>(std::max<int64_t>(0, std::min(lanes, present - e)));
      store<A>(to + e, (some ? load_as<A>(from + e, some) : Vec<A>{}) + (bias ? load(bias + e) : Vec<A>{}));
    }
  }
}

template <class T, class A>
void store_map(const Task& task, const A* from, int64_t token, int64_t count, int64_t first, void* map) {
  constexpr int64_t lanes = Simd<A>::lanes;
  T* to = static_cast<T*>(map) + token * task.hidden + first;
  const int64_t chunk = task.chunk, present = std::min(chunk, task.hidden - first);
  for (int64_t t = 0; t < count; ++t, to += task.hidden, from += chunk) {
    for (int64_t e = 0; e < present; e += lanes) {
      store_as<A>(to + e, load(from + e), static_cast<int>(std::min(lanes, present - e)));
    }
  }
}

// The three rows around row y, with tokens from x - 1 on.
template <class A>
TERSOR_INLINE void rows_around(const Task& task, const Workspace<A>& work, const Ring<A>& ring, int64_t y, int64_t x,
                               const A* rows[3]) {
  for (int64_t i = 0; i < 3; ++i) {
    const int64_t at = y + i - 1;
    rows[i] = (at < 0 || at >= task.height ? work.zeros : ring.row(at)) + x * task.chunk;
  }
}

// 3 x 3 convolution of a run of tokens; with `tap` 8 and `step` -1 that of the gradient.
template <class A>
TERSOR_INLINE void convolve(const A* const rows[3], int64_t count, int64_t chunk, const A* taps, int64_t padded,
                            int64_t tap, int64_t step, const A* bias, A* to) {
  for (int64_t e = 0; e < chunk; e += Simd<A>::lanes) {
    Vec<A> weight[9];
    for (int i = 0; i < 9; ++i) weight[i] = load(taps + (tap + i * step) * padded + e);
    const Vec<A> begin = bias ? load(bias + e) : Vec<A>{};
    const A *top = rows[0] + e, *middle = rows[1] + e, *bottom = rows[2] + e;
    for (int64_t t = 0; t < count; ++t, top += chunk, middle += chunk, bottom += chunk) {
      Vec<A> sum = begin;
      for (int j = 0; j < 3; ++j) {
        sum = fma<A>(weight[j], load(top + j * chunk), sum);
        sum = fma<A>(weight[3 + j], load(middle + j * chunk), sum);
        sum = fma<A>(weight[6 + j], load(bottom + j * chunk), sum);
      }
      store<A>(to + t * chunk + e, sum);
    }
  }
}

// One chunk of one strip.
template <class A>
struct Stream {
  const Task& task;
  Workspace<A>& work;
  int64_t image, top, bottom;  // rows of the strip
  int64_t first;               // hidden channel of the chunk
  bool begins, ends;           // the first, the last chunk of the strip's result
  A* sums;                     // of the block; null for none
  bool fresh;                  // the first strip of the block, whose products the sums begin with

  int64_t token(int64_t at) const { return image * task.map() + at; }
  template <class P>
  const A* of(P* packed, int64_t each = 1) const {
    return static_cast<const A*>(packed) + first * each;
  }
};

// The first linear layer and activation of a block, into the rings.
template <class T, class A, bool BACKWARD>
void activate(const Stream<A>& s, int64_t at, int64_t count) {
  constexpr int64_t lanes = Simd<A>::lanes;
  const Task& task = s.task;
  Workspace<A>& work = s.work;
  const int64_t chunk = task.chunk;
  const A *bias = s.of(task.bias1), *scales = s.of(task.scale), *shifts = s.of(task.shift);
  if (task.multiplies()) {
    const Rows<A> x = tokens_of<T>(task, task.input, s.image, at, count, task.channels, work.input);
    product_columns<A>(count, chunk, task.channels, x.data, x.pitch, 1, s.of(task.columns1, task.channels), chunk,
                       [=](int64_t) { return bias; }, work.first, chunk);
  } else {
    load_map<T>(task, task.inner, s.token(at), count, s.first, bias, work.first);
  }
  for_runs(task, at, count, [&](int64_t token, int64_t y, int64_t x0, int64_t n) {
    const A* from = work.first + token * chunk;
    A *to = work.active.token(y, x0), *slopes = nullptr, *raws = nullptr;
    if (BACKWARD) slopes = work.slope.token(y, x0);
    if (BACKWARD && task.affine) raws = work.raw.token(y, x0);
    if (!task.affine) {
      for (int64_t i = 0; i < n * chunk; i += lanes) {
        Vec<A> value;
        if (BACKWARD) store<A>(slopes + i, gelu_slope<A>(load(from + i), value));
        else value = gelu<A>(load(from + i));
        store<A>(to + i, value);
      }
      return;
    }
    for (int64_t i = 0; i < n * chunk; i += chunk) {
      for (int64_t e = 0; e < chunk; e += lanes) {
        const Vec<A> scale = load(scales + e);
        Vec<A> value;
        if (BACKWARD) {
          store<A>(slopes + i + e, scale * gelu_slope<A>(load(from + i + e), value));
          store<A>(raws + i + e, value);
        } else {
          value = gelu<A>(load(from + i + e));
        }
        store<A>(to + i + e, fma<A>(value, scale, load(shifts + e)));
      }
    }
  });
}

// The convolution of a block of tokens of the ring `active`.
template <class A>
void convolve_block(const Stream<A>& s, int64_t at, int64_t count, A* to) {
  const Task& task = s.task;
  for_runs(task, at, count, [&](int64_t token, int64_t y, int64_t x, int64_t n) {
    const A* rows[3];
    rows_around(task, s.work, s.work.active, y, x, rows);
    convolve(rows, n, task.chunk, s.of(task.taps), task.padded_hidden(), 0, 1, s.of(task.tap_bias),
             to + token * task.chunk);
  });
}

// A block's result so far (tokens of the image): adds the chunk's product, and writes it out after the last one.
template <class T, class A>
void add_result(const Stream<A>& s, int64_t at, int64_t count, int64_t columns, int64_t pitch, const A* left,
                const A* right, const A* bias, A* partial) {
  constexpr int64_t lanes = Simd<A>::lanes;
  const Task& task = s.task;
  A* to = partial ? partial + s.token(at) * pitch
                  : s.work.result + (task.chunks > 1 ? (at - s.top * task.width) * pitch : 0);
  const bool begins = s.begins;
  product_columns<A>(count, columns, task.chunk, left, task.chunk, 1, right, pitch,
                     [=](int64_t row) -> const A* { return begins ? bias : to + row * pitch; }, to, pitch);
  if (partial || !s.ends) return;
  T* output = static_cast<T*>(task.result) + s.token(at) * columns;
  for (int64_t t = 0; t < count; ++t, output += columns, to += pitch) {
    for (int64_t c = 0; c < columns; c += lanes) {
      store_as<A>(output + c, load(to + c), static_cast<int>(std::min(lanes, columns - c)));
    }
  }
}

template <class T, class A>
void forward_chunk(const Stream<A>& s, const A* bias, A* partial) {
  constexpr int64_t lanes = Simd<A>::lanes;
  const Task& task = s.task;
  const int64_t width = task.width, last = std::min(task.height, s.bottom + 1) * width;
  int64_t active = std::max<int64_t>(0, s.top - 1) * width;
  A* block = s.work.second;
  for (int64_t at = s.top * width, end = s.bottom * width; at < end; at += BLOCK) {
    const int64_t count = std::min(BLOCK, end - at), needed = std::min(last, at + count + width + 1);
    for (int64_t n; active < needed; active += n) {
      n = std::min(BLOCK, needed - active);
      activate<T, A, false>(s, active, n);
    }
    convolve_block(s, at, count, block);
    for (int64_t i = 0; i < count * task.chunk; i += lanes) store<A>(block + i, gelu<A>(load(block + i)));
    if (!task.multiplies()) {
      store_map<T>(task, block, s.token(at), count, s.first, task.outer);
      continue;
    }
    add_result<T, A>(s, at, count, task.outputs, task.pitch_o, block, s.of(task.rows2, task.pitch_o), bias, partial);
  }
}

// Strips and groups of chunks counted together.
template <class T, class A>
void forward_units(const Task& task, int64_t begin, int64_t end, char* memory) {
  Arena arena{memory};
  Workspace<A> work(task, arena, false);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t group = unit % task.groups, strip = unit / task.groups;
    const int64_t top = strip % task.strips * task.strip_rows, each = task.group_chunks();
    A* partial = task.partials ? static_cast<A*>(task.partials) + group * task.tokens() * task.pitch_o : nullptr;
    const int64_t from = group * each, to = std::min(task.chunks, from + each);
    for (int64_t chunk = from; chunk < to; ++chunk) {
      const Stream<A> stream{task, work, strip / task.strips, top, std::min(task.height, top + task.strip_rows),
                             chunk * task.chunk, chunk == from, chunk + 1 == to, nullptr, false};
      forward_chunk<T, A>(stream, group ? nullptr : static_cast<const A*>(task.bias2), partial);
    }
  }
}

// The groups' results added up in order, for tokens begin .. end.
template <class T, class A>
void add_partials(const Task& task, int64_t begin, int64_t end, int64_t columns, int64_t pitch) {
  constexpr int64_t lanes = Simd<A>::lanes;
  for (int64_t token = begin; token < end; ++token) {
    const A* from = static_cast<const A*>(task.partials) + token * pitch;
    T* to = static_cast<T*>(task.result) + token * columns;
    for (int64_t c = 0; c < columns; c += lanes) {
      Vec<A> sum = load(from + c);
      for (int64_t group = 1; group < task.groups; ++group) sum += load(from + group * task.tokens() * pitch + c);
      store_as<A>(to + c, sum, static_cast<int>(std::min(lanes, columns - c)));
    }
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::leff

#include "attention/leff_backward.h"

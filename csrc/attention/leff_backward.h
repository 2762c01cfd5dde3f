// The backward kernels of leff.cpp, included by leff_kernels.h. With p1 and p2 what the two activations are applied to,
// a = gelu(p1), u = a * scale + shift, v = gelu(p2) and dX the gradient of X:
//
//   dv = dy W2, dp2 = dv * gelu'(p2), du = the transposed convolution of dp2, dp1 = du * scale * gelu'(p1), dx = dp1 W1
//
// in three stages, each running a row and a token ahead of the next: p1 and u; p2 and dp2; du, dp1 and dx. The parameter
// gradients are summed over the strip's own tokens, block by block.

namespace tersor::leff {
namespace TERSOR_ISA {

// sums[row][chunk] += the products of a block's rows and hidden channels; where they begin, what was there is ignored.
template <class A>
void add_outer(const Rows<A>& rows, int64_t count, int64_t channels, const A* block, int64_t chunk, bool begin,
               A* sums) {
  product_columns<A>(channels, chunk, count, rows.data, 1, rows.pitch, block, chunk,
                     [=](int64_t row) -> const A* { return begin ? nullptr : sums + row * chunk; }, sums, chunk);
}

template <class A>
void add_columns(const Rows<A>& rows, int64_t count, int64_t channels, A* sums) {
  constexpr int64_t lanes = Simd<A>::lanes;
  for (int64_t c = 0; c < channels; c += lanes) {
    const int some = static_cast<int>(std::min(lanes, channels - c));
    Vec<A> total{};
    for (int64_t t = 0; t < count; ++t) total += load_as<A>(rows.data + t * rows.pitch + c, some);
    store<A>(sums + c, load(sums + c) + total);
  }
}

// A run's sums of tap gradients without the taps outside of the map.
template <class A>
void sum_taps_inside(const Task& task, const A* const rows[3], int64_t y, int64_t x, const A* gradient, int64_t count,
                     Vec<A> sum[9]) {
  for (int64_t i = 0; i < 9; ++i) {
    sum[i] = Vec<A>{};
    for (int64_t t = 0; t < count; ++t) {
      const int64_t row = y + i / 3 - 1, column = x + t + i % 3 - 1;
      if (row < 0 || row >= task.height || column < 0 || column >= task.width) continue;
      sum[i] = fma<A>(load(gradient + t * task.chunk), load(rows[i / 3] + (t + i % 3) * task.chunk), sum[i]);
    }
  }
}

// The gradients of the taps and of their bias from a run of tokens, from (y, x) on.
template <class A>
void add_taps(const Task& task, const A* const rows[3], int64_t y, int64_t x, const A* gradient, int64_t count,
              A* taps, A* bias) {
  const int64_t chunk = task.chunk, padded = task.padded_hidden();
  for (int64_t e = 0; e < chunk; e += Simd<A>::lanes) {
    Vec<A> sum[9], total{};
    for (int i = 0; i < 9; ++i) sum[i] = Vec<A>{};
    const A *top = rows[0] + e, *middle = rows[1] + e, *bottom = rows[2] + e, *from = gradient + e;
    for (int64_t t = 0; t < count; ++t, top += chunk, middle += chunk, bottom += chunk, from += chunk) {
      const Vec<A> g = load(from);
      total += g;
      for (int j = 0; j < 3; ++j) {
        sum[j] = fma<A>(g, load(top + j * chunk), sum[j]);
        sum[3 + j] = fma<A>(g, load(middle + j * chunk), sum[3 + j]);
        sum[6 + j] = fma<A>(g, load(bottom + j * chunk), sum[6 + j]);
      }
    }
    Vec<A> all = total;
    for (int i = 0; i < 9; ++i) all += sum[i];
    if (__builtin_expect(to_bits<A>(all - all != A(0)) != 0, 0)) {  // NaN times the padding must count for nothing
      const A* from_e[3] = {rows[0] + e, rows[1] + e, rows[2] + e};
      sum_taps_inside<A>(task, from_e, y, x, gradient + e, count, sum);
    }
    for (int i = 0; i < 9; ++i) store<A>(taps + i * padded + e, load(taps + i * padded + e) + sum[i]);
    store<A>(bias + e, load(bias + e) + total);
  }
}

// Second stage: p2 and its gradient, into the ring. `own`: the block belongs to the strip, not to a neighbour.
template <class T, class A>
void differentiate_outer(const Stream<A>& s, int64_t at, int64_t count, bool own) {
  constexpr int64_t lanes = Simd<A>::lanes;
  const Task& task = s.task;
  Workspace<A>& work = s.work;
  const int64_t chunk = task.chunk;
  const Rows<A> g = tokens_of<T>(task, task.grad_output, s.image, at, count, task.outputs, work.grad);
  convolve_block(s, at, count, work.first);
  if (task.multiplies()) {
    product_columns<A>(count, chunk, task.outputs, g.data, g.pitch, 1, s.of(task.columns2, task.outputs), chunk,
                       [](int64_t) { return nullptr; }, work.second, chunk);
  } else {
    load_map<T, A>(task, task.grad_outer, s.token(at), count, s.first, nullptr, work.second);
  }
  const bool sum = own && s.sums;
  const Sums place(task);
  for_runs(task, at, count, [&](int64_t token, int64_t y, int64_t x, int64_t n) {
    A *values = work.first + token * chunk, *to = work.gradient.token(y, x);
    const A* grads = work.second + token * chunk;
    for (int64_t i = 0; i < n * chunk; i += lanes) {
      Vec<A> value;
      store<A>(to + i, load(grads + i) * gelu_slope<A>(load(values + i), value));
      store<A>(values + i, value);
    }
    if (!sum) return;
    const A* rows[3];
    rows_around(task, work, work.active, y, x, rows);
    add_taps<A>(task, rows, y, x, to, n, s.sums + place.taps + s.first, s.sums + place.tap_bias + s.first);
  });
  if (!sum) return;
  if (task.multiplies()) {
    add_outer(g, count, task.outputs, work.first, chunk, s.fresh && at == s.top * task.width,
              s.sums + place.columns2 + s.first * task.outputs);
  } else {
    store_map<T>(task, work.first, s.token(at), count, s.first, task.outer);
  }
  if (s.first == 0) add_columns(g, count, task.outputs, s.sums + place.bias2);
}

// Third stage: the gradients of p1 and of the input.
template <class T, class A>
void differentiate_inner(const Stream<A>& s, int64_t at, int64_t count, A* partial) {
  constexpr int64_t lanes = Simd<A>::lanes;
  const Task& task = s.task;
  Workspace<A>& work = s.work;
  const int64_t chunk = task.chunk;
  const Sums place(task);
  A* vectors = s.sums ? s.sums + s.first : nullptr;
  for_runs(task, at, count, [&](int64_t token, int64_t y, int64_t x, int64_t n) {
    const A* rows[3];
    rows_around(task, work, work.gradient, y, x, rows);
    A* to = work.first + token * chunk;
    const A* taps = s.of(task.taps);
    if (s.careful()) convolve_inside<A>(task, rows, y, x, n, taps, 8, -1, nullptr, to);
    else convolve<A>(rows, n, chunk, taps, task.padded_hidden(), 8, -1, nullptr, to);
    const A *slopes = work.slope.token(y, x), *raws = task.affine ? work.raw.token(y, x) : nullptr;
    for (int64_t e = 0; e < chunk; e += lanes) {
      Vec<A> shift{}, scale{}, bias{};
      for (int64_t t = e; t < n * chunk; t += chunk) {
        const Vec<A> gradient = load(to + t);
        const Vec<A> inner = gradient * load(slopes + t);
        if (raws) shift += gradient, scale = fma<A>(gradient, load(raws + t), scale);
        bias += inner;
        store<A>(to + t, inner);
      }
      if (!vectors) continue;
      const auto add = [&](int64_t where, Vec<A> sum) {
        A* total = vectors + where + e;
        store<A>(total, load(total) + sum);
      };
      add(place.bias1, bias);
      if (raws) add(place.shift, shift), add(place.scale, scale);
    }
  });
  if (!task.multiplies()) return store_map<T>(task, work.first, s.token(at), count, s.first, task.grad_inner);
  if (s.sums) {
    const Rows<A> x = tokens_of<T>(task, task.input, s.image, at, count, task.channels, work.input);
    add_outer(x, count, task.channels, work.first, chunk, s.fresh && at == s.top * task.width,
              s.sums + place.columns1 + s.first * task.channels);
  }
  if (!task.need_input) return;
  add_result<T, A>(s, at, count, task.channels, task.pitch_c, work.first, s.of(task.rows1, task.pitch_c), nullptr,
                   partial);
}

template <class T, class A>
void backward_chunk(const Stream<A>& s, A* partial) {
  const Task& task = s.task;
  const int64_t width = task.width, first = s.top * width, end = s.bottom * width;
  const int64_t last_outer = std::min(task.height, s.bottom + 1) * width;
  const int64_t last_active = std::min(task.height, s.bottom + 2) * width;
  int64_t active = std::max<int64_t>(0, s.top - 2) * width, outer = std::max<int64_t>(0, s.top - 1) * width;
  for (int64_t at = first; at < end; at += BLOCK) {
    const int64_t count = std::min(BLOCK, end - at), needed = std::min(last_outer, at + count + width + 1);
    for (int64_t n; outer < needed; outer += n) {
      const int64_t border = outer < first ? first : outer < end ? end : needed;
      n = std::min({BLOCK, needed - outer, border - outer});
      const int64_t ahead = std::min(last_active, outer + n + width + 1);
      for (int64_t m; active < ahead; active += m) {
        m = std::min(BLOCK, ahead - active);
        activate<T, A, true>(s, active, m);
      }
      differentiate_outer<T, A>(s, outer, n, outer >= first && outer < end);
    }
    differentiate_inner<T, A>(s, at, count, partial);
  }
}

// Blocks of strips and groups of chunks counted together.
template <class T, class A>
void backward_units(const Task& task, int64_t begin, int64_t end, char* memory) {
  Arena arena{memory};
  Workspace<A> work(task, arena, true);
  const Sums place(task);
  const int64_t padded = task.padded_hidden();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t group = unit % task.groups, block = unit / task.groups, each = task.group_chunks();
    const int64_t from = group * each, to = std::min(task.chunks, from + each);
    A* partial = task.partials ? static_cast<A*>(task.partials) + group * task.tokens() * task.pitch_c : nullptr;
    A* sums = task.sums ? static_cast<A*>(task.sums) + block * place.size : nullptr;
    if (sums) {
      const int64_t first = from * task.chunk, hidden = (to - from) * task.chunk;
      const auto clear = [&](int64_t where, int64_t count) { std::memset(sums + where, 0, count * sizeof(A)); };
      if (task.batch == 0 && task.multiplies()) {
        clear(place.columns1 + first * task.channels, hidden * task.channels);
        clear(place.columns2 + first * task.outputs, hidden * task.outputs);
      }
      for (int64_t tap = 0; tap < 9; ++tap) clear(place.taps + tap * padded + first, hidden);
      for (int64_t where : {place.tap_bias, place.bias1, place.scale, place.shift}) clear(where + first, hidden);
      if (group == 0) clear(place.bias2, place.size - place.bias2);
    }
    const int64_t last = std::min(task.batch * task.strips, (block + 1) * task.block_strips);
    for (int64_t strip = block * task.block_strips; strip < last; ++strip) {
      const int64_t top = strip % task.strips * task.strip_rows;
      for (int64_t chunk = from; chunk < to; ++chunk) {
        const Stream<A> stream{task, work, strip / task.strips, top, std::min(task.height, top + task.strip_rows),
                               chunk * task.chunk, chunk == from, chunk + 1 == to, sums,
                               strip == block * task.block_strips};
        backward_chunk<T, A>(stream, partial);
      }
    }
  }
}

// ---- The parameter gradients from the blocks' sums ----

// The blocks' sums at `where`, added up in order into the first block's.
template <class A>
void add_blocks(const Task& task, int64_t where, int64_t count) {
  if (task.blocks == 1) return;
  const int64_t size = Sums(task).size;
  A* to = static_cast<A*>(task.sums) + where;
  for (int64_t i = 0; i < count; ++i) {
    A total = to[i];
    for (int64_t block = 1; block < task.blocks; ++block) total += to[block * size + i];
    to[i] = total;
  }
}

template <class T, class A>
void write_vector(const A* from, int64_t count, int64_t step, void* to) {
  if (!to) return;
  for (int64_t i = 0; i < count; ++i) static_cast<T*>(to)[i * step] = static_cast<T>(from[i]);
}

// The gradients of one chunk's weights; the caller's memory holds [lanes][channels to whole vectors].
template <class T, class A>
void write_weights(const Task& task, const Gradients& out, int64_t first, int64_t present, A* rows) {
  constexpr int64_t lanes = Simd<A>::lanes;
  const Sums place(task);
  const int64_t chunk = task.chunk, channels = task.channels, outputs = task.outputs;
  A* sums = static_cast<A*>(task.sums);
  const int64_t columns1 = place.columns1 + first * channels, columns2 = place.columns2 + first * outputs;
  add_blocks<A>(task, columns1, chunk * channels);
  add_blocks<A>(task, columns2, chunk * outputs);
  T* weight2 = static_cast<T*>(out.weight2) + first;
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t e = 0; e < present; e += lanes) {
      store_as<A>(weight2 + o * task.hidden + e, load(sums + columns2 + o * chunk + e),
                  static_cast<int>(std::min(lanes, present - e)));
    }
  }
  for (int64_t e = 0; e < present; e += lanes) {
    const int64_t here = std::min(lanes, present - e);
    for (int64_t c = 0; c < channels; c += lanes) {
      const int some = static_cast<int>(std::min(lanes, channels - c));
      transpose_in(sums + columns1 + c * chunk + e, chunk, some, here, rows + c, task.pitch_c);
    }
    T* weight1 = static_cast<T*>(out.weight1) + (first + e) * channels;
    for (int64_t r = 0; r < here; ++r) {
      for (int64_t c = 0; c < channels; c += lanes) {
        store_as<A>(weight1 + r * channels + c, load(rows + r * task.pitch_c + c),
                    static_cast<int>(std::min(lanes, channels - c)));
      }
    }
  }
}

// For chunks begin .. end.
template <class T, class A>
void write_gradients(const Task& task, const Gradients& out, int64_t begin, int64_t end, A* rows) {
  const Sums place(task);
  const int64_t chunk = task.chunk, padded = task.padded_hidden(), outputs = task.outputs;
  A* sums = static_cast<A*>(task.sums);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i * chunk, present = std::min(chunk, task.hidden - first);
    if (task.multiplies()) write_weights<T, A>(task, out, first, present, rows);
    const auto vector = [&](int64_t where, int64_t step, void* to) {
      add_blocks<A>(task, where + first, present);
      if (to) write_vector<T>(sums + where + first, present, step, static_cast<T*>(to) + first * step);
    };
    for (int64_t tap = 0; tap < 9; ++tap) vector(place.taps + tap * padded, 9, static_cast<T*>(out.taps) + tap);
    vector(place.tap_bias, 1, out.tap_bias);
    vector(place.bias1, 1, out.bias1);
    vector(place.scale, 1, out.scale);
    vector(place.shift, 1, out.shift);
    if (i > 0) continue;
    add_blocks<A>(task, place.bias2, outputs);
    write_vector<T>(sums + place.bias2, outputs, 1, out.bias2);
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::leff

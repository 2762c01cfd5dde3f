// The kernels of lts_quantize.cpp, compiled once per instruction set (foreach_isa.h includes this file).

namespace tersor::lts {
namespace TERSOR_ISA {

using namespace ::tersor::TERSOR_ISA;
using namespace ::tersor::freezing;

template <class A>
struct Bytes {
  typedef uint8_t Vec __attribute__((vector_size(Simd<A>::lanes)));
};

// To [0, 1]; NaN stays.
template <class V>
TERSOR_INLINE V clamp(V x) {
  x = x < 0 ? V{} : x;
  return x > 1 ? V{} + 1 : x;
}

// All in the written order, divisions rounded as by IEEE: the distances are compared exactly.
template <class T, class A>
struct Forward {
  static constexpr int lanes = Simd<A>::lanes;
  using Mask = typename Simd<A>::Mask;
  using Code = typename Bytes<A>::Vec;

  const Task& task;
  const T* weight = static_cast<const T*>(task.weight);
  T* saved = static_cast<T*>(task.saved);
  T* output = static_cast<T*>(task.output);
  A* distance = static_cast<A*>(task.distance);
  const Vec<A> lower = splat(static_cast<A>(task.lower));
  const Vec<A> range = splat(static_cast<A>(static_cast<A>(task.upper) - static_cast<A>(task.lower)));
  const Vec<A> levels = splat(static_cast<A>(task.levels));
  const Vec<A> jump = splat(static_cast<A>(1.0 / task.levels));
  const Vec<A> keep = splat(static_cast<A>(task.momentum)), take = splat(static_cast<A>(1 - task.momentum));
  const Vec<A> threshold = splat(static_cast<A>(task.threshold));

  // Elements at to at + count; the bits of those that are frozen come in and, with those that froze now, go out.
  TERSOR_INLINE uint32_t step(const Forward& f, int64_t at, int count, uint32_t bits) {
    Vec<A> w = load_as<A>(f.weight + at, count);
    if (f.saved) {
      w = from_bits<A>(bits) ? load_as<A>(f.saved + at, count) : w;
      store_as<A>(f.saved + at, w, count);
    }
    const Vec<A> place = (w - f.lower) / f.range;
    const Vec<A> code = round_even<A>(clamp(place) * f.levels);
    const Vec<A> level = code / f.levels;
    store_as<A>(f.output + at, (level - A(0.5)) * A(2), count);
    return f.task.update ? update(f, at, count, bits, place, code, level) : bits;
  }

  TERSOR_INLINE uint32_t update(const Forward& f, int64_t at, int count, uint32_t bits, Vec<A> place, Vec<A> code,
                                Vec<A> level) {
    const Mask number = place == place;
    const Mask whole = __builtin_convertvector(number ? code : Vec<A>{}, Mask);
    Code old{};
    __builtin_memcpy(&old, f.task.code + at, static_cast<size_t>(count));
    const Mask moved = (whole != __builtin_convertvector(old, Mask)) | ~number;
    const Code now = __builtin_convertvector(whole, Code);
    __builtin_memcpy(f.task.code + at, &now, static_cast<size_t>(count));
    Vec<A> away = place - level;
    away = away < 0 ? -away : away;
    if (!f.task.second) {
      const Vec<A> running = f.take * away + f.keep * load_as<A>(f.distance + at, count);
      away = moved ? f.jump : running;
    }
    store_as<A>(f.distance + at, away, count);
    if (!f.task.settle) return bits;
    const uint32_t all = bits | (to_bits<A>(away <= f.threshold) & ((uint64_t(1) << count) - 1));
    if (f.task.frozen_step && all != bits) {
      for (int i = 0; i < count; ++i) {
        if ((all & ~bits) >> i & 1) f.task.frozen_step[at + i] = static_cast<int32_t>(f.task.step);
      }
    }
    return all;
  }
};

template <class T, class A>
static int64_t forward(const Task& task, int64_t first, int64_t end) {
  constexpr int lanes = Simd<A>::lanes;
  const Forward<T, A> f{task};
  int64_t count = 0;
  for (int64_t group = first; group < end; group += GROUP) {
    const uint64_t before = load_bits(task.frozen, group, task.elements);
    uint64_t after = 0;
    for (int64_t at = group; at < std::min(end, group + GROUP); at += lanes) {
      const int shift = static_cast<int>(at - group);
      const uint32_t bits = static_cast<uint32_t>(before >> shift) & static_cast<uint32_t>((uint64_t(1) << lanes) - 1);
      const int left = static_cast<int>(std::min<int64_t>(lanes, end - at));
      after |= static_cast<uint64_t>(Forward<T, A>::step(f, at, left, bits)) << shift;
    }
    store_bits(task.before, group, task.elements, before);
    if (after == before) continue;
    store_bits(task.frozen, group, task.elements, after);
    count += __builtin_popcountll(after & ~before);
  }
  return count;
}

template <class T, class A>
static void backward(const Gradient& task, int64_t first, int64_t end, double sums[2]) {
  constexpr int lanes = Simd<A>::lanes;
  const T* g = static_cast<const T*>(task.grad_output);
  const T* weight = static_cast<const T*>(task.weight);
  const T* saved = static_cast<const T*>(task.saved);
  T* output = static_cast<T*>(task.grad_weight);
  const Vec<A> lower = splat(static_cast<A>(task.lower));
  const Vec<A> range = splat(static_cast<A>(static_cast<A>(task.upper) - static_cast<A>(task.lower)));
  for (int64_t group = first; group < end; group += GROUP) {
    const uint64_t word = load_bits(task.frozen, group, task.elements);
    Vec<A> below{}, above{};
    for (int64_t at = group; at < std::min(end, group + GROUP); at += lanes) {
      const int count = static_cast<int>(std::min<int64_t>(lanes, end - at));
      const auto frozen = from_bits<A>(static_cast<uint32_t>(word >> (at - group)));
      Vec<A> w = load_as<A>(weight + at, count);
      if (saved && word != 0) w = frozen ? load_as<A>(saved + at, count) : w;
      const Vec<A> place = (w - lower) / range;
      Vec<A> grad = load_as<A>(g + at, count) * A(2) / range;
      const auto inside = (place >= 0) & (place <= 1);
      grad = inside ? grad : Vec<A>{};
      const Vec<A> clamped = clamp(place);  // a place far outside would make 0 * inf
      below += grad * (clamped - A(1)), above += grad * clamped;
      store_as<A>(output + at, frozen ? Vec<A>{} : grad, count);
    }
    for (int i = 0; i < lanes; ++i) sums[0] += below[i], sums[1] += above[i];
  }
}

template <class A>
static int64_t within(const void* distance, int64_t first, int64_t end, double threshold) {
  const A* d = static_cast<const A*>(distance);
  const A limit = static_cast<A>(threshold);
  int64_t count = 0;
  for (int64_t i = first; i < end; ++i) count += d[i] <= limit;
  return count;
}

template <class T, class A>
static Kernels lts_kernels() {
  return {forward<T, A>, backward<T, A>, within<A>};
}

}  // namespace TERSOR_ISA
}  // namespace tersor::lts

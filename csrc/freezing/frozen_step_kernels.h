// The walk of frozen_step.h at one instruction set; a rule says what happens to a vector in which something is free.

namespace tersor::freezing {
namespace TERSOR_ISA {

using namespace ::tersor::TERSOR_ISA;

template <class Rule, class T, class A>
static void frozen_step(const Step& step, int64_t first, int64_t end) {
  constexpr int lanes = Simd<A>::lanes;
  constexpr uint32_t every = static_cast<uint32_t>((uint64_t(1) << lanes) - 1);
  const Rule rule(step);
  T* parameter = static_cast<T*>(step.parameter);
  const T* gradient = static_cast<const T*>(step.gradient);
  for (int64_t group = first; group < end; group += GROUP) {
    const uint64_t word = load_bits(step.frozen, group, step.elements);
    if (word == ~uint64_t(0) && !step.first) continue;
    if (word == 0 && end - group >= GROUP) {
      for (int64_t at = group; at < group + GROUP; at += lanes) {
        Vec<A> buffer[MOST_BUFFERS];
        for (int i = 0; i < Rule::BUFFERS; ++i) {
          buffer[i] = step.first ? Vec<A>{} : widen(static_cast<const T*>(step.buffer[i]) + at);
        }
        const Vec<A> g = widen(gradient + at);
        narrow(parameter + at, rule.step(widen(parameter + at), step.negate ? -g : g, buffer));
        for (int i = 0; i < Rule::BUFFERS; ++i) narrow(static_cast<T*>(step.buffer[i]) + at, buffer[i]);
      }
      continue;
    }
    for (int64_t at = group; at < std::min(end, group + GROUP); at += lanes) {
      const uint32_t bits = static_cast<uint32_t>(word >> (at - group)) & every;
      if (bits == every && !step.first) continue;
      const int count = static_cast<int>(std::min<int64_t>(lanes, end - at));
      const auto frozen = from_bits<A>(bits);
      Vec<A> buffer[MOST_BUFFERS], old[MOST_BUFFERS];
      for (int i = 0; i < Rule::BUFFERS; ++i) {
        T* own = static_cast<T*>(step.buffer[i]) + at;
        buffer[i] = old[i] = step.first ? Vec<A>{} : load_as<A>(own, count);
      }
      Vec<A> g = load_as<A>(gradient + at, count);
      g = step.negate ? -g : g;
      const Vec<A> value = load_as<A>(parameter + at, count);
      const Vec<A> moved = rule.step(value, g, buffer);
      for (int i = 0; i < Rule::BUFFERS; ++i) {
        store_as<A>(static_cast<T*>(step.buffer[i]) + at, frozen ? old[i] : buffer[i], count);
      }
      store_as<A>(parameter + at, frozen ? value : moved, count);
    }
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::freezing

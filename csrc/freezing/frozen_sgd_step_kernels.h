// The rule of frozen_sgd_step.cpp, compiled once per instruction set (foreach_isa.h includes this file).
#include "freezing/frozen_step_kernels.h"

namespace tersor::freezing {
namespace TERSOR_ISA {

template <class A, int COUNT>
struct Sgd {
  static constexpr int BUFFERS = COUNT;  // 1 with momentum
  const A lr, momentum, take, decay;
  const bool nesterov, first;

  explicit Sgd(const Step& s)
      : lr(static_cast<A>(s.factor[0])), momentum(static_cast<A>(s.factor[1])), take(static_cast<A>(s.factor[2])),
        decay(static_cast<A>(s.factor[3])), nesterov(s.nesterov), first(s.first) {}

  __attribute__((always_inline)) Vec<A> step(Vec<A> value, Vec<A> g, Vec<A>* buffer) const {
    if (decay != 0) g = g + value * decay;
    if constexpr (COUNT == 0) return value - g * lr;
    buffer[0] = first ? g : buffer[0] * momentum + g * take;
    return value - (nesterov ? g + buffer[0] * momentum : buffer[0]) * lr;
  }
};

template <class T, class A>
static Kernel sgd_kernel(bool buffered) {
  return buffered ? frozen_step<Sgd<A, 1>, T, A> : frozen_step<Sgd<A, 0>, T, A>;
}

}  // namespace TERSOR_ISA
}  // namespace tersor::freezing

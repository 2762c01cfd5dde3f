// The rule of frozen_adamw_step.cpp, compiled once per instruction set (foreach_isa.h includes this file).
#include "freezing/frozen_step_kernels.h"

namespace tersor::freezing {
namespace TERSOR_ISA {

template <class A>
struct AdamW {
  static constexpr int BUFFERS = 2;
  const A size, keep, beta1, take1, beta2, take2, root, eps;

  explicit AdamW(const Step& s)
      : size(static_cast<A>(s.factor[0])), keep(static_cast<A>(s.factor[1])), beta1(static_cast<A>(s.factor[2])),
        take1(static_cast<A>(s.factor[3])), beta2(static_cast<A>(s.factor[4])), take2(static_cast<A>(s.factor[5])),
        root(static_cast<A>(s.factor[6])), eps(static_cast<A>(s.factor[7])) {}

  __attribute__((always_inline)) Vec<A> step(Vec<A> value, Vec<A> g, Vec<A>* buffer) const {
    buffer[0] = buffer[0] * beta1 + g * take1;
    buffer[1] = buffer[1] * beta2 + g * take2 * g;
    return value * keep - buffer[0] * size / (sqrt(buffer[1]) / root + eps);
  }
};

template <class T, class A>
static Kernel adamw_kernel() {
  return frozen_step<AdamW<A>, T, A>;
}

}  // namespace TERSOR_ISA
}  // namespace tersor::freezing

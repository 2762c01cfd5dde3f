// The rule of fake_quantize_lsq_plus.cpp, compiled once per instruction set (foreach_isa.h includes this file).
#include "quantization/fake_quantize_loops.h"

namespace tersor::fake_quantize {
namespace TERSOR_ISA {

// option: levels, grad_factor.
template <class A, bool FAST>
struct LsqPlus {
  static constexpr int INPUTS = 1, PARAMETERS = 2, CONSTANTS = 6, SUMS = 2;
  enum { SCALE, RECIPROCAL, OFFSET, LEVELS, LEAST, GREATEST };

  static void prepare(const A* p, const double* option, A* c) {
    c[SCALE] = p[0], c[RECIPROCAL] = A(1) / p[0], c[OFFSET] = p[1], c[LEVELS] = static_cast<A>(option[0]);
    c[LEAST] = -p[0], c[GREATEST] = (c[LEVELS] + A(1)) * p[0];  // farther out is clipped anyway
  }

  TERSOR_INLINE Vec<A> value(Vec<A> x, const Vec<A>* c) {
    return divide<FAST, A>(at_least<A>(at_most<A>(x - c[OFFSET], c[GREATEST]), c[LEAST]), c[SCALE], c[RECIPROCAL]);
  }

  TERSOR_INLINE Vec<A> quantize(const Vec<A>* x, const Vec<A>* c) {
    const Vec<A> code = round_even<A>(at_most<A>(at_least<A>(value(x[0], c), Vec<A>{}), c[LEVELS]));
    return code * c[SCALE] + c[OFFSET];
  }

  TERSOR_INLINE void differentiate(Vec<A> g, const Vec<A>* x, const Vec<A>* c, Vec<A>* sum, Vec<A>* grad) {
    const Vec<A> zero{}, v = value(x[0], c);
    const Vec<A> clipped = at_most<A>(at_least<A>(v, zero), c[LEVELS]);
    const Vec<A> error = round_even<A>(clipped) - v;
    const Vec<A> above = v >= c[LEVELS] ? clipped : error, step = v <= zero ? clipped : above;
    const Vec<A> below = v >= c[LEVELS] ? zero : g, inside = v <= zero ? zero : below;
    sum[0] += g * step;
    sum[1] += g - inside;
    grad[0] = inside;
  }

  static void finish(const double* sum, const A*, const double* option, double* grad) {
    grad[0] = option[1] * sum[0], grad[1] = option[1] * sum[1];
  }
};

template <class T, class A>
static Kernels<A> lsq_plus_kernels(bool fast) {
  return kernels_by_division<LsqPlus, T, A>(fast);
}

}  // namespace TERSOR_ISA
}  // namespace tersor::fake_quantize

// The rules of fake_quantize_bounds.cpp, compiled once per instruction set (foreach_isa.h includes this file).
#include "quantization/fake_quantize_loops.h"
#include "quantization/fake_quantize_ddtb.h"

namespace tersor::fake_quantize {
namespace TERSOR_ISA {

// option: levels, output's shift and factor, floor, grad_scale.
template <class A, bool FAST>
struct Unit {
  static constexpr int INPUTS = 1, PARAMETERS = 2, CONSTANTS = 10, SUMS = 2;
  enum { LOWER, RANGE, RECIPROCAL, LEVELS, LEVELS_RECIPROCAL, SHIFT, FACTOR, FLOOR, LEAST, GREATEST };

  static void prepare(const A* bound, const double* option, A* c) {
    c[LOWER] = bound[0], c[RANGE] = bound[1] - bound[0], c[RECIPROCAL] = A(1) / c[RANGE];
    c[LEVELS] = static_cast<A>(option[0]), c[LEVELS_RECIPROCAL] = A(1) / c[LEVELS];
    c[SHIFT] = static_cast<A>(option[1]), c[FACTOR] = static_cast<A>(option[2]), c[FLOOR] = static_cast<A>(option[3]);
    c[GREATEST] = A(2) * c[RANGE], c[LEAST] = -c[GREATEST];  // farther out is clipped all the same
  }

  TERSOR_INLINE Vec<A> place(Vec<A> x, const Vec<A>* c) {
    const Vec<A> distance = at_least<A>(x, c[FLOOR]) - c[LOWER];
    return divide<FAST, A>(at_least<A>(at_most<A>(distance, c[GREATEST]), c[LEAST]), c[RANGE], c[RECIPROCAL]);
  }

  TERSOR_INLINE Vec<A> clamped(Vec<A> place) {
    return at_most<A>(at_least<A>(place, Vec<A>{}), splat(A(1)));
  }

  TERSOR_INLINE Vec<A> quantize(const Vec<A>* x, const Vec<A>* c) {
    const Vec<A> code = round_even<A>(clamped(place(x[0], c)) * c[LEVELS]);
    return (divide<FAST, A>(code, c[LEVELS], c[LEVELS_RECIPROCAL]) - c[SHIFT]) * c[FACTOR];
  }

  TERSOR_INLINE void differentiate(Vec<A> g, const Vec<A>* x, const Vec<A>* c, Vec<A>* sum, Vec<A>* grad) {
    const Vec<A> zero{}, one = splat(A(1)), p = place(x[0], c), q = clamped(p);
    const Vec<A> inside = p >= zero ? g * c[FACTOR] / c[RANGE] : zero;
    const Vec<A> kept = p <= one ? inside : zero;
    sum[0] += kept * (q - one);
    sum[1] += kept * q;
    grad[0] = x[0] <= c[FLOOR] ? zero : kept;
  }

  static void finish(const double* sum, const A*, const double* option, double* grad) {
    grad[0] = option[4] * sum[0], grad[1] = -option[4] * sum[1];
  }
};

template <class T, class A>
static Kernels<A> bounds_kernels(bool unit, bool relu, bool fast) {
  if (relu && !unit) return kernels_by_division<DdtbAfterRelu, T, A>(fast);
  return unit ? kernels_by_division<Unit, T, A>(fast) : kernels_by_division<Ddtb, T, A>(fast);
}

}  // namespace TERSOR_ISA
}  // namespace tersor::fake_quantize

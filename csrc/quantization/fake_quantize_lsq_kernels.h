// The rule of fake_quantize_lsq.cpp, compiled once per instruction set (foreach_isa.h includes this file).
#include "quantization/fake_quantize_loops.h"

namespace tersor::fake_quantize {
namespace TERSOR_ISA {

// option: lowest level, highest level, grad_factor.
template <class A, bool FAST>
struct Lsq {
  static constexpr int INPUTS = 1, PARAMETERS = 1, CONSTANTS = 6, SUMS = 1;
  enum { SCALE, RECIPROCAL, LOWEST, HIGHEST, LEAST, GREATEST };

  static void prepare(const A* p, const double* option, A* c) {
    c[SCALE] = p[0], c[RECIPROCAL] = A(1) / p[0];
    c[LOWEST] = static_cast<A>(option[0]), c[HIGHEST] = static_cast<A>(option[1]);
    c[LEAST] = (c[LOWEST] - A(1)) * p[0], c[GREATEST] = (c[HIGHEST] + A(1)) * p[0];  // farther out is clipped anyway
  }

  TERSOR_INLINE Vec<A> value(Vec<A> x, const Vec<A>* c) {
    return divide<FAST, A>(at_least<A>(at_most<A>(x, c[GREATEST]), c[LEAST]), c[SCALE], c[RECIPROCAL]);
  }

  TERSOR_INLINE Vec<A> quantize(const Vec<A>* x, const Vec<A>* c) {
    return round_even<A>(at_most<A>(at_least<A>(value(x[0], c), c[LOWEST]), c[HIGHEST])) * c[SCALE];
  }

  TERSOR_INLINE void differentiate(Vec<A> g, const Vec<A>* x, const Vec<A>* c, Vec<A>* sum, Vec<A>* grad) {
    const Vec<A> zero{}, v = value(x[0], c);
    const Vec<A> clipped = at_most<A>(at_least<A>(v, c[LOWEST]), c[HIGHEST]);
    const Vec<A> error = round_even<A>(clipped) - v;
    const Vec<A> above = v >= c[HIGHEST] ? clipped : error, step = v <= c[LOWEST] ? clipped : above;
    sum[0] += g * step;
    const Vec<A> below = v >= c[HIGHEST] ? zero : g;
    grad[0] = v <= c[LOWEST] ? zero : below;
  }

  static void finish(const double* sum, const A*, const double* option, double* grad) { grad[0] = option[2] * sum[0]; }
};

template <class T, class A>
static Kernels<A> lsq_kernels(bool fast) {
  return kernels_by_division<Lsq, T, A>(fast);
}

}  // namespace TERSOR_ISA
}  // namespace tersor::fake_quantize

// The rule of fake_quantize_affine.cpp, compiled once per instruction set (foreach_isa.h includes this file).
#include "quantization/fake_quantize_loops.h"

namespace tersor::fake_quantize {
namespace TERSOR_ISA {

// option: lowest level, highest level, grad_factor, corrected.
template <class A, bool FAST, bool CORRECTED>
struct Affine {
  static constexpr int INPUTS = 1, PARAMETERS = 2, CONSTANTS = 8, SUMS = 3;
  enum { SCALE, RECIPROCAL, ZERO, BACKWARD_ZERO, LOWEST, HIGHEST, LEAST, GREATEST };

  static A clamp(A x, A low, A high) { return x < low ? low : x > high ? high : x; }

  static void prepare(const A* p, const double* option, A* c) {
    c[SCALE] = p[0], c[RECIPROCAL] = A(1) / p[0];
    c[LOWEST] = static_cast<A>(option[0]), c[HIGHEST] = static_cast<A>(option[1]);
    c[ZERO] = clamp(static_cast<A>(__builtin_nearbyint(p[1])), c[LOWEST], c[HIGHEST]);
    c[BACKWARD_ZERO] = static_cast<A>(__builtin_trunc(clamp(p[1] + A(0.5), c[LOWEST], c[HIGHEST])));
    if (CORRECTED) c[BACKWARD_ZERO] = c[ZERO];
    c[GREATEST] = A(1 << 25) * p[0], c[LEAST] = -c[GREATEST];  // farther out is clipped anyway: levels are within 2^23
  }

  TERSOR_INLINE Vec<A> value(Vec<A> x, const Vec<A>* c) {
    if constexpr (!CORRECTED) return x * c[RECIPROCAL];
    return divide<FAST, A>(at_least<A>(at_most<A>(x, c[GREATEST]), c[LEAST]), c[SCALE], c[RECIPROCAL]);
  }

  TERSOR_INLINE Vec<A> quantize(const Vec<A>* x, const Vec<A>* c) {
    const Vec<A> level = round_even<A>(value(x[0], c)) + c[ZERO];
    return (at_most<A>(at_least<A>(level, c[LOWEST]), c[HIGHEST]) - c[ZERO]) * c[SCALE];
  }

  TERSOR_INLINE void differentiate(Vec<A> g, const Vec<A>* x, const Vec<A>* c, Vec<A>* sum, Vec<A>* grad) {
    const Vec<A> zero{}, v = value(x[0], c);
    const Vec<A> level = CORRECTED ? round_even<A>(v) + c[ZERO] : round_even<A>(v + c[BACKWARD_ZERO]);
    const Vec<A> clamped = at_most<A>(at_least<A>(level, c[LOWEST]), c[HIGHEST]);
    const Vec<A> not_above = level <= c[HIGHEST] ? g : zero, inside = level >= c[LOWEST] ? not_above : zero;
    const Vec<A> error = (level - c[BACKWARD_ZERO]) * c[SCALE] - x[0], outside = clamped - c[BACKWARD_ZERO];
    // Told apart by the level, not by the gradient, which may be zero or infinite.
    const Vec<A> low_error = level >= c[LOWEST] ? error : zero;
    const Vec<A> low_outside = level >= c[LOWEST] ? zero : outside;
    sum[0] += g * (level <= c[HIGHEST] ? low_error : zero);
    sum[1] += g * (level <= c[HIGHEST] ? low_outside : outside);
    sum[2] += g - inside;
    grad[0] = inside;
  }

  static void finish(const double* sum, const A* c, const double* option, double* grad) {
    grad[0] = option[2] * (sum[0] / static_cast<double>(c[SCALE]) + sum[1]);
    grad[1] = -option[2] * static_cast<double>(c[SCALE]) * sum[2];
  }
};

template <class A, bool FAST>
using AsTorch = Affine<A, FAST, false>;
template <class A, bool FAST>
using Corrected = Affine<A, FAST, true>;

template <class T, class A>
static Kernels<A> affine_kernels(bool corrected, bool fast) {
  // Torch's own formula multiplies by a reciprocal and divides nowhere.
  return corrected ? kernels_by_division<Corrected, T, A>(fast) : kernels_of<AsTorch<A, false>, T, A>();
}

}  // namespace TERSOR_ISA
}  // namespace tersor::fake_quantize

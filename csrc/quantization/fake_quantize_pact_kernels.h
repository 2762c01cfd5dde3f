// The rule of fake_quantize_pact.cpp, compiled once per instruction set (foreach_isa.h includes this file).
#include "quantization/fake_quantize_loops.h"

namespace tersor::fake_quantize {
namespace TERSOR_ISA {

// option: levels; 0 clips only.
template <class A, bool FAST>
struct Pact {
  static constexpr int INPUTS = 1, PARAMETERS = 1, CONSTANTS = 4, SUMS = 1;
  enum { ALPHA, RECIPROCAL, LEVELS, LEVELS_RECIPROCAL };

  static void prepare(const A* p, const double* option, A* c) {
    c[ALPHA] = p[0], c[RECIPROCAL] = A(1) / p[0];
    c[LEVELS] = static_cast<A>(option[0]), c[LEVELS_RECIPROCAL] = A(1) / c[LEVELS];
  }

  TERSOR_INLINE Vec<A> quantize(const Vec<A>* x, const Vec<A>* c) {
    const Vec<A> clipped = at_most<A>(at_least<A>(x[0], Vec<A>{}), c[ALPHA]);
    const Vec<A> code = round_even<A>(divide<FAST, A>(clipped * c[LEVELS], c[ALPHA], c[RECIPROCAL]));
    const Vec<A> output = divide<FAST, A>(code * c[ALPHA], c[LEVELS], c[LEVELS_RECIPROCAL]);
    return c[LEVELS] == Vec<A>{} ? clipped : output;
  }

  TERSOR_INLINE void differentiate(Vec<A> g, const Vec<A>* x, const Vec<A>* c, Vec<A>* sum, Vec<A>* grad) {
    const Vec<A> zero{};
    sum[0] += x[0] >= c[ALPHA] ? g : zero;
    const Vec<A> below = x[0] >= c[ALPHA] ? zero : g;
    grad[0] = x[0] < zero ? zero : below;
  }

  static void finish(const double* sum, const A*, const double*, double* grad) { grad[0] = sum[0]; }
};

template <class T, class A>
static Kernels<A> pact_kernels(bool fast) {
  return kernels_by_division<Pact, T, A>(fast);
}

}  // namespace TERSOR_ISA
}  // namespace tersor::fake_quantize

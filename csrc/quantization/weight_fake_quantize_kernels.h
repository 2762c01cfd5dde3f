// The rules of weight_fake_quantize.cpp, compiled once per instruction set (foreach_isa.h includes this file).
#include "quantization/fake_quantize_loops.h"
#include "quantization/fake_quantize_ddtb.h"

namespace tersor::fake_quantize {
namespace TERSOR_ISA {

// option: levels on each side of zero. The parameters are the bounds; the gradient is the incoming one.
template <class A, bool FAST>
struct Symmetric {
  static constexpr int INPUTS = 1, PARAMETERS = 2, CONSTANTS = 4, SUMS = 1;
  enum { LARGEST, RECIPROCAL, LEVELS, LEVELS_RECIPROCAL };

  static void prepare(const A* p, const double* option, A* c) {
    c[LARGEST] = p[1], c[RECIPROCAL] = A(1) / p[1];
    c[LEVELS] = static_cast<A>(option[0]), c[LEVELS_RECIPROCAL] = A(1) / c[LEVELS];
  }
  TERSOR_INLINE Vec<A> quantize(const Vec<A>* x, const Vec<A>* c) {
    const Vec<A> code = round_even<A>(divide<FAST, A>(x[0] * c[LEVELS], c[LARGEST], c[RECIPROCAL]));
    return divide<FAST, A>(code * c[LARGEST], c[LEVELS], c[LEVELS_RECIPROCAL]);
  }
  TERSOR_INLINE void differentiate(Vec<A> g, const Vec<A>*, const Vec<A>*, Vec<A>*, Vec<A>* grad) { grad[0] = g; }
  static void finish(const double*, const A*, const double*, double* grad) { grad[0] = grad[1] = 0; }
};

template <class T, class A>
static Kernels<A> weight_kernels(bool symmetric, bool fast) {
  return symmetric ? kernels_by_division<Symmetric, T, A>(fast) : kernels_by_division<Ddtb, T, A>(fast);
}

// Least and greatest of a run; NaN for both if an element is not finite.
template <class T, class A>
static void extremes(const T* p, int64_t count, A result[2]) {
  constexpr int lanes = Simd<A>::lanes;
  const A first = static_cast<A>(p[0]);
  Vec<A> least = splat(first), greatest = least, poison{};  // x - x is 0, or NaN if x is not finite
  int64_t at = 0;
  for (; at + lanes <= count; at += lanes) {
    const Vec<A> x = load_as<A>(p + at, lanes);
    least = x < least ? x : least, greatest = x > greatest ? x : greatest, poison += x - x;
  }
  A low = first, high = first, bad = first - first;
  for (int i = 0; i < lanes; ++i) low = std::min(low, least[i]), high = std::max(high, greatest[i]), bad += poison[i];
  for (; at < count; ++at) {
    const A x = static_cast<A>(p[at]);
    low = std::min(low, x), high = std::max(high, x), bad += x - x;
  }
  result[0] = low + bad, result[1] = high + bad;
}

}  // namespace TERSOR_ISA
}  // namespace tersor::fake_quantize

// The DDTB rule (pyops/quantization/fake_quantize_bounds.py); part of a body that is compiled once per instruction set.

namespace tersor::fake_quantize {
namespace TERSOR_ISA {

template <class A>
TERSOR_INLINE A round_scalar(A x) {
  return static_cast<A>(__builtin_nearbyint(x));
}

// One quantiser's constants and formulas; option: levels, zero's offset, tie, floor (0 for a ReLU), grad_scale.
//
// FAST takes two shortcuts, which `exact` verifies beforehand for each of the at most 257 codes there are: a product
// with the reciprocal and one correction for the division by the scale, and rounding by adding 1.5 * 2^23, which
// leaves the sum with the zero point a single subtraction.
template <class A, bool FAST, bool RELU = false>
struct Bounds {
  static constexpr int CONSTANTS = 9, SUMS = 3;
  enum { LOWER, UPPER, SCALE, ZERO, RECIPROCAL, TIE, LEAST, RANGE, BACK };
  static constexpr A ROUND = A(12582912);

  static void prepare(const A* bound, const double* option, A* c) {
    c[LOWER] = bound[0], c[UPPER] = bound[1], c[RANGE] = bound[1] - bound[0];
    c[SCALE] = static_cast<A>(option[0]) / c[RANGE], c[RECIPROCAL] = A(1) / c[SCALE];
    c[ZERO] = round_scalar<A>(c[SCALE] * c[LOWER]) + static_cast<A>(option[1]);
    c[TIE] = static_cast<A>(option[2]), c[BACK] = ROUND - c[ZERO];
    c[LEAST] = RELU ? std::max(std::min(A(0), c[UPPER]), c[LOWER]) : c[LOWER];  // a chain of clamps is a clamp
  }

  TERSOR_INLINE Vec<A> level(Vec<A> clipped, const Vec<A>* c) {
    if constexpr (FAST) {
      const Vec<A> code = (clipped * c[SCALE] - c[ZERO] + ROUND) - c[BACK], output = code * c[RECIPROCAL];
      return fma<A>(fma<A>(-output, c[SCALE], code), c[RECIPROCAL], output);
    }
    return (round_even<A>(clipped * c[SCALE] - c[ZERO]) + c[ZERO]) / c[SCALE];
  }

  static bool exact(const A* constants) {
    if (!(std::abs(constants[ZERO]) < A(1 << 20))) return false;
    Vec<A> c[CONSTANTS], index{};
    for (int i = 0; i < CONSTANTS; ++i) c[i] = splat(constants[i]);
    for (int i = 0; i < Simd<A>::lanes; ++i) index[i] = static_cast<A>(i);
    const A first = round_scalar<A>(constants[SCALE] * constants[LOWER] - constants[ZERO]) + constants[ZERO];
    const A last = round_scalar<A>(constants[SCALE] * constants[UPPER] - constants[ZERO]) + constants[ZERO];
    if (!(last - first <= A(300))) return false;
    for (A code = first; code <= last; code += Simd<A>::lanes) {
      const Vec<A> all = code + index, product = all * c[RECIPROCAL];
      const Vec<A> output = fma<A>(fma<A>(-product, c[SCALE], all), c[RECIPROCAL], product);
      const auto differ = output != all / c[SCALE];
      for (int i = 0; i < Simd<A>::lanes; ++i) {
        if (differ[i]) return false;
      }
    }
    return true;
  }

  TERSOR_INLINE Vec<A> quantize(Vec<A> x, const Vec<A>* c) {
    return level(at_least<A>(at_most<A>(x, c[UPPER]), c[LEAST]), c);
  }

  // Adds to the sums for lower, for upper, and for both by the rounding error. An element is not above one bound and
  // below the other, so what it gives to them is taken from its own gradient.
  TERSOR_INLINE Vec<A> differentiate(Vec<A> g, Vec<A> x, const Vec<A>* c, Vec<A>* sum) {
    const Vec<A> zero{}, tie = g * c[TIE], positive = RELU ? at_least<A>(x, zero) : x;
    const Vec<A> clipped = at_least<A>(at_most<A>(positive, c[UPPER]), c[LOWER]);
    const Vec<A> at_upper = positive == c[UPPER] ? tie : zero, at_lower = positive == c[LOWER] ? tie : zero;
    const Vec<A> above = positive > c[UPPER] ? g : at_upper, below = positive < c[LOWER] ? g : at_lower;
    sum[0] += below;
    sum[1] += above;
    sum[2] = fma<A>(g, level(clipped, c) - clipped, sum[2]);
    const Vec<A> grad = g - above - below;
    return RELU ? (x <= zero ? zero : grad) : grad;
  }

  static void finish(const double* sum, const A* c, const double* option, double* grad) {
    const double error = sum[2] / static_cast<double>(c[RANGE]);
    grad[0] = option[4] * (sum[0] - error), grad[1] = option[4] * (sum[1] + error);
  }
};

template <class A, bool FAST, bool RELU>
struct DdtbOf {
  using Part = Bounds<A, FAST, RELU>;
  static constexpr int INPUTS = 1, PARAMETERS = 2, CONSTANTS = Part::CONSTANTS, SUMS = Part::SUMS;

  static void prepare(const A* p, const double* option, A* c) { Part::prepare(p, option, c); }
  static bool exact(const A* c) { return Part::exact(c); }
  TERSOR_INLINE Vec<A> quantize(const Vec<A>* x, const Vec<A>* c) { return Part::quantize(x[0], c); }
  TERSOR_INLINE void differentiate(Vec<A> g, const Vec<A>* x, const Vec<A>* c, Vec<A>* sum, Vec<A>* grad) {
    grad[0] = Part::differentiate(g, x[0], c, sum);
  }
  static void finish(const double* sum, const A* c, const double* option, double* grad) {
    Part::finish(sum, c, option, grad);
  }
};
template <class A, bool FAST>
using Ddtb = DdtbOf<A, FAST, false>;
template <class A, bool FAST>
using DdtbAfterRelu = DdtbOf<A, FAST, true>;

}  // namespace TERSOR_ISA
}  // namespace tersor::fake_quantize

// The DDTB rule (pyops/quantization/fake_quantize_bounds.py); part of a body that is compiled once per instruction set.

namespace tersor::fake_quantize {
namespace TERSOR_ISA {

template <class A>
TERSOR_INLINE A round_scalar(A x) {
  return static_cast<A>(__builtin_nearbyint(x));
}

// One quantiser's constants and formulas; option: levels, zero's offset, tie, floor (0 for a ReLU), grad_scale.
template <class A, bool FAST>
struct Bounds {
  static constexpr int CONSTANTS = 8, SUMS = 3;
  enum { LOWER, UPPER, SCALE, ZERO, RECIPROCAL, TIE, FLOOR, RANGE };

  static void prepare(const A* bound, const double* option, A* c) {
    c[LOWER] = bound[0], c[UPPER] = bound[1], c[RANGE] = bound[1] - bound[0];
    c[SCALE] = static_cast<A>(option[0]) / c[RANGE], c[RECIPROCAL] = A(1) / c[SCALE];
    c[ZERO] = round_scalar<A>(c[SCALE] * c[LOWER]) + static_cast<A>(option[1]);
    c[TIE] = static_cast<A>(option[2]), c[FLOOR] = static_cast<A>(option[3]);
  }

  TERSOR_INLINE Vec<A> level(Vec<A> clipped, const Vec<A>* c) {
    const Vec<A> code = round_even<A>(clipped * c[SCALE] - c[ZERO]);
    return divide<FAST, A>(code + c[ZERO], c[SCALE], c[RECIPROCAL]);
  }

  TERSOR_INLINE Vec<A> quantize(Vec<A> x, const Vec<A>* c) {
    return level(at_least<A>(at_most<A>(at_least<A>(x, c[FLOOR]), c[UPPER]), c[LOWER]), c);
  }

  // Adds to the sums for lower, for upper, and for both by the rounding error.
  TERSOR_INLINE Vec<A> differentiate(Vec<A> g, Vec<A> x, const Vec<A>* c, Vec<A>* sum) {
    const Vec<A> zero{}, one = splat(A(1)), positive = at_least<A>(x, c[FLOOR]);
    const Vec<A> least = at_most<A>(positive, c[UPPER]), clipped = at_least<A>(least, c[LOWER]);
    const Vec<A> above = positive > c[UPPER] ? one : positive == c[UPPER] ? c[TIE] : zero;
    const Vec<A> below = least < c[LOWER] ? one : least == c[LOWER] ? c[TIE] : zero;
    sum[0] += g * below;
    sum[1] += g * (above * (one - below));
    sum[2] += g * (level(clipped, c) - clipped);
    const Vec<A> grad = g * (one - above) * (one - below);
    return x <= c[FLOOR] ? zero : grad;
  }

  static void finish(const double* sum, const A* c, const double* option, double* grad) {
    const double error = sum[2] / static_cast<double>(c[RANGE]);
    grad[0] = option[4] * (sum[0] - error), grad[1] = option[4] * (sum[1] + error);
  }
};

template <class A, bool FAST>
struct Ddtb {
  using Part = Bounds<A, FAST>;
  static constexpr int INPUTS = 1, PARAMETERS = 2, CONSTANTS = Part::CONSTANTS, SUMS = Part::SUMS;

  static void prepare(const A* p, const double* option, A* c) { Part::prepare(p, option, c); }
  TERSOR_INLINE Vec<A> quantize(const Vec<A>* x, const Vec<A>* c) { return Part::quantize(x[0], c); }
  TERSOR_INLINE void differentiate(Vec<A> g, const Vec<A>* x, const Vec<A>* c, Vec<A>* sum, Vec<A>* grad) {
    grad[0] = Part::differentiate(g, x[0], c, sum);
  }
  static void finish(const double* sum, const A* c, const double* option, double* grad) {
    Part::finish(sum, c, option, grad);
  }
};

}  // namespace TERSOR_ISA
}  // namespace tersor::fake_quantize

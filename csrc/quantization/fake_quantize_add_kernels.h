// The rule of fake_quantize_add.cpp, compiled once per instruction set (foreach_isa.h includes this file).
#include "quantization/fake_quantize_loops.h"
#include "quantization/fake_quantize_ddtb.h"

namespace tersor::fake_quantize {
namespace TERSOR_ISA {

template <class A, bool FAST>
struct Add {
  using Part = Bounds<A, FAST>;
  static constexpr int INPUTS = 2, PARAMETERS = 4, CONSTANTS = 2 * Part::CONSTANTS, SUMS = 2 * Part::SUMS;

  static void prepare(const A* p, const double* option, A* c) {
    Part::prepare(p, option, c), Part::prepare(p + 2, option, c + Part::CONSTANTS);
  }
  static bool exact(const A* c) { return Part::exact(c) && Part::exact(c + Part::CONSTANTS); }
  TERSOR_INLINE Vec<A> quantize(const Vec<A>* x, const Vec<A>* c) {
    return Part::quantize(x[0], c) + Part::quantize(x[1], c + Part::CONSTANTS);
  }
  TERSOR_INLINE void differentiate(Vec<A> g, const Vec<A>* x, const Vec<A>* c, Vec<A>* sum, Vec<A>* grad) {
    grad[0] = Part::differentiate(g, x[0], c, sum);
    grad[1] = Part::differentiate(g, x[1], c + Part::CONSTANTS, sum + Part::SUMS);
  }
  static void finish(const double* sum, const A* c, const double* option, double* grad) {
    Part::finish(sum, c, option, grad), Part::finish(sum + Part::SUMS, c + Part::CONSTANTS, option, grad + 2);
  }
};

template <class T, class A>
static Kernels<A> add_kernels(bool fast) {
  return kernels_by_division<Add, T, A>(fast);
}

}  // namespace TERSOR_ISA
}  // namespace tersor::fake_quantize

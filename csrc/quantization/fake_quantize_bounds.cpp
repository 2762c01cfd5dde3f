// Fake-quantisation between two bounds on the CPU (specification: pyops/quantization/fake_quantize_bounds.py).

#include "quantization/fake_quantize.h"

#define TERSOR_BODY "quantization/fake_quantize_bounds_kernels.h"
#include "foreach_isa.h"

#include "quantization/fake_quantize_run.h"

namespace tersor::fake_quantize {
namespace {

struct Rule {
  bool unit, relu;

  template <class A>
  bool check(const A* p) const {
    STD_TORCH_CHECK(std::isfinite(p[0]) && std::isfinite(p[1]) && p[0] < p[1],
                    "fake_quantize_bounds: lower must be finite and less than upper, got lower ", p[0], " and upper ",
                    p[1]);
    return divides_fast(p[1] - p[0]);
  }

  template <class T, class A>
  Kernels<A> kernels(bool fast) const {
    return TERSOR_FOR_ISA(bounds_kernels<T, A>)(unit, relu, fast);
  }
};

std::vector<double> options(int64_t bits, const std::string& rule, const std::string& tie, bool is_signed, bool relu,
                            double grad_scale) {
  STD_TORCH_CHECK(bits >= 2 && bits <= 8, "bits must be 2 to 8");
  const double levels = static_cast<double>((1 << bits) - 1), floor = relu ? 0.0 : -INFINITY;
  if (rule == "unit") return {levels, is_signed ? 0.5 : 0.0, is_signed ? 2.0 : 1.0, floor, grad_scale};
  STD_TORCH_CHECK(rule == "ddtb", "rule must be ddtb or unit");
  return {levels, static_cast<double>(1 << (bits - 1)), tie == "half" ? 0.5 : 1.0, floor, grad_scale};
}

Tensor forward(const Tensor& input, const Tensor& lower, const Tensor& upper, int64_t bits, const std::string& rule,
               const std::string& tie, bool is_signed, bool relu, double grad_scale) {
  const Rule chosen{rule == "unit", relu};
  return Call(chosen, {input}, {lower, upper}, options(bits, rule, tie, is_signed, relu, grad_scale)).forward();
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& lower,
                                            const Tensor& upper, int64_t bits, const std::string& rule,
                                            const std::string& tie, bool is_signed, bool relu, double grad_scale) {
  const Rule chosen{rule == "unit", relu};
  const auto g = Call(chosen, {input}, {lower, upper}, options(bits, rule, tie, is_signed, relu, grad_scale))
                     .backward(grad_output);
  return {g[0], g[1], g[2]};
}

}  // namespace
}  // namespace tersor::fake_quantize

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("fake_quantize_bounds_forward", TORCH_BOX(&tersor::fake_quantize::forward));
  module.impl("fake_quantize_bounds_backward", TORCH_BOX(&tersor::fake_quantize::backward));
}

// The sum of two fake-quantised tensors on the CPU (specification: pyops/quantization/fake_quantize_add.py).

#include "quantization/fake_quantize.h"

#define TERSOR_BODY "quantization/fake_quantize_add_kernels.h"
#include "foreach_isa.h"

#include "quantization/fake_quantize_run.h"

namespace tersor::fake_quantize {
namespace {

struct Rule {
  template <class A>
  bool check(const A* p) const {
    for (int i = 0; i < 4; i += 2) {
      STD_TORCH_CHECK(std::isfinite(p[i]) && std::isfinite(p[i + 1]) && p[i] < p[i + 1],
                      "fake_quantize_add: each lower must be finite and less than its upper, got ", p[i], " and ",
                      p[i + 1]);
    }
    return divides_fast(p[1] - p[0]) && divides_fast(p[3] - p[2]);
  }

  template <class T, class A>
  Kernels<A> kernels(bool fast) const {
    return TERSOR_FOR_ISA(add_kernels<T, A>)(fast);
  }
};

std::vector<double> options(int64_t bits, const std::string& tie, double grad_scale) {
  STD_TORCH_CHECK(bits >= 2 && bits <= 8, "bits must be 2 to 8");
  return {static_cast<double>((1 << bits) - 1), static_cast<double>(1 << (bits - 1)), tie == "half" ? 0.5 : 1.0,
          -INFINITY, grad_scale};
}

Tensor forward(const Tensor& input, const Tensor& other, const Tensor& lower, const Tensor& upper,
               const Tensor& other_lower, const Tensor& other_upper, int64_t bits, const std::string& tie,
               double grad_scale) {
  return Call(Rule{}, {input, other}, {lower, upper, other_lower, other_upper}, options(bits, tie, grad_scale))
      .forward();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& other, const Tensor& lower, const Tensor& upper,
    const Tensor& other_lower, const Tensor& other_upper, int64_t bits, const std::string& tie, double grad_scale) {
  const auto g =
      Call(Rule{}, {input, other}, {lower, upper, other_lower, other_upper}, options(bits, tie, grad_scale))
          .backward(grad_output);
  return {g[0], g[1], g[2], g[3], g[4], g[5]};
}

}  // namespace
}  // namespace tersor::fake_quantize

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("fake_quantize_add_forward", TORCH_BOX(&tersor::fake_quantize::forward));
  module.impl("fake_quantize_add_backward", TORCH_BOX(&tersor::fake_quantize::backward));
}

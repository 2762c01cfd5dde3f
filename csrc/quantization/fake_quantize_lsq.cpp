// Fake-quantisation with a trainable step on the CPU (specification: pyops/quantization/fake_quantize_lsq.py).

#include "quantization/fake_quantize.h"

#define TERSOR_BODY "quantization/fake_quantize_lsq_kernels.h"
#include "foreach_isa.h"

#include "quantization/fake_quantize_run.h"

namespace tersor::fake_quantize {
namespace {

struct Rule {
  template <class A>
  bool check(const A* p) const {
    STD_TORCH_CHECK(std::isfinite(p[0]) && p[0] > 0, "fake_quantize_lsq: scale must be finite and greater than 0, got ",
                    p[0]);
    return divides_fast(p[0]);
  }

  template <class T, class A>
  Kernels<A> kernels(bool fast) const {
    return TERSOR_FOR_ISA(lsq_kernels<T, A>)(fast);
  }
};

std::vector<double> options(const Tensor& input, const Tensor& scale, int64_t quant_min, int64_t quant_max,
                            std::optional<double> grad_factor) {
  STD_TORCH_CHECK(-(1 << 23) <= quant_min && quant_min < quant_max && quant_max <= (1 << 23),
                  "quant_min must be less than quant_max, both within 2^23");
  return {static_cast<double>(quant_min), static_cast<double>(quant_max),
          grad_factor.value_or(paper_factor(input, scale, quant_max))};
}

Tensor forward(const Tensor& input, const Tensor& scale, int64_t quant_min, int64_t quant_max, std::optional<double> grad_factor) {
  return Call(Rule{}, {input}, {scale}, options(input, scale, quant_min, quant_max, grad_factor)).forward();
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& scale,
                                    int64_t quant_min, int64_t quant_max, std::optional<double> grad_factor) {
  const auto g = Call(Rule{}, {input}, {scale}, options(input, scale, quant_min, quant_max, grad_factor)).backward(grad_output);
  return {g[0], g[1]};
}

}  // namespace
}  // namespace tersor::fake_quantize

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("fake_quantize_lsq_forward", TORCH_BOX(&tersor::fake_quantize::forward));
  module.impl("fake_quantize_lsq_backward", TORCH_BOX(&tersor::fake_quantize::backward));
}

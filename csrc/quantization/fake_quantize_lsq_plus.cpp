// Fake-quantisation with a trainable step and offset on the CPU (specification:
// pyops/quantization/fake_quantize_lsq_plus.py).

#include "quantization/fake_quantize.h"

#define TERSOR_BODY "quantization/fake_quantize_lsq_plus_kernels.h"
#include "foreach_isa.h"

#include "quantization/fake_quantize_run.h"

namespace tersor::fake_quantize {
namespace {

struct Rule {
  template <class A>
  bool check(const A* p) const {
    STD_TORCH_CHECK(std::isfinite(p[0]) && p[0] > 0 && std::isfinite(p[1]),
                    "fake_quantize_lsq_plus: scale must be finite and greater than 0 and offset finite, got ", p[0],
                    " and ", p[1]);
    return divides_fast(p[0]);
  }

  template <class T, class A>
  Kernels<A> kernels(bool fast) const {
    return TERSOR_FOR_ISA(lsq_plus_kernels<T, A>)(fast);
  }
};

std::vector<double> options(const Tensor& input, const Tensor& scale, int64_t levels,
                            std::optional<double> grad_factor) {
  STD_TORCH_CHECK(levels > 0 && levels <= (1 << 23), "levels must be from 1 to 2^23");
  return {static_cast<double>(levels), grad_factor.value_or(paper_factor(input, scale, levels))};
}

Tensor forward(const Tensor& input, const Tensor& scale, const Tensor& offset, int64_t levels, std::optional<double> grad_factor) {
  return Call(Rule{}, {input}, {scale, offset}, options(input, scale, levels, grad_factor)).forward();
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& scale,
                                            const Tensor& offset, int64_t levels, std::optional<double> grad_factor) {
  const auto g = Call(Rule{}, {input}, {scale, offset}, options(input, scale, levels, grad_factor)).backward(grad_output);
  return {g[0], g[1], g[2]};
}

}  // namespace
}  // namespace tersor::fake_quantize

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("fake_quantize_lsq_plus_forward", TORCH_BOX(&tersor::fake_quantize::forward));
  module.impl("fake_quantize_lsq_plus_backward", TORCH_BOX(&tersor::fake_quantize::backward));
}

// Fake-quantisation with a trainable clipping value on the CPU (specification:
// pyops/quantization/fake_quantize_pact.py).

#include "quantization/fake_quantize.h"

#define TERSOR_BODY "quantization/fake_quantize_pact_kernels.h"
#include "foreach_isa.h"

#include "quantization/fake_quantize_run.h"

namespace tersor::fake_quantize {
namespace {

struct Rule {
  template <class A>
  bool check(const A* p) const {
    STD_TORCH_CHECK(std::isfinite(p[0]) && p[0] > 0, "fake_quantize_pact: alpha must be finite and greater than 0, got ",
                    p[0]);
    return divides_fast(p[0]);
  }

  template <class T, class A>
  Kernels<A> kernels(bool fast) const {
    return TERSOR_FOR_ISA(pact_kernels<T, A>)(fast);
  }
};

std::vector<double> options(int64_t bits) {
  STD_TORCH_CHECK((bits >= 2 && bits <= 8) || bits == 32, "bits must be 2 to 8, or 32");
  return {bits == 32 ? 0.0 : static_cast<double>((1 << bits) - 1)};
}

Tensor forward(const Tensor& input, const Tensor& alpha, int64_t bits) {
  return Call(Rule{}, {input}, {alpha}, options(bits)).forward();
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& alpha, int64_t bits) {
  const auto g = Call(Rule{}, {input}, {alpha}, options(bits)).backward(grad_output);
  return {g[0], g[1]};
}

}  // namespace
}  // namespace tersor::fake_quantize

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("fake_quantize_pact_forward", TORCH_BOX(&tersor::fake_quantize::forward));
  module.impl("fake_quantize_pact_backward", TORCH_BOX(&tersor::fake_quantize::backward));
}

// A step of stochastic gradient descent that passes over frozen weights, on the CPU (specification:
// pyops/freezing/frozen_sgd_step.py).

#include "freezing/frozen_step.h"

#define TERSOR_BODY "freezing/frozen_sgd_step_kernels.h"
#include "foreach_isa.h"

namespace tersor::freezing {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Kernel kernel_for(ScalarType dtype, bool buffered) {
  if (dtype == ScalarType::Float) return TERSOR_FOR_ISA(sgd_kernel<float, float>)(buffered);
  if (dtype == ScalarType::Half) return TERSOR_FOR_ISA(sgd_kernel<Half, float>)(buffered);
  if (dtype == ScalarType::BFloat16) return TERSOR_FOR_ISA(sgd_kernel<BFloat16, float>)(buffered);
  STD_TORCH_CHECK(dtype == ScalarType::Double, "parameter must be float16, bfloat16, float32 or float64");
  return TERSOR_FOR_ISA(sgd_kernel<double, double>)(buffered);
}

void sgd(Tensor parameter, const Tensor& gradient, std::optional<Tensor> momentum_buffer, const Tensor& frozen, double lr,
         double momentum, double dampening, double weight_decay, bool nesterov, bool maximize, bool first) {
  Step step{};
  step.factor[0] = lr, step.factor[1] = momentum, step.factor[2] = 1 - dampening, step.factor[3] = weight_decay;
  step.nesterov = nesterov, step.negate = maximize, step.first = first && momentum_buffer.has_value();
  if (momentum_buffer) step.buffer[0] = const_cast<void*>(checked(*momentum_buffer, parameter, "momentum_buffer"));
  const bool buffered = momentum_buffer.has_value();
  run_step(step, parameter, gradient, frozen, [&](ScalarType dtype) { return kernel_for(dtype, buffered); });
}

}  // namespace
}  // namespace tersor::freezing

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("frozen_sgd_step", TORCH_BOX(&tersor::freezing::sgd));
}

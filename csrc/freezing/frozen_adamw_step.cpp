// A step of AdamW that passes over frozen weights, on the CPU (specification: pyops/freezing/frozen_adamw_step.py).

#include "freezing/frozen_step.h"

#define TERSOR_BODY "freezing/frozen_adamw_step_kernels.h"
#include "foreach_isa.h"

namespace tersor::freezing {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Kernel kernel_for(ScalarType dtype) {
  if (dtype == ScalarType::Float) return TERSOR_FOR_ISA(adamw_kernel<float, float>)();
  if (dtype == ScalarType::Half) return TERSOR_FOR_ISA(adamw_kernel<Half, float>)();
  if (dtype == ScalarType::BFloat16) return TERSOR_FOR_ISA(adamw_kernel<BFloat16, float>)();
  STD_TORCH_CHECK(dtype == ScalarType::Double, "parameter must be float16, bfloat16, float32 or float64");
  return TERSOR_FOR_ISA(adamw_kernel<double, double>)();
}

void adamw(Tensor parameter, const Tensor& gradient, Tensor exp_avg, Tensor exp_avg_sq, const Tensor& frozen, double lr,
           double beta1, double beta2, double eps, double weight_decay, bool maximize, int64_t count) {
  STD_TORCH_CHECK(count >= 1, "step must be at least 1");
  Step step{};
  step.negate = maximize;
  const double factors[] = {lr / (1 - std::pow(beta1, count)), 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2,
                            std::sqrt(1 - std::pow(beta2, count)), eps};
  for (int i = 0; i < MOST_FACTORS; ++i) step.factor[i] = factors[i];
  step.buffer[0] = const_cast<void*>(checked(exp_avg, parameter, "exp_avg"));
  step.buffer[1] = const_cast<void*>(checked(exp_avg_sq, parameter, "exp_avg_sq"));
  run_step(step, parameter, gradient, frozen, kernel_for);
}

}  // namespace
}  // namespace tersor::freezing

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("frozen_adamw_step", TORCH_BOX(&tersor::freezing::adamw));
}

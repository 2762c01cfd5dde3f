// A weight without the smallest elements of every group, on the CPU (specification: pyops/sparsity/srste_sparsify.py).

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "sparsity/nm_groups.h"

#define TERSOR_BODY "sparsity/srste_sparsify_kernels.h"
#include "foreach_isa.h"

namespace tersor::sparsity {
namespace {

template <class F>
void dispatch_srste(ScalarType dtype, const F& run) {
  if (dtype == ScalarType::Float) run(TERSOR_FOR_ISA(srste_kernels<float, float>)());
  else if (dtype == ScalarType::Half) run(TERSOR_FOR_ISA(srste_kernels<Half, float>)());
  else if (dtype == ScalarType::BFloat16) run(TERSOR_FOR_ISA(srste_kernels<BFloat16, float>)());
  else if (dtype == ScalarType::Double) run(TERSOR_FOR_ISA(srste_kernels<double, double>)());
  else STD_TORCH_CHECK(false, "weight must be float16, bfloat16, float32 or float64");
}

std::tuple<Tensor, Tensor> srste_forward(const Tensor& given_weight, int64_t n, int64_t m) {
  check_pattern(n, m);
  Task task{};
  task.n = static_cast<int>(n), task.m = static_cast<int>(m);
  const Weight weight(given_weight, m, task);
  Tensor output = torch::stable::empty_like(weight.tensor);
  Tensor kept = torch::stable::new_empty(weight.tensor, {(weight.tensor.numel() + 7) / 8}, ScalarType::Byte);
  task.weight = weight.tensor.const_data_ptr(), task.output = output.mutable_data_ptr();
  task.mask = static_cast<uint8_t*>(kept.mutable_data_ptr());
  dispatch_srste(weight.tensor.scalar_type(), [&](const auto& kernels) {
    for_groups(task.groups, [&](int64_t first, int64_t end) { kernels.forward(task, first, end); });
  });
  return {output, kept};
}

Tensor srste_backward(const Tensor& grad_output, const Tensor& given_weight, const Tensor& given_mask, int64_t m,
                      double decay) {
  check_pattern(1, m);
  Task task{};
  task.m = static_cast<int>(m), task.decay = decay;
  const Weight weight(given_weight, m, task);
  const Tensor mask = torch::stable::contiguous(given_mask), grad = weight.like(grad_output);
  check_mask(mask, weight.tensor.numel());
  Tensor output = torch::stable::empty_like(weight.tensor);
  task.weight = weight.tensor.const_data_ptr(), task.grad_output = grad.const_data_ptr();
  task.output = output.mutable_data_ptr(), task.given_mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  dispatch_srste(weight.tensor.scalar_type(), [&](const auto& kernels) {
    for_groups(task.groups, [&](int64_t first, int64_t end) { kernels.backward(task, first, end); });
  });
  return output;
}

}  // namespace
}  // namespace tersor::sparsity

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("srste_sparsify_forward", TORCH_BOX(&tersor::sparsity::srste_forward));
  module.impl("srste_sparsify_backward", TORCH_BOX(&tersor::sparsity::srste_backward));
}

// A weight without its removed positions, and the scores' gradient, on the CPU (specification:
// pyops/sparsity/nm_sparsify.py).

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "sparsity/nm_groups.h"

#define TERSOR_BODY "sparsity/nm_sparsify_kernels.h"
#include "foreach_isa.h"

namespace tersor::sparsity {
namespace {

ScalarType exact_type(const Tensor& weight) {
  return weight.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_scores(const Tensor& scores, const Tensor& weight, const Task& task) {
  STD_TORCH_CHECK(scores.scalar_type() == exact_type(weight) && scores.size(0) == task.groups,
                  "scores must have a row per group, float64 for a float64 weight and else float32");
}

template <class F>
void dispatch(ScalarType dtype, const F& run) {
  if (dtype == ScalarType::Float) run(TERSOR_FOR_ISA(nm_kernels<float, float>)());
  else if (dtype == ScalarType::Half) run(TERSOR_FOR_ISA(nm_kernels<Half, float>)());
  else if (dtype == ScalarType::BFloat16) run(TERSOR_FOR_ISA(nm_kernels<BFloat16, float>)());
  else if (dtype == ScalarType::Double) run(TERSOR_FOR_ISA(nm_kernels<double, double>)());
  else STD_TORCH_CHECK(false, "weight must be float16, bfloat16, float32 or float64");
}

Task task_of(int64_t n, int64_t m, const Patterns& patterns, Numbers& of) {
  Task task{};
  task.n = static_cast<int>(n), task.m = static_cast<int>(m);
  task.stored = of.stored, task.invalid = &of.invalid, task.padded = patterns.padded;
  return task;
}

std::tuple<Tensor, Tensor> forward(const Tensor& given_weight, const Tensor& given_scores,
                                   const std::optional<Tensor>& given_mask, int64_t n, int64_t m,
                                   const std::optional<Tensor>& combinations) {
  check_pattern(n, m);
  const Patterns patterns(static_cast<int>(n), static_cast<int>(m));
  const Tensor scores = torch::stable::contiguous(given_scores);
  Numbers of(combinations, scores, patterns);
  Task task = task_of(n, m, patterns, of);
  const Weight weight(given_weight, m, task);
  check_scores(scores, weight.tensor, task);
  std::optional<Tensor> mask;
  if (given_mask) {
    check_mask(*given_mask, weight.tensor.numel());
    mask = torch::stable::contiguous(*given_mask);
    task.given_mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  }
  Tensor output = torch::stable::empty_like(weight.tensor);
  Tensor kept = torch::stable::new_empty(weight.tensor, {(weight.tensor.numel() + 7) / 8}, ScalarType::Byte);
  task.weight = weight.tensor.const_data_ptr(), task.scores = scores.const_data_ptr();
  task.output = output.mutable_data_ptr(), task.mask = static_cast<uint8_t*>(kept.mutable_data_ptr());
  dispatch(weight.tensor.scalar_type(), [&](const auto& kernels) {
    for_groups(task.groups, [&](int64_t first, int64_t end) { kernels.forward(task, first, end); });
  });
  of.check();
  return {output, kept};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& given_weight, const Tensor& given_scores,
                                    const Tensor& given_mask, int64_t n, int64_t m,
                                    const std::optional<Tensor>& combinations) {
  check_pattern(n, m);
  const Patterns patterns(static_cast<int>(n), static_cast<int>(m));
  const Tensor scores = torch::stable::contiguous(given_scores), mask = torch::stable::contiguous(given_mask);
  Numbers of(combinations, scores, patterns);
  Task task = task_of(n, m, patterns, of);
  const Weight weight(given_weight, m, task);
  check_scores(scores, weight.tensor, task);
  check_mask(mask, weight.tensor.numel());
  const Tensor grad = weight.like(grad_output);
  Tensor grad_weight = torch::stable::empty_like(weight.tensor);
  Tensor grad_scores = torch::stable::new_empty(scores, scores.sizes());
  const bool twice = weight.tensor.scalar_type() == ScalarType::Double;
  task.table = twice ? static_cast<const void*>(patterns.twice.data()) : patterns.single.data();
  task.weight = weight.tensor.const_data_ptr(), task.grad_output = grad.const_data_ptr();
  task.scores = scores.const_data_ptr(), task.given_mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  task.output = grad_weight.mutable_data_ptr(), task.grad_scores = grad_scores.mutable_data_ptr();
  dispatch(weight.tensor.scalar_type(), [&](const auto& kernels) {
    for_groups(task.groups, [&](int64_t first, int64_t end) { kernels.backward(task, first, end); });
  });
  of.check();
  return {grad_weight, grad_scores};
}

}  // namespace
}  // namespace tersor::sparsity

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("nm_sparsify_forward", TORCH_BOX(&tersor::sparsity::forward));
  module.impl("nm_sparsify_backward", TORCH_BOX(&tersor::sparsity::backward));
}

// ReCU's weights on the CPU (specification: pyops/binary/recu_weight.py).

#include "binary/recu_weight.h"

#include <cmath>
#include <limits>

#define TERSOR_BODY "binary/recu_weight_kernels.h"
#include "foreach_isa.h"

namespace tersor::binary {
namespace {

void check_weight(const Tensor& weight) {
  STD_TORCH_CHECK(weight.is_cpu() && is_floating(weight.scalar_type()) && weight.dim() >= 2 && weight.numel() > 0 &&
                      weight.numel() > weight.size(0),
                  "weight must be a floating CPU tensor (O, ...) with at least 2 weights a filter");
}

ScalarType exact_type(const Tensor& weight) {
  return weight.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

double first_number(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? *static_cast<const double*>(t.const_data_ptr())
                                               : *static_cast<const float*>(t.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& given, const Tensor& tau) {
  check_weight(given);
  STD_TORCH_CHECK(tau.is_cpu() && tau.scalar_type() == ScalarType::Float && tau.numel() == 1,
                  "tau must be a CPU tensor of one float32 number");
  const Tensor weight = as_contiguous(given);
  const int64_t filters = weight.size(0);
  Tensor output = new_like(weight);
  Tensor statistics = new_tensor({filters, 2}, exact_type(weight));
  Tensor bound = new_tensor({}, exact_type(weight));
  std::vector<double> magnitudes(filters);
  Filters task{};
  task.weight = weight.const_data_ptr(), task.output = output.mutable_data_ptr(), task.size = weight.numel() / filters;
  task.statistics = statistics.mutable_data_ptr(), task.magnitudes = magnitudes.data();
  with_type(weight.scalar_type(), [&](auto type) {
    using T = decltype(type);
    torch::stable::parallel_for(0, filters, grain_for(4 * task.size), [&](int64_t begin, int64_t end) {
      TERSOR_FOR_ISA(filter_signs<T>)(task, begin, end);
    });
    double sum = 0;
    for (const double own : magnitudes) sum += own;
    const double average = sum / static_cast<double>(weight.numel()), quantile = first_number(tau);
    double limit = quantile < 1 ? -average * std::log(2 - 2 * quantile) : std::numeric_limits<double>::infinity();
    if (!std::isfinite(average)) limit = average;
    *static_cast<Accumulated<T>*>(bound.mutable_data_ptr()) = static_cast<Accumulated<T>>(limit);
    if (!(limit > 0)) torch::stable::zero_(output);  // all weights are equal, or one is not finite
  });
  return {output, statistics, bound};
}

Tensor backward(const Tensor& given_grad, const Tensor& given_weight, const Tensor& given_statistics,
                const Tensor& bound) {
  check_weight(given_weight);
  const Tensor weight = as_contiguous(given_weight), grad = as_contiguous(given_grad);
  const Tensor statistics = as_contiguous(given_statistics);
  const int64_t filters = weight.size(0);
  STD_TORCH_CHECK(grad.is_cpu() && grad.scalar_type() == weight.scalar_type() && grad.numel() == weight.numel(),
                  "grad_output must have the shape and dtype of weight");
  STD_TORCH_CHECK(statistics.is_cpu() && statistics.scalar_type() == exact_type(weight) && statistics.dim() == 2 &&
                      statistics.size(0) == filters && statistics.size(1) == 2 && bound.is_cpu() &&
                      bound.scalar_type() == exact_type(weight) && bound.numel() == 1,
                  "statistics must be (O, 2) and bound one number");
  Tensor output = new_like(weight);
  Filters task{};
  task.weight = weight.const_data_ptr(), task.grad_output = grad.const_data_ptr();
  task.output = output.mutable_data_ptr(), task.size = weight.numel() / filters, task.bound = first_number(bound);
  task.statistics = const_cast<void*>(statistics.const_data_ptr());
  with_type(weight.scalar_type(), [&](auto type) {
    using T = decltype(type);
    torch::stable::parallel_for(0, filters, grain_for(4 * task.size), [&](int64_t begin, int64_t end) {
      TERSOR_FOR_ISA(filter_gradients<T>)(task, begin, end);
    });
  });
  return output;
}

}  // namespace
}  // namespace tersor::binary

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("recu_weight_forward", TORCH_BOX(&tersor::binary::forward));
  module.impl("recu_weight_backward", TORCH_BOX(&tersor::binary::backward));
}

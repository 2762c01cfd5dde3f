// Two opposite percentiles on the CPU (specification: pyops/quantization/percentile_bounds.py).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <tuple>

#include "quantization/percentile.h"

namespace tersor::percentile {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T, class A>
void fill(const Tensor& input, double percentile, Tensor& lower, Tensor& upper) {
  const T* data = static_cast<const T*>(input.const_data_ptr());
  A result[2] = {std::numeric_limits<A>::quiet_NaN(), std::numeric_limits<A>::quiet_NaN()};
  bounds<A>(input.numel(), [&](int64_t i) { return static_cast<A>(data[i]); }, percentile, result);
  *static_cast<A*>(lower.mutable_data_ptr()) = result[0];
  *static_cast<A*>(upper.mutable_data_ptr()) = result[1];
}

std::tuple<Tensor, Tensor> percentile_bounds(const Tensor& input, double percentile) {
  STD_TORCH_CHECK(input.is_cpu() && input.numel() > 0, "input must be a CPU tensor with at least one element");
  STD_TORCH_CHECK(percentile >= 50 && percentile <= 100, "percentile must be from 50 to 100");
  const Tensor x = torch::stable::contiguous(input);
  const ScalarType dtype = x.scalar_type(), exact = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  Tensor lower = torch::stable::new_empty(x, {1}, exact), upper = torch::stable::new_empty(x, {1}, exact);
  switch (dtype) {
    case ScalarType::Float: fill<float, float>(x, percentile, lower, upper); break;
    case ScalarType::Half: fill<torch::headeronly::Half, float>(x, percentile, lower, upper); break;
    case ScalarType::BFloat16: fill<torch::headeronly::BFloat16, float>(x, percentile, lower, upper); break;
    case ScalarType::Double: fill<double, double>(x, percentile, lower, upper); break;
    default: STD_TORCH_CHECK(false, "input must be float16, bfloat16, float32 or float64");
  }
  return {lower, upper};
}

}  // namespace
}  // namespace tersor::percentile

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("percentile_bounds", TORCH_BOX(&tersor::percentile::percentile_bounds));
}

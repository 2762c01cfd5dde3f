// Fake-quantisation of weights on the CPU (specification: pyops/quantization/weight_fake_quantize.py).

#include "quantization/fake_quantize.h"

#define TERSOR_BODY "quantization/weight_fake_quantize_kernels.h"
#include "foreach_isa.h"

#include "quantization/fake_quantize_run.h"
#include "quantization/percentile.h"

namespace tersor::fake_quantize {
namespace {

struct Rule {
  bool symmetric;

  template <class A>
  bool check(const A* p) const {
    STD_TORCH_CHECK(std::isfinite(p[0]) && std::isfinite(p[1]) && p[0] < p[1],
                    "weight_fake_quantize: weight must have finite, unequal bounds, got ", p[0], " and ", p[1]);
    return divides_fast(symmetric ? p[1] : p[1] - p[0]);
  }

  template <class T, class A>
  Kernels<A> kernels(bool fast) const {
    return TERSOR_FOR_ISA(weight_kernels<T, A>)(symmetric, fast);
  }
};

template <class T, class A>
void bounds_as(const Tensor& weight, const std::string& mode, double percentile, Tensor& bounds) {
  const T* data = static_cast<const T*>(weight.const_data_ptr());
  A* result = static_cast<A*>(bounds.mutable_data_ptr());
  if (mode == "percentile") {
    const auto read = [&](int64_t i) { return static_cast<A>(data[i]); };
    if (!percentile::bounds<A>(weight.numel(), read, percentile, result)) result[0] = result[1] = NAN;
    return;
  }
  TERSOR_FOR_ISA(extremes<T, A>)(data, weight.numel(), result);
  if (mode == "minmax") return;
  result[1] = std::max(-result[0], result[1]) + A(1e-8);
  result[0] = -result[1];
}

Tensor bounds_of(const Tensor& weight, const std::string& mode, double percentile) {
  STD_TORCH_CHECK(mode == "symmetric" || mode == "minmax" || mode == "percentile",
                  "mode must be symmetric, minmax or percentile");
  STD_TORCH_CHECK(percentile >= 50 && percentile <= 100, "percentile must be from 50 to 100");
  Tensor bounds = torch::stable::new_empty(weight, {2}, exact_type(weight));
  const ScalarType dtype = weight.scalar_type();
  if (dtype == ScalarType::Float) bounds_as<float, float>(weight, mode, percentile, bounds);
  if (dtype == ScalarType::Half) bounds_as<Half, float>(weight, mode, percentile, bounds);
  if (dtype == ScalarType::BFloat16) bounds_as<BFloat16, float>(weight, mode, percentile, bounds);
  if (dtype == ScalarType::Double) bounds_as<double, double>(weight, mode, percentile, bounds);
  return bounds;
}

std::vector<Tensor> split(const Tensor& bounds) {
  return {torch::stable::narrow(const_cast<Tensor&>(bounds), 0, 0, 1),
          torch::stable::narrow(const_cast<Tensor&>(bounds), 0, 1, 1)};
}

std::vector<double> options(int64_t bits, const std::string& mode) {
  STD_TORCH_CHECK(bits >= 2 && bits <= 8, "bits must be 2 to 8");
  if (mode == "symmetric") return {static_cast<double>((1 << (bits - 1)) - 1)};
  return {static_cast<double>((1 << bits) - 1), static_cast<double>(1 << (bits - 1)), 0.5, -INFINITY, 1.0};
}

std::tuple<Tensor, Tensor> forward(const Tensor& weight, int64_t bits, const std::string& mode, double percentile) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.numel() > 0, "weight must be a CPU tensor with at least one element");
  const Tensor w = dense(weight);
  Tensor bounds = bounds_of(w, mode, percentile);
  const Rule rule{mode == "symmetric"};
  return {Call(rule, {w}, split(bounds), options(bits, mode)).forward(), bounds};
}

Tensor backward(const Tensor& grad_output, const Tensor& weight, const Tensor& bounds) {
  STD_TORCH_CHECK(bounds.is_cpu() && bounds.dim() == 1 && bounds.size(0) == 2, "bounds must be a CPU tensor (2,)");
  const Rule rule{false};
  return Call(rule, {weight}, split(bounds), options(2, "percentile")).backward(grad_output)[0];
}

}  // namespace
}  // namespace tersor::fake_quantize

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("weight_fake_quantize_forward", TORCH_BOX(&tersor::fake_quantize::forward));
  module.impl("weight_fake_quantize_backward", TORCH_BOX(&tersor::fake_quantize::backward));
}

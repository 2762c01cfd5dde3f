// What the optimisers' steps share: their tensors, and the walk over the groups in which something is free.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "freezing/frozen_bits.h"

namespace tersor::freezing {

constexpr int MOST_BUFFERS = 2, MOST_FACTORS = 8;

struct Step {
  void* parameter;
  const void* gradient;
  void* buffer[MOST_BUFFERS];
  const uint8_t* frozen;
  int64_t elements;
  double factor[MOST_FACTORS];  // what a rule makes of its options
  bool negate, nesterov, first;
};

using Kernel = void (*)(const Step&, int64_t first, int64_t end);

inline const void* checked(const torch::stable::Tensor& t, const torch::stable::Tensor& parameter, const char* name) {
  check_beside(t, parameter.numel(), parameter.scalar_type(), name);
  return t.const_data_ptr();
}

// The kernel is asked for only after all checks.
template <class F>
void run_step(Step step, torch::stable::Tensor& parameter, const torch::stable::Tensor& gradient,
              const torch::stable::Tensor& given_mask, const F& kernel_for) {
  STD_TORCH_CHECK(parameter.is_cpu() && parameter.is_contiguous(), "parameter must be a contiguous CPU tensor");
  const torch::stable::Tensor mask = torch::stable::contiguous(given_mask);
  const torch::stable::Tensor dense = torch::stable::contiguous(gradient);
  step.elements = parameter.numel();
  step.gradient = checked(dense, parameter, "gradient");
  check_bits(mask, step.elements);
  step.parameter = parameter.mutable_data_ptr();
  step.frozen = static_cast<const uint8_t*>(mask.const_data_ptr());
  const Kernel kernel = kernel_for(parameter.scalar_type());
  for_blocks(step.elements, [&](int64_t, int64_t first, int64_t end) { kernel(step, first, end); });
}

}  // namespace tersor::freezing

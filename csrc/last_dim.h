// Tensors as the kernels read them: any strides, but for the last dimension.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace tersor {

inline torch::stable::Tensor last_dim_contiguous(const torch::stable::Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

}  // namespace tersor

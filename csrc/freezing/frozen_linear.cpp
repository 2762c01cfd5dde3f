// The weight gradient of a linear layer in the listed tiles, on the CPU (specification: pyops/freezing/frozen_linear.py).

#include "freezing/weight_gradient.h"

#define TERSOR_BODY "freezing/weight_gradient_kernels.h"
#include "foreach_isa.h"

#include "freezing/weight_gradient_run.h"

namespace tersor::weight_gradient {
namespace {

Tensor linear(const Tensor& grad_output, const Tensor& input, const std::optional<Tensor>& frozen, const Tensor& tiles,
              int64_t tile_rows, int64_t tile_columns) {
  STD_TORCH_CHECK(grad_output.dim() == 2 && input.dim() == 2 && grad_output.size(0) == input.size(0),
                  "grad_output and input must be (tokens, O) and (tokens, I)");
  const int64_t tokens = input.size(0);
  Task task{};
  task.rows = grad_output.size(1), task.columns = input.size(1), task.input_height = 1, task.input_width = tokens;
  for (int i = 0; i < 2; ++i) task.kernel[i] = task.stride[i] = task.dilation[i] = 1;
  task.tile_rows = tile_rows, task.tile_columns = tile_columns;
  task.grad_strides[1] = grad_output.stride(1), task.grad_strides[3] = grad_output.stride(0);
  task.input_strides[1] = input.stride(1), task.input_strides[3] = input.stride(0);
  return run(task, grad_output, input, frozen, tiles, 1, 1, tokens, {task.rows, task.columns});
}

}  // namespace
}  // namespace tersor::weight_gradient

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("frozen_linear_backward", TORCH_BOX(&tersor::weight_gradient::linear));
}

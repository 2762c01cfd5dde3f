// The weight gradient of a convolution in the listed tiles, on the CPU (specification: pyops/freezing/frozen_conv2d.py).

#include "freezing/weight_gradient.h"

#define TERSOR_BODY "freezing/weight_gradient_kernels.h"
#include "foreach_isa.h"

#include "freezing/weight_gradient_run.h"

namespace tersor::weight_gradient {
namespace {

Tensor conv2d(const Tensor& grad_output, const Tensor& input, const std::optional<Tensor>& frozen, const Tensor& tiles,
              const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
              const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t tile_rows,
              int64_t tile_columns) {
  STD_TORCH_CHECK(grad_output.dim() == 4 && input.dim() == 4 && grad_output.size(0) == input.size(0),
                  "grad_output and input must be (N, O, H', W') and (N, I, H, W)");
  Task task{};
  task.rows = grad_output.size(1), task.columns = input.size(1);
  task.input_height = input.size(2), task.input_width = input.size(3);
  task.tile_rows = tile_rows, task.tile_columns = tile_columns;
  for (size_t i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(kernel_size.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2 &&
                        kernel_size[i] >= 1 && stride[i] >= 1 && padding[i] >= 0 && dilation[i] >= 1,
                    "kernel_size, stride, padding and dilation must be two sizes each");
    task.kernel[i] = kernel_size[i], task.stride[i] = stride[i];
    task.padding[i] = padding[i], task.dilation[i] = dilation[i];
    const int64_t span = input.size(2 + i) + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1;
    STD_TORCH_CHECK(span >= 0 && grad_output.size(2 + i) == span / stride[i] + 1,
                    "grad_output must have the size that the window gives for input");
  }
  for (int i = 0; i < 4; ++i) {
    task.grad_strides[i] = grad_output.stride(i), task.input_strides[i] = input.stride(i);
  }
  return run(task, grad_output, input, frozen, tiles, input.size(0), grad_output.size(2), grad_output.size(3),
             {task.rows, task.columns, kernel_size[0], kernel_size[1]});
}

}  // namespace
}  // namespace tersor::weight_gradient

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("frozen_conv2d_backward", TORCH_BOX(&tersor::weight_gradient::conv2d));
}

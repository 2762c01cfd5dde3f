// Convolution with a packed N:M weight on the CPU (specification: pyops/sparsity/nm_packed_conv2d.py).

#include "arena.h"
#include "sparsity/nm_product.h"

#define TERSOR_BODY "sparsity/nm_packed_conv2d_kernels.h"
#include "foreach_isa.h"

#include "sparsity/nm_product_run.h"

namespace tersor::nm_product {
namespace {

template <class T>
void run_convolution(Task& task) {
  if (std::is_same_v<T, BFloat16> && run_tiles(task, TERSOR_FOR_ISA(tile_kernels)(), 1)) return;
  if (run_lone(task, TERSOR_FOR_ISA(lone_kernels<T>)())) return;
  choose_tile(task);
  run_units(task, TERSOR_FOR_ISA(do_unit<T>), TERSOR_FOR_ISA(scratch));
}

void check_window(const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  STD_TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "kernel_size, stride, padding and dilation must have two elements");
  for (int i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(kernel[i] >= 1 && stride[i] >= 1 && padding[i] >= 0 && dilation[i] >= 1,
                    "kernel_size, stride and dilation must be at least 1, padding at least 0");
  }
}

Tensor new_output(const Tensor& input, int64_t channels, const Task& task, bool channels_last) {
  const ScalarType dtype = input.scalar_type();
  const int64_t images = input.size(0);
  if (!channels_last) return torch::stable::new_empty(input, {images, channels, task.out_height, task.out_width}, dtype);
  const Tensor points = torch::stable::new_empty(input, {images, task.out_height, task.out_width, channels}, dtype);
  return torch::stable::transpose(torch::stable::transpose(points, 1, 3), 2, 3);
}

Tensor forward(const Tensor& input, const Tensor& values, const Tensor& index, const std::optional<Tensor>& bias,
               int64_t n, int64_t m, const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
               const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
               std::string activation, bool channels_last) {
  Task task{};
  const Operands operands(input, values, index, bias, n, m, activation, task);
  check_window(kernel, stride, padding, dilation);
  const int64_t outputs = operands.values.size(0), row = operands.values.size(1) * m;
  task.taps = kernel[0] * kernel[1], task.groups = groups, task.channels = row / task.taps;
  STD_TORCH_CHECK(groups >= 1 && outputs % groups == 0 && row % (task.taps * m) == 0,
                  "groups and kernel_size must fit the rows of values");
  STD_TORCH_CHECK(input.is_cpu() && input.dim() == 4 && input.size(1) == task.channels * groups,
                  "input must be (N, ", task.channels * groups, ", H, W) on the CPU");
  task.outputs = outputs / groups, task.height = input.size(2), task.width = input.size(3);
  task.out_height = (task.height + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1) / stride[0] + 1;
  task.out_width = (task.width + 2 * padding[1] - dilation[1] * (kernel[1] - 1) - 1) / stride[1] + 1;
  STD_TORCH_CHECK(task.out_height >= 1 && task.out_width >= 1, "input must be at least as large as the window");
  task.columns = input.size(0) * task.pixels(), task.kernel_w = kernel[1];
  task.stride_h = stride[0], task.stride_w = stride[1], task.padding_h = padding[0], task.padding_w = padding[1];
  task.dilation_h = dilation[0], task.dilation_w = dilation[1];
  Tensor output = new_output(input, outputs, task, channels_last);
  if (output.numel() == 0) return output;
  task.input = input.const_data_ptr(), task.input_n = input.stride(0), task.input_c = input.stride(1);
  task.input_h = input.stride(2), task.input_w = input.stride(3);
  task.output = output.mutable_data_ptr(), task.output_n = output.stride(0), task.output_c = output.stride(1);
  task.output_w = channels_last ? outputs : 1;
  const std::vector<float> zeros(task.channels);  // as wide as any dtype
  task.zeros = zeros.data();
  if (input.scalar_type() == ScalarType::Float) run_convolution<float>(task);
  if (input.scalar_type() == ScalarType::Half) run_convolution<Half>(task);
  if (input.scalar_type() == ScalarType::BFloat16) run_convolution<BFloat16>(task);
  return output;
}

}  // namespace
}  // namespace tersor::nm_product

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("nm_packed_conv2d", TORCH_BOX(&tersor::nm_product::forward));
}

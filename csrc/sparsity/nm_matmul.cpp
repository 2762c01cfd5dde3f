// Product with a packed N:M matrix on the CPU (specification: pyops/sparsity/nm_matmul.py).

#include "arena.h"
#include "sparsity/nm_product.h"

#define TERSOR_BODY "sparsity/nm_matmul_kernels.h"
#include "foreach_isa.h"

#include "sparsity/nm_product_run.h"

namespace tersor::nm_product {
namespace {

constexpr int64_t FEW_FOR_TILES = 5;  // columns from which on matrix tiles are taken
constexpr int64_t FEW = 8;  // columns up to which the weight is read along its rows

// The columns in float32, side by side.
template <class T>
const float* widened(const T* input, int64_t count, Memory& memory) {
  if constexpr (std::is_same_v<T, float>) {
    return input;
  } else {
    memory = allocate(count * sizeof(float));
    float* const to = reinterpret_cast<float*>(memory.get());
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(input[i]);
    return to;
  }
}

template <class T>
void run(Task& task) {
  if (std::is_same_v<T, BFloat16> && run_tiles(task, TERSOR_FOR_ISA(tile_kernels)(), FEW_FOR_TILES)) return;
  if (run_lone(task, TERSOR_FOR_ISA(lone_kernels<T>)())) return;
  if (task.columns <= FEW) {
    Memory memory;
    const float* const columns = widened(static_cast<const T*>(task.input), task.columns * task.row(), memory);
    const auto multiply = TERSOR_FOR_ISA(multiply_vectors<T>);
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, task.kept() * task.columns));
    torch::stable::parallel_for(0, task.outputs, grain, [&](int64_t begin, int64_t end) {
      multiply(task, columns, task.row(), begin, end);
    });
    return;
  }
  choose_tile(task);
  run_units(task, TERSOR_FOR_ISA(do_unit<T>), TERSOR_FOR_ISA(scratch));
}

Tensor forward(const Tensor& input, const Tensor& values, const Tensor& index, const std::optional<Tensor>& bias,
               int64_t n, int64_t m, std::string activation) {
  Task task{};
  const Operands operands(input, values, index, bias, n, m, activation, task);
  task.groups = task.taps = 1, task.outputs = operands.values.size(0), task.channels = operands.values.size(1) * m;
  STD_TORCH_CHECK(input.is_cpu() && input.dim() >= 1 && input.size(-1) == task.channels,
                  "input must be (..., ", task.channels, ") on the CPU");
  const Tensor dense = torch::stable::contiguous(input);
  std::vector<int64_t> shape;
  task.columns = 1;
  for (int64_t i = 0; i + 1 < input.dim(); ++i) shape.push_back(input.size(i)), task.columns *= input.size(i);
  shape.push_back(task.outputs);
  Tensor output = torch::stable::new_empty(dense, shape, input.scalar_type());
  if (output.numel() == 0) return output;
  task.input = dense.const_data_ptr(), task.input_c = 1, task.input_w = task.channels;
  task.height = task.out_height = task.kernel_w = 1, task.width = task.out_width = task.columns;
  task.stride_h = task.stride_w = task.dilation_h = task.dilation_w = 1;
  task.output = output.mutable_data_ptr(), task.output_c = 1, task.output_w = task.outputs;
  if (input.scalar_type() == ScalarType::Float) run<float>(task);
  if (input.scalar_type() == ScalarType::Half) run<Half>(task);
  if (input.scalar_type() == ScalarType::BFloat16) run<BFloat16>(task);
  return output;
}

}  // namespace
}  // namespace tersor::nm_product

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("nm_matmul", TORCH_BOX(&tersor::nm_product::forward));
}

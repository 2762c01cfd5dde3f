// Dilated sliding-window attention on the CPU (specification: pyops/attention/dilated_attention.py).
// One unit of work is a block of rows of one image, with as many heads as the cache has room for; the kernels are in
// dilated_attention_kernels.h, once per instruction set.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "arena.h"
#include "last_dim.h"

namespace tersor::dilated_attention {

struct View {  // (B, H, W, heads, head_dim), head_dim contiguous; strides in elements
  const void* data;
  int64_t batch, row, column, head;
};

struct Task {
  int64_t batch, height, width, heads, head_dim, kernel_size;
  const int64_t* dilation;  // one per head
  int64_t largest_dilation;
  double scale;
  int64_t step_rows;  // query rows that are worked on together, while their keys are in the nearest cache
  View query, key, value, grad_output;
  void *output, *grad_qkv, *logsumexp;  // contiguous

  int64_t taps() const { return kernel_size * kernel_size; }
};

struct Unit {  // what one thread does in one go
  int64_t image, first_head, last_head, first_row, last_row;
};

}  // namespace tersor::dilated_attention

#define TERSOR_BODY "attention/dilated_attention_kernels.h"
#include "foreach_isa.h"

namespace tersor::dilated_attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Run = void (*)(const Task&, const Unit&, char*);
using Scratch = int64_t (*)(const Task&, int64_t, int64_t, bool);

// Query rows of one step. Up to (8, 4) rows were tried on an Intel Xeon whose cores have 2 MiB of level-2 cache.
constexpr int64_t FORWARD_STEP = 2, BACKWARD_STEP = 1;
constexpr int64_t CACHE = 1 << 20;  // bytes of the level-2 cache that the planes of one unit may fill

constexpr int64_t MOST_SCRATCH = int64_t{2} << 30;  // rather an error than a machine out of memory

struct Free {
  void operator()(void* p) const { std::free(p); }
};

View view_of(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// What Python has checked already, once more where memory depends on it.
void check(const Tensor& query, const Tensor& other, const char* name) {
  bool same = other.dim() == 5 && other.scalar_type() == query.scalar_type() && other.is_cpu();
  for (int i = 0; same && i < 5; ++i) same = other.size(i) == query.size(i);
  STD_TORCH_CHECK(same, name, " must be a CPU tensor with the shape and dtype of query");
}

Task make_task(const Tensor& query, const Tensor& key, const Tensor& value, int64_t kernel_size,
               const std::vector<int64_t>& dilation, double scale, std::vector<int64_t>& per_head) {
  STD_TORCH_CHECK(query.dim() == 5 && query.is_cpu(), "query must be a CPU tensor (B, H, W, heads, head_dim)");
  check(query, key, "key");
  check(query, value, "value");
  Task task{};
  task.batch = query.size(0), task.height = query.size(1), task.width = query.size(2);
  task.heads = query.size(3), task.head_dim = query.size(4), task.kernel_size = kernel_size, task.scale = scale;
  const int64_t groups = static_cast<int64_t>(dilation.size());
  STD_TORCH_CHECK(task.height > 0 && task.width > 0 && task.head_dim > 0, "H, W and head_dim must be positive");
  STD_TORCH_CHECK(kernel_size > 0 && kernel_size < 1024, "kernel_size must lie in [1, 1023]");
  STD_TORCH_CHECK(task.heads > 0 && groups > 0 && task.heads % groups == 0,
                  "heads must be a positive multiple of the number of dilations");
  // Beyond twice the image every tap but the centre is outside, whatever the dilation (even, to keep the parity).
  const int64_t farthest = 2 * std::max(task.height, task.width);
  task.largest_dilation = 1;
  per_head.resize(task.heads);
  for (int64_t h = 0; h < task.heads; ++h) {
    const int64_t d = dilation[h / (task.heads / groups)];
    STD_TORCH_CHECK(d > 0 && (d % 2 == 0 || kernel_size % 2 == 1), "dilation * (kernel_size - 1) must be even");
    per_head[h] = std::min(d, farthest);
    task.largest_dilation = std::max(task.largest_dilation, per_head[h]);
  }
  task.dilation = per_head.data();
  task.query = view_of(query), task.key = view_of(key), task.value = view_of(value);
  return task;
}

// The planes' bytes of the largest group when the heads go in groups of `size`.
int64_t largest_group(const Task& task, int64_t size, Scratch scratch, bool backward) {
  int64_t bytes = 0;
  for (int64_t first = 0; first < task.heads; first += size) {
    bytes = std::max(bytes, scratch(task, first, std::min(task.heads, first + size), backward));
  }
  return bytes;
}

void run(const Task& task, Run kernel, Scratch scratch, bool backward) {
  // Neighbouring heads share cache lines, so a unit takes as many as fit.
  int64_t group = task.heads;
  while (group > 1 && largest_group(task, group, scratch, backward) > CACHE) group = (group + 1) / 2;
  const int64_t groups = (task.heads + group - 1) / group, bytes = largest_group(task, group, scratch, backward);
  STD_TORCH_CHECK(bytes <= MOST_SCRATCH, "dilated_attention: a window of kernel_size ", task.kernel_size,
                  " and dilation ", task.largest_dilation, " needs ", bytes >> 20,
                  " MiB of working memory a thread on an image of this size; at most ", MOST_SCRATCH >> 20, " are taken");
  // Blocks of rows only where images and groups do not keep the threads busy: neighbouring blocks share rows.
  const int64_t wanted = 2 * torch::stable::get_num_threads(), images = task.batch * groups;
  const int64_t reach = task.largest_dilation * (task.kernel_size - 1) / 2;
  const int64_t fewest = std::min(task.height, std::max<int64_t>(4, 2 * reach));
  const int64_t rows = std::max(fewest, (task.height * images + wanted - 1) / std::max(wanted, images));
  const int64_t blocks = (task.height + rows - 1) / rows;
  torch::stable::parallel_for(0, images * blocks, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char, Free> memory(static_cast<char*>(std::aligned_alloc(64, bytes)));
    if (!memory) throw std::bad_alloc();
    for (int64_t i = begin; i < end; ++i) {
#ifdef TERSOR_POISON
      std::memset(memory.get(), 0xff, bytes);  // NaN in every type
#endif
      const int64_t block = i % blocks, first = i / blocks % groups * group;
      const Unit unit{i / blocks / groups, first, std::min(task.heads, first + group), block * rows,
                      std::min(task.height, (block + 1) * rows)};
      kernel(task, unit, memory.get());
    }
  });
}

template <class T, class A>
void run_forward(const Task& task) {
  run(task, TERSOR_FOR_ISA(forward_unit<T, A>), TERSOR_FOR_ISA(scratch<A>), false);
}

template <class T, class A>
void run_backward(const Task& task) {
  run(task, TERSOR_FOR_ISA(backward_unit<T, A>), TERSOR_FOR_ISA(scratch<A>), true);
}

ScalarType checked_dtype(const Tensor& query) {
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Double,
                  "query must be float16, bfloat16, float32 or float64");
  return dtype;
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value, int64_t kernel_size,
                                   const std::vector<int64_t>& dilation, double scale) {
  const ScalarType dtype = checked_dtype(query);
  const Tensor q = last_dim_contiguous(query), k = last_dim_contiguous(key), v = last_dim_contiguous(value);
  std::vector<int64_t> per_head;
  Task task = make_task(q, k, v, kernel_size, dilation, scale, per_head);
  const ScalarType exact = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor output = torch::stable::new_empty(
      query, {task.batch, task.height, task.width, task.heads, task.head_dim}, dtype);
  Tensor logsumexp = torch::stable::new_empty(query, {task.batch, task.heads, task.height, task.width}, exact);
  if (task.batch == 0) return {output, logsumexp};
  task.output = output.mutable_data_ptr(), task.logsumexp = logsumexp.mutable_data_ptr();
  task.step_rows = std::min(FORWARD_STEP, task.height);
  if (dtype == ScalarType::Float) run_forward<float, float>(task);
  if (dtype == ScalarType::Half) run_forward<Half, float>(task);
  if (dtype == ScalarType::BFloat16) run_forward<BFloat16, float>(task);
  if (dtype == ScalarType::Double) run_forward<double, double>(task);
  return {output, logsumexp};
}

// `output` is not read: <grad_output, output> follows from the weights at hand, for an eighth less traffic.
Tensor backward(const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor&,
                const Tensor& logsumexp, int64_t kernel_size, const std::vector<int64_t>& dilation, double scale) {
  const ScalarType dtype = checked_dtype(query);
  const Tensor q = last_dim_contiguous(query), k = last_dim_contiguous(key), v = last_dim_contiguous(value);
  const Tensor g = last_dim_contiguous(grad_output), lse = torch::stable::contiguous(logsumexp);
  std::vector<int64_t> per_head;
  Task task = make_task(q, k, v, kernel_size, dilation, scale, per_head);
  check(q, g, "grad_output");
  const ScalarType exact = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(lse.scalar_type() == exact && lse.is_cpu() && lse.dim() == 4 && lse.size(0) == task.batch &&
                      lse.size(1) == task.heads && lse.size(2) == task.height && lse.size(3) == task.width,
                  "logsumexp must be (B, heads, H, W) as the forward operator returns it");
  Tensor grad_qkv = torch::stable::new_empty(
      query, {task.batch, task.height, task.width, 3, task.heads, task.head_dim}, dtype);
  if (task.batch == 0) return grad_qkv;
  task.grad_output = view_of(g), task.grad_qkv = grad_qkv.mutable_data_ptr();
  task.logsumexp = const_cast<void*>(lse.const_data_ptr());
  task.step_rows = std::min(BACKWARD_STEP, task.height);
  if (dtype == ScalarType::Float) run_backward<float, float>(task);
  if (dtype == ScalarType::Half) run_backward<Half, float>(task);
  if (dtype == ScalarType::BFloat16) run_backward<BFloat16, float>(task);
  if (dtype == ScalarType::Double) run_backward<double, double>(task);
  return grad_qkv;
}

}  // namespace
}  // namespace tersor::dilated_attention

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("dilated_attention_forward", TORCH_BOX(&tersor::dilated_attention::forward));
  module.impl("dilated_attention_backward", TORCH_BOX(&tersor::dilated_attention::backward));
}

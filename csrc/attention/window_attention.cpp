// Shifted-window attention on the CPU (specification: pyops/attention/window_attention.py). The kernels are in
// window_attention_kernels.h, once per instruction set.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <vector>

#include "arena.h"
#include "attention/window_attention.h"
#include "last_dim.h"
#include "memory.h"

#define TERSOR_BODY "attention/window_attention_kernels.h"
#include "foreach_isa.h"

namespace tersor::window_attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Run = void (*)(const Task&, int64_t, int64_t, char*);

constexpr int64_t MOST_SCRATCH = int64_t{2} << 30;  // bytes a thread: rather an error than a machine out of memory
constexpr int64_t MOST_TOKENS = int64_t{1} << 20;   // of a window: far beyond use, and what it squares still fits
// Windows whose bias gradients are summed by one thread: enough blocks for many threads, and few tables to add up.
constexpr int64_t MOST_BLOCKS = 32;
constexpr int64_t GRAIN = 4;  // windows of a head: about 20 us

View view_of(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

template <class A>
constexpr ScalarType dtype_of() {
  return sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
}

bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Double;
}

// What Python has checked already, once more where memory depends on it.
void check(const Tensor& query, const Tensor& other, const char* name) {
  bool same = other.dim() == 5 && other.scalar_type() == query.scalar_type() && other.is_cpu();
  for (int i = 0; same && i < 5; ++i) same = other.size(i) == query.size(i);
  STD_TORCH_CHECK(same, name, " must be a CPU tensor with the shape and dtype of query");
}

Task make_task(const Tensor& query, const Tensor& key, const Tensor& value, const std::vector<int64_t>& window_size,
               const std::vector<int64_t>& shift, double mask_value, double scale) {
  STD_TORCH_CHECK(query.dim() == 5 && query.is_cpu(), "query must be a CPU tensor (B, H, W, heads, head_dim)");
  STD_TORCH_CHECK(is_floating(query.scalar_type()), "query must be float16, bfloat16, float32 or float64");
  check(query, key, "key");
  check(query, value, "value");
  Task task{};
  task.batch = query.size(0), task.height = query.size(1), task.width = query.size(2);
  task.heads = query.size(3), task.head_dim = query.size(4);
  task.scale = scale, task.mask_value = mask_value;
  STD_TORCH_CHECK(task.height > 0 && task.width > 0 && task.heads > 0 && task.head_dim > 0,
                  "H, W, heads and head_dim must be positive");
  STD_TORCH_CHECK(window_size.size() == 2 && shift.size() == 2, "window_size and shift must have two entries");
  task.window_h = window_size[0], task.window_w = window_size[1], task.shift_h = shift[0], task.shift_w = shift[1];
  STD_TORCH_CHECK(task.window_h > 0 && task.window_w > 0 && task.height % task.window_h == 0 &&
                      task.width % task.window_w == 0,
                  "H and W must be multiples of the window's size");
  STD_TORCH_CHECK(task.window_h <= MOST_TOKENS / task.window_w, "window_attention: a window may hold at most ",
                  MOST_TOKENS, " tokens");
  STD_TORCH_CHECK(std::abs(task.shift_h) < task.window_h && std::abs(task.shift_w) < task.window_w,
                  "shift must be nearer to 0 than the window's size");
  task.query = view_of(query), task.key = view_of(key), task.value = view_of(value);
  return task;
}

// Sets the mask; returns what keeps it alive.
std::optional<Tensor> take_mask(Task& task, const std::optional<Tensor>& mask) {
  if (!mask) return {};
  const Tensor& m = *mask;
  const int64_t tokens = task.tokens();
  const bool pairs = m.dim() == 4;
  STD_TORCH_CHECK(m.scalar_type() == ScalarType::Bool && m.is_cpu() && (m.dim() == 3 || pairs) &&
                      (m.size(0) == 1 || m.size(0) == task.batch) && m.size(1) == (pairs ? task.windows() : task.height) &&
                      m.size(2) == (pairs ? tokens : task.width) && (!pairs || m.size(3) == tokens),
                  "mask must be a CPU bool tensor (1 or B, H, W) or (1 or B, windows, N, N)");
  std::optional<Tensor> whole = torch::stable::contiguous(m);
  task.mask = static_cast<const bool*>(whole->const_data_ptr()), task.mask_of_pairs = pairs;
  task.mask_batch = m.size(0) == 1 ? 0 : pairs ? task.windows() * tokens * tokens : task.height * task.width;
  return whole;
}

// table[(dy, dx)][head] and its place in the spread table of the head: f(table index, spread index).
template <class Visit>
void for_spread(const Task& task, Visit visit) {
  const int64_t w = task.window_w, rows = 2 * task.window_h - 1;
  for (int64_t key = 0; key < w; ++key) {
    for (int64_t dy = 0; dy < rows; ++dy) {
      for (int64_t query = 0; query < w; ++query) {
        visit(dy * (2 * w - 1) + query - key + w - 1, key * task.bias_column() + dy * w + query);
      }
    }
  }
}

void check_bias(const Task& task, const Tensor& bias) {
  STD_TORCH_CHECK(is_floating(bias.scalar_type()) && bias.is_cpu() && bias.dim() == 2 &&
                      bias.size(0) == (2 * task.window_h - 1) * (2 * task.window_w - 1) && bias.size(1) == task.heads,
                  "position_bias must be a floating-point CPU tensor ((2 h - 1) * (2 w - 1), heads)");
}

// Sets the bias, spread for every head; returns what keeps it alive.
template <class A>
Memory spread_bias(Task& task, const std::optional<Tensor>& position_bias) {
  if (!position_bias) return {};
  check_bias(task, *position_bias);
  const bool same = position_bias->scalar_type() == dtype_of<A>();
  const Tensor table = torch::stable::contiguous(same ? *position_bias : torch::stable::to(*position_bias, dtype_of<A>()));
  const A* from = static_cast<const A*>(table.const_data_ptr());
  Memory memory = allocate(task.heads * task.bias_size() * static_cast<int64_t>(sizeof(A)));
  A* spread = reinterpret_cast<A*>(memory.get());
  for (int64_t head = 0; head < task.heads; ++head, spread += task.bias_size()) {
    for_spread(task, [&](int64_t index, int64_t place) { spread[place] = from[index * task.heads + head]; });
    std::fill(spread + task.bias_size() - Task::BIAS_SLACK, spread + task.bias_size(), A(0));
  }
  task.bias = memory.get();
  return memory;
}

// The blocks' spread tables added up in order, in the first one's place, and of the sum all that stands for one entry.
template <class A>
Tensor gather_bias(const Task& task, const Tensor& like, A* blocks) {
  const int64_t size = task.bias_size(), entries = (2 * task.window_h - 1) * (2 * task.window_w - 1);
  if (task.blocks == 0) std::fill(blocks, blocks + task.heads * size, A(0));
  for (int64_t block = 1; block < task.blocks; ++block) {
    const A* from = blocks + block * task.heads * size;
    for (int64_t i = 0; i < task.heads * size; ++i) blocks[i] += from[i];
  }
  Tensor table = torch::stable::new_empty(like, {entries, task.heads}, dtype_of<A>());
  A* to = static_cast<A*>(table.mutable_data_ptr());
  std::vector<double> sums(entries);
  for (int64_t head = 0; head < task.heads; ++head, blocks += size) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for_spread(task, [&](int64_t index, int64_t place) { sums[index] += static_cast<double>(blocks[place]); });
    for (int64_t i = 0; i < entries; ++i) to[i * task.heads + head] = static_cast<A>(sums[i]);
  }
  return like.scalar_type() == dtype_of<A>() ? table : torch::stable::to(table, like.scalar_type());
}

void run(const Task& task, int64_t units, int64_t grain, int64_t bytes, Run kernel) {
  STD_TORCH_CHECK(bytes <= MOST_SCRATCH, "window_attention: a window of ", task.window_h, " x ", task.window_w,
                  " tokens needs ", bytes >> 20, " MiB of working memory a thread; at most ", MOST_SCRATCH >> 20,
                  " are taken");
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    const Memory memory = allocate(bytes);
    kernel(task, begin, end, memory.get());
  });
}

template <class T, class A>
void run_forward(Task& task, const std::optional<Tensor>& position_bias) {
  const Memory bias = spread_bias<A>(task, position_bias);
  run(task, task.batch * task.windows() * task.heads, GRAIN, TERSOR_FOR_ISA(scratch<A>)(task, false),
      TERSOR_FOR_ISA(forward_units<T, A>));
}

template <class T, class A>
Tensor run_backward(Task& task, const Tensor& query, const std::optional<Tensor>& position_bias) {
  const Memory bias = spread_bias<A>(task, position_bias);
  const int64_t windows = task.batch * task.windows();
  task.block_windows = std::max<int64_t>(1, (windows + MOST_BLOCKS - 1) / MOST_BLOCKS);
  task.blocks = (windows + task.block_windows - 1) / task.block_windows;
  // Heads share cache lines and pages; few blocks are divided by heads all the same, for threads to have work.
  task.head_group = 2 * task.blocks >= MOST_BLOCKS ? task.heads : 1;
  Memory tables;
  if (position_bias) {
    const int64_t count = std::max<int64_t>(1, task.blocks) * task.heads;
    tables = allocate(count * task.bias_size() * static_cast<int64_t>(sizeof(A)));
    task.grad_bias = tables.get();
  }
  const int64_t grain = std::max<int64_t>(1, GRAIN / (task.block_windows * task.head_group));
  run(task, task.blocks * (task.heads / task.head_group), grain, TERSOR_FOR_ISA(scratch<A>)(task, true), TERSOR_FOR_ISA(backward_units<T, A>));
  if (!position_bias) return torch::stable::new_empty(query, {0});
  return gather_bias<A>(task, *position_bias, reinterpret_cast<A*>(tables.get()));
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const std::optional<Tensor>& position_bias, const std::optional<Tensor>& mask,
                                   const std::vector<int64_t>& window_size, const std::vector<int64_t>& shift,
                                   double mask_value, double scale) {
  const Tensor q = last_dim_contiguous(query), k = last_dim_contiguous(key), v = last_dim_contiguous(value);
  Task task = make_task(q, k, v, window_size, shift, mask_value, scale);
  const std::optional<Tensor> kept = take_mask(task, mask);
  const ScalarType dtype = query.scalar_type();
  const ScalarType exact = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor output = torch::stable::new_empty(
      query, {task.batch, task.height, task.width, task.heads, task.head_dim}, dtype);
  Tensor logsumexp = torch::stable::new_empty(query, {task.batch, task.heads, task.height, task.width}, exact);
  task.output = view_of(output), task.logsumexp = logsumexp.mutable_data_ptr();
  if (dtype == ScalarType::Float) run_forward<float, float>(task, position_bias);
  if (dtype == ScalarType::Half) run_forward<Half, float>(task, position_bias);
  if (dtype == ScalarType::BFloat16) run_forward<BFloat16, float>(task, position_bias);
  if (dtype == ScalarType::Double) run_forward<double, double>(task, position_bias);
  return {output, logsumexp};
}

// Where the three gradients lie in the flat result: `packs` says how many lie side by side at each token.
void place_gradients(Task& task, const std::vector<int64_t>& packs, char* data, int64_t element) {
  const int64_t channels = task.heads * task.head_dim;
  const int64_t all = task.batch * task.height * task.width * channels;
  int64_t part = 0;
  for (const int64_t count : packs) {
    STD_TORCH_CHECK(count > 0 && part + count <= 3, "packs must be positive and sum to 3");
    char* pack = data + part * all * element;
    for (int64_t i = 0; i < count; ++i, ++part) {
      const int64_t column = count * channels, row = task.width * column;
      task.gradients[part] = {pack + i * channels * element, task.height * row, row, column, task.head_dim};
    }
  }
  STD_TORCH_CHECK(part == 3, "packs must be positive and sum to 3");
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                    const Tensor& value, const std::optional<Tensor>& position_bias,
                                    const std::optional<Tensor>& mask, const Tensor& logsumexp,
                                    const std::vector<int64_t>& window_size, const std::vector<int64_t>& shift,
                                    double mask_value, double scale, const std::vector<int64_t>& packs) {
  const Tensor q = last_dim_contiguous(query), k = last_dim_contiguous(key), v = last_dim_contiguous(value);
  const Tensor g = last_dim_contiguous(grad_output), lse = torch::stable::contiguous(logsumexp);
  Task task = make_task(q, k, v, window_size, shift, mask_value, scale);
  check(q, g, "grad_output");
  const std::optional<Tensor> kept = take_mask(task, mask);
  const ScalarType dtype = query.scalar_type();
  const ScalarType exact = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(lse.scalar_type() == exact && lse.is_cpu() && lse.dim() == 4 && lse.size(0) == task.batch &&
                      lse.size(1) == task.heads && lse.size(2) == task.height && lse.size(3) == task.width,
                  "logsumexp must be (B, heads, H, W) as the forward operator returns it");
  Tensor gradient = torch::stable::new_empty(
      query, {3 * task.batch * task.height * task.width * task.heads * task.head_dim}, dtype);
  const int64_t element = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  place_gradients(task, packs, static_cast<char*>(gradient.mutable_data_ptr()), element);
  task.grad_output = view_of(g), task.logsumexp = const_cast<void*>(lse.const_data_ptr());
  if (dtype == ScalarType::Float) return {gradient, run_backward<float, float>(task, query, position_bias)};
  if (dtype == ScalarType::Half) return {gradient, run_backward<Half, float>(task, query, position_bias)};
  if (dtype == ScalarType::BFloat16) return {gradient, run_backward<BFloat16, float>(task, query, position_bias)};
  return {gradient, run_backward<double, double>(task, query, position_bias)};
}

}  // namespace
}  // namespace tersor::window_attention

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("window_attention_forward", TORCH_BOX(&tersor::window_attention::forward));
  module.impl("window_attention_backward", TORCH_BOX(&tersor::window_attention::backward));
}

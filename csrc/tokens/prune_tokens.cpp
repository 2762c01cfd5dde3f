// Residual, choice of tokens and layer norm on the CPU (specification: pyops/tokens/prune_tokens.py).

#include "tokens/prune_tokens.h"
#include "tokens/rank.h"

#define TERSOR_BODY "tokens/prune_tokens_kernels.h"
#include "foreach_isa.h"

namespace tersor::tokens {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& branch, const Tensor& weight,
                                           const Tensor& bias, const Tensor& scores, int64_t count, double scale,
                                           double eps) {
  STD_TORCH_CHECK(input.dim() == 3 && input.size(1) >= 2, "input must be (B, n, C), n at least 2");
  const int64_t batch = input.size(0), length = input.size(1), channels = input.size(2);
  STD_TORCH_CHECK(count > 0 && count < length, "count must be from 1 to n - 1");
  const Tensor x = checked(input, input, "input", {batch, length, channels});
  const Tensor y = checked(branch, input, "branch", {batch, length, channels});
  const Tensor factors = torch::stable::contiguous(checked(weight, input, "weight", {channels}));
  const Tensor offsets = torch::stable::contiguous(checked(bias, input, "bias", {channels}));
  STD_TORCH_CHECK(scores.is_cpu() && scores.dim() == 2 && scores.size(0) == batch && scores.size(1) == length - 1 &&
                      is_floating(scores.scalar_type()),
                  "scores must be a floating CPU tensor (B, n - 1)");
  const Tensor own = torch::stable::contiguous(scores);
  std::vector<int64_t> order(batch * (length - 1));
  rank_all(TERSOR_RANK_ROWS(own), own, order.data());

  Tensor tokens = torch::stable::new_empty(x, {batch, 1 + count, channels});
  Tensor normalized = torch::stable::new_empty(x, {batch, 1 + count, channels});
  Tensor index = torch::stable::new_empty(x, {batch, 1 + count}, ScalarType::Long);
  Prune task{};
  task.batch = batch, task.length = length, task.channels = channels, task.count = count;
  task.scale = scale, task.eps = eps, task.input = rows_of(x), task.branch = rows_of(y);
  task.weight = factors.const_data_ptr(), task.bias = offsets.const_data_ptr(), task.order = order.data();
  task.index = static_cast<int64_t*>(index.mutable_data_ptr());
  task.tokens = out_rows_of(tokens), task.normalized = out_rows_of(normalized);
  with_type(x, [&](auto type) {
    using T = decltype(type);
    using A = Accumulated<T>;
    const int64_t grain = grain_for(4 * channels * static_cast<int64_t>(sizeof(T)));
    torch::stable::parallel_for(0, batch * task.kept_rows(), grain, [&](int64_t begin, int64_t end) {
      const Memory row = allocate(channels * static_cast<int64_t>(sizeof(A)));
      TERSOR_FOR_ISA(prune_units<T, A>)(task, begin, end, reinterpret_cast<A*>(row.get()));
    });
  });
  return {tokens, normalized, index};
}

// The blocks' sums in their order, in double precision.
template <class T, class A>
void combine(const Prune& task, const A* sums, T* grad_weight, T* grad_bias) {
  for (int64_t c = 0; c < task.channels; ++c) {
    double weight = 0, bias = 0;
    for (int64_t block = 0; block < task.blocks(); ++block) {
      const A* own = sums + block * 2 * task.channels;
      weight += static_cast<double>(own[c]), bias += static_cast<double>(own[task.channels + c]);
    }
    grad_weight[c] = static_cast<T>(static_cast<A>(weight)), grad_bias[c] = static_cast<T>(static_cast<A>(bias));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_tokens, const Tensor& grad_normalized,
                                                    const Tensor& tokens, const Tensor& weight, const Tensor& given,
                                                    int64_t length, double scale, double eps, bool need_branch,
                                                    bool need_parameters) {
  STD_TORCH_CHECK(tokens.dim() == 3 && length >= 2, "tokens must be (B, 1 + m, C), length at least 2");
  const int64_t batch = tokens.size(0), rows = tokens.size(1), channels = tokens.size(2);
  const Tensor t = checked(tokens, tokens, "tokens", {batch, rows, channels});
  const Tensor direct = checked(grad_tokens, tokens, "grad_tokens", {batch, rows, channels});
  const Tensor grad = checked(grad_normalized, tokens, "grad_normalized", {batch, rows, channels});
  const Tensor factors = torch::stable::contiguous(checked(weight, tokens, "weight", {channels}));
  const Tensor index = checked_index(given, batch, rows, "index");
  std::vector<int32_t> kept(batch * length);
  invert(places_of(index), batch, rows, length, kept.data());

  Tensor grad_input = torch::stable::new_empty(t, {batch, length, channels});
  Tensor grad_branch =
      need_branch ? torch::stable::new_empty(t, {batch, length, channels}) : torch::stable::new_empty(t, {0});
  Tensor grad_weight = torch::stable::new_empty(t, {need_parameters ? channels : 0});
  Tensor grad_bias = torch::stable::new_empty(t, {need_parameters ? channels : 0});
  Prune task{};
  task.batch = batch, task.length = length, task.channels = channels, task.count = rows - 1;
  task.scale = scale, task.eps = eps, task.tokens_in = rows_of(t), task.weight = factors.const_data_ptr();
  task.grad_tokens = rows_of(direct), task.grad_normalized = rows_of(grad), task.kept = kept.data();
  task.grad_input = out_rows_of(grad_input), task.grad_branch = out_rows_of(grad_branch);
  with_type(t, [&](auto type) {
    using T = decltype(type);
    using A = Accumulated<T>;
    const int64_t bytes = channels * static_cast<int64_t>(sizeof(A));
    const Memory sums = allocate(need_parameters ? task.blocks() * 2 * bytes : 0);
    task.sums = need_parameters ? sums.get() : nullptr;
    torch::stable::parallel_for(0, task.blocks(), 1, [&](int64_t begin, int64_t end) {
      const Memory row = allocate(bytes);
      TERSOR_FOR_ISA(prune_gradients<T, A>)(task, begin, end, reinterpret_cast<A*>(row.get()));
    });
    if (!need_parameters) return;
    combine<T, A>(task, reinterpret_cast<const A*>(sums.get()), static_cast<T*>(grad_weight.mutable_data_ptr()),
                  static_cast<T*>(grad_bias.mutable_data_ptr()));
  });
  return {grad_input, grad_branch, grad_weight, grad_bias};
}

}  // namespace
}  // namespace tersor::tokens

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("prune_tokens_forward", TORCH_BOX(&tersor::tokens::forward));
  module.impl("prune_tokens_backward", TORCH_BOX(&tersor::tokens::backward));
}

// Tokens merged into their weighted mean on the CPU (specification: pyops/tokens/merge_tokens.py).

#include "tokens/merge_tokens.h"

#define TERSOR_BODY "tokens/merge_tokens_kernels.h"
#include "foreach_isa.h"

namespace tersor::tokens {
namespace {

// Sums are in this type, and so are the sizes.
ScalarType exact_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor checked_sizes(const Tensor& t, const Tensor& like, int64_t batch, int64_t columns, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == exact_type(like) && t.dim() == 2 && t.size(0) == batch &&
                      t.size(1) == columns,
                  name, " must be a float32 (float64 for float64) CPU tensor that fits the other arguments");
  return torch::stable::contiguous(t);
}

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& given, const Maybe& given_sizes, int64_t length) {
  STD_TORCH_CHECK(input.dim() == 3 && length >= 0, "input must be (B, n, C), length at least 0");
  const int64_t batch = input.size(0), tokens = input.size(1), channels = input.size(2);
  const Tensor x = checked(input, input, "input", {batch, tokens, channels});
  const Tensor index = checked_index(given, batch, tokens, "index");
  const Tensor sizes = given_sizes ? checked_sizes(*given_sizes, x, batch, tokens, "sizes") : x;
  Tensor output = torch::stable::new_empty(x, {batch, length, channels});
  Tensor output_sizes = torch::stable::new_empty(x, {batch, length}, exact_type(x));
  const int64_t* places = places_of(index);
  const Chains chains(batch * length, batch * tokens, [&](int64_t i) {
    return places[i] >= 0 && places[i] < length ? i / tokens * length + places[i] : -1;
  });
  Merge task{};
  task.tokens = tokens, task.places = length, task.channels = channels;
  task.input = rows_of(x), task.output = out_rows_of(output), task.chains = &chains;
  task.sizes = given_sizes ? sizes.const_data_ptr() : nullptr, task.output_sizes = output_sizes.mutable_data_ptr();
  with_type(x, [&](auto type) {
    using T = decltype(type);
    const int64_t grain = grain_for(2 * channels * static_cast<int64_t>(sizeof(T)));
    torch::stable::parallel_for(0, batch * length, grain, [&](int64_t begin, int64_t end) {
      TERSOR_FOR_ISA(merge_units<T, Accumulated<T>>)(task, begin, end);
    });
  });
  return {output, output_sizes};
}

Tensor backward(const Tensor& grad_output, const Tensor& given, const Maybe& given_sizes,
                const Tensor& given_output_sizes) {
  STD_TORCH_CHECK(grad_output.dim() == 3 && given.dim() == 2, "grad_output must be (B, m, C), index (B, n)");
  const int64_t batch = grad_output.size(0), length = grad_output.size(1), channels = grad_output.size(2);
  const int64_t tokens = given.size(1);
  const Tensor grad = checked(grad_output, grad_output, "grad_output", {batch, length, channels});
  const Tensor index = checked_index(given, batch, tokens, "index");
  const Tensor sizes = given_sizes ? checked_sizes(*given_sizes, grad, batch, tokens, "sizes") : grad;
  const Tensor output_sizes = checked_sizes(given_output_sizes, grad, batch, length, "output_sizes");
  Tensor grad_input = torch::stable::new_empty(grad, {batch, tokens, channels});
  Merge task{};
  task.tokens = tokens, task.places = length, task.channels = channels, task.index = places_of(index);
  task.grad_output = rows_of(grad), task.grad_input = out_rows_of(grad_input);
  task.sizes = given_sizes ? sizes.const_data_ptr() : nullptr, task.totals = output_sizes.const_data_ptr();
  with_type(grad, [&](auto type) {
    using T = decltype(type);
    const int64_t grain = grain_for(2 * channels * static_cast<int64_t>(sizeof(T)));
    torch::stable::parallel_for(0, batch * tokens, grain, [&](int64_t begin, int64_t end) {
      TERSOR_FOR_ISA(merge_gradients<T, Accumulated<T>>)(task, begin, end);
    });
  });
  return grad_input;
}

}  // namespace
}  // namespace tersor::tokens

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("merge_tokens_forward", TORCH_BOX(&tersor::tokens::forward));
  module.impl("merge_tokens_backward", TORCH_BOX(&tersor::tokens::backward));
}

// Tokens by index on the CPU (specification: pyops/tokens/gather_tokens.py). Rows are copied whole, so that the C
// library's own choice of instructions is all there is to choose.

#include <limits>

#include "tokens/scatter.h"

namespace tersor::tokens {
namespace {

Tensor forward(const Tensor& input, const Tensor& given) {
  const Tensor x = checked(input, input, "input", {input.size(0), input.size(1), input.size(2)});
  const int64_t batch = x.size(0), length = x.size(1), channels = x.size(2);
  const Tensor index = checked_index(given, batch, -1, "index");
  const int64_t columns = index.size(1);
  Tensor output = torch::stable::new_empty(x, {batch, columns, channels});
  const Rows from = rows_of(x);
  const OutRows to = out_rows_of(output);
  const int64_t* places = places_of(index);
  with_type(x, [&](auto type) {
    using T = decltype(type);
    const int64_t bytes = channels * static_cast<int64_t>(sizeof(T));
    torch::stable::parallel_for(0, batch * columns, grain_for(bytes), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t b = unit / columns, j = unit % columns, place = places[unit];
        T* row = to.at<T>(b, j);
        if (place >= 0 && place < length) std::memcpy(row, from.at<T>(b, place), bytes);
        else std::fill(row, row + channels, T(std::numeric_limits<float>::quiet_NaN()));
      }
    });
  });
  return output;
}

Tensor backward(const Tensor& grad_output, const Tensor& given, int64_t length) {
  STD_TORCH_CHECK(grad_output.dim() == 3 && length >= 0, "grad_output must be (B, m, C)");
  const int64_t batch = grad_output.size(0), columns = grad_output.size(1), channels = grad_output.size(2);
  const Tensor grad = checked(grad_output, grad_output, "grad_output", {batch, columns, channels});
  const Tensor index = checked_index(given, batch, columns, "index");
  Tensor result = torch::stable::new_empty(grad, {batch, length, channels});
  const Rows from = rows_of(grad);
  const OutRows to = out_rows_of(result);
  const int64_t* places = places_of(index);
  const Chains chains(batch * length, batch * columns, [&](int64_t j) {
    const int64_t place = places[j];
    return place >= 0 && place < length ? j / columns * length + place : -1;
  });
  with_type(grad, [&](auto type) {
    using T = decltype(type);
    const auto row = [&](int64_t j) { return from.at<T>(j / columns, j % columns); };
    const int64_t grain = grain_for(channels * static_cast<int64_t>(sizeof(T)));
    torch::stable::parallel_for(0, batch * length, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) add_chain(chains, i, row, channels, to.at<T>(i / length, i % length));
    });
  });
  return result;
}

}  // namespace
}  // namespace tersor::tokens

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("gather_tokens_forward", TORCH_BOX(&tersor::tokens::forward));
  module.impl("gather_tokens_backward", TORCH_BOX(&tersor::tokens::backward));
}

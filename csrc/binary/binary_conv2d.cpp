// Convolution of signs in training, on the CPU (specification: pyops/binary/binary_conv2d.py): counted forwards, by
// torch's own convolution of the unpacked signs backwards.

#include <array>

#include "binary/signs.h"

namespace tersor::binary {

Weight block_weight(const Tensor& signs, int64_t channels, int64_t groups) {
  const int64_t all = signs.size(1), outputs = all / groups, taps = signs.size(2) * signs.size(3);
  const int64_t words = signs.size(5), blocks = (outputs + BLOCK - 1) / BLOCK, row = taps * words;
  const auto* const positive = static_cast<const int64_t*>(signs.const_data_ptr());
  const int64_t* const nonzero = positive + all * row;
  const uint64_t last = channels % WORD ? (uint64_t{1} << channels % WORD) - 1 : ~uint64_t{0};
  uint64_t missing = 0;
  for (int64_t i = 0; i < all * row; ++i) {
    missing |= static_cast<uint64_t>(nonzero[i]) ^ (i % words + 1 == words ? last : ~uint64_t{0});
  }
  const int64_t planes = missing ? 2 : 1;
  Weight weight{torch::stable::new_zeros(signs, {planes, groups, blocks, signs.size(2), signs.size(3), words, BLOCK},
                                         ScalarType::Long),
                new_tensor({all, signs.size(2), signs.size(3)}, ScalarType::Int)};
  auto* const to = static_cast<int64_t*>(weight.blocks.mutable_data_ptr());
  auto* const sums = static_cast<int32_t*>(weight.sums.mutable_data_ptr());
  const int64_t plane = groups * blocks * row * BLOCK;
  torch::stable::parallel_for(0, all, grain_for(16 * row), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      const int64_t own = o % outputs, block = o / outputs * blocks + own / BLOCK;
      int64_t* const start = to + block * row * BLOCK + own % BLOCK;
      for (int64_t i = 0; i < row; ++i) {
        start[i * BLOCK] = positive[o * row + i];
        if (planes == 2) start[plane + i * BLOCK] = nonzero[o * row + i];
      }
      for (int64_t t = 0; t < taps; ++t) {
        int32_t sum = 0;
        for (int64_t w = 0; w < words; ++w) sum += __builtin_popcountll(positive[o * row + t * words + w]);
        sums[o * taps + t] = sum;
      }
    }
  });
  return weight;
}

namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& weight, const Maybe& scale,
                                           const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                                           int64_t groups) {
  STD_TORCH_CHECK(input.is_cpu() && weight.is_cpu() && input.dim() == 4 && weight.dim() == 4 &&
                      input.scalar_type() == weight.scalar_type() && groups > 0 && input.size(1) % groups == 0 &&
                      weight.size(1) == input.size(1) / groups && weight.numel() > 0 && weight.size(0) % groups == 0,
                  "input and weight must be (N, C, H, W) and (O, C / groups, KH, KW) of one dtype on the CPU");
  const Tensor input_signs = pack(input, std::nullopt, groups), weight_signs = pack(weight, std::nullopt, 1);
  const Weight blocks = block_weight(weight_signs, weight.size(1), groups);
  const Tensor output = scaled_numbers(input_signs, blocks, scale, weight.size(1), stride, padding, dilation,
                                       input.scalar_type(), is_channels_last(input));
  return {output, input_signs, weight_signs};
}

// Times a number for each output channel, which is the outermost dimension in memory.
void scale_outputs(Tensor& weight, const Tensor& scale) {
  const int64_t outputs = weight.size(0), row = weight.numel() / outputs;
  with_type(weight.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = Accumulated<T>;
    T* const numbers = static_cast<T*>(weight.mutable_data_ptr());
    const T* const factors = static_cast<const T*>(scale.const_data_ptr());
    torch::stable::parallel_for(0, outputs, grain_for(4 * row), [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        const A factor = static_cast<A>(factors[o]);
        T* const own = numbers + o * row;
        for (int64_t i = 0; i < row; ++i) own[i] = static_cast<T>(static_cast<A>(own[i]) * factor);
      }
    });
  });
}

// For each output the sum of products, both in the same order of memory.
Tensor sum_outputs(const Tensor& first, const Tensor& second) {
  const int64_t outputs = first.size(0), row = first.numel() / outputs;
  Tensor sums = new_tensor({outputs}, first.scalar_type());
  with_type(first.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* const a = static_cast<const T*>(first.const_data_ptr());
    const T* const b = static_cast<const T*>(second.const_data_ptr());
    T* const to = static_cast<T*>(sums.mutable_data_ptr());
    torch::stable::parallel_for(0, outputs, grain_for(8 * row), [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        double sum = 0;
        for (int64_t i = o * row; i < (o + 1) * row; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
        to[o] = static_cast<T>(static_cast<Accumulated<T>>(sum));
      }
    });
  });
  return sums;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& given_grad, const Tensor& input_signs,
                                            const Tensor& weight_signs, const Maybe& given_scale, int64_t channels,
                                            const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                                            int64_t groups, bool channels_last, bool need_input, bool need_weight,
                                            bool need_scale) {
  STD_TORCH_CHECK(given_grad.is_cpu() && given_grad.dim() == 4 && groups > 0 && channels % groups == 0,
                  "grad_output must be a CPU tensor (N, O, H', W'), groups a divisor of channels");
  const auto empty = [&] { return new_tensor({0}, given_grad.scalar_type()); };
  if (!need_input && !need_weight && !need_scale) return {empty(), empty(), empty()};
  const ScalarType dtype = given_grad.scalar_type();
  const Tensor grad = in_format(given_grad, channels_last);
  const Tensor input = unpack(input_signs, channels, dtype, channels_last);
  const auto signs = [&] { return unpack(weight_signs, channels / groups, dtype, channels_last); };
  Tensor weight = signs(), scale;
  if (given_scale) {
    STD_TORCH_CHECK(given_scale->is_cpu() && given_scale->scalar_type() == dtype && given_scale->dim() == 1 &&
                        given_scale->size(0) == weight.size(0),
                    "scale must be a CPU tensor (O,) of the dtype of grad_output");
    scale = as_contiguous(*given_scale);
    scale_outputs(weight, scale);
  }
  const std::array<bool, 3> wanted{need_input, need_weight || need_scale, false};
  std::array<StableIValue, 11> stack{from(grad),    from(input),    from(weight), from(std::nullopt),
                                     from(stride),  from(padding),  from(dilation), from(false),
                                     from(Sizes{0, 0}), from(groups),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  const auto first = to<Tensor>(stack[0]), second = to<Tensor>(stack[1]), bias = to<Tensor>(stack[2]);
  std::tuple<Tensor, Tensor, Tensor> results{need_input ? in_format(first, channels_last) : empty(), empty(), empty()};
  if (wanted[1]) {
    Tensor own = in_format(second, channels_last);
    if (need_scale) std::get<2>(results) = sum_outputs(own, signs());
    if (need_weight && given_scale) scale_outputs(own, scale);
    if (need_weight) std::get<1>(results) = as_contiguous(own);
  }
  return results;
}

}  // namespace
}  // namespace tersor::binary

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("binary_conv2d_forward", TORCH_BOX(&tersor::binary::forward));
  module.impl("binary_conv2d_backward", TORCH_BOX(&tersor::binary::backward));
}

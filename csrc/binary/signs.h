// Signs as bits, 64 channels to a word: what the operators on them share. The layout is PackedSigns' in
// pyops/binary/pack_signs.py: int64 (2, N, H, W, groups, words), first whether positive, then whether not zero.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "memory.h"

namespace tersor::binary {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

constexpr int64_t WORD = 64;
constexpr int64_t BLOCK = 8;                // output channels side by side in a packed weight
constexpr int64_t GRAIN_BYTES = 1 << 15;    // of memory that a thread should at least have to do with

inline int64_t words_for(int64_t channels) { return (channels + WORD - 1) / WORD; }

inline int64_t grain_for(int64_t bytes) { return std::max<int64_t>(1, GRAIN_BYTES / std::max<int64_t>(1, bytes)); }

// What numbers of a type are computed in.
template <class T>
using Accumulated = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Double;
}

// Calls run(T{}) with the C++ type of that name.
template <class Run>
void with_type(ScalarType dtype, Run run) {
  STD_TORCH_CHECK(is_floating(dtype), "the tensor must be float16, bfloat16, float32 or float64");
  if (dtype == ScalarType::Float) run(float{});
  if (dtype == ScalarType::Double) run(double{});
  if (dtype == ScalarType::Half) run(torch::headeronly::Half{});
  if (dtype == ScalarType::BFloat16) run(torch::headeronly::BFloat16{});
}

// A map (N, C, H, W) and its bits.
struct Map {
  int64_t batch, channels, height, width, groups;  // channels of all groups
  int64_t stride_n, stride_c, stride_h, stride_w;  // in elements, of the numbers
  void* numbers;
  const void* shift;  // or null
  int64_t* words;

  int64_t pixels() const { return height * width; }
  int64_t plane() const { return batch * pixels() * groups * words_for(channels / groups); }
};

inline bool is_channels_last(const Tensor& t) {
  const int64_t order[] = {1, 3, 2, 0};
  int64_t expected = 1;
  for (const int64_t dim : order) {
    if (t.size(dim) != 1 && t.stride(dim) != expected) return false;
    expected *= t.size(dim);
  }
  return !t.is_contiguous();
}

// An uninitialised tensor on the CPU. Torch's new_empty looks its operator up by name at every call (0.6 us), and each
// transpose for another memory format once more.
inline Tensor new_strided(const Sizes& sizes, const Sizes& strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const auto dims = static_cast<int64_t>(sizes.size());
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes.data(), strides.data(), type,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor new_tensor(const Sizes& sizes, ScalarType dtype) {
  Sizes strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= std::max<int64_t>(1, sizes[i])) strides[i] = step;
  return new_strided(sizes, strides, dtype);
}

inline Tensor new_like(const Tensor& contiguous) {
  const auto sizes = contiguous.sizes();
  return new_tensor({sizes.begin(), sizes.end()}, contiguous.scalar_type());
}

// A map (N, C, H, W) in that format.
inline Tensor new_map(const Sizes& sizes, ScalarType dtype, bool channels_last) {
  if (!channels_last) return new_tensor(sizes, dtype);
  const auto length = [&](int dim) { return std::max<int64_t>(1, sizes[dim]); };
  const int64_t row = length(3) * length(1);
  return new_strided(sizes, {length(2) * row, 1, row, length(1)}, dtype);
}

// Torch's contiguous costs 0.6 us even where there is nothing to do.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Tensor in_format(const Tensor& t, bool channels_last) {
  if (channels_last ? is_channels_last(t) : t.is_contiguous()) return t;
  Tensor copy = new_map({t.size(0), t.size(1), t.size(2), t.size(3)}, t.scalar_type(), channels_last);
  torch::stable::copy_(copy, t);
  return copy;
}

inline void check_words(const Tensor& signs, int64_t channels) {
  STD_TORCH_CHECK(signs.is_cpu() && signs.scalar_type() == ScalarType::Long && signs.dim() == 6 && signs.size(0) == 2 &&
                      channels > 0 && signs.size(4) > 0 && channels % signs.size(4) == 0 &&
                      signs.size(5) == words_for(channels / signs.size(4)),
                  "signs must be int64 CPU words (2, N, H, W, groups, words) for ", channels, " channels");
}

Tensor pack(const Tensor& input, const Maybe& shift, int64_t groups);
Tensor unpack(const Tensor& signs, int64_t channels, ScalarType dtype, bool channels_last);

// A weight as the kernels read it; see PackedBinaryWeight in pyops/binary/binary_packed_conv2d.py.
struct Weight {
  Tensor blocks, sums;
};
Weight block_weight(const Tensor& signs, int64_t channels, int64_t groups);

// The whole numbers of a convolution in the given type, times a number of that type for each output.
Tensor scaled_numbers(const Tensor& signs, const Weight& weight, const Maybe& scale, int64_t channels,
                      const Sizes& stride, const Sizes& padding, const Sizes& dilation, ScalarType dtype,
                      bool channels_last);

}  // namespace tersor::binary

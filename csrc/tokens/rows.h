// Rows of tokens as the kernels see them, and what the token operators check of their tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "last_dim.h"
#include "memory.h"

namespace tersor::tokens {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t GRAIN_BYTES = 1 << 14;  // of memory that a thread should at least have to do with

// (B, n, C), channels contiguous; strides in bytes. A batch stride of 0 is one row set for all images.
template <class Byte>
struct RowsOf {
  Byte* data = nullptr;
  int64_t batch = 0, row = 0;

  template <class T>
  auto at(int64_t image, int64_t i) const {
    using Element = std::conditional_t<std::is_const_v<Byte>, const T, T>;
    return reinterpret_cast<Element*>(data + image * batch + i * row);
  }
};
using Rows = RowsOf<const char>;
using OutRows = RowsOf<char>;

inline Rows rows_of(const Tensor& t, bool shared = false) {
  const auto size = static_cast<int64_t>(t.element_size());
  return {static_cast<const char*>(t.const_data_ptr()), shared ? 0 : t.stride(0) * size, t.stride(1) * size};
}

inline OutRows out_rows_of(Tensor& t) {
  if (t.dim() != 3) return {};  // not wanted
  const auto size = static_cast<int64_t>(t.element_size());
  return {static_cast<char*>(t.mutable_data_ptr()), t.stride(0) * size, t.stride(1) * size};
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Double;
}

// What sums of a type are computed in.
template <class T>
using Accumulated = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls run(T{}) with the C++ type of the tensor's elements.
template <class Run>
void with_type(const Tensor& t, Run run) {
  if (t.scalar_type() == ScalarType::Float) run(float{});
  if (t.scalar_type() == ScalarType::Double) run(double{});
  if (t.scalar_type() == ScalarType::Half) run(torch::headeronly::Half{});
  if (t.scalar_type() == ScalarType::BFloat16) run(torch::headeronly::BFloat16{});
}

// What Python has checked already, once more where memory depends on it.
inline Tensor checked(const Tensor& t, const Tensor& like, const char* name, std::initializer_list<int64_t> shape) {
  bool fits = t.is_cpu() && t.scalar_type() == like.scalar_type() && is_floating(t.scalar_type()) &&
              t.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) fits = fits && t.size(i++) == size;
  STD_TORCH_CHECK(fits, name, " must be a floating CPU tensor of a shape and dtype that fit the other arguments");
  return last_dim_contiguous(t);
}

// The index tensor of `columns` places for each of `batch` images, contiguous.
inline Tensor checked_index(const Tensor& t, int64_t batch, int64_t columns, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Long && t.dim() == 2 && t.size(0) == batch &&
                      (columns < 0 || t.size(1) == columns),
                  name, " must be an int64 CPU tensor that fits the other arguments");
  return torch::stable::contiguous(t);
}

inline const int64_t* places_of(const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); }

inline int64_t grain_for(int64_t bytes) {
  return std::max<int64_t>(1, GRAIN_BYTES / std::max<int64_t>(1, bytes));
}

// Where each of `length` tokens went: inverse[b * length + token] = place, -1 if nowhere; places out of range are left
// out, and of several the last counts.
inline void invert(const int64_t* index, int64_t batch, int64_t columns, int64_t length, int32_t* inverse) {
  std::fill(inverse, inverse + batch * length, -1);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t token = index[b * columns + j];
      if (token >= 0 && token < length) inverse[b * length + token] = static_cast<int32_t>(j);
    }
  }
}

}  // namespace tersor::tokens

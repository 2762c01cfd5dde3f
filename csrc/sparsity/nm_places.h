// The index of packed N:M weights (format: pyops/sparsity/nm_pack.py) on the host: the places that each byte stands for.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>

#include "sparsity/nm_product.h"

namespace tersor::nm_product {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int index_bits(int64_t n, int64_t m) {
  if (n == 1) return m == 2 ? 1 : m <= 4 ? 2 : 4;
  return m <= 4 ? 4 : m <= 8 ? 8 : 16;
}

inline std::unique_ptr<Places> make_places(int n, int m) {
  auto made = std::make_unique<Places>();
  const int bits = index_bits(n, m), groups = bits == 16 ? 1 : 8 / bits;
  made->wide = bits == 16, made->values = groups * n, made->elements = groups * m;
  made->bits = n == 1 ? bits : n == 2 && m <= 4 ? 2 : 0;
  const auto inside = [m](int place) { return static_cast<uint8_t>(place < m ? place : m - 1); };
  for (int byte = 0; byte < 256; ++byte) {
    uint8_t* const place = made->place[byte];
    std::fill(place, place + 8, uint8_t(0));
    int count = 0;
    for (int g = 0; g < groups; ++g) {
      const int code = bits == 16 ? byte : byte >> (g * bits) & ((1 << bits) - 1);
      const uint8_t start = static_cast<uint8_t>(g * m);
      if (bits < 16) std::fill(place + count, place + count + n, start);
      if (n == 1) {
        place[count++] = start + inside(code);
      } else if (n == 2 && m <= 4) {
        place[count++] = start + inside(code & 3), place[count++] = start + inside(code >> 2);
      } else {
        int found = 0;
        for (int bit = 0; bit < 8; ++bit) {
          if (code >> bit & 1 && (bits == 16 || found < n)) place[count + found++] = start + inside(bit);
        }
        count += bits == 16 ? found : n;
      }
    }
    made->count[byte] = static_cast<uint8_t>(count);
  }
  return made;
}

// Made once for every pattern.
inline const Places* places_of(int64_t n, int64_t m) {
  static std::mutex mutex;
  static std::unique_ptr<Places> all[17][17];
  const std::lock_guard<std::mutex> lock(mutex);
  if (!all[n][m]) all[n][m] = make_places(static_cast<int>(n), static_cast<int>(m));
  return all[n][m].get();
}

}  // namespace
}  // namespace tersor::nm_product

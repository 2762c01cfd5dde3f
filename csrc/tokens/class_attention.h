// What the kernels of class_attention.cpp are told.
#pragma once

#include <cstdint>

namespace tersor::tokens {

struct ClassScores {
  int64_t length, heads, head_dim;
  const void *query, *key, *average;  // head_dim contiguous; strides in elements; average contiguous, null for none
  int64_t query_batch, query_head, key_batch, key_row, key_head;
  void* scores;  // contiguous
  double scale, decay;

  int64_t pitch() const { return (length + 15) / 16 * 16; }
  // The scaled query, one head's products and the sum over heads, in float32 or float64.
  int64_t scratch_bytes() const { return 8 * (heads * head_dim + 2 * pitch()) + 256; }
};

}  // namespace tersor::tokens

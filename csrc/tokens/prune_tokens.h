// What the kernels of prune_tokens.cpp are told.
#pragma once

#include "tokens/rows.h"

namespace tersor::tokens {

struct Prune {
  static constexpr int64_t BLOCK = 64;  // rows whose parameter gradients are added up together

  int64_t batch, length, channels, count;  // count tokens are kept besides the class token
  double scale, eps;
  Rows input, branch, tokens_in, grad_tokens, grad_normalized;
  const void *weight, *bias;  // contiguous
  const int64_t* order;       // (batch, length - 1)
  int64_t* index;             // (batch, 1 + count)
  OutRows tokens, normalized;

  const int32_t* kept;  // (batch, length): the place that each token was kept at, -1 if nowhere
  OutRows grad_input, grad_branch;
  void* sums;  // [blocks][2][channels] of weight and bias; null where not wanted

  int64_t kept_rows() const { return 1 + count; }
  int64_t blocks() const { return (batch * length + BLOCK - 1) / BLOCK; }
};

}  // namespace tersor::tokens

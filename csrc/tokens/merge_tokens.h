// What the kernels of merge_tokens.cpp are told.
#pragma once

#include "tokens/scatter.h"

namespace tersor::tokens {

struct Merge {
  int64_t tokens, places, channels;  // of an image: tokens go to places
  Rows input, grad_output;
  OutRows output, grad_input;
  const int64_t* index;  // (batch, tokens), of the backward pass
  const Chains* chains;  // of all images' tokens, for each of their places
  const void* sizes;     // (batch, tokens), contiguous, or null for ones
  void* output_sizes;    // (batch, places)
  const void* totals;    // the same, of the backward pass
};

}  // namespace tersor::tokens

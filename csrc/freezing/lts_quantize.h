// What the host's side of lts_quantize and its kernels share.
#pragma once

#include <cstdint>

namespace tersor::lts {

struct Task {
  const void* weight;
  void* saved;  // or null
  void* output;
  void* distance;  // float, or double for double weights
  uint8_t* code;
  uint8_t* frozen;
  uint8_t* before;
  int32_t* frozen_step;  // or null
  int64_t elements;
  double lower, upper, momentum, threshold;
  int levels;  // 2^bits - 1
  int64_t step;  // the one that this forward pass is
  bool update, second, settle;  // second: the distance starts anew; settle: single elements may freeze now
};

struct Gradient {
  const void* grad_output;
  const void* weight;
  const void* saved;  // or null
  const uint8_t* frozen;
  void* grad_weight;
  int64_t elements;
  double lower, upper;
};

// Ranges of elements start at multiples of 64.
struct Kernels {
  int64_t (*forward)(const Task&, int64_t first, int64_t end);  // how many froze
  void (*backward)(const Gradient&, int64_t first, int64_t end, double sums[2]);  // of grad (p - 1) and of grad p
  int64_t (*within)(const void* distance, int64_t first, int64_t end, double threshold);
};

}  // namespace tersor::lts

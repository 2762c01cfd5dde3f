// What the fake-quantisers' host code and kernels share: the layout of a call. Rules are in fake_quantize_rules.h.
#pragma once

#include <cstdint>

namespace tersor::fake_quantize {

constexpr int64_t BLOCK = 16384;  // elements of one partial sum: the results' bits depend on it, not on the threads
constexpr int MOST_INPUTS = 2, MOST_CONSTANTS = 18, MOST_SUMS = 6;

// All tensors in the memory order of the first input: outer x groups x inner elements, and each of the `groups` has
// its own parameters. `constants` holds what a rule makes of them, [groups][MOST_CONSTANTS] floats or doubles; where
// inner is short, [constant][groups * inner] in `columns`.
struct Task {
  const void* input[MOST_INPUTS];
  const void* grad_output;
  void* output[MOST_INPUTS];  // forward: output; backward: the inputs' gradients
  const void* constants;
  const void* columns;
  int64_t outer, groups, inner;

  int64_t elements() const { return outer * groups * inner; }
};

// The functions of one rule for one type at one instruction set.
template <class A>
struct Kernels {
  void (*prepare)(const A* parameters, const double* options, A* constants);
  void (*finish)(const double* sums, const A* constants, const double* options, double* gradients);
  bool (*exact)(const A* constants);
  void (*runs)(const Task&, int64_t first, int64_t last, int64_t per_run, double* partial);
  void (*rows)(const Task&, int64_t first, int64_t last, A* scratch, double* total);
  int constants, sums;
};

}  // namespace tersor::fake_quantize

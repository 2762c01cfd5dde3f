// What ReCU's weights and their kernels for each instruction set agree on.
#pragma once

#include "binary/signs.h"

namespace tersor::binary {

struct Filters {
  const void* weight;
  const void* grad_output;
  void* output;
  void* statistics;        // (O, 2): mean, reciprocal of the deviation
  double* magnitudes;      // forward, of each filter: the sum of its standardised weights' absolute values
  int64_t size;            // weights of a filter
  double bound;            // backward
};

constexpr double LAPLACE_SCALE = 2.8284271247461903;  // 2 sqrt 2
constexpr double WEIGHT_EPS = 1e-5;

}  // namespace tersor::binary

// What the sign with an estimated gradient and its kernels for each instruction set agree on.
#pragma once

#include "binary/signs.h"

namespace tersor::binary {

constexpr int64_t CHUNK = 4096;  // elements that are summed up in single precision; their bits end at a byte's border

enum class Rule : int { ste, approx, reste };

struct Sign {
  const void* input;
  const void* grad_output;  // backward
  void* output;             // forward: the signs; backward: the gradient
  uint8_t* inside;          // bits, or null
  const uint8_t* given_inside;
  int64_t size;             // elements of a sample, or of all where they are not scaled
  Rule rule;
  double t, interval;       // as the input's type has them
  double chord, factor, power;  // of reste: its slope near 0, and factor |x|^power
};

// The mean of a sample and the reciprocal of its deviation, with what its gradient takes of them: slope x / deviation
// less (x - mean) times `pull`.
struct Sample {
  double mean, rstd, pull;
};

// Sums of a chunk: of the numbers, and of their squared distances from their own mean.
struct Moments {
  double count, mean, squares;
};

// Of one type, rule and instruction set, over elements from `first` to `end`.
struct SignKernels {
  void (*sign)(const Sign&, int64_t, int64_t);
  void (*clear)(const Sign&, int64_t, int64_t);
  Moments (*moments)(const Sign&, int64_t, int64_t);
  void (*masked)(const Sign&, int64_t, int64_t);
  void (*gradient)(const Sign&, const Sample&, int64_t, int64_t);
  double (*along)(const Sign&, double, int64_t, int64_t);
};

}  // namespace tersor::binary

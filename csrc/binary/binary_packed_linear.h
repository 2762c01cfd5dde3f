// What the linear layer of signs and its kernels for each instruction set agree on.
#pragma once

#include "binary/binary_packed_conv2d.h"

namespace tersor::binary {

struct Rows {
  Task task;            // of a convolution whose pixels are the rows
  const void* input;    // [rows][channels]
  const float* affine;  // [2][outputs]: scale and shift, or null
  void* output;         // [rows][outputs]
  int64_t count;
};

// Rows [first_row, end_row), a tile of pixels at most, and blocks [first_block, end_block).
struct RowUnit {
  int64_t first_row, end_row, first_block, end_block;
};

}  // namespace tersor::binary

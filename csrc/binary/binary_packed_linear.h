// What the linear layer of signs and its kernels for each instruction set agree on.
#pragma once

#include "binary/binary_packed_conv2d.h"

namespace tersor::binary {

constexpr int64_t STRIP_ROWS = 32;              // of a unit of work, at most
constexpr int64_t NEAR_WEIGHT = int64_t{256} << 10;  // bytes of a weight that stay in a core's cache from row to row
constexpr int64_t MOST_NEAR = 512;              // blocks of them, a multiple of MOST_BLOCKS

struct Rows {
  Task task;            // of a convolution whose pixels are the rows
  const void* input;    // [rows][channels]
  const float* affine;  // [2][outputs]: scale and shift, or null
  void* output;         // [rows][outputs]
  int64_t count;
  int64_t near_blocks;  // that all rows of a unit meet before the next ones come
};

// Rows [first_row, end_row) and blocks [first_block, end_block).
struct RowUnit {
  int64_t first_row, end_row, first_block, end_block;
};

}  // namespace tersor::binary

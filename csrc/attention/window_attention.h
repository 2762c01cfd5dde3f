// What the kernels of window_attention.cpp are told.
#pragma once

#include <cstdint>

namespace tersor::window_attention {

struct View {  // (B, H, W, heads, head_dim), head_dim contiguous; strides in elements
  const void* data;
  int64_t batch, row, column, head;
};

struct Place {  // of a token in its map
  int64_t y, x;
};

struct Task {
  int64_t batch, height, width, heads, head_dim;
  int64_t window_h, window_w, shift_h, shift_w;
  double scale, mask_value;
  View query, key, value, grad_output;
  const bool* mask;  // of tokens (B, H, W) or of pairs (B, windows, N, N), contiguous; null for none
  bool mask_of_pairs;
  int64_t mask_batch;  // elements from one image to the next, 0 where all share one
  const void* bias;    // spread, see bias_size(); null for none
  View output, gradients[3];  // written, the gradients of query, key and value
  void* logsumexp;            // (B, heads, H, W), contiguous
  void* grad_bias;            // one spread table per block of windows and head; null for none
  int64_t blocks, block_windows;     // how the windows are shared out where their bias gradients are summed
  int64_t head_group;                // heads of a window that are worked on one after the other

  int64_t tokens() const { return window_h * window_w; }
  int64_t windows_across() const { return width / window_w; }
  int64_t windows() const { return height / window_h * windows_across(); }  // of one image

  // A head's bias, spread for contiguous access: for each column x of a key all (2h - 1) rows of differences in y, each
  // with the w columns of the queries. What a key at (y, x) adds to all queries is one run of N elements of that, from
  // (h - 1 - y) * w on.
  int64_t bias_column() const { return (2 * window_h - 1) * window_w; }
  int64_t bias_size() const { return window_w * bias_column() + BIAS_SLACK; }
  static constexpr int64_t BIAS_SLACK = 64;  // vectors of the last queries read further
};

}  // namespace tersor::window_attention

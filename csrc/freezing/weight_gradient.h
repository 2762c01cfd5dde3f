// What the host's side and the kernels of a weight gradient by tiles share. A linear layer is a 1 x 1 convolution of one
// image of one row, whose pixels are the tokens.
#pragma once

#include <cstdint>

namespace tersor::weight_gradient {

constexpr int PANEL = 8;  // output channels that the innermost kernel holds in registers

// A part of one image's output pixels: rows y to y + height of image n, columns x to x + width.
struct Slab {
  int64_t n, y, x, height, width;
};

struct Task {
  const void* grad_output;  // of the caller's type, any strides: image, channel, row, column
  const void* input;
  int64_t grad_strides[4], input_strides[4];
  int64_t rows, columns, input_height, input_width;  // output channels, input channels
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t tile_rows, tile_columns;  // of channels
  int64_t pitch;                    // pixels in a packed row of the input
  int64_t padded_columns;           // tile_columns, to whole vectors
  const Slab* slabs;                // of this chunk
  int64_t slab_count, pixels;       // output pixels of the chunk
  int64_t input_pixels;             // packed pixels of the input
  const uint8_t* frozen;            // packed mask of the weight, or null

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t panels() const { return (tile_rows + PANEL - 1) / PANEL; }
  int64_t slab_rows(const Slab& s) const { return (s.height - 1) * stride[0] + (kernel[0] - 1) * dilation[0] + 1; }
  int64_t accumulators() const { return panels() * PANEL * taps() * padded_columns; }  // of one tile
};

// A: float or double. packed_rows: [panel][pixel][PANEL]; packed_columns: [pixel][padded_columns]; sums:
// [panel][tap][vector of columns][PANEL][lanes].
template <class A>
struct Kernels {
  void (*pack_rows)(const Task&, int64_t tile, A* packed_rows);
  void (*pack_columns)(const Task&, int64_t tile, A* packed_columns);
  void (*multiply)(const Task&, const A* packed_rows, const A* packed_columns, bool first, A* sums);
  void (*write)(const Task&, int64_t tile_row, int64_t tile_column, const A* sums, void* grad_weight);
  int lanes;
};

}  // namespace tersor::weight_gradient

// Products with a packed N:M weight (format: pyops/sparsity/nm_pack.py) for the linear layer and the convolution.
//
// A column is an input row, or an output pixel's window: the elements that one row of the weight is multiplied with.
// Columns lie side by side in vectors; a kept value is broadcast and multiplied with the elements at its place.
#pragma once

#include <cstdint>

namespace tersor::nm_product {

constexpr int TILE = 64;         // columns of the input that are transposed into the L1 cache,
constexpr int NARROW_TILE = 16;  // and where there are no more than these: longer rows of them fit
constexpr int64_t SLACK = 32;  // offsets that may be written beyond the last one

// What one byte of the index stands for: up to 8 places, counted from the first of its groups' elements on. Bytes that
// nm_pack does not write have places too, inside the groups, so that a damaged index cannot lead out of a buffer.
struct Places {
  uint8_t place[256][8];
  uint8_t count[256];  // how many of them; the same for all bytes but those of 16-bit masks
  int values;          // of a byte, or of the two bytes of a 16-bit mask
  int elements;        // that a byte covers, likewise
  bool wide;           // a group has two bytes
  int bits;            // of a place, where the index has places; 0 for masks
};

enum class Activation : int { none = 0, relu = 1, gelu = 2 };

struct Task {
  int64_t columns, groups;           // of the output; groups of channels
  int64_t outputs, channels, taps;   // outputs and input channels of one group
  int64_t n, m, index_row;           // bytes of a row of the index
  const void *values, *bias;
  const uint8_t* index;
  const Places* places;
  Activation activation;

  // The input: where channels lie side by side, or else where the columns of one row do.
  const void* input;
  int64_t input_n, input_c, input_h, input_w;
  int64_t height, width, out_height, out_width, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h,
      dilation_w;
  const void* zeros;  // a pixel of the border

  // The output: element (column, output) lies at image * output_n + pixel * output_w + output * output_c.
  void* output;
  int64_t output_n, output_c, output_w;

  int64_t tile;   // columns of a unit
  int64_t pitch;  // of a tile's rows, and of its sums: TILE or NARROW_TILE
  int64_t chunk;  // elements of a row whose products are added at a time

  int64_t row() const { return taps * channels; }
  int64_t kept() const { return row() / m * n; }
  int64_t pixels() const { return out_height * out_width; }
};

struct Unit {  // columns [first, last) times outputs [from, to) of one group
  int64_t group, first, last, from, to;
};

// Kernels that only some levels or processors have.
struct UnitKernels {
  void (*unit)(const Task&, const Unit&, void* memory);
  int64_t (*scratch)(const Task&, int64_t outputs);
  int64_t columns;  // of a unit
};

}  // namespace tersor::nm_product

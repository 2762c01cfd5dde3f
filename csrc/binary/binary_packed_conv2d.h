// What the convolution of signs and its kernels for each instruction set agree on.
#pragma once

#include "binary/signs.h"

namespace tersor::binary {

constexpr int64_t MOST_TERMS = int64_t{1} << 23;  // of a sum
constexpr int MOST_PIXELS = 4;                  // of a tile
constexpr int MOST_BLOCKS = 4;                  // of output channels, of a tile
constexpr int MOST_OUTPUTS = MOST_BLOCKS * BLOCK;
constexpr int64_t STRIP = 4;                    // pixels that get all of their channels at once

enum class Activation : int { none, hardtanh, prelu };

struct Task;
// Sums of a tile: sums[p * MOST_OUTPUTS + o] for one pixel, or all of a tile, and `blocks` blocks of outputs.
using Multiply = void (*)(const Task&, bool one_pixel, const int64_t* const pixels[MOST_PIXELS], const int64_t* weight,
                          int blocks, bool zeros, int32_t* sums);

struct Task {
  int64_t batch, groups, words, channels, outputs;  // words, channels and outputs of one group
  int64_t height, width, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  const int64_t* signs;     // both planes
  int64_t signs_plane;      // words of one
  const int64_t* weight;    // [planes][groups][blocks][taps][words][8]
  int64_t weight_planes, weight_plane;
  const int32_t* sums;      // [groups * outputs][taps]
  const char* block_zeros;  // [groups][blocks]: whether a weight is zero; null where none is
  int64_t blocks;           // of one group

  // A padded copy of the input's rows: [rows][columns][words], both planes one after the other.
  int64_t rows, columns;    // of a band
  int64_t band;             // output rows
  int64_t scratch_plane;    // words
  const int64_t* offsets;   // in that copy, of the words that a pixel's window takes, in the order of a weight block
  int64_t steps;            // how many
  Multiply multiply;
  int tile_pixels, tile_blocks;

  // What follows: a factor of the output's type, or rows of float32, of all output channels; or null.
  const void* scale;
  const float* epilogue;
  bool relu;
  Activation activation;
  const void* residual;
  void* output;             // of numbers
  bool channels_last;
  const int32_t* thresholds;
  int64_t* out_signs;       // both planes, cleared
  int64_t out_signs_plane, out_groups, out_words;

  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t terms() const { return channels * taps(); }
  bool pads() const { return padding_h + padding_w > 0; }
  int64_t all_outputs() const { return groups * outputs; }
  int64_t block_words() const { return taps() * words * BLOCK; }
  int64_t bands() const { return (out_height + band - 1) / band; }
};

// Whether a weight of a block, counted through all groups, is zero; of a weight with two planes. Inlined, so that it is
// compiled for its caller's instruction set.
__attribute__((always_inline)) inline bool has_zero_weight(const Task& task, int64_t block) {
  const uint64_t last = task.channels % WORD ? (uint64_t{1} << task.channels % WORD) - 1 : ~uint64_t{0};
  const int64_t outputs = std::min(BLOCK, task.outputs - block % task.blocks * BLOCK);
  const int64_t* nonzero = task.weight + task.weight_plane + block * task.block_words();
  uint64_t missing[BLOCK] = {}, any = 0;
  for (int64_t tap = 0; tap < task.taps(); ++tap) {
    for (int64_t w = 0; w < task.words; ++w, nonzero += BLOCK) {
      const uint64_t all = w + 1 == task.words ? last : ~uint64_t{0};
      for (int64_t o = 0; o < BLOCK; ++o) missing[o] |= static_cast<uint64_t>(nonzero[o]) ^ all;
    }
  }
  for (int64_t o = 0; o < outputs; ++o) any |= missing[o];
  return any != 0;
}

// Sets multiply and the sizes of its tiles, for this processor.
void choose_multiply(Task& task);

// Output rows [first_row, end_row) of an image, and blocks [first_block, end_block) of all groups' blocks.
struct Unit {
  int64_t image, first_row, end_row, first_block, end_block;
};

// Output channels that are summed up together.
struct Tile {
  int blocks, outputs;
  bool zeros;           // whether a weight is zero
  int64_t channel;      // the first of all
  const int64_t* weight;
  int32_t* tap_sums;    // [taps][MOST_OUTPUTS]: what a tap outside has added to a sum, taken negative
  int32_t* thresholds;  // [3][MOST_OUTPUTS]
};

struct Scratch {
  int64_t* words;       // the padded copy
  int64_t* places;      // of the unit's pixels in it
  bool* zeros;          // of the copy's pixels: whether a sign inside the image is zero
  bool* meets;          // whether the window of a pixel meets such a one
  bool* border;         // whether the window of a pixel reaches out of the image
  Tile* tiles;
  int32_t* tap_sums;    // of all tiles
  int32_t* thresholds;
  void* columns;        // numbers of a tile's channels, pixel after pixel, for an output that is not channels-last
};

}  // namespace tersor::binary

// What the kernels of leff.cpp are told, and how the work is cut up: by the shapes alone, so that every sum has one order.
#pragma once

#include <algorithm>
#include <cstdint>

namespace tersor::leff {

constexpr int64_t BLOCK = 48;  // tokens of one pass, a multiple of all tile heights in product.h

struct View {  // (B, H, W, channels), channels contiguous; strides in elements
  const void* data;
  int64_t batch, row, column;
};

// Parameters as the caller gave them, contiguous; null for none.
struct Parameters {
  const void *weight1, *bias1, *taps, *tap_bias, *weight2, *bias2, *scale, *shift;
};

struct Task {
  int64_t batch, height, width, channels, hidden, outputs;
  View input, grad_output;
  Parameters given;
  bool affine, need_input, need_parameters;

  int64_t chunk, chunks;        // hidden channels that pass through the caches together
  int64_t strip_rows, strips;   // of one image
  int64_t groups;               // chunks shared out among units, whose results are added up at the end
  int64_t blocks, block_strips; // strips whose parameter gradients are summed together
  int64_t pitch_c, pitch_o;     // channels and outputs to whole cache lines

  // Packed, padded with zeros; per chunk: weight1 transposed [channels][chunk], weight2 [outputs][chunk] or transposed
  // [chunk][pitch_o], weight1 as it is [chunk][pitch_c]; then vectors of all chunks.
  void *columns1, *columns2, *rows1, *rows2;
  void *bias1, *taps, *tap_bias, *scale, *shift, *bias2;

  // Where torch's own products are faster, the kernels do only what lies between them, on maps [tokens][hidden] of the
  // caller's type: what comes out of the first linear layer without its bias, the gradient of what goes into the second
  // one; what goes into the second one, the gradient of what came out of the first. Null where the kernels multiply.
  const void *inner, *grad_outer;
  void *outer, *grad_inner;

  void* result;    // output or grad_input, contiguous, of the caller's type
  void* partials;  // the groups' results, each [tokens][pitch]; null for one group
  void* sums;      // the blocks' parameter gradients, see Sums

  int64_t map() const { return height * width; }
  int64_t tokens() const { return batch * map(); }
  int64_t padded_hidden() const { return chunk * chunks; }
  bool multiplies() const { return !inner; }
  int64_t group_chunks() const { return (chunks + groups - 1) / groups; }

  void plan(bool backward) {
    // Five rows of 3 tensors are kept in the backward pass: 64 channels of 160 tokens are what L2 caches hold.
    const int64_t most = backward && width > 160 ? 32 : 64;
    chunks = (hidden + most - 1) / most;
    chunk = ((hidden + chunks - 1) / chunks + 15) / 16 * 16;
    chunks = (hidden + chunk - 1) / chunk;
    const auto line = [](int64_t n) { return (n + 15) / 16 * 16; };
    pitch_c = line(channels), pitch_o = line(outputs);
    // Strips of at least 16 rows, whose neighbours' edges are computed twice, and 16 of them where there are as many.
    const int64_t images = std::max<int64_t>(1, batch);
    strips = std::max<int64_t>(1, std::min((16 + images - 1) / images, height / 16));
    strip_rows = (height + strips - 1) / strips;
    strips = (height + strip_rows - 1) / strip_rows;
    const int64_t all = images * strips;
    // A block's parameter gradients take two products' worth of memory, which at least 2 * hidden tokens pay for.
    const int64_t worth = multiplies() ? std::max<int64_t>(256, hidden) : 256;
    const int64_t most_blocks = backward ? std::max<int64_t>(1, std::min<int64_t>(32, tokens() / worth)) : all;
    block_strips = (all + most_blocks - 1) / most_blocks;
    blocks = (all + block_strips - 1) / block_strips;
    groups = std::min(chunks, (8 + blocks - 1) / blocks);
    groups = (chunks + group_chunks() - 1) / group_chunks();
  }
};

// Where the parameter gradients of one block lie, in elements: per chunk weight1 transposed and weight2 as it is, then
// vectors of all chunks, then bias2.
struct Sums {
  int64_t columns1, columns2, taps, tap_bias, bias1, scale, shift, bias2, size;

  explicit Sums(const Task& task) {
    const int64_t hidden = task.padded_hidden(), multiplied = task.multiplies() ? hidden : 0;
    columns1 = 0;
    columns2 = columns1 + multiplied * task.channels;
    taps = columns2 + multiplied * task.outputs;
    tap_bias = taps + 9 * hidden;
    bias1 = tap_bias + hidden;
    scale = bias1 + hidden;
    shift = scale + hidden;
    bias2 = shift + hidden;
    size = (bias2 + task.pitch_o + 15) / 16 * 16;
  }
};

// Parameter gradients of the caller's type, contiguous; null for none.
struct Gradients {
  void *weight1, *bias1, *taps, *tap_bias, *weight2, *bias2, *scale, *shift;
};

}  // namespace tersor::leff

#ifdef TERSOR_ISA

#include "binary/pack_signs_kernels.h"

namespace tersor::binary {
namespace TERSOR_ISA {

// The signs of a tile's rows in both planes; returns whether one is zero.
template <class T>
TERSOR_INLINE bool pack_rows(const Rows& rows, int64_t first, int64_t end, int64_t* words) {
  const Task& task = rows.task;
  uint64_t missing = 0;
  for (int64_t row = first; row < end; ++row, words += task.words) {
    const T* const from = static_cast<const T*>(rows.input) + row * task.channels;
    int64_t* const nonzero = words + task.scratch_plane;
    for (int64_t w = 0; w < task.words; ++w) {
      const int channels = static_cast<int>(std::min(WORD, task.channels - w * WORD));
      pack_word<T, float>(from + w * WORD, static_cast<const T*>(nullptr), channels, words + w, nonzero + w);
      missing |= ~static_cast<uint64_t>(nonzero[w]) << (WORD - channels);
    }
  }
  return missing != 0;
}

// The numbers of a row's outputs, from `channel` on.
template <class T>
TERSOR_INLINE void finish_row(const Rows& rows, const int32_t* sums, int64_t channel, int outputs, T* to) {
  constexpr int lanes = Simd<float>::lanes;
  for (int o = 0; o < outputs; o += lanes) {
    const int count = std::min(lanes, outputs - o);
    Vec<float> y = __builtin_convertvector(*reinterpret_cast<const Simd<float>::Mask*>(sums + o), Vec<float>);
    if (rows.affine != nullptr) {
      const float* const own = rows.affine + channel + o;
      y = load_as<float>(own, count) * y + load_as<float>(own + rows.task.outputs, count);
    }
    store_as<float>(to + o, y, count);
  }
}

// The products of one tile's rows and blocks [first, end).
template <class T>
TERSOR_INLINE void multiply_rows(const Rows& rows, int64_t row, int count, const int64_t* words, int64_t first,
                                 int64_t end, const bool* block_zeros, bool zeros) {
  const Task& task = rows.task;
  const int64_t* at[MOST_PIXELS];
  for (int i = 0; i < MOST_PIXELS; ++i) at[i] = words + std::min(i, count - 1) * task.words;
  alignas(64) int32_t sums[MOST_PIXELS * MOST_OUTPUTS] = {};
  for (int64_t block = first; block < end; block += task.tile_blocks) {
    const int blocks = static_cast<int>(std::min<int64_t>(task.tile_blocks, end - block));
    const int64_t channel = block * BLOCK;
    const int outputs = static_cast<int>(std::min<int64_t>(blocks * BLOCK, task.outputs - channel));
    const int64_t* const weight = task.weight + block * task.block_words();
    task.multiply(task, count == 1, at, weight, blocks, zeros || block_zeros[block - first], sums);
    for (int i = 0; i < count; ++i) {
      T* const to = static_cast<T*>(rows.output) + (row + i) * task.outputs + channel;
      finish_row<T>(rows, sums + i * MOST_OUTPUTS, channel, outputs, to);
    }
  }
}

template <class T>
static void do_rows(const Rows& rows, const RowUnit& unit, int64_t* words) {
  const Task& task = rows.task;
  const int64_t step = task.tile_pixels;
  bool zeros[STRIP_ROWS];
  for (int64_t row = unit.first_row; row < unit.end_row; row += step) {
    const int64_t at = row - unit.first_row;
    zeros[at] = pack_rows<T>(rows, row, std::min(unit.end_row, row + step), words + at * task.words);
  }
  for (int64_t block = unit.first_block; block < unit.end_block; block += rows.near_blocks) {
    const int64_t end = std::min(unit.end_block, block + rows.near_blocks);
    bool block_zeros[MOST_NEAR] = {};  // of a tile's blocks at its first
    for (int64_t b = block; b < end && task.weight_planes == 2; ++b) {
      bool& own = block_zeros[(b - block) / task.tile_blocks * task.tile_blocks];
      own = own || has_zero_weight(task, b);
    }
    for (int64_t row = unit.first_row; row < unit.end_row; row += step) {
      const int64_t at = row - unit.first_row;
      const int count = static_cast<int>(std::min(step, unit.end_row - row));
      multiply_rows<T>(rows, row, count, words + at * task.words, block, end, block_zeros, zeros[at]);
    }
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::binary

#endif

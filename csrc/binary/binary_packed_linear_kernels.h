#ifdef TERSOR_ISA

#include "binary/pack_signs_kernels.h"

namespace tersor::binary {
namespace TERSOR_ISA {

// The signs of rows in both planes, which lie `plane` words apart; returns whether one is zero.
template <class T>
TERSOR_INLINE bool pack_rows(const Rows& rows, const RowUnit& unit, int64_t* words, int64_t plane) {
  const Task& task = rows.task;
  uint64_t missing = 0;
  for (int64_t row = unit.first_row; row < unit.end_row; ++row, words += task.words) {
    const T* const from = static_cast<const T*>(rows.input) + row * task.channels;
    for (int64_t w = 0; w < task.words; ++w) {
      const int channels = static_cast<int>(std::min(WORD, task.channels - w * WORD));
      pack_word<T, float>(from + w * WORD, static_cast<const T*>(nullptr), channels, words + w, words + plane + w);
      missing |= ~static_cast<uint64_t>(words[plane + w]) << (WORD - channels);
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

template <class T>
static void do_rows(const Rows& rows, const RowUnit& unit, int64_t* words) {
  const Task& task = rows.task;
  const bool any = pack_rows<T>(rows, unit, words, task.scratch_plane) || task.weight_planes == 2;
  const int64_t count = unit.end_row - unit.first_row;
  const int64_t* at[MOST_PIXELS];
  for (int64_t i = 0; i < MOST_PIXELS; ++i) at[i] = words + std::min(i, count - 1) * task.words;
  alignas(64) int32_t sums[MOST_PIXELS * MOST_OUTPUTS] = {};
  for (int64_t block = unit.first_block; block < unit.end_block; block += task.tile_blocks) {
    const int blocks = static_cast<int>(std::min<int64_t>(task.tile_blocks, unit.end_block - block));
    const int64_t channel = block * BLOCK;
    const int outputs = static_cast<int>(std::min<int64_t>(blocks * BLOCK, task.outputs - channel));
    task.multiply(task, count == 1, at, task.weight + block * task.block_words(), blocks, any, sums);
    for (int64_t i = 0; i < count; ++i) {
      T* const to = static_cast<T*>(rows.output) + (unit.first_row + i) * task.outputs + channel;
      finish_row<T>(rows, sums + i * MOST_OUTPUTS, channel, outputs, to);
    }
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::binary

#endif

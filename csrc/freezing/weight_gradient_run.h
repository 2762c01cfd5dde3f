// The host's side of a weight gradient by tiles: chunks of pixels are packed, then every listed tile adds its products.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <vector>

namespace tersor::weight_gradient {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t CHUNK = 256;  // output pixels: few enough for the L2 cache

// `slabs` in groups of about CHUNK pixels, none of them split.
struct Chunks {
  std::vector<Slab> slabs;
  std::vector<int64_t> starts;  // of each chunk in slabs, and the end
};

inline Chunks chunks_of(int64_t images, int64_t height, int64_t width) {
  Chunks result;
  const int64_t wide = std::min(width, CHUNK), high = std::max<int64_t>(1, std::min(height, CHUNK / std::max<int64_t>(1, width)));
  int64_t pixels = CHUNK;
  for (int64_t n = 0; n < images; ++n) {
    for (int64_t y = 0; y < height; y += high) {
      for (int64_t x = 0; x < width; x += wide) {
        const Slab slab{n, y, x, std::min(high, height - y), std::min(wide, width - x)};
        if (pixels + slab.height * slab.width > CHUNK) {
          result.starts.push_back(static_cast<int64_t>(result.slabs.size()));
          pixels = 0;
        }
        pixels += slab.height * slab.width;
        result.slabs.push_back(slab);
      }
    }
  }
  result.starts.push_back(static_cast<int64_t>(result.slabs.size()));
  return result;
}

inline void set_chunk(Task& task, const Chunks& chunks, size_t chunk) {
  task.slabs = chunks.slabs.data() + chunks.starts[chunk];
  task.slab_count = chunks.starts[chunk + 1] - chunks.starts[chunk];
  task.pixels = task.input_pixels = 0;
  for (int64_t i = 0; i < task.slab_count; ++i) {
    task.pixels += task.slabs[i].height * task.slabs[i].width;
    task.input_pixels += task.slab_rows(task.slabs[i]) * task.pitch;
  }
}

// Position of each listed row (or column) of tiles among those that occur, and the list of these.
struct Used {
  std::vector<int64_t> place, list;

  Used(const int32_t* tiles, int64_t count, int which, int64_t grid) : place(grid, -1) {
    for (int64_t i = 0; i < count; ++i) {
      int64_t& at = place[tiles[2 * i + which]];
      if (at < 0) at = static_cast<int64_t>(list.size()), list.push_back(tiles[2 * i + which]);
    }
  }
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// On a cache line's border, so that no vector lies on two.
template <class A>
std::unique_ptr<A, Free> scratch(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(A) + 63) / 64 * 64;
  std::unique_ptr<A, Free> memory(static_cast<A*>(std::aligned_alloc(64, bytes)));
  if (!memory) throw std::bad_alloc();
#ifdef TERSOR_POISON
  std::memset(memory.get(), 0xff, bytes);
#endif
  return memory;
}

template <class A>
void run_as(Task task, const Kernels<A>& kernels, const Chunks& chunks, const int32_t* tiles, int64_t count, void* output) {
  task.padded_columns = (task.tile_columns + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
  const Used rows(tiles, count, 0, (task.rows + task.tile_rows - 1) / task.tile_rows);
  const Used columns(tiles, count, 1, (task.columns + task.tile_columns - 1) / task.tile_columns);
  const int64_t row_tiles = static_cast<int64_t>(rows.list.size()), column_tiles = static_cast<int64_t>(columns.list.size());
  int64_t most_pixels = 0, most_input = 0;
  const size_t chunk_count = chunks.starts.size() - 1;
  for (size_t c = 0; c < chunk_count; ++c) {
    set_chunk(task, chunks, c);
    most_pixels = std::max(most_pixels, task.pixels), most_input = std::max(most_input, task.input_pixels);
  }
  const int64_t line = 64 / sizeof(A);
  const int64_t row_size = (task.panels() * PANEL * most_pixels + line - 1) / line * line;
  const int64_t column_size = (most_input * task.padded_columns + line - 1) / line * line;
  const auto packed = scratch<A>(row_tiles * row_size + column_tiles * column_size);
  const auto sums = scratch<A>(count * task.accumulators());
  A* packed_columns = packed.get() + row_tiles * row_size;
  for (size_t c = 0; c < chunk_count; ++c) {
    set_chunk(task, chunks, c);
    torch::stable::parallel_for(0, row_tiles + column_tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t j = i - row_tiles;
        if (j < 0) kernels.pack_rows(task, rows.list[i], packed.get() + i * row_size);
        else kernels.pack_columns(task, columns.list[j], packed_columns + j * column_size);
      }
    });
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int32_t row = tiles[2 * i], column = tiles[2 * i + 1];
        A* own = sums.get() + i * task.accumulators();
        kernels.multiply(task, packed.get() + rows.place[row] * row_size,
                         packed_columns + columns.place[column] * column_size, c == 0, own);
        if (c + 1 == chunk_count) kernels.write(task, row, column, own, output);
      }
    });
  }
}

inline void check_tiles(const Task& task, const Tensor& tiles) {
  STD_TORCH_CHECK(tiles.is_cpu() && tiles.scalar_type() == ScalarType::Int && tiles.dim() == 2 && tiles.size(1) == 2,
                  "tiles must be an int32 CPU tensor (count, 2)");
  STD_TORCH_CHECK(task.tile_rows >= 1 && task.tile_columns >= 1, "tile sizes must be at least 1");
  const int32_t* data = static_cast<const int32_t*>(tiles.const_data_ptr());
  for (int64_t i = 0; i < tiles.size(0); ++i) {
    STD_TORCH_CHECK(data[2 * i] >= 0 && data[2 * i] * task.tile_rows < task.rows && data[2 * i + 1] >= 0 &&
                        data[2 * i + 1] * task.tile_columns < task.columns,
                    "tiles must lie inside the weight");
  }
}

// Fills in what the two layers have in common, and runs. `task` has the tensors' sizes and the window.
inline Tensor run(Task task, const Tensor& grad_output, const Tensor& input, const std::optional<Tensor>& frozen,
                  const Tensor& listed_tiles, int64_t images, int64_t height, int64_t width, std::vector<int64_t> shape) {
  STD_TORCH_CHECK(grad_output.is_cpu() && input.is_cpu() && grad_output.scalar_type() == input.scalar_type(),
                  "grad_output and input must be CPU tensors of one dtype");
  const Tensor tiles = torch::stable::contiguous(listed_tiles);
  check_tiles(task, tiles);
  std::optional<Tensor> mask;
  if (frozen) {
    STD_TORCH_CHECK(frozen->is_cpu() && frozen->scalar_type() == ScalarType::Byte &&
                        frozen->numel() == (task.rows * task.columns * task.taps() + 7) / 8,
                    "frozen must be a uint8 CPU tensor of one bit per weight");
    mask = torch::stable::contiguous(*frozen);
    task.frozen = static_cast<const uint8_t*>(mask->const_data_ptr());
  }
  task.grad_output = grad_output.const_data_ptr(), task.input = input.const_data_ptr();
  Tensor output = torch::stable::new_zeros(input, shape);
  const Chunks chunks = chunks_of(images, height, width);
  if (tiles.size(0) == 0 || chunks.slabs.empty()) return output;
  int64_t widest = 0;
  for (const Slab& slab : chunks.slabs) widest = std::max(widest, slab.width);
  task.pitch = (widest - 1) * task.stride[1] + (task.kernel[1] - 1) * task.dilation[1] + 1;
  const int32_t* listed = static_cast<const int32_t*>(tiles.const_data_ptr());
  const auto go = [&](const auto& kernels) {
    run_as(task, kernels, chunks, listed, tiles.size(0), output.mutable_data_ptr());
  };
  const ScalarType dtype = input.scalar_type();
  if (dtype == ScalarType::Float) go(TERSOR_FOR_ISA(gradient_kernels<float, float>)());
  else if (dtype == ScalarType::Half) go(TERSOR_FOR_ISA(gradient_kernels<Half, float>)());
  else if (dtype == ScalarType::BFloat16) go(TERSOR_FOR_ISA(gradient_kernels<BFloat16, float>)());
  else if (dtype == ScalarType::Double) go(TERSOR_FOR_ISA(gradient_kernels<double, double>)());
  else STD_TORCH_CHECK(false, "input must be float16, bfloat16, float32 or float64");
  return output;
}

}  // namespace
}  // namespace tersor::weight_gradient

// Patches of images by index on the CPU (specification: pyops/tokens/gather_patches.py).

#include <limits>

#include "tokens/scatter.h"

namespace tersor::tokens {
namespace {

struct Grid {
  int64_t images, channels, height, width, patch;

  int64_t across() const { return width / patch; }
  int64_t patches() const { return height / patch * across(); }
  int64_t elements() const { return channels * patch * patch; }
};

Grid checked_grid(int64_t images, int64_t channels, int64_t height, int64_t width, int64_t patch) {
  STD_TORCH_CHECK(patch > 0 && images >= 0 && channels >= 0 && height >= 0 && width >= 0 && height % patch == 0 &&
                      width % patch == 0,
                  "images must be (B, C, H, W) with H and W multiples of patch_size");
  return {images, channels, height, width, patch};
}

// Where in the list of all images' patches each chosen one is, -1 if nowhere.
std::vector<int64_t> find_places(const Grid& grid, const Tensor& index, const Maybe& rows) {
  const int64_t count = index.size(0), columns = index.size(1);
  STD_TORCH_CHECK(rows ? rows->is_cpu() && rows->dim() == 1 && rows->scalar_type() == ScalarType::Long &&
                             rows->size(0) == count
                       : count == grid.images,
                  "index needs one row for each image, or rows an int64 for each row of index");
  const Tensor own = rows ? torch::stable::contiguous(*rows) : index;
  std::vector<int64_t> places(count * columns);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t image = rows ? places_of(own)[i] : i;
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t place = places_of(index)[i * columns + j];
      const bool inside = image >= 0 && image < grid.images && place >= 0 && place < grid.patches();
      places[i * columns + j] = inside ? image * grid.patches() + place : -1;
    }
  }
  return places;
}

template <class T>
void copy_patch(const T* from, int64_t channel, int64_t row, int64_t column, const Grid& grid, T* to) {
  for (int64_t c = 0; c < grid.channels; ++c) {
    for (int64_t y = 0; y < grid.patch; ++y, to += grid.patch) {
      const T* line = from + c * channel + y * row;
      if (column == 1) std::memcpy(to, line, grid.patch * sizeof(T));
      else for (int64_t x = 0; x < grid.patch; ++x) to[x] = line[x * column];
    }
  }
}

Tensor forward(const Tensor& images, const Tensor& given, const Maybe& rows, int64_t patch) {
  STD_TORCH_CHECK(images.is_cpu() && images.dim() == 4 && is_floating(images.scalar_type()),
                  "images must be a floating CPU tensor (B, C, H, W)");
  const Grid grid = checked_grid(images.size(0), images.size(1), images.size(2), images.size(3), patch);
  const Tensor index = checked_index(given, given.size(0), -1, "index");
  const std::vector<int64_t> places = find_places(grid, index, rows);
  Tensor output = torch::stable::new_empty(images, {index.size(0), index.size(1), grid.elements()});
  with_type(images, [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(images.const_data_ptr());
    T* to = static_cast<T*>(output.mutable_data_ptr());
    const int64_t grain = grain_for(grid.elements() * static_cast<int64_t>(sizeof(T)));
    torch::stable::parallel_for(0, static_cast<int64_t>(places.size()), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* own = to + i * grid.elements();
        if (places[i] < 0) {
          std::fill(own, own + grid.elements(), T(std::numeric_limits<float>::quiet_NaN()));
          continue;
        }
        const int64_t image = places[i] / grid.patches(), place = places[i] % grid.patches();
        const int64_t y = place / grid.across() * patch, x = place % grid.across() * patch;
        const T* corner = from + image * images.stride(0) + y * images.stride(2) + x * images.stride(3);
        copy_patch(corner, images.stride(1), images.stride(2), images.stride(3), grid, own);
      }
    });
  });
  return output;
}

Tensor backward(const Tensor& grad_output, const Tensor& given, const Maybe& rows, int64_t patch,
                const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(shape.size() == 4 && grad_output.dim() == 3, "shape must be that of images");
  const Grid grid = checked_grid(shape[0], shape[1], shape[2], shape[3], patch);
  const int64_t count = grad_output.size(0), columns = grad_output.size(1);
  const Tensor index = checked_index(given, count, columns, "index");
  const Tensor checked_grad = checked(grad_output, grad_output, "grad_output", {count, columns, grid.elements()});
  const Tensor grad = torch::stable::contiguous(checked_grad);
  const std::vector<int64_t> places = find_places(grid, index, rows);
  const Chains chains(grid.images * grid.patches(), count * columns, [&](int64_t j) { return places[j]; });
  Tensor result = torch::stable::new_empty(grad, {grid.images, grid.channels, grid.height, grid.width});
  with_type(grad, [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(grad.const_data_ptr());
    T* to = static_cast<T*>(result.mutable_data_ptr());
    const int64_t grain = grain_for(grid.elements() * static_cast<int64_t>(sizeof(T)));
    torch::stable::parallel_for(0, grid.images * grid.patches(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / grid.patches(), place = i % grid.patches();
        const int64_t y = place / grid.across() * patch, x = place % grid.across() * patch;
        for (int64_t c = 0; c < grid.channels; ++c) {
          for (int64_t v = 0; v < patch; ++v) {
            const int64_t line = (c * patch + v) * patch;
            const auto row = [&](int64_t j) { return from + j * grid.elements() + line; };
            T* own = to + ((image * grid.channels + c) * grid.height + y + v) * grid.width + x;
            add_chain(chains, i, row, patch, own);
          }
        }
      }
    });
  });
  return result;
}

}  // namespace
}  // namespace tersor::tokens

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("gather_patches_forward", TORCH_BOX(&tersor::tokens::forward));
  module.impl("gather_patches_backward", TORCH_BOX(&tersor::tokens::backward));
}

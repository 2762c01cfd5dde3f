// The signs of a map as bits, on the CPU (specification: pyops/binary/pack_signs.py).

#include "binary/signs.h"

#define TERSOR_BODY "binary/pack_signs_kernels.h"
#include "foreach_isa.h"

namespace tersor::binary {

Tensor pack(const Tensor& input, const Maybe& shift, int64_t groups) {
  STD_TORCH_CHECK(input.is_cpu() && input.dim() == 4 && is_floating(input.scalar_type()) && groups > 0 &&
                      input.size(1) > 0 && input.size(1) % groups == 0,
                  "input must be a floating CPU tensor (N, C, H, W), groups a divisor of C");
  Map map{};
  map.batch = input.size(0), map.channels = input.size(1), map.height = input.size(2), map.width = input.size(3);
  map.groups = groups;
  // Either the channels of a pixel lie side by side, or the pixels of a channel.
  const bool by_pixel = input.stride(1) == 1 && map.channels > 1;
  const bool by_channel = (map.width == 1 || input.stride(3) == 1) && (map.height == 1 || input.stride(2) == map.width);
  const Tensor x = by_pixel || by_channel ? input : as_contiguous(input);
  map.stride_n = x.stride(0), map.stride_c = x.stride(1), map.stride_h = x.stride(2), map.stride_w = x.stride(3);
  Tensor add;
  if (shift) {
    STD_TORCH_CHECK(shift->is_cpu() && shift->scalar_type() == x.scalar_type() && shift->dim() == 1 &&
                        shift->size(0) == map.channels,
                    "shift must be a CPU tensor (C,) of the dtype of input");
    add = as_contiguous(*shift);
    map.shift = add.const_data_ptr();
  }
  const int64_t words = words_for(map.channels / groups);
  Tensor signs = new_tensor({2, map.batch, map.height, map.width, groups, words}, ScalarType::Long);
  map.numbers = const_cast<void*>(x.const_data_ptr());
  map.words = static_cast<int64_t*>(signs.mutable_data_ptr());
  if (signs.numel() == 0) return signs;
  const int64_t units = by_pixel ? map.batch * map.height : map.batch * groups * words;
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const int64_t grain = grain_for(x.numel() / units * static_cast<int64_t>(sizeof(T)));
    torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
      TERSOR_FOR_ISA(pack_units<T>)(map, by_pixel, begin, end);
    });
  });
  return signs;
}

}  // namespace tersor::binary

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("pack_signs", TORCH_BOX(&tersor::binary::pack));
}

// From bits back to a map of -1, 0 and 1, on the CPU (specification: pyops/binary/unpack_signs.py).

#include "binary/signs.h"

#define TERSOR_BODY "binary/unpack_signs_kernels.h"
#include "foreach_isa.h"

namespace tersor::binary {

Tensor unpack(const Tensor& given, int64_t channels, ScalarType dtype, bool channels_last) {
  check_words(given, channels);
  const Tensor signs = as_contiguous(given);
  Map map{};
  map.batch = signs.size(1), map.height = signs.size(2), map.width = signs.size(3), map.groups = signs.size(4);
  map.channels = channels, map.words = const_cast<int64_t*>(static_cast<const int64_t*>(signs.const_data_ptr()));
  Tensor output = new_map({map.batch, channels, map.height, map.width}, dtype, channels_last);
  map.numbers = output.mutable_data_ptr();
  map.stride_n = channels * map.pixels();
  map.stride_c = channels_last ? 1 : map.pixels(), map.stride_w = channels_last ? channels : 1;
  map.stride_h = map.width * map.stride_w;
  if (output.numel() == 0) return output;
  const int64_t units = channels_last ? map.batch * map.height : map.batch * map.groups * signs.size(5);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t grain = grain_for(output.numel() / units * static_cast<int64_t>(sizeof(T)));
    torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
      TERSOR_FOR_ISA(unpack_units<T>)(map, channels_last, begin, end);
    });
  });
  return output;
}

}  // namespace tersor::binary

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("unpack_signs", TORCH_BOX(&tersor::binary::unpack));
}

// The unsure images first, on the CPU (specification: pyops/tokens/compact_unsure.py).

#include "tokens/rows.h"

#define TERSOR_BODY "tokens/compact_unsure_kernels.h"
#include "foreach_isa.h"

namespace tersor::tokens {
namespace {

std::tuple<Tensor, Tensor> compact_unsure(const Tensor& given, double threshold) {
  STD_TORCH_CHECK(given.is_cpu() && given.dim() == 2 && given.size(1) > 0 && is_floating(given.scalar_type()),
                  "logits must be a floating CPU tensor (B, classes)");
  const Tensor logits = torch::stable::contiguous(given);
  const int64_t batch = logits.size(0), classes = logits.size(1);
  std::vector<uint8_t> unsure(batch);
  with_type(logits, [&](auto type) {
    using T = decltype(type);
    const T* data = static_cast<const T*>(logits.const_data_ptr());
    torch::stable::parallel_for(0, batch, grain_for(4 * classes), [&](int64_t begin, int64_t end) {
      TERSOR_FOR_ISA(find_unsure<T>)(data, classes, static_cast<float>(threshold), begin, end, unsure.data());
    });
  });
  Tensor index = torch::stable::new_empty(logits, {batch}, ScalarType::Long);
  Tensor count = torch::stable::new_empty(logits, {1}, ScalarType::Long);
  int64_t* places = static_cast<int64_t*>(index.mutable_data_ptr());
  int64_t found = 0;
  for (int64_t b = 0; b < batch; ++b) found += unsure[b];
  static_cast<int64_t*>(count.mutable_data_ptr())[0] = found;
  int64_t first = 0, second = found;
  for (int64_t b = 0; b < batch; ++b) places[unsure[b] ? first++ : second++] = b;
  return {index, count};
}

}  // namespace
}  // namespace tersor::tokens

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("compact_unsure", TORCH_BOX(&tersor::tokens::compact_unsure));
}

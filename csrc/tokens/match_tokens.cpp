// Which tokens join which, on the CPU (specification: pyops/tokens/match_tokens.py).

#include "tokens/match_tokens.h"

#define TERSOR_BODY "tokens/match_tokens_kernels.h"
#include "foreach_isa.h"

namespace tersor::tokens {
namespace {

Tensor match_tokens(const Tensor& given, int64_t count, int64_t guarded) {
  STD_TORCH_CHECK(given.dim() == 4 && given.size(2) >= 1 && given.size(3) >= 1, "keys must be (B, n, heads, head_dim)");
  const int64_t batch = given.size(0), length = given.size(1);
  STD_TORCH_CHECK(guarded >= 0 && guarded <= 2, "protected must be 0, 1 or 2");
  STD_TORCH_CHECK(count >= 1 && count <= (length - guarded) / 2, "count must be from 1 to half of the tokens to merge");
  const Tensor keys = checked(given, given, "keys", {batch, length, given.size(2), given.size(3)});
  Tensor index = torch::stable::new_empty(keys, {batch, length}, ScalarType::Long);
  const auto size = static_cast<int64_t>(keys.element_size());
  Match task{};
  task.length = length, task.heads = keys.size(2), task.head_dim = keys.size(3);
  task.count = count, task.guarded = guarded;
  task.keys = static_cast<const char*>(keys.const_data_ptr());
  task.keys_batch = keys.stride(0) * size, task.keys_row = keys.stride(1) * size;
  task.keys_head = keys.stride(2) * size;
  task.index = static_cast<int64_t*>(index.mutable_data_ptr());
  with_type(keys, [&](auto type) {
    using T = decltype(type);
    const int64_t bytes = length * task.head_dim * (task.heads + length / 16) * size;
    torch::stable::parallel_for(0, batch, grain_for(bytes), [&](int64_t begin, int64_t end) {
      const Memory scratch = allocate(task.scratch_bytes());
      TERSOR_FOR_ISA(match_images<T, Accumulated<T>>)(task, begin, end, scratch.get());
    });
  });
  return index;
}

}  // namespace
}  // namespace tersor::tokens

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("match_tokens", TORCH_BOX(&tersor::tokens::match_tokens));
}

// Stable ranking of tokens on the CPU (specification: pyops/tokens/rank_tokens.py).

#include "tokens/rank.h"

#define TERSOR_BODY "tokens/rank_kernels.h"
#include "foreach_isa.h"

namespace tersor::tokens {
namespace {

Tensor rank_tokens(const Tensor& given) {
  STD_TORCH_CHECK(given.is_cpu() && given.dim() == 2 && is_floating(given.scalar_type()),
                  "scores must be a floating CPU tensor (B, N)");
  const Tensor scores = torch::stable::contiguous(given);
  Tensor order = torch::stable::new_empty(scores, {scores.size(0), scores.size(1)}, ScalarType::Long);
  rank_all(TERSOR_RANK_ROWS(scores), scores, static_cast<int64_t*>(order.mutable_data_ptr()));
  return order;
}

}  // namespace
}  // namespace tersor::tokens

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("rank_tokens", TORCH_BOX(&tersor::tokens::rank_tokens));
}

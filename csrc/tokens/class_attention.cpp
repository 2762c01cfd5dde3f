// How much the class token attends to every other one, on the CPU (specification: pyops/tokens/class_attention.py).

#include "tokens/class_attention.h"

#include "tokens/rows.h"

#define TERSOR_BODY "tokens/class_attention_kernels.h"
#include "foreach_isa.h"

namespace tersor::tokens {
namespace {

Tensor class_scores(const Tensor& given_query, const Tensor& given_key, const Maybe& given_average, double scale,
                    double decay) {
  STD_TORCH_CHECK(given_key.dim() == 4 && given_key.size(1) >= 2, "key must be (B, n, heads, head_dim), n at least 2");
  const int64_t batch = given_key.size(0), length = given_key.size(1);
  const int64_t heads = given_key.size(2), head_dim = given_key.size(3);
  const Tensor key = checked(given_key, given_key, "key", {batch, length, heads, head_dim});
  const Tensor query = checked(given_query, given_key, "query", {batch, heads, head_dim});
  const ScalarType exact = key.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor scores = torch::stable::new_empty(key, {batch, length - 1}, exact);
  const Tensor average =
      given_average ? torch::stable::contiguous(checked(*given_average, scores, "average", {batch, length - 1})) : scores;
  ClassScores task{};
  task.length = length, task.heads = heads, task.head_dim = head_dim;
  task.query = query.const_data_ptr(), task.query_batch = query.stride(0), task.query_head = query.stride(1);
  task.key = key.const_data_ptr(), task.key_batch = key.stride(0), task.key_row = key.stride(1);
  task.key_head = key.stride(2);
  task.average = given_average ? average.const_data_ptr() : nullptr, task.scores = scores.mutable_data_ptr();
  task.scale = scale, task.decay = decay;
  with_type(key, [&](auto type) {
    using T = decltype(type);
    const int64_t bytes = length * heads * head_dim * static_cast<int64_t>(sizeof(T));
    torch::stable::parallel_for(0, batch, grain_for(bytes), [&](int64_t begin, int64_t end) {
      const Memory scratch = allocate(task.scratch_bytes());
      TERSOR_FOR_ISA(score_images<T>)(task, begin, end, scratch.get());
    });
  });
  return scores;
}

}  // namespace
}  // namespace tersor::tokens

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("class_scores", TORCH_BOX(&tersor::tokens::class_scores));
}

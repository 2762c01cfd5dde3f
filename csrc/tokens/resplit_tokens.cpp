// CF-ViT's coarse-to-fine step on the CPU (specification: pyops/tokens/resplit_tokens.py).

#include "tokens/rank.h"
#include "tokens/resplit_tokens.h"

#define TERSOR_BODY "tokens/resplit_tokens_kernels.h"
#include "foreach_isa.h"

namespace tersor::tokens {
namespace {

int64_t side_of(int64_t count) {
  int64_t side = 1;
  while (side * side < count) ++side;
  STD_TORCH_CHECK(side * side == count, "the coarse tokens must fill a square grid");
  return side;
}

std::tuple<Tensor, Tensor> forward(const Tensor& given, const Tensor& fine_patches, const Maybe& reuse,
                                   const Maybe& position, const Tensor& cls, const Maybe& scores, const Maybe& order,
                                   int64_t chosen) {
  STD_TORCH_CHECK(given.dim() == 3 && given.size(1) >= 2, "coarse must be (B, 1 + N, C)");
  const int64_t batch = given.size(0), count = given.size(1) - 1, channels = given.size(2);
  STD_TORCH_CHECK(chosen > 0 && chosen <= count, "chosen must be from 1 to the number of coarse tokens");
  STD_TORCH_CHECK(scores.has_value() != order.has_value(), "one of scores and order must be given");
  const bool selected = order.has_value();
  const int64_t parents = selected ? chosen : count;
  const Tensor coarse = checked(given, given, "coarse", {batch, 1 + count, channels});
  const Tensor fine = checked(fine_patches, coarse, "fine_patches", {batch, 4 * parents, channels});
  const bool shared = cls.dim() == 3 && cls.size(0) == 1;
  const Tensor first = checked(cls, coarse, "cls", {shared ? 1 : batch, 1, channels});

  Resplit task{};
  task.batch = batch, task.side = side_of(count), task.channels = channels, task.chosen = chosen;
  task.selected = selected, task.coarse = rows_of(coarse), task.fine = rows_of(fine), task.cls = rows_of(first, shared);
  Tensor reuse_rows, position_rows;
  if (reuse) task.reuse = rows_of(reuse_rows = checked(*reuse, coarse, "reuse", {batch, parents, channels}));
  if (position) {
    position_rows = checked(*position, coarse, "position", {1, 1 + 4 * count, channels});
    task.position = rows_of(position_rows, true);
  }
  Tensor ranked, kept;
  if (selected) {
    kept = checked_index(*order, batch, count, "order");
    ranked = torch::stable::new_empty(coarse, {0}, ScalarType::Long);
  } else {
    STD_TORCH_CHECK(scores->is_cpu() && scores->dim() == 2 && scores->size(0) == batch && scores->size(1) == count &&
                        is_floating(scores->scalar_type()),
                    "scores must be a floating CPU tensor (B, N)");
    kept = ranked = torch::stable::new_empty(coarse, {batch, count}, ScalarType::Long);
    const Tensor own = torch::stable::contiguous(*scores);
    rank_all(TERSOR_RANK_ROWS(own), own, static_cast<int64_t*>(ranked.mutable_data_ptr()));
  }
  task.order = places_of(kept);
  Tensor tokens = torch::stable::new_empty(coarse, {batch, 1 + 3 * chosen + count, channels});
  task.tokens = out_rows_of(tokens);
  with_type(coarse, [&](auto type) {
    using T = decltype(type);
    const int64_t grain = grain_for(8 * channels * static_cast<int64_t>(sizeof(T)));
    torch::stable::parallel_for(0, batch * (count + 1), grain, [&](int64_t begin, int64_t end) {
      TERSOR_FOR_ISA(resplit_units<T, Accumulated<T>>)(task, begin, end);
    });
  });
  return {tokens, ranked};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_tokens, const Tensor& given_order,
                                                            int64_t chosen, bool selected, bool need_coarse,
                                                            bool need_fine, bool need_reuse, bool need_position,
                                                            int64_t cls_rows) {
  STD_TORCH_CHECK(grad_tokens.dim() == 3 && given_order.dim() == 2, "grad_tokens must be (B, n, C), order (B, N)");
  const int64_t batch = grad_tokens.size(0), channels = grad_tokens.size(2), count = given_order.size(1);
  STD_TORCH_CHECK(chosen > 0 && chosen <= count, "chosen must be from 1 to the number of coarse tokens");
  STD_TORCH_CHECK(cls_rows == 0 || cls_rows == 1 || cls_rows == batch, "cls_rows must be 0, 1 or the batch");
  const Tensor order = checked_index(given_order, batch, count, "order");
  const Tensor grad = checked(grad_tokens, grad_tokens, "grad_tokens", {batch, 1 + 3 * chosen + count, channels});
  const int64_t parents = selected ? chosen : count;
  const auto make = [&](bool wanted, int64_t images, int64_t rows) {
    return wanted ? torch::stable::new_empty(grad, {images, rows, channels}) : torch::stable::new_empty(grad, {0});
  };
  Tensor grad_coarse = make(need_coarse, batch, 1 + count), grad_fine = make(need_fine, batch, 4 * parents);
  Tensor grad_reuse = make(need_reuse, batch, parents), grad_position = make(need_position, 1, 1 + 4 * count);
  Tensor grad_cls = make(cls_rows > 0, cls_rows, 1);

  Resplit task{};
  task.batch = batch, task.side = side_of(count), task.channels = channels, task.chosen = chosen;
  task.selected = selected, task.order = places_of(order), task.grad_tokens = rows_of(grad);
  task.grad_coarse = out_rows_of(grad_coarse), task.grad_fine = out_rows_of(grad_fine);
  task.grad_reuse = out_rows_of(grad_reuse), task.grad_position = out_rows_of(grad_position);
  task.grad_cls = out_rows_of(grad_cls), task.own_cls = cls_rows == batch;
  std::vector<int32_t> rank(batch * count);
  invert(task.order, batch, count, count, rank.data());
  task.rank = rank.data();
  with_type(grad, [&](auto type) {
    using T = decltype(type);
    using A = Accumulated<T>;
    const int64_t bytes = 8 * channels * static_cast<int64_t>(sizeof(T));
    if (selected) {
      torch::stable::parallel_for(0, batch * chosen, grain_for(bytes), [&](int64_t begin, int64_t end) {
        TERSOR_FOR_ISA(selected_gradients<T, A>)(task, begin, end);
      });
    }
    torch::stable::parallel_for(0, count + 1, grain_for(batch * bytes), [&](int64_t begin, int64_t end) {
      const Memory sums = allocate(4 * channels * static_cast<int64_t>(sizeof(A)));
      TERSOR_FOR_ISA(resplit_gradients<T, A>)(task, begin, end, reinterpret_cast<A*>(sums.get()));
    });
  });
  return {grad_coarse, grad_fine, grad_reuse, grad_position, grad_cls};
}

}  // namespace
}  // namespace tersor::tokens

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("resplit_tokens_forward", TORCH_BOX(&tersor::tokens::forward));
  module.impl("resplit_tokens_backward", TORCH_BOX(&tersor::tokens::backward));
}

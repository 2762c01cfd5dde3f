// Weight quantisation that freezes what has settled, on the CPU (specification: pyops/freezing/lts_quantize.py).

#include "freezing/frozen_bits.h"
#include "freezing/lts_quantize.h"

#define TERSOR_BODY "freezing/lts_quantize_kernels.h"
#include "foreach_isa.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace tersor::lts {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Kernels kernels_for(ScalarType dtype) {
  if (dtype == ScalarType::Float) return TERSOR_FOR_ISA(lts_kernels<float, float>)();
  if (dtype == ScalarType::Half) return TERSOR_FOR_ISA(lts_kernels<Half, float>)();
  if (dtype == ScalarType::BFloat16) return TERSOR_FOR_ISA(lts_kernels<BFloat16, float>)();
  STD_TORCH_CHECK(dtype == ScalarType::Double, "weight must be float16, bfloat16, float32 or float64");
  return TERSOR_FOR_ISA(lts_kernels<double, double>)();
}

ScalarType exact_type(const Tensor& weight) {
  return weight.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

double bound(const Tensor& t, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.numel() == 1 && t.scalar_type() == dtype, name,
                  " must be a CPU tensor of one element, float64 for a float64 weight and else float32");
  const double value = dtype == ScalarType::Double ? *static_cast<const double*>(t.const_data_ptr())
                                                   : *static_cast<const float*>(t.const_data_ptr());
  STD_TORCH_CHECK(std::isfinite(value), "lts_quantize: ", name, " must be finite, got ", value);
  return value;
}

double rate_at(int64_t step, const std::string& growth, double rate, int64_t warmup, int64_t total) {
  if (growth == "fixing") return rate;
  const double part = static_cast<double>(step - warmup) / static_cast<double>(total - warmup);
  STD_TORCH_CHECK(growth == "linear" || growth == "sine", "growth must be fixing, linear or sine");
  return growth == "linear" ? part : std::sin(part * (M_PI / 2));
}

struct Grid {
  int64_t rows, columns, block_rows, block_columns;

  int64_t across() const { return (columns + block_columns - 1) / block_columns; }
  int64_t blocks() const { return (rows + block_rows - 1) / block_rows * across(); }

  // Calls body(first, end) for the elements of each row of block b.
  template <class F>
  void for_rows(int64_t b, const F& body) const {
    const int64_t top = b / across() * block_rows, left = b % across() * block_columns;
    const int64_t right = std::min(columns, left + block_columns);
    for (int64_t r = top; r < std::min(rows, top + block_rows); ++r) body(r * columns + left, r * columns + right);
  }
};

// Freezes every block in which enough elements are within the threshold; how many elements that makes.
int64_t settle_blocks(const Task& task, const Kernels& kernels, const Grid& grid, double quantile) {
  std::vector<char> settled(grid.blocks());
  torch::stable::parallel_for(0, grid.blocks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      int64_t size = 0, count = 0;
      grid.for_rows(b, [&](int64_t first, int64_t last) {
        size += last - first;
        count += kernels.within(task.distance, first, last, task.threshold);
      });
      settled[b] = static_cast<double>(count) >= quantile * static_cast<double>(size);
    }
  });
  int64_t frozen = 0;  // one block after the other, since two may share a byte
  for (int64_t b = 0; b < grid.blocks(); ++b) {
    if (!settled[b]) continue;
    grid.for_rows(b, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        if (i % 8 == 0 && i + 8 <= last && task.frozen[i / 8] == 0xff) {
          i += 7;
          continue;
        }
        if (freezing::is_frozen(task.frozen, i)) continue;
        task.frozen[i / 8] |= static_cast<uint8_t>(1 << i % 8);
        if (task.frozen_step) task.frozen_step[i] = static_cast<int32_t>(task.step);
        ++frozen;
      }
    });
  }
  return frozen;
}

std::tuple<Tensor, Tensor> forward(const Tensor& given_weight, const Tensor& lower, const Tensor& upper,
                                   Tensor distance, Tensor code, Tensor frozen, Tensor counters,
                                   std::optional<Tensor> saved, std::optional<Tensor> frozen_step, int64_t bits,
                                   bool update, const std::string& growth, double rate, double momentum,
                                   int64_t warmup, int64_t total, int64_t block_rows, int64_t block_columns,
                                   double quantile) {
  const Tensor weight = torch::stable::contiguous(given_weight);
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() >= 1, "weight must be a CPU tensor of at least one dimension");
  STD_TORCH_CHECK(bits >= 2 && bits <= 8, "bits must be 2 to 8");
  STD_TORCH_CHECK(block_rows >= 1 && block_columns >= 1, "a block must have at least one element");
  const ScalarType exact = exact_type(weight);
  Task task{};
  task.elements = weight.numel();
  task.lower = bound(lower, exact, "lower"), task.upper = bound(upper, exact, "upper");
  STD_TORCH_CHECK(task.lower < task.upper, "lts_quantize: lower must be less than upper, got ", task.lower, " and ",
                  task.upper);
  freezing::check_beside(distance, task.elements, exact, "distance");
  freezing::check_beside(code, task.elements, ScalarType::Byte, "code");
  freezing::check_bits(frozen, task.elements);
  STD_TORCH_CHECK(counters.is_cpu() && counters.scalar_type() == ScalarType::Long && counters.numel() == 2 &&
                      counters.is_contiguous(),
                  "counters must be a contiguous int64 CPU tensor of two elements");
  if (saved) freezing::check_beside(*saved, task.elements, weight.scalar_type(), "saved");
  if (frozen_step) freezing::check_beside(*frozen_step, task.elements, ScalarType::Int, "frozen_step");
  Tensor output = torch::stable::new_empty(weight, weight.sizes());
  Tensor before = torch::stable::new_empty(frozen, frozen.sizes());
  int64_t* count = static_cast<int64_t*>(counters.mutable_data_ptr());
  task.weight = weight.const_data_ptr(), task.output = output.mutable_data_ptr();
  task.saved = saved ? saved->mutable_data_ptr() : nullptr;
  task.distance = distance.mutable_data_ptr(), task.code = static_cast<uint8_t*>(code.mutable_data_ptr());
  task.frozen = static_cast<uint8_t*>(frozen.mutable_data_ptr());
  task.before = static_cast<uint8_t*>(before.mutable_data_ptr());
  task.frozen_step = frozen_step ? static_cast<int32_t*>(frozen_step->mutable_data_ptr()) : nullptr;
  task.levels = (1 << bits) - 1, task.momentum = momentum, task.update = update, task.second = count[0] == 0;
  task.step = count[0] + 1;
  const bool late = update && task.step > warmup, single = block_rows == 1 && block_columns == 1;
  task.settle = late && single;
  if (late) task.threshold = rate_at(task.step, growth, rate, warmup, total) / task.levels;
  const Kernels kernels = kernels_for(weight.scalar_type());
  std::vector<int64_t> froze((task.elements + freezing::BLOCK - 1) / freezing::BLOCK);
  freezing::for_blocks(task.elements, [&](int64_t b, int64_t first, int64_t end) {
    froze[b] = kernels.forward(task, first, end);
  });
  if (!update) return {output, before};
  for (const int64_t f : froze) count[1] += f;
  if (late && !single && task.elements > 0) {
    const Grid grid{weight.size(0), task.elements / weight.size(0), block_rows, block_columns};
    count[1] += settle_blocks(task, kernels, grid, quantile);
  }
  count[0] = task.step;
  return {output, before};
}

template <class A>
void set(Tensor& t, double value) {
  *static_cast<A*>(t.mutable_data_ptr()) = static_cast<A>(value);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& given_gradient, const Tensor& given_weight,
                                            const std::optional<Tensor>& saved, const Tensor& lower,
                                            const Tensor& upper, const Tensor& frozen) {
  const Tensor weight = torch::stable::contiguous(given_weight), grad = torch::stable::contiguous(given_gradient);
  const ScalarType exact = exact_type(weight);
  Gradient task{};
  task.elements = weight.numel();
  freezing::check_beside(grad, task.elements, weight.scalar_type(), "grad_output");
  freezing::check_bits(frozen, task.elements);
  std::optional<Tensor> kept;
  if (saved) {
    kept = torch::stable::contiguous(*saved);
    freezing::check_beside(*kept, task.elements, weight.scalar_type(), "saved");
    task.saved = kept->const_data_ptr();
  }
  task.lower = bound(lower, exact, "lower"), task.upper = bound(upper, exact, "upper");
  Tensor grad_weight = torch::stable::new_empty(weight, weight.sizes());
  Tensor grad_lower = torch::stable::new_empty(lower, lower.sizes());
  Tensor grad_upper = torch::stable::new_empty(upper, upper.sizes());
  task.grad_output = grad.const_data_ptr(), task.weight = weight.const_data_ptr();
  task.frozen = static_cast<const uint8_t*>(frozen.const_data_ptr());
  task.grad_weight = grad_weight.mutable_data_ptr();
  const Kernels kernels = kernels_for(weight.scalar_type());
  std::vector<double> partial(2 * ((task.elements + freezing::BLOCK - 1) / freezing::BLOCK));
  freezing::for_blocks(task.elements, [&](int64_t b, int64_t first, int64_t end) {
    kernels.backward(task, first, end, partial.data() + 2 * b);
  });
  double sums[2] = {0, 0};
  for (size_t i = 0; i < partial.size(); ++i) sums[i % 2] += partial[i];
  if (exact == ScalarType::Double) set<double>(grad_lower, sums[0]), set<double>(grad_upper, -sums[1]);
  else set<float>(grad_lower, sums[0]), set<float>(grad_upper, -sums[1]);
  return {grad_weight, grad_lower, grad_upper};
}

}  // namespace
}  // namespace tersor::lts

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("lts_quantize_forward", TORCH_BOX(&tersor::lts::forward));
  module.impl("lts_quantize_backward", TORCH_BOX(&tersor::lts::backward));
}

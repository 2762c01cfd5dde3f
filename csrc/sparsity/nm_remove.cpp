// Removal of the lowest scores of every group, on the CPU (specification: pyops/sparsity/nm_remove.py).

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "sparsity/nm_groups.h"

namespace tersor::sparsity {
namespace {

constexpr double DEAD = -1000;

// One group's scores; false if one is NaN. `order` is scratch for as many indices.
template <class A>
bool remove(A* scores, int count, int k, int* order) {
  int zeros = 0;
  A least = 0;
  bool number = true;
  for (int j = 0; j < count; ++j) {
    zeros += scores[j] == 0, least = std::min(least, scores[j]), number = number && scores[j] == scores[j];
  }
  if (!number) return false;
  if (zeros == k && least > A(DEAD)) return true;  // the usual case: the zeros are the k smallest, and stay
  for (int j = 0; j < count; ++j) scores[j] = scores[j] == 0 ? A(DEAD) : scores[j], order[j] = j;
  const auto lower = [scores](int a, int b) { return scores[a] < scores[b] || (scores[a] == scores[b] && a < b); };
  std::nth_element(order, order + k, order + count, lower);
  for (int i = 0; i < k; ++i) scores[order[i]] = 0;
  return true;
}

template <class A>
bool remove_all(Tensor& scores, int k, int m, Numbers& of, Tensor& mask) {
  A* data = static_cast<A*>(scores.mutable_data_ptr());
  uint8_t* bits = static_cast<uint8_t*>(mask.mutable_data_ptr());
  const Stored& stored = of.stored;
  const int count = stored.count;
  std::atomic<bool> numbers{true};
  for_groups(scores.size(0), [&](int64_t first, int64_t end) {
    std::vector<int> order(static_cast<size_t>(count) + 1);
    std::vector<uint16_t> rows(stored.patterns, stored.patterns + count);
    BitWriter writer(bits, first * m);
    for (int64_t g = first; g < end; ++g) {
      A* own = data + g * count;
      if (!remove(own, count, k, order.data())) numbers = false;
      if (!stored.all() && !stored.read(g, rows.data())) of.invalid = true;
      uint32_t kept = 0;
      for (int j = 0; j < count; ++j) kept |= own[j] != 0 ? rows[j] : 0u;
      writer.put(kept, m);
    }
  });
  return numbers;
}

Tensor nm_remove(Tensor scores, int64_t k, int64_t n, int64_t m, const std::optional<Tensor>& combinations) {
  check_pattern(n, m);
  const Patterns patterns(static_cast<int>(n), static_cast<int>(m));
  Numbers of(combinations, scores, patterns);
  STD_TORCH_CHECK(scores.is_contiguous(), "scores must be contiguous");
  STD_TORCH_CHECK(k >= 0 && k < of.stored.count, "k must be less than the number of scores of a group");
  Tensor mask = torch::stable::new_empty(scores, {(scores.size(0) * m + 7) / 8}, ScalarType::Byte);
  const int kept = static_cast<int>(k), width = static_cast<int>(m);
  bool numbers = true;
  if (scores.scalar_type() == ScalarType::Float) numbers = remove_all<float>(scores, kept, width, of, mask);
  else if (scores.scalar_type() == ScalarType::Double) numbers = remove_all<double>(scores, kept, width, of, mask);
  else STD_TORCH_CHECK(false, "scores must be float32 or float64");
  STD_TORCH_CHECK(numbers, "nm_remove_: scores must not be NaN");
  of.check();
  return mask;
}

}  // namespace
}  // namespace tersor::sparsity

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("nm_remove", TORCH_BOX(&tersor::sparsity::nm_remove));
}

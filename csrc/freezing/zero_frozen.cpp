// A gradient without what belongs to frozen weights, on the CPU (specification: pyops/freezing/zero_frozen.py).

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "freezing/frozen_bits.h"

namespace tersor::freezing {
namespace {

using torch::stable::Tensor;

template <class Word>
void zero(const Word* from, Word* to, const uint8_t* frozen, int64_t elements, int64_t first, int64_t end) {
  for (int64_t group = first; group < end; group += GROUP) {
    const int64_t count = std::min(end - group, GROUP);
    uint64_t word = load_bits(frozen, group, elements);
    if (word == ~uint64_t(0)) {
      std::fill(to + group, to + group + count, Word(0));
      continue;
    }
    std::memcpy(to + group, from + group, static_cast<size_t>(count) * sizeof(Word));
    for (; word != 0; word &= word - 1) {
      const int64_t i = __builtin_ctzll(word);
      if (i < count) to[group + i] = 0;
    }
  }
}

Tensor zero_frozen(const Tensor& given, const Tensor& frozen) {
  const Tensor input = torch::stable::contiguous(given), mask = torch::stable::contiguous(frozen);
  const int64_t elements = input.numel();
  STD_TORCH_CHECK(input.is_cpu(), "input must be a CPU tensor");
  check_bits(mask, elements);
  Tensor output = torch::stable::new_empty(input, input.sizes());
  const uint8_t* bits = static_cast<const uint8_t*>(mask.const_data_ptr());
  const auto run = [&](auto word) {
    using Word = decltype(word);
    const Word* from = static_cast<const Word*>(input.const_data_ptr());
    Word* to = static_cast<Word*>(output.mutable_data_ptr());
    for_blocks(elements, [&](int64_t, int64_t first, int64_t end) { zero(from, to, bits, elements, first, end); });
  };
  const auto size = input.element_size();
  STD_TORCH_CHECK(size == 2 || size == 4 || size == 8, "input must be float16, bfloat16, float32 or float64");
  if (size == 2) run(uint16_t{});
  if (size == 4) run(uint32_t{});
  if (size == 8) run(uint64_t{});
  return output;
}

}  // namespace
}  // namespace tersor::freezing

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("zero_frozen", TORCH_BOX(&tersor::freezing::zero_frozen));
}

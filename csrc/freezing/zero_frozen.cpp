// A gradient without what belongs to frozen weights, on the CPU (specification: pyops/freezing/zero_frozen.py).

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "freezing/frozen_bits.h"

namespace tersor::freezing {
namespace {

using torch::stable::Tensor;

// For every byte of a mask eight words, all ones where a bit is 0.
template <class Word>
struct Free {
  alignas(64) Word of[256][8];

  Free() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int bit = 0; bit < 8; ++bit) of[byte][bit] = byte >> bit & 1 ? Word(0) : static_cast<Word>(~Word(0));
    }
  }
};

template <class Word>
void zero(const Word* from, Word* to, const uint8_t* frozen, int64_t elements, int64_t first, int64_t end) {
  static const Free<Word> free;
  for (int64_t group = first; group < end; group += GROUP) {
    const int64_t count = std::min(end - group, GROUP);
    const uint64_t word = load_bits(frozen, group, elements);
    if (word == ~uint64_t(0)) {
      std::fill(to + group, to + group + count, Word(0));
    } else if (word == 0) {
      std::memcpy(to + group, from + group, static_cast<size_t>(count) * sizeof(Word));
    } else {
      for (int64_t i = 0; i < count; i += 8) {
        const Word* keep = free.of[word >> i & 0xff];
        const Word* in = from + group + i;
        Word* out = to + group + i;
        if (count - i >= 8) {
          for (int j = 0; j < 8; ++j) out[j] = in[j] & keep[j];
        } else {
          for (int64_t j = 0; j < count - i; ++j) out[j] = in[j] & keep[j];
        }
      }
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

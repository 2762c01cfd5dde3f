// Packed masks of frozen weights: element i lies in byte i / 8 at bit i % 8.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstring>

namespace tersor::freezing {

constexpr int64_t GROUP = 64;      // elements of one word of bits
constexpr int64_t BLOCK = 16384;   // elements of one partial sum: the sums' bits depend on it, not on the threads

// The bits of the group that starts at `first`, a multiple of GROUP; zero beyond `elements`.
inline uint64_t load_bits(const uint8_t* bits, int64_t first, int64_t elements) {
  uint64_t word = 0;
  const int64_t left = elements - first;
  if (left >= GROUP) std::memcpy(&word, bits + first / 8, 8);
  else std::memcpy(&word, bits + first / 8, static_cast<size_t>((left + 7) / 8));
  return word;
}

inline void store_bits(uint8_t* bits, int64_t first, int64_t elements, uint64_t word) {
  const int64_t left = elements - first;
  std::memcpy(bits + first / 8, &word, static_cast<size_t>(left >= GROUP ? 8 : (left + 7) / 8));
}

inline bool is_frozen(const uint8_t* bits, int64_t element) { return bits[element / 8] >> element % 8 & 1; }

inline void check_bits(const torch::stable::Tensor& frozen, int64_t elements) {
  STD_TORCH_CHECK(frozen.is_cpu() && frozen.scalar_type() == torch::headeronly::ScalarType::Byte &&
                      frozen.is_contiguous() && frozen.numel() == (elements + 7) / 8,
                  "frozen must be a contiguous uint8 CPU tensor of one bit per element");
}

// Checks a tensor that goes with the parameter: same number of elements, contiguous, of that dtype.
inline void check_beside(const torch::stable::Tensor& t, int64_t elements, torch::headeronly::ScalarType dtype,
                         const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.is_contiguous() && t.numel() == elements, name,
                  " must be a contiguous CPU tensor with the elements of the weight and the right dtype");
}

template <class F>
void for_blocks(int64_t elements, const F& body) {
  const int64_t blocks = (elements + BLOCK - 1) / BLOCK;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) body(b, b * BLOCK, std::min(elements, (b + 1) * BLOCK));
  });
}

}  // namespace tersor::freezing

// A packed N:M matrix with its zeros again, on the CPU (specification: pyops/sparsity/nm_unpack.py).

#include <torch/csrc/stable/library.h>

#include "sparsity/nm_places.h"

namespace tersor::nm_product {
namespace {

constexpr int64_t GRAIN = 32768;  // elements that are worth a thread

template <class Word>
void unpack_row(const Places& places, const Word* values, const uint8_t* index, int64_t bytes, int64_t kept,
                int64_t size, Word* to) {
  std::memset(to, 0, size * sizeof(Word));
  const int64_t step = places.wide ? 8 : places.elements;
  for (int64_t i = 0, taken = 0; i < bytes; ++i) {
    // The two bytes of a wide mask belong to one group.
    const int64_t start = places.wide ? i / 2 * places.elements + i % 2 * 8 : i * step;
    for (int j = 0; j < places.count[index[i]] && taken < kept; ++j, ++taken) {
      const int64_t at = start + places.place[index[i]][j];
      if (at < size) to[at] = values[taken];
    }
  }
}

template <class Word>
void run(const Places& places, const Tensor& values, const Tensor& index, int64_t size, Tensor& output) {
  const int64_t kept = values.size(1) * values.size(2), bytes = index.size(1);
  const Word* const from = static_cast<const Word*>(values.const_data_ptr());
  const uint8_t* const packed = static_cast<const uint8_t*>(index.const_data_ptr());
  Word* const to = static_cast<Word*>(output.mutable_data_ptr());
  torch::stable::parallel_for(0, values.size(0), std::max<int64_t>(1, GRAIN / size), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      unpack_row(places, from + o * kept, packed + o * bytes, bytes, kept, size, to + o * size);
    }
  });
}

Tensor unpack(const Tensor& given_values, const Tensor& given_index, int64_t n, int64_t m) {
  const Tensor values = torch::stable::contiguous(given_values), index = torch::stable::contiguous(given_index);
  STD_TORCH_CHECK(n >= 1 && n < m && m <= 16, "n and m must satisfy 1 <= n < m <= 16");
  STD_TORCH_CHECK(values.is_cpu() && values.dim() == 3 && values.size(2) == n, "values must be (O, K / m, n) on the CPU");
  STD_TORCH_CHECK(index.is_cpu() && index.scalar_type() == ScalarType::Byte && index.dim() == 2 &&
                      index.size(0) == values.size(0) && index.size(1) == (values.size(1) * index_bits(n, m) + 7) / 8,
                  "index must be uint8, a row of bytes for each row of values");
  const int64_t size = values.size(1) * m;
  Tensor output = torch::stable::new_empty(values, {values.size(0), size}, values.scalar_type());
  if (output.numel() == 0) return output;
  const Places& places = *places_of(n, m);
  switch (values.element_size()) {
    case 2: run<uint16_t>(places, values, index, size, output); break;
    case 4: run<uint32_t>(places, values, index, size, output); break;
    case 8: run<uint64_t>(places, values, index, size, output); break;
    default: STD_TORCH_CHECK(false, "values must be float16, bfloat16, float32 or float64");
  }
  return output;
}

}  // namespace
}  // namespace tersor::nm_product

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("nm_unpack", TORCH_BOX(&tersor::nm_product::unpack));
}

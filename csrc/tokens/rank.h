// Stable ranking of each image's scores: what the host does around rank_kernels.h.
#pragma once

#include "tokens/rows.h"

namespace tersor::tokens {

constexpr int64_t MOST_COUNTED = 512;  // more than so many are sorted: counting takes count * count steps

// From the highest key to the lowest, equal ones by index.
template <class Key>
void sort_keys(const Key* keys, int64_t count, int64_t* order) {
  std::iota(order, order + count, int64_t(0));
  std::sort(order, order + count, [keys](int64_t a, int64_t b) {
    return keys[a] > keys[b] || (keys[a] == keys[b] && a < b);
  });
}

// One level's kernel: rows [begin, end) of (rows, count) scores; `scratch` is bytes_to_rank(count) long.
using RankRows = void (*)(const void* scores, int64_t count, int64_t begin, int64_t end, int64_t* order, char* scratch);

inline int64_t bytes_to_rank(int64_t count) { return 2 * 8 * (count + 64); }

inline void rank_all(RankRows rank, const Tensor& scores, int64_t* order) {
  const int64_t count = scores.size(1);
  const int64_t steps = count > MOST_COUNTED ? 64 * count : count * count / 4;
  torch::stable::parallel_for(0, scores.size(0), grain_for(steps), [&](int64_t begin, int64_t end) {
    const Memory scratch = allocate(bytes_to_rank(count));
    rank(scores.const_data_ptr(), count, begin, end, order, scratch.get());
  });
}

}  // namespace tersor::tokens

// The level's kernel for the dtype of `scores`; a macro, since the levels' namespaces are the including file's.
#define TERSOR_RANK_ROWS(scores)                                                                \
  ((scores).scalar_type() == ScalarType::Float      ? TERSOR_FOR_ISA(rank_rows<float>)          \
   : (scores).scalar_type() == ScalarType::Half     ? TERSOR_FOR_ISA(rank_rows<Half>)           \
   : (scores).scalar_type() == ScalarType::BFloat16 ? TERSOR_FOR_ISA(rank_rows<BFloat16>)       \
                                                    : TERSOR_FOR_ISA(rank_rows<double>))

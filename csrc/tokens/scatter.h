// The adjoint of copying rows by index: copies are added up where they came from, in ascending order.
#pragma once

#include "tokens/rows.h"

namespace tersor::tokens {

// For each source the chain of its copies, ascending; so that one thread can finish a source without any other.
struct Chains {
  std::vector<int64_t> first, next;  // -1 ends a chain

  // place(j) is the source of copy j; outside of 0 .. sources - 1 it has none.
  template <class Place>
  Chains(int64_t sources, int64_t copies, Place place) : first(sources, -1), next(copies, -1) {
    for (int64_t j = copies; j-- > 0;) {
      const int64_t source = place(j);
      if (source < 0 || source >= sources) continue;
      next[j] = first[source], first[source] = j;
    }
  }
};

// Elements `step` apart become the sum of the chain's rows, which `row(copy)` finds; of one copy its very bits.
template <class T, class Row>
void add_chain(const Chains& chains, int64_t source, Row row, int64_t elements, T* to, int64_t step = 1) {
  const int64_t copy = chains.first[source];
  if (copy < 0) {
    for (int64_t i = 0; i < elements; ++i) to[i * step] = T(0);
    return;
  }
  if (chains.next[copy] < 0) {
    const T* from = row(copy);
    for (int64_t i = 0; i < elements; ++i) to[i * step] = from[i];
    return;
  }
  for (int64_t i = 0; i < elements; ++i) {
    Accumulated<T> sum = 0;
    for (int64_t j = copy; j >= 0; j = chains.next[j]) sum += static_cast<Accumulated<T>>(row(j)[i]);
    to[i * step] = static_cast<T>(sum);
  }
}

}  // namespace tersor::tokens

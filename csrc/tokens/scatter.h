// The adjoint of copying rows by index: copies are added up where they came from, in ascending order.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

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
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
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
    A sum = 0;
    for (int64_t j = copy; j >= 0; j = chains.next[j]) sum += static_cast<A>(row(j)[i]);
    to[i * step] = static_cast<T>(sum);
  }
}

// Calls run(T{}) with the C++ type of the tensor's elements.
template <class Run>
void with_type(const Tensor& t, Run run) {
  if (t.scalar_type() == ScalarType::Float) run(float{});
  if (t.scalar_type() == ScalarType::Double) run(double{});
  if (t.scalar_type() == ScalarType::Half) run(torch::headeronly::Half{});
  if (t.scalar_type() == ScalarType::BFloat16) run(torch::headeronly::BFloat16{});
}

}  // namespace tersor::tokens

// Order statistics of a tensor on the CPU, as pyops/quantization/percentile_bounds.py defines them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace tersor::percentile {

// Floats as integers of the same order; NaN is dealt with before.
inline uint32_t ordered(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

inline double linear(double a, double b, double t) {  // numpy rounds it this way
  return t < 0.5 ? a + (b - a) * t : b - (b - a) * (1 - t);
}

// The elements that fall into the same of 4096 bins as the element of that rank, and the rank among them: one pass
// to count and one to collect for each percentile, instead of a sort.
template <class A>
struct Bin {
  std::vector<A> elements;
  int64_t rank;

  A at(int64_t offset) {
    std::nth_element(elements.begin(), elements.begin() + rank + offset, elements.end());
    return elements[rank + offset];
  }
};

// Lower and upper percentile; false if an element is NaN.
template <class A, class Read>
bool bounds(int64_t count, const Read& read, double percentile, A result[2]) {
  constexpr int SHIFT = 20;
  std::vector<int64_t> bins(1 << (32 - SHIFT), 0);
  for (int64_t i = 0; i < count; ++i) {
    const A value = read(i);
    if (value != value) return false;
    ++bins[ordered(static_cast<float>(value)) >> SHIFT];
  }
  for (int side = 0; side < 2; ++side) {
    const double percent = side ? percentile : 100 - percentile;
    const double place = static_cast<double>(count - 1) * percent / 100;
    const int64_t before = static_cast<int64_t>(place), after = std::min(before + 1, count - 1);
    int64_t start = 0;
    uint32_t first = 0;
    while (start + bins[first] <= before) start += bins[first++];
    uint32_t last = first;
    for (int64_t end = start + bins[first]; end <= after;) end += bins[++last];
    Bin<A> bin{{}, before - start};
    for (int64_t i = 0; i < count; ++i) {
      const A value = read(i);
      const uint32_t place_of = ordered(static_cast<float>(value)) >> SHIFT;
      if (first <= place_of && place_of <= last) bin.elements.push_back(value);
    }
    const double a = static_cast<double>(bin.at(0));
    const double b = static_cast<double>(bin.at(after - before));
    result[side] = static_cast<A>(linear(a, b, place - static_cast<double>(before)));
  }
  return true;
}

}  // namespace tersor::percentile

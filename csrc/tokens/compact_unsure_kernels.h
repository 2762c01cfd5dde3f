// The confidences of compact_unsure.cpp, compiled once per instruction set (foreach_isa.h includes this file).

namespace tersor::tokens {
namespace TERSOR_ISA {
using namespace ::tersor::TERSOR_ISA;

// Consecutive logits as floats; beyond `count` lanes are -infinity.
template <class T>
TERSOR_INLINE Vec<float> load_logits(const T* p, int64_t count) {
  constexpr int lanes = Simd<float>::lanes;
  Vec<float> v = splat(-__builtin_inff());
  if constexpr (std::is_same_v<T, double>) {
    for (int i = 0; i < lanes && i < count; ++i) v[i] = static_cast<float>(p[i]);
    return v;
  } else {
    if (count >= lanes) return widen(p);
    for (int i = 0; i < count; ++i) v[i] = static_cast<float>(p[i]);
    return v;
  }
}

// The highest probability of a softmax is 1 / sum exp(x - max); NaN is not sure.
template <class T>
static void find_unsure(const T* logits, int64_t classes, float threshold, int64_t begin, int64_t end,
                        uint8_t* unsure) {
  constexpr int lanes = Simd<float>::lanes;
  for (int64_t b = begin; b < end; ++b) {
    const T* row = logits + b * classes;
    Vec<float> most = splat(-__builtin_inff());
    for (int64_t i = 0; i < classes; i += lanes) most = max<float>(load_logits(row + i, classes - i), most);
    float highest = most[0];
    for (int i = 1; i < lanes; ++i) highest = most[i] > highest ? most[i] : highest;
    Vec<float> sum{};
    for (int64_t i = 0; i < classes; i += lanes) {
      const Vec<float> power = exp(load_logits(row + i, classes - i) - highest);
      sum += keep_first<float>(power, static_cast<int>(std::min<int64_t>(lanes, classes - i)));
    }
    unsure[b] = !(1.0f / total(sum) >= threshold);
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::tokens

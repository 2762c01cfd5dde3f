#ifdef TERSOR_ISA

namespace tersor::binary {
namespace TERSOR_ISA {

using namespace tersor::TERSOR_ISA;

template <class A>
TERSOR_INLINE Vec<A> magnitude_of(Vec<A> x) {
  return x < 0 ? -x : x;
}

// -1, 0 or 1; 0 for NaN.
template <class A>
TERSOR_INLINE Vec<A> sign_of(Vec<A> x) {
#if TERSOR_ISA_LEVEL == 2
  if constexpr (sizeof(A) == 4) {  // 1 with the sign of x, where x is not 0
    const __mmask16 any = _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_NEQ_OQ);
    const __m512i sign = _mm512_set1_epi32(INT32_MIN), one = _mm512_set1_epi32(0x3f800000);
    return (Vec<A>)_mm512_maskz_ternarylogic_epi32(any, (__m512i)x, sign, one, 0xea);
  }
#endif
  const Vec<A> below = x < 0 ? splat(A(-1)) : Vec<A>{};
  return x > 0 ? splat(A(1)) : below;
}

// A bit for each lane: whether |x| is at most t.
template <class A>
TERSOR_INLINE uint32_t lies_within(Vec<A> x, A t) {
#if TERSOR_ISA_LEVEL == 2
  if constexpr (sizeof(A) == 4) return _mm512_cmp_ps_mask(_mm512_abs_ps((__m512)x), _mm512_set1_ps(t), _CMP_LE_OQ);
#endif
  return to_bits<A>(magnitude_of<A>(x) <= t);
}

// v where the lane's bit is set, else 0.
template <class A>
TERSOR_INLINE Vec<A> keep_set(Vec<A> v, uint32_t bits) {
#if TERSOR_ISA_LEVEL == 2
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)v);
#endif
  return from_bits<A>(bits) != 0 ? v : Vec<A>{};
}

// Signs of elements [first, end), and whether each lies within t.
template <class T, class A, bool INSIDE>
TERSOR_INLINE void sign_elements(const Sign& task, int64_t first, int64_t end) {
  constexpr int lanes = Simd<A>::lanes;
  const T* const input = static_cast<const T*>(task.input);
  T* const output = static_cast<T*>(task.output);
  const A t = static_cast<A>(task.t);
  int64_t i = first;
  for (; i + lanes <= end; i += lanes) {
    const Vec<A> x = widen(input + i);
    narrow(output + i, sign_of<A>(x));
    if constexpr (INSIDE) {
      const uint32_t bits = lies_within<A>(x, t);
      if constexpr (lanes >= 8) {
        std::memcpy(task.inside + i / 8, &bits, lanes / 8);
      } else {
        uint8_t& byte = task.inside[i / 8];
        byte = static_cast<uint8_t>((i % 8 == 0 ? 0u : byte) | bits << i % 8);
      }
    }
  }
  if (i == end) return;
  const int count = static_cast<int>(end - i);
  const Vec<A> x = widen_first(input + i, count);
  narrow_first(output + i, sign_of<A>(x), count);
  if constexpr (INSIDE) {
    const uint32_t bits = lies_within<A>(x, t) & ((1u << count) - 1);
    for (int b = 0; b < count; b += 8) {
      uint8_t& byte = task.inside[(i + b) / 8];
      byte = static_cast<uint8_t>((i % 8 == 0 ? 0u : byte) | bits >> b << i % 8);
    }
  }
}

template <class T, class A>
static void sign_range(const Sign& task, int64_t first, int64_t end) {
  if (task.inside != nullptr) sign_elements<T, A, true>(task, first, end);
  else sign_elements<T, A, false>(task, first, end);
}

template <class T>
static void clear_range(const Sign& task, int64_t first, int64_t end) {
  T* const output = static_cast<T*>(task.output);
  for (int64_t i = first; i < end; ++i) output[i] = static_cast<T>(0.0f);
}

// Of one chunk, in the type of the sums; squares are of distances, so that a large mean takes nothing from them.
template <class T, class A>
static Moments moments_of(const Sign& task, int64_t first, int64_t end) {
  constexpr int lanes = Simd<A>::lanes;
  const T* const input = static_cast<const T*>(task.input);
  const auto count = static_cast<double>(end - first);
  Vec<A> sum{};
  for (int64_t i = first; i < end; i += lanes) {
    sum += load_as<A>(input + i, static_cast<int>(std::min<int64_t>(lanes, end - i)));
  }
  const A mean = static_cast<A>(static_cast<double>(total(sum)) / count);
  Vec<A> squares{}, rest{};
  for (int64_t i = first; i < end; i += lanes) {
    const int own = static_cast<int>(std::min<int64_t>(lanes, end - i));
    const Vec<A> distance = keep_first<A>(load_as<A>(input + i, own) - mean, own);
    squares += distance * distance, rest += distance;
  }
  // What is left of the sum corrects the mean, which was rounded.
  const double left = static_cast<double>(total(rest));
  return {count, static_cast<double>(mean) + left / count, static_cast<double>(total(squares)) - left * left / count};
}

// The estimator's slope at |x|.
template <class A, Rule RULE>
TERSOR_INLINE Vec<A> slope_of(const Sign& task, Vec<A> magnitude) {
  if constexpr (RULE == Rule::ste) {
    return magnitude <= static_cast<A>(task.t) ? splat(A(1)) : Vec<A>{};
  } else if constexpr (RULE == Rule::approx) {
    return magnitude >= 1 ? Vec<A>{} : A(2) - A(2) * magnitude;
  } else {
    const Vec<A> chord = splat(static_cast<A>(task.chord));
    const Vec<A> curve = exp(static_cast<A>(task.power) * log(magnitude)) * static_cast<A>(task.factor);
    const Vec<A> far = magnitude <= static_cast<A>(task.t) ? curve : Vec<A>{};
    return magnitude <= static_cast<A>(task.interval) ? chord : far;
  }
}

template <class T, class A, Rule RULE>
static void gradient_range(const Sign& task, const Sample& sample, int64_t first, int64_t end) {
  constexpr int lanes = Simd<A>::lanes;
  const T *const grad = static_cast<const T*>(task.grad_output), *const input = static_cast<const T*>(task.input);
  T* const output = static_cast<T*>(task.output);
  const A rstd = static_cast<A>(sample.rstd), mean = static_cast<A>(sample.mean), pull = static_cast<A>(sample.pull);
  const bool scaled = sample.rstd != 1 || sample.pull != 0;
  for (int64_t i = first; i < end; i += lanes) {
    const int count = static_cast<int>(std::min<int64_t>(lanes, end - i));
    const Vec<A> x = load_as<A>(input + i, count), g = load_as<A>(grad + i, count);
    if (scaled) {
      const Vec<A> slope = g * slope_of<A, RULE>(task, magnitude_of<A>(x * rstd));
      store_as<A>(output + i, slope * rstd - (x - mean) * pull, count);
    } else {
      store_as<A>(output + i, g * slope_of<A, RULE>(task, magnitude_of<A>(x)), count);
    }
  }
}

// The sum of slope times x over a chunk.
template <class T, class A, Rule RULE>
static double along_range(const Sign& task, double sample_rstd, int64_t first, int64_t end) {
  constexpr int lanes = Simd<A>::lanes;
  const T *const grad = static_cast<const T*>(task.grad_output), *const input = static_cast<const T*>(task.input);
  const A rstd = static_cast<A>(sample_rstd);
  Vec<A> sum{};
  for (int64_t i = first; i < end; i += lanes) {
    const int count = static_cast<int>(std::min<int64_t>(lanes, end - i));
    const Vec<A> x = load_as<A>(input + i, count), g = load_as<A>(grad + i, count);
    sum += keep_first<A>(g * slope_of<A, RULE>(task, magnitude_of<A>(x * rstd)) * x, count);
  }
  return static_cast<double>(total(sum));
}

// From the bits alone.
template <class T, class A>
static void masked_range(const Sign& task, int64_t first, int64_t end) {
  constexpr int lanes = Simd<A>::lanes;
  const T* const grad = static_cast<const T*>(task.grad_output);
  T* const output = static_cast<T*>(task.output);
  const auto bits_at = [&](int64_t i, int count) {
    uint32_t bits = task.given_inside[i / 8];
    if constexpr (lanes > 8) bits |= count > 8 ? static_cast<uint32_t>(task.given_inside[i / 8 + 1]) << 8 : 0;
    if constexpr (lanes < 8) bits >>= i % 8;
    return bits & ((1u << lanes) - 1);
  };
  int64_t i = first;
  for (; i + lanes <= end; i += lanes) narrow(output + i, keep_set<A>(widen(grad + i), bits_at(i, lanes)));
  if (i == end) return;
  const int count = static_cast<int>(end - i);
  narrow_first(output + i, keep_set<A>(widen_first(grad + i, count), bits_at(i, count)), count);
}

template <class T>
static SignKernels sign_kernels(Rule rule) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  SignKernels kernels{sign_range<T, A>, clear_range<T>, moments_of<T, A>, masked_range<T, A>,
                      gradient_range<T, A, Rule::ste>, along_range<T, A, Rule::ste>};
  if (rule == Rule::approx) {
    kernels.gradient = gradient_range<T, A, Rule::approx>, kernels.along = along_range<T, A, Rule::approx>;
  } else if (rule == Rule::reste) {
    kernels.gradient = gradient_range<T, A, Rule::reste>, kernels.along = along_range<T, A, Rule::reste>;
  }
  return kernels;
}

}  // namespace TERSOR_ISA
}  // namespace tersor::binary

#endif

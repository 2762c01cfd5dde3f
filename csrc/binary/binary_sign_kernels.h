#ifdef TERSOR_ISA

namespace tersor::binary {
namespace TERSOR_ISA {

using namespace tersor::TERSOR_ISA;

template <class A>
TERSOR_INLINE Vec<A> magnitude_of(Vec<A> x) {
  return x < 0 ? -x : x;
}

// Signs of elements [first, end), and whether each lies within t.
template <class T, class A>
static void sign_range(const Sign& task, int64_t first, int64_t end) {
  constexpr int lanes = Simd<A>::lanes;
  const T* const input = static_cast<const T*>(task.input);
  T* const output = static_cast<T*>(task.output);
  const A t = static_cast<A>(task.t);
  for (int64_t i = first; i < end; i += lanes) {
    const int count = static_cast<int>(std::min<int64_t>(lanes, end - i));
    const Vec<A> x = load_as<A>(input + i, count);
    const Vec<A> ones = x < 0 ? splat(A(-1)) : Vec<A>{};
    store_as<A>(output + i, x > 0 ? splat(A(1)) : ones, count);
    if (task.inside != nullptr) {
      uint32_t bits = to_bits<A>(magnitude_of<A>(x) <= t);
      if (count < lanes) bits &= (1u << count) - 1;
      if constexpr (lanes >= 8) {
        const auto pair = static_cast<uint16_t>(bits);
        std::memcpy(task.inside + i / 8, &pair, count > 8 ? 2 : 1);
      } else {
        uint8_t& byte = task.inside[i / 8];
        byte = static_cast<uint8_t>((i % 8 == 0 ? 0u : byte) | bits << i % 8);
      }
    }
  }
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
  for (int64_t i = first; i < end; i += lanes) {
    const int count = static_cast<int>(std::min<int64_t>(lanes, end - i));
    uint32_t bits = task.given_inside[i / 8];
    if constexpr (lanes > 8) bits |= count > 8 ? static_cast<uint32_t>(task.given_inside[i / 8 + 1]) << 8 : 0;
    if constexpr (lanes < 8) bits >>= i % 8;
    const auto inside = from_bits<A>(bits & ((1u << lanes) - 1)) != 0;
    store_as<A>(output + i, inside ? load_as<A>(grad + i, count) : Vec<A>{}, count);
  }
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

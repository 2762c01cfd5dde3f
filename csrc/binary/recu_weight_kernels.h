#ifdef TERSOR_ISA

namespace tersor::binary {
namespace TERSOR_ISA {

using namespace tersor::TERSOR_ISA;

constexpr int64_t RUN = 1024;  // weights that are summed up in single precision

// The sum over a filter of what body(i, count) gives for `count` weights from i on.
template <class A, int N, class F>
TERSOR_INLINE void sum_filter(int64_t size, double sums[N], const F& body) {
  constexpr int lanes = Simd<A>::lanes;
  for (int64_t first = 0; first < size; first += RUN) {
    Vec<A> own[N] = {};
    for (int64_t i = first; i < std::min(size, first + RUN); i += lanes) {
      body(i, static_cast<int>(std::min<int64_t>(lanes, size - i)), own);
    }
    for (int n = 0; n < N; ++n) sums[n] += static_cast<double>(total(own[n]));
  }
}

template <class T>
static void filter_signs(const Filters& task, int64_t begin, int64_t end) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  for (int64_t o = begin; o < end; ++o) {
    const T* const weight = static_cast<const T*>(task.weight) + o * task.size;
    T* const output = static_cast<T*>(task.output) + o * task.size;
    const auto count = static_cast<double>(task.size);
    double sum[1] = {}, sums[2] = {};
    sum_filter<A, 1>(task.size, sum, [&](int64_t i, int own, Vec<A>* to) { to[0] += load_as<A>(weight + i, own); });
    const A mean = static_cast<A>(sum[0] / count);
    sum_filter<A, 2>(task.size, sums, [&](int64_t i, int own, Vec<A>* to) {
      const Vec<A> x = keep_first<A>(load_as<A>(weight + i, own) - mean, own);
      to[0] += x * x, to[1] += x < 0 ? -x : x;
      const Vec<A> below = x < 0 ? splat(A(-1)) : Vec<A>{};
      store_as<A>(output + i, x > 0 ? splat(A(1)) : below, own);
    });
    const A rstd = static_cast<A>(1 / __builtin_sqrt(sums[0] / (count - 1) + WEIGHT_EPS));
    static_cast<A*>(task.statistics)[2 * o] = mean, static_cast<A*>(task.statistics)[2 * o + 1] = rstd;
    task.magnitudes[o] = LAPLACE_SCALE * static_cast<double>(rstd) * sums[1];
  }
}

template <class T>
static void filter_gradients(const Filters& task, int64_t begin, int64_t end) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  for (int64_t o = begin; o < end; ++o) {
    const T* const weight = static_cast<const T*>(task.weight) + o * task.size;
    const T* const grad = static_cast<const T*>(task.grad_output) + o * task.size;
    T* const output = static_cast<T*>(task.output) + o * task.size;
    const A* const kept = static_cast<const A*>(task.statistics) + 2 * o;
    const A mean = kept[0], rstd = kept[1];
    const A scale = static_cast<A>(LAPLACE_SCALE), bound = static_cast<A>(task.bound);
    // Gradients of clamped weights are left out.
    const auto passed = [&](Vec<A> x, Vec<A> g) {
      const Vec<A> size = scale * (x < 0 ? -x : x) * rstd;
      return size <= bound ? g : Vec<A>{};
    };
    double sums[3] = {};
    sum_filter<A, 3>(task.size, sums, [&](int64_t i, int own, Vec<A>* to) {
      const Vec<A> x = keep_first<A>(load_as<A>(weight + i, own) - mean, own), g = passed(x, load_as<A>(grad + i, own));
      to[0] += g * x, to[1] += keep_first<A>(g, own), to[2] += x;
    });
    const auto count = static_cast<double>(task.size);
    const double along = sums[0] * rstd * rstd / (count - 1), middle = (sums[1] - along * sums[2]) / count;
    const A pull = static_cast<A>(along), shift = static_cast<A>(middle), factor = scale * rstd;
    constexpr int lanes = Simd<A>::lanes;
    for (int64_t i = 0; i < task.size; i += lanes) {
      const int own = static_cast<int>(std::min<int64_t>(lanes, task.size - i));
      const Vec<A> x = load_as<A>(weight + i, own) - mean, g = passed(x, load_as<A>(grad + i, own));
      store_as<A>(output + i, factor * (g - x * pull - shift), own);
    }
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::binary

#endif

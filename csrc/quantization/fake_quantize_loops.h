// Loops of the fake-quantisers over memory, for any rule; part of a body that is compiled once per instruction set.
//
// A rule has the numbers INPUTS, PARAMETERS, CONSTANTS and SUMS and the functions
//   prepare(parameters, options, constants)            scalars, once per group
//   quantize(inputs, constants) -> output              vectors
//   differentiate(grad, inputs, constants, sums, grad_inputs)
//   finish(sums, constants, options, grad_parameters)  scalars, once per group
// Its arithmetic is bit-exact: no contraction, IEEE division (or what provably equals it, see divide below).

namespace tersor::fake_quantize {
namespace TERSOR_ISA {
using namespace tersor::TERSOR_ISA;

// a / b, correctly rounded. FAST: with r = 1 / b rounded, two Newton steps on the quotient; exact by Markstein's
// theorem (after the first the quotient is faithful) as long as nothing over- or underflows: the host checks b.
template <bool FAST, class A>
TERSOR_INLINE Vec<A> divide(Vec<A> a, Vec<A> b, Vec<A> r) {
  if constexpr (!FAST || TERSOR_ISA_LEVEL == 0) return a / b;
  Vec<A> q = a * r;
  q = fma<A>(fma<A>(-q, b, a), r, q);
  return fma<A>(fma<A>(-q, b, a), r, q);
}

// NaN in x stays: of two numbers that do not compare, the instructions give the second.
template <class A>
TERSOR_INLINE Vec<A> at_most(Vec<A> x, Vec<A> bound) {
#if TERSOR_ISA_LEVEL == 2
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm512_min_ps((__m512)bound, (__m512)x);
#elif TERSOR_ISA_LEVEL == 1
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm256_min_ps((__m256)bound, (__m256)x);
#endif
  return x > bound ? bound : x;
}
template <class A>
TERSOR_INLINE Vec<A> at_least(Vec<A> x, Vec<A> bound) {
#if TERSOR_ISA_LEVEL == 2
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm512_max_ps((__m512)bound, (__m512)x);
#elif TERSOR_ISA_LEVEL == 1
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm256_max_ps((__m256)bound, (__m256)x);
#endif
  return x < bound ? bound : x;
}

template <class R, class A>
struct Constants {
  Vec<A> of[R::CONSTANTS];
};

template <class R, class A>
TERSOR_INLINE Constants<R, A> constants_of_group(const Task& task, int64_t group) {
  const A* scalars = static_cast<const A*>(task.constants) + group * MOST_CONSTANTS;
  Constants<R, A> constants;
  for (int i = 0; i < R::CONSTANTS; ++i) constants.of[i] = splat(scalars[i]);
  return constants;
}

template <class R, class A>
TERSOR_INLINE Constants<R, A> constants_of_columns(const Task& task, int64_t column, int lanes) {
  const int64_t columns = task.groups * task.inner;
  Constants<R, A> constants;
  for (int i = 0; i < R::CONSTANTS; ++i) {
    constants.of[i] = load_first<A>(static_cast<const A*>(task.columns) + i * columns + column, lanes);
  }
  return constants;
}

template <class R, class T, class A>
TERSOR_INLINE void quantize_at(const Task& task, int64_t at, int lanes, const Constants<R, A>& constants) {
  Vec<A> x[R::INPUTS];
  for (int i = 0; i < R::INPUTS; ++i) x[i] = load_as<A>(static_cast<const T*>(task.input[i]) + at, lanes);
  store_as<A>(static_cast<T*>(task.output[0]) + at, R::quantize(x, constants.of), lanes);
}

// Lanes beyond `lanes` have a zero gradient, hence no part in the sums.
template <class R, class T, class A>
TERSOR_INLINE void differentiate_at(const Task& task, int64_t at, int lanes, const Constants<R, A>& constants,
                                    Vec<A>* sums) {
  Vec<A> x[R::INPUTS], grad[R::INPUTS];
  for (int i = 0; i < R::INPUTS; ++i) x[i] = load_as<A>(static_cast<const T*>(task.input[i]) + at, lanes);
  const Vec<A> g = load_as<A>(static_cast<const T*>(task.grad_output) + at, lanes);
  R::differentiate(g, x, constants.of, sums, grad);
  for (int i = 0; i < R::INPUTS; ++i) store_as<A>(static_cast<T*>(task.output[i]) + at, grad[i], lanes);
}

// One run of memory with the same parameters; backward, its sums are added to `total`.
template <class R, class T, class A>
static void quantize_run(const Task& task, int64_t group, int64_t begin, int64_t end) {
  constexpr int lanes = Simd<A>::lanes;
  const auto constants = constants_of_group<R, A>(task, group);
  int64_t at = begin;
  for (; at + lanes <= end; at += lanes) quantize_at<R, T, A>(task, at, lanes, constants);
  if (at < end) quantize_at<R, T, A>(task, at, static_cast<int>(end - at), constants);
}

template <class R, class T, class A>
static void differentiate_run(const Task& task, int64_t group, int64_t begin, int64_t end, double* total) {
  constexpr int lanes = Simd<A>::lanes;
  constexpr int64_t chunk = 256 * lanes;  // additions of one float sum
  const auto constants = constants_of_group<R, A>(task, group);
  for (int64_t at = begin; at < end;) {
    Vec<A> sums[R::SUMS] = {};
    const int64_t stop = std::min(end, at + chunk);
    for (; at + lanes <= stop; at += lanes) differentiate_at<R, T, A>(task, at, lanes, constants, sums);
    if (at < stop) differentiate_at<R, T, A>(task, at, static_cast<int>(stop - at), constants, sums), at = stop;
    for (int s = 0; s < R::SUMS; ++s) {
      for (int i = 0; i < lanes; ++i) total[s] += sums[s][i];
    }
  }
}

// Where inner is long: item i of `per_run` blocks per run. `partial` is [run][block][SUMS].
template <class R, class T, class A>
static void runs(const Task& task, int64_t first, int64_t last, int64_t per_run, double* partial) {
  for (int64_t i = first; i < last; ++i) {
    const int64_t run = i / per_run, block = i % per_run;
    const int64_t begin = run * task.inner + block * BLOCK, end = std::min((run + 1) * task.inner, begin + BLOCK);
    if (partial) differentiate_run<R, T, A>(task, run % task.groups, begin, end, partial + i * R::SUMS);
    else quantize_run<R, T, A>(task, run % task.groups, begin, end);
  }
}

// Where inner is short: a row is all groups, and every column has its constants in memory. `sums` is scratch of
// [SUMS][columns], `total` gets their sums, [SUMS][columns].
template <class R, class T, class A>
static void rows(const Task& task, int64_t first, int64_t last, A* sums, double* total) {
  constexpr int lanes = Simd<A>::lanes;
  const int64_t columns = task.groups * task.inner;
  for (int64_t c = 0; c < columns; c += lanes) {
    const int count = static_cast<int>(std::min<int64_t>(lanes, columns - c));
    const auto constants = constants_of_columns<R, A>(task, c, count);
    Vec<A> sum[R::SUMS] = {};
    for (int64_t row = first; row < last; ++row) {
      if (total) differentiate_at<R, T, A>(task, row * columns + c, count, constants, sum);
      else quantize_at<R, T, A>(task, row * columns + c, count, constants);
    }
    if (!total) continue;
    for (int s = 0; s < R::SUMS; ++s) store_first<A>(sums + s * columns + c, sum[s], count);
  }
  if (!total) return;
  for (int64_t i = 0; i < R::SUMS * columns; ++i) total[i] += sums[i];
}

template <class R, class A>
static void prepare(const A* parameters, const double* options, A* constants) {
  R::prepare(parameters, options, constants);
}

// Whether the shortcuts of a FAST rule are exact for these constants, where the rule has a test of its own.
template <class R, class A, class = void>
struct Verify {
  static bool exact(const A*) { return true; }
};
template <class R, class A>
struct Verify<R, A, std::void_t<decltype(&R::exact)>> {
  static bool exact(const A* constants) { return R::exact(constants); }
};

template <class R, class A>
static void finish(const double* sums, const A* constants, const double* options, double* gradients) {
  R::finish(sums, constants, options, gradients);
}

template <class R, class T, class A>
static Kernels<A> kernels_of() {
  return {&prepare<R, A>, &finish<R, A>, &Verify<R, A>::exact, &runs<R, T, A>, &rows<R, T, A>, R::CONSTANTS, R::SUMS};
}

// By whether divisions may go by reciprocals; float64 serves gradient checks, not speed.
template <template <class, bool> class R, class T, class A>
static Kernels<A> kernels_by_division(bool fast) {
  if constexpr (sizeof(A) == 4 && TERSOR_ISA_LEVEL > 0) {
    if (fast) return kernels_of<R<A, true>, T, A>();
  }
  return kernels_of<R<A, false>, T, A>();
}

}  // namespace TERSOR_ISA
}  // namespace tersor::fake_quantize

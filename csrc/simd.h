// Vectors of float or double for one instruction set. foreach_isa.h includes this file once per level, inside that
// level's target; everything is always_inline, so no symbol built for a higher level can be linked into a lower one.

namespace tersor {
namespace TERSOR_ISA {

#define TERSOR_INLINE static inline __attribute__((always_inline))

template <class A>
struct Simd {
  static constexpr int lanes = TERSOR_VECTOR_BYTES / sizeof(A);
  typedef A Vec __attribute__((vector_size(TERSOR_VECTOR_BYTES)));
  typedef A Loose __attribute__((vector_size(TERSOR_VECTOR_BYTES), aligned(sizeof(A)), may_alias));
  using Whole = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  typedef Whole Mask __attribute__((vector_size(TERSOR_VECTOR_BYTES)));
};
template <class A>
using Vec = typename Simd<A>::Vec;

template <class A>
TERSOR_INLINE Vec<A> load(const A* p) {
  return *reinterpret_cast<const typename Simd<A>::Loose*>(p);
}

template <class A>
TERSOR_INLINE void store(A* p, Vec<A> v) {
  *reinterpret_cast<typename Simd<A>::Loose*>(p) = v;
}

template <class A>
TERSOR_INLINE Vec<A> splat(A value) {
  return value - Vec<A>{};
}

// a * b + c in one rounding where the level has the instruction: call it only where the last bit is free.
template <class A>
TERSOR_INLINE Vec<A> fma(Vec<A> a, Vec<A> b, Vec<A> c) {
#if TERSOR_ISA_LEVEL == 2
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else return (Vec<A>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif TERSOR_ISA_LEVEL == 1
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else return (Vec<A>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

template <class A>
TERSOR_INLINE Vec<A> max(Vec<A> a, Vec<A> b) {
  return a > b ? a : b;
}

// The first `count` lanes of v, zero in the others.
template <class A>
TERSOR_INLINE Vec<A> keep_first(Vec<A> v, int count) {
  typename Simd<A>::Mask index;
  for (int i = 0; i < Simd<A>::lanes; ++i) index[i] = i;
  return index < typename Simd<A>::Whole(count) ? v : Vec<A>{};
}

template <class A>
TERSOR_INLINE Vec<A> load_first(const A* p, int count) {
  if (count >= Simd<A>::lanes) return load(p);
  Vec<A> v{};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

template <class A>
TERSOR_INLINE void store_first(A* p, Vec<A> v, int count) {
  if (count >= Simd<A>::lanes) return store<A>(p, v);
  for (int i = 0; i < count; ++i) p[i] = v[i];
}

// To the nearest whole number, ties to even; NaN and infinities stay.
template <class A>
TERSOR_INLINE Vec<A> round_even(Vec<A> x) {
#if TERSOR_ISA_LEVEL == 2
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | 8);
  else return (Vec<A>)_mm512_roundscale_pd((__m512d)x, _MM_FROUND_TO_NEAREST_INT | 8);
#elif TERSOR_ISA_LEVEL == 1
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | 8);
  else return (Vec<A>)_mm256_round_pd((__m256d)x, _MM_FROUND_TO_NEAREST_INT | 8);
#else
  constexpr A limit = sizeof(A) == 4 ? A(0x1p23) : A(0x1p52);  // from here on all numbers are whole
  const Vec<A> rounded = x < 0 ? (x - limit) + limit : (x + limit) - limit;
  return x < limit && x > -limit ? rounded : x;
#endif
}

TERSOR_INLINE Vec<float> sqrt(Vec<float> x) {
#if TERSOR_ISA_LEVEL == 2
  return (Vec<float>)_mm512_sqrt_ps((__m512)x);
#elif TERSOR_ISA_LEVEL == 1
  return (Vec<float>)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < Simd<float>::lanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

TERSOR_INLINE Vec<double> sqrt(Vec<double> x) {
  for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}

// One bit per lane, and back.
template <class A>
TERSOR_INLINE typename Simd<A>::Mask from_bits(uint32_t bits) {
  typename Simd<A>::Mask lane;
  for (int i = 0; i < Simd<A>::lanes; ++i) lane[i] = typename Simd<A>::Whole(1) << i;
  return (lane & typename Simd<A>::Whole(bits)) != 0;
}

template <class A>
TERSOR_INLINE uint32_t to_bits(typename Simd<A>::Mask mask) {
#if TERSOR_ISA_LEVEL == 2
  if constexpr (sizeof(A) == 4) return _mm512_movepi32_mask((__m512i)mask);
  else return _mm512_movepi64_mask((__m512i)mask);
#elif TERSOR_ISA_LEVEL == 1
  if constexpr (sizeof(A) == 4) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
  else return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < Simd<A>::lanes; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

// The sum of all lanes, always in the same order.
TERSOR_INLINE float total(Vec<float> v) {
#if TERSOR_ISA_LEVEL == 2
  return _mm512_reduce_add_ps((__m512)v);
#else
  float sum = 0;
  for (int i = 0; i < Simd<float>::lanes; ++i) sum += v[i];
  return sum;
#endif
}

TERSOR_INLINE double total(Vec<double> v) {
  double sum = 0;
  for (int i = 0; i < Simd<double>::lanes; ++i) sum += v[i];
  return sum;
}

// exp to 2 units in the last place; NaN stays NaN, underflow gives 0, overflow infinity.
TERSOR_INLINE Vec<float> exp(Vec<float> x) {
#if TERSOR_ISA_LEVEL == 2
  x = (Vec<float>)_mm512_max_ps(_mm512_set1_ps(-104.0f), (__m512)x);  // the second operand where one is NaN
  x = (Vec<float>)_mm512_min_ps(_mm512_set1_ps(89.0f), (__m512)x);
#else
  using Mask = Simd<float>::Mask;
  x = x < -104.0f ? splat(-104.0f) : x;
  x = x > 89.0f ? splat(89.0f) : x;
#endif
  // Adding and taking away 1.5 * 2^23 rounds to the nearest whole number.
  const Vec<float> shifted = fma<float>(x, splat(1.44269504f), splat(12582912.0f));
  const Vec<float> n = shifted - 12582912.0f;
  Vec<float> r = fma<float>(n, splat(-0.693359375f), x);  // ln 2 in two parts: the first product is exact
  r = fma<float>(n, splat(2.12194440e-4f), r);
  Vec<float> p = splat(1.9875691500e-4f);
  p = fma<float>(p, r, splat(1.3981999507e-3f));
  p = fma<float>(p, r, splat(8.3334519073e-3f));
  p = fma<float>(p, r, splat(4.1665795894e-2f));
  p = fma<float>(p, r, splat(1.6666665459e-1f));
  p = fma<float>(p, r, splat(5.0000001201e-1f));
  p = fma<float>(p, r * r, r) + 1.0f;
#if TERSOR_ISA_LEVEL == 2
  return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // 2^n in two factors, since n runs from -150 to 128 and one exponent field does not.
  const Mask whole = (Mask)shifted - 0x4b400000;
  const Mask half = whole >> 1;
  return p * (Vec<float>)((half + 127) << 23) * (Vec<float>)((whole - half + 127) << 23);
#endif
}

// log of a normal positive number to 2 units in the last place; NaN stays NaN.
TERSOR_INLINE Vec<float> log(Vec<float> x) {
  using Mask = Simd<float>::Mask;
  const Mask exponent = (((Mask)x - 0x3f3504f3) >> 23);  // so that the mantissa lies in [sqrt(1/2), sqrt(2))
  const Vec<float> m = (Vec<float>)((Mask)x - (exponent << 23)) - 1.0f;
  const Vec<float> n = __builtin_convertvector(exponent, Vec<float>);
  Vec<float> p = splat(7.0376836292e-2f);
  p = fma<float>(p, m, splat(-1.1514610310e-1f));
  p = fma<float>(p, m, splat(1.1676998740e-1f));
  p = fma<float>(p, m, splat(-1.2420140846e-1f));
  p = fma<float>(p, m, splat(1.4249322787e-1f));
  p = fma<float>(p, m, splat(-1.6668057665e-1f));
  p = fma<float>(p, m, splat(2.0000714765e-1f));
  p = fma<float>(p, m, splat(-2.4999993993e-1f));
  p = fma<float>(p, m, splat(3.3333331174e-1f));
  const Vec<float> square = m * m;
  Vec<float> r = fma<float>(n, splat(-2.12194440e-4f), p * m * square);
  r = fma<float>(square, splat(-0.5f), r) + m;
  r = fma<float>(n, splat(0.693359375f), r);
  return x == x ? r : x;
}

// float64 serves gradient checks, not speed.
TERSOR_INLINE Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

TERSOR_INLINE Vec<double> log(Vec<double> x) {
  for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = __builtin_log(x[i]);
  return x;
}

// The bits of v rounded to bfloat16, to nearest with ties to even, in the low half of each lane.
TERSOR_INLINE Simd<float>::Mask to_bfloat16(Vec<float> v) {
  using Mask = Simd<float>::Mask;
  const Mask bits = (Mask)v;
  const Mask rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
  return v == v ? rounded : Mask{} + 0x7fc0;
}

// Consecutive elements of any type, widened; and rounded to the nearest of it.
TERSOR_INLINE Vec<float> widen(const float* p) { return load(p); }
TERSOR_INLINE Vec<double> widen(const double* p) { return load(p); }
TERSOR_INLINE void narrow(float* p, Vec<float> v) { store<float>(p, v); }
TERSOR_INLINE void narrow(double* p, Vec<double> v) { store<double>(p, v); }
#if TERSOR_ISA_LEVEL == 2
TERSOR_INLINE Vec<float> widen(const Half* p) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
TERSOR_INLINE Vec<float> widen(const BFloat16* p) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16);
}
TERSOR_INLINE void narrow(Half* p, Vec<float> v) {
  const __m256i words = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
}
TERSOR_INLINE void narrow(BFloat16* p, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)to_bfloat16(v)));
}
#elif TERSOR_ISA_LEVEL == 1
TERSOR_INLINE Vec<float> widen(const Half* p) {
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
TERSOR_INLINE Vec<float> widen(const BFloat16* p) {
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16);
}
TERSOR_INLINE void narrow(Half* p, Vec<float> v) {
  const __m128i words = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words);
}
TERSOR_INLINE void narrow(BFloat16* p, Vec<float> v) {
  const __m256i wide = (__m256i)to_bfloat16(v);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words);
}
#else
template <class T>
TERSOR_INLINE Vec<float> widen(const T* p) {
  Vec<float> v;
  for (int i = 0; i < Simd<float>::lanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
}
template <class T>
TERSOR_INLINE void narrow(T* p, Vec<float> v) {
  for (int i = 0; i < Simd<float>::lanes; ++i) p[i] = static_cast<T>(v[i]);
}
#endif

// The same for the first `count` elements, fewer than a vector has; the other lanes are zero.
template <class T, class A = std::conditional_t<std::is_same_v<T, double>, double, float>>
TERSOR_INLINE Vec<A> widen_first(const T* p, int count) {
  Vec<A> v{};
  for (int i = 0; i < count; ++i) v[i] = static_cast<A>(p[i]);
  return v;
}
template <class T, class V>
TERSOR_INLINE void narrow_first(T* p, V v, int count) {
  for (int i = 0; i < count; ++i) p[i] = static_cast<T>(v[i]);
}
#if TERSOR_ISA_LEVEL == 2
TERSOR_INLINE Vec<float> widen_first(const float* p, int count) {
  return (Vec<float>)_mm512_maskz_loadu_ps((1u << count) - 1, p);
}
TERSOR_INLINE Vec<float> widen_first(const Half* p, int count) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16((1u << count) - 1, p));
}
TERSOR_INLINE Vec<float> widen_first(const BFloat16* p, int count) {
  const __m256i words = _mm256_maskz_loadu_epi16((1u << count) - 1, p);
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16);
}
TERSOR_INLINE void narrow_first(float* p, Vec<float> v, int count) {
  _mm512_mask_storeu_ps(p, (1u << count) - 1, (__m512)v);
}
TERSOR_INLINE void narrow_first(Half* p, Vec<float> v, int count) {
  const __m256i words = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_mask_storeu_epi16(p, (1u << count) - 1, words);
}
TERSOR_INLINE void narrow_first(BFloat16* p, Vec<float> v, int count) {
  _mm256_mask_storeu_epi16(p, (1u << count) - 1, _mm512_cvtepi32_epi16((__m512i)to_bfloat16(v)));
}
#endif

// The same for the first `count` elements; the other lanes are zero.
template <class A, class T>
TERSOR_INLINE Vec<A> load_as(const T* p, int count) {
  if (__builtin_expect(count >= Simd<A>::lanes, 1)) return widen(p);
  return widen_first(p, count);
}

template <class A, class T>
TERSOR_INLINE void store_as(T* p, Vec<A> v, int count) {
  if (__builtin_expect(count >= Simd<A>::lanes, 1)) return narrow(p, v);
  narrow_first(p, v, count);
}

}  // namespace TERSOR_ISA
}  // namespace tersor

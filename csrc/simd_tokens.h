// Tokens as vectors of one channel each, for one instruction set; foreach_isa.h includes this file after simd.h.

namespace tersor {
namespace TERSOR_ISA {

// ---- Tokens: `lanes` consecutive positions, each with its channels side by side in memory ----
// Four channels of all of them become four vectors, one per channel. Quarter i of a row holds four channels of one
// token (i, i + 4, ...), so that a 4 x 4 transposition inside each 128-bit part is all the shuffling there is.

template <class V, int... I>
TERSOR_INLINE void transpose_quarters(V r[4], std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
#if defined(__clang__)
#define TERSOR_SHUFFLE(a, b, index) __builtin_shufflevector(a, b, index...)
#else
  typedef int32_t Index __attribute__((vector_size(n * 4)));
#define TERSOR_SHUFFLE(a, b, index) __builtin_shuffle(a, b, Index{index...})
#endif
  // Index i counts the lanes of a, then (from n on) those of b; q is the 128-bit part, k the place in it.
  const V low01 = TERSOR_SHUFFLE(r[0], r[1], (I / 4 * 4 + I % 4 / 2 + (I % 2) * n));
  const V high01 = TERSOR_SHUFFLE(r[0], r[1], (I / 4 * 4 + 2 + I % 4 / 2 + (I % 2) * n));
  const V low23 = TERSOR_SHUFFLE(r[2], r[3], (I / 4 * 4 + I % 4 / 2 + (I % 2) * n));
  const V high23 = TERSOR_SHUFFLE(r[2], r[3], (I / 4 * 4 + 2 + I % 4 / 2 + (I % 2) * n));
  r[0] = TERSOR_SHUFFLE(low01, low23, (I / 4 * 4 + I % 2 + (I % 4 / 2) * n));
  r[1] = TERSOR_SHUFFLE(low01, low23, (I / 4 * 4 + 2 + I % 2 + (I % 4 / 2) * n));
  r[2] = TERSOR_SHUFFLE(high01, high23, (I / 4 * 4 + I % 2 + (I % 4 / 2) * n));
  r[3] = TERSOR_SHUFFLE(high01, high23, (I / 4 * 4 + 2 + I % 2 + (I % 4 / 2) * n));
#undef TERSOR_SHUFFLE
}

TERSOR_INLINE void transpose_quarters(Vec<float> r[4]) {
  transpose_quarters(r, std::make_integer_sequence<int, Simd<float>::lanes>{});
}

// Four channels of one token are a quarter. gather_quarters: quarter i of the result is the four channels at p[i].
#if TERSOR_ISA_LEVEL == 2
TERSOR_INLINE Vec<float> gather_quarters(const float* const p[4]) {
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p[0]));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p[1]), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p[2]), 2);
  return (Vec<float>)_mm512_insertf32x4(v, _mm_loadu_ps(p[3]), 3);
}
template <class T>
TERSOR_INLINE __m256i gather_words(const T* const p[4]) {
  int64_t q[4];
  for (int i = 0; i < 4; ++i) __builtin_memcpy(&q[i], p[i], 8);
  return _mm256_set_epi64x(q[3], q[2], q[1], q[0]);
}
TERSOR_INLINE Vec<float> gather_quarters(const Half* const p[4]) {
  return (Vec<float>)_mm512_cvtph_ps(gather_words(p));
}
TERSOR_INLINE Vec<float> gather_quarters(const BFloat16* const p[4]) {
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(gather_words(p)), 16);
}
TERSOR_INLINE void put_quarter(float* p, Vec<float> v, int i) {
  const __m512 all = (__m512)v;
  const __m128 one = i == 0   ? _mm512_castps512_ps128(all)
                     : i == 1 ? _mm512_extractf32x4_ps(all, 1)
                     : i == 2 ? _mm512_extractf32x4_ps(all, 2)
                              : _mm512_extractf32x4_ps(all, 3);
  _mm_storeu_ps(p, one);
}
TERSOR_INLINE void put_words(void* p, __m256i v, int i) {
  const __m128i half = i < 2 ? _mm256_castsi256_si128(v) : _mm256_extracti128_si256(v, 1);
  _mm_storel_epi64(static_cast<__m128i*>(p), i % 2 ? _mm_unpackhi_epi64(half, half) : half);
}
TERSOR_INLINE void put_quarter(Half* p, Vec<float> v, int i) {
  put_words(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), i);
}
TERSOR_INLINE void put_quarter(BFloat16* p, Vec<float> v, int i) {
  put_words(p, _mm512_cvtepi32_epi16((__m512i)to_bfloat16(v)), i);
}
#elif TERSOR_ISA_LEVEL == 1
TERSOR_INLINE Vec<float> gather_quarters(const float* const p[2]) {
  return (Vec<float>)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p[0])), _mm_loadu_ps(p[1]), 1);
}
template <class T>
TERSOR_INLINE __m128i gather_words(const T* const p[2]) {
  return _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p[0])),
                            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p[1])));
}
TERSOR_INLINE Vec<float> gather_quarters(const Half* const p[2]) {
  return (Vec<float>)_mm256_cvtph_ps(gather_words(p));
}
TERSOR_INLINE Vec<float> gather_quarters(const BFloat16* const p[2]) {
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(gather_words(p)), 16);
}
TERSOR_INLINE void put_quarter(float* p, Vec<float> v, int i) {
  _mm_storeu_ps(p, i == 0 ? _mm256_castps256_ps128((__m256)v) : _mm256_extractf128_ps((__m256)v, 1));
}
TERSOR_INLINE void put_words(void* p, __m128i v, int i) {
  _mm_storel_epi64(static_cast<__m128i*>(p), i ? _mm_unpackhi_epi64(v, v) : v);
}
TERSOR_INLINE void put_quarter(Half* p, Vec<float> v, int i) {
  put_words(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), i);
}
TERSOR_INLINE void put_quarter(BFloat16* p, Vec<float> v, int i) {
  const __m256i words = (__m256i)to_bfloat16(v);
  put_words(p, _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)), i);
}
#else
template <class T>
TERSOR_INLINE Vec<float> gather_quarters(const T* const p[1]) {
  Vec<float> v;
  for (int i = 0; i < 4; ++i) v[i] = static_cast<float>(p[0][i]);
  return v;
}
template <class T>
TERSOR_INLINE void put_quarter(T* p, Vec<float> v, int) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<T>(v[i]);
}
#endif

// out[i] = channel i of `tokens` tokens that lie `stride` apart; zero beyond `tokens` and `channels`.
template <class T>
TERSOR_INLINE void load_tokens(const T* p, int64_t stride, int tokens, int channels, Vec<float> out[4]) {
  constexpr int lanes = Simd<float>::lanes, parts = lanes / 4;
  if (__builtin_expect(channels < 4, 0)) {
    for (int i = 0; i < 4; ++i) {
      out[i] = Vec<float>{};
      if (i >= channels) continue;
      for (int t = 0; t < std::min(tokens, lanes); ++t) out[i][t] = static_cast<float>(p[t * stride + i]);
    }
    return;
  }
  const T* token[parts];
  if (__builtin_expect(tokens >= lanes, 1)) {
    const int64_t step = 4 * stride;  // written so that every address is a base and one scaled register
    for (int i = 0; i < 4; ++i, p += stride) {
      for (int part = 0; part < parts; ++part) token[part] = p + part * step;
      out[i] = gather_quarters(token);
    }
    return transpose_quarters(out);
  }
  for (int i = 0; i < 4; ++i) {  // the last token stands in for those beyond it, and is masked out again
    for (int part = 0; part < parts; ++part) token[part] = p + std::min(4 * part + i, tokens - 1) * stride;
    out[i] = gather_quarters(token);
  }
  transpose_quarters(out);
  for (int i = 0; i < 4; ++i) out[i] = keep_first<float>(out[i], tokens);
}

template <class T>
TERSOR_INLINE void store_tokens(T* p, int64_t stride, int tokens, int channels, Vec<float> v[4]) {
  constexpr int lanes = Simd<float>::lanes, parts = lanes / 4;
  if (__builtin_expect(channels < 4, 0)) {
    for (int i = 0; i < channels; ++i) {
      for (int t = 0; t < std::min(tokens, lanes); ++t) p[t * stride + i] = static_cast<T>(v[i][t]);
    }
    return;
  }
  transpose_quarters(v);
  if (__builtin_expect(tokens >= lanes, 1)) {
    const int64_t step = 4 * stride;
    for (int i = 0; i < 4; ++i, p += stride) {
      for (int part = 0; part < parts; ++part) put_quarter(p + part * step, v[i], part);
    }
    return;
  }
  for (int i = 0; i < 4; ++i) {
    for (int part = 0; part < parts; ++part) {
      if (4 * part + i < tokens) put_quarter(p + (4 * part + i) * stride, v[i], part);
    }
  }
}

TERSOR_INLINE void load_tokens(const double* p, int64_t stride, int tokens, int channels, Vec<double> out[4]) {
  for (int i = 0; i < 4; ++i) {
    out[i] = Vec<double>{};
    if (i >= channels) continue;
    for (int t = 0; t < std::min(tokens, Simd<double>::lanes); ++t) out[i][t] = p[t * stride + i];
  }
}

TERSOR_INLINE void store_tokens(double* p, int64_t stride, int tokens, int channels, Vec<double> v[4]) {
  for (int i = 0; i < std::min(channels, 4); ++i) {
    for (int t = 0; t < std::min(tokens, Simd<double>::lanes); ++t) p[t * stride + i] = v[i][t];
  }
}

// `lanes` tokens of one head, transposed: channel c goes to plane + c * plane_stride. Sizes come by value, since a
// vector store may alias anything that is read through a reference.
template <class T, class A>
TERSOR_INLINE void transpose_in(const T* token, int64_t token_stride, int tokens, int64_t head_dim, A* plane,
                                int64_t plane_stride) {
  Vec<A> v[4];
  int64_t c = 0;
  for (; c + 4 <= head_dim; c += 4, plane += 4 * plane_stride) {
    load_tokens(token + c, token_stride, tokens, 4, v);
    store<A>(plane, v[0]), store<A>(plane + plane_stride, v[1]);
    store<A>(plane + 2 * plane_stride, v[2]), store<A>(plane + 3 * plane_stride, v[3]);
  }
  if (c == head_dim) return;
  load_tokens(token + c, token_stride, tokens, static_cast<int>(head_dim - c), v);
  for (int i = 0; c + i < head_dim; ++i) store<A>(plane + i * plane_stride, v[i]);
}

template <class T, class A>
TERSOR_INLINE void transpose_out(T* token, int64_t token_stride, int tokens, int64_t head_dim, const A* block,
                                 Vec<A> factor) {
  constexpr int lanes = Simd<A>::lanes;
  for (int64_t c = 0; c < head_dim; c += 4, block += 4 * lanes) {
    Vec<A> v[4] = {load(block) * factor, load(block + lanes) * factor, load(block + 2 * lanes) * factor,
                   load(block + 3 * lanes) * factor};
    const int channels = static_cast<int>(head_dim - c);
    if (__builtin_expect(channels >= 4, 1)) store_tokens(token + c, token_stride, tokens, 4, v);
    else store_tokens(token + c, token_stride, tokens, channels, v);
  }
}

// Asks for some tokens ahead of their use: strided access is too sparse for the hardware's own prefetching, and in
// small portions between the arithmetic the memory has time to answer. One line of two, as the hardware fetches pairs.
template <class T>
TERSOR_INLINE void prefetch_tokens(const T* token, int64_t token_stride, int64_t tokens, int64_t head_dim) {
  for (int64_t c = 0; c < head_dim; c += 128 / static_cast<int64_t>(sizeof(T))) {
    const T* line = token + c;
    for (int64_t t = 0; t < tokens; ++t, line += token_stride) __builtin_prefetch(line, 0, 2);
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor

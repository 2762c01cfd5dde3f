// What the integer products share within one instruction set; their kernels' files include it once per level.

namespace tersor::quantized {
namespace TERSOR_ISA {
using namespace tersor::TERSOR_ISA;
using Ints = Simd<float>::Mask;

constexpr int LANES = Simd<float>::lanes;
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers, ties to even
constexpr int32_t MAGIC_BITS = 0x4b400000;

// s x - z, within the levels and rounded as in fake_quantize_bounds: each of its steps is monotone, so that to clip
// this between what the bounds become is to clip x. NaN stays NaN; what it has for a code does not matter.
TERSOR_INLINE Vec<float> rounded(Vec<float> x, const Quantizer& q) {
  Vec<float> v = x * q.scale - q.zero;
  v = q.least > v ? splat(q.least) : v;
  v = q.greatest < v ? splat(q.greatest) : v;
  return v + MAGIC;
}

TERSOR_INLINE Vec<float> join(Vec<double> low, Vec<double> high) {
#if TERSOR_ISA_LEVEL == 2
  const __m512 first = _mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)low));
  return (Vec<float>)_mm512_insertf32x8(first, _mm512_cvtpd_ps((__m512d)high), 1);
#elif TERSOR_ISA_LEVEL == 1
  return (Vec<float>)_mm256_set_m128(_mm256_cvtpd_ps((__m256d)high), _mm256_cvtpd_ps((__m256d)low));
#else
  Vec<float> v;
  for (int i = 0; i < LANES / 2; ++i) {
    v[i] = static_cast<float>(low[i]), v[i + LANES / 2] = static_cast<float>(high[i]);
  }
  return v;
#endif
}

template <class N>
TERSOR_INLINE Vec<double> to_double(const N* p) {
  typedef N Few __attribute__((vector_size(LANES / 2 * sizeof(N))));
  Few few;
  __builtin_memcpy(&few, p, sizeof few);
  return __builtin_convertvector(few, Vec<double>);
}

}  // namespace TERSOR_ISA
}  // namespace tersor::quantized

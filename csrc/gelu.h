// The exact GELU, t * Phi(t) with the normal distribution Phi, for one instruction set. A kernel's body includes this
// file inside its level's target.

namespace tersor {
namespace TERSOR_ISA {

// exp(-h) for h >= 0, exactly 0 from 88 on; NaN stays NaN. One factor 2^n and no overflow: less work than exp().
TERSOR_INLINE Vec<float> exp_negative(Vec<float> h) {
  using Mask = Simd<float>::Mask;
  h = h > 88.0f ? splat(88.0f) : h;
  const Vec<float> shifted = fma<float>(h, splat(-1.44269504f), splat(12582912.0f));
  const Vec<float> n = shifted - 12582912.0f;
  Vec<float> r = fma<float>(n, splat(-0.693359375f), -h);
  r = fma<float>(n, splat(2.12194440e-4f), r);
  Vec<float> p = splat(1.9875691500e-4f);
  p = fma<float>(p, r, splat(1.3981999507e-3f));
  p = fma<float>(p, r, splat(8.3334519073e-3f));
  p = fma<float>(p, r, splat(4.1665795894e-2f));
  p = fma<float>(p, r, splat(1.6666665459e-1f));
  p = fma<float>(p, r, splat(5.0000001201e-1f));
  p = fma<float>(p, r * r, r) + 1.0f;
  return p * (Vec<float>)(((Mask)shifted - 0x4b400000 + 127) << 23);
}

// Phi(x) and exp(-x^2 / 2). Phi(-z) = exp(-z^2 / 2) * P(1 / (1 + 0.3 z)) for z >= 0, with P fitted for the least
// relative error (absolute where Phi exceeds 0.15): 4e-8, and 4e-7 with float32's roundings.
TERSOR_INLINE Vec<float> normal(Vec<float> x, Vec<float>& bell) {
  const Vec<float> z = x < 0.0f ? -x : x;
  bell = exp_negative(z * z * 0.5f);
  const Vec<float> t = 1.0f / fma<float>(z, splat(0.3f), splat(1.0f));
  Vec<float> p = splat(0.036329829903547835f);
  p = fma<float>(p, t, splat(-0.15985195659163667f));
  p = fma<float>(p, t, splat(0.210782278929544f));
  p = fma<float>(p, t, splat(-0.05764125386493302f));
  p = fma<float>(p, t, splat(0.13059745832508365f));
  p = fma<float>(p, t, splat(0.09931219025493922f));
  p = fma<float>(p, t, splat(0.12084816979918314f));
  p = fma<float>(p, t, splat(0.11962326683722972f));
  const Vec<float> tail = p * t * bell;
  return x < 0.0f ? tail : 1.0f - tail;
}

// float64 serves gradient checks, not speed.
TERSOR_INLINE Vec<double> normal(Vec<double> x, Vec<double>& bell) {
  Vec<double> below;
  for (int i = 0; i < Simd<double>::lanes; ++i) {
    below[i] = 0.5 * __builtin_erfc(-x[i] * 0.70710678118654752440);
    bell[i] = __builtin_exp(-0.5 * x[i] * x[i]);
  }
  return below;
}

template <class A>
TERSOR_INLINE Vec<A> gelu(Vec<A> x) {
  Vec<A> bell;
  return x * normal(x, bell);
}

// The derivative, Phi(x) + x * phi(x), and the function itself on the way.
template <class A>
TERSOR_INLINE Vec<A> gelu_slope(Vec<A> x, Vec<A>& value) {
  Vec<A> bell;
  const Vec<A> below = normal(x, bell);
  value = x * below;
  return below + x * bell * A(0.39894228040143267794);
}

}  // namespace TERSOR_ISA
}  // namespace tersor

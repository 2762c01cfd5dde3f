#ifdef TERSOR_ISA

namespace tersor::binary {
namespace TERSOR_ISA {

using namespace tersor::TERSOR_ISA;

// Bits of up to one accumulator's channels of `lanes` neighbouring pixels: a lane each.
template <class A>
struct Planes {
  typename Simd<A>::Mask positive, nonzero;
};

template <class A, class T>
TERSOR_INLINE Planes<A> pack_channels(const T* from, int64_t stride_c, const T* shift, int channels, int count) {
  using Mask = typename Simd<A>::Mask;
  using Whole = typename Simd<A>::Whole;
  Planes<A> planes{};
  for (int c = 0; c < channels; ++c) {
    Vec<A> x = load_as<A>(from + c * stride_c, count);
    if (shift != nullptr) x += static_cast<A>(shift[c]);
    const Mask bit = Mask{} + static_cast<Whole>(std::make_unsigned_t<Whole>(1) << c);
    const Mask positive = x > 0;
    planes.positive |= positive & bit, planes.nonzero |= (positive | (x < 0)) & bit;
  }
  return planes;
}

// One word of all pixels of an image whose pixels lie side by side.
template <class T, class A>
TERSOR_INLINE void pack_pixels(const T* from, int64_t stride_c, const T* shift, int channels, int64_t pixels,
                               int64_t* positive, int64_t* nonzero, int64_t step) {
  constexpr int lanes = Simd<A>::lanes, bits = 8 * sizeof(A);
  for (int64_t p = 0; p < pixels; p += lanes) {
    const int count = static_cast<int>(std::min<int64_t>(lanes, pixels - p));
    uint64_t words[2][lanes] = {};
    for (int c = 0; c < channels; c += bits) {
      const T* const add = shift == nullptr ? nullptr : shift + c;
      const Planes<A> planes =
          pack_channels<A>(from + c * stride_c + p, stride_c, add, std::min(bits, channels - c), count);
      for (int i = 0; i < count; ++i) {
        using Bits = std::make_unsigned_t<typename Simd<A>::Whole>;
        words[0][i] |= static_cast<uint64_t>(static_cast<Bits>(planes.positive[i])) << c;
        words[1][i] |= static_cast<uint64_t>(static_cast<Bits>(planes.nonzero[i])) << c;
      }
    }
    for (int i = 0; i < count; ++i) {
      positive[(p + i) * step] = static_cast<int64_t>(words[0][i]);
      nonzero[(p + i) * step] = static_cast<int64_t>(words[1][i]);
    }
  }
}

// A bit for each lane: above 0, and neither 0 nor NaN.
template <class A>
TERSOR_INLINE std::pair<uint32_t, uint32_t> sign_bits(Vec<A> x) {
#if TERSOR_ISA_LEVEL == 2
  if constexpr (sizeof(A) == 4) {
    const __m512 zero = _mm512_setzero_ps();
    return {_mm512_cmp_ps_mask((__m512)x, zero, _CMP_GT_OQ), _mm512_cmp_ps_mask((__m512)x, zero, _CMP_NEQ_OQ)};
  }
#endif
  const uint32_t above = to_bits<A>(x > 0);
  return {above, above | to_bits<A>(x < 0)};
}

// One word of one pixel whose channels lie side by side.
template <class T, class A>
TERSOR_INLINE void pack_word(const T* from, const T* shift, int channels, int64_t* positive, int64_t* nonzero) {
  constexpr int lanes = Simd<A>::lanes;
  uint64_t words[2] = {};
  if (channels == WORD && shift == nullptr) {  // the plainest case, without branches
    for (int c = 0; c < WORD; c += lanes) {
      const auto [above, any] = sign_bits<A>(widen(from + c));
      words[0] |= static_cast<uint64_t>(above) << c, words[1] |= static_cast<uint64_t>(any) << c;
    }
    *positive = static_cast<int64_t>(words[0]), *nonzero = static_cast<int64_t>(words[1]);
    return;
  }
  for (int c = 0; c < channels; c += lanes) {
    const int count = std::min(lanes, channels - c);
    Vec<A> x = load_as<A>(from + c, count);
    if (shift != nullptr) x += load_as<A>(shift + c, count);
    auto [above, any] = sign_bits<A>(x);
    if (count < lanes) above &= (1u << count) - 1, any &= (1u << count) - 1;  // the shift may have filled the rest
    words[0] |= static_cast<uint64_t>(above) << c, words[1] |= static_cast<uint64_t>(any) << c;
  }
  *positive = static_cast<int64_t>(words[0]), *nonzero = static_cast<int64_t>(words[1]);
}

// Images and words `first` to `end`, a unit being one word of all pixels of an image, or a row of pixels.
template <class T>
static void pack_units(const Map& map, bool by_pixel, int64_t first, int64_t end) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const int64_t own = map.channels / map.groups, per_group = words_for(own), step = map.groups * per_group;
  const T* const numbers = static_cast<const T*>(map.numbers);
  const T* const shift = static_cast<const T*>(map.shift);
  for (int64_t unit = first; unit < end; ++unit) {
    const int64_t n = by_pixel ? unit / map.height : unit / step;
    for (int64_t w = by_pixel ? 0 : unit % step; w < (by_pixel ? step : unit % step + 1); ++w) {
      const int64_t channel = w / per_group * own + w % per_group * WORD;
      const int channels = static_cast<int>(std::min(WORD, own - w % per_group * WORD));
      const T* const add = shift == nullptr ? nullptr : shift + channel;
      const T* const from = numbers + n * map.stride_n + channel * map.stride_c;
      if (by_pixel) {
        const int64_t h = unit % map.height;
        for (int64_t x = 0; x < map.width; ++x) {
          int64_t* const to = map.words + ((n * map.height + h) * map.width + x) * step + w;
          pack_word<T, A>(from + h * map.stride_h + x * map.stride_w, add, channels, to, to + map.plane());
        }
      } else {
        int64_t* const to = map.words + n * map.pixels() * step + w;
        pack_pixels<T, A>(from, map.stride_c, add, channels, map.pixels(), to, to + map.plane(), step);
      }
    }
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::binary

#endif

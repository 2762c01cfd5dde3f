#ifdef TERSOR_ISA

namespace tersor::binary {
namespace TERSOR_ISA {

using namespace tersor::TERSOR_ISA;

template <class A>
TERSOR_INLINE Vec<A> signs_of(typename Simd<A>::Mask positive, typename Simd<A>::Mask nonzero) {
  const Vec<A> ones = positive != 0 ? splat(A(1)) : splat(A(-1));
  return nonzero != 0 ? ones : Vec<A>{};
}

// One word of all pixels of an image, to channels whose pixels lie side by side.
template <class T, class A>
TERSOR_INLINE void unpack_pixels(T* to, int64_t stride_c, int channels, int64_t pixels, const int64_t* positive,
                                 const int64_t* nonzero, int64_t step) {
  using Mask = typename Simd<A>::Mask;
  using Whole = typename Simd<A>::Whole;
  constexpr int lanes = Simd<A>::lanes, bits = 8 * sizeof(A);
  for (int64_t p = 0; p < pixels; p += lanes) {
    const int count = static_cast<int>(std::min<int64_t>(lanes, pixels - p));
    for (int c = 0; c < channels; c += bits) {
      Mask above{}, any{};
      for (int i = 0; i < count; ++i) {
        above[i] = static_cast<Whole>(static_cast<uint64_t>(positive[(p + i) * step]) >> c);
        any[i] = static_cast<Whole>(static_cast<uint64_t>(nonzero[(p + i) * step]) >> c);
      }
      for (int k = 0; k < std::min(bits, channels - c); ++k) {
        const Mask bit = Mask{} + static_cast<Whole>(std::make_unsigned_t<Whole>(1) << k);
        store_as<A>(to + (c + k) * stride_c + p, signs_of<A>(above & bit, any & bit), count);
      }
    }
  }
}

// One word of one pixel, to channels that lie side by side.
template <class T, class A>
TERSOR_INLINE void unpack_word(T* to, int channels, uint64_t positive, uint64_t nonzero) {
  constexpr int lanes = Simd<A>::lanes;
  for (int c = 0; c < channels; c += lanes) {
    const auto above = from_bits<A>(static_cast<uint32_t>(positive >> c) & ((1u << lanes) - 1));
    const auto any = from_bits<A>(static_cast<uint32_t>(nonzero >> c) & ((1u << lanes) - 1));
    store_as<A>(to + c, signs_of<A>(above, any), std::min(lanes, channels - c));
  }
}

// Units as pack_signs has them.
template <class T>
static void unpack_units(const Map& map, bool by_pixel, int64_t first, int64_t end) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const int64_t own = map.channels / map.groups, per_group = words_for(own), step = map.groups * per_group;
  T* const numbers = static_cast<T*>(map.numbers);
  for (int64_t unit = first; unit < end; ++unit) {
    const int64_t n = by_pixel ? unit / map.height : unit / step;
    for (int64_t w = by_pixel ? 0 : unit % step; w < (by_pixel ? step : unit % step + 1); ++w) {
      const int64_t channel = w / per_group * own + w % per_group * WORD;
      const int channels = static_cast<int>(std::min(WORD, own - w % per_group * WORD));
      T* const to = numbers + n * map.stride_n + channel * map.stride_c;
      if (by_pixel) {
        const int64_t row = unit * map.width;
        for (int64_t x = 0; x < map.width; ++x) {
          const int64_t* const from = map.words + (row + x) * step + w;
          unpack_word<T, A>(to + unit % map.height * map.stride_h + x * map.stride_w, channels,
                            static_cast<uint64_t>(*from), static_cast<uint64_t>(from[map.plane()]));
        }
      } else {
        const int64_t* const from = map.words + n * map.pixels() * step + w;
        unpack_pixels<T, A>(to, map.stride_c, channels, map.pixels(), from, from + map.plane(), step);
      }
    }
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::binary

#endif

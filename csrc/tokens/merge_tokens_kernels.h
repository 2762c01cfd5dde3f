// The kernels of merge_tokens.cpp, compiled once per instruction set (foreach_isa.h includes this file).

namespace tersor::tokens {
namespace TERSOR_ISA {
using namespace ::tersor::TERSOR_ISA;

template <class A>
TERSOR_INLINE A size_of(const Merge& task, int64_t token) {
  return task.sizes ? static_cast<const A*>(task.sizes)[token] : A(1);
}

// Units are the places of all images; one that a single token goes to is a copy of it, bit for bit.
template <class T, class A>
static void merge_units(const Merge& task, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<A>::lanes, BLOCK = 4;
  const int64_t channels = task.channels;
  const int64_t* next = task.chains->next.data();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = task.chains->first[unit];
    T* to = task.output.at<T>(unit / task.places, unit % task.places);
    A size = 0;
    for (int64_t i = first; i >= 0; i = next[i]) size += size_of<A>(task, i);
    static_cast<A*>(task.output_sizes)[unit] = size;
    if (first < 0) {
      std::memset(to, 0, channels * sizeof(T));
      continue;
    }
    const auto row = [&](int64_t i) { return task.input.at<T>(i / task.tokens, i % task.tokens); };
    if (next[first] < 0 && size_of<A>(task, first) / size == 1) {
      std::memcpy(to, row(first), channels * sizeof(T));
      continue;
    }
    for (int64_t c = 0; c < channels; c += BLOCK * lanes) {
      Vec<A> sum[BLOCK] = {};
      for (int64_t i = first; i >= 0; i = next[i]) {
        const Vec<A> share = splat(size_of<A>(task, i) / size);
        const T* from = row(i);
        for (int v = 0; v < BLOCK; ++v) {
          const int64_t at = c + v * lanes;
          if (at < channels) sum[v] += share * load_as<A>(from + at, static_cast<int>(std::min(lanes, channels - at)));
        }
      }
      for (int v = 0; v < BLOCK; ++v) {
        const int64_t at = c + v * lanes;
        if (at < channels) store_as<A>(to + at, sum[v], static_cast<int>(std::min(lanes, channels - at)));
      }
    }
  }
}

// Units are the tokens of all images.
template <class T, class A>
static void merge_gradients(const Merge& task, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<A>::lanes;
  const int64_t channels = task.channels;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / task.tokens, place = task.index[unit];
    T* to = task.grad_input.at<T>(image, unit % task.tokens);
    if (place < 0 || place >= task.places) {
      std::memset(to, 0, channels * sizeof(T));
      continue;
    }
    const T* from = task.grad_output.at<T>(image, place);
    const A share = size_of<A>(task, unit) / static_cast<const A*>(task.totals)[image * task.places + place];
    if (share == 1) {
      std::memcpy(to, from, channels * sizeof(T));
      continue;
    }
    for (int64_t c = 0; c < channels; c += lanes) {
      const int count = static_cast<int>(std::min(lanes, channels - c));
      store_as<A>(to + c, splat(share) * load_as<A>(from + c, count), count);
    }
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::tokens

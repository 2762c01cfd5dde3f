// Ranking by counting who comes before, part of a body that is compiled once per instruction set.

namespace tersor::tokens {
namespace TERSOR_ISA {
using namespace ::tersor::TERSOR_ISA;

// Whole numbers in the order of the scores: NaN above all, zeros of both signs equal.
TERSOR_INLINE int32_t key_of(float x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  if (x != x) return INT32_MAX;
  return x == 0 ? 0 : bits ^ ((bits >> 31) & INT32_MAX);
}
TERSOR_INLINE int64_t key_of(double x) {
  int64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  if (x != x) return INT64_MAX;
  return x == 0 ? 0 : bits ^ ((bits >> 63) & INT64_MAX);
}

// order[rank] = token; ranks are counted for a vector of tokens at a time.
template <class A, class Key>
static void count_ranks(const Key* keys, int64_t count, int64_t* order) {
  using Keys = typename Simd<A>::Mask;
  constexpr int64_t lanes = Simd<A>::lanes;
  Keys lane;
  for (int i = 0; i < lanes; ++i) lane[i] = i;
  for (int64_t first = 0; first < count; first += lanes) {
    Keys own, before{};
    __builtin_memcpy(&own, keys + first, sizeof own);
    const int64_t last = std::min(first + lanes, count);
    for (int64_t j = 0; j < first; ++j) before -= keys[j] >= own;
    for (int64_t j = first; j < last; ++j) before -= (keys[j] > own) | ((keys[j] == own) & (lane > Key(j - first)));
    for (int64_t j = last; j < count; ++j) before -= keys[j] > own;
    for (int64_t i = 0; i < last - first; ++i) order[before[i]] = first + i;
  }
}

template <class T>
static void rank_rows(const void* scores, int64_t count, int64_t begin, int64_t end, int64_t* order, char* scratch) {
  using A = Accumulated<T>;
  using Key = typename Simd<A>::Whole;
  Key* keys = reinterpret_cast<Key*>(scratch);  // read up to a vector beyond `count`
  std::memset(keys, 0, (count + Simd<A>::lanes) * sizeof(Key));
  for (int64_t row = begin; row < end; ++row) {
    const T* own = static_cast<const T*>(scores) + row * count;
    for (int64_t i = 0; i < count; ++i) keys[i] = key_of(static_cast<A>(own[i]));
    if (count > MOST_COUNTED) sort_keys(keys, count, order + row * count);
    else count_ranks<A>(keys, count, order + row * count);
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::tokens

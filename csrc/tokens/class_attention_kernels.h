// The kernel of class_attention.cpp, compiled once per instruction set (foreach_isa.h includes this file).

namespace tersor::tokens {
namespace TERSOR_ISA {
using namespace ::tersor::TERSOR_ISA;

// One head's products with all keys, two keys at a time.
template <class T, class A>
TERSOR_INLINE void multiply_keys(const A* query, const T* key, int64_t row, int64_t length, int64_t head_dim, A* to) {
  constexpr int lanes = Simd<A>::lanes;
  for (int64_t m = 0; m < length; m += 2) {
    const T* one = key + m * row;
    const T* other = m + 1 < length ? one + row : one;
    Vec<A> first{}, second{};
    for (int64_t c = 0; c < head_dim; c += lanes) {
      const int count = static_cast<int>(std::min<int64_t>(lanes, head_dim - c));
      const Vec<A> q = load_first(query + c, count);
      first = fma<A>(q, load_as<A>(one + c, count), first);
      second = fma<A>(q, load_as<A>(other + c, count), second);
    }
    to[m] = total(first);
    if (m + 1 < length) to[m + 1] = total(second);
  }
}

// products become their softmax, added to `sum`. What is not finite turns all of a head into NaN, as it must.
template <class A>
TERSOR_INLINE void add_softmax(A* products, int64_t length, A* sum) {
  constexpr int lanes = Simd<A>::lanes;
  A highest = products[0];
  for (int64_t m = 1; m < length; ++m) highest = products[m] > highest ? products[m] : highest;
  Vec<A> powers{};
  for (int64_t m = 0; m < length; m += lanes) {
    const int count = static_cast<int>(std::min<int64_t>(lanes, length - m));
    const Vec<A> power = keep_first<A>(exp(load_first(products + m, count) - highest), count);
    store_first<A>(products + m, power, count);
    powers += power;
  }
  const A whole = total(powers);
  for (int64_t m = 0; m < length; m += lanes) {
    const int count = static_cast<int>(std::min<int64_t>(lanes, length - m));
    store_first<A>(sum + m, load_first(sum + m, count) + load_first(products + m, count) / whole, count);
  }
}

template <class T>
static void score_images(const ClassScores& task, int64_t begin, int64_t end, char* scratch) {
  using A = Accumulated<T>;
  A* sum = reinterpret_cast<A*>(scratch);
  A* products = sum + task.pitch();
  A* scaled = products + task.pitch();
  const A scale = static_cast<A>(task.scale), decay = static_cast<A>(task.decay);
  const A share = static_cast<A>(1 - task.decay), heads = static_cast<A>(task.heads);
  for (int64_t b = begin; b < end; ++b) {
    const T* query = static_cast<const T*>(task.query) + b * task.query_batch;
    const T* key = static_cast<const T*>(task.key) + b * task.key_batch;
    std::memset(sum, 0, task.pitch() * sizeof(A));
    for (int64_t h = 0; h < task.heads; ++h) {
      for (int64_t c = 0; c < task.head_dim; ++c) scaled[c] = static_cast<A>(query[h * task.query_head + c]) * scale;
      multiply_keys(scaled, key + h * task.key_head, task.key_row, task.length, task.head_dim, products);
      add_softmax(products, task.length, sum);
    }
    A* to = static_cast<A*>(task.scores) + b * (task.length - 1);
    const A* average = static_cast<const A*>(task.average);
    for (int64_t j = 0; j + 1 < task.length; ++j) {
      const A now = share * (sum[1 + j] / heads);
      to[j] = average ? decay * average[b * (task.length - 1) + j] + now : now;
    }
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::tokens

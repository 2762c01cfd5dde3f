// The kernels of nm_sparsify.cpp, compiled once per instruction set (foreach_isa.h includes this file).

namespace tersor::sparsity {
namespace TERSOR_ISA {

using namespace ::tersor::TERSOR_ISA;

// Which positions an alive combination of one group keeps.
template <class A>
TERSOR_INLINE uint32_t kept_positions(const A* scores, int combinations, const uint16_t* patterns) {
  uint32_t kept = 0;
  for (int j = 0; j < combinations; ++j) kept |= scores[j] != 0 ? patterns[j] : 0u;
  return kept;
}

constexpr int MOST_STORED = 4096 + 16;  // scores of a group, and a vector's lanes beyond them

template <class T, class A>
static void forward(const Task& task, int64_t first, int64_t end) {
  const Stored& stored = task.stored;
  const T* weight = static_cast<const T*>(task.weight);
  T* output = static_cast<T*>(task.output);
  const A* scores = static_cast<const A*>(task.scores) + first * stored.count;
  uint16_t own[MOST_STORED];
  const uint16_t* const patterns = stored.all() ? stored.patterns : own;
  BitWriter writer(task.mask, first * task.m);
  BitReader reader(task.given_mask ? task.given_mask : task.mask, first * task.m);
  Walk walk(task, first * task.m);
  for (int64_t g = first; g < end; ++g, scores += stored.count) {
    if (!task.given_mask && !stored.all() && !stored.read(g, own)) *task.invalid = true;
    const uint32_t kept = task.given_mask ? reader.next(task.m) : kept_positions(scores, stored.count, patterns);
    writer.put(kept, task.m);
    for (int p = 0; p < task.m; ++p) {
      const int64_t at = walk.next();
      output[at] = kept >> p & 1 ? weight[at] : T(0);
    }
  }
}

// Sums over the positions that each of `lanes` combinations keeps, in the order of the positions.
template <class A>
TERSOR_INLINE Vec<A> sums_of_all(const Task& task, const A* product, int j) {
  const A* table = static_cast<const A*>(task.table);
  Vec<A> sum{};
  for (int p = 0; p < task.m; ++p) sum += load(table + p * task.padded + j) * product[p];
  return sum;
}

// The same of combinations whose positions are bits: products with 0 and 1 here too, so that no bit differs.
template <class A>
TERSOR_INLINE Vec<A> sums_of_some(const Task& task, const A* product, const typename Simd<A>::Whole* rows) {
  using Mask = typename Simd<A>::Mask;
  Mask kept;
  __builtin_memcpy(&kept, rows, sizeof(Mask));
  Vec<A> sum{};
  for (int p = 0; p < task.m; ++p) {
    sum += __builtin_convertvector((kept >> p) & typename Simd<A>::Whole(1), Vec<A>) * product[p];
  }
  return sum;
}

template <class T, class A>
static void backward(const Task& task, int64_t first, int64_t end) {
  constexpr int lanes = Simd<A>::lanes;
  const Stored& stored = task.stored;
  const T* weight = static_cast<const T*>(task.weight);
  const T* grad = static_cast<const T*>(task.grad_output);
  T* output = static_cast<T*>(task.output);
  const A* scores = static_cast<const A*>(task.scores) + first * stored.count;
  A* grad_scores = static_cast<A*>(task.grad_scores) + first * stored.count;
  typename Simd<A>::Whole rows[MOST_STORED];
  std::fill(rows + stored.count, rows + stored.count + lanes, 0);
  BitReader reader(task.given_mask, first * task.m);
  Walk walk(task, first * task.m);
  for (int64_t g = first; g < end; ++g, scores += stored.count, grad_scores += stored.count) {
    const uint32_t kept = reader.next(task.m);
    A product[MOST];
    for (int p = 0; p < task.m; ++p) {
      const int64_t at = walk.next();
      product[p] = static_cast<A>(weight[at]) * static_cast<A>(grad[at]);
      output[at] = kept >> p & 1 ? grad[at] : T(0);
    }
    if (!stored.all() && !stored.read(g, rows)) *task.invalid = true;
    for (int j = 0; j < stored.count; j += lanes) {
      // The last vector reaches back where it can: lanes loaded one by one take longer than all of them again.
      if (j + lanes > stored.count && stored.count >= lanes) j = stored.count - lanes;
      const Vec<A> sum = stored.all() ? sums_of_all(task, product, j) : sums_of_some(task, product, rows + j);
      const int count = std::min(lanes, stored.count - j);
      const Vec<A> score = load_first(scores + j, count);
      store_first<A>(grad_scores + j, score != 0 ? sum : Vec<A>{}, count);
    }
  }
}

template <class T, class A>
static Kernels nm_kernels() {
  return {forward<T, A>, backward<T, A>};
}

}  // namespace TERSOR_ISA
}  // namespace tersor::sparsity

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

template <class T, class A>
static void forward(const Task& task, int64_t first, int64_t end) {
  const T* weight = static_cast<const T*>(task.weight);
  T* output = static_cast<T*>(task.output);
  const A* scores = static_cast<const A*>(task.scores) + first * task.combinations;
  BitWriter writer(task.mask, first * task.m);
  BitReader reader(task.given_mask ? task.given_mask : task.mask, first * task.m);
  Walk walk(task, first * task.m);
  for (int64_t g = first; g < end; ++g, scores += task.combinations) {
    const uint32_t kept =
        task.given_mask ? reader.next(task.m) : kept_positions(scores, task.combinations, task.patterns);
    writer.put(kept, task.m);
    for (int p = 0; p < task.m; ++p) {
      const int64_t at = walk.next();
      output[at] = kept >> p & 1 ? weight[at] : T(0);
    }
  }
}

template <class T, class A>
static void backward(const Task& task, int64_t first, int64_t end) {
  constexpr int lanes = Simd<A>::lanes;
  const T* weight = static_cast<const T*>(task.weight);
  const T* grad = static_cast<const T*>(task.grad_output);
  T* output = static_cast<T*>(task.output);
  const A* table = static_cast<const A*>(task.table);
  const A* scores = static_cast<const A*>(task.scores) + first * task.combinations;
  A* grad_scores = static_cast<A*>(task.grad_scores) + first * task.combinations;
  BitReader reader(task.given_mask, first * task.m);
  Walk walk(task, first * task.m);
  for (int64_t g = first; g < end; ++g, scores += task.combinations, grad_scores += task.combinations) {
    const uint32_t kept = reader.next(task.m);
    A product[MOST];
    for (int p = 0; p < task.m; ++p) {
      const int64_t at = walk.next();
      product[p] = static_cast<A>(weight[at]) * static_cast<A>(grad[at]);
      output[at] = kept >> p & 1 ? grad[at] : T(0);
    }
    for (int j = 0; j < task.combinations; j += lanes) {
      Vec<A> sum{};
      for (int p = 0; p < task.m; ++p) sum += load(table + p * task.padded + j) * product[p];
      const int count = std::min(lanes, task.combinations - j);
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

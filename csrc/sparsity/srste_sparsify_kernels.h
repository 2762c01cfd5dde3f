// The kernels of srste_sparsify.cpp, compiled once per instruction set (foreach_isa.h includes this file).

namespace tersor::sparsity {
namespace TERSOR_ISA {

using namespace ::tersor::TERSOR_ISA;

// Less in absolute value; NaN is greater than every number.
template <class A>
TERSOR_INLINE bool smaller(A a, A b) {
  return a < b || (a == a && b != b);
}

template <class T, class A>
static void srste_forward(const Task& task, int64_t first, int64_t end) {
  const T* weight = static_cast<const T*>(task.weight);
  T* output = static_cast<T*>(task.output);
  BitWriter writer(task.mask, first * task.m);
  Walk walk(task, first * task.m);
  for (int64_t g = first; g < end; ++g) {
    int64_t at[MOST];
    A size[MOST];
    int rank[MOST] = {};  // how many elements of the group are zeroed before this one
    for (int p = 0; p < task.m; ++p) at[p] = walk.next(), size[p] = std::fabs(static_cast<A>(weight[at[p]]));
    for (int p = 1; p < task.m; ++p) {
      for (int q = 0; q < p; ++q) {
        const bool later = smaller(size[p], size[q]);  // of equal ones the lower index goes first
        rank[p] += !later, rank[q] += later;
      }
    }
    uint32_t kept = 0;
    for (int p = 0; p < task.m; ++p) {
      const bool keep = rank[p] >= task.m - task.n;
      kept |= static_cast<uint32_t>(keep) << p;
      output[at[p]] = keep ? weight[at[p]] : T(0);
    }
    writer.put(kept, task.m);
  }
}

template <class T, class A>
static void srste_backward(const Task& task, int64_t first, int64_t end) {
  const T* weight = static_cast<const T*>(task.weight);
  const T* grad = static_cast<const T*>(task.grad_output);
  T* output = static_cast<T*>(task.output);
  const A decay = static_cast<A>(task.decay);
  BitReader reader(task.given_mask, first * task.m);
  Walk walk(task, first * task.m);
  for (int64_t g = first; g < end; ++g) {
    const uint32_t kept = reader.next(task.m);
    for (int p = 0; p < task.m; ++p) {
      const int64_t at = walk.next();
      const A pruned = kept >> p & 1 ? A(0) : decay * static_cast<A>(weight[at]);
      output[at] = static_cast<T>(static_cast<A>(grad[at]) + pruned);
    }
  }
}

template <class T, class A>
static Kernels srste_kernels() {
  return {srste_forward<T, A>, srste_backward<T, A>};
}

}  // namespace TERSOR_ISA
}  // namespace tersor::sparsity

// The kernel of match_tokens.cpp, compiled once per instruction set (foreach_isa.h includes this file).
#include "product.h"
#include "tokens/rank_kernels.h"

namespace tersor::tokens {
namespace TERSOR_ISA {

// The sum of a token's keys over the heads, in their order, divided by its length; stored in whole vectors.
template <class T, class A>
TERSOR_INLINE void unit_key(const char* key, const Match& task, A* to) {
  constexpr int64_t lanes = Simd<A>::lanes;
  Vec<A> square{};
  for (int64_t c = 0; c < task.head_dim; c += lanes) {
    const int count = static_cast<int>(std::min(lanes, task.head_dim - c));
    Vec<A> sum{};
    for (int64_t h = 0; h < task.heads; ++h) {
      sum += load_as<A>(reinterpret_cast<const T*>(key + h * task.keys_head) + c, count);
    }
    store<A>(to + c, sum);
    square = fma<A>(sum, sum, square);
  }
  const A length = static_cast<A>(__builtin_sqrt(total(square)));
  for (int64_t c = 0; c < task.head_dim; c += lanes) store<A>(to + c, load(to + c) / length);
}

// The greatest of `count` numbers from `first` on, and the lowest place that has it; NaN is never greater.
template <class A>
TERSOR_INLINE A find_greatest(const A* numbers, int64_t first, int64_t count, int64_t& place) {
  using Mask = typename Simd<A>::Mask;
  using Whole = typename Simd<A>::Whole;
  constexpr int64_t lanes = Simd<A>::lanes;
  Mask lane, where;
  for (int i = 0; i < lanes; ++i) lane[i] = i, where[i] = static_cast<Whole>(first);
  Vec<A> greatest = splat(-static_cast<A>(__builtin_inf()));
  for (int64_t c = 0; c < count; c += lanes) {
    const Vec<A> value = load(numbers + c);
    const Mask own = lane + static_cast<Whole>(c);
    const Mask greater = (value > greatest) & (own >= static_cast<Whole>(first)) & (own < static_cast<Whole>(count));
    greatest = greater ? value : greatest;
    where = greater ? own : where;
  }
  A best = greatest[0];
  place = where[0];
  for (int i = 1; i < lanes; ++i) {
    if (greatest[i] > best || (greatest[i] == best && where[i] < place)) best = greatest[i], place = where[i];
  }
  return best;
}

// New places of one image's tokens. Of a's the best `count`, numbered from the first that is not protected, go to
// their partners in b.
TERSOR_INLINE void place_tokens(const Match& task, const int64_t* ranked, const int64_t* partner, int64_t* index) {
  const int64_t left = task.tokens_a() - task.count, first = task.first_a();
  std::fill(index, index + task.length, int64_t(-1));
  const auto place_b = [&](int64_t j) { return j < task.first_b() ? int64_t(1) : left + j; };
  for (int64_t j = 0; j < task.tokens_b(); ++j) index[2 * j + 1] = place_b(j);
  for (int64_t i = 0; i < task.count; ++i) {
    const int64_t token = first + ranked[i];
    index[2 * token] = place_b(partner[token]);
  }
  int64_t place = 0;
  for (int64_t i = 0; i < task.tokens_a(); ++i) {
    if (index[2 * i] >= 0) continue;
    index[2 * i] = place;
    place += place == 0 && task.first_b() ? 2 : 1;  // the distillation token comes second
  }
}

template <class T, class A>
static void match_images(const Match& task, int64_t begin, int64_t end, char* scratch) {
  constexpr int64_t lanes = Simd<A>::lanes;
  const int64_t pitch = task.unit_pitch(), columns = task.similarity_pitch(), first = task.first_a();
  const int64_t a = task.tokens_a(), b = task.tokens_b();
  A* units = reinterpret_cast<A*>(scratch);
  A* planes = units + task.units();
  A* block = planes + task.planes();
  A* best = block + task.block();
  int64_t* partner = reinterpret_cast<int64_t*>(best + task.best());
  int64_t* ranked = partner + task.best();
  char* ranking = reinterpret_cast<char*>(ranked + task.best());
  const auto zero = [](int64_t) { return static_cast<const A*>(nullptr); };
  for (int64_t image = begin; image < end; ++image) {
    const char* key = task.keys + image * task.keys_batch;
    for (int64_t i = 0; i < task.length; ++i) unit_key<T>(key + i * task.keys_row, task, units + i * pitch);
    for (int64_t j = 0; j < b; j += lanes) {
      const int there = static_cast<int>(std::min(lanes, b - j));
      transpose_in(units + (2 * j + 1) * pitch, 2 * pitch, there, task.head_dim, planes + j, columns);
    }
    for (int64_t i = first; i < a; i += Match::ROWS) {
      const int64_t rows = std::min(Match::ROWS, a - i);
      product_columns<A>(rows, b, task.head_dim, units + 2 * i * pitch, 2 * pitch, 1, planes, columns, zero, block,
                         columns);
      for (int64_t r = 0; r < rows; ++r) {
        best[i + r] = find_greatest(block + r * columns, task.first_b(), b, partner[i + r]);
      }
    }
    rank_rows<A>(best + first, a - first, 0, 1, ranked, ranking);
    place_tokens(task, ranked, partner, task.index + image * task.length);
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor::tokens

// Small matrix products for one instruction set. A kernel's body includes this file inside its level's target.

namespace tersor {
namespace TERSOR_ISA {

constexpr int PRODUCT_VECTORS = TERSOR_ISA_LEVEL == 2 ? 4 : 2;  // most of them side by side in one tile

// Rows of a tile whose sums fill the registers: of 32 at level 2, of 16 elsewhere, with room for what is multiplied.
template <int VECTORS>
constexpr int product_rows() {
  if (TERSOR_ISA_LEVEL == 2) return VECTORS == 4 ? 6 : VECTORS == 3 ? 8 : VECTORS == 2 ? 12 : 16;
  return VECTORS == 2 ? 6 : 12;
}

// One tile of C = start + A * B: `ROWS` rows of `VECTORS` vectors, each summed over `depth` in order.
template <class A, int ROWS, int VECTORS, class Start>
TERSOR_INLINE void product_tile(int64_t row, int64_t depth, const A* a, int64_t row_a, int64_t step_a, const A* b,
                                int64_t step_b, Start&& start, A* c, int64_t row_c) {
  constexpr int lanes = Simd<A>::lanes;
  Vec<A> sum[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    const A* from = start(row + i);
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sum[i][v] = from ? load(from + v * lanes) : Vec<A>{};
  }
  const A* left = a + row * row_a;
  for (int64_t k = 0; k < depth; ++k, left += step_a, b += step_b) {
    Vec<A> right[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) right[v] = load(b + v * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Vec<A> factor = splat(left[i * row_a]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[i][v] = fma<A>(factor, right[v], sum[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) store<A>(c + (row + i) * row_c + v * lanes, sum[i][v]);
  }
}

struct Nothing {  // between tiles
  void operator()() const {}
};

// C = start + A * B for `rows` rows of `VECTORS` vectors. Element (i, k) of A lies at a[i * row_a + k * step_a], row k of
// B at b + k * step_b; start(i) points at what row i begins with, or is null for zeros. between() is called after each
// large tile, a few hundred cycles of arithmetic that leave the memory idle.
template <class A, int VECTORS, class Start, class Between>
static void product(int64_t rows, int64_t depth, const A* a, int64_t row_a, int64_t step_a, const A* b, int64_t step_b,
                    Start start, A* c, int64_t row_c, Between&& between) {
  constexpr int ROWS = product_rows<VECTORS>();
  int64_t row = 0;
  for (; row + ROWS <= rows; row += ROWS) {
    product_tile<A, ROWS, VECTORS>(row, depth, a, row_a, step_a, b, step_b, start, c, row_c);
    between();
  }
  for (; row + ROWS / 2 <= rows; row += ROWS / 2) {
    product_tile<A, ROWS / 2, VECTORS>(row, depth, a, row_a, step_a, b, step_b, start, c, row_c);
  }
  for (; row + 2 <= rows; row += 2) {
    product_tile<A, 2, VECTORS>(row, depth, a, row_a, step_a, b, step_b, start, c, row_c);
  }
  if (row < rows) product_tile<A, 1, VECTORS>(row, depth, a, row_a, step_a, b, step_b, start, c, row_c);
}

// The same for any number of columns, rounded up to whole vectors: whatever is read must be there.
template <class A, class Start, class Between = Nothing>
static void product_columns(int64_t rows, int64_t columns, int64_t depth, const A* a, int64_t row_a, int64_t step_a,
                            const A* b, int64_t step_b, Start start, A* c, int64_t row_c,
                            Between&& between = {}) {
  constexpr int64_t lanes = Simd<A>::lanes;
  for (int64_t at = 0, left; (left = (columns - at + lanes - 1) / lanes) > 0;) {
    const auto from = [&](int64_t i) { const A* p = start(i); return p ? p + at : p; };
    const auto run = [&](auto vectors) {
      constexpr int n = decltype(vectors)::value;
      product<A, n>(rows, depth, a, row_a, step_a, b + at, step_b, from, c + at, row_c, between);
      at += n * lanes;
    };
    if constexpr (PRODUCT_VECTORS == 4) {
      if (left >= 4) run(std::integral_constant<int, 4>{});
      else if (left == 3) run(std::integral_constant<int, 3>{});
      else if (left == 2) run(std::integral_constant<int, 2>{});
      else run(std::integral_constant<int, 1>{});
    } else {
      if (left >= 2) run(std::integral_constant<int, 2>{});
      else run(std::integral_constant<int, 1>{});
    }
  }
}

}  // namespace TERSOR_ISA
}  // namespace tersor

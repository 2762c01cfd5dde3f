// What the kernels of resplit_tokens.cpp are told.
#pragma once

#include "tokens/rows.h"

namespace tersor::tokens {

struct Resplit {
  int64_t batch, side, channels, chosen;
  bool selected;  // fine patches and reuse are of the chosen tokens only, in the sequence's order
  const int64_t* order;     // (batch, count)
  Rows coarse, fine, reuse, position, cls;  // data is null where not given
  OutRows tokens;

  // Backward; data is null where not wanted.
  const int32_t* rank;  // (batch, count): of each coarse token, -1 for none
  Rows grad_tokens;
  OutRows grad_coarse, grad_fine, grad_reuse, grad_position, grad_cls;
  bool own_cls;  // each image has a class token of its own

  int64_t count() const { return side * side; }
  // The fine patch at a corner (0: top left, 1: top right, 2: bottom left, 3: bottom right) of a coarse token.
  int64_t child(int64_t token, int corner) const {
    return 4 * token - 2 * (token % side) + (corner >> 1) * 2 * side + (corner & 1);
  }
  int64_t place(int64_t rank, int corner) const { return 1 + corner * chosen + rank; }  // in the sequence
  int64_t place_left(int64_t rank) const { return 1 + 3 * chosen + rank; }
};

}  // namespace tersor::tokens

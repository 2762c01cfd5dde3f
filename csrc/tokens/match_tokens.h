// What the kernel of match_tokens.cpp is told.
#pragma once

#include "tokens/rank.h"

namespace tersor::tokens {

struct Match {
  static constexpr int64_t ROWS = 24;  // similarities of so many tokens are in the cache together

  int64_t length, heads, head_dim, count, guarded;  // the first `guarded` tokens are not merged
  const char* keys;                                 // head_dim contiguous; strides in bytes
  int64_t keys_batch, keys_row, keys_head;
  int64_t* index;  // (batch, length)

  int64_t tokens_a() const { return (length + 1) / 2; }
  int64_t tokens_b() const { return length / 2; }
  int64_t first_a() const { return guarded > 0; }  // what comes before is protected
  int64_t first_b() const { return guarded > 1; }

  // In elements, rounded up to the widest vectors.
  static int64_t whole(int64_t elements) { return (elements + 15) / 16 * 16; }
  int64_t unit_pitch() const { return whole(head_dim); }
  int64_t similarity_pitch() const { return whole(tokens_b()); }

  // In elements of at most 8 bytes: unit keys, those of b transposed, a block of similarities, each token's best one.
  int64_t units() const { return length * unit_pitch(); }
  int64_t planes() const { return head_dim * similarity_pitch(); }
  int64_t block() const { return ROWS * similarity_pitch(); }
  int64_t best() const { return whole(tokens_a()); }
  int64_t elements() const { return units() + planes() + block() + best(); }
  // And the best ones' places and order, and what ranking takes.
  int64_t scratch_bytes() const { return 8 * (elements() + 2 * best()) + bytes_to_rank(tokens_a()); }
};

}  // namespace tersor::tokens

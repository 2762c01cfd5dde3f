// Scratch memory of one thread, handed out piece by piece.
#pragma once

#include <cstdint>

namespace tersor {

// With no memory it only counts, so that one constructor both measures and lays out a workspace.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class A>
  A* take(int64_t count) {
    A* taken = base ? reinterpret_cast<A*>(base + used) : nullptr;
    used += (count * static_cast<int64_t>(sizeof(A)) + 63) / 64 * 64;
    return taken;
  }
};

}  // namespace tersor

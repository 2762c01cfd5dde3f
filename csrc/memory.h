// Working memory of a call or of one thread, on a cache line's border.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace tersor {

struct FreeMemory {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<char, FreeMemory>;

inline Memory allocate(int64_t bytes) {
  bytes = (std::max<int64_t>(bytes, 1) + 63) / 64 * 64;
  Memory memory(static_cast<char*>(std::aligned_alloc(64, bytes)));
  if (!memory) throw std::bad_alloc();
#ifdef TERSOR_POISON
  std::memset(memory.get(), 0xff, bytes);  // NaN in every type
#endif
  return memory;
}

}  // namespace tersor

#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace tersor {
namespace {

constexpr const char* names[] = {"baseline", "x86-64-v3", "x86-64-v4"};

Isa initial() {
  const char* wanted = std::getenv("TERSOR_CPU_ISA");
  const Isa best = cpu_isa_best();
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int level = 0; level < 3; ++level) {
    if (std::strcmp(wanted, names[level]) == 0) {
      return level < static_cast<int>(best) ? static_cast<Isa>(level) : best;
    }
  }
  return Isa::baseline;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> level{initial()};
  return level;
}

}  // namespace

Isa cpu_isa_best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return Isa::x86_64_v4;
  if (__builtin_cpu_supports("x86-64-v3")) return Isa::x86_64_v3;
#endif
  return Isa::baseline;
}

Isa cpu_isa() { return current().load(std::memory_order_relaxed); }

bool set_cpu_isa(Isa level) {
  if (level > cpu_isa_best()) return false;
  current().store(level, std::memory_order_relaxed);
  return true;
}

const char* isa_name(Isa level) { return names[static_cast<int>(level)]; }

}  // namespace tersor

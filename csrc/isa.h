// The instruction set that CPU kernels run on: chosen once, at run time.
#pragma once

#include <cstdint>

#define TERSOR_EXPORT __attribute__((visibility("default")))

namespace tersor {

// Levels of the x86-64 psABI. Other architectures have the baseline only.
enum class Isa : int { baseline = 0, x86_64_v3 = 1, x86_64_v4 = 2 };

// TERSOR_CPU_ISA or the best level this processor has, whichever is lower; baseline if the name is unknown.
TERSOR_EXPORT Isa cpu_isa();
TERSOR_EXPORT Isa cpu_isa_best();
// Lowers or raises the level within what the processor has; returns false and changes nothing above that.
TERSOR_EXPORT bool set_cpu_isa(Isa level);

TERSOR_EXPORT const char* isa_name(Isa level);

}  // namespace tersor

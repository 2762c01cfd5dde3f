// Compiles the file named by TERSOR_BODY once per instruction set, each time in a namespace of its own, inside one
// translation unit and with one command line. The body is the including file itself, between #ifdef TERSOR_ISA.
// Standard headers come before the first target pragma, so that no library code is built for a higher level.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"

namespace tersor {
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
}  // namespace tersor

#define TERSOR_ISA baseline
#define TERSOR_ISA_LEVEL 0
#define TERSOR_VECTOR_BYTES 16
#include "simd.h"
#include "simd_tokens.h"
#include TERSOR_BODY
#undef TERSOR_ISA
#undef TERSOR_ISA_LEVEL
#undef TERSOR_VECTOR_BYTES

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v3"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#endif
#define TERSOR_ISA x86_64_v3
#define TERSOR_ISA_LEVEL 1
#define TERSOR_VECTOR_BYTES 32
#include "simd.h"
#include "simd_tokens.h"
#include TERSOR_BODY
#undef TERSOR_ISA
#undef TERSOR_ISA_LEVEL
#undef TERSOR_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#endif
#define TERSOR_ISA x86_64_v4
#define TERSOR_ISA_LEVEL 2
#define TERSOR_VECTOR_BYTES 64
#include "simd.h"
#include "simd_tokens.h"
#include TERSOR_BODY
#undef TERSOR_ISA
#undef TERSOR_ISA_LEVEL
#undef TERSOR_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// The function of that name for the level in use.
#define TERSOR_FOR_ISA(...)                                                   \
  (::tersor::cpu_isa() == ::tersor::Isa::x86_64_v4   ? x86_64_v4::__VA_ARGS__ \
   : ::tersor::cpu_isa() == ::tersor::Isa::x86_64_v3 ? x86_64_v3::__VA_ARGS__ \
                                                     : baseline::__VA_ARGS__)
#else
#define TERSOR_FOR_ISA(...) (baseline::__VA_ARGS__)
#endif

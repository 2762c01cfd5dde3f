// The input of the integer products: how it is rounded to codes, and which instructions multiply them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "isa.h"

namespace tersor::quantized {

constexpr int BLOCK = 8, RUN = 16;  // output and input channels of a block of weights, as Python packs them

// One sample's: codes are q + half, from 0 on; their values (code + shift) / scale.
struct Quantizer {
  float scale, zero, least, greatest;
  int32_t half;
  int64_t pad;      // the code that stands for 0 around the image,
  double excess;    // and what it is too much by, in codes
  double shift;
};

inline bool has_byte_products() {
#if defined(__x86_64__)
  // TERSOR_CPU_VNNI=0 leaves the extension aside, so that tests reach the kernels of processors without it.
  static const char* const wanted = std::getenv("TERSOR_CPU_VNNI");
  static const bool has = __builtin_cpu_supports("avx512vnni") && !(wanted && std::strcmp(wanted, "0") == 0);
  return has && cpu_isa() == Isa::x86_64_v4;
#else
  return false;
#endif
}

// In float32 and in the order of fake_quantize_bounds.
inline Quantizer quantizer(const char* name, float lower, float upper, int64_t bits, bool relu) {
  STD_TORCH_CHECK(std::isfinite(lower) && std::isfinite(upper) && lower < upper, name,
                  ": lower must be finite and less than upper, got lower ", lower, " and upper ", upper);
  Quantizer q{};
  q.half = 1 << (bits - 1);
  const float half = static_cast<float>(q.half);
  q.scale = static_cast<float>((1 << bits) - 1) / (upper - lower);
  q.zero = std::nearbyint(q.scale * lower) + half;
  const float top = std::min(half, 255.0f - half);  // the extra level of 8 bits has no code
  q.least = std::max(q.scale * lower - q.zero, -half);
  q.greatest = std::min(q.scale * upper - q.zero, top);
  if (relu) q.least = std::min(std::max(q.least, 0.0f * q.scale - q.zero), q.greatest);
  q.shift = static_cast<double>(q.zero) - half;
  q.pad = static_cast<int64_t>(std::min(std::max(-q.shift, 0.0), 255.0));
  q.excess = static_cast<double>(q.pad) + q.shift;
  return q;
}

inline const float* floats(const torch::stable::Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == torch::headeronly::ScalarType::Float && t.numel() == count, name,
                  " must be a CPU tensor of ", count, " float32 numbers");
  return static_cast<const float*>(t.const_data_ptr());
}

// One for all samples, or one for each.
inline std::vector<Quantizer> quantizers(const char* name, const torch::stable::Tensor& lower,
                                         const torch::stable::Tensor& upper, int64_t batch, int64_t bits, bool relu) {
  STD_TORCH_CHECK(bits >= 2 && bits <= 8, "bits must be 2 to 8");
  const int64_t lowers = lower.numel() == 1 ? 1 : batch, uppers = upper.numel() == 1 ? 1 : batch;
  const float *l = floats(lower, lowers, "lower"), *u = floats(upper, uppers, "upper");
  std::vector<Quantizer> all;
  for (int64_t i = 0; i < std::max(lowers, uppers); ++i) {
    all.push_back(quantizer(name, l[lowers == 1 ? 0 : i], u[uppers == 1 ? 0 : i], bits, relu));
  }
  return all;
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace tersor::quantized

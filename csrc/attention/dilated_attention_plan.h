// How the CUDA kernels of dilated attention cover a problem: tiles, threads, shared memory. Host code only; the
// CPU emulation of the tests decides by it too.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda_common.cuh"

namespace tersor::dilated_attention {

constexpr int max_threads = 224;  // a tile of 8 x 14 positions with two lanes each
constexpr int max_groups = 256;  // a kernel's parameters may take 4 KiB

// Base and strides in elements; `packed`: every pack of four channels is aligned and contiguous.
struct Strided {
  const void* data;
  int64_t batch, row, column, head, channel;
  int packed;
};

struct Problem {
  int height, width, heads, head_dim, kernel_size, heads_per_group;
  int tile_height, tile_width, tiles_y, tiles_x;
  int lanes, packs, pitch;  // packs per position, and elements from one position to the next in shared memory
  float scale;
  int dilation[max_groups];
};

// Positions lie at odd multiples of `lanes` packs, so that the 16 (half types) or 8 (float32) threads that shared
// memory serves at a time fall into different banks.
constexpr int pitch_of(int packs, int lanes) {
  const int each = (packs + lanes - 1) / lanes;
  return (each % 2 == 1 || lanes >= 16 ? each : each + 1) * lanes * pack_size;
}

// What the host decides before a launch.
struct Plan {
  Problem problem{};
  bool shared = false, exact = false;  // exact: a variant without masks, for the published head sizes and 64
  unsigned blocks = 0, threads = 0;
  std::size_t shared_bytes = 0;
  std::string refusal;  // why these kernels cannot run the call; empty if they can
};

// `packed`: all inputs are. `shared_limit`: bytes of shared memory that a block may take.
inline Plan make_plan(const std::vector<int64_t>& sizes, int64_t element_size, int64_t kernel_size,
                      const std::vector<int64_t>& dilation, double scale, bool packed, bool backward,
                      int64_t shared_limit) {
  Plan plan;
  Problem& p = plan.problem;
  const int64_t batch = sizes[0], height = sizes[1], width = sizes[2], heads = sizes[3], head_dim = sizes[4];
  const int64_t groups = static_cast<int64_t>(dilation.size()), longest = std::max(height, width);
  const auto refuse = [&plan](const std::string& reason) {
    plan.refusal = "dilated_attention: the CUDA kernels take " + reason;
    return plan;
  };
  if (head_dim < 1 || head_dim > 256) return refuse("head_dim from 1 to 256, got " + std::to_string(head_dim));
  if (groups < 1 || groups > max_groups || heads % groups != 0) {
    return refuse("up to " + std::to_string(max_groups) + " dilations that divide the heads, got " +
                  std::to_string(groups) + " for " + std::to_string(heads) + " heads");
  }
  if (std::min({height, width, heads}) < 1 || std::max(longest, heads) > (1 << 28)) {
    return refuse("H, W and heads from 1 to 2^28");
  }
  int64_t reach = 0;
  for (int64_t g = 0; g < groups; ++g) {
    // Beyond twice the image every tap but the centre is outside, whatever the distance; even, for an even kernel.
    const int64_t d = std::min(dilation[g], 2 * longest);
    if (kernel_size < 1 || d < 1 || d * (kernel_size - 1) % 2 != 0) {
      return refuse("positive dilation and kernel_size whose window has a centre");
    }
    if (kernel_size > (1 << 15) || d * (kernel_size - 1) > (1 << 30)) return refuse("windows up to 2^30 wide");
    p.dilation[g] = static_cast<int>(d);
    reach = std::max(reach, d * (kernel_size - 1) / 2);
  }
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  p.height = static_cast<int>(height);
  p.width = static_cast<int>(width);
  p.heads = static_cast<int>(heads);
  p.head_dim = static_cast<int>(head_dim);
  p.kernel_size = static_cast<int>(kernel_size);
  p.heads_per_group = static_cast<int>(heads / groups);
  p.scale = static_cast<float>(scale);
  // About 8 x 16, and equal over the image: 56 x 56 is covered by 7 x 4 tiles of 8 x 14 without a remainder.
  p.tiles_y = static_cast<int>(divide_up(height, 8));
  p.tiles_x = static_cast<int>(divide_up(width, 16));
  p.tile_height = static_cast<int>(divide_up(height, p.tiles_y));
  p.tile_width = static_cast<int>(divide_up(width, p.tiles_x));
  p.tiles_y = static_cast<int>(divide_up(height, p.tile_height));  // rounding may leave the last ones empty
  p.tiles_x = static_cast<int>(divide_up(width, p.tile_width));
  p.packs = static_cast<int>(divide_up(head_dim, pack_size));
  const int64_t halo = std::min(height, p.tile_height + 2 * reach) * std::min(width, p.tile_width + 2 * reach);
  const auto bytes = [&](int lanes) {
    return halo * (2 * element_size * pitch_of(p.packs, lanes) + (backward ? 2 * int64_t{sizeof(float)} : 0));
  };
  int lanes = 1;
  while (lanes * 2 < p.packs) lanes *= 2;  // at most two packs in a thread
  const int exact_lanes = head_dim == 24 ? 2 : lanes;
  plan.exact = packed && kernel_size == 3 && (head_dim == 24 || head_dim == 32 || head_dim == 64) &&
               bytes(exact_lanes) <= shared_limit;
  if (plan.exact) lanes = exact_lanes;
  p.lanes = lanes;
  p.pitch = pitch_of(p.packs, lanes);
  plan.shared = bytes(lanes) <= shared_limit;
  plan.shared_bytes = plan.shared ? static_cast<std::size_t>(bytes(lanes)) : 0;
  const int64_t wanted = int64_t{p.tile_height} * p.tile_width * lanes, passes = divide_up(wanted, max_threads);
  plan.threads = static_cast<unsigned>(divide_up(divide_up(wanted, passes), 32) * 32);
  const int64_t planes = int64_t{p.tiles_y} * p.tiles_x;
  if (batch > 0 && (planes > INT32_MAX / heads || batch > INT32_MAX / (planes * heads))) {
    return refuse("up to 2^31 - 1 tiles of 8 x 16 positions in a call");
  }
  plan.blocks = static_cast<unsigned>(batch * planes * heads);
  return plan;
}

// Whether every pack of four channels is aligned and contiguous; strides of axes of length 1 do not count.
inline Strided make_strided(const void* data, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                            int64_t element_size) {
  bool packed = sizes[4] % pack_size == 0 && strides[4] == 1;
  packed = packed && reinterpret_cast<std::uintptr_t>(data) % (pack_size * element_size) == 0;
  for (int axis = 0; axis < 4; ++axis) packed = packed && (sizes[axis] == 1 || strides[axis] % pack_size == 0);
  return {data, strides[0], strides[1], strides[2], strides[3], strides[4], packed};
}

}  // namespace tersor::dilated_attention

// What CUDA kernels share: four values moved at once, sums over groups of lanes, the launch on torch's stream.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>

// The block's dynamic shared memory; a CPU emulation of launches brings its own.
#ifndef TERSOR_DYNAMIC_SHARED
#define TERSOR_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace tersor {

// Four neighbouring values: one 8-byte access in half precision, one 16-byte access in float32.
constexpr int pack_size = 4;

template <typename T>
struct alignas(pack_size * sizeof(T)) Pack {
  T value[pack_size];
};

template <typename T>
__device__ inline Pack<T> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T>*>(from);
}

template <typename T>
__device__ inline void store_pack(T* to, const Pack<T>& pack) {
  *reinterpret_cast<Pack<T>*>(to) = pack;
}

// The sum over a group of `lanes` neighbouring threads (a power of two up to 32), the same bits in each of them.
// All threads of the warp must arrive.
__device__ inline float sum_over_lanes(float value, int lanes) {
#pragma unroll
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

}  // namespace tersor

#ifdef __CUDACC__

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

namespace tersor {

// One launch on the current stream of `device`, which must be the current device.
template <typename Parameters>
void launch(void (*kernel)(Parameters), unsigned blocks, unsigned threads, std::size_t shared_bytes, int device,
            const Parameters& parameters) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  if (shared_bytes > 48 * 1024) {  // beyond 48 KiB the driver wants to be asked, per kernel and device
    STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(parameters);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace tersor

#endif

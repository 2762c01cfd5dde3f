// The CUDA operators dilated_attention_forward and _backward: unpack, plan, launch.
#include "dilated_attention.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace tersor::dilated_attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::vector<int64_t> sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

Strided strided(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return make_strided(tensor.const_data_ptr(), sizes_of(tensor), {strides.begin(), strides.end()},
                      static_cast<int64_t>(tensor.element_size()));
}

// Half of what a block may take, so that two blocks share a multiprocessor; above that the caches serve the taps.
int64_t shared_limit(int device) {
  int bytes = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes / 2;
}

// Python has checked the arguments; what is checked again here protects memory.
void check(const Tensor& query, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 5 && sizes_of(tensor) == sizes_of(query) &&
                      tensor.scalar_type() == query.scalar_type() && tensor.is_cuda() &&
                      tensor.get_device_index() == query.get_device_index(),
                  "dilated_attention: ", name, " must have the shape, dtype and CUDA device of query");
}

Plan plan_for(const Tensor& query, int64_t kernel_size, const std::vector<int64_t>& dilation, double scale,
              bool packed, bool backward) {
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "dilated_attention: the CUDA kernels take float16, bfloat16 and float32; float64 runs with "
                  "tersor.use_backend('reference')");
  Plan plan = make_plan(sizes_of(query), static_cast<int64_t>(query.element_size()), kernel_size, dilation, scale,
                        packed, backward, shared_limit(query.get_device_index()));
  STD_TORCH_CHECK(plan.refusal.empty(), plan.refusal);
  return plan;
}

template <typename Run>
void dispatch(ScalarType dtype, Run&& run) {
  if (dtype == ScalarType::Float) return run(float{});
  if (dtype == ScalarType::Half) return run(c10::Half{});
  run(c10::BFloat16{});
}

std::tuple<Tensor, Tensor> forward(const Tensor query, const Tensor key, const Tensor value, int64_t kernel_size,
                                   std::vector<int64_t> dilation, double scale) {
  check(query, "query", query);
  check(query, "key", key);
  check(query, "value", value);
  const int device = query.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Strided q = strided(query), k = strided(key), v = strided(value);
  const Plan plan = plan_for(query, kernel_size, dilation, scale, q.packed && k.packed && v.packed, false);
  const auto sizes = sizes_of(query);
  Tensor output = torch::stable::new_empty(query, sizes);
  Tensor logsumexp =
      torch::stable::new_empty(query, {{sizes[0], sizes[3], sizes[1], sizes[2]}}, ScalarType::Float);
  if (plan.blocks == 0) return {output, logsumexp};
  const Forward args{plan.problem, q, k, v, output.mutable_data_ptr(),
                     static_cast<float*>(logsumexp.mutable_data_ptr())};
  dispatch(query.scalar_type(), [&](auto zero) {
    choose_variant(plan, [&](auto v) {
      using V = decltype(v);
      launch(forward_kernel<decltype(zero), V::lanes, V::each, V::kernel, V::shared>, plan.blocks, plan.threads,
             plan.shared_bytes, device, args);
    });
  });
  return {output, logsumexp};
}

Tensor backward(const Tensor grad_output, const Tensor query, const Tensor key, const Tensor value,
                const Tensor output, const Tensor logsumexp, int64_t kernel_size, std::vector<int64_t> dilation,
                double scale) {
  check(query, "query", query);
  check(query, "key", key);
  check(query, "value", value);
  check(query, "output", output);
  check(query, "grad_output", grad_output);
  const auto sizes = sizes_of(query);
  STD_TORCH_CHECK(logsumexp.scalar_type() == ScalarType::Float && logsumexp.is_cuda() &&
                      logsumexp.get_device_index() == query.get_device_index() &&
                      sizes_of(logsumexp) == std::vector<int64_t>({sizes[0], sizes[3], sizes[1], sizes[2]}),
                  "dilated_attention: logsumexp must be (B, heads, H, W), float32, on the CUDA device of query");
  const int device = query.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Strided g = strided(grad_output), q = strided(query), k = strided(key), v = strided(value);
  const Strided o = strided(output);
  const bool packed = g.packed && q.packed && k.packed && v.packed && o.packed;
  const Plan plan = plan_for(query, kernel_size, dilation, scale, packed, true);
  Tensor grad_qkv = torch::stable::new_empty(query, {{sizes[0], sizes[1], sizes[2], 3, sizes[3], sizes[4]}});
  if (plan.blocks == 0) return grad_qkv;
  const Tensor lse = torch::stable::contiguous(logsumexp);
  const Backward args{plan.problem, g, q, k, v, o, static_cast<const float*>(lse.const_data_ptr()),
                      grad_qkv.mutable_data_ptr()};
  dispatch(query.scalar_type(), [&](auto zero) {
    choose_variant(plan, [&](auto v) {
      using V = decltype(v);
      launch(backward_kernel<decltype(zero), V::lanes, V::each, V::kernel, V::shared>, plan.blocks, plan.threads,
             plan.shared_bytes, device, args);
    });
  });
  return grad_qkv;
}

}  // namespace
}  // namespace tersor::dilated_attention

STABLE_TORCH_LIBRARY_IMPL(tersor, CUDA, m) {
  m.impl("dilated_attention_forward", TORCH_BOX(&tersor::dilated_attention::forward));
  m.impl("dilated_attention_backward", TORCH_BOX(&tersor::dilated_attention::backward));
}

// Uformer's feed-forward on the CPU (specification: pyops/attention/leff.py). The kernels are in leff_kernels.h, once per
// instruction set.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "arena.h"
#include "attention/leff.h"
#include "last_dim.h"
#include "memory.h"

#define TERSOR_BODY "attention/leff_kernels.h"
#include "foreach_isa.h"

namespace tersor::leff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The tensors of a call, each as it is used; what they hold lives as long as this.
struct Call {
  Tensor input;
  Maybe weight1, bias1, taps, tap_bias, weight2, bias2, scale, shift;
};

// What Python has checked already, once more where memory depends on it.
Maybe take(const Tensor& input, const Maybe& tensor, const char* name, std::initializer_list<int64_t> shape) {
  if (!tensor) return {};
  bool same = tensor->is_cpu() && tensor->scalar_type() == input.scalar_type() &&
              tensor->dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) same = same && tensor->size(i++) == size;
  STD_TORCH_CHECK(same, name, " must be a CPU tensor of input's dtype with a shape that fits input and weights");
  return torch::stable::contiguous(*tensor);
}

View view_of(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

const void* data_of(const Maybe& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

Call make_call(const Tensor& input, const Tensor& weight1, const Maybe& bias1, const Tensor& taps,
               const Maybe& tap_bias, const Tensor& weight2, const Maybe& bias2, const Maybe& scale,
               const Maybe& shift) {
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(input.dim() == 4 && input.is_cpu() &&
                      (dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
                       dtype == ScalarType::Double),
                  "input must be a floating-point CPU tensor (B, H, W, C)");
  STD_TORCH_CHECK(weight1.dim() == 2 && weight2.dim() == 2, "weight1 and weight2 must be (E, C) and (C_out, E)");
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "hidden_scale and hidden_shift must be given together");
  const int64_t hidden = weight1.size(0), outputs = weight2.size(0);
  STD_TORCH_CHECK(input.size(1) > 0 && input.size(2) > 0 && input.size(3) > 0 && hidden > 0 && outputs > 0,
                  "H, W, C, E and C_out must be positive");
  return {last_dim_contiguous(input),
          take(input, weight1, "weight1", {hidden, input.size(3)}),
          take(input, bias1, "bias1", {hidden}),
          take(input, taps, "depthwise_weight", {hidden, 1, 3, 3}),
          take(input, tap_bias, "depthwise_bias", {hidden}),
          take(input, weight2, "weight2", {outputs, hidden}),
          take(input, bias2, "bias2", {outputs}),
          take(input, scale, "hidden_scale", {hidden}),
          take(input, shift, "hidden_shift", {hidden})};
}

// Where torch's products in bfloat16, with the processor's own instructions, were timed to win over ours in float32: two
// cores of an EPYC with AVX512-BF16, 7 x 7 to 64 x 64 tokens, 32 to 512 channels. Python's note on the operator says so.
constexpr int64_t TORCH_CHANNELS = 64;
constexpr int64_t TORCH_HIDDEN = 1 << 16;  // hidden channels of all tokens

bool torch_multiplies(const Task& task, ScalarType dtype) {
#if defined(__x86_64__)
  return dtype == ScalarType::BFloat16 && cpu_isa() == Isa::x86_64_v4 && __builtin_cpu_supports("avx512bf16") &&
         std::min(task.channels, task.outputs) >= TORCH_CHANNELS && task.tokens() * task.hidden >= TORCH_HIDDEN;
#else
  return false;
#endif
}

Tensor linear(const Tensor& input, const Tensor& weight, const Maybe& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(input), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor transposed(const Tensor& tensor) {
  return torch::stable::transpose(tensor, 0, 1);
}

// (B, H, W, channels) as (tokens, channels).
Tensor as_rows(const Tensor& tensor) {
  return torch::stable::flatten(tensor, 0, 2);
}

Task make_task(const Call& call) {
  Task task{};
  task.batch = call.input.size(0), task.height = call.input.size(1), task.width = call.input.size(2);
  task.channels = call.input.size(3), task.hidden = call.weight1->size(0), task.outputs = call.weight2->size(0);
  task.input = view_of(call.input);
  task.given = {data_of(call.weight1), data_of(call.bias1), data_of(call.taps), data_of(call.tap_bias),
                data_of(call.weight2), data_of(call.bias2), data_of(call.scale), data_of(call.shift)};
  task.affine = call.scale.has_value();
  return task;
}

// Sets the packed parameters; returns what keeps them alive.
template <class T, class A>
Memory pack(Task& task, bool backward) {
  const auto layout = [&](Arena arena) {
    const int64_t hidden = task.padded_hidden();
    if (task.multiplies()) {
      task.columns1 = arena.take<A>(hidden * task.channels);
      if (!backward) task.rows2 = arena.take<A>(hidden * task.pitch_o);
      if (backward) task.columns2 = arena.take<A>(hidden * task.outputs);
      const bool as_is = std::is_same_v<T, A> && task.pitch_c == task.channels && hidden == task.hidden;
      if (backward && task.need_input) {
        task.rows1 = as_is ? const_cast<void*>(task.given.weight1) : arena.take<A>(hidden * task.pitch_c);
      }
    }
    task.taps = arena.take<A>(9 * hidden);
    for (void** vector : {&task.bias1, &task.tap_bias, &task.scale, &task.shift}) *vector = arena.take<A>(hidden);
    task.bias2 = arena.take<A>(task.pitch_o);
    task.careful = arena.take<uint8_t>(task.chunks);
    return arena.used;
  };
  Memory memory = allocate(layout(Arena{nullptr}));
  layout(Arena{memory.get()});
  // A chunk of 64 x 64 takes about 2 us.
  const int64_t grain = 1 + 20000 / (task.chunk * (task.channels + task.outputs));
  torch::stable::parallel_for(0, task.chunks, grain, [&](int64_t begin, int64_t end) {
    TERSOR_FOR_ISA(pack_chunks<T, A>)(task, begin, end);
  });
  return memory;
}

using Run = void (*)(const Task&, int64_t, int64_t, char*);

void run(const Task& task, int64_t units, int64_t bytes, Run kernel) {
  torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    const Memory memory = allocate(bytes);
    kernel(task, begin, end, memory.get());
  });
}

// Memory for the groups' results, and their sum afterwards.
template <class T, class A, class Units>
void run_groups(Task& task, int64_t columns, int64_t pitch, bool wanted, Units units) {
  Memory partials;
  if (task.groups > 1 && wanted) {
    partials = allocate(task.groups * task.tokens() * pitch * static_cast<int64_t>(sizeof(A)));
    task.partials = partials.get();
  }
  units();
  if (!partials) return;
  const int64_t grain = 1 + 16384 / (pitch * task.groups);
  torch::stable::parallel_for(0, task.tokens(), grain, [&](int64_t begin, int64_t end) {
    TERSOR_FOR_ISA(add_partials<T, A>)(task, begin, end, columns, pitch);
  });
}

template <class T, class A>
void run_forward(Task& task) {
  const Memory packed = pack<T, A>(task, false);
  run_groups<T, A>(task, task.outputs, task.pitch_o, task.multiplies(), [&] {
    run(task, task.batch * task.strips * task.groups, TERSOR_FOR_ISA(scratch<A>)(task, false),
        TERSOR_FOR_ISA(forward_units<T, A>));
  });
}

template <class T, class A>
void run_backward(Task& task, const Gradients& gradients) {
  const Memory packed = pack<T, A>(task, true);
  Memory sums;
  if (task.need_parameters) {
    sums = allocate(task.blocks * Sums(task).size * static_cast<int64_t>(sizeof(A)));
    task.sums = sums.get();
  }
  run_groups<T, A>(task, task.channels, task.pitch_c, task.need_input && task.multiplies(), [&] {
    run(task, task.blocks * task.groups, TERSOR_FOR_ISA(scratch<A>)(task, true), TERSOR_FOR_ISA(backward_units<T, A>));
  });
  if (!task.need_parameters) return;
  const int64_t grain = 1 + 16384 / (task.chunk * (task.channels + task.outputs) * task.blocks);
  torch::stable::parallel_for(0, task.chunks, grain, [&](int64_t begin, int64_t end) {
    const Memory rows = allocate(16 * task.pitch_c * static_cast<int64_t>(sizeof(A)));
    TERSOR_FOR_ISA(write_gradients<T, A>)(task, gradients, begin, end, reinterpret_cast<A*>(rows.get()));
  });
}

// With torch's products. Where strips are whole images, nobody reads a token again after its result is written, and one
// map serves for both.
Tensor other_map(const Task& task, const Tensor& map) {
  return task.strips == 1 ? map : torch::stable::empty_like(map);
}

Tensor forward_between(Task& task, const Call& call) {
  const Tensor inner = torch::stable::contiguous(linear(as_rows(call.input), *call.weight1, {}));
  task.inner = inner.const_data_ptr();
  task.plan(false);
  const Tensor outer = other_map(task, inner);
  task.outer = outer.mutable_data_ptr();
  run_forward<BFloat16, float>(task);
  const Tensor rows = linear(outer, *call.weight2, call.bias2);
  return torch::stable::contiguous(torch::stable::reshape(rows, {task.batch, task.height, task.width, task.outputs}));
}

void backward_between(Task& task, const Call& call, const Tensor& grad_output, const Gradients& gradients,
                      Nine& result) {
  const Tensor input = as_rows(call.input), grad = as_rows(grad_output);
  const Tensor inner = torch::stable::contiguous(linear(input, *call.weight1, {}));
  const Tensor grad_outer = torch::stable::contiguous(torch::stable::matmul(grad, *call.weight2));
  task.inner = inner.const_data_ptr(), task.grad_outer = grad_outer.const_data_ptr();
  task.plan(true);
  const Tensor outer = other_map(task, grad_outer), grad_inner = other_map(task, inner);
  task.outer = outer.mutable_data_ptr(), task.grad_inner = grad_inner.mutable_data_ptr();
  run_backward<BFloat16, float>(task, gradients);
  const auto give = [](Tensor& to, const Tensor& from) {
    to = torch::stable::contiguous(torch::stable::reshape(from, to.sizes()));
  };
  if (task.need_input) give(std::get<0>(result), torch::stable::matmul(grad_inner, *call.weight1));
  if (!task.need_parameters) return;
  give(std::get<1>(result), torch::stable::matmul(transposed(grad_inner), input));
  give(std::get<5>(result), torch::stable::matmul(transposed(grad), outer));
}

Tensor forward(const Tensor& input, const Tensor& weight1, const Maybe& bias1, const Tensor& depthwise_weight,
               const Maybe& depthwise_bias, const Tensor& weight2, const Maybe& bias2, const Maybe& hidden_scale,
               const Maybe& hidden_shift) {
  const Call call = make_call(input, weight1, bias1, depthwise_weight, depthwise_bias, weight2, bias2, hidden_scale,
                              hidden_shift);
  Task task = make_task(call);
  const ScalarType dtype = input.scalar_type();
  if (torch_multiplies(task, dtype)) return forward_between(task, call);
  task.plan(false);
  Tensor output = torch::stable::new_empty(input, {task.batch, task.height, task.width, task.outputs}, dtype);
  task.result = output.mutable_data_ptr();
  if (dtype == ScalarType::Float) run_forward<float, float>(task);
  if (dtype == ScalarType::Half) run_forward<Half, float>(task);
  if (dtype == ScalarType::BFloat16) run_forward<BFloat16, float>(task);
  if (dtype == ScalarType::Double) run_forward<double, double>(task);
  return output;
}

Nine backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight1, const Maybe& bias1,
              const Tensor& depthwise_weight, const Maybe& depthwise_bias, const Tensor& weight2, const Maybe& bias2,
              const Maybe& hidden_scale, const Maybe& hidden_shift, bool need_input, bool need_parameters) {
  const Call call = make_call(input, weight1, bias1, depthwise_weight, depthwise_bias, weight2, bias2, hidden_scale,
                              hidden_shift);
  Task task = make_task(call);
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(grad_output.is_cpu() && grad_output.scalar_type() == dtype && grad_output.dim() == 4 &&
                      grad_output.size(0) == task.batch && grad_output.size(1) == task.height &&
                      grad_output.size(2) == task.width && grad_output.size(3) == task.outputs,
                  "grad_output must be a CPU tensor (B, H, W, C_out) of input's dtype");
  const Tensor g = last_dim_contiguous(grad_output);
  task.grad_output = view_of(g), task.need_input = need_input, task.need_parameters = need_parameters;
  const auto like = [&](const Maybe& tensor, bool needed) {
    std::vector<int64_t> shape{0};
    if (tensor && needed) shape.assign(tensor->sizes().begin(), tensor->sizes().end());
    return torch::stable::new_empty(input, shape, dtype);
  };
  Nine result{like(input, need_input), like(call.weight1, need_parameters), like(call.bias1, need_parameters),
              like(call.taps, need_parameters), like(call.tap_bias, need_parameters),
              like(call.weight2, need_parameters), like(call.bias2, need_parameters),
              like(call.scale, need_parameters), like(call.shift, need_parameters)};
  const auto data = [](const Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; };
  task.result = data(std::get<0>(result));
  const Gradients gradients{data(std::get<1>(result)), data(std::get<2>(result)), data(std::get<3>(result)),
                            data(std::get<4>(result)), data(std::get<5>(result)), data(std::get<6>(result)),
                            data(std::get<7>(result)), data(std::get<8>(result))};
  if (torch_multiplies(task, dtype)) {
    backward_between(task, call, g, gradients, result);
    return result;
  }
  task.plan(true);
  if (dtype == ScalarType::Float) run_backward<float, float>(task, gradients);
  if (dtype == ScalarType::Half) run_backward<Half, float>(task, gradients);
  if (dtype == ScalarType::BFloat16) run_backward<BFloat16, float>(task, gradients);
  if (dtype == ScalarType::Double) run_backward<double, double>(task, gradients);
  return result;
}

}  // namespace
}  // namespace tersor::leff

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("leff_forward", TORCH_BOX(&tersor::leff::forward));
  module.impl("leff_backward", TORCH_BOX(&tersor::leff::backward));
}

// The host's side of a fake-quantiser: tensors to memory order, parameters to constants, partial sums to gradients.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "quantization/fake_quantize.h"

namespace tersor::fake_quantize {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t SHORT = 64;  // runs shorter than this go row by row

// No gaps and no overlaps: memory order is a permutation of the dimensions.
inline bool is_dense(const Tensor& t) {
  int64_t next = 1;
  bool contiguous = true;
  for (int64_t i = t.dim() - 1; i >= 0 && contiguous; --i) {
    contiguous = t.size(i) == 1 || t.stride(i) == next;
    next *= t.size(i);
  }
  if (contiguous) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) != 1) dims.emplace_back(t.stride(i), t.size(i));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != 1 && a.stride(i) != b.stride(i)) return false;
  }
  return true;
}

// `t` in the memory order of `like`, which is dense.
inline Tensor in_order_of(const Tensor& like, const Tensor& t) {
  if (same_strides(t, like)) return t;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, t);
  return copy;
}

inline Tensor dense(const Tensor& t) {
  if (is_dense(t)) return t;
  Tensor copy = torch::stable::empty_like(t);
  torch::stable::copy_(copy, t);
  return copy;
}

inline void check_like(const Tensor& t, const Tensor& input, const char* name) {
  bool same = t.is_cpu() && t.scalar_type() == input.scalar_type() && t.dim() == input.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == input.size(i);
  STD_TORCH_CHECK(same, name, " must be a CPU tensor with the shape and dtype of input");
}

inline ScalarType exact_type(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

struct Layout {
  int64_t outer = 1, groups = 1, inner = 1;
};

// How the parameters lie along the dense `input`.
inline Layout layout_of(const Tensor& input, const std::vector<Tensor>& parameters) {
  int64_t axis = -1;
  for (const Tensor& p : parameters) {
    STD_TORCH_CHECK(p.is_cpu() && p.scalar_type() == exact_type(input),
                    "parameters must be CPU tensors, float64 for a float64 input and else float32");
    if (p.numel() == 1) continue;
    STD_TORCH_CHECK(p.dim() == input.dim(), "a parameter must have one element or the dimensions of input");
    for (int64_t i = 0; i < p.dim(); ++i) {
      if (p.size(i) == 1) continue;
      STD_TORCH_CHECK(p.size(i) == input.size(i) && (axis < 0 || axis == i),
                      "parameters of more than one element must lie along one and the same dimension of input");
      axis = i;
    }
  }
  Layout layout;
  if (axis < 0) {
    layout.inner = input.numel();
    return layout;
  }
  layout.groups = input.size(axis), layout.inner = input.stride(axis);
  layout.outer = input.numel() / std::max<int64_t>(1, layout.groups * layout.inner);
  return layout;
}

template <class A>
std::vector<A> values_of(const std::vector<Tensor>& parameters, int64_t groups) {
  std::vector<A> values(groups * parameters.size());  // [group][parameter]
  for (size_t p = 0; p < parameters.size(); ++p) {
    const A* data = static_cast<const A*>(parameters[p].const_data_ptr());
    int64_t step = 0;
    for (int64_t i = 0; i < parameters[p].dim(); ++i) {
      if (parameters[p].size(i) != 1) step = parameters[p].stride(i);
    }
    for (int64_t g = 0; g < groups; ++g) values[g * parameters.size() + p] = data[g * step];
  }
  return values;
}

template <class A>
struct Prepared {
  std::vector<A> parameters, constants, columns;
};

template <class A>
void prepare(const Kernels<A>& kernels, const std::vector<Tensor>& parameters, const double* options, Task& task,
             Prepared<A>& prepared) {
  prepared.constants.resize(task.groups * MOST_CONSTANTS);
  for (int64_t g = 0; g < task.groups; ++g) {
    kernels.prepare(prepared.parameters.data() + g * parameters.size(), options,
                    prepared.constants.data() + g * MOST_CONSTANTS);
  }
  task.constants = prepared.constants.data();
  if (task.groups == 1 || task.inner >= SHORT) return;
  const int64_t columns = task.groups * task.inner;
  prepared.columns.resize(columns * kernels.constants);
  for (int64_t c = 0; c < columns; ++c) {
    for (int i = 0; i < kernels.constants; ++i) {
      prepared.columns[i * columns + c] = prepared.constants[c / task.inner * MOST_CONSTANTS + i];
    }
  }
  task.columns = prepared.columns.data();
}

// Runs the loops; backward, `sums` gets [group][SUMS].
template <class A>
void run(const Kernels<A>& kernels, const Task& task, std::vector<double>* sums) {
  if (sums) sums->assign(task.groups * kernels.sums, 0.0);
  if (task.elements() == 0) return;
  std::vector<double> partial;
  if (!task.columns) {
    const int64_t per_run = (task.inner + BLOCK - 1) / BLOCK, items = task.outer * task.groups * per_run;
    if (sums) partial.assign(items * kernels.sums, 0.0);
    const int64_t grain = std::max<int64_t>(1, 2 * BLOCK / std::min(BLOCK, task.inner));
    torch::stable::parallel_for(0, items, grain, [&](int64_t first, int64_t last) {
      kernels.runs(task, first, last, per_run, sums ? partial.data() : nullptr);
    });
    for (int64_t i = 0; sums && i < items; ++i) {
      double* to = sums->data() + i / per_run % task.groups * kernels.sums;
      for (int s = 0; s < kernels.sums; ++s) to[s] += partial[i * kernels.sums + s];
    }
    return;
  }
  const int64_t columns = task.groups * task.inner;
  const int64_t height = std::max<int64_t>(1, std::min<int64_t>(256, BLOCK / columns));
  const int64_t items = (task.outer + height - 1) / height, width = kernels.sums * columns;
  // Backward, at most 64 blocks of partial sums, each of the same items for any number of threads.
  const int64_t together = sums ? (items + 63) / 64 : 1, blocks = (items + together - 1) / together;
  if (sums) partial.assign(blocks * width, 0.0);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    std::vector<A> scratch(sums ? width : 0);
    for (int64_t item = first * together; item < std::min(items, last * together); ++item) {
      kernels.rows(task, item * height, std::min(task.outer, (item + 1) * height), scratch.data(),
                   sums ? partial.data() + item / together * width : nullptr);
    }
  });
  for (int64_t b = 0; sums && b < blocks; ++b) {
    for (int64_t i = 0; i < width; ++i) {
      (*sums)[i % columns / task.inner * kernels.sums + i / columns] += partial[b * width + i];
    }
  }
}

// Whether a division by `b` may go by its reciprocal: nothing over- or underflows on the way.
template <class A>
bool divides_fast(A b) {
  return sizeof(A) == 4 && std::fabs(b) > A(0x1p-60) && std::fabs(b) < A(0x1p60);
}

// LSQ's: 1 / sqrt(elements per step * highest level).
inline double paper_factor(const Tensor& input, const Tensor& scale, int64_t highest) {
  const int64_t elements = std::max<int64_t>(1, input.numel() / std::max<int64_t>(1, scale.numel()));
  return 1.0 / std::sqrt(static_cast<double>(elements) * static_cast<double>(highest));
}

// One call of a rule: the tensors, its options as numbers, what to check and which kernels to take.
template <class Rule>
struct Call {
  const Rule& rule;
  std::vector<Tensor> given, inputs, parameters;  // as given, and in one memory order
  std::vector<double> options;
  Layout layout;

  Call(const Rule& rule, const std::vector<Tensor>& tensors, const std::vector<Tensor>& parameters,
       std::vector<double> options)
      : rule(rule), given(tensors), parameters(parameters), options(std::move(options)) {
    const ScalarType dtype = tensors[0].scalar_type();
    STD_TORCH_CHECK(tensors[0].is_cpu(), "input must be a CPU tensor");
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
                        dtype == ScalarType::Double,
                    "input must be float16, bfloat16, float32 or float64");
    for (const Tensor& t : tensors) check_like(t, tensors[0], "each tensor");
    inputs.push_back(dense(tensors[0]));
    for (size_t i = 1; i < tensors.size(); ++i) inputs.push_back(in_order_of(inputs[0], tensors[i]));
    layout = layout_of(inputs[0], parameters);
  }

  template <class T, class A>
  void run_as(const Tensor* grad_output, const std::vector<Tensor>& outputs, const std::vector<Tensor>& gradients) {
    Task task{};
    task.outer = layout.outer, task.groups = layout.groups, task.inner = layout.inner;
    for (size_t i = 0; i < inputs.size(); ++i) task.input[i] = inputs[i].const_data_ptr();
    for (size_t i = 0; i < outputs.size(); ++i) task.output[i] = outputs[i].mutable_data_ptr();
    if (grad_output) task.grad_output = grad_output->const_data_ptr();
    Prepared<A> prepared{values_of<A>(parameters, task.groups), {}, {}};
    bool fast = true;
    for (int64_t g = 0; g < task.groups; ++g) {
      fast = rule.check(prepared.parameters.data() + g * parameters.size()) && fast;
    }
    // Few elements of a group do not repay its verification.
    fast = fast && (task.groups == 1 || task.outer * task.inner >= 1024);
    Kernels<A> kernels = rule.template kernels<T, A>(fast);
    prepare<A>(kernels, parameters, options.data(), task, prepared);
    for (int64_t g = 0; fast && g < task.groups; ++g) {
      fast = kernels.exact(prepared.constants.data() + g * MOST_CONSTANTS);
      if (!fast) kernels = rule.template kernels<T, A>(false);
    }
    std::vector<double> sums;
    run<A>(kernels, task, grad_output ? &sums : nullptr);
    if (!grad_output) return;
    for (int64_t g = 0; g < task.groups; ++g) {
      double gradient[MOST_SUMS];
      kernels.finish(sums.data() + g * kernels.sums, prepared.constants.data() + g * MOST_CONSTANTS, options.data(),
                     gradient);
      for (size_t p = 0; p < gradients.size(); ++p) {
        A* to = static_cast<A*>(gradients[p].mutable_data_ptr());
        if (gradients[p].numel() == 1) to[0] = static_cast<A>(g ? to[0] + gradient[p] : gradient[p]);
        else to[g] = static_cast<A>(gradient[p]);
      }
    }
  }

  void run_any(const Tensor* grad_output, const std::vector<Tensor>& outputs, const std::vector<Tensor>& gradients) {
    const ScalarType dtype = inputs[0].scalar_type();
    if (dtype == ScalarType::Float) run_as<float, float>(grad_output, outputs, gradients);
    if (dtype == ScalarType::Half) run_as<Half, float>(grad_output, outputs, gradients);
    if (dtype == ScalarType::BFloat16) run_as<BFloat16, float>(grad_output, outputs, gradients);
    if (dtype == ScalarType::Double) run_as<double, double>(grad_output, outputs, gradients);
  }

  Tensor forward() {
    Tensor output = torch::stable::empty_like(inputs[0]);
    run_any(nullptr, {output}, {});
    return output;
  }

  // The inputs' gradients, then the parameters'.
  std::vector<Tensor> backward(const Tensor& grad_output) {
    check_like(grad_output, inputs[0], "grad_output");
    const Tensor grad = in_order_of(inputs[0], grad_output);
    std::vector<Tensor> outputs, gradients;
    for (size_t i = 0; i < inputs.size(); ++i) outputs.push_back(torch::stable::empty_like(inputs[0]));
    for (const Tensor& p : parameters) gradients.push_back(torch::stable::empty_like(p));
    run_any(&grad, outputs, gradients);
    for (size_t i = 1; i < outputs.size(); ++i) {  // each gradient is laid out like its own input
      if (same_strides(given[i], inputs[0])) continue;
      Tensor own = torch::stable::empty_like(given[i]);
      torch::stable::copy_(own, outputs[i]);
      outputs[i] = own;
    }
    outputs.insert(outputs.end(), gradients.begin(), gradients.end());
    return outputs;
  }
};

}  // namespace tersor::fake_quantize

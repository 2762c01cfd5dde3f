// The sign with an estimated gradient, and ReCU's scaling of the samples, on the CPU (specification:
// pyops/binary/binary_sign.py).

#include "binary/binary_sign.h"

#include <cmath>
#include <functional>
#include <string>

#define TERSOR_BODY "binary/binary_sign_kernels.h"
#include "foreach_isa.h"

namespace tersor::binary {
namespace {

constexpr double EPS = 1e-5;

// A number as the type has it.
template <class T>
double rounded(double value) {
  return static_cast<double>(static_cast<T>(static_cast<Accumulated<T>>(value)));
}

template <class T>
Sign make_task(const std::string& estimator, double o, double t, double interval, bool scaled) {
  STD_TORCH_CHECK(estimator == "ste" || estimator == "approx" || estimator == "reste",
                  "estimator must be ste, approx or reste");
  Sign task{};
  task.rule = estimator == "ste" ? Rule::ste : estimator == "approx" ? Rule::approx : Rule::reste;
  // The bounds of scaled samples meet numbers that are not rounded to the type.
  task.t = scaled ? t : rounded<T>(t), task.interval = scaled ? interval : rounded<T>(interval);
  task.chord = std::pow(interval, 1 / o) / interval, task.factor = 1 / o, task.power = (1 - o) / o;
  return task;
}

// Chunks of each sample: body(sample, first, end), elements counted within the sample.
template <class F>
void for_chunks(int64_t samples, int64_t size, const F& body) {
  const int64_t chunks = (size + CHUNK - 1) / CHUNK;
  const int64_t grain = grain_for(4 * std::min(size, CHUNK));
  torch::stable::parallel_for(0, samples * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % chunks * CHUNK;
      body(i / chunks, first, std::min(size, first + CHUNK));
    }
  });
}

template <class T>
Sign of_sample(Sign task, int64_t sample) {
  const auto move = [&](const void* p) {
    return p == nullptr ? nullptr : static_cast<const T*>(p) + sample * task.size;
  };
  task.input = move(task.input), task.grad_output = move(task.grad_output);
  task.output = const_cast<void*>(static_cast<const void*>(move(task.output)));
  return task;
}

// One after the other, whatever thread has found them.
Moments combine(const Moments* parts, int64_t count) {
  Moments all = parts[0];
  for (int64_t i = 1; i < count; ++i) {
    const Moments& own = parts[i];
    const double sum = all.count + own.count, distance = own.mean - all.mean;
    all.mean += distance * own.count / sum;
    all.squares += own.squares + distance * distance * all.count * own.count / sum;
    all.count = sum;
  }
  return all;
}

// A sample's chunks in a loop where there are samples for all threads, so that it stays in the cache; else shared out.
template <class F, class G, class H>
void by_sample(int64_t samples, int64_t size, const F& first_pass, const G& between, const H& second_pass) {
  if (samples >= 2 * static_cast<int64_t>(torch::stable::get_num_threads())) {
    torch::stable::parallel_for(0, samples, grain_for(4 * size), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t i = 0; i < size; i += CHUNK) first_pass(n, i, std::min(size, i + CHUNK));
        between(n);
        for (int64_t i = 0; i < size; i += CHUNK) second_pass(n, i, std::min(size, i + CHUNK));
      }
    });
    return;
  }
  for_chunks(samples, size, first_pass);
  for (int64_t n = 0; n < samples; ++n) between(n);
  for_chunks(samples, size, second_pass);
}

Tensor laid_out_like(const Tensor& t, bool channels_last) {
  const auto sizes = t.sizes();
  return new_map({sizes.begin(), sizes.end()}, t.scalar_type(), channels_last);
}

bool is_dense(const Tensor& t) { return t.is_contiguous() || (t.dim() == 4 && is_channels_last(t)); }

template <class T>
void scaled_signs(Sign task, const Tensor& input, Tensor& statistics) {
  using A = Accumulated<T>;
  const int64_t samples = input.size(0), chunks = (task.size + CHUNK - 1) / CHUNK;
  const auto kernels = TERSOR_FOR_ISA(sign_kernels<T>)(task.rule);
  std::vector<Moments> moments(samples * chunks);
  auto* const kept = static_cast<A*>(statistics.mutable_data_ptr());
  by_sample(
      samples, task.size,
      [&](int64_t n, int64_t first, int64_t end) {
        moments[n * chunks + first / CHUNK] = kernels.moments(of_sample<T>(task, n), first, end);
      },
      [&](int64_t n) {
        const Moments all = combine(&moments[n * chunks], chunks);
        kept[2 * n] = static_cast<A>(all.mean);
        kept[2 * n + 1] = static_cast<A>(1 / std::sqrt(all.squares / (all.count - 1) + EPS));
      },
      [&](int64_t n, int64_t first, int64_t end) {
        const Sign own = of_sample<T>(task, n);
        if (kept[2 * n + 1] > 0) kernels.sign(own, first, end);
        else kernels.clear(own, first, end);  // a sample without a deviation
      });
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& given, std::string estimator, double o, double t,
                                           double interval, bool scaled) {
  STD_TORCH_CHECK(given.is_cpu() && is_floating(given.scalar_type()), "input must be a floating CPU tensor");
  STD_TORCH_CHECK(!scaled || given.dim() == 4, "input must be (N, C, H, W) where it is scaled");
  const Tensor input = is_dense(given) ? given : as_contiguous(given);
  Tensor output = laid_out_like(input, input.dim() == 4 && is_channels_last(input));
  const int64_t count = input.numel();
  const bool bits = estimator == "ste" && !scaled;
  Tensor inside = new_tensor({bits ? (count + 7) / 8 : 0}, ScalarType::Byte);
  const ScalarType exact = input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor statistics = new_tensor(scaled ? Sizes{input.size(0), 2} : Sizes{0}, exact);
  if (count == 0) return {output, inside, statistics};
  with_type(input.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Sign task = make_task<T>(estimator, o, t, interval, scaled);
    task.input = input.const_data_ptr(), task.output = output.mutable_data_ptr();
    if (scaled) {
      task.size = count / input.size(0);
      STD_TORCH_CHECK(task.size > 1, "a sample must have at least 2 elements where it is scaled");
      return scaled_signs<T>(task, input, statistics);
    }
    task.size = count;
    if (bits) task.inside = static_cast<uint8_t*>(inside.mutable_data_ptr());
    const auto kernels = TERSOR_FOR_ISA(sign_kernels<T>)(task.rule);
    for_chunks(1, count, [&](int64_t, int64_t first, int64_t end) { kernels.sign(task, first, end); });
  });
  return {output, inside, statistics};
}

template <class T>
void scaled_gradient(Sign task, const Tensor& input, const Tensor& statistics) {
  using A = Accumulated<T>;
  const int64_t samples = input.size(0), chunks = (task.size + CHUNK - 1) / CHUNK;
  const auto kernels = TERSOR_FOR_ISA(sign_kernels<T>)(task.rule);
  const auto* const kept = static_cast<const A*>(statistics.const_data_ptr());
  std::vector<double> along(samples * chunks);
  std::vector<Sample> all(samples);
  by_sample(
      samples, task.size,
      [&](int64_t n, int64_t first, int64_t end) {
        along[n * chunks + first / CHUNK] = kernels.along(of_sample<T>(task, n), kept[2 * n + 1], first, end);
      },
      [&](int64_t n) {
        double sum = 0;
        for (int64_t i = 0; i < chunks; ++i) sum += along[n * chunks + i];
        const double rstd = kept[2 * n + 1];
        all[n] = {kept[2 * n], rstd, sum * rstd * rstd * rstd / static_cast<double>(task.size - 1)};
      },
      [&](int64_t n, int64_t first, int64_t end) { kernels.gradient(of_sample<T>(task, n), all[n], first, end); });
}

Tensor backward(const Tensor& given_grad, const Maybe& given_input, const Maybe& given_inside,
                const Maybe& given_statistics, bool channels_last, std::string estimator, double o, double t,
                double interval) {
  const ScalarType dtype = given_grad.scalar_type();
  STD_TORCH_CHECK(given_grad.is_cpu() && is_floating(dtype), "grad_output must be a floating CPU tensor");
  STD_TORCH_CHECK(!channels_last || given_grad.dim() == 4, "channels_last must be of four dimensions");
  const auto arranged = [&](const Tensor& tensor) {
    return channels_last ? in_format(tensor, true) : as_contiguous(tensor);
  };
  const Tensor grad = arranged(given_grad);
  const int64_t count = grad.numel();
  Tensor output = laid_out_like(grad, channels_last);
  Tensor input, inside, statistics;
  if (given_input) {
    bool fits = given_input->is_cpu() && given_input->scalar_type() == dtype && given_input->dim() == grad.dim();
    for (int64_t i = 0; fits && i < grad.dim(); ++i) fits = given_input->size(i) == grad.size(i);
    STD_TORCH_CHECK(fits, "input must be a CPU tensor of the shape and dtype of grad_output");
    input = arranged(*given_input);
  } else {
    STD_TORCH_CHECK(given_inside && given_inside->is_cpu() && given_inside->scalar_type() == ScalarType::Byte &&
                        given_inside->numel() == (count + 7) / 8,
                    "inside must be one bit per element where input is not given");
    inside = as_contiguous(*given_inside);
  }
  if (given_statistics) {
    const ScalarType exact = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    STD_TORCH_CHECK(given_input && grad.dim() == 4 && given_statistics->is_cpu() &&
                        given_statistics->scalar_type() == exact && given_statistics->dim() == 2 &&
                        given_statistics->size(0) == grad.size(0) && given_statistics->size(1) == 2,
                    "statistics must be (N, 2), with input");
    statistics = as_contiguous(*given_statistics);
  }
  if (count == 0) return output;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    Sign task = make_task<T>(estimator, o, t, interval, given_statistics.has_value());
    task.grad_output = grad.const_data_ptr(), task.output = output.mutable_data_ptr(), task.size = count;
    if (given_input) task.input = input.const_data_ptr();
    else task.given_inside = static_cast<const uint8_t*>(inside.const_data_ptr());
    if (given_statistics) {
      task.size = count / grad.size(0);
      return scaled_gradient<T>(task, input, statistics);
    }
    const auto kernels = TERSOR_FOR_ISA(sign_kernels<T>)(task.rule);
    for_chunks(1, count, [&](int64_t, int64_t first, int64_t end) {
      if (given_input) kernels.gradient(task, {0, 1, 0}, first, end);
      else kernels.masked(task, first, end);
    });
  });
  return output;
}

}  // namespace
}  // namespace tersor::binary

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, module) {
  module.impl("binary_sign_forward", TORCH_BOX(&tersor::binary::forward));
  module.impl("binary_sign_backward", TORCH_BOX(&tersor::binary::backward));
}

// Runs the CUDA kernels of dilated attention in the CPU emulation: reads one call from stdin, writes its results to
// stdout. With an argument it runs a kernel with a deliberate defect instead, which must end in an error.
#include "cuda_emulation.h"
// The bodies come after the emulation, which stands in for CUDA's own words.
#include "attention/dilated_attention.cuh"

#include <iostream>
#include <string>

namespace attention = tersor::dilated_attention;

namespace {

// A tensor whose memory ends where its last element does, so that the sanitizer sees any access beyond.
struct Input {
  std::unique_ptr<char[]> memory;
  std::vector<int64_t> strides;
  int64_t offset = 0;
};

template <typename Value>
Value read() {
  Value value{};
  std::cin.read(reinterpret_cast<char*>(&value), sizeof(Value));
  return value;
}

std::vector<int64_t> read_list() {
  std::vector<int64_t> list(static_cast<std::size_t>(read<int64_t>()));
  for (int64_t& value : list) value = read<int64_t>();
  return list;
}

Input read_tensor() {
  Input input;
  input.strides = read_list();
  input.offset = read<int64_t>();
  const auto bytes = static_cast<std::size_t>(read<int64_t>());
  input.memory = std::make_unique<char[]>(bytes);
  std::cin.read(input.memory.get(), static_cast<std::streamsize>(bytes));
  return input;
}

template <typename T>
void run() {
  const bool backward = read<int64_t>(), reversed = read<int64_t>();
  const auto shared_limit = read<int64_t>(), kernel_size = read<int64_t>();
  const auto scale = read<double>();
  const auto dilation = read_list(), sizes = read_list();
  std::vector<Input> inputs(backward ? 5 : 3);  // query, key, value; backward also grad_output, output
  std::vector<attention::Strided> views;
  bool packed = true;
  for (Input& input : inputs) {
    input = read_tensor();
    const T* data = reinterpret_cast<const T*>(input.memory.get()) + input.offset;
    views.push_back(attention::make_strided(data, sizes, input.strides, sizeof(T)));
    packed = packed && views.back().packed;
  }
  const attention::Plan plan =
      attention::make_plan(sizes, sizeof(T), kernel_size, dilation, scale, packed, backward, shared_limit);
  if (!plan.refusal.empty()) {
    std::fprintf(stderr, "%s\n", plan.refusal.c_str());
    std::exit(4);
  }
  std::fprintf(stderr, "shared=%d exact=%d packed=%d blocks=%u threads=%u bytes=%zu\n", plan.shared, plan.exact, packed,
               plan.blocks, plan.threads, plan.shared_bytes);
  const auto positions = static_cast<std::size_t>(sizes[0] * sizes[1] * sizes[2] * sizes[3]);
  const auto values = positions * static_cast<std::size_t>(sizes[4]);
  Input lse = backward ? read_tensor() : Input{};
  const std::size_t result_bytes = values * sizeof(T) * (backward ? 3 : 1);
  const auto result = std::make_unique<char[]>(result_bytes);
  const auto logsumexp = std::make_unique<char[]>(positions * sizeof(float));
  std::memset(result.get(), 0xff, result_bytes);  // NaN: what is not written shows
  std::memset(logsumexp.get(), 0xff, positions * sizeof(float));
  attention::choose_variant(plan, [&](auto variant) {
    using V = decltype(variant);
    if (backward) {
      const attention::Backward args{plan.problem, views[3], views[0], views[1], views[2], views[4],
                                     reinterpret_cast<const float*>(lse.memory.get()), result.get()};
      emulation::launch(attention::backward_kernel<T, V::lanes, V::each, V::kernel, V::shared>, plan.blocks,
                        plan.threads, plan.shared_bytes, reversed, args);
    } else {
      const attention::Forward args{plan.problem, views[0], views[1], views[2], result.get(),
                                    reinterpret_cast<float*>(logsumexp.get())};
      emulation::launch(attention::forward_kernel<T, V::lanes, V::each, V::kernel, V::shared>, plan.blocks,
                        plan.threads, plan.shared_bytes, reversed, args);
    }
  });
  std::cout.write(result.get(), static_cast<std::streamsize>(result_bytes));
  if (!backward) std::cout.write(logsumexp.get(), static_cast<std::streamsize>(positions * sizeof(float)));
}

struct Defect {
  int kind;
  float* result;
};

void defective(Defect args) {
  TERSOR_DYNAMIC_SHARED(memory);
  float* const values = reinterpret_cast<float*>(memory);
  const unsigned thread = threadIdx.x;
  float got = 1.0f;
  if (args.kind == 0) {
    if (thread == 5) return;
    __syncthreads();
  } else if (args.kind == 1) {
    if (thread % 2 == 0) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (args.kind == 2) {
    if (thread != 7) got = __shfl_xor_sync(0xffffffffu, got, 1);
  } else if (args.kind == 3) {
    values[64] = 0.0f;  // one beyond the end
  } else if (args.kind == 4) {
    got = values[thread];  // never written
  } else if (args.kind == 5) {
    values[thread] = 1.0f;
    got = values[thread ^ 1];  // without a barrier
  } else if (args.kind == 6) {
    values[thread] = 1.0f;
    __syncthreads();
    got = values[thread ^ 32];
    values[thread] = NAN;  // before the other warp has read
  } else {
    values[thread] = 1.0f;
    __syncthreads();
    got = __shfl_xor_sync(0xffffffffu, values[thread ^ 1], 1);
  }
  args.result[thread] = got;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    std::vector<float> result(64);
    const Defect args{std::atoi(argv[1]), result.data()};
    emulation::launch(defective, 1, 64, 64 * sizeof(float), false, args);
    const bool poisoned = std::any_of(result.begin(), result.end(), [](float value) { return std::isnan(value); });
    if (poisoned) std::fprintf(stderr, "emulation: NaN in the result\n");
    return poisoned ? 5 : 0;
  }
  std::ios::sync_with_stdio(false);
  switch (read<int64_t>()) {
    case 0: run<float>(); break;
    case 1: run<c10::Half>(); break;
    default: run<c10::BFloat16>(); break;
  }
  return std::cin && std::cout.flush() ? 0 : 6;
}

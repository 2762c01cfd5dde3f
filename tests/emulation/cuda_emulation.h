// CUDA launches on the CPU, for tests: every thread of a block is a fiber, and the kernel bodies compile unchanged.
//
// What a GPU would leave undefined is an error here: threads at different barriers or shuffles, a shuffle with absent
// lanes, and accesses beside shared memory (address sanitizer and a pattern on both sides). Shared memory starts as
// NaN in every dtype. Warps run ahead to the next barrier, first to last or last to first; a result that depends on
// the order lacks a barrier.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) (static_cast<void>(address), static_cast<void>(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) (static_cast<void>(address), static_cast<void>(size))
#endif

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define __syncthreads() emulation::Block::current->wait(emulation::Wait::barrier, __LINE__, 0, 0, 0.0f)
#define __shfl_xor_sync(mask, value, offset) \
  emulation::Block::current->wait(emulation::Wait::shuffle, __LINE__, mask, offset, value)
#define TERSOR_DYNAMIC_SHARED(name) unsigned char* const name = emulation::Block::current->shared()

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
inline Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

enum class Wait { none, barrier, shuffle, finished };

[[noreturn]] inline void fail(const char* what, int line, unsigned thread) {
  std::fprintf(stderr, "emulation: %s (line %d, thread %u, block %u)\n", what, line, thread, blockIdx.x);
  std::exit(3);
}

class Block {
 public:
  static inline Block* current = nullptr;

  Block(unsigned threads, std::size_t shared_bytes, bool reversed)
      : fibers_(threads), shared_bytes_(shared_bytes), reversed_(reversed), memory_(shared_bytes + 2 * guard) {
    for (Fiber& fiber : fibers_) fiber.stack = std::make_unique<char[]>(stack_size);
  }

  void run(const std::function<void()>& body) {
    current = this;
    body_ = &body;
    std::memset(memory_.data(), 0xff, memory_.size());  // NaN as float, Half and BFloat16
    ASAN_POISON_MEMORY_REGION(memory_.data(), guard);
    // The end need not be aligned for the sanitizer to see a write past it: it tracks partial groups of eight.
    ASAN_POISON_MEMORY_REGION(memory_.data() + guard + shared_bytes_, guard);
    for (Fiber& fiber : fibers_) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = stack_size;
      fiber.context.uc_link = &scheduler_;
      fiber.state = Wait::none;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    while (step()) release();
    ASAN_UNPOISON_MEMORY_REGION(memory_.data(), memory_.size());
    for (std::size_t i = 0; i < guard; ++i) {
      if (memory_[i] != 0xff || memory_[guard + shared_bytes_ + i] != 0xff) fail("write beside shared memory", 0, 0);
    }
  }

  unsigned char* shared() { return memory_.data() + guard; }

  float wait(Wait what, int line, unsigned mask, int offset, float value) {
    Fiber& fiber = fibers_[running_];
    fiber.state = what;
    fiber.line = line;
    fiber.mask = mask;
    fiber.offset = offset;
    fiber.value = value;
    swapcontext(&fiber.context, &scheduler_);
    return fibers_[running_].received;
  }

 private:
  static constexpr std::size_t guard = 4096, stack_size = 256 * 1024;

  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Wait state = Wait::none;
    int line = 0, offset = 0;
    unsigned mask = 0;
    float value = 0.0f, received = 0.0f;
  };

  static void enter() {
    (*current->body_)();
    current->fibers_[current->running_].state = Wait::finished;
  }

  // Runs warp after warp, each up to a barrier: what one does too early, the others see. False when all have finished.
  bool step() {
    const std::size_t count = (fibers_.size() + 31) / 32;
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t first = 32 * (reversed_ ? count - 1 - i : i);
      do {
        run_warp(first);
      } while (release_warp(first));
    }
    return std::any_of(fibers_.begin(), fibers_.end(), [](const Fiber& f) { return f.state != Wait::finished; });
  }

  void run_warp(std::size_t first) {
    const std::size_t lanes = std::min<std::size_t>(32, fibers_.size() - first);
    for (std::size_t i = 0; i < lanes; ++i) {
      running_ = static_cast<unsigned>(first + (reversed_ ? lanes - 1 - i : i));
      Fiber& fiber = fibers_[running_];
      if (fiber.state != Wait::none) continue;
      threadIdx.x = running_;
      swapcontext(&scheduler_, &fiber.context);
    }
  }

  // All fibers wait or have finished: lets the block past a barrier that all of them have reached.
  void release() {
    for (unsigned i = 0; i < fibers_.size(); ++i) {
      const Fiber& fiber = fibers_[i];
      if (fiber.state == Wait::finished) fail("a thread has left while others wait at a barrier", fiber.line, i);
      if (fiber.state == Wait::shuffle) fail("a shuffle that not all its lanes reach", fiber.line, i);
      if (fiber.line != fibers_[0].line) fail("threads wait at different barriers", fiber.line, i);
    }
    for (Fiber& fiber : fibers_) fiber.state = Wait::none;
  }

  // Lets the lanes past a shuffle whose whole mask has reached it; false if there are none.
  bool release_warp(std::size_t first) {
    const std::size_t lanes = std::min<std::size_t>(32, fibers_.size() - first);
    std::vector<std::size_t> ready;
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      const Fiber& fiber = fibers_[first + lane];
      if (fiber.state != Wait::shuffle) continue;
      const unsigned thread = static_cast<unsigned>(first + lane);
      if (!(fiber.mask >> lane & 1)) fail("a shuffle whose mask lacks the caller", fiber.line, thread);
      bool complete = true;
      for (std::size_t other = 0; other < 32; ++other) {
        if (!(fiber.mask >> other & 1)) continue;
        if (other >= lanes) fail("a shuffle whose mask names absent lanes", fiber.line, thread);
        const Fiber& peer = fibers_[first + other];
        complete = complete && peer.state == Wait::shuffle && peer.line == fiber.line && peer.mask == fiber.mask &&
                   peer.offset == fiber.offset;
      }
      if (complete) ready.push_back(lane);
    }
    for (const std::size_t lane : ready) {
      Fiber& fiber = fibers_[first + lane];
      const std::size_t source = lane ^ static_cast<std::size_t>(fiber.offset);
      if (source >= lanes || !(fiber.mask >> source & 1)) {
        fail("a shuffle from a lane outside its mask", fiber.line, static_cast<unsigned>(first + lane));
      }
      fiber.received = fibers_[first + source].value;
    }
    for (const std::size_t lane : ready) fibers_[first + lane].state = Wait::none;
    return !ready.empty();
  }

  std::vector<Fiber> fibers_;
  std::size_t shared_bytes_;
  bool reversed_;
  std::vector<unsigned char> memory_;
  const std::function<void()>* body_ = nullptr;
  ucontext_t scheduler_{};
  unsigned running_ = 0;
};

// kernel<<<blocks, threads, shared_bytes>>>(parameters), one block after the other.
template <typename Parameters>
void launch(void (*kernel)(Parameters), unsigned blocks, unsigned threads, std::size_t shared_bytes, bool reversed,
            const Parameters& parameters) {
  blockDim = {threads, 1, 1};
  gridDim = {blocks, 1, 1};
  Block block(threads, shared_bytes, reversed);
  for (unsigned i = 0; i < blocks; ++i) {
    blockIdx = {reversed ? blocks - 1 - i : i, 0, 0};
    block.run([&] { kernel(parameters); });
  }
}

}  // namespace emulation

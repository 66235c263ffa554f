// CUDA's blocks on a CPU, for g++: enough of the language to run csrc/*.cuh at small sizes, so that the thread sanitizer finds
// their races and the address sanitizer their accesses out of bounds.
//
// A block's threads are threads of the operating system, and blocks run one after another.  __syncthreads is a barrier of the
// block, a warp's exchange (shuffles, ldmatrix, mma) one of its 32 threads.  An asynchronous copy is as late as it may be: it
// spoils its destination when it starts and writes it when it is waited for, so that a missing wait or barrier shows at either
// end.  What is not modelled: blocks that run at the same time (atomics between them, memory fences), memory order within a
// warp beyond what its exchanges imply, bank conflicts, and instructions that csrc/ptx.cuh has no function for.
//
// Two variables of the environment break kernels, to prove that the checkers see it: EMULATED_SKIP_BARRIER=n, every thread runs
// past its n-th __syncthreads; EMULATED_LESS_SHARED=n, a block has n bytes less of its shared memory.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y = 1, z = 1;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline thread_local dim3 threadIdx{0}, blockIdx{0};
inline dim3 blockDim{1}, gridDim{1};

namespace emulated {

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "emulated CUDA: %s\n", message);
  std::_Exit(3);
}

inline void check_aligned(const void* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16) fail("an address that 16 bytes do not divide");
}

// A thread's asynchronous copies of 16 bytes.
class Copies {
 public:
  void start(void* to, const void* from) {
    check_aligned(to);
    check_aligned(from);
    std::memset(to, 0xff, 16);  // a NaN, whichever the type
    open_.push_back({to, from});
  }
  void commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
  }
  void wait(size_t latest) {
    for (; groups_.size() > latest; groups_.pop_front()) {
      for (const auto& [to, from] : groups_.front()) std::memcpy(to, from, 16);
    }
  }
  void check_none() const {
    if (!open_.empty()) fail("a copy that was never committed");
    for (const auto& group : groups_) {
      if (!group.empty()) fail("a kernel ended with copies under way");
    }
  }

 private:
  struct Copy {
    void* to;
    const void* from;
  };
  std::vector<Copy> open_;
  std::deque<std::vector<Copy>> groups_;
};

constexpr unsigned kWarp = 32;

// A barrier that sleeps at once: a block has many more threads than the machine, and std::barrier's would spin.
class Gate {
 public:
  explicit Gate(unsigned threads) : threads_(threads) {}
  void arrive_and_wait() {
    const unsigned phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      phase_.notify_all();
    } else {
      phase_.wait(phase, std::memory_order_acquire);
    }
  }

 private:
  const unsigned threads_;
  std::atomic<unsigned> arrived_{0}, phase_{0};
};

struct Warp {
  Gate gate{kWarp};
  std::array<std::array<uint64_t, 4>, kWarp> words[2];  // two, so that one barrier does for an exchange
};

struct Block {
  Block(unsigned threads, unsigned char* memory) : shared(memory), gate(threads), warps(threads / kWarp) {}
  unsigned char* shared;
  Gate gate;
  std::vector<Warp> warps;
};

struct Thread {
  unsigned exchanges = 0;
  long barriers = 0;
  Copies copies;
};

inline Block* block;
inline thread_local Thread thread;
inline long skipped_barrier = 0;

inline unsigned lane() { return threadIdx.x % kWarp; }

// Every lane's `mine`; all lanes of the warp take part.
template <class V>
std::array<V, kWarp> exchange(const V& mine) {
  static_assert(sizeof(V) <= 32 && std::is_trivially_copyable_v<V>);
  Warp& warp = block->warps[threadIdx.x / kWarp];
  auto& words = warp.words[thread.exchanges++ % 2];
  std::memcpy(&words[lane()], &mine, sizeof(V));
  warp.gate.arrive_and_wait();
  std::array<V, kWarp> all;
  for (unsigned i = 0; i < kWarp; ++i) std::memcpy(&all[i], &words[i], sizeof(V));
  return all;
}

inline long from_environment(const char* name) {
  const char* text = std::getenv(name);
  return text ? std::atol(text) : 0;
}

// What kernel<<<grid, threads, shared>>>(arguments...) does.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared, const Arguments&... arguments) {
  gridDim = grid;
  blockDim = {threads};
  skipped_barrier = from_environment("EMULATED_SKIP_BARRIER");
  const size_t bytes = shared - std::min<size_t>(shared, from_environment("EMULATED_LESS_SHARED"));
  std::unique_ptr<unsigned char[]> memory;
  std::optional<Block> running;
  const auto next_block = [&]() noexcept {
    memory = std::make_unique_for_overwrite<unsigned char[]>(bytes);
    std::memset(memory.get(), 0xff, bytes);
    running.emplace(threads, memory.get());
    block = &*running;
  };
  std::barrier between(threads, next_block);
  std::vector<std::thread> all;
  for (unsigned t = 0; t < threads; ++t) {
    all.emplace_back([&, t] {
      threadIdx = {t};
      for (unsigned b = 0; b < grid.x * grid.y * grid.z; ++b) {
        blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
        thread = {};
        between.arrive_and_wait();
        kernel(arguments...);
        thread.copies.check_none();
      }
    });
  }
  for (auto& one : all) one.join();
}

}  // namespace emulated

inline void __syncthreads() {
  if (++emulated::thread.barriers != emulated::skipped_barrier) emulated::block->gate.arrive_and_wait();
}
inline void __threadfence() {}

template <class V>
V __shfl_xor_sync(unsigned, V mine, int mask) {
  return emulated::exchange(mine)[emulated::lane() ^ mask];
}

inline unsigned atomicAdd(unsigned* to, unsigned value) { return std::atomic_ref<unsigned>(*to).fetch_add(value); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

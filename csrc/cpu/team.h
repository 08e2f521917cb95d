// The thread team of a call: the caller (thread 0) and width - 1 others.
// In a process that runs torch, the others are torch's OpenMP threads, handed over by
// hff_use_openmp: after each of torch's own parallel regions they spin for milliseconds, and a
// second team shares its cores with them. Measured on 2 cores inside generate(), pythia-160m fp16:
// a team of our own 11.3 ms a token, torch's threads 5.6. Without OpenMP, and in the child of a
// fork, whose OpenMP threads are gone, the team is ours: workers woken per call that spin about 50
// us between calls and then sleep. The width a function receives is smaller than asked for where
// threads cannot be had: the team is busy with another caller, or the system refuses. Results never
// depend on it. Threads take the caller's floating-point mode for the call.
#pragma once

#include <atomic>
#include <cstdint>

#include "checked.h"

namespace hff {

using TeamFunction = void (*)(void* context, int thread, int width);

// libgomp's GOMP_parallel, omp_get_thread_num and omp_get_num_threads, of the runtime torch has
// loaded.
struct OpenMp {
  void (*parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread)();
  int (*width)();
};
void use_openmp(const OpenMp* openmp);  // null: a team of our own

class Barrier;
// Calls function(context, thread, width) on every thread and returns when all have; `barrier`, if
// given, has the width.
void run_on_team(int width, TeamFunction function, void* context, Barrier* barrier = nullptr);

HFF_ALWAYS_INLINE void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A number that threads wait for to change: they spin for kSpins pauses, 50 to 200 us, and then
// sleep. Where cores are fewer than runnable threads, a core that falls idle takes over the thread
// that is waited for; one that only yields does not.
class Turn {
 public:
  HFF_ALWAYS_INLINE uint32_t now() const { return number_.load(std::memory_order_acquire); }
  HFF_ALWAYS_INLINE void wait_while(uint32_t number) {
    for (int spins = 0; spins < kSpins; ++spins) {
      if (now() != number) return;
      cpu_pause();
    }
    sleep_while(number);
  }
  HFF_ALWAYS_INLINE void set(uint32_t number) {
    number_.store(number, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) wake();
  }

 private:
  static constexpr int kSpins = 4000;
  void sleep_while(uint32_t number);
  void wake();

  alignas(64) std::atomic<uint32_t> number_{0};
  std::atomic<int> sleepers_{0};
};

// A reusable barrier of `width` threads inside one run.
class Barrier {
 public:
  // Every thread of the run may set it, to the same value, before it waits.
  HFF_ALWAYS_INLINE void set_width(int width) { width_.store(width, std::memory_order_relaxed); }
  HFF_ALWAYS_INLINE void wait() {
    const int width = width_.load(std::memory_order_relaxed);
    if (width == 1) return;
    const uint32_t generation = generation_.now();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == width) {
      arrived_.store(0, std::memory_order_relaxed);
      return generation_.set(generation + 1);
    }
    generation_.wait_while(generation);
  }

 private:
  std::atomic<int> width_{1};
  alignas(64) std::atomic<int> arrived_{0};
  Turn generation_;
};

// Hands out units 0 .. n-1, each once, in rising order.
struct alignas(64) Counter {
  std::atomic<int64_t> next{0};
  HFF_ALWAYS_INLINE int64_t take() { return next.fetch_add(1, std::memory_order_relaxed); }
};

// Hands out units 0 .. n-1, each once: to each thread its contiguous share in order, then what is
// left of others' shares. `counters`, one per thread, start at zero.
class Shares {
 public:
  HFF_ALWAYS_INLINE Shares(Counter* counters, int64_t n, int thread, int width)
      : counters_(counters), n_(n), thread_(thread), width_(width), victim_(thread) {}

  // The next unit, or -1 when all are taken.
  HFF_ALWAYS_INLINE int64_t take() {
    for (;;) {
      const int64_t begin = n_ * victim_ / width_, end = n_ * (victim_ + 1) / width_;
      const int64_t unit = begin + counters_[victim_].take();
      if (unit < end) return unit;
      victim_ = victim_ + 1 < width_ ? victim_ + 1 : 0;
      if (victim_ == thread_) return -1;
    }
  }

 private:
  Counter* const counters_;
  const int64_t n_;
  const int thread_, width_;
  int victim_;
};

}  // namespace hff

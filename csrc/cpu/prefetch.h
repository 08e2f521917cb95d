// The prefetch distance of row kernels that walk weights in order, for up to kTriedRows rows of
// inputs: how many bytes ahead of its loads one asks memory for weights. kFarPrefetch hides memory's
// latency where the hardware looks less far; where it looks far enough, more requests get in its
// way, and a prefetch of the very line, which only marks it as read once, is faster. No manual says
// which: the first calls of a process that read more weights than caches hold try both in turn, and
// the faster stays, for each dtype, for one row and for two.
// Share of the read stream on a 2-core Zen 4 VM, (50304, 768) weights, kFarPrefetch | 0: one row
// bf16 0.92 | 1.00, fp16 0.86 | 0.99, fp32 0.79 | 0.90; two rows bf16 0.76 | 0.97, fp16 0.51 | 0.47.
// On Zen 5, where 1 KB ahead streams at 36 GB/s and 2 KB at 40 to 43, the far one is known to pay.
// No bit depends on the distance.
#pragma once

#include <atomic>
#include <cstdint>

#include "checked.h"

namespace hff {

constexpr int64_t kFarPrefetch = 2048;
// Weights of a call, in bytes, from which on it counts as a trial.
constexpr double kTrialBytes = 32 << 20;
constexpr int64_t kTriedRows = 2;

// The distance for calls of one kind, and the votes on it.
class PrefetchDistance {
 public:
  HFF_ALWAYS_INLINE int64_t kept() const { return kept_.load(std::memory_order_relaxed); }
  // What a kernel uses now: the kept distance or, before, that of the trial.
  HFF_ALWAYS_INLINE int64_t bytes() const {
    return kept() >= 0 ? kept() : trial_.load(std::memory_order_relaxed);
  }

  void attempt(int64_t bytes) { trial_.store(bytes, std::memory_order_relaxed); }
  void vote(bool far);

 private:
  std::atomic<int64_t> kept_{-1}, trial_{kFarPrefetch};
  std::atomic<int> lead_{0}, votes_{0};  // lead: votes for kFarPrefetch less those against
};

// Of calls of `rows` rows of dtype HFF_*.
PrefetchDistance& prefetch_distance_of(int32_t dtype, int64_t rows);

// Tries one distance for as long as it lives, where the choice is open and `bytes` are enough.
class PrefetchTrial {
 public:
  PrefetchTrial(int32_t dtype, int64_t rows, double bytes);
  ~PrefetchTrial();
  PrefetchTrial(const PrefetchTrial&) = delete;
  PrefetchTrial& operator=(const PrefetchTrial&) = delete;

 private:
  PrefetchDistance& distance_;
  const double bytes_;
  const bool open_;
  double begin_ = 0.0;
};

}  // namespace hff

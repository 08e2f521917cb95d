// How row kernels that walk weights in order ask memory for them, for up to kTriedRows rows of
// inputs. No bit depends on it.
//   HFF_PREFETCH_LINE:  the very line, which only marks it as read once. The fastest where the
//     hardware looks far enough ahead by itself and more requests get in its way.
//   HFF_PREFETCH_AHEAD: kAhead bytes ahead of the loads, which hides memory's latency where the
//     hardware looks less far.
//   HFF_PREFETCH_TO_L2: the same into L2, which more requests can wait for than L1 has fill
//     buffers. What it leaves there costs the caller, so it has to be faster by kMarginOfL2.
// No manual says which. The first calls of a process that read more weights than caches hold try
// AHEAD and LINE in turn, then the faster of them and TO_L2. What wins stays, for each dtype, for
// one row and for two.
// Share of the read stream on a 2-core Zen 4 VM, (50304, 768) weights, AHEAD | LINE: one row bf16
// 0.92 | 1.00, fp16 0.86 | 0.99, fp32 0.79 | 0.90; two rows bf16 0.76 | 0.97, fp16 0.51 | 0.47. On
// Zen 5, 1 KB ahead streams at 36 GB/s and 2 KB at 40 to 43. On a 2-core Sapphire Rapids VM twelve
// layers of Pythia-160m bf16 take 8.8 ms by LINE, 7.6 by TO_L2.
#pragma once

#include <atomic>
#include <cstdint>

#include "checked.h"

namespace hff {

constexpr int64_t kAhead = 2048;
constexpr double kMarginOfL2 = 0.03;
// Weights of a call, in bytes, from which on it counts as a trial.
constexpr double kTrialBytes = 24 << 20;
constexpr int64_t kTriedRows = 2;

// The choice for calls of one kind, HFF_PREFETCH_*, and the votes on it: a champion and a rival in
// each of two stages.
class PrefetchChoice {
 public:
  HFF_ALWAYS_INLINE int32_t kept() const { return kept_.load(std::memory_order_relaxed); }
  // What a kernel does now: the choice or, before, what the trial is of.
  HFF_ALWAYS_INLINE int32_t now() const {
    return kept() >= 0 ? kept() : trial_.load(std::memory_order_relaxed);
  }

  int stage() const { return stage_.load(std::memory_order_relaxed); }
  void attempt(bool rival);
  // Counts a pair of trials of `stage`, which may be over.
  void vote(int stage, bool for_rival);

 private:
  int32_t rival() const { return stage() == 0 ? HFF_PREFETCH_LINE : HFF_PREFETCH_TO_L2; }

  std::atomic<int32_t> kept_{-1}, trial_{HFF_PREFETCH_AHEAD}, champion_{HFF_PREFETCH_AHEAD};
  std::atomic<int> stage_{0}, lead_{0}, votes_{0};  // lead: votes for the rival less those against
};

// Of calls of `rows` rows of dtype HFF_*.
PrefetchChoice& prefetch_choice_of(int32_t dtype, int64_t rows);

// Tries one of two for as long as it lives, where the choice is open and `bytes` are enough.
class PrefetchTrial {
 public:
  PrefetchTrial(int32_t dtype, int64_t rows, double bytes);
  ~PrefetchTrial();
  PrefetchTrial(const PrefetchTrial&) = delete;
  PrefetchTrial& operator=(const PrefetchTrial&) = delete;

 private:
  PrefetchChoice& choice_;
  const double bytes_;
  const bool open_;
  double begin_ = 0.0;
};

}  // namespace hff

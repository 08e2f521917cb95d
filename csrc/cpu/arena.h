// Scratch of one call, carved from a block that the calling thread keeps and grows. No call state
// outlives the call.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "checked.h"

namespace hff {

// The calling thread's block, at least `bytes` long, 64-byte aligned; null when it cannot be had.
// Counted for faults.
void* thread_scratch(int64_t bytes);
// Gives the calling thread's block back where it is longer than `most`: what one call of a kernel
// that stores all scores has taken is not kept for ever.
void trim_thread_scratch(int64_t most);
// Kept between calls of layers and models. More would stand beside the caller's own activations.
constexpr int64_t kKeptScratch = 1 << 20;

// First pass (base null): adds up. Second pass: hands out. Both run the same code, so they cannot
// disagree.
class Arena {
 public:
  HFF_ALWAYS_INLINE explicit Arena(void* base) : base_(static_cast<char*>(base)), used_(0) {}

  template <class T>
  HFF_ALWAYS_INLINE T* take(Size count) {
    const Size bytes = padded(count * Size(static_cast<int64_t>(sizeof(T))));
    T* out = base_ != nullptr ? reinterpret_cast<T*>(base_ + used_.value()) : nullptr;
    used_ = used_ + bytes;
    return out;
  }
  HFF_ALWAYS_INLINE Size used() const { return used_; }

 private:
  char* base_;
  Size used_;
};

}  // namespace hff

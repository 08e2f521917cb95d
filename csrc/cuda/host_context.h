// Stacks, and the switch between them: on x86-64 and aarch64 a dozen instructions and no system
// call, elsewhere swapcontext. AddressSanitizer and ThreadSanitizer are told of it.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define HFF_FIBERS_ASAN 1
#endif
#if defined(__SANITIZE_THREAD__)
#define HFF_FIBERS_TSAN 1
#endif
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HFF_FIBERS_ASAN 1
#endif
#if __has_feature(thread_sanitizer)
#define HFF_FIBERS_TSAN 1
#endif
#endif

#if !(defined(__ELF__) && (defined(__x86_64__) || defined(__aarch64__)))
#define HFF_FIBERS_UCONTEXT 1
#include <ucontext.h>
#endif

namespace hff {
namespace fibers {

struct Context {
#if defined(HFF_FIBERS_UCONTEXT)
  ucontext_t machine;
#endif
  void* stack_pointer = nullptr;
  char* stack = nullptr;  // lowest byte
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* shadow = nullptr;      // ThreadSanitizer's
};

// Equal stacks, each above an unmapped page. Their tops lie apart in the cache's sets: at equal
// offsets, the stacks of a few hundred fibers would evict each other.
class Stacks {
 public:
  ~Stacks() { clear(); }
  bool map(size_t count);  // false: no memory
  void clear();
  size_t count() const { return count_; }
  // Whatever ran on stack i is forgotten; the next switch to `context` calls entry(), which starts
  // with context_entered() and never returns.
  void prepare(size_t i, Context* context, void (*entry)()) const;

 private:
  char* base_ = nullptr;
  size_t count_ = 0;
};

void adopt_thread(Context* context);  // the calling thread's own stack
void release(Context* context);       // before it is prepared anew, or dropped
void switch_context(Context* from, Context* to);
void context_entered();

}  // namespace fibers
}  // namespace hff

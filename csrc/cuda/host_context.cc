// See host_context.h.
#include "cuda/host_context.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#if defined(HFF_FIBERS_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(HFF_FIBERS_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

#if !defined(HFF_FIBERS_UCONTEXT)
// hff_switch_stack(void** save, void* load): pushes what a function must preserve, keeps the stack
// pointer in *save and goes on where `load` was kept.
extern "C" void hff_switch_stack(void** save, void* load) __attribute__((visibility("hidden")));
#endif

#if defined(HFF_FIBERS_UCONTEXT)
#elif defined(__x86_64__)
asm(R"(
.text
.p2align 4
.globl hff_switch_stack
.hidden hff_switch_stack
.type hff_switch_stack, @function
hff_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size hff_switch_stack, .-hff_switch_stack
)");
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.globl hff_switch_stack
.hidden hff_switch_stack
.type hff_switch_stack, %function
hff_switch_stack:
  stp x29, x30, [sp, #-160]!
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x29, x30, [sp], #160
  ret
.size hff_switch_stack, .-hff_switch_stack
)");
#endif

namespace hff {
namespace fibers {
namespace {

#if defined(HFF_FIBERS_ASAN) || defined(HFF_FIBERS_TSAN)
constexpr size_t kStackBytes = 256 << 10;  // redzones and spilled shadow addresses
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
size_t stride() { return kStackBytes + page(); }

}  // namespace

bool Stacks::map(size_t count) {
  clear();
  void* base = mmap(nullptr, count * stride(), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return false;
  base_ = static_cast<char*>(base), count_ = count;
  for (size_t i = 0; i < count; ++i) {
    if (mprotect(base_ + i * stride(), page(), PROT_NONE) != 0) return clear(), false;
  }
  return true;
}

void Stacks::clear() {
  if (base_ != nullptr) munmap(base_, count_ * stride());
  base_ = nullptr, count_ = 0;
}

void Stacks::prepare(size_t i, Context* context, void (*entry)()) const {
  context->stack = base_ + i * stride() + page();
  context->stack_bytes = kStackBytes;
#if defined(HFF_FIBERS_ASAN)
  __asan_unpoison_memory_region(context->stack, kStackBytes);
#endif
#if defined(HFF_FIBERS_TSAN)
  context->shadow = __tsan_create_fiber(0);
#endif
#if defined(HFF_FIBERS_UCONTEXT)
  getcontext(&context->machine);
  context->machine.uc_stack.ss_sp = context->stack;
  context->machine.uc_stack.ss_size = kStackBytes;
  context->machine.uc_link = nullptr;
  makecontext(&context->machine, entry, 0);
#else
  char* top = context->stack + kStackBytes - i % 31 * 128;
  void** frame = reinterpret_cast<void**>(top);
#if defined(__x86_64__)
  frame -= 8;  // six registers, the entry, and the return address it expects
  std::memset(frame, 0, 64);
  frame[6] = reinterpret_cast<void*>(entry);
#else
  frame -= 20;  // x29, x30, the other preserved registers
  std::memset(frame, 0, 160);
  frame[1] = reinterpret_cast<void*>(entry);
#endif
  context->stack_pointer = frame;
#endif
}

void adopt_thread(Context* context) {
#if defined(HFF_FIBERS_ASAN)
  pthread_attr_t attributes;
  void* stack = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &context->stack_bytes);
  pthread_attr_destroy(&attributes);
  context->stack = static_cast<char*>(stack);
#endif
#if defined(HFF_FIBERS_TSAN)
  context->shadow = __tsan_get_current_fiber();
#endif
  (void)context;
}

void release(Context* context) {
#if defined(HFF_FIBERS_TSAN)
  if (context->shadow != nullptr) __tsan_destroy_fiber(context->shadow);
#endif
  *context = Context();
}

__attribute__((noinline)) void switch_context(Context* from, Context* to) {
#if defined(HFF_FIBERS_ASAN)
  __sanitizer_start_switch_fiber(&from->fake_stack, to->stack, to->stack_bytes);
#endif
#if defined(HFF_FIBERS_TSAN)
  __tsan_switch_to_fiber(to->shadow, 0);
#endif
#if defined(HFF_FIBERS_UCONTEXT)
  swapcontext(&from->machine, &to->machine);
#else
  hff_switch_stack(&from->stack_pointer, to->stack_pointer);
#endif
#if defined(HFF_FIBERS_ASAN)
  __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

void context_entered() {
#if defined(HFF_FIBERS_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

}  // namespace fibers
}  // namespace hff

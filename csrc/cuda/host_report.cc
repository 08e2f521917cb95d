// The sentences in which a launch ends.
#include <cstdarg>
#include <cstdio>

#include "cuda/host_engine.h"

namespace hff {
namespace fibers {
namespace {

std::string format_list(const char* format, va_list arguments) {
  char text[600];
  std::vsnprintf(text, sizeof(text), format, arguments);
  return text;
}

__attribute__((format(printf, 1, 2))) std::string formatted(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string text = format_list(format, arguments);
  va_end(arguments);
  return text;
}

}  // namespace

// leave() does not return, so nothing that owns memory may be alive where it is called.
void Engine::stop(const Fiber* fiber, const char* format, ...) {
  report = formatted("kernel %s, seed %llu: block %d thread %d: %s: ", launch.name,
                     static_cast<unsigned long long>(options.seed), fiber->block, fiber->thread,
                     fiber->primitive);
  va_list arguments;
  va_start(arguments, format);
  report += format_list(format, arguments);
  va_end(arguments);
  leave();
}

void Engine::require_arch(const Fiber* fiber, int arch) {
  if (options.device.arch < arch) {
    stop(fiber, "needs sm_%d, this device is sm_%d", arch / 10, options.device.arch / 10);
  }
}

// What a fiber waits for, in words that are the same for all that wait for the same.
std::string Engine::describe(const Fiber& fiber) const {
  const Cta& cta = *fiber.cta;
  const unsigned long long value = fiber.value;
  switch (fiber.wait) {
    case Wait::kBlock: {
      const NamedBarrier& barrier = cta.named[fiber.value];
      const std::string id = value == 0 ? "" : formatted("(%llu)", value);
      return formatted("%s%s: %d of %d threads arrived", fiber.primitive, id.c_str(),
                       barrier.arrived, barrier.count);
    }
    case Wait::kWarp: {
      const Warp& warp = cta.warps[static_cast<size_t>(fiber.thread / 32)];
      return formatted("%s: %d of 32 lanes of warp %d arrived", fiber.primitive, warp.arrived,
                       fiber.thread / 32);
    }
    case Wait::kCluster:
      return formatted("cluster_wait: %d of %d threads arrived", cta.cluster->arrived,
                       launch.cluster * launch.threads);
    case Wait::kBarrier: {
      const auto* barrier = static_cast<const SharedBarrier*>(fiber.object);
      return formatted(
          "barrier_wait(shared + %td, parity %llu): in phase %u, %d of %d arrivals and %lld bytes "
          "missing",
          reinterpret_cast<const char*>(barrier->word) - cta.arena, value, barrier->phase,
          barrier->pending, barrier->count, static_cast<long long>(barrier->bytes));
    }
    case Wait::kCounter:
      return formatted("wait_for(%p, %llu): it is %u", fiber.object, value,
                       *static_cast<const uint32_t*>(fiber.object));
    case Wait::kPoll:
      return formatted("load_acquire(%p): it stays %llu", fiber.object, value);
    case Wait::kCopies:
      return formatted("copies_wait: groups before %llu", value);
    case Wait::kNothing:
      break;
  }
  return fiber.exited ? "exit" : fiber.primitive;
}

// Threads of a block that are at the same are one line.
std::string Engine::list_fibers() const {
  std::string lines;
  for (uint32_t i = 0, end; i < live_ && lines.size() < 8000; i = end) {
    const Fiber& first = fibers_[i];
    const std::string what = describe(first);
    for (end = i + 1; end < live_ && fibers_[end].cta == first.cta; ++end) {
      if (describe(fibers_[end]) != what) break;
    }
    if (first.exited) continue;
    if (!lines.empty()) lines += "\n  ";
    const int last = fibers_[end - 1].thread;
    lines += formatted("block %d thread", first.block);
    lines +=
        last == first.thread ? formatted(" %d", last) : formatted("s %d-%d", first.thread, last);
    lines += " at " + what;
  }
  if (next_cluster_ < order_.size()) {
    lines += formatted("\n  %zu clusters have not begun: the launch is not cooperative",
                       order_.size() - next_cluster_);
  }
  return lines;
}

void Engine::give_up(const char* what) {
  report = formatted("kernel %s, seed %llu: %s: ", launch.name,
                     static_cast<unsigned long long>(options.seed), what);
  report += list_fibers();
  leave();
}

void Engine::deadlock() {
  for (uint32_t i = 0; i < live_; ++i) {
    if (fibers_[i].wait == Wait::kWarp) {
      give_up("deadlock, a warp collective was called by a part of the warp");
    }
  }
  give_up("deadlock");
}

}  // namespace fibers
}  // namespace hff

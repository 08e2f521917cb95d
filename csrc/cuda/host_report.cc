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

void Engine::stop(const Fiber* fiber, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const std::string text = format_list(format, arguments);
  va_end(arguments);
  report = formatted("kernel %s, seed %llu: block %d thread %d: %s: %s", launch.name,
                     static_cast<unsigned long long>(options.seed), fiber->block, fiber->thread,
                     fiber->primitive, text.c_str());
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
      return formatted("%s(%llu): %d of %d threads arrived", fiber.primitive, value,
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
  return fiber.exited ? "ended" : fiber.primitive;
}

void Engine::deadlock() {
  std::string lines;
  bool parted = false;
  for (uint32_t i = 0; i < live_;) {
    const Fiber& first = fibers_[i];
    const std::string what = describe(first);
    uint32_t end = i + 1;
    while (end < live_ && fibers_[end].cta == first.cta && describe(fibers_[end]) == what) ++end;
    parted = parted || first.wait == Wait::kWarp;
    if (!first.cta->ended && lines.size() < 8000) {
      lines += formatted("\n  block %d threads %d-%d: %s", first.block, first.thread,
                         fibers_[end - 1].thread, what.c_str());
    }
    i = end;
  }
  const size_t waiting = order_.size() - next_cluster_;
  if (waiting > 0) {
    lines += formatted("\n  %zu clusters have not begun: the launch is not cooperative", waiting);
  }
  const size_t end = lines.find('\n', 1);
  report = formatted("kernel %s, seed %llu: deadlock%s:", launch.name,
                     static_cast<unsigned long long>(options.seed),
                     parted ? ", a warp collective was called by a part of the warp" : "") +
           lines.substr(2, end == std::string::npos ? end : end - 2) + lines;
  leave();
}

}  // namespace fibers
}  // namespace hff

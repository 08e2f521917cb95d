// Words in global memory by which blocks tell each other how far they are.
#include <algorithm>

#include "cuda/host_engine.h"

namespace hff {
namespace fibers {

namespace {
bool reached(const uint32_t* counter, uint32_t target) {
  return static_cast<int32_t>(*counter - target) >= 0;
}
}  // namespace

void Engine::changed(const uint32_t* word) {
  releases_ = 0;
  for (size_t i = 0; i < watchers_.size();) {
    Fiber* fiber = watchers_[i];
    const bool woken =
        fiber->object == word &&
        (fiber->wait == Wait::kPoll || reached(word, static_cast<uint32_t>(fiber->value)));
    if (!woken) {
      ++i;
      continue;
    }
    make_ready(fiber);
    watchers_[i] = watchers_.back();
    watchers_.pop_back();
  }
}

// Nobody else can run: those who poll a word see it unchanged. That may end a loop that counts its
// turns; a thousand turns of everybody without any effect are a deadlock.
bool Engine::release_pollers() {
  for (Fiber* fiber : watchers_) {
    if (fiber->wait == Wait::kCounter &&
        reached(static_cast<const uint32_t*>(fiber->object), static_cast<uint32_t>(fiber->value))) {
      stop(fiber, "the counter reached %u by a plain store", static_cast<uint32_t>(fiber->value));
    }
  }
  if (++releases_ > 1000) return false;
  const auto polls = [](const Fiber* fiber) { return fiber->wait == Wait::kPoll; };
  const auto rest = std::partition(watchers_.begin(), watchers_.end(),
                                   [&](const Fiber* fiber) { return !polls(fiber); });
  if (rest == watchers_.end()) return false;
  for (auto i = rest; i != watchers_.end(); ++i) make_ready(*i);
  watchers_.erase(rest, watchers_.end());
  return true;
}

namespace {
// The word is global, and aligned.
Fiber* enter_word(const char* primitive, const uint32_t* p) {
  Fiber* fiber = enter(primitive);
  size_t offset;
  if (reinterpret_cast<uintptr_t>(p) % 4 != 0 || p == nullptr) {
    fiber->engine->stop(fiber, "%p is not aligned to 4 bytes, or null",
                        static_cast<const void*>(p));
  }
  if (fiber->engine->owner_of(p, &offset) != nullptr) {
    fiber->engine->stop(fiber, "the word is in shared memory, at %zu", offset);
  }
  if (fiber->depends) {
    fiber->engine->stop(fiber, "%p is global memory, before dependencies_wait",
                        static_cast<const void*>(p));
  }
  return fiber;
}
}  // namespace

uint32_t load_acquire(const uint32_t* p) {
  Fiber* fiber = enter_word("load_acquire", p);
  fiber->engine->point();
  if (fiber->polled == p && fiber->polled_value == *p) {
    fiber->engine->wait_on(Wait::kPoll, p, *p, nullptr);
  }
  fiber->polled = p, fiber->polled_value = *p;
  return *p;
}

uint32_t add_acq_rel(uint32_t* p, uint32_t addend) {
  Fiber* fiber = enter_word("add_acq_rel", p);
  fiber->engine->point();
  const uint32_t old = *p;
  *p = old + addend;
  fiber->engine->changed(p);
  fiber->engine->point();
  return old;
}

void store_relaxed(uint32_t* p, uint32_t value) {
  Fiber* fiber = enter_word("store_relaxed", p);
  fiber->engine->point();
  *p = value;
  fiber->engine->changed(p);
  fiber->engine->point();
}

void wait_for(const uint32_t* counter, uint32_t target) {
  Fiber* fiber = enter_word("wait_for", counter);
  fiber->engine->point();
  while (!reached(counter, target)) {
    fiber->engine->wait_on(Wait::kCounter, counter, target, nullptr);
  }
}

void dependencies_wait() {
  Fiber* fiber = enter("dependencies_wait");
  fiber->depends = false;
  fiber->engine->point();
}

void switch_point() { current()->engine->point(); }

}  // namespace fibers
}  // namespace hff

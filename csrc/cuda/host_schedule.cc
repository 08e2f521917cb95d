// Who goes on at a switch point, and how fibers wait.
#include "cuda/host_engine.h"

namespace hff {
namespace fibers {

void Members::clear(uint32_t limit) {
  words_.assign(limit / 64 + 1, 0);
  summary_.assign(limit / 4096 + 1, 0);
}

uint32_t Members::first_from(uint32_t i) const {
  if (i >> 6 >= words_.size()) return kNone;
  const uint64_t here = words_[i >> 6] >> (i & 63);
  if (here != 0) return i + static_cast<uint32_t>(__builtin_ctzll(here));
  const uint32_t next = (i >> 6) + 1;  // word
  for (uint32_t s = next >> 6; s < summary_.size(); ++s) {
    uint64_t words = summary_[s];
    if (s == next >> 6) words = words >> (next & 63) << (next & 63);
    if (words == 0) continue;
    const uint32_t word = s * 64 + static_cast<uint32_t>(__builtin_ctzll(words));
    return word * 64 + static_cast<uint32_t>(__builtin_ctzll(words_[word]));
  }
  return kNone;
}

uint32_t Members::last() const {
  for (size_t s = summary_.size(); s-- > 0;) {
    if (summary_[s] == 0) continue;
    const uint32_t word =
        static_cast<uint32_t>(s) * 64 + 63 - static_cast<uint32_t>(__builtin_clzll(summary_[s]));
    return word * 64 + 63 - static_cast<uint32_t>(__builtin_clzll(words_[word]));
  }
  return kNone;
}

// ---- policies -----------------------------------------------------------------------------------

void Engine::draw_policy() {
  policy_ = static_cast<Policy>(random.below(5));
  epoch_left_ = 16 << random.below(8);
  switch_every_ = 1 << random.below(6);
  until_switch_ = 1;
  constexpr uint32_t kDelivery[] = {0, 2, 8, 64};
  delivery_ = options.late_copies ? 0 : kDelivery[random.below(4)];
  // A thread, a warp or a block.
  const uint32_t threads = static_cast<uint32_t>(launch.threads);
  const uint32_t sizes[] = {1, 32, threads};
  const uint32_t size = policy_ == Policy::kOneBlock ? threads : sizes[random.below(3)];
  from_ = random.below(live_) / size * size, to_ = from_ + size;
}

uint32_t Engine::pick_round(uint32_t start) const {
  const uint32_t found = ready_.first_from(start);
  return found != Members::kNone ? found : ready_.first_from(0);
}

// A ready fiber, or kNone.
uint32_t Engine::pick() {
  switch (policy_) {
    case Policy::kLowest:
      return ready_.first_from(0);
    case Policy::kHighest:
      return ready_.last();
    case Policy::kAnybody:
      return pick_round(random.below(live_));
    case Policy::kOneBlock: {
      uint32_t found = ready_.first_from(from_ + random.below(to_ - from_));
      if (found >= to_) found = ready_.first_from(from_);
      if (found >= to_) {  // as far as it gets: another's turn
        found = pick_round(random.below(live_));
        if (found == Members::kNone) return found;
        from_ = found / (to_ - from_) * (to_ - from_);
        to_ = from_ + static_cast<uint32_t>(launch.threads);
      }
      return found;
    }
    case Policy::kStarve:
      break;
  }
  const uint32_t found = pick_round(random.below(live_));
  if (found < from_ || found >= to_) return found;
  const uint32_t other = pick_round(to_);
  return other < from_ || other >= to_ ? other : found;
}

Fiber* Engine::choose() {
  if (--epoch_left_ < 0) draw_policy();
  if (++turns_ > options.most_turns) give_up("it does not end");
  if (delivery_ != 0 && !flying_.empty() && random.one_in(delivery_)) deliver_sometimes();
  for (;;) {
    const uint32_t found = pick();
    if (found != Members::kNone) return &fibers_[found];
    if (!flying_.empty()) {
      deliver(random.below(static_cast<uint32_t>(flying_.size())));
    } else if (!release_pollers()) {
      deadlock();
    }
  }
}

void Engine::yield() {
  until_switch_ = 1 + static_cast<int>(random.below(static_cast<uint32_t>(2 * switch_every_)));
  resume(choose());
}

// ---- running and waiting ------------------------------------------------------------------------

void Engine::resume(Fiber* next) {
  Fiber* from = current();
  if (next == from) return;
  ++switches;
  self = next;
  switch_context(&from->context, &next->context);
}

// To the caller of run(), for good.
void Engine::leave() {
  Fiber* from = current();
  self = nullptr;
  switch_context(&from->context, &main_);
  __builtin_unreachable();
}

void Engine::make_ready(Fiber* fiber) {
  fiber->wait = Wait::kNothing;
  ready_.add(fiber->id);
}

void Engine::wait_on(Wait wait, const void* object, uint64_t value, Waiters* waiters) {
  Fiber* fiber = current();
  fiber->wait = wait, fiber->object = object, fiber->value = value;
  if (waiters != nullptr) {
    fiber->next_waiter = waiters->head;
    waiters->head = fiber;
  } else if (wait != Wait::kCopies) {
    watchers_.push_back(fiber);
  }
  ready_.remove(fiber->id);
  resume(choose());
}

void Engine::wake(Waiters* waiters) {
  for (Fiber* fiber = waiters->head; fiber != nullptr; fiber = fiber->next_waiter) {
    make_ready(fiber);
  }
  waiters->head = nullptr;
  releases_ = 0;
}

}  // namespace fibers
}  // namespace hff

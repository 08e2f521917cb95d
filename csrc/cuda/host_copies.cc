// Asynchronous copies: queued when they are issued, delivered by the scheduler.
#include <algorithm>
#include <cstring>

#include "cuda/host_engine.h"

namespace hff {
namespace fibers {
namespace {

// Where in the block's shared memory `bytes` from `shared` lie; stops if they do not.
size_t destination(const Fiber* fiber, const void* shared, const void* global, uint32_t bytes) {
  Engine* engine = fiber->engine;
  size_t offset = 0, from = 0;
  if (bytes == 0 || bytes % 16 != 0) {
    engine->stop(fiber, "%u bytes: a positive multiple of 16 is asked", bytes);
  }
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(global) % 16 != 0 || global == nullptr) {
    engine->stop(fiber, "from %p to %p: addresses aligned to 16 bytes are asked", global, shared);
  }
  if (engine->owner_of(shared, &offset) != fiber->cta ||
      offset + bytes > static_cast<size_t>(engine->launch.shared_bytes)) {
    engine->stop(fiber, "%u bytes to shared + %td, the block has %d bytes", bytes,
                 static_cast<const char*>(shared) - fiber->arena, engine->launch.shared_bytes);
  }
  if (engine->owner_of(global, &from) != nullptr) {
    engine->stop(fiber, "its source is in shared memory, at %zu", from);
  }
  return offset;
}

}  // namespace

Cta* Engine::owner_of(const void* p, size_t* offset) {
  const size_t at = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(arenas_);
  const size_t slot = at / arena_stride_;
  if (slot >= live_ / static_cast<uint32_t>(launch.threads)) return nullptr;
  Cta& cta = ctas_[slot];
  if (static_cast<const char*>(p) < cta.arena) return nullptr;  // a guard page
  *offset = static_cast<size_t>(static_cast<const char*>(p) - cta.arena);
  return &cta;
}

void Engine::issue(Fiber* fiber, char* to, const void* from, uint32_t bytes,
                   SharedBarrier* barrier) {
  Cta& cta = *fiber->cta;
  const size_t first = static_cast<size_t>(to - cta.arena) / 16;
  for (size_t i = first; i < first + bytes / 16; ++i) {
    if (cta.in_flight[i] != 0) stop(fiber, "a copy to shared + %zu is in flight", i * 16);
    cta.in_flight[i] = 1;
  }
  if (free_copies_.empty()) {
    free_copies_.push_back(static_cast<uint32_t>(copies_.size()));
    copies_.emplace_back();
  }
  const uint32_t slot = free_copies_.back();
  free_copies_.pop_back();
  flying_.push_back(slot);
  Copy& copy = copies_[slot];
  copy.fiber = fiber, copy.to = to, copy.from = static_cast<const char*>(from);
  copy.bytes = bytes, copy.done = 0;
  copy.begin = random.one_in(2) ? 16 * random.below(bytes / 16) : 0;
  copy.barrier = barrier;
  copy.group = fiber->groups;
  copy.late = random.one_in(2);
  copy.staged = random.one_in(2);
  if (copy.staged) copy.stage.assign(copy.from, copy.from + bytes);
  std::memset(to, poison_, bytes);
  ++cta.copies;
}

void Engine::deliver_sometimes() {
  const uint32_t i = random.below(static_cast<uint32_t>(flying_.size()));
  if (!copies_[flying_[i]].late) deliver(i);
}

// A piece of the i-th copy in flight.
void Engine::deliver(uint32_t i) {
  Copy& copy = copies_[flying_[i]];
  Fiber* fiber = copy.fiber;
  Cta& cta = *fiber->cta;
  const uint32_t left = copy.bytes - copy.done, at = (copy.begin + copy.done) % copy.bytes;
  uint32_t piece = random.one_in(2) ? left : 16 * (1 + random.below(left / 16));
  piece = std::min(piece, copy.bytes - at);
  std::memcpy(copy.to + at, (copy.staged ? copy.stage.data() : copy.from) + at, piece);
  const size_t first = static_cast<size_t>(copy.to + at - cta.arena) / 16;
  std::memset(&cta.in_flight[first], 0, piece / 16);
  copy.done += piece;
  releases_ = 0;
  const bool done = copy.done == copy.bytes;
  if (done) {
    free_copies_.push_back(flying_[i]);
    flying_[i] = flying_.back();
    flying_.pop_back();
    --cta.copies;
  }
  if (SharedBarrier* barrier = copy.barrier) {
    barrier->bytes -= piece;
    if (barrier->bytes < 0) {
      fiber->primitive = "bulk_copy";
      stop(fiber, "%u bytes arrived at the barrier at shared + %td, which expects %lld fewer",
           piece, reinterpret_cast<char*>(barrier->word) - cta.arena,
           -static_cast<long long>(barrier->bytes));
    }
    complete_phase(barrier);
  } else if (done) {
    --fiber->copies;
    --fiber->in_group[copy.group % Fiber::kGroups];
    if (fiber->wait == Wait::kCopies && groups_complete(fiber, static_cast<uint32_t>(fiber->value)))
      make_ready(fiber);
  }
}

// Whether the groups of this thread before `group` are complete.
bool Engine::groups_complete(Fiber* fiber, uint32_t group) {
  while (fiber->oldest != fiber->groups && fiber->in_group[fiber->oldest % Fiber::kGroups] == 0) {
    ++fiber->oldest;
  }
  return static_cast<int32_t>(fiber->oldest - group) >= 0;
}

void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* word) {
  Fiber* fiber = enter("bulk_copy");
  Engine* engine = fiber->engine;
  SharedBarrier* barrier = find_barrier(fiber, word);
  destination(fiber, shared, global, bytes);
  if (!barrier->fenced) {
    engine->stop(fiber, "no barrier_init_fence since the barrier at shared + %td was initialised",
                 reinterpret_cast<char*>(word) - fiber->arena);
  }
  engine->issue(fiber, static_cast<char*>(shared), global, bytes, barrier);
  engine->point();
}

void copy16(void* shared, const void* global) {
  Fiber* fiber = enter("copy16");
  destination(fiber, shared, global, 16);
  ++fiber->copies;
  ++fiber->in_group[fiber->groups % Fiber::kGroups];
  fiber->engine->issue(fiber, static_cast<char*>(shared), global, 16, nullptr);
  fiber->engine->point();
}

void copies_commit() {
  Fiber* fiber = enter("copies_commit");
  ++fiber->groups;
  fiber->engine->groups_complete(fiber, fiber->groups);
  if (fiber->groups - fiber->oldest >= Fiber::kGroups) {
    fiber->engine->stop(fiber, "%u groups of copies in flight", fiber->groups - fiber->oldest);
  }
  fiber->engine->point();
}

void copies_wait(int pending) {
  Fiber* fiber = enter("copies_wait");
  Engine* engine = fiber->engine;
  engine->point();
  const uint32_t group = fiber->groups - std::min(fiber->groups, static_cast<uint32_t>(pending));
  if (!engine->groups_complete(fiber, group)) {
    engine->wait_on(Wait::kCopies, fiber, group, nullptr);
  }
}

void check_access(const void* p, size_t bytes, const char* primitive) {
  Fiber* fiber = enter(primitive);
  Engine* engine = fiber->engine;
  if (reinterpret_cast<uintptr_t>(p) % std::min<size_t>(bytes, 16) != 0 || p == nullptr) {
    engine->stop(fiber, "%p is not aligned to %zu bytes, or null", p, std::min<size_t>(bytes, 16));
  }
  size_t offset = 0;
  const Cta* cta = engine->owner_of(p, &offset);
  if (cta == nullptr) {
    if (fiber->depends) engine->stop(fiber, "%p is global memory, before dependencies_wait", p);
    return;
  }
  if (offset + bytes > static_cast<size_t>(engine->launch.shared_bytes)) {
    engine->stop(fiber, "%zu bytes at shared + %zu, the block has %d bytes", bytes, offset,
                 engine->launch.shared_bytes);
  }
  if (cta->ended) engine->stop(fiber, "the block whose shared memory this is has ended");
  for (size_t i = offset / 16; i < (offset + bytes + 15) / 16; ++i) {
    if (cta->in_flight[i] != 0) {
      engine->stop(fiber, "a copy to shared + %zu of block %d is in flight", i * 16,
                   cta->fibers->block);
    }
  }
}

}  // namespace fibers
}  // namespace hff

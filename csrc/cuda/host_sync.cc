// The primitives by which threads of a block, a warp and a cluster wait for each other.
#include "cuda/host_engine.h"

namespace hff {
namespace fibers {
namespace {

Warp& warp_of(const Fiber* fiber) {
  return fiber->cta->warps[static_cast<size_t>(fiber->thread / 32)];
}

// Lanes that wait at a collective cannot come to this barrier, and it cannot do without them.
void require_whole_warp(const Fiber* fiber) {
  const Warp& warp = warp_of(fiber);
  if (warp.arrived > 0) {
    fiber->engine->stop(fiber, "%d of 32 lanes of its warp are at %s", warp.arrived,
                        warp.primitive);
  }
}

void require_whole_warps(const Fiber* fiber, const NamedBarrier& barrier) {
  for (int warp = 0; warp < fiber->threads / 32; ++warp) {
    if (barrier.of_warp[warp] % 32 != 0) {
      fiber->engine->stop(fiber, "%d threads arrived, of warp %d only %d", barrier.count, warp,
                          barrier.of_warp[warp]);
    }
  }
}

}  // namespace

void trap(const char* what) { current()->engine->stop(enter("trap"), "%s", what); }

void sync(int id, int count) {
  Fiber* fiber = enter(id == 0 ? "sync_block" : "sync_named");
  Engine* engine = fiber->engine;
  Cta& cta = *fiber->cta;
  NamedBarrier& barrier = cta.named[id];
  if (id == 0 && cta.exited > 0) {
    engine->stop(fiber, "%d threads of the block have ended", cta.exited);
  }
  if (count < 32 || count % 32 != 0 || count > fiber->threads) {
    engine->stop(fiber, "%d threads: a multiple of 32 up to %d is asked", count, fiber->threads);
  }
  require_whole_warp(fiber);
  if (barrier.arrived == 0) barrier.count = count;
  if (barrier.count != count) {
    engine->stop(fiber, "barrier %d is one of %d threads here and of %d elsewhere", id, count,
                 barrier.count);
  }
  ++barrier.of_warp[fiber->thread / 32];
  if (++barrier.arrived < count) {
    return engine->wait_on(Wait::kBlock, &barrier, static_cast<uint64_t>(id), &barrier.waiters);
  }
  if (count < fiber->threads) require_whole_warps(fiber, barrier);
  Waiters waiters = barrier.waiters;
  barrier = NamedBarrier();
  engine->wake(&waiters);
  engine->point();
}

namespace {

// All lanes meet; each gets what lane `from` brought.
uint64_t meet(const char* primitive, int from, uint64_t bits, int bytes) {
  Fiber* fiber = enter(primitive);
  Engine* engine = fiber->engine;
  Warp& warp = warp_of(fiber);
  const int lane = fiber->thread % 32;
  if (warp.exited > 0) engine->stop(fiber, "%d lanes of its warp have ended", warp.exited);
  if (from < 0 || from > 31) engine->stop(fiber, "there is no lane %d", from);
  if (warp.arrived == 0) warp.primitive = primitive, warp.bytes = bytes;
  if (warp.primitive != primitive || warp.bytes != bytes) {
    engine->stop(fiber, "%d of 32 lanes of its warp are at %s, with %d bytes where it has %d",
                 warp.arrived, warp.primitive, warp.bytes, bytes);
  }
  warp.in[lane] = bits, warp.from[lane] = static_cast<int8_t>(from);
  if (++warp.arrived < 32) {
    engine->wait_on(Wait::kWarp, &warp, 0, &warp.waiters);
    return fiber->exchanged;
  }
  warp.arrived = 0;
  for (int i = 0; i < 32; ++i) fiber[i - lane].exchanged = warp.in[warp.from[i]];
  engine->wake(&warp.waiters);
  engine->point();
  return fiber->exchanged;
}

}  // namespace

void sync_warp() { meet("sync_warp", 0, 0, 0); }

uint64_t warp_exchange(bool by_mask, int argument, uint64_t bits, int bytes) {
  if (by_mask) return meet("warp_xor", (current()->thread % 32) ^ argument, bits, bytes);
  return meet("warp_from", argument, bits, bytes);
}

// ---- clusters -----------------------------------------------------------------------------------

void cluster_arrive() {
  Fiber* fiber = enter("cluster_arrive");
  Engine* engine = fiber->engine;
  Cluster& cluster = *fiber->cta->cluster;
  if (fiber->cluster_arrived) engine->stop(fiber, "it has arrived, and not waited since");
  if (cluster.exited > 0) {
    engine->stop(fiber, "%d threads of the cluster have ended", cluster.exited);
  }
  require_whole_warp(fiber);
  fiber->cluster_arrived = true;
  fiber->cluster_phase = cluster.phase;
  if (++cluster.arrived == fiber->cluster_size * fiber->threads) {
    cluster.arrived = 0;
    ++cluster.phase;
    engine->wake(&cluster.waiters);
  }
  engine->point();
}

void cluster_wait() {
  Fiber* fiber = enter("cluster_wait");
  Engine* engine = fiber->engine;
  Cluster& cluster = *fiber->cta->cluster;
  if (!fiber->cluster_arrived) engine->stop(fiber, "it has not arrived before");
  if (cluster.phase == fiber->cluster_phase) {
    engine->wait_on(Wait::kCluster, &cluster, 0, &cluster.waiters);
  } else {
    engine->point();
  }
  fiber->cluster_arrived = false;
}

const void* peer(const void* shared, int rank) {
  Fiber* fiber = enter("peer");
  Engine* engine = fiber->engine;
  Cta& cta = *fiber->cta;
  engine->point();
  size_t offset = 0;
  if (engine->owner_of(shared, &offset) != &cta) {
    engine->stop(fiber, "%p is not in this block's shared memory", shared);
  }
  if (rank < 0 || rank >= fiber->cluster_size) {
    engine->stop(fiber, "there is no rank %d in a cluster of %d", rank, fiber->cluster_size);
  }
  if (rank == fiber->cluster_rank) return shared;
  const Cta& other = cta.cluster->ctas[rank];
  if (cta.cluster->phase == 0) {
    engine->stop(fiber, "block %d has not passed a cluster barrier and may not have begun",
                 other.fibers->block);
  }
  if (other.ended) {
    engine->stop(fiber, "block %d has ended, and its shared memory with it", other.fibers->block);
  }
  return other.arena + offset;
}

// ---- barriers in shared memory ------------------------------------------------------------------

namespace {

constexpr uint64_t kInitialised = 0x6d62617272696572ull;  // a number in the low half is added
constexpr int64_t kMostBytes = (1 << 20) - 1;             // of PTX's tx-count
constexpr int kMostArrivals = (1 << 20) - 1;

size_t word_offset(const Fiber* fiber, const uint64_t* word) {
  size_t offset = 0;
  if (fiber->engine->owner_of(word, &offset) != fiber->cta ||
      reinterpret_cast<uintptr_t>(word) % 8 != 0) {
    fiber->engine->stop(fiber, "%p is not an aligned word of this block's shared memory",
                        static_cast<const void*>(word));
  }
  return offset;
}

}  // namespace

SharedBarrier* find_barrier(const Fiber* fiber, const uint64_t* word) {
  fiber->engine->require_arch(fiber, 900);
  const size_t offset = word_offset(fiber, word);
  const uint64_t number = *word - kInitialised;
  if (number < fiber->cta->barriers.size() && fiber->cta->barriers[number].word == word) {
    return &fiber->cta->barriers[number];
  }
  fiber->engine->stop(fiber, "there is no barrier at shared + %zu: not initialised, or overwritten",
                      offset);
}

void barrier_init(uint64_t* word, int arrivals) {
  Fiber* fiber = enter("barrier_init");
  Engine* engine = fiber->engine;
  engine->require_arch(fiber, 900);
  const size_t offset = word_offset(fiber, word);
  if (arrivals < 1 || arrivals > kMostArrivals) engine->stop(fiber, "%d arrivals", arrivals);
  for (const SharedBarrier& barrier : fiber->cta->barriers) {
    if (barrier.word == word) engine->stop(fiber, "there is a barrier at shared + %zu", offset);
  }
  *word = kInitialised + fiber->cta->barriers.size();
  fiber->cta->barriers.push_back({word, arrivals, arrivals, 0, 0, fiber, false, {}});
  engine->point();
}

void barrier_init_fence() {
  Fiber* fiber = enter("barrier_init_fence");
  fiber->engine->require_arch(fiber, 900);
  for (SharedBarrier& barrier : fiber->cta->barriers) {
    barrier.fenced = barrier.fenced || barrier.initialiser == fiber;
  }
  fiber->engine->point();
}

void Engine::complete_phase(SharedBarrier* barrier) {
  if (barrier->pending != 0 || barrier->bytes != 0) return;
  barrier->pending = barrier->count;
  ++barrier->phase;
  wake(&barrier->waiters);
}

namespace {

void arrive(Fiber* fiber, SharedBarrier* barrier, uint32_t bytes) {
  Engine* engine = fiber->engine;
  if (barrier->pending == 0) {
    engine->stop(fiber, "all %d arrivals of phase %u are there, %lld bytes are not", barrier->count,
                 barrier->phase, static_cast<long long>(barrier->bytes));
  }
  barrier->bytes += bytes;
  if (barrier->bytes > kMostBytes) {
    engine->stop(fiber, "phase %u expects %lld bytes, a barrier counts to %lld", barrier->phase,
                 static_cast<long long>(barrier->bytes), static_cast<long long>(kMostBytes));
  }
  --barrier->pending;
  engine->complete_phase(barrier);
  engine->point();
}

}  // namespace

void barrier_expect(uint64_t* word, uint32_t bytes) {
  Fiber* fiber = enter("barrier_expect");
  arrive(fiber, find_barrier(fiber, word), bytes);
}

void barrier_arrive(uint64_t* word) {
  Fiber* fiber = enter("barrier_arrive");
  arrive(fiber, find_barrier(fiber, word), 0);
}

void barrier_wait(uint64_t* word, uint32_t parity) {
  Fiber* fiber = enter("barrier_wait");
  Engine* engine = fiber->engine;
  SharedBarrier* barrier = find_barrier(fiber, word);
  if (parity > 1) engine->stop(fiber, "parity %u", parity);
  engine->point();
  if ((barrier->phase & 1) != parity) return;
  const uint32_t phase = barrier->phase;
  engine->wait_on(Wait::kBarrier, barrier, parity, &barrier->waiters);
  if (barrier->phase - phase > 1) {
    engine->stop(fiber, "phase %u was awaited and the barrier is in phase %u: parity cannot tell",
                 phase, barrier->phase);
  }
}

}  // namespace fibers
}  // namespace hff

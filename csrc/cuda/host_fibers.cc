// See host_fibers.h. This file starts launches and schedules their fibers.
#include "cuda/host_fibers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "cuda/host_engine.h"

namespace hff {
namespace fibers {

__thread const Identity* self;

namespace {

thread_local Options t_options;

Engine& engine() {
  thread_local Engine engine;
  return engine;
}

constexpr int kMostResident = 4;       // clusters, where not all must be
constexpr unsigned char kTail = 0xa5;  // behind a block's shared memory

size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
size_t whole_pages(size_t bytes) { return (bytes + page() - 1) / page() * page(); }

}  // namespace

Options& options() { return t_options; }
const char* report() { return engine().report.c_str(); }
uint64_t switches() { return engine().switches; }
bool run(const port::Launch& launch, const Entry& entry) {
  return engine().run(launch, entry, &t_options);
}

int max_active_clusters(const port::Launch& launch) {
  const port::Device& device = t_options.device;
  if (launch.threads < 1 || launch.shared_bytes > device.shared_limit) return 0;
  if (launch.cluster > 1 && device.arch < 900) return 0;
  const int per_sm =
      std::min({device.shared_per_sm / (launch.shared_bytes + 1024), 2048 / launch.threads, 32});
  return per_sm * device.sms / launch.cluster;
}

// ---- the set of runnable fibers ------------------------------------------------------------------

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

// ---- a launch ------------------------------------------------------------------------------------

Engine::~Engine() {
  for (Fiber& fiber : fibers_) release(&fiber.context);
  if (arenas_ != nullptr) munmap(arenas_, arena_count_ * arena_stride_ + page());
}

// The limits that CUDA checks at a launch.
bool Engine::accept() {
  const port::Device& device = options.device;
  const port::Launch& l = launch;
  char why[200] = "";
  if (self != nullptr) {
    std::snprintf(why, sizeof(why), "a kernel cannot launch");
  } else if (l.threads < 32 || l.threads > 1024 || l.threads % 32 != 0) {
    std::snprintf(why, sizeof(why), "%d threads: a multiple of 32 up to 1024 is asked", l.threads);
  } else if (l.cluster < 1 || l.cluster > 16 || l.grid < 1 || l.grid % l.cluster != 0) {
    std::snprintf(why, sizeof(why), "%d blocks in clusters of %d", l.grid, l.cluster);
  } else if (l.cluster > 1 && device.arch < 900) {
    std::snprintf(why, sizeof(why), "clusters need sm_90, this device is sm_%d", device.arch / 10);
  } else if (l.shared_bytes < 0 || l.shared_bytes > device.shared_limit) {
    std::snprintf(why, sizeof(why), "%d bytes of shared memory, the limit is %d", l.shared_bytes,
                  device.shared_limit);
  } else if (l.cooperative && l.grid / l.cluster > fibers::max_active_clusters(l)) {
    std::snprintf(why, sizeof(why), "%d clusters cannot be resident at once, %d can",
                  l.grid / l.cluster, fibers::max_active_clusters(l));
  }
  if (why[0] == 0) return true;
  report = std::string("kernel ") + l.name + ": " + why;
  return false;
}

bool Engine::map_arenas(size_t count) {
  const size_t stride = whole_pages(static_cast<size_t>(launch.shared_bytes)) + page();
  if (stride == arena_stride_ && count <= arena_count_) return true;
  if (arenas_ != nullptr) munmap(arenas_, arena_count_ * arena_stride_ + page());
  arenas_ = nullptr, arena_count_ = 0, arena_stride_ = stride;
  void* base = mmap(nullptr, count * stride + page(), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return false;
  arenas_ = static_cast<char*>(base), arena_count_ = count;
  for (size_t i = 0; i <= count; ++i) {  // a guard page before, between and behind
    if (mprotect(arenas_ + i * stride, page(), PROT_NONE) != 0) return false;
  }
  return true;
}

// Fibers, blocks and shared memory for as many clusters as may be resident.
bool Engine::reserve() {
  const size_t total = static_cast<size_t>(launch.grid / launch.cluster);
  const size_t clusters = launch.cooperative ? total : std::min<size_t>(total, kMostResident);
  const size_t ctas = clusters * static_cast<size_t>(launch.cluster);
  const size_t fibers = ctas * static_cast<size_t>(launch.threads);
  if (fibers > fibers_.size() || abandoned_) {
    for (Fiber& fiber : fibers_) release(&fiber.context);
    if (fibers > stacks_.count() && !stacks_.map(fibers)) return false;
    fibers_.assign(stacks_.count(), Fiber());
    for (size_t i = 0; i < fibers_.size(); ++i) {
      fibers_[i].engine = this, fibers_[i].id = static_cast<uint32_t>(i);
      stacks_.prepare(i, &fibers_[i].context, fiber_main);
    }
    abandoned_ = false;
  }
  if (ctas > ctas_.size()) ctas_ = std::vector<Cta>(ctas);
  if (clusters > clusters_.size()) clusters_.resize(clusters);
  return map_arenas(ctas);
}

bool Engine::run(const port::Launch& a_launch, const Entry& an_entry, Options* wanted) {
  launch = a_launch, entry = an_entry, options = *wanted;
  random = Random(options.seed);
  wanted->seed = random.next();
  report.clear();
  if (!accept()) return false;
  if (!reserve()) {
    report = std::string("kernel ") + launch.name + ": no memory for its fibers";
    return false;
  }
  begin();
  Fiber* first = choose();
  self = first;
  switch_context(&main_, &first->context);
  abandoned_ = !report.empty();
  return report.empty();
}

void Engine::begin() {
  adopt_thread(&main_);
  const int total = launch.grid / launch.cluster;
  order_.resize(static_cast<size_t>(total));
  for (int i = 0; i < total; ++i) order_[static_cast<size_t>(i)] = i;
  for (size_t i = order_.size(); i > 1; --i) {
    std::swap(order_[i - 1], order_[random.below(static_cast<uint32_t>(i))]);
  }
  const uint32_t drawn = 1 + random.below(kMostResident);
  const uint32_t resident = static_cast<uint32_t>(total);
  const uint32_t slots = launch.cooperative ? resident : std::min(resident, drawn);
  live_ = slots * static_cast<uint32_t>(launch.cluster * launch.threads);
  ready_.clear(live_);
  watchers_.clear();
  flying_.clear(), free_copies_.clear(), copies_.clear();
  next_cluster_ = 0, clusters_left_ = resident;
  switches = 0, releases_ = 0;
  poison_ = !options.poison ? 0 : random.one_in(4) ? 0x7b : 0xff;
  for (uint32_t slot = 0; slot < slots; ++slot) {
    clusters_[slot].ctas = &ctas_[slot * static_cast<uint32_t>(launch.cluster)];
    start_cluster(&clusters_[slot]);
  }
  draw_policy();
}

void Engine::start_cluster(Cluster* cluster) {
  const int first_block = order_[next_cluster_++] * launch.cluster;
  const size_t shared = static_cast<size_t>(launch.shared_bytes);
  cluster->arrived = cluster->exited = cluster->ended = 0;
  cluster->phase = 0, cluster->waiters = Waiters();
  for (int rank = 0; rank < launch.cluster; ++rank) {
    Cta& cta = cluster->ctas[rank];
    const size_t slot = static_cast<size_t>(&cta - ctas_.data());
    cta.cluster = cluster;
    cta.arena = arenas_ + slot * arena_stride_ + page();
    cta.fibers = &fibers_[slot * static_cast<size_t>(launch.threads)];
    cta.exited = cta.copies = 0, cta.ended = false;
    for (NamedBarrier& barrier : cta.named) barrier = NamedBarrier();
    cta.warps.assign(static_cast<size_t>(launch.threads / 32), Warp());
    cta.barriers.clear();
    cta.in_flight.assign(shared / 16 + 1, 0);
    std::memset(cta.arena, poison_, shared);
    std::memset(cta.arena + shared, kTail, whole_pages(shared) - shared);
    for (int thread = 0; thread < launch.threads; ++thread) {
      Fiber& fiber = cta.fibers[thread];
      static_cast<Identity&>(fiber) = {thread, launch.threads, first_block + rank, launch.grid,
                                       rank,   launch.cluster, cta.arena};
      fiber.cta = &cta;
      fiber.exited = fiber.cluster_arrived = false;
      fiber.primitive = "start";
      fiber.polled = nullptr;
      fiber.groups = fiber.oldest = fiber.copies = 0;
      std::memset(fiber.in_group, 0, sizeof(fiber.in_group));
      make_ready(&fiber);
    }
  }
}

// ---- the life of a fiber -------------------------------------------------------------------------

// Where a thread ends, its fiber waits for the next thread to become.
void Engine::fiber_main() {
  context_entered();
  for (;;) {
    Fiber* fiber = current();
    Engine* engine = fiber->engine;
    engine->entry.invoke(engine->entry.kernel, engine->entry.params);
    engine->end_fiber(fiber);
  }
}

void Engine::end_fiber(Fiber* fiber) {
  Cta& cta = *fiber->cta;
  Cluster& cluster = *cta.cluster;
  Warp& warp = cta.warps[static_cast<size_t>(fiber->thread / 32)];
  fiber->primitive = "exit";
  if (fiber->cluster_arrived) stop(fiber, "cluster_arrive without cluster_wait");
  if (cluster.arrived > 0) {
    stop(fiber, "%d threads have arrived at the cluster barrier and wait for this one",
         cluster.arrived);
  }
  if (cta.named[0].arrived > 0) {
    stop(fiber, "%d threads wait for this one at sync_block", cta.named[0].arrived);
  }
  if (warp.arrived > 0) {
    stop(fiber, "%d lanes of its warp wait for this one at %s", warp.arrived, warp.primitive);
  }
  if (fiber->copies > 0) stop(fiber, "%u of its copies are in flight", fiber->copies);
  fiber->exited = true;
  ready_.remove(fiber->id);
  ++warp.exited, ++cluster.exited;
  releases_ = 0;
  if (++cta.exited == launch.threads) end_cta(&cta, fiber);
  if (cluster.ended == launch.cluster) {
    cluster.ended = 0;
    if (--clusters_left_ == 0) {
      self = nullptr;
      switch_context(&fiber->context, &main_);
      return;  // the next launch begins here
    }
    if (next_cluster_ < order_.size()) start_cluster(&cluster);
  }
  resume(choose());
}

void Engine::end_cta(Cta* cta, const Fiber* last) {
  const size_t shared = static_cast<size_t>(launch.shared_bytes);
  if (cta->copies > 0) {
    stop(last, "the block ends with %d copies to its shared memory in flight", cta->copies);
  }
  for (const SharedBarrier& barrier : cta->barriers) {
    if (barrier.bytes != 0) {
      stop(last, "the block ends while its barrier at shared + %td expects %lld bytes",
           reinterpret_cast<char*>(barrier.word) - cta->arena,
           static_cast<long long>(barrier.bytes));
    }
  }
  for (size_t i = shared; i < whole_pages(shared); ++i) {
    if (static_cast<unsigned char>(cta->arena[i]) != kTail)
      stop(last, "the block wrote shared + %zu, it has %zu bytes", i, shared);
  }
  std::memset(cta->arena, poison_, shared);
  cta->ended = true;
  ++cta->cluster->ended;
}

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

// ---- who goes on ---------------------------------------------------------------------------------

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

// ---- words in global memory ----------------------------------------------------------------------

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

void switch_point() { current()->engine->point(); }

}  // namespace fibers
}  // namespace hff

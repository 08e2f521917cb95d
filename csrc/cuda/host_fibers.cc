// See host_fibers.h. This file begins and ends launches, clusters, blocks and threads.
#include "cuda/host_fibers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>

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

size_t page() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}
size_t whole_pages(size_t bytes) { return (bytes + page() - 1) / page() * page(); }

}  // namespace

Options& options() { return t_options; }
const char* report() { return engine().report.c_str(); }
uint64_t switches() { return engine().switches; }
bool run(const port::Launch& launch, const Entry& entry) {
  if (self != nullptr) current()->engine->stop(enter("launch"), "a kernel cannot launch another");
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

// ---- a launch -----------------------------------------------------------------------------------

Engine::~Engine() {
  for (Fiber& fiber : fibers_) release(&fiber.context);
  if (arenas_ != nullptr) munmap(arenas_, arena_count_ * arena_stride_ + page());
}

// The limits that CUDA checks at a launch.
bool Engine::accept() {
  const port::Device& device = options.device;
  const port::Launch& l = launch;
  char why[200] = "";
  if (l.threads < 32 || l.threads > 1024 || l.threads % 32 != 0) {
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
    if (mprotect(arenas_ + i * stride, page(), PROT_NONE) == 0) continue;
    munmap(base, count * stride + page());
    arenas_ = nullptr, arena_count_ = 0;
    return false;
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
    fibers_.clear();
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
  flying_.clear(), free_copies_.resize(copies_.size());
  std::iota(free_copies_.begin(), free_copies_.end(), 0u);
  next_cluster_ = 0, clusters_left_ = resident;
  switches = turns_ = 0, releases_ = 0;
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
      fiber.depends = launch.dependent;
      fiber.primitive = "start";
      fiber.polled = nullptr;
      fiber.groups = fiber.oldest = fiber.copies = 0;
      std::memset(fiber.in_group, 0, sizeof(fiber.in_group));
      make_ready(&fiber);
    }
  }
}

// ---- the life of a fiber ------------------------------------------------------------------------

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
  if (fiber->depends) stop(fiber, "no dependencies_wait in a launch that may start early");
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
  const size_t mapped = whole_pages(shared);
  for (size_t i = shared; i < mapped; ++i) {
    if (static_cast<unsigned char>(cta->arena[i]) != kTail)
      stop(last, "the block wrote shared + %zu, it has %zu bytes", i, shared);
  }
  std::memset(cta->arena, poison_, shared);
  cta->ended = true;
  ++cta->cluster->ended;
}

}  // namespace fibers
}  // namespace hff

// What the parts of the fiber engine share. host_fibers.cc begins and ends launches and threads,
// host_schedule.cc says who goes on, host_sync.cc, host_copies.cc and host_words.cc hold the
// primitives, host_report.cc the sentences.
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "cuda/host_context.h"
#include "cuda/host_fibers.h"

namespace hff {
namespace fibers {

// splitmix64
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>((next() >> 32) * n >> 32); }
  bool one_in(uint32_t n) { return below(n) == 0; }

 private:
  uint64_t state_;
};

// A set of small numbers that finds the next member at or after a given one.
class Members {
 public:
  void clear(uint32_t limit);
  void add(uint32_t i) {
    words_[i >> 6] |= 1ull << (i & 63);
    summary_[i >> 12] |= 1ull << (i >> 6 & 63);
  }
  void remove(uint32_t i) {
    if ((words_[i >> 6] &= ~(1ull << (i & 63))) == 0) summary_[i >> 12] &= ~(1ull << (i >> 6 & 63));
  }
  uint32_t first_from(uint32_t i) const;  // kNone if there is none
  uint32_t last() const;                  // kNone if empty
  static constexpr uint32_t kNone = ~0u;

 private:
  std::vector<uint64_t> words_, summary_;
};

struct Cta;
struct Cluster;
class Engine;

enum class Wait : uint8_t { kNothing, kBlock, kWarp, kCluster, kBarrier, kCounter, kPoll, kCopies };

struct Fiber : Identity {
  static constexpr uint32_t kGroups = 32;  // groups of copies a thread may have in flight

  Context context;
  Engine* engine = nullptr;
  Cta* cta = nullptr;
  uint32_t id = 0;  // its number among the fibers that live
  Wait wait = Wait::kNothing;
  bool exited = true;
  bool cluster_arrived = false;
  bool depends = false;              // on the launch ahead, for which it has not waited
  const char* primitive = "";        // the last that was called
  Fiber* next_waiter = nullptr;      // of the same thing
  const void* object = nullptr;      // what it waits for
  uint64_t value = 0;                // of the object, or id, parity, group
  uint64_t exchanged = 0;            // by the last warp collective
  uint32_t cluster_phase = 0;        // in which it arrived
  const uint32_t* polled = nullptr;  // the last load_acquire, and what it saw
  uint32_t polled_value = 0;
  uint32_t groups = 0, oldest = 0;  // committed groups of copies; the first not known complete
  uint32_t in_group[kGroups] = {};  // copies in flight per group
  uint32_t copies = 0;              // all of them
};

// Fibers that wait for one thing, chained through next_waiter.
struct Waiters {
  Fiber* head = nullptr;
};

struct NamedBarrier {
  int arrived = 0, count = 0;
  uint8_t of_warp[32] = {};  // arrivals
  Waiters waiters;
};

struct Warp {
  int arrived = 0, exited = 0;
  const char* primitive = "";
  int bytes = 0;
  uint64_t in[32];
  int8_t from[32];
  Waiters waiters;
};

// A Barrier of port.h: the word in shared memory holds its number.
struct SharedBarrier {
  uint64_t* word;
  int count, pending;  // arrivals of a phase; those still missing
  int64_t bytes;       // still expected
  uint32_t phase;
  const Fiber* initialiser;
  bool fenced;
  Waiters waiters;
};

struct Cta {
  Cluster* cluster;
  Fiber* fibers;
  char* arena;
  int exited, copies;  // threads that left, copies in flight
  bool ended;
  NamedBarrier named[16];
  std::vector<Warp> warps;
  std::deque<SharedBarrier> barriers;  // stays in place as it grows
  std::vector<uint8_t> in_flight;      // per 16 bytes of the arena: a copy will still write them
};

struct Cluster {
  Cta* ctas;
  int arrived, exited;  // threads
  int ended;            // blocks
  uint32_t phase;
  Waiters waiters;
};

struct Copy {
  Fiber* fiber;
  char* to;
  const char* from;
  uint32_t bytes, done, begin;  // pieces go round from `begin`
  SharedBarrier* barrier;       // null: a copy of a group
  uint32_t group;
  bool late;    // delivered only when nobody can run
  bool staged;  // the source was read at issue
  std::vector<char> stage;
};

class Engine {
 public:
  Engine() : random(1) {}
  ~Engine();
  // False: `report` says why.
  bool run(const port::Launch& launch, const Entry& entry, Options* options);

  // On a fiber. A switch point: goes on with whom the policy draws, perhaps with the same.
  void point() {
    if (--until_switch_ <= 0) yield();
  }
  void yield();
  // The running fiber waits, chained to `waiters`, or among the watchers if that is null.
  void wait_on(Wait wait, const void* object, uint64_t value, Waiters* waiters);
  void wake(Waiters* waiters);
  void make_ready(Fiber* fiber);
  void changed(const uint32_t* word);  // by a primitive; wakes its watchers
  [[noreturn]] void stop(const Fiber* fiber, const char* format, ...)
      __attribute__((format(printf, 3, 4)));
  void require_arch(const Fiber* fiber, int arch);

  void issue(Fiber* fiber, char* to, const void* from, uint32_t bytes, SharedBarrier* barrier);
  void complete_phase(SharedBarrier* barrier);  // if it is complete
  bool groups_complete(Fiber* fiber, uint32_t group);
  Cta* owner_of(const void* p, size_t* offset);  // null: not shared memory

  Random random;
  Options options;
  port::Launch launch;
  Entry entry{};
  std::string report;
  uint64_t switches = 0;

 private:
  enum class Policy { kAnybody, kOneBlock, kLowest, kHighest, kStarve };

  bool accept();
  bool reserve();
  bool map_arenas(size_t count);
  void begin();
  void start_cluster(Cluster* cluster);
  void end_fiber(Fiber* fiber);
  void end_cta(Cta* cta, const Fiber* last);
  void draw_policy();
  Fiber* choose();
  uint32_t pick();
  uint32_t pick_round(uint32_t start) const;
  void resume(Fiber* next);
  [[noreturn]] void leave();
  void deliver(uint32_t i);
  void deliver_sometimes();
  bool release_pollers();
  [[noreturn]] void deadlock();
  [[noreturn]] void give_up(const char* what);
  std::string describe(const Fiber& fiber) const;
  std::string list_fibers() const;
  static void fiber_main();

  Context main_;
  Stacks stacks_;
  std::vector<Fiber> fibers_;
  std::vector<Cta> ctas_;
  std::vector<Cluster> clusters_;
  bool abandoned_ = false;  // the last launch left fibers in the middle

  char* arenas_ = nullptr;
  size_t arena_stride_ = 0, arena_count_ = 0;
  unsigned char poison_ = 0;

  std::vector<int> order_;  // of clusters
  size_t next_cluster_ = 0;
  uint32_t clusters_left_ = 0, live_ = 0;  // live_: fibers that this launch uses
  Members ready_;
  std::vector<Fiber*> watchers_;  // of words in global memory
  std::vector<Copy> copies_;      // slots, in use or free
  std::vector<uint32_t> flying_, free_copies_;

  Policy policy_ = Policy::kAnybody;
  uint32_t from_ = 0, to_ = 0;  // fibers that the policy favours or starves
  uint64_t turns_ = 0;          // drawn so far
  int until_switch_ = 0, switch_every_ = 1, epoch_left_ = 0, releases_ = 0;
  uint32_t delivery_ = 0;  // at a switch a copy moves with chance 1 / delivery_; 0: only when idle
};

// At this word of the running fiber's block; stops if there is none.
SharedBarrier* find_barrier(const Fiber* fiber, const uint64_t* word);

inline Fiber* current() { return static_cast<Fiber*>(const_cast<Identity*>(self)); }
// The running fiber, which is in this primitive now.
inline Fiber* enter(const char* primitive) {
  Fiber* fiber = current();
  fiber->primitive = primitive;
  return fiber;
}

}  // namespace fibers
}  // namespace hff

// See team.h. The own team: a job is published by a release store of `ticket_`, which carries a
// serial number and the width, so that workers outside the width never touch the job. Idle workers
// spin kIdleSpins pauses (about 50 us) and then sleep.
#include "cpu/team.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <climits>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace hff {
namespace {

constexpr int kIdleSpins = 2000;
static_assert(HFF_MAX_THREADS < 256, "a ticket has eight bits of width");

struct Team {
  std::mutex owner;  // held by the caller whose job runs
  std::mutex sleep_mutex;
  std::condition_variable sleep_cv;
  std::atomic<int> sleepers{0};
  alignas(64) std::atomic<uint64_t> ticket{0};  // serial << 8 | width
  alignas(64) std::atomic<int> pending{0};
  Turn done;  // serial of the last job that all workers have left
  TeamFunction function = nullptr;
  void* context = nullptr;
  uint64_t float_mode = 0;
  int workers = 0;
};

struct Job {
  TeamFunction function;
  void* context;
  Barrier* barrier;
  uint64_t float_mode;
};

std::atomic<Team*> g_team{nullptr};
OpenMp g_openmp_storage;
std::atomic<const OpenMp*> g_openmp{nullptr};
std::atomic<bool> g_forked{false};  // OpenMP threads do not survive a fork: never again
std::once_flag g_once;

// Rounding, and what becomes of denormals.
uint64_t float_mode() {
  uint64_t mode = 0;
#if defined(__x86_64__)
  mode = _mm_getcsr();
#elif defined(__aarch64__)
  asm volatile("mrs %0, fpcr" : "=r"(mode));
#endif
  return mode;
}

void set_float_mode(uint64_t mode) {
#if defined(__x86_64__)
  _mm_setcsr(static_cast<unsigned>(mode));
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" : : "r"(mode));
#else
  (void)mode;
#endif
}

uint64_t await_ticket(Team* team, uint64_t seen) {
  for (int spins = 0; spins < kIdleSpins; ++spins) {
    const uint64_t ticket = team->ticket.load(std::memory_order_acquire);
    if (ticket != seen) return ticket;
    cpu_pause();
  }
  std::unique_lock<std::mutex> lock(team->sleep_mutex);
  team->sleepers.fetch_add(1, std::memory_order_seq_cst);
  team->sleep_cv.wait(lock, [&] { return team->ticket.load(std::memory_order_seq_cst) != seen; });
  team->sleepers.fetch_sub(1, std::memory_order_seq_cst);
  return team->ticket.load(std::memory_order_acquire);
}

void worker_main(Team* team, int thread, uint64_t seen) {
  for (;;) {
    seen = await_ticket(team, seen);
    const int width = static_cast<int>(seen & 0xff);
    if (thread >= width) continue;
    set_float_mode(team->float_mode);
    team->function(team->context, thread, width);
    if (team->pending.fetch_sub(1, std::memory_order_acq_rel) == 1)
      team->done.set(static_cast<uint32_t>(seen >> 8));
  }
}

// Starts workers until `width - 1` exist; fewer where the system refuses.
void grow(Team* team, int width) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (team->workers < width - 1) {
    const uint64_t seen = team->ticket.load(std::memory_order_relaxed);
    try {
      std::thread(worker_main, team, team->workers + 1, seen).detach();
    } catch (...) {
      break;
    }
    ++team->workers;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

// The child of a fork has none of the parent's threads: it forgets both teams and makes its own
// when it needs one.
void forget_team() {
  g_team.store(nullptr, std::memory_order_release);
  g_openmp.store(nullptr, std::memory_order_release);
  g_forked.store(true, std::memory_order_release);
}

void run_openmp(void* data) {
  const Job& job = *static_cast<Job*>(data);
  const OpenMp* openmp = &g_openmp_storage;
  const uint64_t own = float_mode();
  set_float_mode(job.float_mode);
  const int width = openmp->width();
  if (job.barrier != nullptr) job.barrier->set_width(width);
  job.function(job.context, openmp->thread(), width);
  set_float_mode(own);
}

Team* the_team() {
  std::call_once(g_once, [] { pthread_atfork(nullptr, nullptr, forget_team); });
  Team* team = g_team.load(std::memory_order_acquire);
  if (team != nullptr) return team;
  Team* made = new (std::nothrow) Team;
  if (made == nullptr) return nullptr;
  if (g_team.compare_exchange_strong(team, made, std::memory_order_acq_rel)) return made;
  delete made;
  return team;
}

}  // namespace

void use_openmp(const OpenMp* openmp) {
  std::call_once(g_once, [] { pthread_atfork(nullptr, nullptr, forget_team); });
  if (g_forked.load(std::memory_order_acquire)) return;
  if (openmp != nullptr) g_openmp_storage = *openmp;
  g_openmp.store(openmp != nullptr ? &g_openmp_storage : nullptr, std::memory_order_release);
}

// A sleeper counts itself before the kernel compares the number, and who sets it looks for sleepers
// after: one of the two sees the other.
void Turn::sleep_while(uint32_t number) {
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while (number_.load(std::memory_order_seq_cst) == number) {
#if defined(__linux__)
    syscall(SYS_futex, &number_, FUTEX_WAIT_PRIVATE, number, nullptr, nullptr, 0);
#else
    sched_yield();
#endif
  }
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

void Turn::wake() {
#if defined(__linux__)
  syscall(SYS_futex, &number_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#endif
}

void run_on_team(int width, TeamFunction function, void* context, Barrier* barrier) {
  Team* team = width > 1 ? the_team() : nullptr;
  if (team == nullptr || !team->owner.try_lock()) return function(context, 0, 1);
  std::lock_guard<std::mutex> owned(team->owner, std::adopt_lock);
  if (width > HFF_MAX_THREADS) width = HFF_MAX_THREADS;
  if (const OpenMp* openmp = g_openmp.load(std::memory_order_acquire)) {
    Job job{function, context, barrier, float_mode()};
    return openmp->parallel(run_openmp, &job, static_cast<unsigned>(width), 0);
  }
  if (team->workers < width - 1) grow(team, width);
  if (width > team->workers + 1) width = team->workers + 1;
  if (width == 1) return function(context, 0, 1);
  if (barrier != nullptr) barrier->set_width(width);

  team->function = function;
  team->context = context;
  team->float_mode = float_mode();
  team->pending.store(width - 1, std::memory_order_relaxed);
  const uint64_t last = team->ticket.load(std::memory_order_relaxed) >> 8, serial = last + 1;
  team->ticket.store(serial << 8 | static_cast<uint64_t>(width), std::memory_order_seq_cst);
  if (team->sleepers.load(std::memory_order_seq_cst) > 0) {
    std::lock_guard<std::mutex> lock(team->sleep_mutex);
    team->sleep_cv.notify_all();
  }
  function(context, 0, width);
  team->done.wait_while(static_cast<uint32_t>(last));
}

}  // namespace hff

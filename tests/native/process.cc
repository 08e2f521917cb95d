// Rows 17, 20, 21, 24: what a library owes the process it lives in.
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "trial.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

// Exported by builds with -DHFF_FAULTS only.
extern "C" __attribute__((weak)) void hff_fault_allocation(int64_t k);

namespace hff_test {
namespace {

// One case of each kernel with the outputs of a serial call.
struct Known {
  std::unique_ptr<Case> c;
  std::vector<char> expected;
};

std::vector<Known> known_cases(Random& random, const Options& options, Size size,
                               std::string* failure) {
  std::vector<Known> all;
  for (const Kernel* kernel : options.kernels()) {
    Known known;
    Design design;
    design.size = size;
    known.c = kernel->make(random, design);
    known.c->seal();
    if (failure->empty()) *failure = call_checked(*known.c, 0, known.c->independent_rows(), 1);
    known.expected = known.c->arena.outputs();
    all.push_back(std::move(known));
  }
  return all;
}

std::string call_known(std::vector<Known>& all, int32_t threads) {
  for (Known& known : all) {
    const std::string failure = check_same_bits(*known.c, known.expected, threads);
    if (!failure.empty())
      return std::string(known.c->kernel()) + " " + known.c->shape() + ": " + failure;
  }
  return "";
}

// The child's exit code tells whether its results were right; a child that hangs is killed by its
// own alarm.
std::string call_in_child(std::vector<Known>& all) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child < 0) return "fork failed";
  if (child == 0) {
    struct sigaction standard = {};
    standard.sa_handler = SIG_DFL;
    sigaction(SIGALRM, &standard, nullptr);
    alarm(10);
    const std::string failure = call_known(all, 2);
    if (!failure.empty()) std::printf("     in the child: %s\n", failure.c_str());
    std::fflush(stdout);
    _exit(failure.empty() ? 0 : 1);
  }
  int status = 0;
  if (waitpid(child, &status, 0) != child) return "waitpid failed";
  if (WIFSIGNALED(status))
    return "the child died of signal " + std::to_string(WTERMSIG(status)) + " (14: it hung)";
  return WEXITSTATUS(status) == 0 ? "" : "the child computed something else";
}

void shrink(const LinearData& head) {
  for (const Array& all : {head.weight, head.bias}) {
    for (int64_t i = 0; i < all.count; ++i) all.set(i, all.get(i) * 0x1p-16);
  }
}

}  // namespace

bool run_host(const Options& options, const std::string& isa) {
  Tally tally(options, "host", "row 24 float mode of the caller", isa);
  const int rounding[] = {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
  for (int64_t i = 0; i < options.count(200); ++i) {
    const uint64_t seed = options.seed + static_cast<uint64_t>(i);
    Random random(seed);
    const Kernel& kernel = pick_kernel(random, options);
    tally.begin(seed, kernel.name);
    const auto c = kernel.make(random, Design{});
    tally.describe(c->shape());
    // denormal logits of f16, which are normal numbers to whom takes those of fp32 as zero
    if (c->dtype() == HFF_F16 && c->chosen.next) shrink(*c->linears().back());
    c->seal();
    const int mode = rounding[random.range(0, 3)];
    std::fesetround(mode);
#if defined(__x86_64__)
    const uint32_t saved = _mm_getcsr();
    if (random.chance(0.5)) _mm_setcsr(saved | 0x8040);  // flush to zero, denormals are zero
#endif
    // Threads take the mode of their caller: the bits do not depend on how many there are.
    std::string failure = call_checked(*c, 0, c->independent_rows(), 1);
    if (failure.empty()) failure = check_same_bits(*c, c->arena.outputs(), 2);
    if (failure.empty()) failure = check_memory(*c);
#if defined(__x86_64__)
    _mm_setcsr(saved);
#endif
    std::fesetround(FE_TONEAREST);
    tally.end(failure);
  }
  return tally.print();
}

bool run_threads(const Options& options, const std::string& isa) {
  constexpr int kCallers = 8;
  Tally tally(options, "threads", "row 20 eight threads at once, bits as serial", isa);
  const int64_t rounds = std::max<int64_t>(1, options.count(400) / kCallers);
  std::vector<std::vector<Known>> cases;
  std::string failure;
  std::vector<std::unique_ptr<Random>> randoms;
  for (int caller = 0; caller < kCallers; ++caller) {
    randoms.push_back(std::make_unique<Random>(options.seed + static_cast<uint64_t>(caller)));
    cases.push_back(
        known_cases(*randoms.back(), options, caller % 2 ? Size::kNormal : Size::kTiny, &failure));
  }
  tally.begin(options.seed, "");
  tally.describe("eight callers");
  std::vector<std::string> failures(kCallers);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller) {
    callers.emplace_back([&, caller] {
      for (int64_t i = 0; i < rounds && failures[caller].empty(); ++i) {
        failures[caller] = call_known(cases[caller], 1 + caller % 3);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const std::string& text : failures) {
    if (failure.empty()) failure = text;
  }
  tally.end(failure);
  tally.trials = kCallers * rounds;
  return tally.print();
}

bool run_fork(const Options& options, const std::string& isa) {
  Tally tally(options, "fork", "row 21 fork after use and during a call", isa);
  if (HFF_TESTS_TSAN) {
    tally.skip("ThreadSanitizer does not follow a fork of threads");
    return tally.print();
  }
  for (int64_t i = 0; i < options.count(50); ++i) {
    const uint64_t seed = options.seed + static_cast<uint64_t>(i);
    Random random(seed), other(seed + 1);
    tally.begin(seed, "");
    std::string failure;
    std::vector<Known> mine = known_cases(random, options, Size::kTiny, &failure);
    std::vector<Known> theirs = known_cases(other, options, Size::kTiny, &failure);
    if (failure.empty()) failure = call_known(mine, 2);
    std::atomic<bool> stop{false};
    std::string caller_failure;
    std::thread caller;
    // a lock of AddressSanitizer's allocator that another thread holds at the fork hangs the child
    if (i % 2 && !HFF_TESTS_ASAN) {
      caller = std::thread([&] {
        while (!stop.load() && caller_failure.empty()) caller_failure = call_known(theirs, 2);
      });
    }
    if (failure.empty()) failure = call_in_child(mine);
    stop.store(true);
    if (caller.joinable()) caller.join();
    if (failure.empty()) failure = caller_failure;
    if (failure.empty()) failure = call_known(mine, 2);  // the parent's team is as before
    tally.end(failure);
  }
  return tally.print();
}

bool run_openmp(const Options& options, const std::string& isa) {
  setenv("GOMP_SPINCOUNT", "10000", 0);  // cores are few and shared
  void* runtime = HFF_TESTS_TSAN ? nullptr : dlopen("libgomp.so.1", RTLD_NOW);
  if (!runtime) {
    Tally tally(options, "openmp", "rows 16, 20, 21, 24 on OpenMP threads", isa);
    tally.skip(HFF_TESTS_TSAN ? "ThreadSanitizer does not see libgomp's synchronisation"
                              : "no libgomp.so.1");
    return tally.print();
  }
  const hff_status status =
      hff_use_openmp(dlsym(runtime, "GOMP_parallel"), dlsym(runtime, "omp_get_thread_num"),
                     dlsym(runtime, "omp_get_num_threads"));
  Options few = options;
  few.openmp = true;
  if (!few.trials) few.trials = 50;
  bool clean = status == HFF_OK;
  for (const auto run : {run_determinism, run_host, run_threads, run_fork})
    clean = run(few, isa) && clean;
  return hff_use_openmp(nullptr, nullptr, nullptr) == HFF_OK && clean;
}

// Fails the first, second, ... allocation of a call on a fresh thread, until the call gets through.
bool run_allocation(const Options& options, const std::string& isa) {
  Tally tally(options, "allocation", "row 17 every scratch allocation fails once", isa);
  if (!hff_fault_allocation) {
    tally.skip("the library is built without HFF_FAULTS");
    return tally.print();
  }
  for (int64_t i = 0; i < options.count(50); ++i) {
    const uint64_t seed = options.seed + static_cast<uint64_t>(i);
    Random random(seed);
    const Kernel& kernel = pick_kernel(random, options);
    tally.begin(seed, kernel.name);
    const auto c = kernel.make(random, Design{});
    tally.describe(c->shape());
    c->seal();
    std::string failure;
    int64_t refused = 0;
    for (int64_t k = 1; failure.empty() && k < 1000; ++k) {
      hff_status status = HFF_OK;
      std::string sentence;
      std::thread([&] {
        hff_fault_allocation(k);
        status = c->call(2);
        if (status) sentence = hff_last_error();
        hff_fault_allocation(0);
      }).join();
      if (status == HFF_OK) break;
      ++refused;
      if (status != HFF_OUT_OF_MEMORY)
        failure = "allocation " + std::to_string(k) + ": status " + std::to_string(status) + " " +
                  sentence;
      if (sentence.empty()) failure = "out of memory without a sentence";
      if (failure.empty() && !c->arena.outputs_as_sealed())
        failure = "allocation " + std::to_string(k) + " failed and outputs changed";
    }
    if (failure.empty() && !refused && kernel.make != make_norm && kernel.make != make_pack)
      failure = "no allocation failed";
    if (failure.empty()) {
      c->restore();
      failure = call_checked(*c, 0, c->independent_rows(), 2);
    }
    const std::vector<char> expected = c->arena.outputs();
    if (failure.empty()) failure = check_same_bits(*c, expected, 1);
    tally.end(failure);
    tally.trials += refused;
  }
  return tally.print();
}

}  // namespace hff_test

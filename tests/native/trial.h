// Judging a case: parity against the truth with stock's error as yardstick, untouched memory, float
// mode; and the row of the summary that counts trials.
#ifndef HFF_TESTS_TRIAL_H
#define HFF_TESTS_TRIAL_H

#include <set>
#include <string>
#include <vector>

#include "case.h"

#if defined(__SANITIZE_THREAD__)
#define HFF_TESTS_TSAN 1
#else
#define HFF_TESTS_TSAN 0
#endif
#if defined(__SANITIZE_ADDRESS__)
#define HFF_TESTS_ASAN 1
#else
#define HFF_TESTS_ASAN 0
#endif

namespace hff_test {

struct Options {
  std::string mode = "test";
  uint64_t seed = 1;
  int64_t trials = 0;          // 0: the default of each row
  std::set<std::string> only;  // rows and kernels; empty: all
  std::string isa;             // empty: every one the machine has
  int32_t threads = 2;         // bench
  bool openmp = false;         // calls run on OpenMP threads

  bool wants_row(const std::string& row) const;
  std::vector<const Kernel*> kernels() const;
  int64_t count(int64_t standard) const { return trials ? trials : standard; }
};

// Trials of one property; prints each failure with what replays it, and one line at the end.
class Tally {
 public:
  // row: a name such as "parity", for --only; title: what the summary says
  Tally(const Options& options, std::string row, std::string title, std::string isa);
  // Announces a trial, so that a crash or a hang names it too.
  void begin(uint64_t seed, const std::string& kernel);
  void describe(const std::string& shape) { shape_ = shape; }
  // "" or what went wrong
  void end(const std::string& failure);
  void relax() { ++relaxed_; }
  void skip(const std::string& reason) { skipped_ = reason; }
  // The line; true if nothing failed.
  bool print() const;

  int64_t trials = 0, failures = 0;

 private:
  const Options& options_;
  void fail(const std::string& failure);
  std::string row_, title_, isa_, shape_, kernel_, skipped_;
  uint64_t seed_ = 0;
  int64_t relaxed_ = 0, without_room_ = 0;
};

// Rounding mode and exception masks of the calling thread.
struct HostState {
  uint32_t mxcsr = 0, x87 = 0;
  int rounding = 0;
  static HostState now();
  bool operator==(const HostState& o) const {
    return mxcsr == o.mxcsr && x87 == o.x87 && rounding == o.rounding;
  }
};

// Each returns "" or the failure as a sentence.
std::string call_checked(Case& c, int64_t first, int64_t count, int32_t threads);
// Lengths advanced, every other byte outside `results` as sealed, canaries whole.
std::string check_memory(Case& c);
// max error <= 2 x stock's + 2 ulp, and relative L2 within the dtype's limit (or twice stock's
// where stock exceeds it)
std::string check_parity(Case& c, bool* relaxed);
// Same class (nan, inf, zero, finite) as stock or the truth; the finite ones by the rule above
std::string check_classes(Case& c);
std::string check_equal(Case& c);  // equality with the truth, rounded once
// Restores, calls, compares every output byte with `expected`.
std::string check_same_bits(Case& c, const std::vector<char>& expected, int32_t threads);

const Kernel& pick_kernel(Random& random, const Options& options);

// The rows: each returns whether it was clean.
bool run_parity(const Options& options, const std::string& isa);
bool run_exact(const Options& options, const std::string& isa);
bool run_activations(const Options& options, const std::string& isa);
bool run_differential(const Options& options, const std::string& isa);
bool run_determinism(const Options& options, const std::string& isa);
bool run_edge(const Options& options, const std::string& isa);
bool run_host(const Options& options, const std::string& isa);
bool run_threads(const Options& options, const std::string& isa);
bool run_fork(const Options& options, const std::string& isa);
// determinism, host, threads and fork again, calls running on an OpenMP runtime's threads
bool run_openmp(const Options& options, const std::string& isa);
bool run_strides(const Options& options, const std::string& isa);
bool run_panels(const Options& options, const std::string& isa);
bool run_steps(const Options& options, const std::string& isa);
bool run_allocation(const Options& options, const std::string& isa);
// On the device only:
bool run_seeds(const Options& options, const std::string& isa);
bool run_values(const Options& options, const std::string& isa);
bool run_unsupported(const Options& options, const std::string& isa);
bool run_schedules(const Options& options, const std::string& isa);
bool run_fuzz(const Options& options, const std::string& isa);
bool run_refusals(const Options& options, const std::string& isa);
bool run_bench(const Options& options, const std::string& isa);

}  // namespace hff_test
#endif

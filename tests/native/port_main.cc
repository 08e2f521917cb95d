// hff_port_cases: small kernels on the fiber engine, right ones and ones with a fault.
//
//   --seeds N     seeds of every case, 1000 unless told
//   --seed N      the first; a printed seed with --seeds 1 replays one run
//   --only text   cases whose name contains it
// Exit status: 0 if right kernels were right under every seed and every fault was found, 1 if not,
// 2 for a wrong command line.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "port_case.h"

namespace hff {

// The library keeps the sentence for hff_last_error(); here the report has it.
hff_status fail(hff_status status, const char*, ...) { return status; }

}  // namespace hff

namespace hff_test {
namespace {

struct Run {
  uint64_t first = 1, seeds = 1000;
  std::string only;
};

// Whether `seen` contains one of the alternatives of `symptom`.
bool shows(const std::string& seen, const std::string& symptom) {
  for (size_t at = 0; at <= symptom.size();) {
    const size_t end = std::min(symptom.find('|', at), symptom.size());
    if (seen.find(symptom.substr(at, end - at)) != std::string::npos) return true;
    at = end + 1;
  }
  return false;
}

void print_indented(const std::string& text) {
  std::printf("    ");
  for (const char c : text) {
    std::putchar(c);
    if (c == '\n') std::printf("    ");
  }
  std::putchar('\n');
}

std::string run_seed(const PortCase& c, uint64_t seed) {
  hff::fibers::options() = hff::fibers::Options();
  hff::fibers::options().seed = seed;
  hff::fibers::options().late_copies = seed % 8 == 0;
  return c.run();
}

bool run_right(const PortCase& c, const Run& run) {
  for (uint64_t seed = run.first; seed < run.first + run.seeds; ++seed) {
    const std::string seen = run_seed(c, seed);
    if (seen.empty()) continue;
    std::printf("FAILED  %s, seed %llu:\n", c.name, static_cast<unsigned long long>(seed));
    print_indented(seen);
    return false;
  }
  std::printf("right   %s: the same bits under %llu seeds\n", c.name,
              static_cast<unsigned long long>(run.seeds));
  return true;
}

// A fault must show as itself whenever it shows. Its share of 50 seeds is printed.
bool run_wrong(const PortCase& c, const Run& run) {
  uint64_t found = 0, tried = 0, first = 0;
  std::string what;
  while (tried < run.seeds && (found == 0 || tried < 50)) {
    const uint64_t seed = run.first + tried++;
    const std::string seen = run_seed(c, seed);
    if (seen.empty()) continue;
    if (!shows(seen, c.symptom)) {
      std::printf("FAILED  %s, seed %llu: expected \"%s\", saw\n", c.name,
                  static_cast<unsigned long long>(seed), c.symptom);
      print_indented(seen);
      return false;
    }
    if (found++ == 0) first = seed, what = seen;
  }
  if (found == 0) {
    std::printf("FAILED  %s: not found in %llu seeds\n", c.name,
                static_cast<unsigned long long>(tried));
    return false;
  }
  std::printf("found   %s: seed %llu, %llu of %llu seeds\n", c.name,
              static_cast<unsigned long long>(first), static_cast<unsigned long long>(found),
              static_cast<unsigned long long>(tried));
  print_indented(what);
  return true;
}

int run_all(const Run& run) {
  int cases = 0, right = 0, failures = 0;
  for (const auto* list : {&block_cases(), &ring_cases(), &grid_cases(), &attend_cases()}) {
    for (const PortCase& c : *list) {
      if (std::string(c.name).find(run.only) == std::string::npos) continue;
      ++cases, right += c.symptom == nullptr ? 1 : 0;
      if (!(c.symptom == nullptr ? run_right(c, run) : run_wrong(c, run))) ++failures;
    }
  }
  if (run.only.empty()) {
    for (const std::string& seen : {check_numbers(), check_launches()}) {
      ++cases;
      if (seen.empty()) continue;
      ++failures;
      std::printf("FAILED  %s\n", seen.c_str());
    }
  }
  std::printf("cases %d, runs of right kernels %llu, failures %d\n", cases,
              static_cast<unsigned long long>(right) * static_cast<unsigned long long>(run.seeds),
              failures);
  return cases == 0 || failures != 0;
}

}  // namespace
}  // namespace hff_test

int main(int argc, char** argv) {
  hff_test::Run run;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (i + 1 == argc || (name != "--seeds" && name != "--seed" && name != "--only")) {
      std::fprintf(stderr, "usage: hff_port_cases [--seeds N] [--seed N] [--only text]\n");
      return 2;
    }
    if (name == "--only") {
      run.only = argv[i + 1];
    } else {
      (name == "--seed" ? run.first : run.seeds) = std::strtoull(argv[i + 1], nullptr, 0);
    }
  }
  return hff_test::run_all(run);
}

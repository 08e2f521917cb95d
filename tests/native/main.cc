// hff_cases test | fuzz | bench: the kernels' cases against their definitions, through the C ABI
// only.
//
//   --seed N       first seed; trial i uses N + i, so a printed seed with --trials 1 replays one
//   trial
//   --trials N     per row and instruction set, instead of the row's own count
//   --only a,b     rows (parity, exact, activations, differential, determinism, edge, panels,
//   strides, host, threads, fork, openmp, steps, allocation; of cuda also seeds, values,
//   unsupported, schedules)
//                  and kernels (norm, linear, block, model, pack, attend)
//   --isa NAME     one instruction set instead of all the machine has; one that is absent is an
//   error. "cuda", which is none of those: CUDA kernels on host fibers, in builds with HFF_EMULATE
//   --threads N    bench: width of the team
// Exit status: 0 all clean, 1 a failure, 2 a wrong command line.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <sstream>

#include "trial.h"

namespace hff_test {
namespace {

[[noreturn]] void usage(const std::string& problem) {
  std::fprintf(stderr,
               "%s\nusage: hff_cases test|fuzz|bench [--seed N] [--trials N] [--only a,b] [--isa "
               "NAME] [--threads N]\n",
               problem.c_str());
  std::exit(2);
}

Options parse(int argc, char** argv) {
  Options options;
  if (argc < 2) usage("no mode");
  options.mode = argv[1];
  if (options.mode != "test" && options.mode != "fuzz" && options.mode != "bench")
    usage("unknown mode " + options.mode);
  for (int i = 2; i < argc; i += 2) {
    const std::string name = argv[i];
    if (i + 1 == argc) usage(name + " needs a value");
    const std::string value = argv[i + 1];
    if (name == "--seed") {
      options.seed = std::strtoull(value.c_str(), nullptr, 0);
    } else if (name == "--trials") {
      options.trials = std::strtoll(value.c_str(), nullptr, 0);
    } else if (name == "--threads") {
      options.threads = static_cast<int32_t>(std::strtol(value.c_str(), nullptr, 0));
    } else if (name == "--isa") {
      options.isa = value;
    } else if (name == "--only") {
      std::stringstream list(value);
      for (std::string item; std::getline(list, item, ',');) options.only.insert(item);
    } else {
      usage("unknown option " + name);
    }
  }
  return options;
}

std::vector<std::string> instruction_sets(const Options& options) {
  if (!options.isa.empty()) return {options.isa};
  std::vector<std::string> names;
  const char* reason = nullptr;
  for (int32_t i = 0; const char* name = hff_isa_name(i, &reason); ++i) {
    if (reason) {
      std::printf("isa %s: absent (%s)\n", name, reason);
    } else {
      names.push_back(name);
    }
  }
  if (options.mode == "bench" && !names.empty()) return {names.back()};
  return names;
}

enum Where { kHost, kDevice, kEither };
struct RowEntry {
  const char* name;
  bool (*run)(const Options&, const std::string&);
  Where where;
};
constexpr RowEntry kRows[] = {{"host", run_host, kHost},
                              {"exact", run_exact, kHost},
                              {"activations", run_activations, kHost},
                              {"schedules", run_schedules, kDevice},
                              {"unsupported", run_unsupported, kDevice},
                              {"parity", run_parity, kEither},
                              {"edge", run_edge, kEither},
                              {"differential", run_differential, kEither},
                              {"determinism", run_determinism, kEither},
                              {"values", run_values, kDevice},
                              {"seeds", run_seeds, kDevice},
                              {"panels", run_panels, kHost},
                              {"strides", run_strides, kHost},
                              {"steps", run_steps, kHost},
                              {"allocation", run_allocation, kHost},
                              {"threads", run_threads, kHost},
                              {"fork", run_fork, kHost},
                              {"openmp", run_openmp, kHost}};

bool run_isa(const Options& options, const std::string& isa) {
  if (!select_isa(isa)) {
    std::printf("isa %s: %s\n", isa.c_str(), hff_last_error());
    return false;
  }
  if (options.mode == "fuzz") return run_fuzz(options, isa);
  if (options.mode == "bench") return run_bench(options, isa);
  bool clean = true;
  for (const RowEntry& row : kRows) {
    const bool here = row.where == kEither || (row.where == kDevice) == on_device();
    if (here && options.wants_row(row.name)) clean = row.run(options, isa) && clean;
  }
  return clean;
}

}  // namespace
}  // namespace hff_test

int main(int argc, char** argv) {
  const hff_test::Options options = hff_test::parse(argc, argv);
  if (hff_abi_version() != HFF_ABI_VERSION) {
    std::printf("the library has ABI %d, this program %d\n", hff_abi_version(), HFF_ABI_VERSION);
    return 1;
  }
  bool clean = true;
  for (const std::string& isa : hff_test::instruction_sets(options))
    clean = hff_test::run_isa(options, isa) && clean;
  return clean ? 0 : 1;
}

// The rules of reliability: how an output is judged and a failure is told.
#include "trial.h"

#include <unistd.h>

#include <cfenv>
#include <cfloat>
#include <cinttypes>
#include <csignal>
#include <cstdio>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace hff_test {
namespace {

constexpr unsigned kWatchdogSeconds = 60;
char running[512];  // the trial in progress, for the signal handler
struct sigaction previous[NSIG];

// Names the trial, then lets the signal do what it did before.
void on_signal(int signal) {
  const char* what = signal == SIGALRM ? "HANG " : "CRASH ";
  if (write(STDOUT_FILENO, what, std::strlen(what)) < 0) _exit(3);
  if (write(STDOUT_FILENO, running, std::strlen(running)) < 0) _exit(3);
  if (signal == SIGALRM) _exit(3);
  sigaction(signal, &previous[signal], nullptr);
}

void install_handlers() {
  static const bool once = [] {
    struct sigaction action = {};
    action.sa_handler = on_signal;
    for (const int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGALRM}) {
      sigaction(signal, &action, &previous[signal]);
    }
    return true;
  }();
  static_cast<void>(once);
}

std::string number(double value) {
  char text[40];
  std::snprintf(text, sizeof text, "%.9g", value);
  return text;
}

double relative_limit(int32_t dtype) {
  return dtype == HFF_F32 ? 2e-6 : dtype == HFF_F16 ? 2e-3 : 1e-2;
}

std::string element(const Result& r, size_t worst, double out) {
  std::string text = r.name + "[" + std::to_string(worst) + "] = " + number(out) + ", exact " +
                     number(r.exact[worst]);
  if (!r.stock.empty()) text += ", stock " + number(r.stock[0][worst]);
  return text;
}

struct Errors {
  double largest = 0, squares = 0;
  size_t worst = 0;
  void add(double error, size_t i) {
    squares += error * error;
    if (error > largest || std::isnan(error)) largest = error, worst = i;
  }
};

// Judges the elements that `counts` selects; each may be `floor` off besides.
template <class Counts>
std::string judge(const Result& r, bool* relaxed, double floor, const Counts& counts) {
  Errors out, truth;
  std::vector<Errors> stock(r.stock.size());
  for (size_t i = 0; i < r.at.size(); ++i) {
    if (!counts(i)) continue;
    truth.add(std::fabs(r.exact[i]), i);
    out.add(std::fabs(r.array.get(r.at[i]) - r.exact[i]), i);
    for (size_t s = 0; s < stock.size(); ++s)
      stock[s].add(std::fabs(r.stock[s][i] - r.exact[i]), i);
  }
  double stock_error = 0, stock_norm = 0;
  for (const Errors& s : stock) {
    stock_error = std::max(stock_error, s.largest);
    stock_norm = std::max(stock_norm, std::sqrt(s.squares));
  }
  const double split = r.split ? 0x1p-15 * truth.largest : 0;
  const double allowed =
      2 * stock_error + 2 * ulp(r.array.dtype, truth.largest) + split + r.allowance + floor;
  if (!(out.largest <= allowed)) {
    return element(r, out.worst, r.array.get(r.at[out.worst])) + ", error " + number(out.largest) +
           " exceeds " + number(allowed) + " (2 x stock " + number(stock_error) + " + 2 ulp)";
  }
  const double size = std::sqrt(truth.squares),
               limit = relative_limit(r.halves ? HFF_BF16 : r.array.dtype) * size;
  const double wide = std::max(limit, 2 * stock_norm + r.allowance) +
                      floor * std::sqrt(static_cast<double>(r.at.size()));
  if (std::sqrt(out.squares) > limit && relaxed) *relaxed = true;
  if (!(std::sqrt(out.squares) <= wide)) {
    return r.name + ": relative L2 " + number(std::sqrt(out.squares) / size) + " exceeds " +
           number(wide / size) + "; worst " + element(r, out.worst, r.array.get(r.at[out.worst]));
  }
  return "";
}

// NaN is the largest.
std::string check_next(const Next& chosen) {
  for (int64_t b = 0; b < chosen.next.count; ++b) {
    const int64_t token = static_cast<int64_t>(chosen.next.get(b));
    const std::string found = "next[" + std::to_string(b) + "] is " + std::to_string(token);
    const std::vector<float> logits = chosen.row(b);
    if (!chosen.sampling.uniforms.empty()) {
      if (could_draw(logits, chosen.sampling, chosen.sampling.uniforms[b], token)) continue;
      return found + ", which its uniform does not draw";
    }
    int64_t best = 0;
    for (int64_t i = 1; i < chosen.vocab; ++i) {
      if (logits[i] > logits[best] || (std::isnan(logits[i]) && !std::isnan(logits[best])))
        best = i;
    }
    if (token != best) return found + ", logit " + std::to_string(best) + " is the largest";
  }
  return "";
}

enum class Class { kNan, kPlusInf, kMinusInf, kZero, kFinite };

Class class_of(double value) {
  if (std::isnan(value)) return Class::kNan;
  if (std::isinf(value)) return value > 0 ? Class::kPlusInf : Class::kMinusInf;
  return value == 0 ? Class::kZero : Class::kFinite;
}

}  // namespace

bool Options::wants_row(const std::string& row) const {
  std::set<std::string> kernel_names;
  for (const Kernel& kernel : kKernels) kernel_names.insert(kernel.name);
  bool any_row = false;
  for (const std::string& name : only) any_row = any_row || !kernel_names.count(name);
  return !any_row || only.count(row);
}

std::vector<const Kernel*> Options::kernels() const {
  std::vector<const Kernel*> chosen, all;
  for (const Kernel& kernel : kKernels) {
    if (on_device() && kernel.make != make_block && kernel.make != make_model) continue;
    all.push_back(&kernel);
    if (only.count(kernel.name)) chosen.push_back(&kernel);
  }
  if (chosen.empty()) chosen = all;
  return chosen;
}

const Kernel& pick_kernel(Random& random, const Options& options) {
  return *random.pick(options.kernels());
}

Tally::Tally(const Options& options, std::string row, std::string title, std::string isa)
    : options_(options), row_(std::move(row)), title_(std::move(title)), isa_(std::move(isa)) {
  if (options.openmp) title_ += " on OpenMP threads", row_ = "openmp";
  install_handlers();
}

void Tally::begin(uint64_t seed, const std::string& kernel) {
  ++trials;
  seed_ = seed;
  kernel_ = kernel;
  shape_.clear();
  std::snprintf(running, sizeof running,
                "%s %s %s; reproduce: hff_cases %s --only %s%s%s --isa %s --seed %" PRIu64
                " --trials 1\n",
                title_.c_str(), isa_.c_str(), kernel.c_str(), options_.mode.c_str(), row_.c_str(),
                kernel.empty() ? "" : ",", kernel.c_str(), isa_.c_str(), seed);
  alarm(kWatchdogSeconds);
}

void Tally::end(const std::string& failure) {
  alarm(0);
  const bool refused = on_device() && failure.rfind("status 2: the ", 0) == 0;
  if (refused && failure.find(" kernel has no room ") != std::string::npos)
    ++without_room_;
  else if (!failure.empty())
    fail(failure);
}

void Tally::fail(const std::string& failure) {
  ++failures;
  if (failures > 20) return;
  std::printf("FAIL %s\n     %s\n     %s", shape_.c_str(), failure.c_str(), running);
  std::fflush(stdout);
}

bool Tally::print() const {
  std::printf("%s %s: ", title_.c_str(), isa_.c_str());
  if (!skipped_.empty()) {
    std::printf("skipped (%s)\n", skipped_.c_str());
  } else {
    std::printf("trials %" PRId64 " failures %" PRId64, trials, failures);
    if (!failures && trials) std::printf(" (95 %% bound %.2g)", 3.0 / static_cast<double>(trials));
    if (without_room_) std::printf(" (%" PRId64 " refused: no room)", without_room_);
    if (relaxed_) std::printf(" (%" PRId64 " by twice stock's L2)", relaxed_);
    std::printf("\n");
  }
  std::fflush(stdout);
  return failures == 0;
}

HostState HostState::now() {
  HostState state;
#if defined(__x86_64__)
  constexpr uint32_t kFlags = 0x3F;  // sticky exception flags are the caller's to ignore
  state.mxcsr = _mm_getcsr() & ~kFlags;
  uint16_t word;
  __asm__ volatile("fnstcw %0" : "=m"(word));
  state.x87 = word;
#endif
  state.rounding = std::fegetround();
  return state;
}

std::string call_checked(Case& c, int64_t first, int64_t count, int32_t threads) {
  const HostState before = HostState::now();
  const hff_status status = c.call_rows(first, count, threads);
  const std::string told = check_device();
  if (!(HostState::now() == before)) return "the call changed the float mode of its caller";
  if (!told.empty()) return told;
  if (status == HFF_OK) return "";
  return "status " + std::to_string(status) + ": " + hff_last_error();
}

std::string check_memory(Case& c) {
  if (!c.arena.canaries_intact()) return "wrote outside an output buffer";
  for (const Array& cell : c.lengths) {
    int64_t was = 0;
    for (const Buffer& buffer : c.arena.buffers()) {
      if (buffer.data == cell.data) std::memcpy(&was, buffer.initial.data(), sizeof was);
    }
    if (cell.get(0) != static_cast<double>(was + c.queries))
      return "cache length is " + number(cell.get(0));
  }
  for (const Buffer& buffer : c.arena.buffers()) {
    if (!buffer.output) continue;
    std::vector<char> expected = buffer.initial;
    const auto take = [&buffer, &expected](int64_t at, int64_t bytes) {
      std::copy_n(buffer.data + at * bytes, bytes, expected.begin() + at * bytes);
    };
    for (const Array& cell : c.lengths) {
      if (cell.data == buffer.data) take(0, 8);
    }
    if (c.chosen.next.data == buffer.data) take(0, c.chosen.next.bytes());
    std::string name = "a length";
    for (const Result& r : c.results) {
      if (r.array.data != buffer.data) continue;
      name = r.name;
      for (const int64_t at : r.at) take(at, element_size(r.array.dtype));
    }
    if (std::memcmp(expected.data(), buffer.data, expected.size()))
      return "wrote elements of " + name + " that are not its own";
  }
  return check_next(c.chosen);
}

std::string check_parity(Case& c, bool* relaxed) {
  for (const Result& r : c.results) {
    const std::string failure =
        judge(r, relaxed, 0, [&r](size_t i) { return r.free.empty() || !r.free[i]; });
    if (!failure.empty()) return failure;
    for (size_t i = 0; i < r.free.size(); ++i) {
      if (r.free[i] && !std::isfinite(r.array.get(r.at[i]))) {
        return element(r, i, r.array.get(r.at[i])) + ": a row that sees no key must be finite";
      }
    }
  }
  return "";
}

std::string check_equal(Case& c) {
  for (const Result& r : c.results) {
    for (size_t i = 0; i < r.at.size(); ++i) {
      if (!r.free.empty() && r.free[i]) continue;
      const double out = r.array.get(r.at[i]);
      if (!(out == quantize(r.array.dtype, static_cast<float>(r.exact[i]))))
        return element(r, i, out) + " (must be equal)";
    }
  }
  return "";
}

std::string check_classes(Case& c) {
  for (const Result& r : c.results) {
    // VDPBF16PS, like PyTorch's bf16 GEMM, takes denormals as zero.
    const double tiny = r.array.dtype == HFF_BF16 || r.halves ? 64.0 * FLT_MIN : 0;
    std::vector<char> finite(r.at.size());
    for (size_t i = 0; i < r.at.size(); ++i) {
      const double out = r.array.get(r.at[i]);
      const double truth = quantize(r.array.dtype, static_cast<float>(r.exact[i]));
      if (!r.free.empty() && r.free[i]) continue;
      bool same =
          class_of(out) == class_of(truth) || (std::fabs(out) <= tiny && std::fabs(truth) <= tiny);
      same = same || (r.split && std::isnan(out));
      bool all_finite = std::isfinite(out) && std::isfinite(r.exact[i]);
      for (const auto& stock : r.stock) {
        same = same || class_of(out) == class_of(stock[i]);
        all_finite = all_finite && std::isfinite(stock[i]);
      }
      // Rounding decides between a small number and zero; judge() sees its size.
      const bool cancels = std::isfinite(out) && std::isfinite(truth);
      if (!same && !cancels) return element(r, i, out) + " (another class)";
      finite[i] = all_finite ? 1 : 0;
    }
    const std::string failure =
        judge(r, nullptr, tiny, [&finite](size_t i) { return finite[i] != 0; });
    if (!failure.empty()) return failure;
  }
  return "";
}

std::string check_same_bits(Case& c, const std::vector<char>& expected, int32_t threads) {
  c.restore();
  const std::string failure = call_checked(c, 0, c.independent_rows(), threads);
  if (!failure.empty()) return failure;
  const std::vector<char> outputs = c.arena.outputs();
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i] != expected[i])
      return "byte " + std::to_string(i) + " of the outputs differs with " +
             std::to_string(threads) + " threads";
  }
  return "";
}

}  // namespace hff_test

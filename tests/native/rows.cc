// Rows 1, 2, 9, 13, 16 and 27: numbers, memory and determinism of single calls.
#include "trial.h"

namespace hff_test {
namespace {

// Seals, computes the reference, calls, checks memory and what `check` asks.
template <class Check>
std::string run_trial(Case& c, int32_t threads, const Check& check, bool judged = true) {
  c.compute_reference(judged);
  c.seal();
  std::string failure = call_checked(c, 0, c.independent_rows(), threads);
  if (failure.empty()) failure = check_memory(c);
  return failure.empty() ? check(c) : failure;
}

template <class Body>
bool run_trials(const Options& options, Tally& tally, int64_t standard, const Body& body) {
  for (int64_t i = 0; i < options.count(standard); ++i) {
    const uint64_t seed = options.seed + static_cast<uint64_t>(i);
    Random random(seed);
    draw_device(random);
    body(random, seed);
  }
  return tally.print();
}

}  // namespace

bool run_parity(const Options& options, const std::string& isa) {
  Tally tally(options, "parity", "row 1, 13 kernel parity on guard pages", isa);
  return run_trials(options, tally, on_device() ? 300 : 2000, [&](Random& random, uint64_t seed) {
    const Kernel& kernel = pick_kernel(random, options);
    tally.begin(seed, kernel.name);
    const auto c = kernel.make(random, Design{});
    tally.describe(c->shape());
    bool relaxed = false;
    tally.end(run_trial(*c, random.pick({1, 2, 3}),
                        [&](Case& done) { return check_parity(done, &relaxed); }));
    if (relaxed) tally.relax();
  });
}

bool run_exact(const Options& options, const std::string& isa) {
  Tally tally(options, "exact", "row 2 exact kernels", isa);
  return run_trials(options, tally, 500, [&](Random& random, uint64_t seed) {
    const bool linear = random.chance(0.5);
    const Kernel& kernel = kKernels[linear ? 1 : 5];
    tally.begin(seed, "");
    Design design;
    design.exact = true;
    const auto c = kernel.make(random, design);
    tally.describe(std::string(kernel.name) + " " + c->shape());
    tally.end(run_trial(*c, random.pick({1, 2, 3}), check_equal, false));
  });
}

bool run_differential(const Options& options, const std::string& isa) {
  Tally tally(options, "differential", "row 9 scalar against", isa);
  if (isa == "scalar") return true;
  const bool clean =
      run_trials(options, tally, on_device() ? 500 : 2500, [&](Random& random, uint64_t seed) {
        const Kernel& kernel = pick_kernel(random, options);
        tally.begin(seed, kernel.name);
        if (kernel.make == make_pack)
          return tally.end("");  // panels are each instruction set's own
        Design design;
        design.size = Size::kTiny;
        const auto c = kernel.make(random, design);
        tally.describe(c->shape());
        select_isa("scalar");
        std::string failure =
            run_trial(*c, 1, [](Case& done) { return check_parity(done, nullptr); });
        select_isa(isa);
        if (!failure.empty()) failure = "scalar: " + failure;
        c->restore();
        if (c->precision() != HFF_PRECISION_HIGHEST)
          c->compute_reference();  // by this set's products
        if (failure.empty()) failure = call_checked(*c, 0, c->independent_rows(), 1);
        if (failure.empty()) failure = check_memory(*c);
        if (failure.empty()) failure = check_parity(*c, nullptr);
        tally.end(failure);
      });
  return clean;
}

bool run_determinism(const Options& options, const std::string& isa) {
  Tally tally(options, "determinism",
              "row 16 bits: threads 1, 2, 3, 7; repeats; batch row alone; not packed", isa);
  return run_trials(options, tally, on_device() ? 25 : 200, [&](Random& random, uint64_t seed) {
    const Kernel& kernel = pick_kernel(random, options);
    tally.begin(seed, kernel.name);
    const auto c = kernel.make(random, Design{});
    tally.describe(c->shape());
    c->seal();
    std::string failure = call_checked(*c, 0, c->independent_rows(), 1);
    const std::vector<char> expected = c->arena.outputs();
    for (const int32_t threads : {1, 2, 3, 7}) {
      if (failure.empty()) failure = check_same_bits(*c, expected, threads);
    }
    c->restore();
    const int64_t rows = c->independent_rows(), alone = c->fewest_alike();
    for (int64_t row = 0; failure.empty() && row < rows; row += alone) {
      for (const Array& cell : c->lengths)
        cell.set(0, cell.get(0) - (row ? static_cast<double>(c->queries) : 0));
      const int64_t first = std::min(row, rows - alone);
      if (c->has_rows(first, alone)) failure = call_checked(*c, first, alone, 2);
    }
    if (failure.empty() && c->arena.outputs() != expected)
      failure = "a batch row alone gives other bits";
    for (LinearData* linear : c->linears()) linear->packed = {};
    if (failure.empty()) failure = check_same_bits(*c, expected, 2);
    tally.end(failure);
  });
}

namespace {

// Kinds of awkward numbers.
enum Awkward {
  kNan,
  kInf,
  kMinusInf,
  kLargest,
  kAllDenormal,
  kDenormal,
  kAllMinusZero,
  kAllEqual,
  kMean
};
constexpr const char* kAwkward[] = {"NaN",      "Inf",    "-Inf",      "largest", "all denormal",
                                    "denormal", "all -0", "all equal", "mean 1e4"};

// Writes them into one element, or all, of a row of an input.
std::string spoil(Random& random, Case& c, Awkward kind) {
  const Spot& spot = random.pick(c.spots);
  const int64_t rows = (spot.array.count + spot.width - 1) / spot.width;
  const int64_t begin = random.range(0, rows - 1) * spot.width;
  const int64_t end = std::min(spot.array.count, begin + spot.width);
  const int32_t dtype = spot.array.dtype;
  const double denormal = dtype == HFF_F16 ? 0x1p-20 : 0x1p-130;
  const int64_t at = random.range(begin, end - 1);
  const auto value = [&]() -> double {
    switch (kind) {
      case kNan:
        return std::nan("");
      case kInf:
        return HUGE_VAL;
      case kMinusInf:
        return -HUGE_VAL;
      case kLargest:
        return -static_cast<double>(lowest(dtype));
      case kAllMinusZero:
        return -0.0;
      case kAllEqual:
        return 1.5;
      case kMean:
        return 1e4 + 0.01 * random.normal();
      default:
        return denormal;
    }
  };
  const bool all = kind == kAllDenormal || kind >= kAllMinusZero;
  for (int64_t i = begin; i < end; ++i) {
    if (all || i == at) spot.array.set(i, value());
  }
  return std::string(kAwkward[kind]) + " in " + spot.name + "[" + std::to_string(at) + "]";
}

}  // namespace

bool run_edge(const Options& options, const std::string& isa) {
  Tally tally(options, "edge", "row 27 edge numerics", isa);
  return run_trials(options, tally, on_device() ? 150 : 300, [&](Random& random, uint64_t seed) {
    const Kernel& kernel = pick_kernel(random, options);
    tally.begin(seed, kernel.name);
    const auto kind = static_cast<Awkward>(random.range(kNan, kMean));
    const bool scattered = kind == kLargest || kind == kMean;
    Design design;
    design.size = scattered || random.chance(0.5) ? Size::kTiny : Size::kNormal;
    design.nan_behind_mask = random.chance(0.3);
    const auto c = kernel.make(random, design);
    if (scattered) c->independent_errors = 1;  // one spoilt row, or one element, decides
    const bool masked =
        design.nan_behind_mask && kernel.make != make_norm && kernel.make != make_linear;
    const std::string what = masked ? "NaN behind the mask" : spoil(random, *c, kind);
    tally.describe(what + ", " + c->shape());
    tally.end(run_trial(*c, random.pick({1, 2}), check_classes));
  });
}

}  // namespace hff_test

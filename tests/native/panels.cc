// Rows 2 and 8 for prepacked weights: a call takes panels that hff_pack wrote for its matrix,
// precision and instruction set, and gives the bits it gives without; it refuses all others.
#include <cstdio>

#include "trial.h"

namespace hff_test {
namespace {

constexpr size_t kHeader = 40;  // bytes by which panels tell what they are

struct Trial {
  Arena arena;
  int32_t dtype, precision;
  int64_t rows;
  LinearData linear;
  Array x, out;

  explicit Trial(Random& random)
      : arena(&random),
        dtype(draw_dtype(random, Design{})),
        precision(draw_precision(random)),
        rows(random.pick<int64_t>({1, 16, 17, 40})) {
    linear = LinearData::random(random, arena, dtype, random.range(1, 70), random.range(1, 140));
    x = arena.input(dtype, rows * linear.cols);
    fill_uniform(random, x, 1.7);
    out = arena.output(dtype, rows * linear.rows);
  }

  hff_status call(const hff_linear& l) const {
    std::memset(out.data, 0xFF, static_cast<size_t>(out.bytes()));
    const hff_linear_io io = {sizeof io,    dtype,     2,         rows,
                              HFF_ACT_NONE, precision, x.input(), out.output()};
    return hff_linear_forward(&l, &io);
  }
  std::vector<char> bits() const { return {out.data, out.data + out.bytes()}; }

  std::string refuses(const hff_linear& l, const char* what) const {
    const hff_status status = call(l);
    const std::vector<char> poison(static_cast<size_t>(out.bytes()), '\xFF');
    if (status != HFF_INVALID)
      return std::string(what) + ": status " + std::to_string(status) + ", expected HFF_INVALID";
    return bits() == poison ? "" : std::string(what) + ": refused, and outputs changed";
  }
};

// Panels of any instruction set and precision: taken if they start as this call's own would.
std::string foreign_panels(Random& random, Trial& trial, const std::string& isa,
                           const std::vector<std::string>& isas, std::string* shape) {
  const std::string packer = random.pick(isas);
  const int32_t other = draw_precision(random);
  *shape += " panels of " + packer + " precision " + std::to_string(other);
  hff_linear linear = trial.linear.abi();
  if (trial.call(linear) != HFF_OK) return hff_last_error();
  const std::vector<char> expected = trial.bits();
  LinearData own = trial.linear, foreign = trial.linear;
  own.pack(trial.arena, trial.precision);
  hff_select_isa(packer.c_str());
  foreign.pack(trial.arena, other);
  hff_select_isa(isa.c_str());
  linear.packed = foreign.packed.input();
  const bool alike = foreign.packed.bytes() >= own.packed.bytes() &&
                     !std::memcmp(own.packed.data, foreign.packed.data, kHeader);
  if (!alike) return trial.refuses(linear, "other panels");
  if (trial.call(linear) != HFF_OK) return hff_last_error();
  return trial.bits() == expected ? "" : "panels give other bits than the weight";
}

std::string spoilt_panels(Random& random, Trial& trial) {
  LinearData l = trial.linear;
  l.pack(trial.arena, trial.precision);
  hff_linear linear = l.abi();
  linear.packed.bytes -= random.range(1, 64);
  std::string failure = trial.refuses(linear, "short panels");
  if (!failure.empty()) return failure;
  const Array moved = trial.arena.panels(l.packed.bytes() + 64);
  const int64_t shift = random.pick<int64_t>({1, 4, 16, 32});
  std::memcpy(moved.data + shift, l.packed.data, static_cast<size_t>(l.packed.bytes()));
  linear.packed = {moved.data + shift, l.packed.bytes()};
  failure = trial.refuses(linear, "panels off their line");
  if (!failure.empty()) return failure;
  std::memcpy(moved.data, l.packed.data, static_cast<size_t>(l.packed.bytes()));
  linear.packed = {moved.data, l.packed.bytes()};
  char& flipped = moved.data[random.range(0, kHeader - 1)];
  flipped = static_cast<char>(flipped ^ (1 << random.range(0, 7)));
  failure = trial.refuses(linear, "panels with a bit flipped in their header");
  if (!failure.empty()) return failure;
  LinearData wider = LinearData::random(random, trial.arena, trial.dtype, l.rows + 1, l.cols);
  wider.pack(trial.arena, trial.precision);
  linear.packed = wider.packed.input();
  return trial.refuses(linear, "panels of a matrix of one row more");
}

}  // namespace

bool run_panels(const Options& options, const std::string& isa) {
  Tally tally(options, "panels", "row 2, 8 panels taken or refused", isa);
  std::vector<std::string> isas;
  const char* reason = nullptr;
  for (int32_t i = 0; const char* name = hff_isa_name(i, &reason); ++i) {
    if (!reason) isas.push_back(name);
  }
  for (int64_t i = 0; i < options.count(500); ++i) {
    const uint64_t seed = options.seed + static_cast<uint64_t>(i);
    Random random(seed);
    tally.begin(seed, "");
    Trial trial(random);
    std::string shape = std::string(dtype_name(trial.dtype)) + " precision " +
                        std::to_string(trial.precision) + " rows " + std::to_string(trial.rows) +
                        " W (" + std::to_string(trial.linear.rows) + ", " +
                        std::to_string(trial.linear.cols) + ")";
    std::string failure = random.chance(0.5) ? foreign_panels(random, trial, isa, isas, &shape)
                                             : spoilt_panels(random, trial);
    tally.describe(shape);
    tally.end(failure);
  }
  return tally.print();
}

}  // namespace hff_test

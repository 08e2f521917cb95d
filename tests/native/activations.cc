// Row 2: activations one element at a time, at every number of 16 bits and at random ones of fp32.
#include <cmath>
#include <cstdio>

#include "trial.h"

namespace hff_test {
namespace {

constexpr int64_t kNumbers = 65536;
constexpr const char* kNames[] = {"none", "gelu", "gelu, tanh", "relu", "silu"};

double expected(int32_t activation, double x) {
  switch (activation) {
    case HFF_ACT_GELU_ERF:
      return 0.5 * x * std::erfc(-0.7071067811865475244 * x);
    case HFF_ACT_GELU_TANH:
      return x / (1 + std::exp(-1.5957691216057307118 * (x + 0.044715 * x * x * x)));
    case HFF_ACT_RELU:
      return std::isnan(x) ? x : x > 0 ? x : 0;
    case HFF_ACT_SILU:
      return x / (1 + std::exp(-x));
    default:
      return x;
  }
}

// 16 bits: rounded once from a value within a twentieth of an ulp. fp32: 1e-6, and 1.5e-5 in the
// tails. Numbers near the least normal one may be zero where denormals are.
double allowed(int32_t dtype, double x, double want) {
  const double size = std::fabs(want), least = std::ldexp(1.0, -115);
  if (dtype == HFF_F16) return 0.55 * ulp(dtype, size);
  if (dtype == HFF_BF16) return 0.55 * ulp(dtype, size) + least;
  return (std::fabs(x) < 2 ? 1e-6 : 1.5e-5) * size + least;
}

bool agrees(int32_t dtype, double x, double got, double want) {
  if (std::isnan(want)) return std::isnan(got);
  if (std::fabs(want) > -static_cast<double>(lowest(dtype)))
    return got == quantize(dtype, static_cast<float>(want));
  return std::fabs(got - want) <= allowed(dtype, x, want);
}

Array numbers(Random& random, Arena& arena, int32_t dtype) {
  const Array x = arena.input(dtype, kNumbers);
  for (int64_t i = 0; i < kNumbers; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    if (dtype == HFF_F32) {
      const double scale = std::ldexp(1.0, static_cast<int>(random.range(-20, 5)));
      x.set(i, i < 3 ? (i - 1) * HUGE_VAL : scale * random.normal());  // -inf, NaN, inf
    } else {
      x.set(i, dtype == HFF_F16 ? from_fp16(bits) : from_bf16(bits));
    }
  }
  return x;
}

// out = act(1 x) in calls of `rows` rows, by matrix or row kernels.
std::string trial(Random& random, int32_t dtype, int32_t activation, int64_t rows) {
  Arena arena(&random);
  const Array x = numbers(random, arena, dtype), one = arena.input(dtype, 1);
  const Array out = arena.output(dtype, kNumbers);
  one.set(0, 1);
  hff_linear linear = {};
  linear.weight = one.input();
  linear.rows = linear.cols = linear.row_stride = 1;
  for (int64_t first = 0; first < kNumbers; first += rows) {
    hff_linear_io io = {};
    io.struct_size = sizeof io;
    io.dtype = dtype;
    io.threads = 1;
    io.rows = rows;
    io.activation = activation;
    io.precision = HFF_PRECISION_HIGHEST;
    io.x = x.input_from(first);
    io.out = out.output_from(first);
    if (hff_linear_forward(&linear, &io) != HFF_OK) return hff_last_error();
  }
  for (int64_t i = 0; i < kNumbers; ++i) {
    const double want = expected(activation, x.get(i)), got = out.get(i);
    if (agrees(dtype, x.get(i), got, want)) continue;
    char text[120];
    std::snprintf(text, sizeof text, "of %.9g is %.9g, expected %.9g", x.get(i), got, want);
    return text;
  }
  return "";
}

}  // namespace

bool run_activations(const Options& options, const std::string& isa) {
  Tally tally(options, "activations", "row 2 activations of every number", isa);
  Random random(options.seed);
  for (const int32_t dtype : {HFF_F32, HFF_BF16, HFF_F16}) {
    for (int32_t activation = HFF_ACT_NONE; activation <= HFF_ACT_SILU; ++activation) {
      for (const int64_t rows : {int64_t{16}, kNumbers}) {
        tally.begin(options.seed, "linear");
        tally.describe(std::string(kNames[activation]) + ", dtype " + std::to_string(dtype) + ", " +
                       std::to_string(rows) + " rows a call");
        tally.end(trial(random, dtype, activation, rows));
      }
    }
  }
  return tally.print();
}

}  // namespace hff_test

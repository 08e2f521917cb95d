// The attention kernels by themselves on host fibers: a random call per seed against the definition
// in fp64, and one call whose bits must not depend on the seed.
#include <cmath>
#include <memory>

#include "cuda/attend.h"
#include "cuda/attend_flash.cuh"
#include "cuda/attend_naive.cuh"
#include "port_case.h"

namespace hff_test {
namespace {

using hff::port::bfloat16;
using hff::port::half;

// A call on random operands, and what it must give.
template <class T>
class Problem {
 public:
  Problem(int32_t dtype, int32_t kernel, uint64_t seed) : random_(seed) {
    io_.struct_size = sizeof io_;
    io_.kernel = kernel, io_.dtype = dtype, io_.threads = 1, io_.device = HFF_DEVICE_CUDA;
    io_.batch = random_.range(1, 2);
    io_.kv_heads = random_.range(1, 2);
    io_.heads = io_.kv_heads * random_.pick<int64_t>({1, 1, 2, 3});
    io_.head_dim = random_.pick<int64_t>({1, 8, 20, 32, 33, 64, 65});
    io_.queries = random_.range(1, kernel == HFF_ATTEND_NAIVE ? 4 : 19);
    io_.keys = random_.pick<int64_t>({1, 5, 31, 32, 33, random_.range(1, 70)});
    io_.causal = random_.chance(0.5) ? 1 : 0;
    if (io_.causal && random_.chance(0.4)) io_.window = random_.range(1, io_.keys + 2);
    io_.scale = 0.3f;
    q_ = draw(io_.heads, io_.queries, &io_.q, &io_.q_strides);
    k_ = draw(io_.kv_heads, io_.keys, &io_.k, &io_.k_strides);
    v_ = draw(io_.kv_heads, io_.keys, &io_.v, &io_.v_strides);
    draw_mask();
    spoil_unseen();
    out_.assign(size_t(io_.batch * io_.heads * io_.queries * io_.head_dim),
                hff::port::from_float<T>(NAN));
    io_.out = {out_.data(), int64_t(out_.size() * sizeof(T))};
    io_.out_strides = {io_.heads * io_.queries * io_.head_dim, io_.head_dim,
                       io_.heads * io_.head_dim};  // (batch, queries, heads, head_dim)
  }

  // "" or what is wrong. The scores start as NaN, as memory of a device may.
  std::string run() {
    hff_attend_plan plan = {};
    hff::cuda::plan_attend(io_, &plan);
    std::vector<float> scores(size_t(plan.workspace_bytes / 4), NAN);
    io_.workspace = {scores.data(), plan.workspace_bytes};
    if (hff::cuda::attend(io_) != HFF_OK) return hff::fibers::report();
    return check();
  }
  const std::vector<T>& out() const { return out_; }

 private:
  std::vector<T> draw(int64_t heads, int64_t tokens, hff_input* input, hff_strides* s) {
    *s = {heads * tokens * io_.head_dim + 3, tokens * io_.head_dim, io_.head_dim};
    std::vector<T> values(size_t(io_.batch * s->batch));
    for (T& value : values) value = hff::port::from_float<T>(float(random_.symmetric() * 1.7));
    *input = {values.data(), int64_t(values.size() * sizeof(T))};
    return values;
  }

  void draw_mask() {
    const int32_t kind = int32_t(random_.range(HFF_MASK_NONE, HFF_MASK_ADDITIVE));
    const int64_t heads = random_.chance(0.5) ? io_.heads : 1;
    io_.mask.kind = kind, io_.mask.keys = io_.keys, io_.mask.key_stride = 1;
    io_.mask.query_stride = io_.keys;
    io_.mask_head_stride = heads > 1 ? io_.keys * io_.queries : 0;
    io_.mask.batch_stride = io_.keys * io_.queries * heads;
    const size_t count = size_t(io_.batch * io_.mask.batch_stride);
    seen_.resize(count), integers_.resize(count), added_.resize(count);
    for (size_t i = 0; i < count; ++i) {
      const bool seen = random_.chance(0.7);
      seen_[i] = seen, integers_[i] = seen ? -2 : 0;
      added_[i] = hff::port::from_float<T>(seen ? float(random_.symmetric()) : -INFINITY);
    }
    io_.mask.data.data = kind == HFF_MASK_BOOL    ? static_cast<const void*>(seen_.data())
                         : kind == HFF_MASK_INT64 ? static_cast<const void*>(integers_.data())
                                                  : added_.data();
  }

  double bias(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const int64_t limit = io_.causal ? io_.keys - io_.queries + i + 1 : io_.keys;
    if (j >= limit || (io_.window && j < limit - io_.window)) return -HUGE_VAL;
    if (io_.mask.kind == HFF_MASK_NONE) return 0;
    const size_t at = size_t(b * io_.mask.batch_stride + h * io_.mask_head_stride +
                             i * io_.mask.query_stride + j);
    if (io_.mask.kind == HFF_MASK_ADDITIVE) return hff::port::to_float(added_[at]);
    return seen_[at] ? 0 : -HUGE_VAL;
  }

  // NaN into keys and values that no query sees.
  void spoil_unseen() {
    for (int64_t b = 0; b < io_.batch; ++b) {
      for (int64_t at = 0; at < io_.kv_heads * io_.keys; ++at) {
        const int64_t g = at / io_.keys, j = at % io_.keys, group = io_.heads / io_.kv_heads;
        bool seen = false;
        for (int64_t row = 0; row < group * io_.queries; ++row)
          seen = seen || !std::isinf(bias(b, g * group + row / io_.queries, row % io_.queries, j));
        const int64_t from = b * io_.k_strides.batch + g * io_.k_strides.head + j * io_.head_dim;
        if (seen) continue;
        k_[size_t(from)] = v_[size_t(from)] = hff::port::from_float<T>(NAN);
      }
    }
  }

  std::string check() const {
    const double tolerance = sizeof(T) == 4 ? 2e-6 : std::is_same<T, half>::value ? 1e-3 : 8e-3;
    for (int64_t row = 0; row < io_.batch * io_.heads * io_.queries; ++row) {
      const int64_t b = row / io_.heads / io_.queries, h = row / io_.queries % io_.heads;
      const int64_t i = row % io_.queries;
      const std::vector<double> exact = expected(b, h, i);
      for (int64_t d = 0; d < io_.head_dim; ++d) {
        const double got = hff::port::to_float(out_[size_t(
            b * io_.out_strides.batch + h * io_.out_strides.head + i * io_.out_strides.token + d)]);
        if (std::fabs(got - exact[size_t(d)]) <= tolerance * 1.7) continue;
        char text[160];
        std::snprintf(text, sizeof text, "%s: (%d, %d, %d, %d) is %.9g instead of %.9g", kOtherBits,
                      int(b), int(h), int(i), int(d), got, exact[size_t(d)]);
        return text;
      }
    }
    return "";
  }

  std::vector<double> expected(int64_t b, int64_t h, int64_t i) const {
    const int64_t g = h / (io_.heads / io_.kv_heads), dim = io_.head_dim;
    const T* q = &q_[size_t(b * io_.q_strides.batch + h * io_.q_strides.head + i * dim)];
    std::vector<double> out(size_t(dim), 0.0);
    double total = 0;  // scores are small: no maximum is needed
    for (int64_t j = 0; j < io_.keys; ++j) {
      const double add = bias(b, h, i, j);
      if (std::isinf(add)) continue;
      const size_t at = size_t(b * io_.k_strides.batch + g * io_.k_strides.head + j * dim);
      double dot = 0;
      for (int64_t d = 0; d < dim; ++d)
        dot += double(hff::port::to_float(q[d])) * hff::port::to_float(k_[at + size_t(d)]);
      const double weight = std::exp(double(io_.scale) * dot + add);
      total += weight;
      for (int64_t d = 0; d < dim; ++d)
        out[size_t(d)] += weight * hff::port::to_float(v_[at + size_t(d)]);
    }
    for (double& value : out) value = total > 0 ? value / total : 0;
    return out;
  }

  Random random_;
  hff_attend_io io_ = {};
  std::vector<T> q_, k_, v_, added_, out_;
  std::vector<uint8_t> seen_;
  std::vector<int64_t> integers_;
};

template <int kKernel>
std::string run_random() {
  const uint64_t seed = hff::fibers::options().seed;
  if (seed % 3 == 0) return Problem<float>(HFF_F32, kKernel, seed).run();
  return seed % 3 == 1 ? Problem<half>(HFF_F16, kKernel, seed).run()
                       : Problem<bfloat16>(HFF_BF16, kKernel, seed).run();
}

template <int kKernel>
std::string run_fixed() {
  static std::vector<float> first;
  Problem<float> problem(HFF_F32, kKernel, 11);
  const std::string wrong = problem.run();
  if (!wrong.empty()) return wrong;
  if (first.empty()) first = problem.out();
  return std::memcmp(first.data(), problem.out().data(), first.size() * 4) == 0 ? "" : kOtherBits;
}

// ---- a fault: the tiled kernel without the barrier before a tile is loaded again ----------------

struct Tile {
  const float* x;  // (tiles, kBlockKeys, 32)
  float* out;      // (threads)
  int tiles;
};

template <bool kBarrier>
HFF_KERNEL(hff::cuda::kAttendThreads)
void sum_tiles(HFF_PARAM(Tile) p) {
  using hff::cuda::kBlockKeys;
  hff::cuda::AttendCall c = {};
  c.head_dim = 32;
  const hff_strides strides = {0, 0, 32};
  float* tile = reinterpret_cast<float*>(hff::port::arena());
  float sum = 0;
  for (int t = 0; t < p.tiles; ++t) {
    hff::cuda::load_tile<float, 32>(c, p.x + t * kBlockKeys * 32, strides, 0, 0, 0, kBlockKeys,
                                    tile);
    hff::port::sync_block();
    for (int j = 0; j < kBlockKeys; ++j)
      sum += tile[j * hff::cuda::AttendTile<32>::kStride + hff::port::lane()];
    if (kBarrier) hff::port::sync_block();
  }
  p.out[hff::port::thread()] = sum;
}

template <bool kBarrier>
std::string run_tiles() {
  constexpr int kTiles = 3, kKeys = hff::cuda::kBlockKeys;
  static const std::vector<float> x = scattered(kTiles * kKeys * 32, 5);
  std::vector<float> out(hff::cuda::kAttendThreads), expected(out.size(), 0.0f);
  for (size_t i = 0; i < expected.size(); ++i) {
    for (int j = 0; j < kTiles * kKeys; ++j) expected[i] += x[size_t(j) * 32 + i % 32];
  }
  hff::port::Launch launch;
  launch.threads = hff::cuda::kAttendThreads;
  launch.shared_bytes = hff::cuda::AttendTile<32>::kFloats * 4;
  launch.name = "sum_tiles";
  return judge(launch, sum_tiles<kBarrier>, Tile{x.data(), out.data(), kTiles}, out, expected);
}

}  // namespace

const std::vector<PortCase>& attend_cases() {
  static const std::vector<PortCase> cases = {
      {"attend_naive, random calls", nullptr, run_random<HFF_ATTEND_NAIVE>},
      {"attend_tiled, random calls", nullptr, run_random<HFF_ATTEND_TILED>},
      {"attend_flash, random calls", nullptr, run_random<HFF_ATTEND_FLASH>},
      {"attend_naive, one call", nullptr, run_fixed<HFF_ATTEND_NAIVE>},
      {"attend_tiled, one call", nullptr, run_fixed<HFF_ATTEND_TILED>},
      {"attend_flash, one call", nullptr, run_fixed<HFF_ATTEND_FLASH>},
      {"attend tiles", nullptr, run_tiles<true>},
      {"attend tiles, loaded again before all have read", kOtherBits, run_tiles<false>},
  };
  return cases;
}

}  // namespace hff_test

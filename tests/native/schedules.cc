// Plans and schedules of the CUDA kernels as data: their walks over the weights (walks.h); shared
// memory and workspace are cut without overlap; and which kernels fit which device.
#include "trial.h"

#if defined(HFF_PORT_HOST)

#include <cstdio>
#include <map>

#include "walks.h"

namespace hff {

// plan.cu's own: the library's is not exported.
hff_status fail(hff_status status, const char*, ...) { return status; }

namespace cuda {
namespace {

using hff_test::HeadsData;
using hff_test::Random;

constexpr uintptr_t kApart = uintptr_t{1} << 40;

// Addresses that nobody reads: a buffer each, kApart from the next.
struct Addresses {
  uintptr_t next = kApart;
  void* take() {
    const uintptr_t address = next;
    next += kApart;
    return reinterpret_cast<void*>(address);
  }
};

// A call, a layer of it, and a head, of a shape.
struct Fake {
  hff_call call = {};
  hff_block block = {};
  hff_model model = {};
  hff_cache cache = {};
  Addresses addresses;

  hff_linear linear(int64_t rows, int64_t cols, int64_t gap) {
    return {{addresses.take(), INT64_MAX}, {}, {}, rows, cols, cols + gap};
  }

  Fake(const HeadsData& heads, int64_t hidden, int64_t mlp, int64_t vocab, bool sequential,
       bool separate, int64_t gap, int64_t batch) {
    call.dtype = HFF_F16, call.batch = batch, call.queries = 1;
    block.heads = heads.abi();
    block.hidden = hidden, block.mlp_width = mlp;
    block.residual = sequential ? HFF_RESIDUAL_SEQUENTIAL : HFF_RESIDUAL_PARALLEL;
    const int64_t kv_rows = heads.kv_heads * heads.head_dim;
    block.qkv = linear(separate ? heads.width() : heads.qkv_width(), hidden, gap);
    if (separate) block.k = linear(kv_rows, hidden, gap), block.v = linear(kv_rows, hidden, gap);
    block.o = linear(hidden, heads.width(), gap);
    block.up = linear(mlp, hidden, gap);
    block.down = linear(hidden, mlp, gap);
    model.head = linear(vocab, hidden, gap);
    cache.keys.data = addresses.take(), cache.values.data = addresses.take();
  }

  static Fake random(Random& random) {
    const HeadsData heads = HeadsData::random(random, random.pick<int64_t>({16, 96, 512}));
    const int64_t hidden = 8 * random.range(1, random.pick<int64_t>({10, 400}));
    const int64_t mlp = 8 * random.range(1, random.pick<int64_t>({10, 1000}));
    return Fake(heads, hidden, mlp, random.range(1, 3000), random.chance(0.5),
                heads.layout == HFF_QKV_STACKED && random.chance(0.5), 8 * random.range(0, 2),
                random.range(1, kMaxBatch));
  }
};

struct Kind {
  int arch, sms, shared_limit, shared_per_sm;

  Room room(int stream_warps, int attend_warps, int per_sm) const {
    constexpr int kReserved = 1024;
    return {arch >= 900, sms, stream_warps, attend_warps,
            std::min(shared_per_sm / per_sm - kReserved, shared_limit)};
  }
};
constexpr Kind kKinds[] = {{800, 108, 166912, 167936},
                           {860, 84, 101376, 102400},
                           {900, 132, 232448, 233472},
                           {1200, 170, 101376, 102400}};

// ---- layouts ------------------------------------------------------------------------------------

struct Region {
  const char* name;
  int64_t begin, bytes;
};

std::string check_apart(std::vector<Region> regions, int64_t limit) {
  std::sort(regions.begin(), regions.end(),
            [](const Region& a, const Region& b) { return a.begin < b.begin; });
  int64_t end = 0;
  for (const Region& r : regions) {
    if (r.bytes == 0) continue;
    if (r.begin < end) return std::string(r.name) + " begins before the region ahead of it ends";
    end = r.begin + r.bytes;
  }
  return end <= limit ? "" : std::string(regions.back().name) + " ends past what there is";
}

// The regions hold what the kernels of this use write into them.
std::string check_layout(const Layer& layer, const Rows& head, const Shape& s, const Layout& l,
                         const Room& room, int batch, Use use, int extra_floats) {
  const int lanes = batch == 1 ? 1 : kMaxBatch, warps = room.stream_warps;
  const int attend_warps = room.attend_warps > 0 ? room.attend_warps : warps;
  const bool attends = use == kWhole || extra_floats > 0;
  const int attend = attends ? attend_floats(s.head_dim, attend_warps) : 0;
  const std::vector<Region> regions = {
      {"barriers", l.barriers, int64_t{8} * warps * l.slots},
      {"ring", l.ring, int64_t{warps} * l.slots * l.slot_bytes},
      {"inputs", l.inputs, int64_t{kSize} * lanes * l.input_stride},
      {"x or sums", l.sums, int64_t{4} * l.sum_count},
      {"reduce", l.reduce, int64_t{8} * warps * kMaxBatch},
      {"attend", l.attend, int64_t{4} * (attend + extra_floats)}};
  const std::string failure = check_apart(regions, l.total);
  if (!failure.empty()) return failure;
  if (l.total > room.shared_bytes) return text("%d bytes of %d", l.total, room.shared_bytes);
  if (l.slots < 2 || (!room.bulk && l.slots != AsyncRing::kSlots)) return text("%d slots", l.slots);
  if ((l.ring | l.slot_bytes | l.inputs | 2 * l.input_stride) % 16 != 0 || l.barriers % 8 != 0 ||
      (l.sums | l.reduce | l.attend) % 8 != 0)
    return "a region is not aligned";
  if (l.x != l.sums || batch * s.hidden > l.sum_count) return "x is larger than sums";
  int width = 0, sums = 2 * warps * lanes;
  for (int i = 0; i < halves(s); ++i) {
    const Half half = half_of(s, i);
    if (use != kLeaves)
      width = std::max(width, half.attention && half.mlp ? 2 * s.hidden : s.hidden);
    int pieces = 0;
    for (const Rows* m : left(layer, half)) {
      if (use != kEnters) width = std::max(width, m->cols);
      pieces += m->pieces;
    }
    const int rows = (s.hidden + room.blocks - 1) / room.blocks;  // summed all at once
    if (use != kEnters) sums = std::max(sums, rows * pieces * lanes);
    for (const Rows* m : entered(layer, half)) sums = std::max(sums, m->pieces * lanes);
  }
  sums = std::max(sums, head.pieces * lanes);
  if (width > l.input_stride) return text("%d inputs of %d", width, l.input_stride);
  return sums <= l.sum_count ? "" : text("%d sums of %d", sums, l.sum_count);
}

std::string check_scratch(const Shape& s, int batch, int sms) {
  int64_t bytes = 0;
  auto* base = reinterpret_cast<char*>(kApart);
  const Scratch w = scratch_of(s, batch, sms, base, &bytes);
  const auto at = [base](const void* p) { return static_cast<const char*>(p) - base; };
  const int64_t splits = splits_of(s, batch, sms);
  const int64_t contexts = int64_t{batch} * s.heads * splits * (s.head_dim + 2);
  const int64_t sums = int64_t{s.kv_heads} * batch * s.hidden;
  const std::vector<Region> regions = {
      {"counters", at(w.counters), sizeof(Counters)},
      {"x", at(w.x), int64_t{4} * batch * s.hidden},
      {"qkv", at(w.qkv), int64_t{kSize} * batch * s.qkv()},
      {"up", at(w.up), int64_t{kSize} * batch * s.mlp_width},
      {"context", at(w.context), int64_t{kSize} * batch * s.context()},
      {"parts", at(w.parts), 4 * std::max(contexts, sums)},
      {"best", at(w.best), int64_t{8} * sms * batch}};
  for (const Region& r : regions) {
    if (r.begin % 256 != 0) return std::string(r.name) + " is not aligned";
  }
  if (at(w.counters) != 0) return "counters are not at the start";
  if (splits < 1 || splits > kMaxSplits) return text("%d splits", static_cast<int>(splits));
  return check_apart(regions, bytes);
}

// ---- plans --------------------------------------------------------------------------------------

// One kernel's layout, walked; "" also where it does not fit.
template <class Params>
bool planned(const Fake& fake, const Room& room, Use use, int extra_floats, Params* p, Layer* layer,
             Rows* head, std::string* failure) {
  if (shape_of(fake.call, fake.block, &p->shape) != HFF_OK) return *failure = "no shape", false;
  const int batch = static_cast<int>(fake.call.batch);
  if (!layout_of(p->shape, room, batch, use, extra_floats, &p->layout)) return false;
  Norm norm;
  const int slot = p->layout.slot_bytes;
  if (layer_of(fake.call, fake.block, fake.cache, p->shape, slot, layer) != HFF_OK ||
      head_of(fake.model, slot, head, &norm) != HFF_OK)
    return *failure = "a layer was refused", false;
  *failure = check_layout(*layer, *head, p->shape, p->layout, room, batch, use, extra_floats);
  return true;
}

// Layers alike but for their addresses.
void copy_layers(const Layer& layer, Random& random, Addresses addresses, TokenParams* p) {
  p->layer_count = static_cast<int32_t>(random.range(1, 3));
  for (int l = 0; l < p->layer_count; ++l) {
    p->layers[l] = layer;
    for (Rows Layer::* m :
         {&Layer::qkv, &Layer::k, &Layer::v, &Layer::up, &Layer::o, &Layer::down}) {
      if ((p->layers[l].*m).weight != nullptr) (p->layers[l].*m).weight = addresses.take();
    }
  }
}

std::string check_token(Random& random, const Fake& fake, const Room& room) {
  const auto p = std::make_unique<TokenParams>();
  Layer layer;
  std::string failure;
  if (!planned(fake, room, kWhole, 0, p.get(), &layer, &p->head, &failure) || !failure.empty())
    return failure;
  copy_layers(layer, random, fake.addresses, p.get());
  return walk_token(random, *p, room.blocks);
}

std::string check_chain(Random& random, const Fake& fake, const Room& room) {
  for (const Use use : {kEnters, kLeaves}) {
    PhaseParams p = {};
    Layer layer;
    Rows head;
    std::string failure;
    if (!planned(fake, room, use, 0, &p, &layer, &head, &failure) || !failure.empty())
      return failure;
    for (int i = 0; i < halves(p.shape); ++i) {
      p.half = half_of(p.shape, i);
      p.kind = use == kEnters ? kPhaseIn : kPhaseOut;
      p.layer = {};  // the phase's own matrices
      if (use == kEnters && p.half.attention)
        p.layer.qkv = layer.qkv, p.layer.k = layer.k, p.layer.v = layer.v;
      if (use == kEnters && p.half.mlp) p.layer.up = layer.up;
      if (use == kLeaves && p.half.attention) p.layer.o = layer.o;
      if (use == kLeaves && p.half.mlp) p.layer.down = layer.down;
      failure = walk_phase(random, p, room.blocks);
      if (!failure.empty()) return failure;
    }
    if (use == kLeaves) continue;
    p.kind = kPhaseHead, p.layer = {}, p.head = head;
    failure = walk_phase(random, p, room.blocks);
    if (!failure.empty()) return failure;
  }
  return "";
}

std::string check_cluster(Random& random, const Fake& fake, const Room& room, int arch) {
  ClusterParams p = {};
  Rows head;
  std::string failure;
  if (shape_of(fake.call, fake.block, &p.shape) != HFF_OK) return "no shape";
  const int extra = exchange_floats(p.shape, static_cast<int>(fake.call.batch));
  if (!planned(fake, room, kEnters, extra, &p, &p.layer, &head, &failure) || !failure.empty())
    return failure;
  if (p.shape.sequential) p.layer.up = {};
  const int most = cluster_of(p.shape, room.blocks, arch);
  for (int ranks = most; ranks >= 1; ranks /= 2) {
    failure = walk_cluster(random, p, ranks);
    if (!failure.empty()) return failure;
  }
  return most == 1 || p.shape.kv_heads * most <= room.blocks ? "" : "more clusters than fit";
}

// ---- Pythia -------------------------------------------------------------------------------------

struct Pythia {
  const char* name;
  int64_t hidden, heads;
};
constexpr Pythia kPythia[] = {
    {"14m", 128, 4}, {"31m", 256, 8},    {"70m", 512, 8},    {"160m", 768, 12},  {"410m", 1024, 16},
    {"1b", 2048, 8}, {"1.4b", 2048, 16}, {"2.8b", 2560, 32}, {"6.9b", 4096, 32}, {"12b", 5120, 40}};

Fake pythia(const Pythia& size, int64_t batch) {
  HeadsData heads;
  heads.heads = heads.kv_heads = size.heads;
  heads.head_dim = size.hidden / size.heads;
  heads.rotary_dim = heads.head_dim / 4;
  return Fake(heads, size.hidden, 4 * size.hidden, 50304, false, false, 0, batch);
}

bool fits(const Fake& fake, const Room& room, Use use, int extra, std::string* failure) {
  ClusterParams p = {};
  Rows head;
  return planned(fake, room, use, extra, &p, &p.layer, &head, failure);
}

// What runs a size: t the token kernel, c the chain of kernels, - neither; a the attention rungs.
std::string kernels_of(const Fake& fake, const Kind& kind, std::string* failure) {
  const Room alone = kind.room(kStreamWarps, 0, 1);
  const bool token = fits(fake, kind.room(kStreamWarps, kAttendWarps, 1), kWhole, 0, failure);
  const bool chain =
      fits(fake, alone, kEnters, 0, failure) && fits(fake, alone, kLeaves, 0, failure);
  Shape shape;
  if (shape_of(fake.call, fake.block, &shape) != HFF_OK) *failure = "no shape";
  const int extra = exchange_floats(shape, static_cast<int>(fake.call.batch));
  const std::string plan = token ? "t" : chain ? "c" : "-";
  return plan + (fits(fake, alone, kEnters, extra, failure) ? "a" : "-");
}

// One batch row of any size runs by any kernel on any kind; four rows up to 6.9b do on sm_90.
bool must_fit(const Pythia& size, int64_t batch, const Kind& kind) {
  return batch == 1 || (kind.arch == 900 && size.hidden <= 4096);
}

}  // namespace
}  // namespace cuda
}  // namespace hff

namespace hff_test {

bool run_schedules(const Options& options, const std::string& isa) {
  using namespace hff::cuda;  // NOLINT
  Tally tally(options, "schedules", "row 14 schedules as data", isa);
  for (int64_t i = 0; i < options.count(400); ++i) {
    const uint64_t seed = options.seed + static_cast<uint64_t>(i);
    Random random(seed);
    tally.begin(seed, "");
    const Fake fake = Fake::random(random);
    Kind kind = random.pick({kKinds[0], kKinds[1], kKinds[2], kKinds[3]});
    kind.sms = static_cast<int>(random.pick<int64_t>({random.range(1, 9), random.range(1, 64)}));
    const int warps = static_cast<int>(random.range(1, kStreamWarps));
    const Room whole = kind.room(warps, static_cast<int>(random.range(1, kAttendWarps)), 1);
    const Room phase = kind.room(warps, 0, static_cast<int>(random.range(1, 2)));
    std::string failure = check_token(random, fake, whole);
    if (failure.empty()) failure = check_chain(random, fake, phase);
    if (failure.empty()) failure = check_cluster(random, fake, phase, kind.arch);
    hff::cuda::Shape shape;
    shape_of(fake.call, fake.block, &shape);
    if (failure.empty())
      failure = check_scratch(shape, static_cast<int>(fake.call.batch), kind.sms);
    tally.end(failure);
  }
  for (const Pythia& size : kPythia) {
    std::string line = std::string("     pythia-") + size.name + ", batches 1 to 4:";
    for (const Kind& kind : kKinds) {
      line += " sm_" + std::to_string(kind.arch / 10);
      for (int64_t batch = 1; batch <= kMaxBatch; ++batch) {
        tally.begin(0, "");
        std::string failure;
        const std::string kernels = kernels_of(pythia(size, batch), kind, &failure);
        line += " " + kernels;
        if (failure.empty() && kernels != "ta" && must_fit(size, batch, kind))
          failure = "has no room on sm_" + std::to_string(kind.arch / 10);
        tally.describe(std::string("pythia-") + size.name + " batch " + std::to_string(batch));
        tally.end(failure);
      }
    }
    std::printf("%s\n", line.c_str());
  }
  return tally.print();
}

}  // namespace hff_test

#else

namespace hff_test {
bool run_schedules(const Options&, const std::string&) { return true; }
}  // namespace hff_test

#endif

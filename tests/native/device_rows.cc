// Rows of the device alone: bits under a thousand schedules, values that only kernels see, and what
// is not supported.
#include <cstdio>

#include "trial.h"

namespace hff_test {
namespace {

// A kernel as a call reaches it.
struct Entry {
  const char* name;
  bool model;
  int32_t plan, stage;
};
constexpr Entry kEntries[] = {{"token", true, HFF_PLAN_TOKEN, 0},
                              {"phase, attend_heads and head", true, HFF_PLAN_CHAIN, 0},
                              {"phase and attend_heads", false, 0, HFF_STAGE_FULL},
                              {"attention", false, 0, HFF_STAGE_ATTENTION},
                              {"attention_up", false, 0, HFF_STAGE_ATTENTION_UP}};

std::unique_ptr<Case> make_case(Random& random, const Entry& entry, const Design& design) {
  return entry.model ? make_model(random, design) : make_block(random, design);
}

Design small_design() {
  Design design;
  design.hidden = 32, design.heads = 2, design.mlp = 64, design.vocab = 20, design.layers = 2;
  design.past = 5, design.queries = 1, design.batch = 1;
  return design;
}

// Variant 0 .. 7: either residual, one batch row or three, one part of the keys or several.
Design variant_of(const Entry& entry, int variant) {
  Design design = small_design();
  const bool batched = variant & 2, split = variant & 4;
  design.residual = variant & 1 ? HFF_RESIDUAL_SEQUENTIAL : HFF_RESIDUAL_PARALLEL;
  design.dtype = variant & 1 ? HFF_BF16 : HFF_F16;
  design.stage = entry.stage;
  if (batched) design.batch = 3;
  if (split) design.past = 70;
  if (batched && split) design.heads = 1;
  device().sms = !split ? 3 : batched ? 6 : 4;
  device().plan = entry.plan;
  return design;
}

std::string under_seed(Case& c, uint64_t seed, const std::vector<char>* expected) {
  c.restore();
  device().seed = seed;
  std::string failure = call_checked(c, 0, c.independent_rows(), 1);
  if (failure.empty()) failure = check_memory(c);
  if (!failure.empty() || expected == nullptr) return failure;
  return c.arena.outputs() == *expected ? "" : "other bits than under seed 1";
}

}  // namespace

bool run_seeds(const Options& options, const std::string& isa) {
  constexpr int kVariants = 8;
  constexpr int32_t kDevices[][2] = {{900, 232448}, {860, 101376}};
  bool clean = true;
  for (const Entry& entry : kEntries) {
    for (const auto& kind : kDevices) {
      device().arch = kind[0], device().shared_bytes = kind[1];
      Tally tally(options, "seeds",
                  std::string("row 14 bits over seeds, sm_") + std::to_string(kind[0] / 10) + " " +
                      entry.name,
                  isa);
      for (int variant = 0; variant < kVariants; ++variant) {
        Random random(static_cast<uint64_t>(1 + variant));
        const auto c = make_case(random, entry, variant_of(entry, variant));
        c->compute_reference();
        c->seal();
        std::string failure = under_seed(*c, 1, nullptr);
        if (failure.empty()) failure = check_parity(*c, nullptr);
        const std::vector<char> expected = c->arena.outputs();
        const int64_t seeds = std::max<int64_t>(1, options.count(1000) / kVariants);
        for (int64_t i = 0; i < seeds; ++i) {
          const uint64_t seed = options.seed + static_cast<uint64_t>(i);
          tally.begin(seed, "");
          tally.describe(c->shape());
          tally.end(failure.empty() ? under_seed(*c, seed + 1, &expected) : failure);
        }
      }
      clean = tally.print() && clean;
    }
  }
  return clean;
}

// ---- values that only kernels see ---------------------------------------------------------------

namespace {

enum Value { kId, kPosition, kFull };

bool rests_on_attention(const Result& r, const Design& design) {
  return r.name != "up_out" || design.residual == HFF_RESIDUAL_SEQUENTIAL;
}

// Elements of row `row` of `batch` are NaN, or the bits they were.
std::string check_row(const Result& r, const std::vector<double>& before, int64_t row,
                      int64_t batch, bool nan) {
  const size_t width = r.at.size() / static_cast<size_t>(batch);
  for (size_t i = width * static_cast<size_t>(row); i < width * static_cast<size_t>(row + 1); ++i) {
    const double out = r.array.get(r.at[i]);
    if (nan ? std::isnan(out) : out == before[i]) continue;
    return r.name + "[" + std::to_string(i) + "] is " + std::to_string(out) +
           (nan ? ", expected NaN" : ", and another row's value was spoilt");
  }
  return "";
}

std::vector<std::vector<double>> numbers(const Case& c) {
  std::vector<std::vector<double>> all;
  for (const Result& r : c.results) {
    all.emplace_back();
    for (const int64_t at : r.at) all.back().push_back(r.array.get(at));
  }
  return all;
}

const Indices* indices_of(const Case& c, Value value) {
  for (const Indices& indices : c.indices) {
    if (std::string(indices.name) == (value == kId ? "ids" : "positions")) return &indices;
  }
  return nullptr;
}

// The last batch row's id or position is outside its table, or the cache is full for all.
std::string spoilt_value(Random& random, Value value, Case& c, const Design& design) {
  c.seal();
  std::string failure = call_checked(c, 0, c.independent_rows(), 1);
  if (!failure.empty()) return failure;
  const auto before = numbers(c);
  c.arena.unseal();
  c.restore();
  int64_t rows_spoilt = 1;
  if (value == kFull) {
    rows_spoilt = design.batch;
    for (size_t i = 0; i < c.lengths.size(); ++i)
      c.lengths[i].set(0, random.pick({static_cast<double>(c.capacities[i]), 1e6, -1.0}));
  } else {
    const Indices& spoilt = *indices_of(c, value);
    if (value == kPosition && spoilt.array.count == 1) rows_spoilt = design.batch;  // one for all
    spoilt.array.set(spoilt.array.count - 1,
                     random.pick({-1.0, static_cast<double>(spoilt.limit), 1e15, -1e15}));
  }
  c.seal();
  std::vector<double> lengths;
  for (const Array& cell : c.lengths) lengths.push_back(cell.get(0));
  const int64_t advanced = c.queries;
  if (value == kFull) c.queries = 0;
  failure = call_checked(c, 0, c.independent_rows(), 1);
  for (size_t i = 0; i < lengths.size(); ++i) {
    const double length = c.lengths[i].get(0);
    if (failure.empty() && value == kFull && length != lengths[i])
      failure = "a full cache counted to " + std::to_string(length);
  }
  c.queries = advanced;
  for (size_t i = 0; failure.empty() && i < c.results.size(); ++i) {
    const Result& r = c.results[i];
    if (r.name == "keys" || r.name == "values") continue;
    for (int64_t b = 0; failure.empty() && b < design.batch; ++b) {
      const bool nan = b >= design.batch - rows_spoilt;
      if (nan && value != kId && !rests_on_attention(r, design)) continue;
      failure = check_row(r, before[i], b, design.batch, nan);
    }
  }
  return failure;
}

}  // namespace

bool run_values(const Options& options, const std::string& isa) {
  Tally tally(options, "values", "row 8 ids, positions and lengths outside their tables", isa);
  for (int64_t i = 0; i < options.count(100); ++i) {
    const uint64_t seed = options.seed + static_cast<uint64_t>(i);
    Random random(seed);
    draw_device(random);
    const Entry& entry = kEntries[random.range(0, 4)];
    Design design = small_design();
    design.batch = random.range(1, 4), design.past = random.pick<int64_t>({0, 5, 70});
    design.residual = random.pick<int32_t>({HFF_RESIDUAL_PARALLEL, HFF_RESIDUAL_SEQUENTIAL});
    design.stage = entry.stage;
    device().plan = entry.plan;
    tally.begin(seed, "");
    const auto c = make_case(random, entry, design);
    Value value = random.pick<Value>({kId, kPosition, kFull});
    if (indices_of(*c, value) == nullptr) value = kFull;
    constexpr const char* kNames[] = {"id", "position", "full cache"};
    tally.describe(std::string(kNames[value]) + ", " + entry.name + " " + c->shape());
    tally.end(spoilt_value(random, value, *c, design));
  }
  return tally.print();
}

// ---- what is not supported ----------------------------------------------------------------------

namespace {

struct Refusal {
  const char* what;
  hff_status status;
  const char* sentence;  // a part of it
  std::function<void(Design&)> design;
  std::function<void(std::vector<Field>&)> change;
  bool models_only = false;
};

void* named(std::vector<Field>& fields, const std::string& name, Field::Kind kind) {
  for (Field& field : fields) {
    if (field.name == name && field.kind == kind) return field.where;
  }
  std::printf("no field %s\n", name.c_str());
  std::abort();
}

void set_size(std::vector<Field>& fields, const char* name, Field::Kind kind, int64_t value) {
  *static_cast<int64_t*>(named(fields, name, kind)) = value;
}
void set_enum(std::vector<Field>& fields, const char* name, int32_t value) {
  *static_cast<int32_t*>(named(fields, name, Field::kEnum)) = value;
}
// The buffer's pointer `by` bytes further, its length by as many less.
void move(std::vector<Field>& fields, const char* name, int64_t by) {
  *static_cast<char**>(named(fields, name, Field::kPointer)) += by;
  *static_cast<int64_t*>(named(fields, name, Field::kBytes)) -= by;
}

char elsewhere[1 << 16];  // for weights off their 16 bytes

std::vector<Refusal> refusals() {
  const auto as_is = [](Design&) {};
  const auto plain = [](std::vector<Field>&) {};
  return {{"fp32", HFF_UNSUPPORTED, "take fp16 and bf16, the call is fp32",
           [](Design& d) { d.dtype = HFF_F32; }, plain},
          {"2 queries", HFF_UNSUPPORTED, "one query a sequence, the call has 2",
           [](Design& d) { d.queries = 2; }, plain},
          {"batch 5", HFF_UNSUPPORTED, "batches up to 4, the call has 5",
           [](Design& d) { d.batch = 5; }, plain},
          {"head size", HFF_UNSUPPORTED, "a multiple of 8, these are 2 of 18",
           [](Design& d) { d.hidden = 36; }, plain},
          {"mlp width", HFF_UNSUPPORTED, "down has rows of 36 elements",
           [](Design& d) { d.mlp = 36; }, plain},
          {"post-norm", HFF_UNSUPPORTED, "no post-norm layers",
           [](Design& d) { d.residual = HFF_RESIDUAL_POST_NORM; }, plain},
          {"no cache", HFF_UNSUPPORTED, "need", as_is,
           [](auto& f) { *static_cast<void**>(named(f, "cache", Field::kPointer)) = nullptr; }},
          {"weight off by 2 bytes", HFF_UNSUPPORTED, "16 aligned bytes", as_is,
           [](auto& f) {
             *static_cast<char**>(named(f, "linear.weight", Field::kPointer)) = elsewhere + 2;
           }},
          {"cache off by 2 bytes", HFF_UNSUPPORTED, "cache rows are not 16-byte aligned", as_is,
           [](auto& f) {
             *static_cast<char**>(named(f, "cache.keys", Field::kPointer)) = elsewhere + 2;
           }},
          {"token stride", HFF_UNSUPPORTED, "cache rows are not 16-byte aligned", as_is,
           [](auto& f) {
             *static_cast<char**>(named(f, "cache.keys", Field::kPointer)) = elsewhere;
             *static_cast<char**>(named(f, "cache.values", Field::kPointer)) = elsewhere;
             set_size(f, "cache.keys", Field::kBytes, sizeof elsewhere);
             set_size(f, "cache.values", Field::kBytes, sizeof elsewhere);
             set_size(f, "cache.token_stride", Field::kSize, 20);
           }},
          {"workspace short", HFF_INVALID, "workspace is too short", as_is,
           [](auto& f) { *static_cast<int64_t*>(named(f, "call.workspace", Field::kBytes)) -= 1; }},
          {"workspace absent", HFF_INVALID, "workspace is null", as_is,
           [](auto& f) {
             *static_cast<void**>(named(f, "call.workspace", Field::kPointer)) = nullptr;
           }},
          {"workspace off its line", HFF_INVALID, "workspace is not aligned", as_is,
           [](auto& f) { move(f, "call.workspace", 128); }},
          {"another device", HFF_UNSUPPORTED, "device 1", as_is,
           [](auto& f) { set_enum(f, "call.ordinal", 1); }},
          {"a device without a number", HFF_UNSUPPORTED, "device 64", as_is,
           [](auto& f) { set_enum(f, "call.ordinal", 64); }},
          {"packed weight", HFF_INVALID, "packed on a device", as_is,
           [](auto& f) {
             *static_cast<void**>(named(f, "linear.packed", Field::kPointer)) = elsewhere;
           }},
          {"another activation", HFF_UNSUPPORTED, "layers differ in shape", as_is,
           [](auto& f) {
             auto* activation = static_cast<int32_t*>(named(f, "block.activation", Field::kEnum));
             *activation = *activation == HFF_ACT_RELU ? HFF_ACT_SILU : HFF_ACT_RELU;
           },
           true},
          {"no room", HFF_UNSUPPORTED, "has no room for hidden 32 and mlp_width 64 at batch 1",
           [](Design&) { device().shared_bytes = 4096; }, plain}};
}

std::string refuse(const Refusal& refusal, Case& c) {
  c.seal();
  const hff_status status = c.call_changed(refusal.change);
  const std::string sentence = hff_last_error();
  if (status != refusal.status || sentence.find(refusal.sentence) == std::string::npos)
    return "expected \"" + std::string(refusal.sentence) + "\", got status " +
           std::to_string(status) + ": " + sentence;
  return c.arena.outputs_as_sealed() ? "" : "refused and changed an output";
}

}  // namespace

bool run_unsupported(const Options& options, const std::string& isa) {
  Tally tally(options, "unsupported", "row 8 refusals of the device", isa);
  for (const Refusal& refusal : refusals()) {
    for (const Entry& entry : kEntries) {
      if (refusal.models_only && !entry.model) continue;
      Random random(options.seed);
      device() = Device();
      device().plan = entry.plan;
      Design design = small_design();
      design.dtype = HFF_F16, design.stage = entry.stage;
      refusal.design(design);
      tally.begin(options.seed, "");
      const auto c = make_case(random, entry, design);
      tally.describe(std::string(refusal.what) + ", " + entry.name + " " + c->shape());
      tally.end(refuse(refusal, *c));
    }
  }
  return tally.print();
}

}  // namespace hff_test

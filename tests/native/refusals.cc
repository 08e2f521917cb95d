// Row 8: valid calls with one field that contradicts the others, each field that counts in turn.
// The library refuses.
#include <climits>
#include <map>

#include "spoil.h"
#include "trial.h"

namespace hff_test {
namespace {

using Named = std::map<std::string, void*>;

int64_t size_of(const Named& fields, const char* name) {
  return *static_cast<int64_t*>(fields.at(name));
}

// A value that contradicts the rest of a valid call whatever its shape; false where the field does
// not count here.
bool contradict(Random& random, const Field& field, const Named& fields, Panels& panels) {
  const std::string name = field.name;
  const auto set = [&field](int64_t value) {
    return *static_cast<int64_t*>(field.where) = value, true;
  };
  if (field.kind == Field::kStructSize) return set(size_of(fields, field.name) + 8);
  if (field.kind == Field::kThreads) return *static_cast<int32_t*>(field.where) = 0, true;
  if (field.kind == Field::kPanels) {
    panels.spoil(static_cast<hff_input*>(field.where), random.range(0, kHeader - 1));
    return true;
  }
  if (name == "v.weight") return *static_cast<void**>(field.where) = nullptr, true;
  if (name == "starts[0]") return set(random.pick<int64_t>({-1, 1, INT64_MIN, INT64_MAX}));
  if (name == "io.block_queries" || name == "io.block_keys") return set(1 << 20);
  if (name == "io.window" || name == "io.queries" || name == "io.keys" || name == "io.batch")
    return set(-1);
  if (name == "io.head_dim") return set(HFF_MAX_HEAD_DIM + 1);
  if (name == "io.kv_heads") return set(size_of(fields, "io.heads") + 1);
  if (name == "io.kernel") return *static_cast<int32_t*>(field.where) = 3, true;
  if (name == "mask.kind" || name == "call.dtype" || name == "call.causal" || name == "io.dtype" ||
      name == "io.causal" || name == "io.activation" || name == "io.stage" ||
      name == "io.precision" || name == "call.precision" || name == "call.plan" ||
      name == "norm.kind" || name == "heads.qkv_layout" || name == "block.residual" ||
      name == "block.activation") {
    return *static_cast<int32_t*>(field.where) = 17, true;
  }
  if (name == "call.ordinal" || name == "io.ordinal")
    return *static_cast<int32_t*>(field.where) = -1, true;
  // no such device; or CUDA, which a step without a workspace does not get even where it is
  if (name == "io.device") return *static_cast<int32_t*>(field.where) = 7, true;
  if (name == "call.device")
    return *static_cast<int32_t*>(field.where) = random.pick<int32_t>({HFF_DEVICE_CUDA, 7}), true;
  if (name == "io.next" && field.kind == Field::kPointer) return set(1);  // misaligned
  if (name == "io.steps") return set(-1);
  if (name == "norm.eps" || name == "heads.scale" || name == "io.scale")
    return *static_cast<float*>(field.where) = HUGE_VALF, true;
  if (name == "sampling.temperature") {
    return *static_cast<float*>(field.where) =
               random.pick({0.0f, -1.0f, 1e-42f, HUGE_VALF, std::nanf("")}),
           true;
  }
  if (name == "sampling.top_p")
    return *static_cast<double*>(field.where) = random.pick({-0.1, 1.1, std::nan("")}), true;
  if (name == "sampling.top_k") return set(-1);
  if (field.kind != Field::kSize && field.kind != Field::kCell) return false;
  if (name == "linear.row_stride") return set(size_of(fields, "linear.cols") - 1);
  if (name == "cache.token_stride" || name == "cache.head_stride" || name == "cache.batch_stride") {
    return set(size_of(fields, "heads.head_dim") - 1);
  }
  if (name == "cache.capacity") return set(size_of(fields, "cache.length[0]"));
  if (name == "heads.head_dim") return set(HFF_MAX_HEAD_DIM + 1);
  if (name == "heads.rotary_dim") return set(size_of(fields, field.name) + 1);
  if (name == "heads.kv_heads") return set(size_of(fields, "heads.heads") + 1);
  if (name == "io.qkv_row_stride") return set(size_of(fields, field.name) / 2);
  if (name == "call.batch" || name == "call.queries" || name == "io.hidden" ||
      name == "heads.heads" || name == "model.hidden" || name == "block.hidden" ||
      name == "block.mlp_width" || name == "linear.rows" || name == "linear.cols" ||
      name == "cache.length[0]") {
    return set(name == "cache.length[0]" ? -1 : 0);
  }
  return false;
}

}  // namespace

bool run_refusals(const Options& options, const std::string& isa) {
  Tally tally(options, "refuse", "row 8 single contradictions", isa);
  for (int64_t i = 0; i < options.count(20000); ++i) {
    const uint64_t seed = options.seed + static_cast<uint64_t>(i);
    Random random(seed);
    const Kernel& kernel = pick_kernel(random, options);
    tally.begin(seed, kernel.name);
    Design design;
    design.size = Size::kTiny;
    const auto c = kernel.make(random, design);
    if (!on_device() && c->chosen.next && random.chance(0.5))
      c->chosen.sampling = Sampling::random(random, c->independent_rows());
    c->seal();
    Panels panels;
    std::string name;
    const hff_status status = c->call_changed([&](std::vector<Field>& fields) {
      Named by_name;
      const size_t at = static_cast<size_t>(random.next() % fields.size());
      // a field's neighbours: the nearest of each name at or before it, then any after
      for (size_t f = 0; f < fields.size(); ++f) {
        if (f <= at) by_name[fields[f].name] = fields[f].where;
        by_name.emplace(fields[f].name, fields[f].where);
      }
      if (contradict(random, fields[at], by_name, panels)) name = fields[at].name;
    });
    tally.describe(name + " contradicts " + c->kernel() + " " + c->shape());
    tally.end(name.empty() || status ? "" : "taken");
  }
  return tally.print();
}

}  // namespace hff_test

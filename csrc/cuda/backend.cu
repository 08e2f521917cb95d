// The CUDA back end: what a device has, which kernels a call takes, and their launches on its
// stream. Nothing here waits for the device or allocates on it, so every call can be captured in a
// graph.
#include <cstring>
#include <mutex>

#include "cuda/attend.h"
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/plan.h"

namespace hff {
namespace cuda {
namespace {

constexpr int kMaxDevices = 64;
constexpr int kReserved = 1024;  // bytes of shared memory that the runtime takes per CTA

// What is asked of a device once.
struct Known {
  port::Device device;
  bool asked;
};

hff_status device_of(int ordinal, const port::Device** device) {
  static std::mutex mutex;
  static Known known[kMaxDevices];
  if (ordinal < 0 || ordinal >= kMaxDevices)
    return fail(HFF_UNSUPPORTED, "CUDA device %d, expected 0 to %d", ordinal, kMaxDevices - 1);
  const std::lock_guard<std::mutex> lock(mutex);
  Known& k = known[ordinal];
  if (!k.asked || kEmulated) {  // tests change the emulated device between calls
    HFF_TRY(port::describe(ordinal, &k.device));
    k.asked = true;
  }
  *device = &k.device;
  return HFF_OK;
}

// A call and the device it runs on.
struct Call {
  const hff_call& call;
  const port::Device& device;
  Shape shape;
  Scratch scratch;

  int batch() const { return static_cast<int>(call.batch); }
  bool bulk() const { return device.arch >= 900; }
  // For `per_sm` CTAs on a multiprocessor.
  Room room(int attend_warps, int per_sm) const {
    const int share = device.shared_per_sm / per_sm - kReserved;
    const int bytes = share < device.shared_limit ? share : device.shared_limit;
    return {bulk(), device.sms, team_of(device).stream_warps, attend_warps, bytes};
  }
};

hff_status call_of(const hff_call& call, const hff_block& block, const port::Device& device,
                   Call* c) {
  HFF_TRY(shape_of(call, block, &c->shape));
  int64_t bytes = 0;
  c->scratch = scratch_of(c->shape, c->batch(), device.sms, call.workspace.data, &bytes);
  return HFF_OK;
}

hff_status no_room(const char* kernel, const Call& c) {
  return fail(
      HFF_UNSUPPORTED,
      "the %s kernel has no room for hidden %d and mlp_width %d at batch %d in the %d bytes "
      "of shared memory of %s",
      kernel, c.shape.hidden, c.shape.mlp_width, c.batch(), c.device.shared_limit, c.device.name);
}

// A layer and the cache it appends to.
struct Operands {
  const hff_block* block;
  const hff_cache* cache;
};

// ---- the chain ----------------------------------------------------------------------------------

struct Chain {
  const Call& c;
  Layout enter_layout, leave_layout, attend_layout;

  bool fits(Use use, Layout* layout) const {
    return layout_of(c.shape, c.room(0, 2), c.batch(), use, 0, layout) ||
           layout_of(c.shape, c.room(0, 1), c.batch(), use, 0, layout);
  }

  hff_status prepare() {
    if (!fits(kEnters, &enter_layout) || !fits(kLeaves, &leave_layout)) return no_room("phase", c);
    attend_layout.total = 4 * attend_floats(c.shape.head_dim, kAttendWarps);
    return HFF_OK;
  }

  // A call's first kernel starts when the stream has come to it: what ran before may have written
  // weights, which the others ask for before they wait.
  bool follows = false;

  hff_status run(PhaseParams& p, const Layout& layout) {
    p.shape = c.shape;
    p.layout = layout;
    p.scratch = c.scratch;
    p.batch = c.batch();
    port::Launch launch;
    launch.grid = c.device.sms;
    launch.threads = 32 * team_of(c.device).stream_warps;
    launch.shared_bytes = layout.total;
    launch.dependent = c.bulk() && follows;
    follows = true;
    launch.stream = c.call.stream;
    launch.name = "phase";
    return port::launch(launch, phase_kernel(c.call.dtype, p.batch, c.bulk()), p);
  }

  hff_status enter(const Operands& of, const Half& half, const Source& source, void* up,
                   bool counts) {
    PhaseParams p = {};
    HFF_TRY(layer_of(c.call, *of.block, *of.cache, c.shape, enter_layout.slot_bytes, &p.layer));
    p.kind = kPhaseIn;
    p.half = half;
    p.source = source;
    p.layer.o = p.layer.down = {};
    if (!half.attention) p.layer.qkv = p.layer.k = p.layer.v = {};
    if (!half.mlp) p.layer.up = {};
    p.up = up;
    p.counts = counts;
    return run(p, enter_layout);
  }

  hff_status leave(const Operands& of, const Half& half, const Source& source, void* out,
                   bool counts) {
    PhaseParams p = {};
    HFF_TRY(layer_of(c.call, *of.block, *of.cache, c.shape, leave_layout.slot_bytes, &p.layer));
    p.kind = kPhaseOut;
    p.half = half;
    p.source = source;
    p.layer.qkv = p.layer.k = p.layer.v = p.layer.up = {};
    if (!half.attention) p.layer.o = {};
    if (!half.mlp) p.layer.down = {};
    p.up = c.scratch.up;
    p.out = out;
    p.counts = counts;
    return run(p, leave_layout);
  }

  hff_status attend(const Operands& of) const {
    AttendParams p = {};
    p.shape = c.shape;
    p.layout = attend_layout;
    p.scratch = c.scratch;
    p.cache = cache_of(*of.cache);
    p.rope = rope_of(c.call);
    p.mask = mask_of(c.call);
    p.batch = c.batch();
    p.splits = splits_of(c.shape, p.batch, c.device.sms);
    port::Launch launch;
    launch.grid = p.batch * c.shape.heads * p.splits;
    launch.threads = 32 * kAttendWarps;
    launch.shared_bytes = attend_layout.total;
    launch.dependent = c.bulk();
    launch.stream = c.call.stream;
    launch.name = "attend_heads";
    return port::launch(launch, attend_kernel(c.call.dtype), p);
  }

  // One layer, from `source` to `out` in T or, where that is null, to the residual stream.
  hff_status layer(const Operands& of, Source source, void* out) {
    const int count = halves(c.shape);
    for (int i = 0; i < count; ++i) {
      const Half half = half_of(c.shape, i);
      const bool last = i + 1 == count;
      HFF_TRY(enter(of, half, source, c.scratch.up, false));
      if (half.attention) HFF_TRY(attend(of));
      HFF_TRY(leave(of, half, source, last ? out : nullptr, last));
      source = {};
    }
    return HFF_OK;
  }

  hff_status head(const hff_model& model, const HeadOut& out) {
    PhaseParams p = {};
    HFF_TRY(head_of(model, enter_layout.slot_bytes, &p.head, &p.final_norm));
    p.kind = kPhaseHead;
    p.head_out = out;
    return run(p, enter_layout);
  }
};

// ---- whole models -------------------------------------------------------------------------------

HeadOut head_out_of(const hff_model_io& io) {
  return {io.logits.data, io.hidden.data, static_cast<int64_t*>(io.next.data)};
}

hff_status run_token(const Call& c, const hff_model& model, const hff_cache* caches,
                     const hff_model_io& io, bool* fits) {
  const Team team = team_of(c.device);
  TokenParams p = {};
  *fits = model.block_count <= kMaxLayers &&
          layout_of(c.shape, c.room(team.attend_warps, 1), c.batch(), kWhole, 0, &p.layout);
  if (!*fits) return HFF_OK;
  p.shape = c.shape;
  p.team = team;
  p.team.splits = splits_of(c.shape, c.batch(), c.device.sms);
  p.scratch = c.scratch;
  p.source = source_of(model, io);
  p.rope = rope_of(c.call);
  p.mask = mask_of(c.call);
  p.out = head_out_of(io);
  p.batch = c.batch();
  p.layer_count = static_cast<int32_t>(model.block_count);
  const int slot_bytes = p.layout.slot_bytes;
  HFF_TRY(head_of(model, slot_bytes, &p.head, &p.final_norm));
  for (int l = 0; l < p.layer_count; ++l)
    HFF_TRY(layer_of(c.call, model.blocks[l], caches[l], c.shape, slot_bytes, &p.layers[l]));
  port::Launch launch;
  launch.grid = c.device.sms;
  launch.threads = 32 * (team.stream_warps + team.attend_warps);
  launch.shared_bytes = p.layout.total;
  launch.cooperative = true;
  launch.stream = c.call.stream;
  launch.name = "token";
  return port::launch(launch, token_kernel(c.call.dtype, p.batch, c.bulk()), p);
}

hff_status run_chain(const Call& c, const hff_model& model, const hff_cache* caches,
                     const hff_model_io& io) {
  Chain chain = {c, {}, {}, {}, false};
  HFF_TRY(chain.prepare());
  Layer proven;  // all before the first is launched
  for (int64_t l = 0; l < model.block_count; ++l)
    HFF_TRY(layer_of(c.call, model.blocks[l], caches[l], c.shape, kLeastSlot, &proven));
  for (int64_t l = 0; l < model.block_count; ++l) {
    const Source source = l == 0 ? source_of(model, io) : Source{};
    HFF_TRY(chain.layer({&model.blocks[l], &caches[l]}, source, nullptr));
  }
  return chain.head(model, head_out_of(io));
}

hff_status model_forward(const hff_call& call, const hff_model& model, const hff_cache* caches,
                         const hff_model_io& io) {
  const port::Device* device;
  HFF_TRY(device_of(call.ordinal, &device));
  if (caches == nullptr) return fail(HFF_UNSUPPORTED, "CUDA kernels need caches");
  Call c = {call, *device, {}, {}};
  HFF_TRY(call_of(call, model.blocks[0], *device, &c));
  const DeviceGuard guard(call.ordinal);
  bool fits = false;
  if (call.plan != HFF_PLAN_CHAIN) {
    const hff_status status = run_token(c, model, caches, io, &fits);
    if (fits) return status;
    if (call.plan == HFF_PLAN_TOKEN) return no_room("token", c);
  }
  return run_chain(c, model, caches, io);
}

// ---- single layers ------------------------------------------------------------------------------

hff_status run_cluster(const Call& c, const Operands& of, const hff_block_io& io, bool with_up) {
  ClusterParams p = {};
  if (!layout_of(c.shape, c.room(0, 1), c.batch(), kEnters, exchange_floats(c.shape, c.batch()),
                 &p.layout))
    return no_room("attention", c);
  HFF_TRY(layer_of(c.call, *of.block, *of.cache, c.shape, p.layout.slot_bytes, &p.layer));
  p.shape = c.shape;
  p.scratch = c.scratch;
  p.source.x = io.x.data;
  const bool both = with_up && !c.shape.sequential;
  if (!both) p.layer.up = {};
  p.rope = rope_of(c.call);
  p.mask = mask_of(c.call);
  p.attention_out = io.attention_out.data;
  p.up_out = io.up_out.data;
  p.batch = c.batch();
  p.adds_x = with_up && c.shape.sequential;
  p.counts = !p.adds_x;  // else up counts, whose launch is the last
  port::Launch launch;
  launch.threads = 32 * team_of(c.device).stream_warps;
  launch.shared_bytes = p.layout.total;
  launch.stream = c.call.stream;
  launch.name = "attention_up";
  const auto kernel = cluster_kernel(c.call.dtype, p.batch, c.bulk());
  launch.cluster = cluster_of(c.shape, c.device.sms, c.device.arch);
  for (;; launch.cluster /= 2) {
    launch.grid = c.shape.kv_heads * launch.cluster;
    if (launch.cluster == 1 || port::max_active_clusters(kernel, launch) > 0) break;
  }
  return port::launch(launch, kernel, p);
}

hff_status block_forward(const hff_call& call, const hff_block& block, const hff_cache* cache,
                         const hff_block_io& io) {
  const port::Device* device;
  HFF_TRY(device_of(call.ordinal, &device));
  if (cache == nullptr) return fail(HFF_UNSUPPORTED, "CUDA kernels need a cache");
  Call c = {call, *device, {}, {}};
  HFF_TRY(call_of(call, block, *device, &c));
  const Operands of = {&block, cache};
  const DeviceGuard guard(call.ordinal);
  Chain chain = {c, {}, {}, {}, false};
  const bool up_apart = io.stage == HFF_STAGE_ATTENTION_UP && c.shape.sequential;
  if (io.stage == HFF_STAGE_FULL || up_apart) HFF_TRY(chain.prepare());
  Source source = {};
  source.x = io.x.data;
  if (io.stage == HFF_STAGE_FULL) return chain.layer(of, source, io.out.data);
  HFF_TRY(run_cluster(c, of, io, io.stage == HFF_STAGE_ATTENTION_UP));
  if (!up_apart) return HFF_OK;
  source.x = io.attention_out.data;
  return chain.enter(of, Half{false, true}, source, io.up_out.data, true);
}

int64_t workspace_bytes(const hff_call& call, const hff_model& model) {
  const port::Device* device;
  Shape shape;
  if (device_of(call.ordinal, &device) != HFF_OK) return 0;
  if (shape_of(call, model.blocks[0], &shape) != HFF_OK) return 0;
  int64_t bytes = 0;
  scratch_of(shape, static_cast<int>(call.batch), device->sms, nullptr, &bytes);
  return bytes;
}

hff_status attend_on_device(const hff_attend_io& io) {
  const DeviceGuard guard(io.ordinal);
  return attend(io);
}

const Backend kBackend = {model_forward,   block_forward,    nullptr,    nullptr,
                          nullptr,         nullptr,          nullptr,    nullptr,
                          workspace_bytes, attend_on_device, plan_attend};

}  // namespace
}  // namespace cuda

const Backend* cuda_backend(int32_t ordinal) {
  const port::Device* device;
  return cuda::device_of(ordinal, &device) == HFF_OK ? &cuda::kBackend : nullptr;
}

hff_status describe_cuda(int32_t ordinal, hff_device* out) {
  const port::Device* device;
  HFF_TRY(cuda::device_of(ordinal, &device));
  std::memcpy(out->name, device->name, sizeof(out->name));
  out->arch = device->arch;
  out->sms = device->sms;
  out->shared_bytes = device->shared_limit;
  out->host_memory = cuda::kEmulated;
  return HFF_OK;
}

}  // namespace hff

#if defined(HFF_PORT_HOST)
extern "C" {
// The device that the next calls of this thread meet, whether kernels have as many warps as there,
// and the seed of their schedules.
HFF_API void hff_emulate(int32_t arch, int32_t sms, int32_t shared_bytes, int32_t whole_team,
                         uint64_t seed) {
  hff::fibers::Options& options = hff::fibers::options();
  options.device.arch = arch;
  options.device.sms = sms;
  options.device.shared_limit = shared_bytes;
  options.device.shared_per_sm = shared_bytes + 1024;
  options.whole_team = whole_team != 0;
  options.seed = seed;
}
// What the last launch of this thread found; "" if nothing.
HFF_API const char* hff_emulation_report(void) { return hff::fibers::report(); }
}
#endif

// Calls of the CUDA back end for device 1, on the runtime of runtime.cc. Pointers to the device's
// memory are addresses of nothing, so that a host that follows one ends here. Prints what each call
// asked for; tests/test_cuda_host.py reads.
#include <cstdarg>
#include <cstdio>
#include <vector>

#include "cuda/backend.cu"
#include "cuda/plan.cu"
#include "runtime.h"

namespace hff {

hff_status fail(hff_status status, const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
  return status;
}

namespace cuda {
namespace {
template <class P>
port::Kernel<P> kernel(int index) {
  return reinterpret_cast<port::Kernel<P>>(hff_test::runtime().kernels + index);
}
}  // namespace

port::Kernel<TokenParams> token_kernel(int32_t, int, bool) {
  return kernel<TokenParams>(hff_test::kToken);
}
port::Kernel<PhaseParams> phase_kernel(int32_t, int, bool) {
  return kernel<PhaseParams>(hff_test::kPhase);
}
port::Kernel<AttendParams> attend_kernel(int32_t) {
  return kernel<AttendParams>(hff_test::kAttendHeads);
}
port::Kernel<ClusterParams> cluster_kernel(int32_t, int, bool) {
  return kernel<ClusterParams>(hff_test::kAttentionUp);
}
hff_status attend(const hff_attend_io&) {
  std::printf("attend %d\n", hff_test::runtime().current);
  return HFF_OK;
}
hff_status plan_attend(const hff_attend_io&, hff_attend_plan*) { return HFF_OK; }
}  // namespace cuda
}  // namespace hff

namespace hff_test {
namespace {

using namespace hff;
using cuda::ClusterParams, cuda::PhaseParams;

constexpr int64_t kHidden = 2560, kHeads = 32, kHeadDim = 80, kVocab = 50304, kCapacity = 64;
constexpr int64_t kLayers = 2;

// Memory of the device.
char* unmapped(int64_t bytes) {
  static uintptr_t next = uintptr_t{1} << 45;
  const uintptr_t at = next;
  next += static_cast<uintptr_t>(bytes + 511) / 256 * 256;
  return reinterpret_cast<char*>(at);
}
hff_input in(int64_t elements) { return {unmapped(2 * elements), 2 * elements}; }
hff_output out(int64_t elements) { return {unmapped(2 * elements), 2 * elements}; }
hff_linear linear(int64_t rows, int64_t cols) {
  return {in(rows * cols), in(rows), {}, rows, cols, cols};
}
hff_norm norm() { return {in(kHidden), in(kHidden), 1e-5f, HFF_NORM_LAYER}; }

hff_block block() {
  hff_block b = {};
  b.heads = {kHeads, kHeads, kHeadDim, 20, 0.1f, HFF_QKV_PER_HEAD};
  b.hidden = kHidden, b.mlp_width = 4 * kHidden, b.activation = HFF_ACT_GELU_ERF;
  b.attention_norm = norm(), b.mlp_norm = norm();
  b.qkv = linear(3 * kHidden, kHidden), b.o = linear(kHidden, kHidden);
  b.up = linear(4 * kHidden, kHidden), b.down = linear(kHidden, 4 * kHidden);
  return b;
}

hff_cache cache() {
  const int64_t head = kCapacity * kHeadDim, all = kHeads * head;
  auto* length = reinterpret_cast<int64_t*>(unmapped(8));
  return {out(all), out(all), all, head, kHeadDim, kCapacity, length};
}

void show(const char* what, hff_status status) {
  std::printf("-> %s: status %d, device %d, error %d\n", what, status, runtime().current,
              runtime().error);
}

// Whether a launch moves the length of a cache.
bool counts(int kernel, const void* params) {
  if (kernel == kAttentionUp) return static_cast<const ClusterParams*>(params)->counts != 0;
  return kernel == kPhase && static_cast<const PhaseParams*>(params)->counts != 0;
}

int run() {
  hff_device described = {};
  runtime().driver = false;
  show("old driver", describe_cuda(1, &described));
  runtime().driver = true;
  for (const int arch : {75, 86, 90, 91, 100, 110, 120, 130}) {
    port::Device device;
    runtime().arch = arch;
    show("device", port::describe(1, &device));
  }
  runtime().arch = 90;
  runtime().counts = counts;
  const Backend* backend = cuda_backend(1);
  const std::vector<hff_block> blocks = {block(), block()};
  const std::vector<hff_cache> caches = {cache(), cache()};
  hff_call call = {};
  call.dtype = HFF_F16, call.batch = call.queries = call.causal = call.threads = 1;
  call.positions = in(4), call.position_batch_stride = 1, call.rope_rows = kCapacity;
  call.cos = in(20 * kCapacity), call.sin = in(20 * kCapacity);
  call.device = HFF_DEVICE_CUDA, call.ordinal = 1, call.stream = reinterpret_cast<void*>(0x5);
  hff_model model = {};
  model.hidden = kHidden, model.vocab = kVocab, model.embedding = in(kVocab * kHidden);
  model.blocks = blocks.data(), model.block_count = kLayers;
  model.final_norm = norm(), model.head = linear(kVocab, kHidden);
  hff_model_io io = {};
  io.ids = in(4), io.id_batch_stride = 1, io.logits = out(kVocab), io.keep = 1;
  call.workspace = out(backend->workspace_bytes(call, model));

  const auto forward = [&](int32_t plan) {
    call.plan = plan;
    return backend->model(call, model, caches.data(), io);
  };
  show("token", forward(HFF_PLAN_TOKEN));
  show("chain", forward(HFF_PLAN_CHAIN));
  runtime().launches = 1;
  show("chain cut off", forward(HFF_PLAN_CHAIN));
  runtime().launches = 0, runtime().refusal = cudaErrorNoKernelImageForDevice;
  show("no image", forward(HFF_PLAN_TOKEN));
  runtime().launches = -1;
  hff_block_io layer = {};
  layer.x = in(kHidden), layer.attention_out = out(kHidden), layer.out = out(kHidden);
  layer.stage = HFF_STAGE_ATTENTION;
  for (const int resident : {8, 2, 0}) {
    runtime().resident = resident;
    show("attention", backend->block(call, blocks[0], &caches[0], layer));
  }
  runtime().resident = 8;
  hff_block sequential = blocks[0];
  sequential.residual = HFF_RESIDUAL_SEQUENTIAL;
  layer.stage = HFF_STAGE_ATTENTION_UP, layer.up_out = out(4 * kHidden);
  show("attention and up apart", backend->block(call, sequential, &caches[0], layer));
  layer.stage = HFF_STAGE_FULL;
  show("layer", backend->block(call, blocks[0], &caches[0], layer));
  hff_attend_io attend = {};
  attend.device = HFF_DEVICE_CUDA, attend.ordinal = 1;
  show("attend", backend->attend(attend));
  return 0;
}

}  // namespace
}  // namespace hff_test

int main() { return hff_test::run(); }

// The boundary: every struct is proven against its own buffers before a back end sees it, and no
// exception leaves. Nothing has been written when a call fails.
#include "abi_attend.h"
#include "abi_checks.h"

namespace hff {
namespace {

// The CPU's entry for a proven call.
template <class Entry, class... Arguments>
hff_status dispatch(Entry Backend::* entry, const Arguments&... arguments) {
  const Backend* backend = cpu_backend();
  if (backend == nullptr) return HFF_UNSUPPORTED;  // hff_isa() has said why
  if (backend->*entry == nullptr)
    return fail(HFF_UNSUPPORTED, "%s has no kernel for this call", hff_isa());
  return (backend->*entry)(arguments...);
}

// The entry, of the device that the call names, for a proven call of `model`.
template <class Entry, class... Arguments>
hff_status dispatch_on(const hff_call& call, const hff_model& model, Entry Backend::* entry,
                       const Arguments&... arguments) {
  if (on_host(call)) return dispatch(entry, call, arguments...);
  const Backend* backend = cuda_backend(call.ordinal);
  if (backend == nullptr) return HFF_UNSUPPORTED;  // cuda_backend has said why
  const int64_t bytes = backend->workspace_bytes(call, model);
  if (bytes == 0) return HFF_UNSUPPORTED;  // so has workspace_bytes
  HFF_TRY(check_workspace(call, bytes));
  return (backend->*entry)(call, arguments...);
}

// The back end of the device that a proven attend call names; null after fail().
const Backend* attend_backend(const hff_attend_io& io) {
  const Backend* backend = io.device == HFF_DEVICE_CPU ? cpu_backend() : cuda_backend(io.ordinal);
  if (backend != nullptr && backend->attend == nullptr) {
    fail(HFF_UNSUPPORTED, "this device has no attention kernels by themselves");
    return nullptr;
  }
  return backend;
}

// One layer as a model.
hff_model model_of(const hff_block& block) {
  hff_model model = {};
  model.struct_size = sizeof(hff_model);
  model.hidden = block.hidden;
  model.blocks = &block;
  model.block_count = 1;
  return model;
}

constexpr uint64_t kStructSizes[] = {
    sizeof(hff_input),    sizeof(hff_output),    sizeof(hff_linear),     sizeof(hff_norm),
    sizeof(hff_heads),    sizeof(hff_block),     sizeof(hff_cache),      sizeof(hff_mask),
    sizeof(hff_call),     sizeof(hff_block_io),  sizeof(hff_model),      sizeof(hff_sampling),
    sizeof(hff_model_io), sizeof(hff_linear_io), sizeof(hff_norm_io),    sizeof(hff_device),
    sizeof(hff_strides),  sizeof(hff_attend_io), sizeof(hff_attend_plan)};

}  // namespace
}  // namespace hff

using namespace hff;  // NOLINT: the entry points below read as the checks above

extern "C" {

int32_t hff_abi_version(void) { return HFF_ABI_VERSION; }

uint64_t hff_struct_size(int32_t index) {
  return index >= 0 && index < int32_t(sizeof(kStructSizes) / sizeof(kStructSizes[0]))
             ? kStructSizes[index]
             : 0;
}

hff_status hff_model_forward(const hff_call* call, const hff_model* model, const hff_cache* caches,
                             const hff_model_io* io) {
  HFF_REQUIRE(call != nullptr && model != nullptr && io != nullptr,
              "a struct of hff_model_forward is null");
  HFF_TRY(check_call(*call));
  HFF_TRY(check_steps(*io, *call, caches));
  const int64_t further = steps_of(*io) - 1;  // tokens, of calls of one query
  HFF_TRY(check_model(*model, *call, caches, call->queries + further));
  HFF_TRY(check_model_io(*io, *call, *model));
  HFF_TRY(check_positions(*call, model->blocks[0].heads.rotary_dim, further));
  return dispatch_on(*call, *model, &Backend::model, *model, caches, *io);
}

hff_status hff_block_forward(const hff_call* call, const hff_block* block, const hff_cache* cache,
                             const hff_block_io* io) {
  HFF_REQUIRE(call != nullptr && block != nullptr && io != nullptr,
              "a struct of hff_block_forward is null");
  HFF_TRY(check_call(*call));
  HFF_TRY(check_block(*block, *call, block->hidden));
  HFF_TRY(check_block_io(*io, *call, *block));
  HFF_TRY(check_keys(cache, *call, block->heads, call->queries));
  HFF_TRY(check_positions(*call, block->heads.rotary_dim));
  return dispatch_on(*call, model_of(*block), &Backend::block, *block, cache, *io);
}

hff_status hff_linear_forward(const hff_linear* linear, const hff_linear_io* io) {
  HFF_REQUIRE(linear != nullptr && io != nullptr, "a struct of hff_linear_forward is null");
  HFF_REQUIRE(io->struct_size == sizeof(hff_linear_io),
              "hff_linear_io has another size for the caller");
  HFF_TRY(check_dtype(io->dtype));
  HFF_TRY(check_threads(io->threads));
  HFF_TRY(check_activation(io->activation));
  const int64_t size = element_bytes(io->dtype);
  HFF_TRY(check_precision(io->precision));
  HFF_TRY(check_linear(*linear, linear->rows, linear->cols, *io, "linear"));
  HFF_REQUIRE(io->rows >= 0, "rows is %lld", shown(io->rows));
  if (io->rows == 0) return HFF_OK;
  HFF_TRY(check_buffer(io->x, Size(io->rows) * Size(linear->cols), size, "x"));
  HFF_TRY(check_buffer(io->out, Size(io->rows) * Size(linear->rows), size, "out"));
  return dispatch(&Backend::linear, *linear, *io);
}

hff_status hff_norm_forward(const hff_norm* norm, const hff_norm_io* io) {
  HFF_REQUIRE(norm != nullptr && io != nullptr, "a struct of hff_norm_forward is null");
  HFF_REQUIRE(io->struct_size == sizeof(hff_norm_io),
              "hff_norm_io has another size for the caller");
  HFF_TRY(check_dtype(io->dtype));
  HFF_TRY(check_threads(io->threads));
  const int64_t size = element_bytes(io->dtype);
  HFF_REQUIRE(io->rows >= 0 && io->hidden >= 1, "rows is %lld and hidden %lld", shown(io->rows),
              shown(io->hidden));
  HFF_TRY(check_norm(*norm, io->hidden, size, "norm"));
  if (io->rows == 0) return HFF_OK;
  HFF_TRY(check_buffer(io->x, Size(io->rows) * Size(io->hidden), size, "x"));
  HFF_TRY(check_buffer(io->out, Size(io->rows) * Size(io->hidden), size, "out"));
  return dispatch(&Backend::norm, *norm, *io);
}

hff_status hff_attend(const hff_attend_io* io) {
  HFF_REQUIRE(io != nullptr, "the struct of hff_attend is null");
  HFF_TRY(check_attend(*io));
  HFF_TRY(check_attend_buffers(*io));
  const Backend* backend = attend_backend(*io);
  if (backend == nullptr) return HFF_UNSUPPORTED;
  if (io->device == HFF_DEVICE_CUDA) {
    hff_attend_plan plan = {};
    HFF_TRY(backend->plan_attend(*io, &plan));
    HFF_TRY(check_attend_workspace(*io, plan.workspace_bytes));
  }
  return backend->attend(*io);
}

hff_status hff_plan_attend(const hff_attend_io* io, hff_attend_plan* out) {
  HFF_REQUIRE(io != nullptr && out != nullptr, "a struct of hff_plan_attend is null");
  HFF_REQUIRE(out->struct_size == sizeof(hff_attend_plan),
              "hff_attend_plan has another size for the caller");
  HFF_TRY(check_attend(*io));
  const Backend* backend = attend_backend(*io);
  return backend != nullptr ? backend->plan_attend(*io, out) : HFF_UNSUPPORTED;
}

int64_t hff_packed_bytes(int32_t dtype, int32_t precision, int64_t rows, int64_t cols) {
  const Backend* backend = cpu_backend();
  if (backend == nullptr || check_dtype(dtype) != HFF_OK || check_precision(precision) != HFF_OK)
    return 0;
  return rows < 1 || cols < 1 ? 0 : backend->packed_bytes(dtype, precision, rows, cols);
}

hff_status hff_pack(const hff_linear* linear, int32_t dtype, int32_t precision, int32_t threads,
                    const hff_output* packed) {
  HFF_REQUIRE(linear != nullptr && packed != nullptr, "a struct of hff_pack is null");
  HFF_TRY(check_dtype(dtype));
  HFF_TRY(check_precision(precision));
  HFF_TRY(check_threads(threads));
  HFF_TRY(check_linear(*linear, linear->rows, linear->cols, element_bytes(dtype), "linear"));
  const int64_t bytes = hff_packed_bytes(dtype, precision, linear->rows, linear->cols);
  HFF_REQUIRE(bytes > 0, "a matrix of (%lld, %lld) is too large to pack", shown(linear->rows),
              shown(linear->cols));
  HFF_TRY(check_buffer(packed->data, packed->bytes, Size(bytes), 1, 64, "packed"));
  return dispatch(&Backend::pack, *linear, dtype, precision, threads, packed->data);
}

uint64_t hff_fingerprint(const hff_linear* linears, int64_t count, int32_t dtype, int64_t phase) {
  if (linears == nullptr || count < 0 || phase < 0 || check_dtype(dtype) != HFF_OK) return 0;
  const int64_t size = element_bytes(dtype);
  uint64_t sum = 1;
  for (int64_t i = 0; i < count; ++i) {
    const hff_linear& l = linears[i];
    if (check_linear(l, l.rows, l.cols, size, "linear") != HFF_OK) return 0;
    sum = fingerprint(l, size, phase, sum);
  }
  return sum;
}

hff_status hff_describe_device(int32_t device, int32_t ordinal, hff_device* out) {
  HFF_REQUIRE(out != nullptr && out->struct_size == sizeof(hff_device),
              "hff_device is null or has another size for the caller");
  HFF_REQUIRE(device == HFF_DEVICE_CPU || device == HFF_DEVICE_CUDA,
              "device %d is none of HFF_DEVICE_*", device);
  HFF_REQUIRE(ordinal >= 0, "ordinal is %d", ordinal);
  if (device == HFF_DEVICE_CPU)
    return fail(HFF_UNSUPPORTED, "the CPU is described by hff_isa, not as a device");
  return describe_cuda(ordinal, out);
}

int64_t hff_workspace_bytes(const hff_call* call, const hff_model* model) {
  if (call == nullptr || model == nullptr) {
    fail(HFF_INVALID, "a struct of hff_workspace_bytes is null");
    return 0;
  }
  if (check_call(*call) != HFF_OK || check_layers(*model, *call) != HFF_OK) return 0;
  if (on_host(*call)) {
    fail(HFF_UNSUPPORTED, "calls on the CPU take no workspace");
    return 0;
  }
  const Backend* backend = cuda_backend(call->ordinal);
  return backend != nullptr ? backend->workspace_bytes(*call, *model) : 0;
}

}  // extern "C"

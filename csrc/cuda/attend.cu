// Launches the attention kernels by themselves: by nvcc, by hipcc, or on host fibers.
#include "cuda/attend.h"

#include <climits>

#include "cuda/attend_flash.cuh"
#include "cuda/attend_naive.cuh"

namespace hff {
namespace cuda {
namespace {

struct Chosen {
  port::Kernel<AttendCall> kernel;
  int floats;  // of shared memory
};

template <class T, int kDim>
Chosen of_kernel(int32_t kernel) {
  constexpr int kFloats = AttendTile<kDim>::kFloats;
  return kernel == HFF_ATTEND_TILED ? Chosen{attend_tiled<T, kDim>, kFloats}
                                    : Chosen{attend_flash<T, kDim>, kFloats};
}

// Head sizes share the kernel of the next larger one; what they lack is zero.
template <class T>
Chosen of_dim(const hff_attend_io& io) {
  if (io.kernel == HFF_ATTEND_NAIVE) return {attend_naive<T>, kAttendWarps};
  if (io.head_dim <= 32) return of_kernel<T, 32>(io.kernel);
  if (io.head_dim <= 64) return of_kernel<T, 64>(io.kernel);
  if (io.head_dim <= 128) return of_kernel<T, 128>(io.kernel);
  return of_kernel<T, 256>(io.kernel);
}

Chosen of_dtype(const hff_attend_io& io) {
  if (io.dtype == HFF_F32) return of_dim<float>(io);
  return io.dtype == HFF_F16 ? of_dim<port::half>(io) : of_dim<port::bfloat16>(io);
}

AttendCall call_of(const hff_attend_io& io) {
  AttendCall c = {};
  c.q = io.q.data, c.k = io.k.data, c.v = io.v.data, c.mask = io.mask.data.data;
  c.out = io.out.data;
  c.scores = static_cast<float*>(io.workspace.data);
  c.q_strides = io.q_strides, c.k_strides = io.k_strides, c.v_strides = io.v_strides;
  c.out_strides = io.out_strides;
  c.mask_batch = io.mask.batch_stride, c.mask_head = io.mask_head_stride;
  c.mask_query = io.mask.query_stride, c.mask_key = io.mask.key_stride;
  c.kv_heads = io.kv_heads, c.group = io.heads / io.kv_heads, c.rows = c.group * io.queries;
  c.queries = io.queries, c.keys = io.keys, c.window = io.window;
  c.tiles = (c.rows - 1) / kBlockRows + 1;
  c.head_dim = static_cast<int32_t>(io.head_dim), c.causal = io.causal;
  c.mask_kind = io.mask.kind, c.scale = io.scale;
  return c;
}

// Blocks of the grid; INT_MAX is most.
Size grid_of(const hff_attend_io& io, const AttendCall& c) {
  const int64_t units = io.kernel == HFF_ATTEND_NAIVE ? c.rows : c.tiles;
  return Size(io.batch) * Size(io.kv_heads) * Size(units);
}

}  // namespace

hff_status plan_attend(const hff_attend_io& io, hff_attend_plan* plan) {
  const bool naive = io.kernel == HFF_ATTEND_NAIVE;
  const Size scores = Size(io.batch) * Size(io.heads) * Size(io.queries) * Size(io.keys) * Size(4);
  if (!scores.ok())
    return fail(HFF_OUT_OF_MEMORY, "the scores of this attention exceed any memory");
  plan->block_queries = naive ? 0 : kBlockRows;
  plan->block_keys = naive ? 0 : kBlockKeys;
  plan->scratch_bytes = 0;
  plan->workspace_bytes = io.kernel == HFF_ATTEND_FLASH ? 0 : scores.value();
  return HFF_OK;
}

hff_status attend(const hff_attend_io& io) {
  const AttendCall call = call_of(io);
  const Size grid = grid_of(io, call);
  if (!grid.fits(INT_MAX))
    return fail(HFF_UNSUPPORTED, "this attention has more blocks than a grid");
  const Chosen chosen = of_dtype(io);
  port::Launch launch;
  launch.grid = static_cast<int>(grid.value());
  launch.threads = kAttendThreads;
  launch.shared_bytes = chosen.floats * 4;
  launch.stream = io.stream;
  launch.name = "attend";
  return port::launch(launch, chosen.kernel, call);
}

}  // namespace cuda
}  // namespace hff

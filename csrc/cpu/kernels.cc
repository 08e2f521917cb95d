// Compiled once per instruction set: HFF_ISA names the namespace and the table. Nothing here has
// external linkage but the table, and nothing of the C++ library is instantiated, so that no wider
// instruction leaks into common code.
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#include "attend_table.h"
#include "backend.h"
#include "cpu/arena.h"
#include "cpu/prefetch.h"
#include "cpu/team.h"
#include "cpu/types.h"

#include "cpu/vec-inl.h"

#include "cpu/elementary-inl.h"

#include "cpu/norm-inl.h"

#include "cpu/gemv-inl.h"

#include "cpu/pack-inl.h"

#include "cpu/amx-inl.h"

#include "cpu/gemm-tile-inl.h"

#include "cpu/gemm-inl.h"

#include "cpu/attention-inl.h"

#include "cpu/attend-inl.h"

#include "cpu/attend-naive-inl.h"

#include "cpu/attend-tiled-inl.h"

#include "cpu/attend-flash-inl.h"

#include "cpu/block-inl.h"

#include "cpu/decode-inl.h"

#include "cpu/gemm-scratch-inl.h"

#include "cpu/gemm-block-inl.h"

#include "cpu/forward-inl.h"

#include "cpu/calls-inl.h"

#include "cpu/greedy-inl.h"

#include "cpu/sample-inl.h"

#include "cpu/steps-inl.h"

#include "cpu/attend-calls-inl.h"

#include "cpu/stream-inl.h"

namespace hff {
namespace HFF_ISA {

// Calls function<T>(arguments...) for the T that dtype names; abi.cc has checked that it names one.
#define HFF_DISPATCH(dtype, function, ...) \
  switch (dtype) {                         \
    case HFF_F32:                          \
      return function<float>(__VA_ARGS__); \
    case HFF_BF16:                         \
      return function<bf16>(__VA_ARGS__);  \
    default:                               \
      return function<f16>(__VA_ARGS__);   \
  }

static hff_status model(const hff_call& call, const hff_model& model, const hff_cache* caches,
                        const hff_model_io& io) {
  if (io.next.data != nullptr) {
    HFF_DISPATCH(call.dtype, steps_call, call, model, caches, io);
  }
  HFF_DISPATCH(call.dtype, model_call, call, model, caches, io);
}
static hff_status block(const hff_call& call, const hff_block& layer, const hff_cache* cache,
                        const hff_block_io& io) {
  HFF_DISPATCH(call.dtype, block_call, call, layer, cache, io);
}
static hff_status linear(const hff_linear& layer, const hff_linear_io& io) {
  HFF_DISPATCH(io.dtype, linear_call, layer, io);
}
static hff_status norm(const hff_norm& layer, const hff_norm_io& io) {
  HFF_DISPATCH(io.dtype, norm_call, layer, io);
}
static hff_status attend(const hff_attend_io& io) { HFF_DISPATCH(io.dtype, attend_call, io); }
static hff_status plan_attend(const hff_attend_io& io, hff_attend_plan* plan) {
  HFF_DISPATCH(io.dtype, attend_plan_of, io, plan);
}
static int64_t packed_bytes(int32_t dtype, int32_t precision, int64_t rows, int64_t cols) {
  HFF_DISPATCH(dtype, packed_bytes_of, precision, rows, cols);
}
static bool packed_fits(const hff_linear& layer, int32_t dtype, int32_t precision) {
  HFF_DISPATCH(dtype, panels_fit, layer, precision);
}
static hff_status pack(const hff_linear& layer, int32_t dtype, int32_t precision, int32_t threads,
                       void* out) {
  HFF_DISPATCH(dtype, pack_weight, layer, precision, threads, out);
}

#if defined(HFF_TILES)
bool tiles_checked();
bool tiles_checked() { return tiles_work(); }
#endif

const char* absent();
const char* absent() { return nullptr; }

extern const Backend kBackend;
const Backend kBackend = {model, block,       linear,  norm,   packed_bytes, packed_fits,
                          pack,  read_stream, nullptr, attend, plan_attend};

}  // namespace HFF_ISA
}  // namespace hff

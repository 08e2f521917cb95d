// What abi.cc proves of a layer's parts: buffers, matrices, norms, heads, the block of them. Checks
// name the field and the value. Sizes are combined only through checked.h.
#pragma once

#include <cmath>

#include "backend.h"
#include "checked.h"

namespace hff {

#define HFF_REQUIRE(condition, ...)                                 \
  do {                                                              \
    if (!(condition)) return ::hff::fail(HFF_INVALID, __VA_ARGS__); \
  } while (0)

// `elements` of `size` bytes each lie inside the buffer.
inline hff_status check_buffer(const void* data, int64_t bytes, Size elements, int64_t size,
                               int64_t alignment, const char* name) {
  HFF_REQUIRE(data != nullptr, "%s is null", name);
  HFF_REQUIRE(reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(alignment) == 0,
              "%s is not aligned to its elements of %lld bytes", name, shown(alignment));
  HFF_REQUIRE((elements * Size(size)).fits(bytes),
              "%s is too short for its shape: it has %lld bytes", name, shown(bytes));
  return HFF_OK;
}
template <class Buffer>
inline hff_status check_buffer(const Buffer& b, Size elements, int64_t size, const char* name) {
  return check_buffer(b.data, b.bytes, elements, size, size, name);
}

// A vector that may be absent.
inline hff_status check_vector(const hff_input& v, int64_t n, int64_t size, bool required,
                               const char* name) {
  if (v.data == nullptr && !required) return HFF_OK;
  return check_buffer(v, Size(n), size, name);
}

inline hff_status check_dtype(int32_t dtype) {
  HFF_REQUIRE(dtype == HFF_F32 || dtype == HFF_BF16 || dtype == HFF_F16,
              "dtype %d is none of HFF_F32, HFF_BF16, HFF_F16", dtype);
  return HFF_OK;
}

inline hff_status check_threads(int32_t threads) {
  HFF_REQUIRE(threads >= 1 && threads <= HFF_MAX_THREADS, "threads is %d, expected 1 to %d",
              threads, HFF_MAX_THREADS);
  return HFF_OK;
}

inline hff_status check_activation(int32_t activation) {
  HFF_REQUIRE(activation >= HFF_ACT_NONE && activation <= HFF_ACT_SILU, "activation %d is unknown",
              activation);
  return HFF_OK;
}

inline hff_status check_precision(int32_t precision) {
  HFF_REQUIRE(precision >= HFF_PRECISION_HIGHEST && precision <= HFF_PRECISION_MEDIUM,
              "precision %d is none of HFF_PRECISION_*", precision);
  return HFF_OK;
}

inline bool on_host(const hff_call& call) { return call.device == HFF_DEVICE_CPU; }
inline bool on_host(const hff_linear_io&) { return true; }

// Panels that hff_pack wrote for this matrix, dtype and precision under the chosen instruction set.
inline hff_status check_packed(const hff_linear& l, int32_t dtype, int32_t precision,
                               const char* name) {
  const Backend* backend = cpu_backend();
  if (backend == nullptr) return HFF_UNSUPPORTED;
  const int64_t bytes = backend->packed_bytes(dtype, precision, l.rows, l.cols);
  HFF_REQUIRE(bytes > 0, "%s of (%lld, %lld) is too large to pack", name, shown(l.rows),
              shown(l.cols));
  HFF_TRY(check_buffer(l.packed.data, l.packed.bytes, Size(bytes), 1, 64, name));
  HFF_REQUIRE(backend->packed_fits(l, dtype, precision),
              "%s was packed for another matrix, precision or instruction set than %s", name,
              hff_isa());
  return HFF_OK;
}

inline hff_status check_linear(const hff_linear& l, int64_t rows, int64_t cols, int64_t size,
                               const char* name) {
  HFF_REQUIRE(l.rows == rows && l.cols == cols, "%s is (%lld, %lld), expected (%lld, %lld)", name,
              shown(l.rows), shown(l.cols), shown(rows), shown(cols));
  HFF_REQUIRE(l.rows >= 1 && l.cols >= 1 && l.row_stride >= l.cols,
              "%s has rows %lld, cols %lld, row_stride %lld", name, shown(l.rows), shown(l.cols),
              shown(l.row_stride));
  HFF_TRY(check_buffer(l.weight, last_offset(l.rows, l.row_stride) + Size(l.cols), size, name));
  return check_vector(l.bias, l.rows, size, false, name);
}

// The same for the call's dtype and precision, panels included.
template <class Call>
inline hff_status check_linear(const hff_linear& l, int64_t rows, int64_t cols, const Call& call,
                               const char* name) {
  HFF_TRY(check_linear(l, rows, cols, element_bytes(call.dtype), name));
  if (l.packed.data == nullptr) return HFF_OK;
  HFF_REQUIRE(on_host(call), "%s is given packed on a device, expected null", name);
  return check_packed(l, call.dtype, call.precision, name);
}

inline hff_status check_norm(const hff_norm& n, int64_t hidden, int64_t size, const char* name) {
  HFF_REQUIRE(n.kind == HFF_NORM_LAYER || n.kind == HFF_NORM_RMS, "%s has kind %d", name, n.kind);
  HFF_REQUIRE(std::isfinite(n.eps) && n.eps >= 0.0f, "%s has eps %g", name,
              static_cast<double>(n.eps));
  HFF_TRY(check_vector(n.weight, hidden, size, true, name));
  return check_vector(n.bias, hidden, size, false, name);
}

inline hff_status check_heads(const hff_heads& h) {
  HFF_REQUIRE(h.heads >= 1 && h.kv_heads >= 1 && h.heads % h.kv_heads == 0,
              "heads %lld are no multiple of kv_heads %lld", shown(h.heads), shown(h.kv_heads));
  HFF_REQUIRE(h.head_dim >= 1 && h.head_dim <= HFF_MAX_HEAD_DIM,
              "head_dim is %lld, expected 1 to %d", shown(h.head_dim), HFF_MAX_HEAD_DIM);
  HFF_REQUIRE(h.rotary_dim >= 0 && h.rotary_dim <= h.head_dim && h.rotary_dim % 2 == 0,
              "rotary_dim is %lld, expected an even number up to head_dim %lld",
              shown(h.rotary_dim), shown(h.head_dim));
  HFF_REQUIRE(std::isfinite(h.scale), "scale is %g", static_cast<double>(h.scale));
  HFF_REQUIRE(h.qkv_layout == HFF_QKV_STACKED ||
                  (h.qkv_layout == HFF_QKV_PER_HEAD && h.heads == h.kv_heads),
              "qkv_layout %d does not go with %lld heads over %lld kv_heads", h.qkv_layout,
              shown(h.heads), shown(h.kv_heads));
  return HFF_OK;
}

inline Size kv_rows(const hff_heads& h) { return Size(h.kv_heads) * Size(h.head_dim); }
inline Size qkv_rows(const hff_heads& h) {
  return (Size(h.heads) + Size(2) * Size(h.kv_heads)) * Size(h.head_dim);
}

inline hff_status check_block(const hff_block& b, const hff_call& call, int64_t hidden) {
  const int64_t size = element_bytes(call.dtype);
  HFF_TRY(check_heads(b.heads));
  HFF_TRY(check_activation(b.activation));
  HFF_REQUIRE(b.hidden >= 1 && b.hidden == hidden, "a layer is %lld wide, the model %lld",
              shown(b.hidden), shown(hidden));
  HFF_REQUIRE(b.residual >= HFF_RESIDUAL_PARALLEL && b.residual <= HFF_RESIDUAL_POST_NORM,
              "residual %d is unknown", b.residual);
  const Size qkv = qkv_rows(b.heads), context = Size(b.heads.heads) * Size(b.heads.head_dim);
  HFF_REQUIRE(qkv.ok() && context.ok() && b.mlp_width >= 1,
              "heads %lld, head_dim %lld, mlp_width %lld", shown(b.heads.heads),
              shown(b.heads.head_dim), shown(b.mlp_width));
  HFF_TRY(check_norm(b.attention_norm, hidden, size, "attention_norm"));
  HFF_TRY(check_norm(b.mlp_norm, hidden, size, "mlp_norm"));
  if (b.k.weight.data != nullptr) {
    HFF_REQUIRE(b.heads.qkv_layout == HFF_QKV_STACKED, "k is given with qkv_layout %d",
                b.heads.qkv_layout);
    HFF_TRY(check_linear(b.qkv, context.value(), hidden, call, "q"));
    HFF_TRY(check_linear(b.k, kv_rows(b.heads).value(), hidden, call, "k"));
    HFF_TRY(check_linear(b.v, kv_rows(b.heads).value(), hidden, call, "v"));
  } else {
    HFF_TRY(check_linear(b.qkv, qkv.value(), hidden, call, "qkv"));
  }
  HFF_TRY(check_linear(b.o, hidden, context.value(), call, "o"));
  HFF_TRY(check_linear(b.up, b.mlp_width, hidden, call, "up"));
  return check_linear(b.down, hidden, b.mlp_width, call, "down");
}

}  // namespace hff

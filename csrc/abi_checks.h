// What abi.cc proves of the structs it is given: shapes against buffers, enums, ranges. Checks name
// the field and the value. Sizes are combined only through checked.h.
#pragma once

#include <cmath>

#include "backend.h"
#include "checked.h"

namespace hff {

constexpr int64_t kMaxThreads = 255;

#define HFF_REQUIRE(condition, ...)                                 \
  do {                                                              \
    if (!(condition)) return ::hff::fail(HFF_INVALID, __VA_ARGS__); \
  } while (0)
#define HFF_TRY(expression)                  \
  do {                                       \
    const hff_status status_ = (expression); \
    if (status_ != HFF_OK) return status_;   \
  } while (0)

inline long long shown(int64_t value) { return static_cast<long long>(value); }

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
  HFF_REQUIRE(threads >= 1 && threads <= kMaxThreads, "threads is %d, expected 1 to %lld", threads,
              shown(kMaxThreads));
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

// Panels that hff_pack wrote for this matrix, dtype and precision under the chosen instruction set.
inline hff_status check_packed(const hff_linear& l, int32_t dtype, int32_t precision,
                               const char* name) {
  if (l.packed.data == nullptr) return HFF_OK;
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

// The number of rows of a call whose sizes check_call has proven.
inline Size rows_of(const hff_call& call) {
  if (call.starts.data != nullptr)
    return Size(static_cast<const int64_t*>(call.starts.data)[call.batch]);
  return Size(call.batch) * Size(call.queries);
}

inline hff_status check_mask(const hff_mask& m, const hff_call& call, int64_t keys) {
  if (m.kind == HFF_MASK_NONE) return HFF_OK;
  HFF_REQUIRE(m.kind >= HFF_MASK_NONE && m.kind <= HFF_MASK_ADDITIVE, "mask kind %d is unknown",
              m.kind);
  HFF_REQUIRE(m.keys >= keys, "mask covers %lld keys, the cache holds %lld after this call",
              shown(m.keys), shown(keys));
  const int64_t size = m.kind == HFF_MASK_BOOL    ? 1
                       : m.kind == HFF_MASK_INT64 ? 8
                                                  : element_bytes(call.dtype);
  return check_buffer(m.data,
                      last_offset(call.batch, m.batch_stride) +
                          last_offset(call.queries, m.query_stride) +
                          last_offset(m.keys, m.key_stride) + Size(1),
                      size, "mask");
}

// Every position lies in the table: positions become addresses.
inline hff_status check_positions(const hff_call& call, int64_t rotary_dim) {
  if (rotary_dim == 0) return HFF_OK;
  const int64_t size = element_bytes(call.dtype);
  const Size table = Size(call.rope_rows) * Size(rotary_dim);
  HFF_TRY(check_buffer(call.cos, table, size, "cos"));
  HFF_TRY(check_buffer(call.sin, table, size, "sin"));
  HFF_TRY(check_buffer(call.positions,
                       last_offset(call.batch, call.position_batch_stride) +
                           last_offset(call.queries, call.position_query_stride) + Size(1),
                       8, "positions"));
  const int64_t* positions = static_cast<const int64_t*>(call.positions.data);
  for (int64_t b = 0; b < call.batch; ++b) {
    for (int64_t i = 0; i < call.queries; ++i) {
      const int64_t p = positions[b * call.position_batch_stride + i * call.position_query_stride];
      if (p < 0 || p >= call.rope_rows) {
        return fail(HFF_OUT_OF_RANGE, "position %lld lies outside the table of %lld", shown(p),
                    shown(call.rope_rows));
      }
    }
  }
  return HFF_OK;
}

inline hff_status check_cache(const hff_cache& c, const hff_call& call, const hff_heads& h) {
  const int64_t size = element_bytes(call.dtype);
  HFF_REQUIRE(c.length != nullptr && reinterpret_cast<uintptr_t>(c.length) % 8 == 0,
              "cache length is null or misaligned");
  const Size keys = Size(*c.length) + Size(call.queries);
  HFF_REQUIRE(keys.ok(), "cache length is %lld", shown(*c.length));
  if (!keys.fits(c.capacity)) {
    return fail(HFF_OUT_OF_RANGE,
                "cache has room for %lld tokens, holds %lld and should take %lld more",
                shown(c.capacity), shown(*c.length), shown(call.queries));
  }
  HFF_REQUIRE(
      c.token_stride >= h.head_dim && c.head_stride >= h.head_dim && c.batch_stride >= h.head_dim,
      "cache strides (%lld, %lld, %lld) are smaller than head_dim %lld", shown(c.batch_stride),
      shown(c.head_stride), shown(c.token_stride), shown(h.head_dim));
  const Size elements = last_offset(call.batch, c.batch_stride) +
                        last_offset(h.kv_heads, c.head_stride) +
                        last_offset(c.capacity, c.token_stride) + Size(h.head_dim);
  HFF_TRY(check_buffer(c.keys, elements, size, "cache keys"));
  HFF_TRY(check_buffer(c.values, elements, size, "cache values"));
  return check_mask(call.mask, call, keys.value());
}

// Sequences of the call's own: rising from 0, none longer than `queries`.
inline hff_status check_starts(const hff_call& call) {
  if (call.starts.data == nullptr) return HFF_OK;
  HFF_TRY(check_buffer(call.starts, Size(call.batch) + Size(1), 8, "starts"));
  const int64_t* starts = static_cast<const int64_t*>(call.starts.data);
  HFF_REQUIRE(starts[0] == 0, "starts begins with %lld, expected 0", shown(starts[0]));
  for (int64_t b = 0; b < call.batch; ++b) {
    // subtracted as unsigned numbers, which cannot overflow
    const uint64_t length = static_cast<uint64_t>(starts[b + 1]) - static_cast<uint64_t>(starts[b]);
    HFF_REQUIRE(starts[b + 1] >= starts[b] && length <= static_cast<uint64_t>(call.queries),
                "starts[%lld] is %lld after %lld, expected up to %lld more", shown(b + 1),
                shown(starts[b + 1]), shown(starts[b]), shown(call.queries));
  }
  HFF_REQUIRE(starts[call.batch] >= 1, "starts ends with %lld, expected rows",
              shown(starts[call.batch]));
  return HFF_OK;
}

// Everything of a call but its positions, which come last: reading them is the only work that grows
// with the call.
inline hff_status check_call(const hff_call& call) {
  HFF_REQUIRE(call.struct_size == sizeof(hff_call),
              "hff_call has %llu bytes here, the caller says %llu",
              static_cast<unsigned long long>(sizeof(hff_call)),
              static_cast<unsigned long long>(call.struct_size));
  HFF_TRY(check_dtype(call.dtype));
  HFF_TRY(check_threads(call.threads));
  HFF_TRY(check_precision(call.precision));
  const Size rows = Size(call.batch) * Size(call.queries);
  HFF_REQUIRE(call.batch >= 1 && call.queries >= 1 && rows.ok(),
              "batch is %lld and queries %lld, expected at least 1", shown(call.batch),
              shown(call.queries));
  HFF_REQUIRE(call.causal == 0 || call.causal == 1, "causal is %d, expected 0 or 1", call.causal);
  return check_starts(call);
}

// What a call without caches may have: starts only with neither RoPE nor mask.
inline hff_status check_own_keys(const hff_call& call, const hff_heads& h) {
  HFF_REQUIRE(call.starts.data == nullptr || (h.rotary_dim == 0 && call.mask.kind == HFF_MASK_NONE),
              "starts are given with rotary_dim %lld and mask kind %d, expected 0 and none",
              shown(h.rotary_dim), call.mask.kind);
  return check_mask(call.mask, call, call.queries);
}

// `cache` may be null.
inline hff_status check_keys(const hff_cache* cache, const hff_call& call, const hff_heads& h) {
  if (cache == nullptr) return check_own_keys(call, h);
  HFF_REQUIRE(call.starts.data == nullptr, "starts are given with a cache");
  return check_cache(*cache, call, h);
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

inline hff_status check_model(const hff_model& m, const hff_call& call, const hff_cache* caches) {
  const int64_t size = element_bytes(call.dtype);
  HFF_REQUIRE(m.struct_size == sizeof(hff_model), "hff_model has another size for the caller");
  HFF_REQUIRE(m.hidden >= 1 && m.block_count >= 1 && m.blocks != nullptr,
              "a model needs layers: hidden %lld, block_count %lld", shown(m.hidden),
              shown(m.block_count));
  if (m.final_norm.weight.data != nullptr)
    HFF_TRY(check_norm(m.final_norm, m.hidden, size, "final_norm"));
  if (m.head.weight.data != nullptr)
    HFF_TRY(check_linear(m.head, m.head.rows, m.hidden, call, "head"));
  for (int64_t l = 0; l < m.block_count; ++l) {
    HFF_TRY(check_block(m.blocks[l], call, m.hidden));
    HFF_TRY(check_keys(caches != nullptr ? caches + l : nullptr, call, m.blocks[l].heads));
    HFF_REQUIRE(caches == nullptr || *caches[l].length == *caches[0].length,
                "layer %lld has another number of cached tokens than layer 0", shown(l));
    HFF_REQUIRE(m.blocks[l].heads.rotary_dim == m.blocks[0].heads.rotary_dim,
                "layers differ in rotary_dim");
  }
  return HFF_OK;
}

inline hff_status check_ids(const hff_model_io& io, const hff_call& call, const hff_model& m) {
  const int64_t size = element_bytes(call.dtype);
  if (io.ids.data == nullptr) return check_buffer(io.x, rows_of(call) * Size(m.hidden), size, "x");
  HFF_REQUIRE(call.starts.data == nullptr, "ids are given with starts, expected x");
  HFF_TRY(check_buffer(io.ids,
                       last_offset(call.batch, io.id_batch_stride) +
                           last_offset(call.queries, io.id_query_stride) + Size(1),
                       8, "ids"));
  HFF_REQUIRE(m.vocab >= 1, "vocab is %lld", shown(m.vocab));
  HFF_TRY(check_buffer(m.embedding, Size(m.vocab) * Size(m.hidden), size, "embedding"));
  const int64_t* ids = static_cast<const int64_t*>(io.ids.data);
  for (int64_t b = 0; b < call.batch; ++b) {
    for (int64_t i = 0; i < call.queries; ++i) {
      const int64_t id = ids[b * io.id_batch_stride + i * io.id_query_stride];
      if (id < 0 || id >= m.vocab) {
        return fail(HFF_OUT_OF_RANGE, "token id %lld lies outside the vocabulary of %lld",
                    shown(id), shown(m.vocab));
      }
    }
  }
  return HFF_OK;
}

inline hff_status check_model_io(const hff_model_io& io, const hff_call& call, const hff_model& m) {
  const int64_t size = element_bytes(call.dtype);
  HFF_REQUIRE(io.struct_size == sizeof(hff_model_io),
              "hff_model_io has another size for the caller");
  HFF_REQUIRE(io.logits.data != nullptr || io.hidden.data != nullptr,
              "neither logits nor hidden is asked for");
  if (io.hidden.data != nullptr) {
    HFF_TRY(check_buffer(io.hidden, rows_of(call) * Size(m.hidden), size, "hidden"));
  }
  if (io.logits.data != nullptr) {
    HFF_REQUIRE(m.head.weight.data != nullptr, "logits are asked for, but the model has no head");
    HFF_REQUIRE(call.starts.data == nullptr, "logits are asked for with starts");
    HFF_REQUIRE(io.keep >= 1 && io.keep <= call.queries, "keep is %lld, expected 1 to %lld",
                shown(io.keep), shown(call.queries));
    HFF_TRY(check_buffer(io.logits, Size(call.batch) * Size(io.keep) * Size(m.head.rows), size,
                         "logits"));
  }
  return check_ids(io, call, m);
}

inline hff_status check_block_io(const hff_block_io& io, const hff_call& call, const hff_block& b) {
  const int64_t size = element_bytes(call.dtype);
  const Size rows = rows_of(call);
  HFF_REQUIRE(io.struct_size == sizeof(hff_block_io),
              "hff_block_io has another size for the caller");
  HFF_REQUIRE(io.stage >= HFF_STAGE_ATTENTION && io.stage <= HFF_STAGE_FULL, "stage %d is unknown",
              io.stage);
  HFF_TRY(check_buffer(io.x, rows * Size(b.hidden), size, "x"));
  if (io.stage == HFF_STAGE_FULL) return check_buffer(io.out, rows * Size(b.hidden), size, "out");
  HFF_TRY(check_buffer(io.attention_out, rows * Size(b.hidden), size, "attention_out"));
  if (io.stage == HFF_STAGE_ATTENTION) return HFF_OK;
  return check_buffer(io.up_out, rows * Size(b.mlp_width), size, "up_out");
}

inline hff_status check_attention_io(const hff_attention_io& io, const hff_call& call,
                                     const hff_heads& h) {
  const int64_t size = element_bytes(call.dtype);
  const Size rows = rows_of(call), width = qkv_rows(h);
  HFF_REQUIRE(io.struct_size == sizeof(hff_attention_io),
              "hff_attention_io has another size for the caller");
  HFF_REQUIRE(width.fits(io.qkv_row_stride), "qkv_row_stride is %lld, shorter than a row",
              shown(io.qkv_row_stride));
  HFF_TRY(check_buffer(io.qkv, last_offset(rows.value(), io.qkv_row_stride) + width, size, "qkv"));
  return check_buffer(io.out, rows * Size(h.heads) * Size(h.head_dim), size, "out");
}

}  // namespace hff

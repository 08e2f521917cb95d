// What abi.cc proves of an attention by itself.
#pragma once

#include "abi_parts.h"

namespace hff {

constexpr int64_t kMaxBlock = 4096;  // of queries or keys that a caller may ask for

// Everything but the buffers.
inline hff_status check_attend(const hff_attend_io& io) {
  HFF_REQUIRE(io.struct_size == sizeof(hff_attend_io),
              "hff_attend_io has another size for the caller");
  HFF_TRY(check_dtype(io.dtype));
  HFF_TRY(check_threads(io.threads));
  HFF_REQUIRE(io.kernel >= HFF_ATTEND_NAIVE && io.kernel <= HFF_ATTEND_FLASH,
              "kernel %d is none of HFF_ATTEND_*", io.kernel);
  HFF_REQUIRE(io.device == HFF_DEVICE_CPU || io.device == HFF_DEVICE_CUDA,
              "device %d is none of HFF_DEVICE_*", io.device);
  HFF_REQUIRE(io.ordinal >= 0, "ordinal is %d", io.ordinal);
  HFF_REQUIRE(io.causal == 0 || io.causal == 1, "causal is %d, expected 0 or 1", io.causal);
  HFF_REQUIRE(io.window == 0 || (io.window > 0 && io.causal == 1),
              "window is %lld and causal %d, expected 0, or 1 or more with causal",
              shown(io.window), io.causal);
  HFF_REQUIRE(std::isfinite(io.scale), "scale is %g", static_cast<double>(io.scale));
  HFF_REQUIRE(io.heads >= 1 && io.kv_heads >= 1 && io.heads % io.kv_heads == 0,
              "heads %lld are no multiple of kv_heads %lld", shown(io.heads), shown(io.kv_heads));
  HFF_REQUIRE(io.head_dim >= 1 && io.head_dim <= HFF_MAX_HEAD_DIM,
              "head_dim is %lld, expected 1 to %d", shown(io.head_dim), HFF_MAX_HEAD_DIM);
  const Size rows = Size(io.batch) * Size(io.heads) * Size(io.queries);
  HFF_REQUIRE(io.batch >= 1 && io.queries >= 1 && io.keys >= 1 && rows.ok(),
              "batch is %lld, queries %lld and keys %lld, expected at least 1", shown(io.batch),
              shown(io.queries), shown(io.keys));
  HFF_REQUIRE(io.block_queries >= 0 && io.block_queries <= kMaxBlock && io.block_keys >= 0 &&
                  io.block_keys <= kMaxBlock,
              "blocks are of %lld queries and %lld keys, expected 0 to %lld",
              shown(io.block_queries), shown(io.block_keys), shown(kMaxBlock));
  return HFF_OK;
}

template <class Buffer>
inline hff_status check_tokens(const Buffer& buffer, const hff_strides& s, const hff_attend_io& io,
                               int64_t heads, int64_t tokens, const char* name) {
  return check_buffer(buffer,
                      last_offset(io.batch, s.batch) + last_offset(heads, s.head) +
                          last_offset(tokens, s.token) + Size(io.head_dim),
                      element_bytes(io.dtype), name);
}

inline hff_status check_attend_mask(const hff_attend_io& io) {
  const hff_mask& m = io.mask;
  if (m.kind == HFF_MASK_NONE) return HFF_OK;
  HFF_REQUIRE(m.kind >= HFF_MASK_NONE && m.kind <= HFF_MASK_ADDITIVE, "mask kind %d is unknown",
              m.kind);
  HFF_REQUIRE(m.keys >= io.keys, "mask covers %lld keys of %lld", shown(m.keys), shown(io.keys));
  const int64_t size = mask_element_bytes(m.kind, element_bytes(io.dtype));
  return check_buffer(
      m.data,
      last_offset(io.batch, m.batch_stride) + last_offset(io.heads, io.mask_head_stride) +
          last_offset(io.queries, m.query_stride) + last_offset(m.keys, m.key_stride) + Size(1),
      size, "mask");
}

// The tensors lie inside their buffers, and no row of `out` upon another along one dimension.
inline hff_status check_attend_buffers(const hff_attend_io& io) {
  HFF_TRY(check_tokens(io.q, io.q_strides, io, io.heads, io.queries, "q"));
  HFF_TRY(check_tokens(io.k, io.k_strides, io, io.kv_heads, io.keys, "k"));
  HFF_TRY(check_tokens(io.v, io.v_strides, io, io.kv_heads, io.keys, "v"));
  HFF_TRY(check_tokens(io.out, io.out_strides, io, io.heads, io.queries, "out"));
  const hff_strides& s = io.out_strides;
  HFF_REQUIRE((io.batch == 1 || s.batch >= io.head_dim) &&
                  (io.heads == 1 || s.head >= io.head_dim) &&
                  (io.queries == 1 || s.token >= io.head_dim),
              "out has strides (%lld, %lld, %lld), smaller than head_dim %lld", shown(s.batch),
              shown(s.head), shown(s.token), shown(io.head_dim));
  // keys that share their memory would make a call of any length out of a short buffer
  HFF_REQUIRE(io.keys == 1 || (io.k_strides.token >= 1 && io.v_strides.token >= 1),
              "tokens of k are %lld apart and of v %lld, expected at least 1",
              shown(io.k_strides.token), shown(io.v_strides.token));
  return check_attend_mask(io);
}

inline hff_status check_attend_workspace(const hff_attend_io& io, int64_t bytes) {
  if (bytes == 0) return HFF_OK;
  return check_buffer(io.workspace.data, io.workspace.bytes, Size(bytes), 1, 64, "workspace");
}

}  // namespace hff

// What abi.cc proves of a call, its caches, its model and what it reads and writes. Of a call on a
// device only the structs are read: ids, positions and lengths are its kernels' to check.
#pragma once

#include "abi_parts.h"

namespace hff {

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
  const int64_t size = mask_element_bytes(m.kind, element_bytes(call.dtype));
  return check_buffer(m.data,
                      last_offset(call.batch, m.batch_stride) +
                          last_offset(call.queries, m.query_stride) +
                          last_offset(m.keys, m.key_stride) + Size(1),
                      size, "mask");
}

// Every position lies in the table, and so do the `further` after it: positions become addresses.
// On a device they may be null.
inline hff_status check_positions(const hff_call& call, int64_t rotary_dim, int64_t further = 0) {
  if (rotary_dim == 0) return HFF_OK;
  const int64_t size = element_bytes(call.dtype);
  const Size table = Size(call.rope_rows) * Size(rotary_dim);
  HFF_TRY(check_buffer(call.cos, table, size, "cos"));
  HFF_TRY(check_buffer(call.sin, table, size, "sin"));
  if (!on_host(call) && call.positions.data == nullptr) return HFF_OK;
  HFF_TRY(check_buffer(call.positions,
                       last_offset(call.batch, call.position_batch_stride) +
                           last_offset(call.queries, call.position_query_stride) + Size(1),
                       8, "positions"));
  if (!on_host(call)) return HFF_OK;
  const int64_t* positions = static_cast<const int64_t*>(call.positions.data);
  for (int64_t b = 0; b < call.batch; ++b) {
    for (int64_t i = 0; i < call.queries; ++i) {
      const int64_t p = positions[b * call.position_batch_stride + i * call.position_query_stride];
      if (p < 0 || p >= call.rope_rows) {
        return fail(HFF_OUT_OF_RANGE, "position %lld lies outside the table of %lld", shown(p),
                    shown(call.rope_rows));
      }
      if (p >= call.rope_rows - further) {
        return fail(HFF_OUT_OF_RANGE,
                    "position %lld and those of %lld more steps reach past the table of %lld",
                    shown(p), shown(further), shown(call.rope_rows));
      }
    }
  }
  return HFF_OK;
}

// `tokens`: how many of each batch row the call appends.
inline hff_status check_cache(const hff_cache& c, const hff_call& call, const hff_heads& h,
                              int64_t tokens) {
  const int64_t size = element_bytes(call.dtype);
  HFF_REQUIRE(c.length != nullptr && reinterpret_cast<uintptr_t>(c.length) % 8 == 0,
              "cache length is null or misaligned");
  const int64_t length = on_host(call) ? *c.length : 0;  // at least, on a device
  const Size keys = Size(length) + Size(tokens);
  HFF_REQUIRE(keys.ok(), "cache length is %lld", shown(length));
  if (!keys.fits(c.capacity)) {
    return fail(HFF_OUT_OF_RANGE,
                "cache has room for %lld tokens, holds %lld and should take %lld more",
                shown(c.capacity), shown(length), shown(tokens));
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
  HFF_REQUIRE(call.device == HFF_DEVICE_CPU || call.device == HFF_DEVICE_CUDA,
              "device %d is none of HFF_DEVICE_*", call.device);
  HFF_REQUIRE(call.ordinal >= 0, "ordinal is %d", call.ordinal);
  HFF_REQUIRE(call.plan >= HFF_PLAN_AUTO && call.plan <= HFF_PLAN_TOKEN,
              "plan %d is none of HFF_PLAN_*", call.plan);
  if (on_host(call)) return check_starts(call);
  if (call.starts.data == nullptr) return HFF_OK;
  return fail(HFF_UNSUPPORTED, "starts are given on a device, which runs sequences of one length");
}

// Memory for what a call on a device keeps between its kernels.
inline hff_status check_workspace(const hff_call& call, int64_t bytes) {
  constexpr int64_t kAlignment = 256;  // cudaMalloc's
  return check_buffer(call.workspace.data, call.workspace.bytes, Size(bytes), 1, kAlignment,
                      "workspace");
}

// What a call without caches may have: starts only with neither RoPE nor mask.
inline hff_status check_own_keys(const hff_call& call, const hff_heads& h) {
  HFF_REQUIRE(call.starts.data == nullptr || (h.rotary_dim == 0 && call.mask.kind == HFF_MASK_NONE),
              "starts are given with rotary_dim %lld and mask kind %d, expected 0 and none",
              shown(h.rotary_dim), call.mask.kind);
  return check_mask(call.mask, call, call.queries);
}

// `cache` may be null.
inline hff_status check_keys(const hff_cache* cache, const hff_call& call, const hff_heads& h,
                             int64_t tokens) {
  if (cache == nullptr) return check_own_keys(call, h);
  HFF_REQUIRE(call.starts.data == nullptr, "starts are given with a cache");
  return check_cache(*cache, call, h, tokens);
}

// A model apart from its caches.
inline hff_status check_layers(const hff_model& m, const hff_call& call) {
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
    HFF_REQUIRE(m.blocks[l].heads.rotary_dim == m.blocks[0].heads.rotary_dim,
                "layers differ in rotary_dim");
  }
  return HFF_OK;
}

inline hff_status check_model(const hff_model& m, const hff_call& call, const hff_cache* caches,
                              int64_t tokens) {
  HFF_TRY(check_layers(m, call));
  for (int64_t l = 0; l < m.block_count; ++l) {
    HFF_TRY(check_keys(caches != nullptr ? caches + l : nullptr, call, m.blocks[l].heads, tokens));
    if (caches == nullptr || !on_host(call)) continue;
    HFF_REQUIRE(*caches[l].length == *caches[0].length,
                "layer %lld has another number of cached tokens than layer 0", shown(l));
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
  if (!on_host(call)) return HFF_OK;
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

inline int64_t steps_of(const hff_model_io& io) { return io.steps > 1 ? io.steps : 1; }

// Several steps: what each of them needs of the call, but room.
inline hff_status check_steps(const hff_model_io& io, const hff_call& call,
                              const hff_cache* caches) {
  HFF_REQUIRE(io.struct_size == sizeof(hff_model_io),
              "hff_model_io has another size for the caller");
  HFF_REQUIRE(io.steps >= 0, "steps is %lld", shown(io.steps));
  if (io.steps <= 1) return HFF_OK;
  if (!on_host(call))
    return fail(HFF_UNSUPPORTED, "%lld steps are asked for on a device", shown(io.steps));
  HFF_REQUIRE(io.next.data != nullptr && io.ids.data != nullptr && caches != nullptr,
              "%lld steps are asked for without next, ids or caches", shown(io.steps));
  HFF_REQUIRE(call.queries == 1, "%lld steps of %lld queries are asked for, expected 1",
              shown(io.steps), shown(call.queries));
  return HFF_OK;
}

// How `tokens` are drawn.
inline hff_status check_sampling(const hff_sampling& s, Size tokens) {
  HFF_REQUIRE(s.struct_size == sizeof(hff_sampling),
              "hff_sampling has another size for the caller");
  HFF_REQUIRE(std::isnormal(s.temperature) && s.temperature > 0.0f,
              "temperature is %g, expected a number above 0", static_cast<double>(s.temperature));
  HFF_REQUIRE(s.top_p >= 0.0 && s.top_p <= 1.0, "top_p is %g, expected 0 to 1", s.top_p);
  HFF_REQUIRE(s.top_k >= 0, "top_k is %lld", shown(s.top_k));
  HFF_TRY(check_buffer(s.uniforms, tokens, 8, "uniforms"));
  const double* uniforms = static_cast<const double*>(s.uniforms.data);
  for (int64_t i = 0; i < tokens.value(); ++i)
    HFF_REQUIRE(uniforms[i] >= 0.0 && uniforms[i] < 1.0, "uniforms hold %g, expected 0 to below 1",
                uniforms[i]);
  return HFF_OK;
}

inline hff_status check_next(const hff_model_io& io, const hff_call& call, const hff_model& m) {
  if (io.next.data == nullptr) return HFF_OK;
  HFF_REQUIRE(m.head.weight.data != nullptr, "next is asked for, but the model has no head");
  HFF_REQUIRE(!on_host(call) || io.logits.data != nullptr, "next is asked for without logits");
  HFF_REQUIRE(io.steps <= 1 || m.head.rows <= m.vocab,
              "%lld steps are asked for of a head of %lld rows and a vocabulary of %lld",
              shown(io.steps), shown(m.head.rows), shown(m.vocab));
  const Size tokens = Size(call.batch) * Size(steps_of(io));
  HFF_TRY(check_buffer(io.next, tokens, 8, "next"));
  if (io.sampling == nullptr) return HFF_OK;
  if (!on_host(call)) return fail(HFF_UNSUPPORTED, "next is to be drawn on a device");
  return check_sampling(*io.sampling, tokens);
}

inline hff_status check_model_io(const hff_model_io& io, const hff_call& call, const hff_model& m) {
  const int64_t size = element_bytes(call.dtype);
  HFF_REQUIRE(io.logits.data != nullptr || io.hidden.data != nullptr || io.next.data != nullptr,
              "neither logits nor hidden nor next is asked for");
  HFF_TRY(check_next(io, call, m));
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

}  // namespace hff

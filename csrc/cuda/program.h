// What the CUDA kernels are told: shapes, matrices, caches and buffers of one call, by value, so
// that a captured graph holds them. A schedule is data: a model is a list of spans, a span the
// pieces that one CTA reads of one matrix, dealt to its warps in turn; plan.cc writes it, tests
// walk it.
#pragma once

#include "cuda/port.h"
#include "include/hf_fusion.h"

namespace hff {
namespace cuda {

constexpr int kMaxBatch = 4;     // rows that share one pass over the weights
constexpr int kMaxLayers = 64;   // 24 KB of the 32,764 bytes that kernel parameters may have
constexpr int kStreamWarps = 8;  // warps that multiply: 8 rings, 8 chains of FMA for 4 schedulers
constexpr int kAttendWarps = 4;  // warps of the token kernel that attend meanwhile
constexpr int kMaxThreads = 32 * (kStreamWarps + kAttendWarps);
constexpr int kMaxSplits = 16;  // parts of the keys of one head

// y = W x + b. A row is read in `pieces` pieces of `piece` elements, the last of them the rest.
struct Rows {
  const void* weight;  // (rows, cols), rows `stride` elements apart; null: no such matrix
  const void* bias;    // (rows) or null
  int64_t stride;
  int32_t rows, cols, pieces, piece;
};

struct Norm {
  const void* weight;  // (hidden); null: none
  const void* bias;    // (hidden) or null
  float eps;
  int32_t rms;
};

struct Shape {
  int32_t hidden, heads, kv_heads, head_dim, rotary_dim, mlp_width;
  int32_t sequential;  // residual: parallel, or attention then MLP
  int32_t per_head;    // rows of qkv: per head q|k|v, or all q, all k, all v
  int32_t activation;  // HFF_ACT_*
  float scale;

  HFF_HOST_DEVICE int context() const { return heads * head_dim; }
  HFF_HOST_DEVICE int qkv() const { return (heads + 2 * kv_heads) * head_dim; }
};

// Keys and values (batch, kv_heads, capacity, head_dim), strides in elements; length on the device.
struct Cache {
  void *keys, *values;
  int64_t* length;
  int64_t batch_stride, head_stride, token_stride, capacity;
};

struct Layer {
  Rows qkv, k, v, up, o, down;  // k and v only where qkv is q alone
  Norm attention_norm, mlp_norm;
  Cache cache;
};

// The matrices of a layer that are multiplied by norms of its input.
HFF_HOST_DEVICE const Rows& in_matrix(const Layer& layer, int index) {
  return index == 0 ? layer.qkv : index == 1 ? layer.k : index == 2 ? layer.v : layer.up;
}

struct Mask {
  const void* data;
  int64_t batch_stride, key_stride, keys;
  int32_t kind;  // HFF_MASK_*
};

// cos and sin (rows, rotary_dim); positions (batch) int64, null: the cache's length
struct Rope {
  const void *cos, *sin;
  const int64_t* positions;
  int64_t stride, rows;
};

// Counters between CTAs, zero between launches: whoever comes last resets what it was last at. Each
// has a line of 128 bytes, so that polling one does not delay another.
struct Counters {
  struct alignas(128) Line {
    uint32_t value;
  };
  Line ready;                        // CTAs whose rows of [qkv | up] are stored
  Line attended;                     // heads whose context is stored
  Line summed;                       // CTAs whose rows of the residual stream are stored
  Line searched;                     // CTAs whose largest logits are stored
  Line finished;                     // CTAs that are through
  Line chunks[8];                    // clusters whose part of O is stored, per rank
  uint32_t splits[kMaxBatch * 256];  // per batch row and head: parts of the keys attended to
};

// Device memory between CTAs. T is the model's dtype.
struct Scratch {
  Counters* counters;
  float* x;       // (batch, hidden): the residual stream
  void* qkv;      // (batch, qkv): T, before RoPE
  void* up;       // (batch, mlp_width): T, after the activation
  void* context;  // (batch, context): T
  float* parts;  // (batch, heads, splits, head_dim + 2): o, m, l; or (kv_heads, batch, hidden) of O
  uint64_t* best;  // (blocks, batch): largest logit and its index
};

// Offsets in bytes into a CTA's shared memory.
struct Layout {
  int32_t slots, slot_bytes;  // of each warp's ring
  int32_t barriers, ring;     // (warps, slots) Barrier; (warps, slots, slot_bytes)
  int32_t inputs;             // (batch, input_stride) T: what the next rows are multiplied by
  int32_t input_stride;
  int32_t x;                // (batch, hidden) float, until the norms are taken; then
  int32_t sums, sum_count;  // float: dots of pieces
  int32_t reduce;           // float (2, warps, batch) of statistics
  int32_t attend;           // float: Attend's scratch
  int32_t total;
};

// Warps of a launch.
struct Team {
  int32_t stream_warps, attend_warps, splits;
};

// Where a layer's input comes from.
struct Source {
  const void* embedding;  // (vocab, hidden) T, with ids; or
  const int64_t* ids;     // (batch), id_stride apart
  int64_t id_stride, vocab;
  const void* x;  // (batch, hidden) T; or, where both are null, Scratch::x
};

// What one CTA reads of one matrix: `count` rows of `pieces` pieces, rows `stride` bytes apart.
struct Span {
  const char* weight;
  int64_t stride;
  int32_t first, count;  // rows
  int32_t pieces;
  int32_t piece, last;  // bytes of a row's pieces but the last, of the last
};

// A warp's unit of a span, `step` units on each time: row and piece move on without a division.
struct Unit {
  int32_t row, piece;
  int32_t rows_on, pieces_on;  // step / pieces, step % pieces

  HFF_HOST_DEVICE void start(int unit, int step, int pieces) {
    row = unit / pieces, piece = unit - row * pieces;
    rows_on = step / pieces, pieces_on = step - rows_on * pieces;
  }
  HFF_HOST_DEVICE void advance(int pieces) {
    row += rows_on, piece += pieces_on;
    if (piece >= pieces) piece -= pieces, ++row;
  }
};

// Whether a kernel with bulk copies, or without, is compiled for the architecture at hand: one of
// the two has a body there.
HFF_HOST_DEVICE constexpr bool compiled_here(bool bulk) {
#if defined(__CUDA_ARCH__)
  return bulk == (__CUDA_ARCH__ >= 900);
#else
  return bulk || true;
#endif
}

HFF_HOST_DEVICE int share(int rows, int part, int parts) {
  return static_cast<int>(static_cast<int64_t>(rows) * part / parts);
}

// Rows first .. first + count - 1 of a matrix of elements of `size` bytes.
HFF_HOST_DEVICE Span span_of(const Rows& m, int first, int count, int size) {
  Span s;
  s.stride = m.stride * size;
  s.weight = static_cast<const char*>(m.weight) + first * s.stride;
  s.first = first;
  s.count = count;
  s.pieces = m.pieces;
  s.piece = m.piece * size;
  s.last = (m.cols - (m.pieces - 1) * m.piece) * size;
  return s;
}

// The part of CTA `block` of `blocks`: rows are dealt in even runs.
HFF_HOST_DEVICE Span part_of(const Rows& m, int block, int blocks, int size) {
  const int first = share(m.rows, block, blocks);
  return span_of(m, first, share(m.rows, block + 1, blocks) - first, size);
}

}  // namespace cuda
}  // namespace hff

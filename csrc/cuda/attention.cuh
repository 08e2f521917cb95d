// One query of one head against a part of its keys: split-KV flash decoding.
//
//   s_j = scale * (RoPE(q) . k_j) + mask_j;  m = max s_j;  l = sum exp(s_j - m)
//   o = sum exp(s_j - m) v_j;  parts merge as M = max m, O = sum exp(m - M) o, L = sum exp(m - M)
//   l; context = T(O / L)
//
// RoPE in fp32 from cos and sin of the model's dtype, q and k rounded to T once; scores, weights
// and sums fp32, exp by exp2 of scores times log2(e). Keys and values (head_dim contiguous) come by
// 16 bytes a lane: a vector of 8 dims is one lane's for the whole call, so its part of q and of o
// stay in registers; 32 / (head_dim / 8) keys a step, up to kSteps a tile, whose loads are all in
// flight at once. A warp takes every n-th tile; warps merge in order in shared memory, splits in
// order by whoever comes last (token kernel) or by every CTA of a cluster. The query's own key and
// value are appended first, by the split that ends with them. A head without a visible key has
// context 0. With more query heads than key heads, each query head reads the keys again, from L2.
#pragma once

#include <type_traits>

#include "cuda/gemv.cuh"

namespace hff {
namespace cuda {

constexpr float kLog2E = 1.44269504088896341f;
constexpr int kSteps =
    6;  // 48 registers of keys and values in flight; 8 steps spill in the token kernel
constexpr int kWarpScratch =
    32 + 32 * 9;  // weights of a tile; partial dots, padded (most: head_dim 64)

// Eight values of T, as they lie in memory.
template <class T>
struct alignas(16) Eight {
  T v[8];

  HFF_DEVICE void floats(float (&out)[8]) const { port::load8(v, out); }
};

// What attention does not get from its operands.
struct Keys {
  int64_t length;  // keys there, the query's own not counted
  bool full;       // the cache has no room for it
  int64_t position;
  bool in_table;  // RoPE has a row for the position
};

HFF_DEVICE Keys keys_of(const Cache& cache, const Rope& rope, int b) {
  Keys k;
  k.length = *cache.length;
  k.full = k.length < 0 || k.length >= cache.capacity;
  k.position = rope.positions != nullptr ? rope.positions[b * rope.stride] : k.length;
  k.in_table = k.position >= 0 && k.position < rope.rows;
  return k;
}

// Splits that have anything to do: one per 64 keys, at most `most`.
HFF_HOST_DEVICE int active_splits(int64_t keys, int most) {
  const int64_t wanted = (keys + 63) / 64;
  return wanted < 1 ? 1 : wanted < most ? static_cast<int>(wanted) : most;
}

// Shared memory of a group that attends: q; o, m, l and a flag; then a scratch per warp.
HFF_HOST_DEVICE int attend_floats(int head_dim, int warps) {
  return 2 * head_dim + 4 + warps * (kWarpScratch + 2);
}

// RoPE of element d of a head x, whose element e is at(e).
template <class T, class At>
HFF_DEVICE float rotated(const At& at, int d, int rotary_dim, const Rope& rope, const Keys& keys) {
  const float x = at(d);
  if (d >= rotary_dim) return x;
  if (!keys.in_table) return NAN;
  const int half = rotary_dim / 2;
  const int64_t row = keys.position * rotary_dim + d;
  const float cos = port::to_float(static_cast<const T*>(rope.cos)[row]);
  const float sin = port::to_float(static_cast<const T*>(rope.sin)[row]);
  const float other = d < half ? -at(d + half) : at(d - half);
  return fmaf(x, cos, other * sin);
}

template <class T>
HFF_DEVICE float rounded(float x) {
  return port::to_float(port::from_float<T>(x));
}

// Where head `head` begins in a row of qkv: q, and k and v of its key head.
struct HeadRows {
  int q, k, v;
};

HFF_HOST_DEVICE HeadRows rows_of_head(const Shape& s, int head) {
  if (s.per_head) {
    const int at = 3 * head * s.head_dim;
    return {at, at + s.head_dim, at + 2 * s.head_dim};
  }
  const int kv_head = head / (s.heads / s.kv_heads);
  return {head * s.head_dim, (s.heads + kv_head) * s.head_dim,
          (s.heads + s.kv_heads + kv_head) * s.head_dim};
}

// q[d] = RoPE of the query; with `append`, RoPE of the key and the value go into the cache behind
// its `length` tokens. q_at, k_at, v_at: float (d), values of T. Several query heads of a group
// append the same bits. Ends with a barrier.
template <class T, class Q, class K, class V>
HFF_DEVICE void rope_append(const Group& group, const Shape& shape, const Rope& rope,
                            const Cache& cache, const Keys& keys, int b, int kv_head, bool append,
                            const Q& q_at, const K& k_at, const V& v_at, float* q) {
  const int64_t at =
      b * cache.batch_stride + kv_head * cache.head_stride + keys.length * cache.token_stride;
  for (int d = group.rank(); d < shape.head_dim; d += group.count) {
    q[d] = rounded<T>(rotated<T>(q_at, d, shape.rotary_dim, rope, keys));
    if (append) {
      static_cast<T*>(cache.keys)[at + d] =
          port::from_float<T>(rotated<T>(k_at, d, shape.rotary_dim, rope, keys));
      static_cast<T*>(cache.values)[at + d] = port::from_float<T>(v_at(d));
    }
  }
  group.sync();
}

// Bounds what hides a key in an additive mask: Hugging Face writes the lowest number of the dtype.
template <class T>
HFF_DEVICE constexpr float lowest() {
  return std::is_same<T, port::half>::value ? -65504.0f : -3.38e38f;
}

// What the mask adds to the score of `key`, in units of log2; -inf hides it.
template <class T>
HFF_DEVICE float masked(const Mask& mask, int b, int64_t key) {
  const int64_t at = b * mask.batch_stride + key * mask.key_stride;
  if (mask.kind == HFF_MASK_NONE) return 0.0f;
  if (key >= mask.keys) return -INFINITY;
  if (mask.kind == HFF_MASK_BOOL)
    return static_cast<const uint8_t*>(mask.data)[at] != 0 ? 0.0f : -INFINITY;
  if (mask.kind == HFF_MASK_INT64)
    return static_cast<const int64_t*>(mask.data)[at] != 0 ? 0.0f : -INFINITY;
  const float add = port::to_float(static_cast<const T*>(mask.data)[at]);
  return add <= lowest<T>() ? -INFINITY : add * kLog2E;
}

// A warp's running softmax: o is this lane's 8 dims of this lane's keys.
struct Running {
  float m, l, o[8];
};

// A lane's place in a tile: its vector of 8 dims, its key of each step.
struct Lane {
  int vectors, per, steps;  // vectors of a key; keys of a step; steps of a tile
  int slot, part;           // lane = slot * vectors + part; idle where slot >= per

  HFF_DEVICE explicit Lane(int head_dim) {
    vectors = head_dim / 8;
    per = 32 / vectors;
    steps = 32 / per < kSteps ? 32 / per : kSteps;
    slot = port::lane() / vectors;
    part = port::lane() - slot * vectors;
  }
  HFF_DEVICE bool works() const { return slot < per; }
};

template <class T>
struct Tile {
  Eight<T> v[kSteps];

  // v[s] = from + s * stride elements for the first `count` steps.
  HFF_DEVICE void load(const T* from, int64_t stride, int count) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (s >= count) break;
      v[s] = port::load_fresh(reinterpret_cast<const Eight<T>*>(from));
      from += stride;
    }
  }
};

// One tile of keys into the warp's running softmax. keys, values: this lane's vector of its first
// key; stride: elements from step to step; left: keys from the tile's first on. q: this lane's 8
// dims, scaled to log2; added: what the mask adds to key number `lane` of the tile. scratch:
// kWarpScratch floats.
template <class T>
HFF_DEVICE void attend_tile(const Lane& lane, const T* keys, const T* values, int64_t stride,
                            int left, float added, const float (&q)[8], float* scratch,
                            Running* run) {
  const int count = !lane.works() || left <= lane.slot ? 0 : (left - lane.slot - 1) / lane.per + 1;
  const int steps = count < lane.steps ? count : lane.steps;
  Tile<T> k, v;
  k.load(keys, stride, steps);
  v.load(values, stride, steps);
  float* weights = scratch;
  float* dots = scratch + 32 + lane.slot * (lane.vectors + 1) + lane.part;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (s >= steps) break;
    float key[8], sum = 0.0f;
    k.v[s].floats(key);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum = fmaf(q[j], key[j], sum);
    dots[s * lane.per * (lane.vectors + 1)] = sum;
  }
  port::sync_warp();
  float score = -INFINITY;
  const bool seen = added != -INFINITY;
  if (seen && port::lane() < lane.steps * lane.per && port::lane() < left) {
    score = added;
    for (int p = 0; p < lane.vectors; ++p)
      score += scratch[32 + port::lane() * (lane.vectors + 1) + p];
  }
  const float top = larger(run->m, warp_max(score));
  const bool hidden = top == -INFINITY;  // nothing visible so far
  const float keep = hidden ? 1.0f : port::exp2(run->m - top);
  const float weight = hidden ? 0.0f : port::exp2(score - top);
  run->m = top;
  run->l = fmaf(run->l, keep, warp_sum(weight));
  weights[port::lane()] = seen ? weight : -1.0f;
  port::sync_warp();
#pragma unroll
  for (int j = 0; j < 8; ++j) run->o[j] *= keep;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (s >= steps) break;
    const float w = weights[s * lane.per + lane.slot];
    if (w < 0.0f) continue;  // a masked key's value may be NaN
    float value[8];
    v.v[s].floats(value);
#pragma unroll
    for (int j = 0; j < 8; ++j) run->o[j] = fmaf(w, value[j], run->o[j]);
  }
  port::sync_warp();  // before the next tile writes weights and dots
}

// Keys begin .. end - 1 of one head by a group. q: (head_dim) in shared memory, rounded to T. On
// return, behind a barrier, o (head_dim), m and l are in `out`, (head_dim + 2) shared floats; m in
// log2. scratch: warps * (kWarpScratch + 2) floats.
template <class T>
HFF_DEVICE void attend(const Group& group, const Shape& shape, const Cache& cache, const Mask& mask,
                       int b, int kv_head, int64_t begin, int64_t end, const float* q,
                       float* scratch, float* out) {
  const int head_dim = shape.head_dim;
  const Lane lane(head_dim);
  const int64_t at = b * cache.batch_stride + kv_head * cache.head_stride + 8 * lane.part;
  const int64_t stride = lane.per * cache.token_stride;
  const T* keys = static_cast<const T*>(cache.keys) + at;
  const T* values = static_cast<const T*>(cache.values) + at;
  float* mine = scratch + group.warp() * (kWarpScratch + 2);
  Running run = {-INFINITY, 0.0f, {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f}};
  float own[8];
#pragma unroll
  for (int j = 0; j < 8; ++j)
    own[j] = lane.works() ? q[lane.part * 8 + j] * (shape.scale * kLog2E) : 0.0f;
  const int tile = lane.steps * lane.per;
  for (int64_t first = begin + group.warp() * tile; first < end; first += group.warps() * tile) {
    const int64_t offset = (first + lane.slot) * cache.token_stride;
    const int left = end - first < tile ? static_cast<int>(end - first) : tile;
    const float added = port::lane() < left ? masked<T>(mask, b, first + port::lane()) : 0.0f;
    attend_tile<T>(lane, keys + offset, values + offset, stride, left, added, own, mine, &run);
  }
  if (lane.works()) {
#pragma unroll
    for (int j = 0; j < 8; ++j) mine[lane.slot * head_dim + lane.part * 8 + j] = run.o[j];
  }
  if (port::lane() == 0) {
    mine[kWarpScratch] = run.m;
    mine[kWarpScratch + 1] = run.l;
  }
  group.sync();
  float top = -INFINITY, total = 0.0f;
  for (int w = 0; w < group.warps(); ++w)
    top = larger(top, scratch[w * (kWarpScratch + 2) + kWarpScratch]);
  for (int d = group.rank(); d < head_dim; d += group.count) out[d] = 0.0f;
  for (int w = 0; w < group.warps() && top != -INFINITY; ++w) {
    const float* warp = scratch + w * (kWarpScratch + 2);
    const float keep = port::exp2(warp[kWarpScratch] - top);
    total = fmaf(keep, warp[kWarpScratch + 1], total);
    for (int d = group.rank(); d < head_dim; d += group.count) {
      float sum = 0.0f;
      for (int s = 0; s < lane.per; ++s) sum += warp[s * head_dim + d];
      out[d] = fmaf(keep, sum, out[d]);
    }
  }
  if (group.rank() == 0) {
    out[head_dim] = top;
    out[head_dim + 1] = total;
  }
  group.sync();
}

// Element d of the context from parts (o, m, l) of (head_dim + 2) floats each, in order. At: float
// (part, index).
template <class At>
HFF_DEVICE float merged(const At& at, int parts, int head_dim, int d) {
  float top = -INFINITY, total = 0.0f, sum = 0.0f;
  for (int p = 0; p < parts; ++p) top = larger(top, at(p, head_dim));
  if (top == -INFINITY) return 0.0f;
  for (int p = 0; p < parts; ++p) {
    const float keep = port::exp2(at(p, head_dim) - top);
    total = fmaf(keep, at(p, head_dim + 1), total);
    sum = fmaf(keep, at(p, d), sum);
  }
  return sum / total;
}

}  // namespace cuda
}  // namespace hff

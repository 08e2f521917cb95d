// A call of the attention kernels by themselves, as the device sees it: operands, and which keys a
// query sees.
//   out = softmax(scale q k^T + mask) v per query head, heads sharing k and v in groups
// These kernels use no more of port.h than every back end has, HIP 5.2 included: block barriers,
// warp_xor within 32 lanes, one arena. Products are fp32 multiply-adds: port.h has no matrix
// instructions, which is what the kernels of GPU libraries gain over the flash kernel here.
// Hidden keys: their score is -inf whatever it was, their weight kHiddenWeight, and their value is
// not read into a sum: nothing behind a mask leaks, NaN included. Nothing visible gives zeros.
#pragma once

#include "attend_table.h"
#include "cuda/warp.cuh"

namespace hff {
namespace cuda {

constexpr int kAttendThreads = 128;
constexpr int kAttendWarps = kAttendThreads / 32;
constexpr float kHiddenWeight = -1.0f;  // no exp() is negative

struct AttendCall {
  const void *q, *k, *v, *mask;
  void* out;
  float* scores;  // naive and tiled: (batch, kv_heads, rows, keys)
  hff_strides q_strides, k_strides, v_strides, out_strides;
  int64_t mask_batch, mask_head, mask_query, mask_key;
  int64_t kv_heads, group, rows;  // rows = queries * group of a k/v head, query by query
  int64_t queries, keys, window, tiles;
  int32_t head_dim, causal, mask_kind;
  float scale;

  HFF_DEVICE int64_t query_of(int64_t row) const { return row / group; }
  HFF_DEVICE int64_t head_of(int64_t g, int64_t row) const { return g * group + row % group; }
  // Causality and window leave query i keys [first, limit).
  HFF_DEVICE int64_t limit(int64_t i) const {
    const int64_t end = causal ? keys - queries + i + 1 : keys;
    return end > 0 ? end : 0;
  }
  HFF_DEVICE int64_t first(int64_t i) const {
    const int64_t end = limit(i);
    return window > 0 && end > window ? end - window : 0;
  }
};

template <class T>
HFF_DEVICE const T* token_at(const void* data, const hff_strides& s, int64_t b, int64_t h,
                             int64_t t) {
  return static_cast<const T*>(data) + b * s.batch + h * s.head + t * s.token;
}

// An additive mask hides a key at or below this, the dtype's lowest value.
template <class T>
struct Lowest {
  static constexpr float kBias = -3.38e38f;
};
template <>
struct Lowest<port::half> {
  static constexpr float kBias = -65504.0f;
};

// scale * score + mask of (b, h, i) and key j, or -inf.
template <class T>
HFF_DEVICE float masked_score(const AttendCall& c, int64_t b, int64_t h, int64_t i, int64_t j,
                              float score) {
  if (j < c.first(i) || j >= c.limit(i)) return -INFINITY;
  score *= c.scale;
  const int64_t at = b * c.mask_batch + h * c.mask_head + i * c.mask_query + j * c.mask_key;
  if (c.mask_kind == HFF_MASK_BOOL)
    return static_cast<const uint8_t*>(c.mask)[at] != 0 ? score : -INFINITY;
  if (c.mask_kind == HFF_MASK_INT64)
    return static_cast<const int64_t*>(c.mask)[at] != 0 ? score : -INFINITY;
  if (c.mask_kind != HFF_MASK_ADDITIVE) return score;
  const float bias = port::to_float(static_cast<const T*>(c.mask)[at]);
  return bias <= Lowest<T>::kBias ? -INFINITY : score + bias;
}

// exp(score - top), or kHiddenWeight for what weighs nothing.
HFF_DEVICE float weight_of(float score, float top) {
  return score == -INFINITY ? kHiddenWeight : port::exp(score - top);
}
HFF_DEVICE float counted(float weight) { return weight < 0.0f ? 0.0f : weight; }

}  // namespace cuda
}  // namespace hff

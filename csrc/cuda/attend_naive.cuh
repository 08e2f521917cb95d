// Naive attention: one block per query of a head, every score in global memory.
//   S = scale q k^T + mask;  P = exp(S - max S);  out = P v / sum P
// Work split: threads take keys in turn for S and P, dims in turn for out; a block barrier between.
// Shared memory: a slot per warp for each reduction.
// Bytes: K and V once per query and head, from L2 or beyond: no reuse but the cache's. Reads of k
//   and q are head_dim apart between the lanes of a warp, reads of v adjacent.
// Order of sums: dots by dim, context by key, the total by lane, warp, and key within a thread.
#pragma once

#include "cuda/attend_call.cuh"

namespace hff {
namespace cuda {

// The largest, or the sum, of one number per thread, to all threads; slots: (kAttendWarps).
template <bool kSum>
HFF_DEVICE float across_block(float x, float* slots) {
  x = kSum ? warp_sum(x) : warp_max(x);
  if (port::lane() == 0) slots[port::warp()] = x;
  port::sync_block();
  float all = slots[0];
  for (int w = 1; w < kAttendWarps; ++w) all = kSum ? all + slots[w] : larger(slots[w], all);
  port::sync_block();
  return all;
}

template <class T>
HFF_KERNEL(kAttendThreads)
void attend_naive(HFF_PARAM(AttendCall) c) {
  float* slots = reinterpret_cast<float*>(port::arena());
  const int64_t unit = port::block(), row = unit % c.rows, pair = unit / c.rows;
  const int64_t b = pair / c.kv_heads, g = pair % c.kv_heads;
  const int64_t i = c.query_of(row), h = c.head_of(g, row);
  const T* q = token_at<T>(c.q, c.q_strides, b, h, i);
  float* scores = c.scores + unit * c.keys;
  float top = -INFINITY;
  for (int64_t j = port::thread(); j < c.keys; j += kAttendThreads) {
    const T* k = token_at<T>(c.k, c.k_strides, b, g, j);
    float dot = 0.0f;
    for (int d = 0; d < c.head_dim; ++d)
      dot = fmaf(port::to_float(q[d]), port::to_float(k[d]), dot);
    scores[j] = masked_score<T>(c, b, h, i, j, dot);
    top = larger(scores[j], top);
  }
  top = across_block<false>(top, slots);
  float total = 0.0f;
  for (int64_t j = port::thread(); j < c.keys; j += kAttendThreads) {
    scores[j] = weight_of(scores[j], top);
    total += counted(scores[j]);
  }
  total = across_block<true>(total, slots);
  const float scale = total == 0.0f ? 0.0f : 1.0f / total;
  T* out = const_cast<T*>(token_at<T>(c.out, c.out_strides, b, h, i));
  for (int d = port::thread(); d < c.head_dim; d += kAttendThreads) {
    float sum = 0.0f;
    for (int64_t j = 0; j < c.keys; ++j) {
      if (scores[j] < 0.0f) continue;
      sum = fmaf(scores[j], port::to_float(token_at<T>(c.v, c.v_strides, b, g, j)[d]), sum);
    }
    out[d] = port::from_float<T>(sum * scale);
  }
}

}  // namespace cuda
}  // namespace hff

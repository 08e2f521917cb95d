// Flash attention: a tile of keys at a time, softmax online, no scores in memory.
//   per tile: S = scale q k^T + mask; m' = max(m, max S); P = exp(S - m')
//             total = exp(m - m') total + sum P; context = exp(m - m') context + P v; m = m'
//   out = context / total
// Work split and shared memory: as in attend_tiled.cuh. Keys and values of a tile take turns in one
//   place, a block barrier between: two would exceed an AMD LDS at head size 256.
// Registers: context, kLaneRows * kDim / 32 fp32 a thread, at most 32, and m and total of kLaneRows
//   rows, alike in all lanes of a warp.
// Bytes: K and V once per kBlockRows rows; nothing grows with the square of anything.
// Order of sums: as in attend_tiled.cuh, rescaled once a tile.
#pragma once

#include "cuda/attend_tiled.cuh"

namespace hff {
namespace cuda {

// The lane's score of one row to its weight; rescales what the row has.
template <int kVectors>
HFF_DEVICE float fold_score(float score, float* top, float* total, float (&context)[kVectors]) {
  const float peak = larger(warp_max(score), *top);
  const float weight = weight_of(score, peak);
  const float added = warp_sum(counted(weight));
  if (added == 0.0f) return weight;  // nothing seen; NaN is something
  const float decay = *top == -INFINITY ? 0.0f : port::exp(*top - peak);
  *top = peak;
  *total = fmaf(*total, decay, added);
  HFF_UNROLL
  for (int e = 0; e < kVectors; ++e) context[e] *= decay;
  return weight;
}

template <class T, int kDim>
HFF_KERNEL(kAttendThreads)
void attend_flash(HFF_PARAM(AttendCall) c) {
  const AttendTile<kDim> t(port::arena());
  const BlockRows rows(c);
  const int64_t end = c.limit(c.query_of(rows.first + rows.count - 1));
  float tops[kLaneRows], totals[kLaneRows], context[kLaneRows][kDim / 32] = {};
  HFF_UNROLL
  for (int r = 0; r < kLaneRows; ++r) tops[r] = -INFINITY, totals[r] = 0.0f;
  load_queries<T, kDim>(c, rows, t.q);
  for (int64_t j = c.first(c.query_of(rows.first)); j < end; j += kBlockKeys) {
    load_tile<T, kDim>(c, c.k, c.k_strides, rows.b, rows.g, j, end - j, t.tile);
    port::sync_block();
    float dots[kLaneRows];
    score_tile(t, dots);
    HFF_UNROLL
    for (int r = 0; r < kLaneRows; ++r) {
      const int64_t key = j + port::lane(), row = rows.first + rows.row(r);
      float score = -INFINITY;
      if (key < end && rows.row(r) < rows.count)
        score = masked_score<T>(c, rows.b, c.head_of(rows.g, row), c.query_of(row), key, dots[r]);
      t.weights[rows.row(r) * AttendTile<kDim>::kWeightStride + port::lane()] =
          fold_score(score, &tops[r], &totals[r], context[r]);
    }
    port::sync_block();
    load_tile<T, kDim>(c, c.v, c.v_strides, rows.b, rows.g, j, end - j, t.tile);
    port::sync_block();
    add_tile(t, context);
    port::sync_block();
  }
  store_rows<T, kDim>(c, rows, context, totals);
}

}  // namespace cuda
}  // namespace hff

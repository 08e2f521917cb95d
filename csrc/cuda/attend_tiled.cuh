// Tiled attention: the three steps of the naive kernel for a block of rows, operands through tiles
// of shared memory; scores still in global memory.
//   S = scale q k^T + mask;  P = exp(S - max S);  out = P v / sum P
// Work split: a block takes kBlockRows rows of a k/v head; in a tile, a lane has one key (scores)
//   or every 32nd dim (context), a warp every kAttendWarps-th row. A block barrier on both sides of
//   a tile's use.
// Shared memory: rows of q, one tile of keys or values, and weights of a tile, fp32, each row one
//   word longer than it is wide: 32 lanes at one column of 32 rows then read 32 banks. 51 KB at
//   head size 256: the 64 KB of an AMD LDS hold it, and cannot be exceeded.
// Bytes: K and V once per kBlockRows rows; S written once, read twice, written again.
// Bound: shared memory reads, one and a quarter per multiply-add at four rows a lane.
#pragma once

#include "cuda/attend_call.cuh"

namespace hff {
namespace cuda {

constexpr AttendBlocks kGpuBlocks = attend_blocks(HFF_ATTEND_FLASH, Hardware::kGpu, 0, 0);
constexpr int kBlockRows = static_cast<int>(kGpuBlocks.queries);
constexpr int kBlockKeys = static_cast<int>(kGpuBlocks.keys);
constexpr int kLaneRows = kBlockRows / kAttendWarps;  // rows of a warp
static_assert(kBlockKeys == 32, "a lane has one key of a tile");
static_assert(kBlockRows % kAttendWarps == 0, "a warp has whole rows");

// What a block keeps in shared memory, head sizes up to kDim.
template <int kDim>
struct AttendTile {
  static constexpr int kStride = kDim + 1, kWeightStride = kBlockKeys + 1;
  static constexpr int kFloats = (kBlockRows + kBlockKeys) * kStride + kBlockRows * kWeightStride;
  float *q, *tile, *weights;  // (kBlockRows, kStride), (kBlockKeys, kStride), (kBlockRows, ..)

  HFF_DEVICE explicit AttendTile(char* arena) {
    q = reinterpret_cast<float*>(arena);
    tile = q + kBlockRows * kStride;
    weights = tile + kBlockKeys * kStride;
  }
};

// Rows of a block: those of a warp are warp, warp + kAttendWarps, ..
struct BlockRows {
  int64_t b, g, first;
  int count;

  HFF_DEVICE explicit BlockRows(const AttendCall& c) {
    const int64_t unit = port::block(), pair = unit / c.tiles;
    b = pair / c.kv_heads, g = pair % c.kv_heads;
    // the rows with most keys first, as long as blocks are taken in order
    first = (c.tiles - 1 - unit % c.tiles) * kBlockRows;
    count = c.rows - first < kBlockRows ? static_cast<int>(c.rows - first) : kBlockRows;
  }
  HFF_DEVICE int row(int r) const { return port::warp() + r * kAttendWarps; }
};

// Tokens [first, first + count) of a head, zeros past them, as rows of kStride floats.
template <class T, int kDim>
HFF_DEVICE void load_tile(const AttendCall& c, const void* data, const hff_strides& s, int64_t b,
                          int64_t g, int64_t first, int64_t count, float* tile) {
  for (int at = port::thread(); at < kBlockKeys * kDim; at += kAttendThreads) {
    const int t = at / kDim, d = at % kDim;
    const bool there = t < count && d < c.head_dim;
    tile[t * AttendTile<kDim>::kStride + d] =
        there ? port::to_float(token_at<T>(data, s, b, g, first + t)[d]) : 0.0f;
  }
}

template <class T, int kDim>
HFF_DEVICE void load_queries(const AttendCall& c, const BlockRows& rows, float* q) {
  for (int at = port::thread(); at < kBlockRows * kDim; at += kAttendThreads) {
    const int r = at / kDim, d = at % kDim;
    const int64_t row = rows.first + r;
    const bool there = r < rows.count && d < c.head_dim;
    q[r * AttendTile<kDim>::kStride + d] =
        there ? port::to_float(token_at<T>(c.q, c.q_strides, rows.b, c.head_of(rows.g, row),
                                           c.query_of(row))[d])
              : 0.0f;
  }
}

// scores[r] = q of the warp's r-th row . the lane's key.
template <int kDim>
HFF_DEVICE void score_tile(const AttendTile<kDim>& t, float (&scores)[kLaneRows]) {
  HFF_UNROLL
  for (int r = 0; r < kLaneRows; ++r) scores[r] = 0.0f;
  const float* key = t.tile + port::lane() * AttendTile<kDim>::kStride;
  const float* q = t.q + port::warp() * AttendTile<kDim>::kStride;
  for (int d = 0; d < kDim; ++d) {
    HFF_UNROLL
    for (int r = 0; r < kLaneRows; ++r)
      scores[r] = fmaf(q[r * kAttendWarps * AttendTile<kDim>::kStride + d], key[d], scores[r]);
  }
}

// context[r][e] += weights of the warp's r-th row times the tile's dim lane + 32 e.
template <int kDim>
HFF_DEVICE void add_tile(const AttendTile<kDim>& t, float (&context)[kLaneRows][kDim / 32]) {
  constexpr int kWeights = AttendTile<kDim>::kWeightStride;
  for (int j = 0; j < kBlockKeys; ++j) {
    const float* value = t.tile + j * AttendTile<kDim>::kStride + port::lane();
    HFF_UNROLL
    for (int r = 0; r < kLaneRows; ++r) {
      const float weight = t.weights[(port::warp() + r * kAttendWarps) * kWeights + j];
      if (weight < 0.0f) continue;
      HFF_UNROLL
      for (int e = 0; e < kDim / 32; ++e)
        context[r][e] = fmaf(weight, value[32 * e], context[r][e]);
    }
  }
}

template <class T, int kDim>
HFF_DEVICE void store_rows(const AttendCall& c, const BlockRows& rows,
                           const float (&context)[kLaneRows][kDim / 32],
                           const float (&totals)[kLaneRows]) {
  HFF_UNROLL
  for (int r = 0; r < kLaneRows; ++r) {
    if (rows.row(r) >= rows.count) continue;
    const int64_t row = rows.first + rows.row(r);
    const float scale = totals[r] == 0.0f ? 0.0f : 1.0f / totals[r];
    T* out = const_cast<T*>(
        token_at<T>(c.out, c.out_strides, rows.b, c.head_of(rows.g, row), c.query_of(row)));
    HFF_UNROLL
    for (int e = 0; e < kDim / 32; ++e) {
      const int d = port::lane() + 32 * e;
      if (d < c.head_dim) out[d] = port::from_float<T>(context[r][e] * scale);
    }
  }
}

// The warp's rows of scores, keys [0, end), to weights; their sums.
template <class T>
HFF_DEVICE void soften_rows(const AttendCall& c, const BlockRows& rows, float* scores, int64_t end,
                            float (&totals)[kLaneRows]) {
  for (int r = 0; r < kLaneRows; ++r) {
    float* row = scores + rows.row(r) * c.keys;
    float top = -INFINITY, total = 0.0f;
    const int64_t keys = rows.row(r) < rows.count ? end : 0;
    for (int64_t j = port::lane(); j < keys; j += 32) top = larger(row[j], top);
    top = warp_max(top);
    for (int64_t j = port::lane(); j < keys; j += 32) {
      row[j] = weight_of(row[j], top);
      total += counted(row[j]);
    }
    totals[r] = warp_sum(total);
  }
}

template <class T, int kDim>
HFF_KERNEL(kAttendThreads)
void attend_tiled(HFF_PARAM(AttendCall) c) {
  const AttendTile<kDim> t(port::arena());
  const BlockRows rows(c);
  const int64_t end = c.limit(c.query_of(rows.first + rows.count - 1));
  float* scores = c.scores + ((rows.b * c.kv_heads + rows.g) * c.rows + rows.first) * c.keys;
  load_queries<T, kDim>(c, rows, t.q);
  for (int64_t j = 0; j < end; j += kBlockKeys) {
    load_tile<T, kDim>(c, c.k, c.k_strides, rows.b, rows.g, j, end - j, t.tile);
    port::sync_block();
    float dots[kLaneRows];
    score_tile(t, dots);
    const int64_t key = j + port::lane();
    for (int r = 0; r < kLaneRows && key < end; ++r) {
      if (rows.row(r) >= rows.count) break;
      const int64_t row = rows.first + rows.row(r);
      scores[rows.row(r) * c.keys + key] =
          masked_score<T>(c, rows.b, c.head_of(rows.g, row), c.query_of(row), key, dots[r]);
    }
    port::sync_block();
  }
  float totals[kLaneRows], context[kLaneRows][kDim / 32] = {};
  soften_rows<T>(c, rows, scores, end, totals);
  for (int64_t j = 0; j < end; j += kBlockKeys) {
    port::sync_block();
    load_tile<T, kDim>(c, c.v, c.v_strides, rows.b, rows.g, j, end - j, t.tile);
    for (int r = 0; r < kLaneRows; ++r) {
      const int64_t key = j + port::lane();
      const bool there = rows.row(r) < rows.count && key < end;
      t.weights[rows.row(r) * AttendTile<kDim>::kWeightStride + port::lane()] =
          there ? scores[rows.row(r) * c.keys + key] : kHiddenWeight;
    }
    port::sync_block();
    add_tile(t, context);
  }
  store_rows<T, kDim>(c, rows, context, totals);
}

}  // namespace cuda
}  // namespace hff

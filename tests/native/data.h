// What a call works on, as test data: cache, mask, and hff_call with its positions, rotary tables
// and ragged sequences.
#ifndef HFF_TESTS_DATA_H
#define HFF_TESTS_DATA_H

#include <limits>
#include <vector>

#include "weights.h"

namespace hff_test {

struct CacheData {
  Array keys, values, length;  // length: one int64
  int64_t batch = 1, heads = 1, head_dim = 8, capacity = 1, past = 0;
  int64_t batch_stride = 0, head_stride = 0, token_stride = 0;

  int64_t at(int64_t b, int64_t head, int64_t token) const {
    return b * batch_stride + head * head_stride + token * token_stride;
  }

  // `past` tokens of random content; everything else, gaps included, is NaN.
  static CacheData random(Random& random, Arena& arena, int32_t dtype, int64_t batch,
                          const HeadsData& h, int64_t past, int64_t queries) {
    CacheData c;
    c.batch = batch;
    c.heads = h.kv_heads;
    c.head_dim = h.head_dim;
    c.past = past;
    c.capacity = past + queries + (random.chance(0.5) ? random.range(0, 9) : 0);
    const int64_t gap = fitting(random.chance(0.3) ? random.range(1, 5) : 0);
    if (random.chance(0.7)) {  // (batch, heads, capacity, head_dim)
      c.token_stride = c.head_dim + gap;
      c.head_stride = c.capacity * c.token_stride + gap;
      c.batch_stride = c.heads * c.head_stride + gap;
    } else {  // (batch, capacity, heads, head_dim)
      c.head_stride = c.head_dim + gap;
      c.token_stride = c.heads * c.head_stride + gap;
      c.batch_stride = c.capacity * c.token_stride + gap;
    }
    const int64_t count = c.at(batch - 1, c.heads - 1, c.capacity - 1) + c.head_dim;
    c.keys = arena.output(dtype, count);
    c.values = arena.output(dtype, count);
    c.length = arena.output(kInt64, 1);
    c.length.set(0, static_cast<double>(past));
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t head = 0; head < c.heads; ++head) {
        for (int64_t t = 0; t < past; ++t) {
          for (int64_t d = 0; d < c.head_dim; ++d) {
            c.keys.set(c.at(b, head, t) + d, random.symmetric() * 1.7);
            c.values.set(c.at(b, head, t) + d, random.symmetric() * 1.7);
          }
        }
      }
    }
    return c;
  }

  // The batch rows from `first` on.
  hff_cache abi(int64_t first = 0) const {
    return {keys.output_from(first * batch_stride),
            values.output_from(first * batch_stride),
            batch_stride,
            head_stride,
            token_stride,
            capacity,
            reinterpret_cast<int64_t*>(length.data)};
  }
};

struct MaskData {
  Array data;
  int32_t kind = HFF_MASK_NONE;
  int64_t batch_stride = 0, query_stride = 0, key_stride = 0, keys = 0;

  int64_t at(int64_t b, int64_t i, int64_t j) const {
    return b * batch_stride + i * query_stride + j * key_stride;
  }
  // Added to the score; minus infinity where the key is not seen.
  double bias(int64_t b, int64_t i, int64_t j) const {
    if (kind == HFF_MASK_NONE) return 0.0;
    const double value = data.get(at(b, i, j));
    const double masked = -std::numeric_limits<double>::infinity();
    if (kind != HFF_MASK_ADDITIVE) return value != 0.0 ? 0.0 : masked;
    return value <= static_cast<double>(lowest(data.dtype)) ? masked : value;
  }

  hff_mask abi(int64_t first) const {
    return {data.input_from(first * batch_stride),
            batch_stride,
            query_stride,
            key_stride,
            keys,
            kind,
            0};
  }
};

// dtype, rows, positions, rotary tables and mask: what hff_call holds.
struct CallData {
  int32_t dtype = HFF_F32, precision = HFF_PRECISION_HIGHEST;
  int64_t batch = 1, queries = 1, past = 0, room = 0;  // room: for as many more steps, at least
  bool causal = true, cached = true;
  Array starts;  // int64 (batch + 1), or none: every sequence has `queries` rows
  Array positions, cos, sin;
  int64_t position_batch_stride = 0, position_query_stride = 0, rope_rows = 0;
  bool counted = false;  // positions are not given: they count on from the cache's length
  MaskData mask;

  int64_t first_row(int64_t b) const {
    return starts ? static_cast<int64_t>(starts.get(b)) : b * queries;
  }
  int64_t queries_of(int64_t b) const { return first_row(b + 1) - first_row(b); }
  int64_t rows() const { return first_row(batch); }
  int64_t keys() const { return past + queries; }  // of the longest sequence
  bool sees(int64_t i, int64_t j) const { return !causal || j <= past + i; }
  int64_t position(int64_t b, int64_t i) const {
    return static_cast<int64_t>(
        positions.get(b * position_batch_stride + i * position_query_stride));
  }
  // Fewest batch rows that go through the matrix kernels if all of them do: a batch row alone has
  // the bits it has among others only within one set of kernels.
  int64_t fewest_alike(bool row_kernels) const {
    return cached && row_kernels && rows() > kFewRows ? kFewRows / queries + 1 : 1;
  }

  // `own_starts`: starts as a vector of this object's, which parts of a batch and fuzzers need.
  hff_call abi(int32_t threads, int64_t first, int64_t count, bool own_starts = false) const {
    hff_call call = {};
    call.struct_size = sizeof(hff_call);
    call.dtype = dtype;
    call.precision = precision;
    call.threads = threads;
    call.batch = count;
    call.queries = queries;
    call.causal = causal ? 1 : 0;
    call.starts = starts_of(first, count, own_starts || count < batch);
    if (!counted || !on_device())
      call.positions = positions.input_from(first * position_batch_stride);
    call.position_batch_stride = position_batch_stride;
    call.position_query_stride = position_query_stride;
    call.cos = cos.input();
    call.sin = sin.input();
    call.rope_rows = rope_rows;
    call.mask = mask.abi(first);
    return call;
  }

  // The library's own bound of what it runs through row kernels.
  static constexpr int64_t kFewRows = 16;

 private:
  hff_input starts_of(int64_t first, int64_t count, bool copied) const {
    if (!starts || !copied) return starts.input();
    moved_.clear();
    for (int64_t b = first; b <= first + count; ++b)
      moved_.push_back(first_row(b) - first_row(first));
    moved_.shrink_to_fit();
    return {moved_.data(), static_cast<int64_t>(8 * moved_.size())};
  }

  mutable std::vector<int64_t> moved_;
};

// Adds ragged sequences to a call without a cache: some empty, none longer than `queries`.
void fill_starts(Random& random, Arena& arena, CallData& call);
void fill_rotary(Random& random, Arena& arena, const HeadsData& heads, CallData& call);
// one_for_all: every query of a batch row has the same key mask, as left padding gives: no query
// sees the key of a query that sees nothing
void fill_mask(Random& random, Arena& arena, CallData& call, int32_t kind, bool one_for_all);

}  // namespace hff_test
#endif

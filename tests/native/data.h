// The parts a case is made of, as test data: each owns its arrays and gives the C struct of the
// ABI. Buffers are as short as their shape and strides allow: the last element lies flush with the
// end.
#ifndef HFF_TESTS_DATA_H
#define HFF_TESTS_DATA_H

#include <algorithm>
#include <vector>

#include "buffers.h"

namespace hff_test {

// A weight of about unit gain over `cols` inputs.
inline void fill_uniform(Random& random, const Array& array, double scale) {
  for (int64_t i = 0; i < array.count; ++i) array.set(i, scale * random.symmetric());
}

inline void fill_normal(Random& random, const Array& array, double mean, double deviation) {
  for (int64_t i = 0; i < array.count; ++i) array.set(i, mean + deviation * random.normal());
}

struct NormData {
  Array weight, bias;
  float eps = 1e-5f;
  int32_t kind = HFF_NORM_LAYER;

  static NormData random(Random& random, Arena& arena, int32_t dtype, int64_t hidden,
                         int32_t kind) {
    NormData norm;
    norm.kind = kind;
    norm.eps = random.pick({1e-5f, 1e-6f, 1e-12f});
    norm.weight = arena.input(dtype, hidden);
    fill_normal(random, norm.weight, 1.0, 0.2);
    if (kind == HFF_NORM_LAYER && random.chance(0.8)) {
      norm.bias = arena.input(dtype, hidden);
      fill_normal(random, norm.bias, 0.0, 0.2);
    }
    return norm;
  }

  hff_norm abi() const { return {weight.input(), bias.input(), eps, kind}; }
};

struct LinearData {
  Array weight, bias;
  int64_t rows = 0, cols = 0, row_stride = 0;

  static LinearData random(Random& random, Arena& arena, int32_t dtype, int64_t rows,
                           int64_t cols) {
    LinearData linear;
    linear.rows = rows;
    linear.cols = cols;
    linear.row_stride = cols + (random.chance(0.3) ? random.range(1, 9) : 0);
    linear.weight = arena.input(dtype, rows > 0 ? (rows - 1) * linear.row_stride + cols : 0);
    fill_uniform(random, linear.weight,
                 std::sqrt(3.0 / static_cast<double>(std::max<int64_t>(cols, 1))));
    if (random.chance(0.8)) {
      linear.bias = arena.input(dtype, rows);
      fill_normal(random, linear.bias, 0.0, 0.3);
    }
    return linear;
  }

  hff_linear abi() const { return {weight.input(), bias.input(), rows, cols, row_stride}; }
};

struct HeadsData {
  int64_t heads = 1, kv_heads = 1, head_dim = 8, rotary_dim = 0;
  float scale = 1.0f;
  int32_t layout = HFF_QKV_PER_HEAD;

  int64_t width() const { return heads * head_dim; }
  int64_t qkv_width() const { return (heads + 2 * kv_heads) * head_dim; }

  static HeadsData random(Random& random, int64_t widest) {
    HeadsData h;
    h.head_dim = random.pick<int64_t>(
        {8, 12, 16, 17, 20, 24, 32, 33, 36, 40, 48, 63, 64, 64, 65, 80, 96, 128, 255, 256});
    while (h.head_dim > widest) h.head_dim = random.pick<int64_t>({8, 9, 12, 16});
    h.heads = random.range(1, std::max<int64_t>(1, std::min<int64_t>(8, widest / h.head_dim)));
    h.kv_heads = h.heads;
    h.layout = random.pick<int32_t>({HFF_QKV_PER_HEAD, HFF_QKV_STACKED});
    if (h.layout == HFF_QKV_STACKED) {
      do h.kv_heads = random.range(1, h.heads);
      while (h.heads % h.kv_heads);
    }
    h.rotary_dim = random.chance(0.25)  ? 0
                   : random.chance(0.3) ? h.head_dim / 2 * 2
                                        : 2 * random.range(1, h.head_dim / 2);
    h.scale = random.chance(0.8)
                  ? static_cast<float>(1.0 / std::sqrt(static_cast<double>(h.head_dim)))
                  : static_cast<float>(0.05 + 0.3 * random.uniform());
    return h;
  }

  hff_heads abi() const { return {heads, kv_heads, head_dim, rotary_dim, scale, layout}; }

  // First column of a head's q, k or v (part 0, 1, 2) in a row of the fused projection.
  int64_t column(int part, int64_t head) const {
    if (layout == HFF_QKV_PER_HEAD) return (3 * head + part) * head_dim;
    const int64_t before = part == 0 ? 0 : part == 1 ? heads : heads + kv_heads;
    return (before + head) * head_dim;
  }
};

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
    const int64_t gap = random.chance(0.3) ? random.range(1, 5) : 0;
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
  int32_t dtype = HFF_F32;
  int64_t batch = 1, queries = 1, past = 0;
  bool causal = true;
  Array positions, cos, sin;
  int64_t position_batch_stride = 0, position_query_stride = 0, rope_rows = 0;
  MaskData mask;

  int64_t rows() const { return batch * queries; }
  int64_t keys() const { return past + queries; }
  bool sees(int64_t i, int64_t j) const { return !causal || j <= past + i; }
  int64_t position(int64_t b, int64_t i) const {
    return static_cast<int64_t>(
        positions.get(b * position_batch_stride + i * position_query_stride));
  }

  hff_call abi(int32_t threads, int64_t first, int64_t count) const {
    hff_call call = {};
    call.struct_size = sizeof(hff_call);
    call.dtype = dtype;
    call.threads = threads;
    call.batch = count;
    call.queries = queries;
    call.causal = causal ? 1 : 0;
    call.positions = positions.input_from(first * position_batch_stride);
    call.position_batch_stride = position_batch_stride;
    call.position_query_stride = position_query_stride;
    call.cos = cos.input();
    call.sin = sin.input();
    call.rope_rows = rope_rows;
    call.mask = mask.abi(first);
    return call;
  }
};

void fill_rotary(Random& random, Arena& arena, const HeadsData& heads, CallData& call);
// one_for_all: every query of a batch row has the same key mask, as left padding gives: no query
// sees the key of a query that sees nothing
void fill_mask(Random& random, Arena& arena, CallData& call, int32_t kind, bool one_for_all);

struct BlockData {
  HeadsData heads;
  int64_t hidden = 0, mlp_width = 0;
  int32_t residual = HFF_RESIDUAL_PARALLEL, activation = HFF_ACT_GELU_ERF;
  NormData attention_norm, mlp_norm;
  LinearData qkv, o, up, down;

  static BlockData random(Random& random, Arena& arena, int32_t dtype, const HeadsData& heads,
                          int64_t hidden, int64_t mlp_width, int32_t residual, int32_t activation,
                          int32_t norm_kind) {
    BlockData b;
    b.heads = heads;
    b.hidden = hidden;
    b.mlp_width = mlp_width;
    b.residual = residual;
    b.activation = activation;
    b.attention_norm = NormData::random(random, arena, dtype, hidden, norm_kind);
    b.mlp_norm = NormData::random(random, arena, dtype, hidden, norm_kind);
    b.qkv = LinearData::random(random, arena, dtype, heads.qkv_width(), hidden);
    b.o = LinearData::random(random, arena, dtype, hidden, heads.width());
    b.up = LinearData::random(random, arena, dtype, mlp_width, hidden);
    b.down = LinearData::random(random, arena, dtype, hidden, mlp_width);
    return b;
  }

  hff_block abi() const {
    hff_block b = {};
    b.heads = heads.abi();
    b.hidden = hidden;
    b.mlp_width = mlp_width;
    b.residual = residual;
    b.activation = activation;
    b.attention_norm = attention_norm.abi();
    b.mlp_norm = mlp_norm.abi();
    b.qkv = qkv.abi();
    b.o = o.abi();
    b.up = up.abi();
    b.down = down.abi();
    return b;
  }
};

}  // namespace hff_test
#endif

// The parts of a layer as test data: each owns its arrays and gives the C struct of the ABI.
// Buffers are as short as their shape and strides allow: the last element lies flush with the end.
#ifndef HFF_TESTS_WEIGHTS_H
#define HFF_TESTS_WEIGHTS_H

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "buffers.h"
#include "device.h"

namespace hff_test {

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
  bool wants_panels = false;
  Array packed;     // bytes, once pack() was called
  std::string isa;  // that packed them, and alone takes them

  static LinearData random(Random& random, Arena& arena, int32_t dtype, int64_t rows,
                           int64_t cols) {
    LinearData linear;
    linear.rows = rows;
    linear.cols = cols;
    linear.row_stride = fitting(cols + (random.chance(0.3) ? random.range(1, 9) : 0));
    linear.weight = arena.input(dtype, rows > 0 ? (rows - 1) * linear.row_stride + cols : 0);
    fill_uniform(random, linear.weight,
                 std::sqrt(3.0 / static_cast<double>(std::max<int64_t>(cols, 1))));
    if (random.chance(0.8)) {
      linear.bias = arena.input(dtype, rows);
      fill_normal(random, linear.bias, 0.0, 0.3);
    }
    linear.wants_panels = random.chance(0.5) && !on_device();
    return linear;
  }

  // Over NaN, so that a byte left unwritten shows.
  void pack(Arena& arena, int32_t precision) {
    hff_linear bare = abi();
    bare.packed = {};
    packed = arena.panels(hff_packed_bytes(weight.dtype, precision, rows, cols));
    std::memset(packed.data, 0xFF, static_cast<size_t>(packed.bytes()));
    const hff_output out = packed.output();
    isa = hff_isa();
    if (hff_pack(&bare, weight.dtype, precision, 2, &out) == HFF_OK) return;
    std::printf("hff_pack: %s\n", hff_last_error());
    std::abort();
  }

  hff_linear abi() const {
    const bool taken = packed && isa == hff_isa();
    return {weight.input(), bias.input(), taken ? packed.input() : hff_input{},
            rows,           cols,         row_stride};
  }
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
    if (on_device()) h.head_dim = std::min<int64_t>(fitting(h.head_dim), HFF_MAX_HEAD_DIM);
    while (h.head_dim > widest) h.head_dim = fitting(random.pick<int64_t>({8, 9, 12, 16}));
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

struct BlockData {
  HeadsData heads;
  int64_t hidden = 0, mlp_width = 0;
  int32_t residual = HFF_RESIDUAL_PARALLEL, activation = HFF_ACT_GELU_ERF;
  NormData attention_norm, mlp_norm;
  LinearData qkv, k, v, o, up, down;  // k and v without rows: qkv is fused

  bool separate() const { return k.rows > 0; }
  bool row_kernels() const { return residual != HFF_RESIDUAL_POST_NORM && !separate(); }
  std::vector<LinearData*> linears() {
    if (separate()) return {&qkv, &k, &v, &o, &up, &down};
    return {&qkv, &o, &up, &down};
  }
  int64_t weight_bytes() const {
    int64_t bytes = 0;
    for (const LinearData* l : {&qkv, &k, &v, &o, &up, &down}) bytes += l->weight.bytes();
    return bytes;
  }

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
    const int32_t other = norm_kind == HFF_NORM_RMS ? HFF_NORM_LAYER : HFF_NORM_RMS;
    b.mlp_norm =
        NormData::random(random, arena, dtype, hidden, random.chance(0.2) ? other : norm_kind);
    const bool separate = heads.layout == HFF_QKV_STACKED && random.chance(0.5);
    const int64_t kv_rows = heads.kv_heads * heads.head_dim;
    b.qkv = LinearData::random(random, arena, dtype, separate ? heads.width() : heads.qkv_width(),
                               hidden);
    if (separate) {
      b.k = LinearData::random(random, arena, dtype, kv_rows, hidden);
      b.v = LinearData::random(random, arena, dtype, kv_rows, hidden);
    }
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
    if (separate()) b.k = k.abi(), b.v = v.abi();
    b.o = o.abi();
    b.up = up.abi();
    b.down = down.abi();
    return b;
  }
};

}  // namespace hff_test
#endif

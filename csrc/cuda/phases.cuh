// The phases of a layer as one CTA of many does its share of them; the token kernel and the chain
// are made of these.
//
//   enter             qkv = T(W_qkv norm1(x) + b), up = T(act(W_up norm2(x) + b))
//   attend_split      context of a head, from its part of the keys; the last part merges
//   leave             x += W_down up + b + W_o context + b     (sequential: one of the two)
//   norm_head         logits = T(W_head norm(x) + b), and the index of the largest
//
// Rows of matrices are dealt to CTAs in even runs. Between phases values go through global memory:
// [qkv | up] and context in T, the residual stream in fp32, so a whole model rounds it nowhere.
#pragma once

#include "cuda/attention.cuh"

namespace hff {
namespace cuda {

// The part of a layer between two sums into the residual stream: all of a parallel layer;
// attention, then MLP, of a sequential one.
struct Half {
  bool attention, mlp;
};

HFF_HOST_DEVICE int halves(const Shape& shape) { return shape.sequential != 0 ? 2 : 1; }
HFF_HOST_DEVICE Half half_of(const Shape& shape, int index) {
  return {index == 0, shape.sequential == 0 || index == 1};
}

// Where rows of a product go: T(act(value)) to out[b * width + offset + row].
struct Sink {
  void* out;
  int64_t width;
  int32_t offset, activation;
};

// A CTA's share of the work, for the warps that multiply.
template <class T, int kBatch, class Stream>
struct Worker {
  // Loads of a thread at once, of elements and of 16 bytes: of 2,560 and of 10,240 elements 256
  // threads wait for two. More, and two CTAs of a phase have no registers on a multiprocessor.
  static constexpr int kLoads = kBatch == 1 ? 5 : 3, kVectors = kBatch == 1 ? 6 : 3;
  const Shape& shape;
  const Scratch& scratch;
  Group group;
  Stream& stream;
  int batch, block, blocks;
  float* x;
  T* inputs;
  int input_stride;
  float* sums;
  int sum_count;
  float* reduce;

  HFF_DEVICE Worker(const Shape& shape_, const Scratch& scratch_, const Layout& layout,
                    const Group& group_, Stream& stream_, int batch_)
      : shape(shape_), scratch(scratch_), group(group_), stream(stream_), batch(batch_) {
    block = port::block();
    blocks = port::blocks();
    char* arena = port::arena();
    x = reinterpret_cast<float*>(arena + layout.x);
    inputs = reinterpret_cast<T*>(arena + layout.inputs);
    input_stride = layout.input_stride;
    sums = reinterpret_cast<float*>(arena + layout.sums);
    sum_count = layout.sum_count;
    reduce = reinterpret_cast<float*>(arena + layout.reduce);
  }

  HFF_DEVICE Span part(const Rows& rows) const {
    return part_of(rows, block, blocks, static_cast<int>(sizeof(T)));
  }

  // The CTA's rows of `matrix` times inputs from `column` on, to store(row, b, value).
  template <class Store>
  HFF_DEVICE void rows(const Rows& matrix, int column, const Store& store) {
    project<T, kBatch>(stream, group, part(matrix), static_cast<const T*>(matrix.bias), batch,
                       inputs + column, input_stride, sums, sum_count, store);
  }

  // inputs[b] = from (batch, width), which other CTAs wrote. Ends with a barrier.
  HFF_DEVICE void load_rows(const void* from, int width) {
    const Eight<T>* source = static_cast<const Eight<T>*>(from);
    const int vectors = width / 8;
    for (int b = 0; b < batch; ++b) {
      T* to = inputs + b * input_stride;
      copy<kVectors>(
          group, vectors, [&](int v) { return port::load_fresh(source + b * vectors + v); },
          [to](int v, const Eight<T>& value) { *reinterpret_cast<Eight<T>*>(to + 8 * v) = value; });
    }
    group.sync();
  }

  // x and norm1(x), and with `both` norm2(x) behind it. Ends with a barrier.
  HFF_DEVICE void load_norm(const Source& source, const Norm& first, const Norm& second,
                            bool both) {
    load_input<T, kLoads>(group, source, scratch.x, batch, shape.hidden, x);
    Statistics s;
    statistics(group, x, batch, shape.hidden, first.rms != 0, reduce, &s);
    normalise<T, kLoads>(group, first, s, x, batch, shape.hidden, inputs, input_stride);
    if (both) {
      if (second.rms != first.rms)
        statistics(group, x, batch, shape.hidden, second.rms != 0, reduce, &s);
      normalise<T, kLoads>(group, second, s, x, batch, shape.hidden, inputs + shape.hidden,
                           input_stride);
    }
    group.sync();
  }

  // qkv and up of one half, from `source`; up to `up_out` (batch, mlp_width).
  HFF_DEVICE void enter(const Layer& layer, const Half& half, const Source& source, void* up_out) {
    load_norm(source, half.attention ? layer.attention_norm : layer.mlp_norm, layer.mlp_norm,
              half.attention && half.mlp);
#pragma unroll 1
    for (int i = half.attention ? 0 : 3; i < (half.mlp ? 4 : 3); ++i) {
      const Rows& matrix = in_matrix(layer, i);
      if (matrix.weight == nullptr) continue;
      const int offset = i == 1 ? layer.qkv.rows : i == 2 ? layer.qkv.rows + layer.k.rows : 0;
      const Sink sink = i == 3 ? Sink{up_out, shape.mlp_width, 0, shape.activation}
                               : Sink{scratch.qkv, shape.qkv(), offset, HFF_ACT_NONE};
      rows(matrix, i == 3 && half.attention ? shape.hidden : 0,
           [sink](int row, int b, float value) {
             static_cast<T*>(sink.out)[b * sink.width + sink.offset + row] =
                 port::from_float<T>(activate(value, sink.activation));
           });
    }
  }

  // x = source + W_down up + b + W_o context + b, of one half: to `out` (batch, hidden) in T, or to
  // the residual stream. operand(mlp) waits for up or context and ends with a barrier, as this
  // does.
  template <class Operand>
  HFF_DEVICE void leave(const Layer& layer, const Half& half, const Source& source,
                        const void* up_in, void* out, const Operand& operand) {
    const int row_sums = (half.mlp ? layer.down.pieces : 0) + (half.attention ? layer.o.pieces : 0);
    int offset = 0;
#pragma unroll 1
    for (int i = half.mlp ? 0 : 1; i < (half.attention ? 2 : 1); ++i) {
      const Rows& matrix = i == 0 ? layer.down : layer.o;
      operand(i == 0);
      load_rows(i == 0 ? up_in : scratch.context, matrix.cols);
      Cursor at(part(matrix), group);
      multiply<T, kBatch>(stream, &at, 0, at.span.count, inputs, input_stride, sums, row_sums,
                          offset);
      offset += matrix.pieces;
    }
    group.sync();
    residual(half.mlp ? layer.down.bias : nullptr, half.attention ? layer.o.bias : nullptr,
             row_sums, source, out);
    group.sync();
  }

  HFF_DEVICE void residual(const void* down_bias, const void* o_bias, int row_sums,
                           const Source& source, void* out) {
    const int begin = share(shape.hidden, block, blocks);
    const int count = share(shape.hidden, block + 1, blocks) - begin;
    for (int i = group.rank(); i < count * batch; i += group.count) {
      const int r = i / batch, b = i - r * batch, row = begin + r;
      const float before = InputRow<T>(source, scratch.x, b, shape.hidden).at(row);
      const float biases = bias_at(down_bias, row) + bias_at(o_bias, row);
      float value = 0.0f;
      for (int p = 0; p < row_sums; ++p) value += sums[(r * row_sums + p) * kBatch + b];
      value += biases;
      value += before;
      if (out != nullptr)
        static_cast<T*>(out)[b * shape.hidden + row] = port::from_float<T>(value);
      else
        scratch.x[b * shape.hidden + row] = value;
    }
  }

  HFF_DEVICE static float bias_at(const void* bias, int row) {
    return bias != nullptr ? port::to_float(static_cast<const T*>(bias)[row]) : 0.0f;
  }
};

HFF_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Orders floats as torch.argmax does: NaN first, then by size, of equals the lower index.
HFF_DEVICE uint64_t search_key(float value, int index) {
  const uint32_t bits = bits_of(value);
  const uint32_t ordered = value != value              ? ~0u
                           : (bits & 0x80000000u) != 0 ? ~bits
                                                       : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}

struct HeadOut {
  void *logits, *hidden;  // (batch, vocab) and (batch, hidden) T, or null
  int64_t* next;          // (batch) or null
};

// next[b] = the index of the largest key of all CTAs.
template <class T, int kBatch, class Stream>
HFF_DEVICE void store_next(Worker<T, kBatch, Stream>& w, const uint64_t (&best)[kBatch],
                           int64_t* next) {
  uint64_t* keys = reinterpret_cast<uint64_t*>(w.sums);  // (warps, kBatch); free behind the barrier
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
    const uint64_t key = warp_largest(best[b]);
    if (port::lane() == 0) keys[w.group.warp() * kBatch + b] = key;
  }
  w.group.sync();
  if (w.group.rank() < w.batch) {
    uint64_t key = 0;
    for (int i = 0; i < w.group.warps(); ++i) {
      const uint64_t other = keys[i * kBatch + w.group.rank()];
      key = other > key ? other : key;
    }
    w.scratch.best[w.block * w.batch + w.group.rank()] = key;
  }
  w.group.sync();
  int* last = reinterpret_cast<int*>(w.reduce);
  if (w.group.rank() == 0) {
    const uint32_t before = port::add_acq_rel(&w.scratch.counters->searched.value, 1);
    *last = before + 1 == static_cast<uint32_t>(w.blocks);
  }
  w.group.sync();
  if (*last == 0) return;
  for (int b = w.group.warp(); b < w.batch; b += w.group.warps()) {
    uint64_t key = 0;
    for (int i = port::lane(); i < w.blocks; i += 32) {
      const uint64_t other = port::load_fresh(w.scratch.best + i * w.batch + b);
      key = other > key ? other : key;
    }
    key = warp_largest(key);
    if (port::lane() == 0)
      next[b] = static_cast<int64_t>(0xffffffffu - static_cast<uint32_t>(key & 0xffffffffu));
  }
}

// The last norm and the head. Ends with a barrier.
template <class T, int kBatch, class Stream>
HFF_DEVICE void norm_head(Worker<T, kBatch, Stream>& w, const Norm& norm, const Rows& head,
                          const HeadOut& out) {
  w.load_norm(Source{}, norm, norm, false);
  if (out.hidden != nullptr) {
    const int begin = share(w.shape.hidden, w.block, w.blocks);
    const int count = share(w.shape.hidden, w.block + 1, w.blocks) - begin;
    for (int i = w.group.rank(); i < count * w.batch; i += w.group.count) {
      const int b = i / count, at = begin + i - b * count;
      static_cast<T*>(out.hidden)[b * w.shape.hidden + at] = w.inputs[b * w.input_stride + at];
    }
  }
  if (head.weight == nullptr) return;
  uint64_t best[kBatch];
#pragma unroll
  for (int b = 0; b < kBatch; ++b) best[b] = 0;
  w.rows(head, 0, [&](int row, int b, float value) {
    const T rounded_value = port::from_float<T>(value);
    if (out.logits != nullptr)
      static_cast<T*>(out.logits)[static_cast<int64_t>(b) * head.rows + row] = rounded_value;
    const uint64_t key = search_key(port::to_float(rounded_value), row);
#pragma unroll
    for (int c = 0; c < kBatch; ++c) {
      if (c == b && key > best[c]) best[c] = key;
    }
  });
  if (out.next != nullptr) store_next<T, kBatch>(w, best, out.next);
}

// Split `split` of `splits` of one head's keys: context where it is the only or the last one, else
// its part. Returns whether the context is stored. Ends with a barrier. shared: attend_floats.
template <class T>
HFF_DEVICE bool attend_split(const Group& group, const Shape& shape, const Scratch& scratch,
                             const Cache& cache, const Rope& rope, const Mask& mask, int b,
                             int head, int split, int splits, float* shared) {
  const int head_dim = shape.head_dim, kv_head = head / (shape.heads / shape.kv_heads);
  const Keys keys = keys_of(cache, rope, b);
  const int active = keys.full ? 1 : active_splits(keys.length + 1, splits);
  if (split >= active) return false;
  T* context = static_cast<T*>(scratch.context) + (b * shape.heads + head) * head_dim;
  if (keys.full) {
    for (int d = group.rank(); d < head_dim; d += group.count)
      context[d] = port::from_float<T>(NAN);
    group.sync();
    return true;
  }
  float *q = shared, *out = shared + head_dim;
  float* rest = out + head_dim + 4;
  const T* row = static_cast<const T*>(scratch.qkv) + static_cast<int64_t>(b) * shape.qkv();
  const HeadRows at = rows_of_head(shape, head);
  const auto element = [row](int begin) {
    return [row, begin](int d) { return port::to_float(port::load_fresh(row + begin + d)); };
  };
  rope_append<T>(group, shape, rope, cache, keys, b, kv_head, split == active - 1, element(at.q),
                 element(at.k), element(at.v), q);
  const int64_t total = keys.length + 1;
  attend<T>(group, shape, cache, mask, b, kv_head, total * split / active,
            total * (split + 1) / active, q, rest, out);
  if (active == 1) {
    const auto own = [out](int, int i) { return out[i]; };
    for (int d = group.rank(); d < head_dim; d += group.count)
      context[d] = port::from_float<T>(merged(own, 1, head_dim, d));
    group.sync();
    return true;
  }
  const int index = b * shape.heads + head, width = head_dim + 2;
  float* parts = scratch.parts + static_cast<int64_t>(index) * splits * width;
  for (int i = group.rank(); i < width; i += group.count) parts[split * width + i] = out[i];
  group.sync();
  int* last = reinterpret_cast<int*>(out + head_dim + 2);
  if (group.rank() == 0) {
    const uint32_t before = port::add_acq_rel(scratch.counters->splits + index, 1);
    *last = before + 1 == static_cast<uint32_t>(active);
  }
  group.sync();
  const bool merges = *last != 0;
  if (merges) {
    if (group.rank() == 0) port::store_relaxed(scratch.counters->splits + index, 0);
    const auto stored = [parts, width](int p, int i) {
      return port::load_fresh(parts + p * width + i);
    };
    for (int d = group.rank(); d < head_dim; d += group.count)
      context[d] = port::from_float<T>(merged(stored, active, head_dim, d));
  }
  group.sync();
  return merges;
}

// The last CTA to come zeroes the counters and counts the token in the caches. Every thread calls.
template <class Caches>
HFF_DEVICE void finish(Counters* counters, const Layout& layout, const Caches& caches,
                       int cache_count) {
  port::sync_block();
  int* last = reinterpret_cast<int*>(port::arena() + layout.reduce);
  if (port::thread() == 0) {
    const uint32_t before = port::add_acq_rel(&counters->finished.value, 1);
    *last = before + 1 == static_cast<uint32_t>(port::blocks());
  }
  port::sync_block();
  if (*last == 0) return;
  for (int l = port::thread(); l < cache_count; l += port::threads()) {
    const Cache& cache = caches(l);
    if (*cache.length >= 0 && *cache.length < cache.capacity) *cache.length += 1;
  }
  if (port::thread() == 0) {
    counters->ready.value = counters->attended.value = counters->summed.value = 0;
    counters->searched.value = counters->finished.value = 0;
  }
}

}  // namespace cuda
}  // namespace hff

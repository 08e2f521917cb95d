// The attention rungs: a layer's attention, and with it the MLP's up projection, in one launch.
//
//   attention_out = T(W_o attend(RoPE(W_qkv norm1(x) + b)) + b [+ x]);  up_out = T(act(W_up
//   norm2(x) + b))
//
// A thread-block cluster per key head; its CTAs, C of them, share by rank
//   qkv       the rows of the head, and then each other's through distributed shared memory
//   attend    the keys, C parts; o, m and l of all ranks are merged by every rank, in rank order
//   o         the rows of W_o, in the head's columns only: partial sums over heads in fp32 slots,
//             added in order of heads by the last cluster that comes to a rank's rows
// and all CTAs of the grid share the rows of up, which wait for nobody.
// Exchange within a cluster: each CTA publishes in shared memory of its own, a cluster barrier, all
// read all in rank order, a cluster barrier before anything is overwritten or a CTA ends. There is
// no ring of partners and no addition in place, so any C is right and no order depends on timing.
// Bytes: the layer's weights once; 32 heads x 2560 slots x 4 B of partial sums stay in L2.
#pragma once

#include "cuda/phases.cuh"

namespace hff {
namespace cuda {

struct ClusterParams {
  Shape shape;
  Layout layout;
  Scratch scratch;
  Source source;  // x
  Layer layer;    // up null: attention alone
  Rope rope;
  Mask mask;
  void *attention_out, *up_out;  // T
  int32_t batch;
  int32_t adds_x;  // attention_out is attention + x
  int32_t counts;  // 1: the cache has one token more after this
};

// The sections q, k, v of one key head: rows in the projection and columns in shared memory.
struct Section {
  const Rows* rows;
  int first, count, column;
};

HFF_HOST_DEVICE Section section_of(const Layer& layer, const Shape& s, int kv_head, int index) {
  const int group = s.heads / s.kv_heads * s.head_dim, d = s.head_dim;
  const int column = index == 0 ? 0 : group + (index - 1) * d, count = index == 0 ? group : d;
  if (s.per_head) return {&layer.qkv, (3 * kv_head + index) * d, count, column};
  if (index == 0) return {&layer.qkv, kv_head * group, count, column};
  if (layer.k.weight != nullptr)
    return {index == 1 ? &layer.k : &layer.v, kv_head * d, count, column};
  return {&layer.qkv, s.heads * d + ((index - 1) * s.kv_heads + kv_head) * d, count, column};
}

struct ClusterProgram {
  const ClusterParams* p;
  int kv_head, rank, ranks, block, blocks, size;

  HFF_HOST_DEVICE bool span(int index, Span& s) const {
    if (index > 3) return false;
    s.count = 0;
    if (index < 3) {
      const Section q = section_of(p->layer, p->shape, kv_head, index);
      const int begin = share(q.count, rank, ranks), end = share(q.count, rank + 1, ranks);
      s = span_of(*q.rows, q.first + begin, end - begin, size);
    } else if (p->layer.up.weight != nullptr) {
      s = part_of(p->layer.up, block, blocks, size);
    }
    return true;
  }
};

// Floats of shared memory behind Attend's own: see Exchange.
HFF_HOST_DEVICE int exchange_floats(const Shape& s, int batch) {
  const int group = s.heads / s.kv_heads;
  return batch * (2 * (group + 2) * s.head_dim + group * (s.head_dim + 2) + group * s.head_dim);
}

constexpr int kRowsInFlight = 8;  // of W_o, by a warp

template <class T, int kBatch, class Ring>
struct Exchange {
  using Pieces = Stream<Ring, ClusterProgram>;
  const ClusterParams& p;
  Worker<T, kBatch, Pieces>& w;
  ClusterProgram program;
  int group, width;  // query heads of the key head; columns of q, k and v
  float *attend_shared, *own, *all, *slots, *context;

  HFF_DEVICE Exchange(const ClusterParams& params, Worker<T, kBatch, Pieces>& worker,
                      const ClusterProgram& program_)
      : p(params), w(worker), program(program_) {
    const int head_dim = p.shape.head_dim;
    group = p.shape.heads / p.shape.kv_heads;
    width = (group + 2) * head_dim;
    attend_shared = reinterpret_cast<float*>(port::arena() + p.layout.attend);
    own = attend_shared + attend_floats(head_dim, w.group.warps());  // (batch, width), own rows set
    all = own + p.batch * width;                                     // (batch, width)
    context = all + p.batch * width;  // (batch, group * head_dim), rounded to T; 16-byte aligned
    slots = context + p.batch * group * head_dim;  // (batch, group, head_dim + 2)
  }

  // q, k and v of the head in `all` of every CTA.
  HFF_DEVICE void project_gather() {
    for (int i = 0; i < 3; ++i) {
      const Section section = section_of(p.layer, p.shape, program.kv_head, i);
      Span span;
      program.span(i, span);
      project<T, kBatch>(
          w.stream, w.group, span, static_cast<const T*>(section.rows->bias), p.batch, w.inputs,
          w.input_stride, w.sums, w.sum_count, [&](int row, int b, float value) {
            own[b * width + section.column + row - section.first] = rounded<T>(value);
          });
    }
    port::cluster_arrive();
    port::cluster_wait();
    for (int i = 0; i < 3; ++i) {
      const Section section = section_of(p.layer, p.shape, program.kv_head, i);
      for (int r = 0; r < program.ranks; ++r) {
        const float* from = port::peer(own, r);
        const int begin = share(section.count, r, program.ranks);
        const int count = share(section.count, r + 1, program.ranks) - begin;
        for (int at = w.group.rank(); at < count * p.batch; at += w.group.count) {
          const int b = at / count;
          const int column = b * width + section.column + begin + at - b * count;
          all[column] = from[column];
        }
      }
    }
    w.group.sync();
  }

  // This rank's part of the keys, for every query head of the group.
  HFF_DEVICE void attend_slots() {
    const int head_dim = p.shape.head_dim;
    float *q = attend_shared, *out = q + head_dim, *rest = out + head_dim + 4;
    for (int i = 0; i < p.batch * group; ++i) {
      const int b = i / group, g = i - b * group;
      const Keys keys = keys_of(p.layer.cache, p.rope, b);
      float* slot = slots + i * (head_dim + 2);
      if (keys.full) {
        for (int d = w.group.rank(); d < head_dim + 2; d += w.group.count) slot[d] = NAN;
        continue;
      }
      const float* row = all + b * width;
      const auto element = [row](int begin) {
        return [row, begin](int d) { return row[begin + d]; };
      };
      const bool appends = g == 0 && program.rank == program.ranks - 1;
      rope_append<T>(w.group, p.shape, p.rope, p.layer.cache, keys, b, program.kv_head, appends,
                     element(g * head_dim), element(group * head_dim),
                     element((group + 1) * head_dim), q);
      const int64_t total = keys.length + 1;
      attend<T>(w.group, p.shape, p.layer.cache, p.mask, b, program.kv_head,
                total * program.rank / program.ranks, total * (program.rank + 1) / program.ranks, q,
                rest, out);
      for (int d = w.group.rank(); d < head_dim + 2; d += w.group.count) slot[d] = out[d];
      w.group.sync();
    }
  }

  HFF_DEVICE void merge() {
    const int head_dim = p.shape.head_dim;
    port::cluster_arrive();
    port::cluster_wait();
    for (int i = w.group.rank(); i < p.batch * group * head_dim; i += w.group.count) {
      const int head = i / head_dim, d = i - head * head_dim;
      const auto at = [&](int rank, int index) {
        return port::peer(slots, rank)[head * (head_dim + 2) + index];
      };
      context[i] = rounded<T>(merged(at, program.ranks, head_dim, d));
    }
    port::cluster_arrive();  // waited for at the end: nobody leaves while its slots are read
    w.group.sync();
  }

  // The head's part of this rank's rows of o, then the sum over heads by whoever comes last.
  HFF_DEVICE void o_rows() {
    const int hidden = p.shape.hidden, begin = share(hidden, program.rank, program.ranks);
    const int end = share(hidden, program.rank + 1, program.ranks);
    float* parts = p.scratch.parts + static_cast<int64_t>(program.kv_head) * p.batch * hidden;
    const int step = kRowsInFlight * w.group.warps();
    for (int row = begin + w.group.warp(); row < end; row += step) o_rows_from(row, end, parts);
    w.group.sync();
    int* last = reinterpret_cast<int*>(w.reduce);
    uint32_t* counter = &p.scratch.counters->chunks[program.rank].value;
    if (w.group.rank() == 0)
      *last = port::add_acq_rel(counter, 1) + 1 == static_cast<uint32_t>(p.shape.kv_heads);
    w.group.sync();
    if (*last == 0) return;
    if (w.group.rank() == 0) port::store_relaxed(counter, 0);
    for (int i = w.group.rank(); i < (end - begin) * p.batch; i += w.group.count) {
      const int b = i / (end - begin), row = begin + i - b * (end - begin);
      const float bias = w.bias_at(p.layer.o.bias, row);
      const float before = p.adds_x != 0 ? InputRow<T>(p.source, nullptr, b, hidden).at(row) : 0.0f;
      float value = sum_of_heads(p.scratch.parts + static_cast<int64_t>(b) * hidden + row);
      value += bias;
      value += before;
      static_cast<T*>(p.attention_out)[b * hidden + row] = port::from_float<T>(value);
    }
  }

  // parts[0] + parts[stride] + ..., a part of each head, in order; eight loads at once.
  HFF_DEVICE float sum_of_heads(const float* parts) {
    constexpr int kLoads = 8;
    const int heads = p.shape.kv_heads;
    const int64_t stride = static_cast<int64_t>(p.batch) * p.shape.hidden;
    float sum = 0.0f;
    for (int first = 0; first < heads; first += kLoads) {
      float part[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j)
        part[j] = first + j < heads ? port::load_fresh(parts + (first + j) * stride) : 0.0f;
#pragma unroll
      for (int j = 0; j < kLoads; ++j) sum += part[j];
    }
    return sum;
  }

  // Rows `first`, first + warps, ..., kRowsInFlight of them where they are below `end`, in the
  // head's columns: lanes along the columns, and the loads of all rows at once.
  HFF_DEVICE void o_rows_from(int first, int end, float* parts) {
    const int columns = group * p.shape.head_dim, warps = w.group.warps();
    const T* weight = static_cast<const T*>(p.layer.o.weight) + program.kv_head * columns;
    float sum[kRowsInFlight][kBatch];
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) sum[r][b] = 0.0f;
    }
    for (int c = 8 * port::lane(); c < columns; c += 8 * 32) {
      float wf[kRowsInFlight][8];
#pragma unroll
      for (int r = 0; r < kRowsInFlight; ++r) {
        const int row = first + r * warps < end ? first + r * warps : first;
        port::load8_once(weight + row * p.layer.o.stride + c, wf[r]);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (b >= p.batch) break;
        float cf[8];
        port::load8(context + b * columns + c, cf);
#pragma unroll
        for (int r = 0; r < kRowsInFlight; ++r) {
#pragma unroll
          for (int j = 0; j < 8; ++j) sum[r][b] = fmaf(wf[r][j], cf[j], sum[r][b]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      const int row = first + r * warps;
      if (row >= end) break;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const float total = warp_sum(sum[r][b]);
        if (port::lane() == 0 && b < p.batch) parts[b * p.shape.hidden + row] = total;
      }
    }
  }
};

template <class T, int kBatch, class Ring>
HFF_KERNEL(32 * kStreamWarps)
void attention_up(HFF_PARAM(ClusterParams) p) {
  if constexpr (compiled_here(Ring::kBulk)) {
    using Pieces = Stream<Ring, ClusterProgram>;
    const Group threads = {1, 0, port::threads()};
    const ClusterProgram program = {&p,
                                    port::cluster_index(),
                                    port::cluster_rank(),
                                    port::cluster_size(),
                                    port::block(),
                                    port::blocks(),
                                    int(sizeof(T))};
    Pieces stream;
    stream.start(program, port::arena(), p.layout, threads.warp(), threads.warps());
    port::dependents_launch();
    port::dependencies_wait();
    const bool with_up = p.layer.up.weight != nullptr;
    Worker<T, kBatch, Pieces> worker(p.shape, p.scratch, p.layout, threads, stream, p.batch);
    worker.load_norm(p.source, p.layer.attention_norm, p.layer.mlp_norm, with_up);
    Exchange<T, kBatch, Ring> exchange(p, worker, program);
    exchange.project_gather();
    exchange.attend_slots();
    exchange.merge();
    exchange.o_rows();
    if (with_up) {
      const Shape& shape = p.shape;
      T* up_out = static_cast<T*>(p.up_out);
      worker.rows(p.layer.up, shape.hidden, [&shape, up_out](int row, int b, float value) {
        up_out[b * shape.mlp_width + row] = port::from_float<T>(activate(value, shape.activation));
      });
    }
    port::cluster_wait();
    const auto cache = [&p](int) -> const Cache& { return p.layer.cache; };
    finish(p.scratch.counters, p.layout, cache, p.counts);
  }
}

}  // namespace cuda
}  // namespace hff

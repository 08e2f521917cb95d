// The input of a layer in shared memory, its statistics, and its norms.
//
//   mean = sum(x) / n;  var = sum((x - mean)^2) / n;  y = T((x - mean) / sqrt(var + eps) * w + b)
//   RMS: mean = 0
//
// x: (batch, hidden) fp32 in shared memory. Every CTA computes all statistics by itself: hidden
// additions are cheaper than a wait between CTAs. Two passes, fp32, of which the second corrects
// the mean of the first; sums in a fixed order: a thread's elements, the lanes of a warp by xor,
// the warps in order. Both norms of a parallel layer share the statistics. A thread asks for kLoads
// elements before it uses the first: a loop of one load at a time waits for L2 at each.
#pragma once

#include "cuda/program.h"
#include "cuda/warp.cuh"

namespace hff {
namespace cuda {

// Threads of a CTA that work and wait together: `count` from `first`, a multiple of 32 each, behind
// the named barrier `id`.
struct Group {
  int id, first, count;

  HFF_DEVICE int rank() const { return port::thread() - first; }
  HFF_DEVICE int warp() const { return rank() / 32; }
  HFF_DEVICE int warps() const { return count / 32; }
  HFF_DEVICE void sync() const { port::sync_named(id, count); }
};

// store(i, load(i)) for the group's indices below `count`, `kLoads` loads of a thread at a time.
template <int kLoads, class Load, class Store>
HFF_DEVICE void copy(const Group& group, int count, const Load& load, const Store& store) {
  for (int first = group.rank(); first < count; first += kLoads * group.count) {
    decltype(load(0)) values[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      if (first + j * group.count < count) values[j] = load(first + j * group.count);
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      if (first + j * group.count < count) store(first + j * group.count, values[j]);
    }
  }
}

// A row of a layer's input: in T, or in the residual stream; NaN for an id outside the vocabulary.
template <class T>
struct InputRow {
  const T* values;
  const float* residual;

  HFF_DEVICE InputRow(const Source& source, const float* stream, int b, int hidden)
      : values(nullptr), residual(nullptr) {
    const int64_t at = static_cast<int64_t>(b) * hidden;
    if (source.ids != nullptr) {
      const int64_t id = source.ids[b * source.id_stride];
      if (id >= 0 && id < source.vocab)
        values = static_cast<const T*>(source.embedding) + id * hidden;
    } else if (source.x != nullptr) {
      values = static_cast<const T*>(source.x) + at;
    } else {
      residual = stream + at;
    }
  }
  HFF_DEVICE float at(int i) const {
    if (values != nullptr) return port::to_float(values[i]);
    return residual != nullptr ? port::load_fresh(residual + i) : NAN;
  }
};

// x[b][i], all of it. Ends with a barrier.
template <class T, int kLoads>
HFF_DEVICE void load_input(const Group& group, const Source& source, const float* residual,
                           int batch, int hidden, float* x) {
  for (int b = 0; b < batch; ++b) {
    const InputRow<T> row(source, residual, b, hidden);
    copy<kLoads>(
        group, hidden, [&row](int i) { return row.at(i); },
        [x, b, hidden](int i, float value) { x[b * hidden + i] = value; });
  }
  group.sync();
}

// Sums over a row of d = x - mean and of its squares.
struct Moments {
  float sum[kMaxBatch], squares[kMaxBatch];
};

// The moments of x[b] about mean[b] over the group, of which the first pass needs the sums alone.
// reduce: (2, warps, kMaxBatch). Ends with a barrier.
template <bool kSquares>
HFF_DEVICE void reduce_rows(const Group& group, const float* x, int batch, int hidden,
                            const float (&mean)[kMaxBatch], float* reduce, Moments* moments) {
  float* squares_of = reduce + group.warps() * kMaxBatch;
#pragma unroll
  for (int b = 0; b < kMaxBatch; ++b) {
    if (b >= batch) break;
    float sum = 0.0f, squares = 0.0f;
    for (int i = group.rank(); i < hidden; i += group.count) {
      const float d = x[b * hidden + i] - mean[b];
      sum += d;
      if (kSquares) squares = fmaf(d, d, squares);
    }
    sum = warp_sum(sum);
    if (kSquares) squares = warp_sum(squares);
    if (port::lane() == 0) {
      reduce[group.warp() * kMaxBatch + b] = sum;
      if (kSquares) squares_of[group.warp() * kMaxBatch + b] = squares;
    }
  }
  group.sync();
#pragma unroll
  for (int b = 0; b < kMaxBatch; ++b) {
    moments->sum[b] = moments->squares[b] = 0.0f;
    if (b >= batch) continue;
    for (int w = 0; w < group.warps(); ++w) {
      moments->sum[b] += reduce[w * kMaxBatch + b];
      if (kSquares) moments->squares[b] += squares_of[w * kMaxBatch + b];
    }
  }
  group.sync();
}

struct Statistics {
  float mean[kMaxBatch], variance[kMaxBatch];
};

// The second pass also has the sum of distances from the mean as the first has rounded it, which
// moves the mean to where equal x have no variance.
HFF_DEVICE void statistics(const Group& group, const float* x, int batch, int hidden, bool rms,
                           float* reduce, Statistics* s) {
  const float n = static_cast<float>(hidden);
  Moments moments;
#pragma unroll
  for (int b = 0; b < kMaxBatch; ++b) s->mean[b] = 0.0f;
  if (!rms) {
    reduce_rows<false>(group, x, batch, hidden, s->mean, reduce, &moments);
#pragma unroll
    for (int b = 0; b < kMaxBatch; ++b) s->mean[b] = moments.sum[b] / n;
  }
  reduce_rows<true>(group, x, batch, hidden, s->mean, reduce, &moments);
#pragma unroll
  for (int b = 0; b < kMaxBatch; ++b) {
    const float off = rms ? 0.0f : moments.sum[b] / n;
    s->mean[b] += off;
    s->variance[b] = moments.squares[b] / n;
    if (off * off < s->variance[b]) s->variance[b] -= off * off;  // both may be infinite
  }
}

// What a norm multiplies an element by and adds to it.
struct Affine {
  float weight, bias;
};

// out[b * stride + i] = T(norm(x)); without a weight, T(x).
template <class T, int kLoads>
HFF_DEVICE void normalise(const Group& group, const Norm& norm, const Statistics& s, const float* x,
                          int batch, int hidden, T* out, int stride) {
  const T* weight = static_cast<const T*>(norm.weight);
  const T* bias = static_cast<const T*>(norm.bias);
#pragma unroll
  for (int b = 0; b < kMaxBatch; ++b) {
    if (b >= batch) break;
    const float mean = weight != nullptr ? s.mean[b] : 0.0f;
    const float scale = weight != nullptr ? 1.0f / sqrtf(s.variance[b] + norm.eps) : 1.0f;
    copy<kLoads>(
        group, hidden,
        [weight, bias](int i) {
          return Affine{weight != nullptr ? port::to_float(weight[i]) : 1.0f,
                        bias != nullptr ? port::to_float(bias[i]) : 0.0f};
        },
        [&](int i, const Affine& affine) {
          const float y = (x[b * hidden + i] - mean) * scale * affine.weight;
          out[b * stride + i] = port::from_float<T>(y + affine.bias);
        });
  }
}

}  // namespace cuda
}  // namespace hff

// Dots of weight rows with a few input rows, weights from the ring.
//
//   sums[unit][b] = sum over the unit's columns of w[row, col] * x[b, col]
//
// A unit is a piece of a row. w: T in a ring slot; x: (batch, stride) T in shared memory; products
// and sums fp32. A piece stays in one warp: lane i takes columns 8 i .. 8 i + 7 of every 256, even
// and odd columns in two chains of FMA; lanes add by xor. Pieces of a row are dealt to the CTA's
// warps in turn, so that a CTA with few long rows is as even as one with many short ones; the
// pieces of a row are added in order by the thread that stores the row. No order depends on timing.
// Bytes: every weight once. 19 instructions per 8 weights and lane are a fifth of an H200's issue
// slots at its memory's rate, and leave room for 4 rows of input.
#pragma once

#include "cuda/norm.cuh"
#include "cuda/ring.cuh"

namespace hff {
namespace cuda {

template <class T, int kBatch>
HFF_DEVICE void dot(const T* w, const T* x, int stride, int count, float (&sum)[kBatch]) {
  float even[kBatch], odd[kBatch];
#pragma unroll
  for (int b = 0; b < kBatch; ++b) even[b] = odd[b] = 0.0f;
#pragma unroll 2
  for (int i = 8 * port::lane(); i < count; i += 8 * 32) {
    float wf[8];
    port::load8(w + i, wf);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      float xf[8];
      port::load8(x + b * stride + i, xf);
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        even[b] = fmaf(wf[j], xf[j], even[b]);
        odd[b] = fmaf(wf[j + 1], xf[j + 1], odd[b]);
      }
    }
  }
#pragma unroll
  for (int b = 0; b < kBatch; ++b) sum[b] = even[b] + odd[b];
}

// A warp's place in a span that is consumed in passes.
struct Cursor {
  Span span;
  Unit unit;

  HFF_DEVICE Cursor(const Span& span_, const Group& group) : span(span_) {
    unit.start(group.warp(), group.warps(), span.pieces);
  }
};

// The dots of rows up to `end` of the span, counted from its first, those from `begin` on not yet
// done: unit (row, piece) to sums[((row - begin) * row_sums + offset + piece) * kBatch].
template <class T, int kBatch, class S>
HFF_DEVICE void multiply(S& stream, Cursor* at, int begin, int end, const T* x, int stride,
                         float* sums, int row_sums, int offset) {
  const Span& span = at->span;
  for (; at->unit.row < end; at->unit.advance(span.pieces)) {
    const int row = at->unit.row, piece = at->unit.piece;
    const int bytes = piece + 1 == span.pieces ? span.last : span.piece;
    float sum[kBatch];
    const T* w = reinterpret_cast<const T*>(stream.front());
    dot<T, kBatch>(w, x + piece * (span.piece / static_cast<int>(sizeof(T))), stride,
                   bytes / static_cast<int>(sizeof(T)), sum);
    stream.pop();
    float* to = sums + ((row - begin) * row_sums + offset + piece) * kBatch;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const float total = warp_sum(sum[b]);
      if (port::lane() == 0) to[b] = total;
    }
  }
}

HFF_DEVICE float activate(float x, int activation) {
  switch (activation) {
    case HFF_ACT_GELU_ERF:
      return 0.5f * x * (1.0f + port::erf(x * 0.70710678118654752f));
    case HFF_ACT_GELU_TANH:
      return 0.5f * x * (1.0f + port::tanh(0.79788456080286536f * fmaf(0.044715f * x * x, x, x)));
    case HFF_ACT_RELU:
      return x < 0.0f ? 0.0f : x;
    case HFF_ACT_SILU:
      return x / (1.0f + port::exp(-x));
    default:
      return x;
  }
}

// store(row of the matrix, b, W x + bias) for the CTA's rows of one matrix and all `batch`, once
// for each, by the threads in turn; several passes where the sums have no room for all. Begins
// after a barrier that made x visible, ends with one.
template <class T, int kBatch, class S, class Store>
HFF_DEVICE void project(S& stream, const Group& group, const Span& span, const T* bias, int batch,
                        const T* x, int stride, float* sums, int sum_count, const Store& store) {
  Cursor at(span, group);
  const int fit = sum_count / (span.pieces * kBatch);
  for (int begin = 0; begin < span.count; begin += fit) {
    const int end = begin + fit < span.count ? begin + fit : span.count;
    const int first = span.first + begin, count = (end - begin) * batch;
    const auto bias_of = [bias, first, batch, count](int i) {
      return bias != nullptr && i < count ? port::to_float(bias[first + i / batch]) : 0.0f;
    };
    const float ahead = bias_of(group.rank());  // most threads store once: not waited for then
    multiply<T, kBatch>(stream, &at, begin, end, x, stride, sums, span.pieces, 0);
    group.sync();
    for (int i = group.rank(); i < count; i += group.count) {
      const int row = i / batch, b = i - row * batch;
      float value = 0.0f;
      for (int p = 0; p < span.pieces; ++p) value += sums[(row * span.pieces + p) * kBatch + b];
      store(first + row, b, value + (i == group.rank() ? ahead : bias_of(i)));
    }
    group.sync();
  }
}

}  // namespace cuda
}  // namespace hff

// LayerNorm and RMSNorm of one row, torch.nn.functional.layer_norm's definition.
//   LayerNorm: y = (x - mean) * rsqrt(var + eps) * weight + bias
//   RMSNorm:   y = x * rsqrt(mean(x^2) + eps) * weight
// x: (hidden) fp32 or model dtype; weight, bias: (hidden), model dtype; y: (hidden), rounded once,
//   at the store.
// Work split: every thread that needs a row norms it for itself: hidden is at most a few thousand,
//   less than a barrier costs.
// Statistics are fp32 in two passes over the row (E[x^2] - E[x]^2 cancels when |mean| is large).
//   The second, of distances d from the mean as the first has rounded it, also has their sum, which
//   moves the mean to where equal x have no variance. Sums are of kNormBlock vectors, then of those
//   sums: beside one channel of 1e4 a single chain would lose the others' squares. Two
//   accumulators, added in a fixed order, so a row's bits do not depend on its neighbours.

namespace hff {
namespace HFF_ISA {

constexpr int64_t kNormBlock = 16;  // vectors

// Zero in the lanes at and past n.
HFF_INLINE F keep_first(F x, int64_t n) {
  if (n >= kLanes) return x;
  float lanes[kLanes];
  store(x, lanes);
  return load_n(lanes, n);
}

// Sums over a row of d = x - mean and of its squares.
struct Moments {
  F sum = zero(), squares = zero();

  HFF_ALWAYS_INLINE void take(F d) {
    sum = add(sum, d);
    squares = fma(d, d, squares);
  }
  HFF_ALWAYS_INLINE void take(const Moments& other) {
    sum = add(sum, other.sum);
    squares = add(squares, other.squares);
  }
};
template <class X>
HFF_INLINE Moments moments_of(const X* x, int64_t hidden, F mean) {
  Moments all;
  int64_t i = 0;
  for (; i + kNormBlock * kLanes <= hidden; i += kNormBlock * kLanes) {
    Moments part[2];
    for (int64_t v = 0; v < kNormBlock; ++v) part[v % 2].take(sub(load(x + i + v * kLanes), mean));
    part[0].take(part[1]);
    all.take(part[0]);
  }
  Moments rest;
  for (; i < hidden; i += kLanes)
    rest.take(keep_first(sub(load_n(x + i, hidden - i), mean), hidden - i));
  all.take(rest);
  return all;
}

template <class X, class T, class Y>
static void norm_row(const X* x, const T* weight, const T* bias, int32_t kind, float eps,
                     int64_t hidden, Y* y) {
  const bool layer = kind == HFF_NORM_LAYER;
  const float n = static_cast<float>(hidden);
  float mean = layer ? sum(moments_of(x, hidden, zero()).sum) / n : 0.0f;
  const Moments moments = moments_of(x, hidden, set1(mean));
  float variance = sum(moments.squares) / n;
  if (layer) {
    const float off = sum(moments.sum) / n;
    mean += off;
    if (off * off < variance) variance -= off * off;  // both may be infinite
  }
  const F centre = set1(mean);
  const F scale = set1(1.0f / __builtin_sqrtf(variance + eps));
  for (int64_t i = 0; i < hidden; i += kLanes) {
    const int64_t left = hidden - i < kLanes ? hidden - i : kLanes;
    const F d = mul(sub(load_n(x + i, left), centre), scale);
    const F w = load_n(weight + i, left);
    const F out = bias != nullptr ? fma(d, w, load_n(bias + i, left)) : mul(d, w);
    store_n(out, y + i, left);
  }
}

}  // namespace HFF_ISA
}  // namespace hff

// LayerNorm and RMSNorm of one row, torch.nn.functional.layer_norm's definition.
//   LayerNorm: y = (x - mean) * rsqrt(var + eps) * weight + bias
//   RMSNorm:   y = x * rsqrt(mean(x^2) + eps) * weight
// x: (hidden) fp32 or model dtype; weight, bias: (hidden), model dtype; y: (hidden), rounded once,
//   at the store.
// Work split: every thread that needs a row norms it for itself: hidden is at most a few thousand,
//   less than a barrier costs.
// Statistics are fp32 in two passes over the row (E[x^2] - E[x]^2 cancels when |mean| is large),
//   two accumulators added in a fixed order, so a row's bits do not depend on its neighbours.

namespace hff {
namespace HFF_ISA {

// Sum of term(vector, lanes) over a row, `term` seeing each vector of x once.
template <class X, class Term>
HFF_INLINE float row_sum(const X* x, int64_t hidden, Term term) {
  F even = zero(), odd = zero();
  int64_t i = 0;
  for (; i + 2 * kLanes <= hidden; i += 2 * kLanes) {
    even = add(even, term(load(x + i), kLanes));
    odd = add(odd, term(load(x + i + kLanes), kLanes));
  }
  for (; i < hidden; i += kLanes) {
    const int64_t n = hidden - i < kLanes ? hidden - i : kLanes;
    even = add(even, term(load_n(x + i, n), n));
  }
  return sum(add(even, odd));
}

// Zero in the lanes at and past n.
HFF_INLINE F keep_first(F x, int64_t n) {
  if (n >= kLanes) return x;
  float lanes[kLanes];
  store(x, lanes);
  return load_n(lanes, n);
}

template <class X, class T, class Y>
static void norm_row(const X* x, const T* weight, const T* bias, int32_t kind, float eps,
                     int64_t hidden, Y* y) {
  float mean = 0.0f;
  if (kind == HFF_NORM_LAYER) {
    mean = row_sum(x, hidden, [](F v, int64_t) { return v; }) / static_cast<float>(hidden);
  }
  const F centre = set1(mean);
  const float squares = row_sum(x, hidden, [&](F v, int64_t n) {
    const F d = keep_first(sub(v, centre), n);
    return mul(d, d);
  });
  const F scale = set1(1.0f / __builtin_sqrtf(squares / static_cast<float>(hidden) + eps));
  for (int64_t i = 0; i < hidden; i += kLanes) {
    const int64_t n = hidden - i < kLanes ? hidden - i : kLanes;
    const F d = mul(sub(load_n(x + i, n), centre), scale);
    const F w = load_n(weight + i, n);
    const F out = bias != nullptr ? fma(d, w, load_n(bias + i, n)) : mul(d, w);
    store_n(out, y + i, n);
  }
}

}  // namespace HFF_ISA
}  // namespace hff

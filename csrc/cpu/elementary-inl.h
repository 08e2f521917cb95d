// Elementary functions and activations of F (vec-inl.h); NaN stays NaN.

namespace hff {
namespace HFF_ISA {

constexpr float kLeastExp = -87.33654f;  // e^x is a normal number down to it

// e^r for x = n ln2 + r, |r| <= ln2 / 2: a polynomial of degree 6.
HFF_INLINE F exp_rest(F x, F n) {
  F r = fma(n, set1(-0.693145752f), x);
  r = fma(n, set1(-1.42860677e-6f), r);
  F p = fma(set1(0.0013948581f), r, set1(0.008375129f));
  p = fma(p, r, set1(0.041666217f));
  p = fma(p, r, set1(0.16666415f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  return fma(p, r, set1(1.0f));
}

// e^x to 1 ulp. 0 below -87.3, inf above 88.7, NaN kept.
HFF_INLINE F exp(F x) {
  const F n = round(mul(select_lt(abs(x), set1(100.0f), x, zero()), set1(1.44269504f)));
  const F half = round(mul(n, set1(0.5f)));  // n reaches 128
  const F p = scale2(scale2(exp_rest(x, n), half), sub(n, half));
  return select_lt(set1(88.72283f), x, set1(__builtin_inff()), zero_below(x, kLeastExp, p));
}

// e^x for x <= 0 in half the work: 0 below -87.3, NaN kept.
HFF_INLINE F exp_negative(F x) {
  const F n = round(mul(max(set1(kLeastExp), x), set1(1.44269504f)));
  return zero_below(x, kLeastExp, scale2(exp_rest(x, n), n));
}

// erfc(z) for z >= 0: 1 - z P(z^2) below 1, t exp(-z^2 + Q(t)) with t = 1 / (1 + z / 2) above; the
// coefficients are Chebyshev fits of erf(z) / z and of log(erfc(z) / t) + z^2; relative error 1e-7
// below 1, 7e-7 to 3, 4e-6 to 9.
HFF_INLINE F erfc_positive(F z) {
  const F s = mul(z, z);
  F p = fma(set1(7.882497448e-05f), s, set1(-8.018855006e-04f));
  p = fma(p, s, set1(5.189312156e-03f));
  p = fma(p, s, set1(-2.685432881e-02f));
  p = fma(p, s, set1(1.128359735e-01f));
  p = fma(p, s, set1(-3.761262596e-01f));
  p = fma(p, s, set1(1.128379107f));
  const F near = fma(sub(zero(), z), p, set1(1.0f));
  const F t = div(set1(1.0f), fma(z, set1(0.5f), set1(1.0f)));
  F q = fma(set1(-0.1427883953f), t, set1(0.6457005143f));
  q = fma(q, t, set1(-0.9107971787f));
  q = fma(q, t, set1(0.3207326531f));
  q = fma(q, t, set1(-0.04148041084f));
  q = fma(q, t, set1(0.3973717391f));
  q = fma(q, t, set1(0.9978312254f));
  q = fma(q, t, set1(-1.265424490f));
  const F far = mul(t, exp_negative(sub(q, s)));
  return select_lt(z, set1(1.0f), near, far);
}

// Of results in 16 bits, which are known to 2^-9 or 2^-12.

// 2^y to 3e-6 for y in [-1e6, 127]; may be 0 below -126. NaN kept.
HFF_INLINE F exp2_16(F y) {
  const F n = round(y), r = sub(y, n);
  F p = fma(set1(0.00957010128f), r, set1(0.0559178628f));
  p = fma(p, r, set1(0.240247458f));
  p = fma(p, r, set1(0.693121791f));
  p = fma(p, r, set1(0.999999285f));
  return scale2(p, n);
}

// e^x for x <= 0, as exact as results of type T show. 0 for -inf, NaN kept.
template <class T>
HFF_INLINE F exp_negative_for(F x) {
  if constexpr (sizeof(T) == 4) return exp_negative(x);
  return exp2_16(mul(max(set1(-1000.0f), x), set1(1.44269504f)));
}

// Phi(-z) for z in [0, 16], the normal distribution: t 2^(P(t) - z^2 log2(e) / 2) with t = 1 / (1 +
// 0.348 z), P a minimax fit. Relative error 1e-5 to 9, 2e-5 to 13, where it is 6e-39.
HFF_INLINE F normal_tail_16(F z) {
  const F t = reciprocal(fma(z, set1(0.348f), set1(1.0f)));
  F p = fma(set1(0.334682137f), t, set1(-1.06549585f));
  p = fma(p, t, set1(0.768154919f));
  p = fma(p, t, set1(0.336743355f));
  p = fma(p, t, set1(1.47664571f));
  p = fma(p, t, set1(-2.85072184f));
  return mul(t, exp2_16(fma(mul(z, z), set1(-0.721347520f), p)));
}

// x Phi(x), as torch.nn.functional.gelu(x), for results of type T: for x < 0 from the tail
// directly, without the cancellation in 1 + erf.
template <class T>
HFF_INLINE F gelu_erf(F x) {
  if constexpr (sizeof(T) == 4) {
    const F c = erfc_positive(mul(abs(x), set1(0.707106781f)));
    return mul(mul(x, set1(0.5f)), select_lt(x, zero(), c, sub(set1(2.0f), c)));
  } else {
    const F tail = normal_tail_16(min(set1(16.0f), abs(x)));
    return mul(x, select_lt(x, zero(), tail, sub(set1(1.0f), tail)));
  }
}

// x / (1 + e^-y)
HFF_INLINE F gate(F x, F y) { return div(x, add(set1(1.0f), exp(sub(zero(), y)))); }
HFF_INLINE F silu(F x) { return gate(x, x); }

// torch.nn.functional.gelu(x, approximate="tanh"): 0.5 (1 + tanh u) = 1 / (1 + e^-2u)
HFF_INLINE F gelu_tanh(F x) {
  const F cubic = fma(mul(mul(x, x), set1(0.044715f)), x, x);
  return gate(x, mul(cubic, set1(1.59576912f)));
}

template <class T>
HFF_INLINE F activate(F x, int32_t activation) {
  switch (activation) {
    case HFF_ACT_GELU_ERF:
      return gelu_erf<T>(x);
    case HFF_ACT_GELU_TANH:
      return gelu_tanh(x);
    case HFF_ACT_RELU:
      return select_lt(x, zero(), zero(), x);
    case HFF_ACT_SILU:
      return silu(x);
    default:
      return x;
  }
}

// function(an integral constant of the activation)
template <class Function>
HFF_INLINE void with_activation(int32_t activation, Function function) {
  switch (activation) {
    case HFF_ACT_GELU_ERF:
      return function(std::integral_constant<int32_t, HFF_ACT_GELU_ERF>{});
    case HFF_ACT_GELU_TANH:
      return function(std::integral_constant<int32_t, HFF_ACT_GELU_TANH>{});
    case HFF_ACT_RELU:
      return function(std::integral_constant<int32_t, HFF_ACT_RELU>{});
    case HFF_ACT_SILU:
      return function(std::integral_constant<int32_t, HFF_ACT_SILU>{});
    default:
      return function(std::integral_constant<int32_t, HFF_ACT_NONE>{});
  }
}

}  // namespace HFF_ISA
}  // namespace hff

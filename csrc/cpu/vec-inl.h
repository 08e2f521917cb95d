// The thin vector type. Compiled once per instruction set inside namespace HFF_ISA; everything has
// internal linkage, so that no function built for AVX-512 can be linked into a path that a lesser
// CPU runs.
// F holds kLanes floats. load/store convert between memory types (float, bf16, f16) and F; *_n
// touch exactly n elements and read the rest as zero. sum() adds in a fixed tree, largest() is any
// lane where one is NaN. Loads of bf16 and f16 are exact, stores round to nearest even.

#define HFF_INLINE static inline __attribute__((always_inline))
#define HFF_LAMBDA_INLINE __attribute__((always_inline))  // after a lambda's parameters

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace hff {
namespace HFF_ISA {

// ---- scalar conversions -------------------------------------------------------------------------

HFF_INLINE float bits_to_float(uint32_t bits) {
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
HFF_INLINE uint32_t float_to_bits(float x) {
  uint32_t out;
  std::memcpy(&out, &x, 4);
  return out;
}
HFF_INLINE float to_float(float x) { return x; }
HFF_INLINE float to_float(bf16 x) { return bits_to_float(uint32_t{x.bits} << 16); }
HFF_INLINE float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, body = x.bits & 0x7fff;
  if (body >= 0x7c00) {  // inf, NaN
    return bits_to_float(sign | 0x7f800000 | (body & 0x3ff) << 13 | (body > 0x7c00 ? 1u << 22 : 0));
  }
  // A subnormal goes by way of an integer: the caller's mode may take denormal floats as zero.
  const float value =
      body < 0x400 ? static_cast<float>(body) * 0x1p-24f : bits_to_float((body << 13) + 0x38000000);
  return bits_to_float(sign | float_to_bits(value));
}
HFF_INLINE void from_float(float x, float* out) { *out = x; }
HFF_INLINE void from_float(float x, bf16* out) {
  const uint32_t bits = float_to_bits(x);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  out->bits =
      nan ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
HFF_INLINE void from_float(float x, f16* out) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, body = bits & 0x7fffffff;
  if (body > 0x7f800000) {
    out->bits = uint16_t(sign | 0x7e00 | (body >> 13 & 0x3ff));
  } else if (body >= 0x477ff000) {  // rounds past 65504
    out->bits = uint16_t(sign | 0x7c00);
  } else if (body < 0x38800000) {  // subnormal in f16: let the float adder round at bit 2^-24
    const float shifted = bits_to_float(body) + 0.5f;
    out->bits = uint16_t(sign | (float_to_bits(shifted) - 0x3f000000));
  } else {
    const uint32_t rebiased = body - 0x38000000;
    out->bits = uint16_t(sign | (rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13);
  }
}

#if defined(__AVX512F__)
// ---- AVX-512 ------------------------------------------------------------------------------------

constexpr int kLanes = 16;
struct F {
  __m512 v;
};
HFF_INLINE __mmask16 first(int64_t n) {
  return n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1);
}
HFF_INLINE F zero() { return {_mm512_setzero_ps()}; }
HFF_INLINE F set1(float x) { return {_mm512_set1_ps(x)}; }
HFF_INLINE F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
HFF_INLINE F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
HFF_INLINE F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
HFF_INLINE F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
HFF_INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
HFF_INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
HFF_INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }  // likewise
HFF_INLINE F abs(F a) { return {_mm512_abs_ps(a.v)}; }
HFF_INLINE F round(F a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
HFF_INLINE F select_lt(F a, F b, F yes, F no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
HFF_INLINE F scale2(F a, F n) {  // a 2^n, n integral and at most 127; below -126 it may be zero
  return {_mm512_scalef_ps(a.v, n.v)};
}
HFF_INLINE F zero_below(F x, float least, F a) {  // a, or 0 where x < least
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(least), _CMP_NLT_UQ), a.v)};
}
HFF_INLINE F reciprocal(F a) {  // to 2^-27, a in [2^-126, 2^126]
  const __m512 r = _mm512_rcp14_ps(a.v);
  return {_mm512_fmadd_ps(_mm512_fnmadd_ps(a.v, r, _mm512_set1_ps(1.0f)), r, r)};
}
HFF_INLINE float sum(F a) {
  const __m256 half =
      _mm256_add_ps(_mm512_castps512_ps256(a.v),
                    _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)));
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
HFF_INLINE float largest(F a) {
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1));
  const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(a.v), high);
  __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}

HFF_INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
HFF_INLINE F load_n(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
HFF_INLINE F widen_bf16(__m256i x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
HFF_INLINE F load(const bf16* p) {
  return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
HFF_INLINE F load_n(const bf16* p, int64_t n) {
  return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p));
}
HFF_INLINE F load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
HFF_INLINE F load_n(const f16* p, int64_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))};
}

HFF_INLINE __m256i narrow_bf16(F a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, up, quiet), 16));
}
HFF_INLINE __m256i narrow_f16(F a) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
HFF_INLINE void store(F a, float* p) { _mm512_storeu_ps(p, a.v); }
HFF_INLINE void store_n(F a, float* p, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
HFF_INLINE void store(F a, bf16* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a));
}
HFF_INLINE void store_n(F a, bf16* p, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(a));
}
HFF_INLINE void store(F a, f16* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(a));
}
HFF_INLINE void store_n(F a, f16* p, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow_f16(a));
}

#elif defined(__AVX2__)
// ---- AVX2, FMA, F16C ----------------------------------------------------------------------------

constexpr int kLanes = 8;
struct F {
  __m256 v;
};
HFF_INLINE F zero() { return {_mm256_setzero_ps()}; }
HFF_INLINE F set1(float x) { return {_mm256_set1_ps(x)}; }
HFF_INLINE F add(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
HFF_INLINE F sub(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
HFF_INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
HFF_INLINE F div(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
HFF_INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
HFF_INLINE F max(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
HFF_INLINE F min(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
HFF_INLINE F abs(F a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
HFF_INLINE F round(F a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
HFF_INLINE F select_lt(F a, F b, F yes, F no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
HFF_INLINE F pow2(F n) {  // n integral in [-127, 127]; -127 gives zero
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(e, 23))};
}
HFF_INLINE float sum(F a) {
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
HFF_INLINE float largest(F a) {
  __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  quarter = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}
HFF_INLINE F load(const float* p) { return {_mm256_loadu_ps(p)}; }
HFF_INLINE F load(const bf16* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
}
HFF_INLINE F load(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
HFF_INLINE void store(F a, float* p) { _mm256_storeu_ps(p, a.v); }
HFF_INLINE void store(F a, bf16* p) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
HFF_INLINE void store(F a, f16* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else
// ---- portable C++: the compiler's own vectors of SSE2's and NEON's size -------------------------

constexpr int kLanes = 4;
using Floats = float __attribute__((vector_size(16)));
using Bits = uint32_t __attribute__((vector_size(16)));
using Halves = uint16_t __attribute__((vector_size(16)));
using Longs = uint64_t __attribute__((vector_size(16)));
using Flags = decltype(Floats() < Floats());  // signed words, all bits of a lane or none
#if defined(__clang__)
#define HFF_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // gcc before 12 has no other
#define HFF_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Halves{__VA_ARGS__})
#endif

struct F {
  Floats v;
};
HFF_INLINE F zero() { return {Floats{}}; }
HFF_INLINE F set1(float x) { return {Floats{x, x, x, x}}; }
HFF_INLINE F add(F a, F b) { return {a.v + b.v}; }
HFF_INLINE F sub(F a, F b) { return {a.v - b.v}; }
HFF_INLINE F mul(F a, F b) { return {a.v * b.v}; }
HFF_INLINE F div(F a, F b) { return {a.v / b.v}; }
HFF_INLINE Bits either(Flags flags, Bits yes, Bits no) {
  return (Bits(flags) & yes) | (~Bits(flags) & no);
}
HFF_INLINE F either(Flags flags, F yes, F no) {
  return {Floats(either(flags, Bits(yes.v), Bits(no.v)))};
}
HFF_INLINE F max(F a, F b) { return either(a.v > b.v, a, b); }
HFF_INLINE F min(F a, F b) { return either(a.v < b.v, a, b); }
HFF_INLINE F abs(F a) { return {Floats(Bits(a.v) & 0x7fffffff)}; }
HFF_INLINE F round(F a) { return {(a.v + 0x1.8p23f) - 0x1.8p23f}; }  // |a| < 2^22, nearest even
HFF_INLINE F select_lt(F a, F b, F yes, F no) { return either(a.v < b.v, yes, no); }
HFF_INLINE F pow2(F n) {  // the integer lies in the low bits of n + 1.5 * 2^23
  return {Floats((Bits(n.v + 0x1.8p23f) + 127) << 23)};
}
HFF_INLINE float sum(F a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
HFF_INLINE float largest(F a) {
  float best = a.v[0];
  for (int i = 1; i < kLanes; ++i) best = a.v[i] > best ? a.v[i] : best;
  return best;
}
// Four 16-bit numbers as the low or the high halves of words.
template <bool kHigh, class T>
HFF_INLINE Bits load_halves(const T* p) {
  uint64_t four;  // into a part of a vector, memcpy would go by way of the stack
  std::memcpy(&four, p, sizeof four);
  const Halves x = Halves(Longs{four, 0});
  return Bits(kHigh ? HFF_SHUFFLE(Halves{}, x, 0, 8, 1, 9, 2, 10, 3, 11)
                    : HFF_SHUFFLE(x, Halves{}, 0, 8, 1, 9, 2, 10, 3, 11));
}
template <class T>
HFF_INLINE void store_low_halves(Bits words, T* p) {
  const Halves x = HFF_SHUFFLE(Halves(words), Halves{}, 0, 2, 4, 6, 8, 8, 8, 8);
  std::memcpy(p, &x, 4 * sizeof(T));
}
HFF_INLINE F load(const float* p) {
  F out;
  std::memcpy(&out, p, sizeof out);
  return out;
}
HFF_INLINE F load(const bf16* p) { return {Floats(load_halves<true>(p))}; }
#if defined(__aarch64__)
HFF_INLINE F fma(F a, F b, F c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
HFF_INLINE F load(const f16* p) {
  float16x4_t four;
  std::memcpy(&four, p, sizeof four);
  return {vcvt_f32_f16(four)};
}
#else
HFF_INLINE F fma(F a, F b, F c) { return {a.v * b.v + c.v}; }
// As to_float, but a signalling NaN stays one. A subnormal is what is left of 2^-14 more than it.
HFF_INLINE F load(const f16* p) {
  const Bits words = load_halves<false>(p), sign = (words & 0x8000) << 16;
  const Flags body = Flags(words & 0x7fff), small = body < 0x400;
  const Floats more = Floats((body << 13) + 0x38000000 + (small & 0x800000));
  const Bits finite = Bits(more - Floats(small & 0x38800000));
  return {Floats(sign | finite | Bits((body > 0x7bff) & 0x7f800000))};
}
#endif
HFF_INLINE void store(F a, float* p) { std::memcpy(p, &a, sizeof a); }
HFF_INLINE void store(F a, bf16* p) {  // as from_float
  const Bits bits = Bits(a.v), up = bits + 0x7fff + (bits >> 16 & 1);
  store_low_halves(either(a.v != a.v, bits | 0x400000, up) >> 16, p);
}
HFF_INLINE void store(F a, f16* p) {  // as from_float
  const Bits bits = Bits(a.v), sign = bits >> 16 & 0x8000, body = bits & 0x7fffffff;
  const Bits rebiased = body - 0x38000000;
  const Bits normal = (rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13;
  const Bits subnormal = Bits(Floats(body) + 0.5f) - 0x3f000000;
  const Bits nan = Bits(a.v != a.v) & (0x200 | (body >> 13 & 0x3ff));
  const Bits small = either(Floats(body) < 0x1p-14f, subnormal, normal);
  store_low_halves(sign | either(Floats(body) < 65520.0f, small, 0x7c00 | nan), p);
}
#undef HFF_SHUFFLE
#endif

#if !defined(__AVX512F__)
HFF_INLINE F scale2(F a, F n) { return mul(a, pow2(max(set1(-127.0f), n))); }
HFF_INLINE F zero_below(F x, float least, F a) { return select_lt(x, set1(least), zero(), a); }
HFF_INLINE F reciprocal(F a) { return div(set1(1.0f), a); }

// Tails without masked memory operations go through a register-sized buffer.
template <class T>
HFF_INLINE F load_n(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T buffer[kLanes] = {};
  for (int64_t i = 0; i < n && i < kLanes; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class T>
HFF_INLINE void store_n(F a, T* p, int64_t n) {
  if (n >= kLanes) return store(a, p);
  T buffer[kLanes];
  store(a, buffer);
  for (int64_t i = 0; i < n && i < kLanes; ++i) p[i] = buffer[i];
}
#endif

}  // namespace HFF_ISA
}  // namespace hff

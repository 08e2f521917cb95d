// Attention by itself, what its three kernels share: which keys a query sees, and the softmax of a
// row.
//   out = softmax(scale q k^T + mask) v per query head, heads sharing k and v in groups
// q, k, v, out: (batch, heads, tokens, head_dim) with any strides but head_dim's. A row is a query
//   of a head; the rows of one k/v head are numbered query by query, its heads side by side, so
//   that a block of rows shares keys and ends at about one causal limit.
// Hidden keys: their score is replaced by -inf, not biased, and their value is left out of sums,
//   not multiplied by zero: nothing behind a mask leaks, NaN included. Nothing visible gives zeros.
// Rounding: q, k, v as they are, in bf16 products where the instruction set has them (pack-inl.h);
//   scores, softmax and sums fp32, e^x in flash to 3e-6 where T has 16 bits; with bf16 products,
//   weights are rounded to bf16 before they are normalised, context once at the store.

namespace hff {
namespace HFF_ISA {

constexpr float kHidden = -__builtin_inff();

template <class T>
struct Attend {
  const hff_attend_io& io;
  int64_t group, shift;  // heads of a k/v head; the key that query 0 sits on, minus 0

  explicit Attend(const hff_attend_io& call)
      : io(call), group(call.heads / call.kv_heads), shift(call.keys - call.queries) {}

  int64_t rows() const { return io.queries * group; }  // of one k/v head
  int64_t query_of(int64_t row) const { return row / group; }
  int64_t head_of(int64_t g, int64_t row) const { return g * group + row % group; }
  const T* q(int64_t b, int64_t h, int64_t i) const { return at(io.q.data, io.q_strides, b, h, i); }
  const T* k(int64_t b, int64_t g, int64_t j) const { return at(io.k.data, io.k_strides, b, g, j); }
  const T* v(int64_t b, int64_t g, int64_t j) const { return at(io.v.data, io.v_strides, b, g, j); }
  T* out(int64_t b, int64_t h, int64_t i) const {
    return const_cast<T*>(at(io.out.data, io.out_strides, b, h, i));
  }
  // Causality and window leave query i keys [first, limit).
  int64_t first(int64_t i) const {
    if (io.window == 0) return 0;
    const int64_t end = limit(i);
    return end > io.window ? end - io.window : 0;
  }
  int64_t limit(int64_t i) const {
    if (io.causal == 0) return io.keys;
    const int64_t end = shift + i + 1;
    return end > 0 ? end : 0;
  }
  bool masked() const { return io.mask.kind != HFF_MASK_NONE; }
  // How many of keys [j, j + keys), from the first on, all of rows [row, row + n) see.
  int64_t seen_by_all(int64_t row, int64_t n, int64_t j, int64_t keys) const {
    if (masked() || first(query_of(row + n - 1)) > j) return 0;
    const int64_t seen = limit(query_of(row)) - j;
    return seen < 0 ? 0 : seen < keys ? seen : keys;
  }
  // The mask of head h alone.
  hff_mask mask_of(int64_t h) const {
    hff_mask mask = io.mask;
    const int64_t size = mask_element_bytes(mask.kind, sizeof(T));
    mask.data.data = static_cast<const char*>(mask.data.data) + h * io.mask_head_stride * size;
    return mask;
  }

 private:
  static HFF_ALWAYS_INLINE const T* at(const void* data, const hff_strides& s, int64_t b, int64_t h,
                                       int64_t t) {
    return static_cast<const T*>(data) + b * s.batch + h * s.head + t * s.token;
  }
};

template <class M, class Convert>
HFF_INLINE void fill_bias(const void* mask, int64_t at, int64_t stride, int64_t begin, int64_t end,
                          float* bias, Convert convert) {
  const M* from = static_cast<const M*>(mask) + at;
  if (stride == 1) {
    for (int64_t u = begin; u < end; ++u) bias[u] = convert(from[u]);
  } else {
    for (int64_t u = begin; u < end; ++u) bias[u] = convert(from[u * stride]);
  }
}

// What (b, h, i) adds to its scores of keys [j, j + n): 0, an additive mask's value, or kHidden,
// which also fills bias up to `padded`.
template <class T>
static void bias_of(const Attend<T>& a, int64_t b, int64_t h, int64_t i, int64_t j, int64_t n,
                    int64_t padded, float* bias) {
  int64_t begin = a.first(i) - j, end = a.limit(i) - j;
  end = end < 0 ? 0 : end > n ? n : end;
  begin = begin < 0 ? 0 : begin > end ? end : begin;
  for (int64_t u = 0; u < begin; ++u) bias[u] = kHidden;
  for (int64_t u = end; u < padded; ++u) bias[u] = kHidden;
  const hff_mask& m = a.io.mask;
  const int64_t at = b * m.batch_stride + h * a.io.mask_head_stride + i * m.query_stride;
  const int64_t from = at + j * m.key_stride;
  switch (m.kind) {
    case HFF_MASK_BOOL:
      return fill_bias<uint8_t>(m.data.data, from, m.key_stride, begin, end, bias,
                                [](uint8_t x) { return x != 0 ? 0.0f : kHidden; });
    case HFF_MASK_INT64:
      return fill_bias<int64_t>(m.data.data, from, m.key_stride, begin, end, bias,
                                [](int64_t x) { return x != 0 ? 0.0f : kHidden; });
    case HFF_MASK_ADDITIVE:
      return fill_bias<T>(m.data.data, from, m.key_stride, begin, end, bias, [](T x) {
        const float add = to_float(x);
        return add <= lowest_of<T>() ? kHidden : add;
      });
    default:
      for (int64_t u = begin; u < end; ++u) bias[u] = 0.0f;
  }
}

// score + bias, kHidden where the bias is.
HFF_INLINE F biased(F score, const float* bias) {
  const F b = load(bias);
  return select_lt(b, set1(-3.40282347e38f), set1(kHidden), add(score, b));
}

// Whether a row of n biased scores is hidden throughout; NaN is not hidden.
static bool all_hidden(const float* scores, int64_t n) {
  for (int64_t u = 0; u < n; ++u) {
    if (!(scores[u] == kHidden)) return false;
  }
  return true;
}

// out = exp(score - the largest) of n biased scores, whole vectors; returns the sum, 0 where all
// are hidden.
template <class W>
static float soften_row(const float* scores, int64_t n, W* out) {
  F top = set1(kHidden), total = zero();
  for (int64_t j = 0; j < n; j += kLanes) top = max(load(scores + j), top);
  const float peak = largest(top);
  if (peak == kHidden && all_hidden(scores, n)) {
    for (int64_t j = 0; j < n; j += kLanes) store(zero(), out + j);
    return 0.0f;
  }
  for (int64_t j = 0; j < n; j += kLanes) {
    const F weight = exp_negative(sub(load(scores + j), set1(peak)));
    store(weight, out + j);
    total = add(total, weight);
  }
  return sum(total);
}

// context[0, dim) += sum of weights[u] times the value of key j + u of (b, g), hidden keys left
// out.
template <class T, class W>
static void add_seen_values(const Attend<T>& a, int64_t b, int64_t g, int64_t j, int64_t n,
                            const W* weights, const float* bias, float* context) {
  const int64_t dim = a.io.head_dim;
  for (int64_t u = 0; u < n; ++u) {
    if (bias[u] == kHidden) continue;
    const T* value = a.v(b, g, j + u);
    const F weight = set1(to_float(weights[u]));
    for (int64_t d = 0; d < dim; d += kLanes) {
      const F sum = fma(weight, load_n(value + d, dim - d), load(context + d));
      store(sum, context + d);
    }
  }
}

// The context of a row, divided by its total, as the row of the output.
template <class T>
HFF_INLINE void store_context(const Attend<T>& a, const float* context, float total, int64_t b,
                              int64_t h, int64_t i) {
  const F scale = set1(total == 0.0f ? 0.0f : 1.0f / total);
  T* out = a.out(b, h, i);
  for (int64_t d = 0; d < a.io.head_dim; d += kLanes)
    store_n(mul(load(context + d), scale), out + d, a.io.head_dim - d);
}

// kLanes values of kDepth keys, as a panel holds them.
template <class P>
HFF_INLINE void store_step(const F* rows, typename P::Element* out) {
#if defined(__AVX512BF16__)
  if constexpr (P::kDepth == 2) {  // what was bf16 has its bits in the upper half
    const Words low = _mm512_srli_epi32(words_of(rows[0]), 16);
    store_words(_mm512_or_si512(low, words_of(rows[1])), out);
  } else
#endif
  {
    store(rows[0], out);
  }
}

// Values of keys [j, j + n) of (b, g) as panels of kPanel dims by n keys, rows past the n-th zero
// up to `padded`. Returns whether every value is finite.
template <class T, class P>
static bool pack_values(const Attend<T>& a, int64_t b, int64_t g, int64_t j, int64_t n,
                        int64_t padded, typename P::Element* out) {
  const int64_t dim = a.io.head_dim;
  F poison = zero();
  for (int64_t d = 0; d < dim; d += kPanel, out += padded * kPanel) {
    for (int64_t u = 0; u < padded; u += P::kDepth) {
      for (int64_t half = 0; half < kPanel; half += kLanes) {
        F rows[P::kDepth];
        for (int64_t r = 0; r < P::kDepth; ++r) {
          const int64_t left = dim - d - half;
          rows[r] = u + r < n && left > 0 ? load_n(a.v(b, g, j + u + r) + d + half, left) : zero();
          poison = fma(rows[r], zero(), poison);
        }
        store_step<P>(rows, out + u * kPanel + half * P::kDepth);
      }
    }
  }
  return sum(poison) == 0.0f;
}

}  // namespace HFF_ISA
}  // namespace hff

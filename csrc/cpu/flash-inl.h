// Attention of many query rows against the KV cache (prefill): flash attention, no (queries, keys)
// array.
//   context = softmax(scale rope(q) K^T + mask) V, per head, after k', v were appended
//   (attention-inl.h has the formulas)
// Work split: first append, a unit per (batch row, k/v head, kQueries rows); a barrier; then a unit
//   per (batch row, head, kQueries rows), longest first under causality. A unit walks the keys in
//   panels of kChunk, converting each to fp32 once: K transposed, so that scores need no horizontal
//   sums, V as it is.
// Scratch per thread: queries, context, scores and two panels, (2 kQueries + 2 kChunk) * head_dim +
//   kQueries * kChunk fp32: 132 KB at head_dim 64, in L2.
// Bytes from memory: K and V once per kQueries rows. Bound: fp32 FMA.
// Rounding: as in attention-inl.h; context is rounded once, at the store to the model dtype.
// Masked keys: their score is replaced, not biased, and a value panel holding NaN or Inf is summed
//   key by key without them, so that nothing behind a mask leaks.

namespace hff {
namespace HFF_ISA {

constexpr int64_t kQueries = 128;
static_assert(kChunk == 64, "a chunk's hidden keys are bits of a word");
#if defined(__AVX512F__)
constexpr int kVectors = 4;  // 4 x 4 accumulators of 32 registers
#else
constexpr int kVectors = 2;  // 4 x 2 of 16
#endif

struct FlashScratch {
  float *queries, *context, *scores, *keys, *values, *top, *total;
  uint64_t* hidden;  // a bit for each key of the chunk that a query may not see
  static int64_t floats(int64_t dim) {
    const int64_t padded = pad_lanes(dim);
    return (2 * kQueries + 2 * kChunk) * padded + kQueries * kChunk + 4 * kQueries;
  }
  FlashScratch(float* p, int64_t dim) {
    const int64_t padded = pad_lanes(dim);
    queries = p;
    context = queries + kQueries * padded;
    scores = context + kQueries * padded;
    keys = scores + kQueries * kChunk;  // (head_dim, kChunk)
    values = keys + kChunk * padded;    // (kChunk, padded head_dim)
    top = values + kChunk * padded;
    total = top + kQueries;
    hidden = reinterpret_cast<uint64_t*>(total + kQueries);
  }
};

// c[r][j] (+)= sum_k a[r][k] b[k][j]: R rows, kVectors vectors of columns.
template <int R, bool kAccumulate>
HFF_INLINE void multiply_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                              int64_t depth, float* c, int64_t c_stride) {
  F sums[R][kVectors];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v)
      sums[r][v] = kAccumulate ? load(c + r * c_stride + v * kLanes) : zero();
  }
  for (int64_t k = 0; k < depth; ++k) {
    F row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + k * b_stride + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const F x = set1(a[r * a_stride + k]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(x, row[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) store(sums[r][v], c + r * c_stride + v * kLanes);
  }
}

// One vector of columns, for head sizes that do not fill a tile.
template <bool kAccumulate>
static void multiply_narrow(const float* a, int64_t rows, int64_t a_stride, const float* b,
                            int64_t b_stride, int64_t depth, float* c, int64_t c_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    F sums = kAccumulate ? load(c + r * c_stride) : zero();
    for (int64_t k = 0; k < depth; ++k)
      sums = fma(set1(a[r * a_stride + k]), load(b + k * b_stride), sums);
    store(sums, c + r * c_stride);
  }
}

// c (rows, columns) (+)= a (rows, depth) b (depth, columns); columns a multiple of kLanes.
template <bool kAccumulate>
static void multiply(const float* a, int64_t rows, int64_t a_stride, const float* b,
                     int64_t b_stride, int64_t depth, int64_t columns, float* c, int64_t c_stride) {
  int64_t j = 0;
  for (; j + kVectors * kLanes <= columns; j += kVectors * kLanes) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      multiply_tile<4, kAccumulate>(a + r * a_stride, a_stride, b + j, b_stride, depth,
                                    c + r * c_stride + j, c_stride);
    }
    for (; r < rows; ++r) {
      multiply_tile<1, kAccumulate>(a + r * a_stride, a_stride, b + j, b_stride, depth,
                                    c + r * c_stride + j, c_stride);
    }
  }
  for (; j < columns; j += kLanes) {
    multiply_narrow<kAccumulate>(a, rows, a_stride, b + j, b_stride, depth, c + j, c_stride);
  }
}

// Converts keys [j, j + n) of (b, g) to a (head_dim, kChunk) panel and values to a (kChunk, padded)
// one; absent keys are zero. Returns whether every value is finite.
template <class T, class Q>
static bool load_panels(const Attention<T, Q>& a, int64_t b, int64_t g, int64_t j, int64_t n,
                        FlashScratch* s) {
  const int64_t dim = a.heads.head_dim, padded = pad_lanes(dim), at = a.cached(b, g, j);
  const T* keys = static_cast<const T*>(a.cache.keys.data) + at;
  const T* values = static_cast<const T*>(a.cache.values.data) + at;
  const int64_t stride = a.cache.token_stride;
  F poison = zero();
  for (int64_t u = 0; u < kChunk; u += kLanes) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int64_t left = dim - d < kLanes ? dim - d : kLanes;
      Words w[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) {
        const bool present = u + r < n;
        w[r] = present ? words_of(load_n(keys + (u + r) * stride + d, left)) : no_words();
        const F value = present ? load_n(values + (u + r) * stride + d, left) : zero();
        poison = fma(value, zero(), poison);
        store(value, s->values + (u + r) * padded + d);
      }
      transpose(w);
      for (int64_t e = 0; e < left; ++e) store_words(w[e], s->keys + (d + e) * kChunk + u);
    }
  }
  return sum(poison) == 0.0f;
}

// Hides what query i may not see of keys [j, j + n): score -inf, and its bit in the result.
template <class T, class Q>
static uint64_t hide(const Attention<T, Q>& a, int64_t b, int64_t i, int64_t j, int64_t n,
                     float* scores) {
  int64_t end = a.limit(b, i) - j;
  end = end < 0 ? 0 : end > n ? n : end;
  for (int64_t u = end; u < kChunk; ++u) scores[u] = -__builtin_inff();
  uint64_t seen = end == 0 ? 0 : ~uint64_t{0} >> (kChunk - end);
  if (a.call.mask.kind == HFF_MASK_NONE || end == 0) return ~seen;
  int32_t list[kChunk];
  float bias[kChunk], kept[kChunk];
  const int64_t count = visible_keys<T>(a.call.mask, b, i, j, j + end, list, bias);
  if (count == end && a.call.mask.kind != HFF_MASK_ADDITIVE) return ~seen;
  for (int64_t u = 0; u < end; ++u) kept[u] = -__builtin_inff();
  seen = 0;
  for (int64_t u = 0; u < count; ++u) {
    kept[list[u]] = scores[list[u]] + bias[u];
    seen |= uint64_t{1} << list[u];
  }
  for (int64_t u = 0; u < end; ++u) scores[u] = kept[u];
  return ~seen;
}

// Turns one row of scores into weights and rescales its context: the online softmax step.
HFF_INLINE void soften(float* scores, float* top, float* total, float* context, int64_t padded) {
  F best = load(scores), seen = zero();
  for (int64_t u = 0; u < kChunk; u += kLanes) {
    const F score = load(scores + u);
    best = max(best, score);
    // hidden is -inf; NaN is not less than anything, and counts as seen
    seen = add(seen, select_lt(score, set1(-3.40282347e38f), zero(), set1(1.0f)));
  }
  if (sum(seen) == 0.0f) {
    for (int64_t u = 0; u < kChunk; u += kLanes) store(zero(), scores + u);
    return;
  }
  float peak = max_lane(best);
  peak = *top > peak ? *top : peak;
  F added = zero();
  for (int64_t u = 0; u < kChunk; u += kLanes) {
    const F weight = exp_negative(sub(load(scores + u), set1(peak)));
    store(weight, scores + u);
    added = add(added, weight);
  }
  if (peak != *top) {
    const F decay = exp_negative(set1(*top - peak));
    float factor[kLanes];
    store(decay, factor);
    *total *= factor[0];
    for (int64_t d = 0; d < padded; d += kLanes) store(mul(load(context + d), decay), context + d);
    *top = peak;
  }
  *total += sum(added);
}

// context += weights values where a value may be NaN or Inf: hidden keys contribute nothing.
static void add_values_guarded(const FlashScratch& s, int64_t rows, int64_t n, int64_t padded) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t u = 0; u < n; ++u) {
      if (s.hidden[r] >> u & 1) continue;
      const float weight = s.scores[r * kChunk + u];
      for (int64_t d = 0; d < padded; d += kLanes) {
        float* at = s.context + r * padded + d;
        store(fma(set1(weight), load(s.values + u * padded + d), load(at)), at);
      }
    }
  }
}

// Queries [first, first + rows) of head h, batch row b, to sink(call row, column, n, values).
template <class T, class Sink>
static void flash_unit(const Attention<T, T>& a, int64_t b, int64_t h, int64_t first, int64_t rows,
                       FlashScratch s, Sink sink) {
  const int64_t dim = a.heads.head_dim, padded = pad_lanes(dim), g = h / a.group();
  for (int64_t r = 0; r < rows; ++r) {
    a.query(b, first + r, h, s.queries + r * padded);
    s.top[r] = -__builtin_inff();
    s.total[r] = 0.0f;
    for (int64_t d = 0; d < padded; d += kLanes) store(zero(), s.context + r * padded + d);
  }
  const int64_t end = a.limit(b, first + rows - 1);
  for (int64_t j = 0; j < end; j += kChunk) {
    const int64_t n = end - j < kChunk ? end - j : kChunk;
    const bool finite = load_panels(a, b, g, j, n, &s);
    multiply<false>(s.queries, rows, padded, s.keys, kChunk, dim, kChunk, s.scores, kChunk);
    const bool whole =
        n == kChunk && a.limit(b, first) >= j + kChunk && a.call.mask.kind == HFF_MASK_NONE;
    for (int64_t r = 0; r < rows; ++r) {
      s.hidden[r] = whole ? 0 : hide(a, b, first + r, j, n, s.scores + r * kChunk);
      soften(s.scores + r * kChunk, s.top + r, s.total + r, s.context + r * padded, padded);
    }
    if (finite) {
      multiply<true>(s.scores, rows, kChunk, s.values, padded, kChunk, padded, s.context, padded);
    } else {
      add_values_guarded(s, rows, n, padded);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    Softmax state{s.top[r], s.total[r], s.context + r * padded};
    finish(&state, dim);
    for (int64_t d = 0; d < dim; d += kLanes) {
      sink(a.row_index(b, first + r), h * dim + d, dim - d < kLanes ? dim - d : kLanes,
           load(state.context + d));
    }
  }
}

}  // namespace HFF_ISA
}  // namespace hff

// Attention of a few query rows against the KV cache (decode): RoPE, append, softmax, context.
//   q' = rope(q), k' = rope(k), cache <- (k', v)
//   context = softmax(scale q' K^T + mask) V, per query head
// qkv: (rows, qkv_stride) in Q (fp32 from our own projection, model dtype from torch's). cache:
//   hff_cache, model dtype.
// cos, sin: (rope_rows, rotary_dim), model dtype, used as they are. Context: fp32, the caller
//   rounds and stores it.
// Work split: a unit is one (batch row, k/v head, split of kSplit keys); its query heads share the
//   keys it reads. With one split the unit also rotates and appends; with more, appending is a
//   phase of its own. The split SIZE is fixed, so neither threads nor batch change any bit; partial
//   results are merged in split order by whoever finishes last.
// Bytes: K and V once per k/v head, from memory when the cache exceeds L2/L3. Bound: the read
//   stream.
// Rounding: k' and v once, to the cache's dtype. Scores, softmax and the weighted sum are fp32, one
//   online-softmax rescale per kChunk keys. A masked key is never touched: what lies behind a mask
//   cannot leak, NaN included. A row with nothing visible gives zeros, as torch's sdpa does.

namespace hff {
namespace HFF_ISA {

constexpr int64_t kChunk = 64;
constexpr int64_t kSplit = 512;
constexpr int kMaxHead = HFF_MAX_HEAD_DIM;

// Where head h's q and k/v head g's k and v start in a projected row.
struct HeadOffsets {
  int64_t q_stride, k_start, v_start, kv_stride;
  explicit HeadOffsets(const hff_heads& h) {
    if (h.qkv_layout == HFF_QKV_PER_HEAD) {
      q_stride = kv_stride = 3 * h.head_dim;
      k_start = h.head_dim;
      v_start = 2 * h.head_dim;
    } else {
      q_stride = kv_stride = h.head_dim;
      k_start = h.heads * h.head_dim;
      v_start = k_start + h.kv_heads * h.head_dim;
    }
  }
};

// out[0, dim) = head rotated: pairs (i, i + rotary / 2) by the angle whose cos and sin are given;
// the rest copied.
template <class Q, class T, class Out>
HFF_INLINE void rotate_head(const Q* head, const T* cos, const T* sin, int64_t rotary, int64_t dim,
                            Out* out) {
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = half - i < kLanes ? half - i : kLanes;
    const F low = load_n(head + i, n), high = load_n(head + half + i, n);
    const F low_out = sub(mul(low, load_n(cos + i, n)), mul(high, load_n(sin + i, n)));
    store_n(fma(high, load_n(cos + half + i, n), mul(low, load_n(sin + half + i, n))),
            out + half + i, n);
    store_n(low_out, out + i, n);
  }
  for (int64_t i = rotary; i < dim; i += kLanes) {
    const int64_t n = dim - i < kLanes ? dim - i : kLanes;
    store_n(load_n(head + i, n), out + i, n);
  }
}

HFF_INLINE const int64_t* starts_of(const hff_call& call) {
  return static_cast<const int64_t*>(call.starts.data);
}
HFF_INLINE int64_t rows_of(const hff_call& call) {
  return call.starts.data != nullptr ? starts_of(call)[call.batch] : call.batch * call.queries;
}

// One call's attention: everything a unit needs, shapes resolved. Without a cache (kv null) the
// call's own keys and values are read where qkv holds them, in the model dtype.
template <class T, class Q>
struct Attention {
  const hff_call& call;
  const hff_heads& heads;
  const Q* qkv;
  int64_t qkv_stride;
  HeadOffsets offsets;
  const int64_t* starts;
  hff_cache cache;
  int64_t
      past;  // *cache.length at entry; the cell itself moves only when the whole call has succeeded

  Attention(const hff_call& c, const hff_heads& h, const hff_cache* kv, const Q* projected,
            int64_t stride)
      : call(c),
        heads(h),
        qkv(projected),
        qkv_stride(stride),
        offsets(h),
        starts(starts_of(c)),
        cache(kv != nullptr ? *kv : in_place()),
        past(kv != nullptr ? *kv->length : 0) {}

  hff_cache in_place() const {
    hff_cache view = {};
    view.keys.data = const_cast<Q*>(qkv + offsets.k_start);
    view.values.data = const_cast<Q*>(qkv + offsets.v_start);
    view.token_stride = qkv_stride;
    view.head_stride = offsets.kv_stride;
    view.batch_stride = longest() * qkv_stride;
    return view;
  }
  bool kept() const { return cache.length != nullptr; }

  int64_t queries(int64_t b) const {
    return starts != nullptr ? starts[b + 1] - starts[b] : call.queries;
  }
  // No sequence has more rows; `queries` may be any number above where there are starts.
  int64_t longest() const {
    return starts != nullptr && rows_of(call) < call.queries ? rows_of(call) : call.queries;
  }
  int64_t keys() const { return past + call.queries; }
  int64_t splits() const { return (keys() + kSplit - 1) / kSplit; }
  int64_t group() const { return heads.heads / heads.kv_heads; }
  int64_t row_index(int64_t b, int64_t i) const {
    return (starts != nullptr ? starts[b] : b * call.queries) + i;
  }
  const Q* row(int64_t b, int64_t i) const { return qkv + row_index(b, i) * qkv_stride; }
  int64_t cached(int64_t b, int64_t g, int64_t token) const {
    if (starts != nullptr) return (starts[b] + token) * cache.token_stride + g * cache.head_stride;
    return b * cache.batch_stride + g * cache.head_stride + token * cache.token_stride;
  }
  // Keys [0, limit) are causally visible to query i of batch row b.
  int64_t limit(int64_t b, int64_t i) const { return past + (call.causal ? i + 1 : queries(b)); }

  template <class Out>
  void rotate(const Q* head, int64_t b, int64_t i, Out* out) const {
    if (heads.rotary_dim == 0)
      return rotate_head(head, (const T*)nullptr, (const T*)nullptr, 0, heads.head_dim, out);
    const int64_t position = static_cast<const int64_t*>(
        call.positions.data)[b * call.position_batch_stride + i * call.position_query_stride];
    const T* cos = static_cast<const T*>(call.cos.data) + position * heads.rotary_dim;
    const T* sin = static_cast<const T*>(call.sin.data) + position * heads.rotary_dim;
    rotate_head(head, cos, sin, heads.rotary_dim, heads.head_dim, out);
  }

  // Writes k' and v of queries [begin, end) behind the cached tokens of (b, g); without a cache, k'
  // over k.
  void append(int64_t b, int64_t g, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const Q* projected = row(b, i);
      const int64_t at = cached(b, g, past + i);
      rotate(projected + offsets.k_start + g * offsets.kv_stride, b, i,
             static_cast<T*>(cache.keys.data) + at);
      if (!kept()) continue;
      const Q* v = projected + offsets.v_start + g * offsets.kv_stride;
      rotate_head(v, (const T*)nullptr, (const T*)nullptr, 0, heads.head_dim,
                  static_cast<T*>(cache.values.data) + at);
    }
  }

  // Rotated, scaled, zero-padded q of head h, fp32.
  void query(int64_t b, int64_t i, int64_t h, float* q) const {
    rotate(row(b, i) + h * offsets.q_stride, b, i, q);
    const F scale = set1(heads.scale);
    for (int64_t d = 0; d < heads.head_dim; d += kLanes) {
      const int64_t n = heads.head_dim - d < kLanes ? heads.head_dim - d : kLanes;
      store(mul(load_n(q + d, n), scale), q + d);
    }
  }
};

// An additive mask hides a key where it is at or below the dtype's lowest value, which is how
// Hugging Face writes "no".
template <class T>
HFF_INLINE constexpr float lowest_of() {
  return std::is_same<T, f16>::value ? -65504.0f : -3.38e38f;
}

// The visible keys among [begin, end): their numbers into list, their additive bias (0 where none)
// into bias.
template <class T>
static int64_t visible_keys(const hff_mask& mask, int64_t b, int64_t i, int64_t begin, int64_t end,
                            int32_t* list, float* bias) {
  const int64_t base = b * mask.batch_stride + i * mask.query_stride;
  int64_t n = 0;
  for (int64_t j = begin; j < end; ++j) {
    const int64_t at = base + j * mask.key_stride;
    float add = 0.0f;
    bool seen = true;
    if (mask.kind == HFF_MASK_BOOL) {
      seen = static_cast<const uint8_t*>(mask.data.data)[at] != 0;
    } else if (mask.kind == HFF_MASK_INT64) {
      seen = static_cast<const int64_t*>(mask.data.data)[at] != 0;
    } else if (mask.kind == HFF_MASK_ADDITIVE) {
      add = to_float(static_cast<const T*>(mask.data.data)[at]);
      seen = !(add <= lowest_of<T>());
    }
    list[n] = static_cast<int32_t>(j - begin);
    bias[n] = add;
    n += seen;
  }
  return n;
}

// Running softmax of one query head: context = sum / total once all keys are in.
struct Softmax {
  float top, total;
  float* context;  // (head_dim, padded to kLanes), fp32
  void clear(int64_t padded) {
    top = -__builtin_inff();
    total = 0.0f;
    for (int64_t d = 0; d < padded; d += kLanes) store(zero(), context + d);
  }
};

HFF_INLINE int64_t pad_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// scores[0, n) = q . key + bias for the n listed keys (all of 0 .. n-1 without a list).
template <class T>
static void score_keys(const T* keys, int64_t stride, const int32_t* list, const float* bias,
                       int64_t n, const float* q, int64_t dim, float* scores) {
  const int64_t whole = dim / kLanes * kLanes;
  for (int64_t j = 0; j < n; j += 4) {
    const T* at[4];
    for (int64_t u = 0; u < 4; ++u) {
      const int64_t key = j + u < n ? j + u : n - 1;
      at[u] = keys + (list != nullptr ? list[key] : key) * stride;
    }
    F sums[4] = {zero(), zero(), zero(), zero()};
    int64_t d = 0;
    for (; d < whole; d += kLanes) {
      const F qv = load(q + d);
      for (int u = 0; u < 4; ++u) sums[u] = fma(load(at[u] + d), qv, sums[u]);
    }
    if (d < dim) {
      const F qv = load(q + d);
      for (int u = 0; u < 4; ++u) sums[u] = fma(load_n(at[u] + d, dim - d), qv, sums[u]);
    }
    for (int64_t u = 0; u < 4 && j + u < n; ++u)
      scores[j + u] = sum(sums[u]) + (bias != nullptr ? bias[j + u] : 0.0f);
  }
}

// context = context * decay + sum_j weight[j] value[j], four vectors of head_dim in registers at a
// time.
template <class T>
static void add_values(const T* values, int64_t stride, const int32_t* list, const float* weights,
                       int64_t n, float decay, int64_t dim, float* context) {
  const F old = set1(decay);
  for (int64_t d = 0; d < dim; d += 4 * kLanes) {
    const int64_t width = dim - d;
    if (width >= 4 * kLanes) {
      F sums[4];
      for (int u = 0; u < 4; ++u) sums[u] = mul(load(context + d + u * kLanes), old);
      for (int64_t j = 0; j < n; ++j) {
        const T* value = values + (list != nullptr ? list[j] : j) * stride + d;
        const F w = set1(weights[j]);
        for (int u = 0; u < 4; ++u) sums[u] = fma(load(value + u * kLanes), w, sums[u]);
      }
      for (int u = 0; u < 4; ++u) store(sums[u], context + d + u * kLanes);
      continue;
    }
    for (int64_t e = d; e < dim; e += kLanes) {
      const int64_t left = dim - e < kLanes ? dim - e : kLanes;
      F sums = mul(load(context + e), old);
      for (int64_t j = 0; j < n; ++j) {
        const T* value = values + (list != nullptr ? list[j] : j) * stride + e;
        sums = fma(load_n(value, left), set1(weights[j]), sums);
      }
      store(sums, context + e);
    }
  }
}

// Turns n scores, with room for a vector more, into weights; returns what the context is to be
// multiplied with, or -1 where there is nothing but -inf, which weighs nothing.
static float weigh(float* scores, int64_t n, Softmax* state) {
  float top = state->top;
  bool dead = true;
  for (int64_t j = 0; j < n; ++j) {
    top = scores[j] > top ? scores[j] : top;
    dead &= scores[j] == -__builtin_inff();
  }
  if (dead) return -1.0f;
  F total = zero();
  for (int64_t j = n; j < pad_lanes(n); ++j) scores[j] = -__builtin_inff();
  for (int64_t j = 0; j < n; j += kLanes) {
    const F weight = exp_negative(sub(load(scores + j), set1(top)));
    store(weight, scores + j);
    total = add(total, keep_first(weight, n - j));
  }
  float decay[kLanes];
  store(exp_negative(set1(state->top - top)), decay);
  state->total = state->total * decay[0] + sum(total);
  state->top = top;
  return decay[0];
}

// Folds the listed keys of one chunk into the running softmax.
template <class T>
static void fold_chunk(const T* keys, int64_t key_stride, const T* values, int64_t value_stride,
                       const int32_t* list, const float* bias, int64_t n, const float* q,
                       int64_t dim, Softmax* state) {
  float scores[kChunk + kLanes];
  score_keys(keys, key_stride, list, bias, n, q, dim, scores);
  const float decay = weigh(scores, n, state);
  if (decay < 0.0f) return;
  add_values(values, value_stride, list, scores, n, decay, dim, state->context);
}

// Query (b, i) of head h over keys [begin, end).
template <class T, class Q>
static void attend_query(const Attention<T, Q>& a, int64_t b, int64_t i, int64_t h, int64_t begin,
                         int64_t end, Softmax* state) {
  float q[kMaxHead + kLanes], bias[kChunk];
  int32_t list[kChunk];
  const int64_t g = h / a.group(), dim = a.heads.head_dim;
  a.query(b, i, h, q);
  state->clear(pad_lanes(dim));
  if (end > a.limit(b, i)) end = a.limit(b, i);
  const bool masked = a.call.mask.kind != HFF_MASK_NONE;
  for (int64_t j = begin; j < end; j += kChunk) {
    const int64_t stop = end - j < kChunk ? end : j + kChunk;
    const int64_t n = masked ? visible_keys<T>(a.call.mask, b, i, j, stop, list, bias) : stop - j;
    if (n == 0) continue;
    const int64_t at = a.cached(b, g, j);
    const T* keys = static_cast<const T*>(a.cache.keys.data) + at;
    const T* values = static_cast<const T*>(a.cache.values.data) + at;
    const bool all = n == stop - j;
    fold_chunk(keys, a.cache.token_stride, values, a.cache.token_stride, all ? nullptr : list,
               a.call.mask.kind == HFF_MASK_ADDITIVE ? bias : nullptr, n, q, dim, state);
  }
}

// Divides by the total; zeros where nothing was visible.
HFF_INLINE void finish(Softmax* state, int64_t dim) {
  const F scale = set1(state->total == 0.0f ? 0.0f : 1.0f / state->total);
  for (int64_t d = 0; d < dim; d += kLanes)
    store(mul(load(state->context + d), scale), state->context + d);
}

// Floats one (row, head, split) keeps for the merge: top, total, context.
HFF_INLINE int64_t partial_floats(int64_t dim) { return pad_lanes(dim) + kLanes; }

// context of `splits` partials at p, merged in split order.
static void merge_partials(const float* p, int64_t splits, int64_t dim, Softmax* state) {
  const int64_t step = partial_floats(dim);
  state->clear(pad_lanes(dim));
  for (int64_t s = 0; s < splits; ++s) {
    const float* part = p + s * step;
    if (part[1] == 0.0f) continue;
    const float top = part[0] > state->top ? part[0] : state->top;
    float factors[2 * kLanes];
    store(exp_negative(set1(state->top - top)), factors);
    store(exp_negative(set1(part[0] - top)), factors + kLanes);
    state->total = state->total * factors[0] + part[1] * factors[kLanes];
    state->top = top;
    for (int64_t d = 0; d < dim; d += kLanes) {
      const F old = mul(load(state->context + d), set1(factors[0]));
      store(fma(load(part + kLanes + d), set1(factors[kLanes]), old), state->context + d);
    }
  }
  finish(state, dim);
}

}  // namespace HFF_ISA
}  // namespace hff

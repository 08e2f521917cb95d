// Flash attention: a block of keys at a time, softmax online, no scores in memory.
//   per block: S = scale q K^T + mask; m' = max(m, max S); P = exp(S - m')
//              total = exp(m - m') total + sum P; context = exp(m - m') context + P V; m = m'
//   out = context / total
// Work split: a unit is (batch row, k/v head, block of rows, split of keys), blocks with most keys
//   first under causality. It packs a block of keys and values as panels (pack-inl.h), then takes
//   its rows in tiles of registers (gemm-inl.h): scores, weights and product of a tile stay in L1.
//   Up to kSplitRows rows of a k/v head are split over keys, kSplit at a time: the size is fixed,
//   so no bit depends on threads or batch; the splits' results are merged in their order. Up to
//   kRowwise rows (decode) take keys and values as they lie (attention-inl.h), a chunk at a time
//   for all heads of a group, which share its loads kTogether at a time where they see the same
//   keys.
// Scratch per thread: queries and context of a block, panels of a block of keys; no term grows with
//   queries or keys but the splits' results.
// Bytes: K and V once per block of rows, or once per decode. Bound: multiply-adds; decode: the read
//   stream.

namespace hff {
namespace HFF_ISA {

constexpr int64_t kSplitRows = 64;
constexpr int64_t kRowwise = 8;
constexpr float kFarPeak = 0x1p15f;  // rounded by 2^-9 and more, which a weight of bf16 shows
constexpr int64_t kTogether = 4;     // rows by four vectors of context: 16 sums, 4 values, a weight

// scores[r][0, n) = q[r] . key of the n listed keys (all of 0 .. n-1 without a list).
template <class T>
static void score_together(const T* keys, int64_t stride, const int32_t* list, int64_t n,
                           const float (*q)[kMaxHead + kLanes], int64_t dim,
                           float (*scores)[kChunk + kLanes]) {
  const int64_t whole = dim / kLanes * kLanes;
  for (int64_t j = 0; j < n; ++j) {
    const T* key = keys + (list != nullptr ? list[j] : j) * stride;
    F sums[kTogether] = {zero(), zero(), zero(), zero()};
    for (int64_t d = 0; d < whole; d += kLanes) {
      const F k = load(key + d);
      for (int r = 0; r < kTogether; ++r) sums[r] = fma(k, load(q[r] + d), sums[r]);
    }
    if (whole < dim) {
      const F k = load_n(key + whole, dim - whole);
      for (int r = 0; r < kTogether; ++r) sums[r] = fma(k, load(q[r] + whole), sums[r]);
    }
    for (int r = 0; r < kTogether; ++r) scores[r][j] = sum(sums[r]);
  }
}

// kVectorsWide vectors of context[r] = context[r] * decay[r] + sum_j weights[r][j] value[j], rows
// `room` apart; the last vector has `tail` elements.
template <class T, int kVectorsWide>
static void add_columns(const T* values, int64_t stride, const int32_t* list,
                        const float (*weights)[kChunk + kLanes], int64_t n, const float* decay,
                        int64_t tail, float* context, int64_t room) {
  F sums[kTogether][kVectorsWide];
  for (int r = 0; r < kTogether; ++r) {
    for (int v = 0; v < kVectorsWide; ++v)
      sums[r][v] = mul(load(context + r * room + v * kLanes), set1(decay[r]));
  }
  for (int64_t j = 0; j < n; ++j) {
    const T* value = values + (list != nullptr ? list[j] : j) * stride;
    F x[kVectorsWide];
    for (int v = 0; v < kVectorsWide - 1; ++v) x[v] = load(value + v * kLanes);
    x[kVectorsWide - 1] = load_n(value + (kVectorsWide - 1) * kLanes, tail);
    for (int r = 0; r < kTogether; ++r) {
      const F w = set1(weights[r][j]);
      for (int v = 0; v < kVectorsWide; ++v) sums[r][v] = fma(x[v], w, sums[r][v]);
    }
  }
  for (int r = 0; r < kTogether; ++r) {
    for (int v = 0; v < kVectorsWide; ++v) store(sums[r][v], context + r * room + v * kLanes);
  }
}

template <class T>
static void add_together(const T* values, int64_t stride, const int32_t* list,
                         const float (*weights)[kChunk + kLanes], int64_t n, const float* decay,
                         int64_t dim, float* context, int64_t room) {
  constexpr int64_t kWide = 4 * kLanes;
  int64_t d = 0;
  for (; d + kWide <= dim; d += kWide)
    add_columns<T, 4>(values + d, stride, list, weights, n, decay, kLanes, context + d, room);
  for (; d < dim; d += kLanes) {
    const int64_t tail = dim - d < kLanes ? dim - d : kLanes;
    add_columns<T, 1>(values + d, stride, list, weights, n, decay, tail, context + d, room);
  }
}

template <class T, class P>
struct FlashAttend {
  using Input = typename P::Input;
  static constexpr int64_t kRows = tile_rows<P>();
  AttendTiles<T, P> tiles;
  float *scores, *tops;  // (panels of a block, kRows, kPanel), (block_queries)
  Input* weights;        // (kRows, weight_room)
  int64_t weight_room;

  void carve(Arena* arena, const hff_attend_io& io, const AttendBlocks& blocks) {
    tiles.carve(arena, io, blocks.queries, blocks.keys);
    scores = arena->take<float>(blocks.keys * kRows);
    tops = arena->take<float>(blocks.queries);
    weight_room = blocks.keys + 64 / static_cast<int64_t>(sizeof(Input));
    weights = arena->take<Input>(kRows * weight_room);
  }

  // The largest of a row's scores, from its products q k^T, panels kRows * kPanel apart.
  // `bias` is for the panels from `open` on, whose scores are stored; those before are seen whole.
  HFF_ALWAYS_INLINE static float peak_of(float* row, int64_t open, int64_t panels, F scale,
                                         const float* bias) {
    F best = set1(kHidden);
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t v = 0; v < kPanel; v += kLanes) {
        float* at = row + p * kRows * kPanel + v;
        F score = mul(load(at), scale);
        if (p >= open) store(score = biased(score, bias + (p - open) * kPanel + v), at);
        best = max(score, best);
      }
    }
    return largest(best);
  }
  // The same row to weights under a `peak`; returns exp(m - m'). Scores that are not stored are
  // scaled again, exactly, but the peak has been rounded: where that shows, so are they.
  HFF_ALWAYS_INLINE static float soften(float* row, int64_t open, int64_t panels, F scale,
                                        float peak, Input* out, float* top, float* total) {
    peak = *top > peak ? *top : peak;
    if (open == 0 && peak == kHidden && panels_hidden(row, panels)) {
      for (int64_t j = 0; j < panels * kPanel; j += kLanes) store(zero(), out + j);
      return 1.0f;
    }
    if (open > 0 && !(__builtin_fabsf(peak) < kFarPeak)) {
      scale_panels(row, open, scale);
      open = 0;
    }
    const F less = set1(-peak);
    F added = zero();
    for (int64_t p = 0; p < panels; ++p) {
      const F by = p < open ? scale : set1(1.0f);
      for (int64_t v = 0; v < kPanel; v += kLanes) {
        const F score = load(row + p * kRows * kPanel + v);
        const F weight = exp_negative_for<T>(fma(score, by, less));
        store_input_n(weight, out + p * kPanel + v, kLanes);
        added = add(added, weight);
      }
    }
    float decay = 1.0f;
    if (peak != *top && *top != kHidden) {
      float factor[kLanes];
      store(exp_negative(set1(*top - peak)), factor);
      decay = factor[0];
    }
    *top = peak;
    *total = *total * decay + sum(added);
    return decay;
  }
  static void scale_panels(float* row, int64_t panels, F scale) {
    for (int64_t p = 0; p < panels; ++p, row += kRows * kPanel) {
      for (int64_t v = 0; v < kPanel; v += kLanes) store(mul(load(row + v), scale), row + v);
    }
  }
  static bool panels_hidden(const float* row, int64_t panels) {
    for (int64_t p = 0; p < panels; ++p) {
      if (!all_hidden(row + p * kRows * kPanel, kPanel)) return false;
    }
    return true;
  }

  // Folds keys [j, j + n), packed as the first of `block` keys, into rows [row, row + count).
  void fold_tile(const Attend<T>& a, int64_t b, int64_t g, int64_t first, int64_t row,
                 int64_t count, int64_t j, int64_t n, int64_t block, bool finite) const {
    const int64_t panels = panels_of(n), dim = a.io.head_dim;
    const int64_t seen = a.seen_by_all(first + row, count, j, n), open = seen / kPanel;
    const int64_t from = open * kPanel;  // the first key with a bias
    const F scale = set1(a.io.scale);
    float peaks[kRows], decay[kRows];
    for (int64_t p = 0; p < panels; ++p) {
      multiply_rows<P>(count, tiles.queries.row(row), tiles.queries.stride,
                       tiles.keys + p * panel_elements<P>(dim), dim, scores + p * kRows * kPanel);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = first + row + r, h = a.head_of(g, at);
      if (open < panels && (r == 0 || seen < n))
        bias_of(a, b, h, a.query_of(at), j + from, n - from, panels * kPanel - from, tiles.bias);
      peaks[r] = peak_of(scores + r * kPanel, open, panels, scale, tiles.bias);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = first + row + r, h = a.head_of(g, at);
      Input* out = weights + r * weight_room;
      decay[r] = soften(scores + r * kPanel, open, panels, scale, peaks[r], out, tops + row + r,
                        tiles.totals + row + r);
      if (finite) continue;
      float* context = tiles.context + (row + r) * tiles.context_room;
      for (int64_t d = 0; d < tiles.context_room; d += kLanes)
        store(mul(load(context + d), set1(decay[r])), context + d);
      bias_of(a, b, h, a.query_of(at), j, n, n, tiles.bias);
      add_seen_values(a, b, g, j, n, out, tiles.bias, context);
    }
    if (finite) tiles.add_values(row, count, weights, weight_room, panels * kPanel, block, decay);
  }

  // Rows [first, first + rows) of (b, g) over keys [begin, end) of those they see.
  void run(const Attend<T>& a, int64_t b, int64_t g, int64_t first, int64_t rows, int64_t begin,
           int64_t end, int64_t block) const {
    tiles.load_rows(a, b, g, first, rows);
    for (int64_t r = 0; r < rows; ++r) tops[r] = kHidden;
    for (int64_t j = begin; j < end; j += block) {
      const int64_t n = end - j < block ? end - j : block;
      tiles.load_keys(a, b, g, j, n);
      const bool finite = pack_values<T, P>(a, b, g, j, n, whole_panels(n), tiles.values);
      each_tile<P>(rows, [&](int64_t row, int64_t count) {
        const int64_t low = a.query_of(first + row), high = a.query_of(first + row + count - 1);
        const int64_t seen = a.limit(high) - j < n ? a.limit(high) - j : n;
        if (seen > 0 && a.first(low) < j + seen)
          fold_tile(a, b, g, first, row, count, j, seen, whole_panels(n), finite);
      });
    }
  }

  // The same row by row, from keys and values as they lie.
  void run_rows(const Attend<T>& a, int64_t b, int64_t g, int64_t rows, int64_t begin,
                int64_t end) const {
    float q[kRowwise][kMaxHead + kLanes];
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = a.q(b, a.head_of(g, r), a.query_of(r));
      for (int64_t d = 0; d < a.io.head_dim; d += kLanes)
        store(mul(load_n(from + d, a.io.head_dim - d), set1(a.io.scale)), q[r] + d);
      Softmax state{kHidden, 0.0f, tiles.context + r * tiles.context_room};
      state.clear(pad_lanes(a.io.head_dim));
      tops[r] = kHidden;
      tiles.totals[r] = 0.0f;
    }
    const bool alike = a.io.queries == 1 && (!a.masked() || a.io.mask_head_stride == 0);
    for (int64_t j = begin; j < end; j += kChunk) {
      const int64_t stop = end - j < kChunk ? end : j + kChunk;
      int64_t r = 0;
      for (; alike && r + kTogether <= rows; r += kTogether)
        fold_together(a, b, g, r, j, stop, q + r);
      for (; r < rows; ++r) fold_row(a, b, g, r, j, stop, q[r]);
    }
  }

  void fold_row(const Attend<T>& a, int64_t b, int64_t g, int64_t r, int64_t j, int64_t stop,
                const float* q) const {
    const int64_t i = a.query_of(r), h = a.head_of(g, r);
    const int64_t begin = j < a.first(i) ? a.first(i) : j;
    const int64_t end = stop > a.limit(i) ? a.limit(i) : stop;
    if (begin >= end) return;
    int32_t list[kChunk];
    float bias[kChunk];
    const bool masked = a.masked();
    const int64_t n =
        masked ? visible_keys<T>(a.mask_of(h), b, i, begin, end, list, bias) : end - begin;
    if (n == 0) return;
    Softmax state{tops[r], tiles.totals[r], tiles.context + r * tiles.context_room};
    fold_chunk(a.k(b, g, begin), a.io.k_strides.token, a.v(b, g, begin), a.io.v_strides.token,
               n == end - begin ? nullptr : list,
               a.io.mask.kind == HFF_MASK_ADDITIVE ? bias : nullptr, n, q, a.io.head_dim, &state);
    tops[r] = state.top;
    tiles.totals[r] = state.total;
  }

  // Heads [r, r + kTogether) of the only query, which see the same keys; `j` and `stop` are within.
  void fold_together(const Attend<T>& a, int64_t b, int64_t g, int64_t r, int64_t j, int64_t stop,
                     const float (*q)[kMaxHead + kLanes]) const {
    int32_t list[kChunk];
    float bias[kChunk], scores[kTogether][kChunk + kLanes], decay[kTogether];
    const int64_t n = a.masked()
                          ? visible_keys<T>(a.mask_of(a.head_of(g, r)), b, 0, j, stop, list, bias)
                          : stop - j;
    if (n == 0) return;
    const int32_t* listed = n == stop - j ? nullptr : list;
    score_together(a.k(b, g, j), a.io.k_strides.token, listed, n, q, a.io.head_dim, scores);
    for (int64_t u = 0; u < kTogether; ++u) {
      for (int64_t x = 0; a.io.mask.kind == HFF_MASK_ADDITIVE && x < n; ++x)
        scores[u][x] += bias[x];
      Softmax state{tops[r + u], tiles.totals[r + u], nullptr};
      decay[u] = weigh(scores[u], n, &state);
      tops[r + u] = state.top;
      tiles.totals[r + u] = state.total;
      if (decay[u] >= 0.0f) continue;
      decay[u] = 1.0f;
      for (int64_t x = 0; x < n; ++x) scores[u][x] = 0.0f;
    }
    add_together(a.v(b, g, j), a.io.v_strides.token, listed, scores, n, decay, a.io.head_dim,
                 tiles.context + r * tiles.context_room, tiles.context_room);
  }
};

}  // namespace HFF_ISA
}  // namespace hff

// y[r][i] = sum_k W[i][k] x[r][k]: a few rows r against weight rows streamed once from memory.
//   W: (rows, cols), model dtype, row_stride apart. x: (r, cols) as Operand<T> (below),
//   already rounded to the model dtype, as Hugging Face's Linear sees it. y: fp32, unrounded.
// Work split: a thread owns a contiguous share of the rows and walks it in memory order, block by
//   block; when done it takes blocks from others (team.h, Shares). A dot stays in one thread and
//   adds into kChains sums by column, whatever the number of inputs, so a row's bits do not depend
//   on the batch or on threads.
// Bytes: rows * cols weights, once from memory per call; inputs and outputs stay in L1/L2. Bound:
//   the read stream.
// kChains = 2: a 64-byte line takes about 13 cycles to arrive, two sums hide the latency of a
//   multiply-add.
// Prefetch: how memory is asked for weights (prefetch.h). Non-temporally where that is as fast:
//   weights are read once a token, and kept out of L2 and L3 they leave Python's own working set
//   there. A token of pythia-160m bf16 in generate() takes 0.83-0.85 of the stream with plain
//   prefetches, 0.97-1.0 so (Zen 5).
// Tiles: one or two inputs wait for memory, rows strictly in order. More wait for arithmetic: rows
//   by inputs by chains of sums share their loads, as many as there are registers. With 16: 2 x 3 x
//   2. With 32: 2 x 4 x 2 for three and four inputs, whose weights still come late; then 4 x 4, one
//   chain after the other, while four rows and four inputs stay in L1 (kSplitBytes), else 4 x 3 x
//   2, which two inputs take, too, where they do not stay there beside the weights (kNearBytes).
// kTilesAhead: rows that share inputs are read again for each group of inputs, so those of the
//   tiles to come go to L2 meanwhile. Each group asks again, which is faster than the first alone.
// Lost on Zen 5: four rows side by side instead of memory order (37 against 41 GB/s), blocks drawn
//   from one counter instead of contiguous shares (36 against 41).
// bf16 with AVX512_BF16: vdpbf16ps on pairs, fp32 sums; denormal inputs count as zero there, as in
//   oneDNN's bf16 path.
// f16 never uses AVX512-FP16 arithmetic: its sums would be fp16. The conversion is in AVX-512F and
//   hides in the stream.

namespace hff {
namespace HFF_ISA {

constexpr int kChains = 2;
constexpr int64_t kNearBytes = 16 * 1024;
constexpr int64_t kSplitBytes = 32 * 1024;
constexpr int64_t kTilesAhead = 4;

// What a weight type is multiplied with.
template <class T>
struct OperandOf {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct OperandOf<bf16> {
  using type = bf16;
};
#endif
template <class T>
using Operand = typename OperandOf<T>::type;

template <class T>
constexpr int32_t kDtypeOf = std::is_same<T, float>::value  ? HFF_F32
                             : std::is_same<T, bf16>::value ? HFF_BF16
                                                            : HFF_F16;

// Rounds fp32 values to T and stores them as T's operand.
template <class T>
HFF_INLINE void store_operand_n(F v, Operand<T>* out, int64_t n) {
  if constexpr (sizeof(Operand<T>) == sizeof(T)) {
    store_n(v, out, n);
  } else {
    T rounded[kLanes];
    store(v, rounded);
    store_n(load(rounded), out, n);
  }
}

template <class T>
static void to_operand(const float* x, int64_t n, Operand<T>* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    store_operand_n<T>(load_n(x + i, left), out + i, left);
  }
}

HFF_INLINE void prefetch(const void* p, int64_t ahead) {
  __builtin_prefetch(static_cast<const char*>(p) + ahead, 0, 0);
}
HFF_INLINE void prefetch_to_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

// kWidth elements of a weight row times the same of an input, added to a sum.
template <class T>
struct Step {
  static constexpr int64_t kWidth = kLanes;
  using Vector = F;
  HFF_INLINE F weight(const T* p) { return load(p); }
  HFF_INLINE F weight_n(const T* p, int64_t n) { return load_n(p, n); }
  HFF_INLINE F input(const float* p) { return load(p); }
  HFF_INLINE F input_n(const float* p, int64_t n) { return load_n(p, n); }
  HFF_INLINE F dot(F w, F x, F sum) { return fma(w, x, sum); }
};
#if defined(__AVX512BF16__)
template <>
struct Step<bf16> {
  static constexpr int64_t kWidth = 32;
  using Vector = __m512i;
  HFF_INLINE __m512i weight(const bf16* p) { return _mm512_loadu_si512(p); }
  HFF_INLINE __m512i weight_n(const bf16* p, int64_t n) {
    return _mm512_maskz_loadu_epi16(n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1, p);
  }
  HFF_INLINE __m512i input(const bf16* p) { return weight(p); }
  HFF_INLINE __m512i input_n(const bf16* p, int64_t n) { return weight_n(p, n); }
  HFF_INLINE F dot(__m512i w, __m512i x, F sum) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x))};
  }
};
#endif

// y[c * y_stride + r] = sum(sums[r][c]).
template <int N, int M>
HFF_INLINE void store_sums(const F (&sums)[N][M], float* y, int64_t y_stride) {
  for (int r = 0; r < N; ++r) {
    for (int c = 0; c < M; ++c) y[c * y_stride + r] = sum(sums[r][c]);
  }
}
#if defined(__AVX512F__)
// The same additions for four rows by four inputs at once: halves, quarters, pairs, lanes.
template <int M>
HFF_INLINE void store_sums(const F (&sums)[4][M], float* y, int64_t y_stride) {
  __m512 rows[4];  // of each input a quarter
  for (int r = 0; r < 4; ++r) {
    __m512 halves[2];  // of two inputs; past the last one it stands in for others
    for (int h = 0; h < 2; ++h) {
      const __m512 a = sums[r][2 * h < M ? 2 * h : M - 1].v;
      const __m512 b = sums[r][2 * h + 1 < M ? 2 * h + 1 : M - 1].v;
      halves[h] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    rows[r] = _mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                            _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
  }
  __m512 pairs[2];
  for (int p = 0; p < 2; ++p) {
    const __m512d a = _mm512_castps_pd(rows[2 * p]), b = _mm512_castps_pd(rows[2 * p + 1]);
    pairs[p] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  float lanes[4][4];
  _mm512_storeu_ps(lanes, _mm512_add_ps(_mm512_shuffle_ps(pairs[0], pairs[1], 0x88),
                                        _mm512_shuffle_ps(pairs[0], pairs[1], 0xdd)));
  for (int c = 0; c < M; ++c) std::memcpy(y + c * y_stride, lanes[c], sizeof lanes[c]);
}
#endif

// y[c * y_stride + r] for N weight rows (at w, w + row_stride, ...) and M inputs, C chains at a
// time. Weights are asked for `ahead` bytes ahead, into L2 or non-temporally.
template <class T, int N, int M, int C, bool kToL2>
HFF_INLINE void dot_tile(const T* w, int64_t row_stride, int64_t cols, const Operand<T>* x,
                         int64_t x_stride, int64_t ahead, float* y, int64_t y_stride) {
  using S = Step<T>;
  static_assert(kChains == 2 && (C == 1 || C == 2), "the first chain, the second, or both");
  F sums[N][M];
  const auto walk = [&](auto first) HFF_LAMBDA_INLINE {
    F chains[C][N][M];
    for (int i = 0; i < C * N * M; ++i) chains[i / M / N][i / M % N][i % M] = zero();
    int64_t k = first * S::kWidth;
    for (; k + C * S::kWidth <= cols; k += kChains * S::kWidth) {
      for (int u = 0; u < C; ++u) {
        const int64_t at = k + u * S::kWidth;
        typename S::Vector rows[N];
        for (int r = 0; r < N; ++r) {
          const T* p = w + r * row_stride + at;
          if ((first + u) * S::kWidth * static_cast<int64_t>(sizeof(T)) % 64 == 0) {
            if constexpr (kToL2) {
              prefetch_to_l2(reinterpret_cast<const char*>(p) + ahead);
            } else {
              prefetch(p, ahead);
            }
          }
          rows[r] = S::weight(p);
        }
        for (int c = 0; c < M; ++c) {
          const typename S::Vector in = S::input(x + c * x_stride + at);
          for (int r = 0; r < N; ++r) chains[u][r][c] = S::dot(rows[r], in, chains[u][r][c]);
        }
      }
    }
    // a chain named by a variable would keep all of them on the stack
    const auto finish = [&](auto u) HFF_LAMBDA_INLINE {
      const int64_t at = k + u * S::kWidth;
      if (at >= cols) return;
      for (int r = 0; r < N; ++r) {
        const typename S::Vector row = S::weight_n(w + r * row_stride + at, cols - at);
        for (int c = 0; c < M; ++c) {
          const typename S::Vector in = S::input_n(x + c * x_stride + at, cols - at);
          chains[u][r][c] = S::dot(row, in, chains[u][r][c]);
        }
      }
    };
    finish(std::integral_constant<int, 0>{});
    if constexpr (C == 2) finish(std::integral_constant<int, 1>{});
    for (int r = 0; r < N; ++r) {
      for (int c = 0; c < M; ++c) {
        const F before = C == 2 ? chains[C - 1][r][c] : sums[r][c];
        sums[r][c] = C == 1 && first == 0 ? chains[0][r][c] : add(chains[0][r][c], before);
      }
    }
  };
  walk(std::integral_constant<int, 0>{});
  if constexpr (C == 1) walk(std::integral_constant<int, 1>{});
  store_sums(sums, y, y_stride);
}

// N weight rows against all inputs, up to M at a time.
template <class T, int N, int M, int C, bool kToL2>
HFF_INLINE void dot_rows(const T* w, int64_t row_stride, int64_t cols, const Operand<T>* x,
                         int64_t x_stride, int64_t inputs, int64_t ahead, float* y,
                         int64_t y_stride) {
  int64_t c = 0;
  const auto some = [&](auto count) HFF_LAMBDA_INLINE {
    dot_tile<T, N, count, C, kToL2>(w, row_stride, cols, x + c * x_stride, x_stride, ahead,
                                    y + c * y_stride, y_stride);
    c += count;
  };
  while (c < inputs) {
    const int64_t left = inputs - c;
    if (left == M || left > M + 1) {
      some(std::integral_constant<int, M>{});
    } else if (M == 4 && left != 2 && left != 1) {  // 3, or of 5 the first
      some(std::integral_constant<int, 3>{});
    } else if (left > 1) {
      some(std::integral_constant<int, 2>{});
    } else {
      some(std::integral_constant<int, 1>{});
    }
  }
}

// Weight rows [begin, end) of `linear` against `inputs` rows of x: y[input * y_stride + row -
// begin].
template <class T>
static void gemv(const hff_linear& linear, int64_t begin, int64_t end, const Operand<T>* x,
                 int64_t x_stride, int64_t inputs, float* y, int64_t y_stride) {
  const T* w = static_cast<const T*>(linear.weight.data);
  const int64_t stride = linear.row_stride, cols = linear.cols;
  const int64_t input_bytes = cols * static_cast<int64_t>(sizeof(Operand<T>));
  const int64_t row_bytes = cols * static_cast<int64_t>(sizeof(T));
  int64_t i = begin;
  const auto tiles = [&](auto n, auto m, auto c) HFF_LAMBDA_INLINE {
    const int64_t ahead = kTilesAhead * n * stride * static_cast<int64_t>(sizeof(T));
    for (; i + n <= end; i += n)
      dot_rows<T, n, m, c, true>(w + i * stride, stride, cols, x, x_stride, inputs, ahead,
                                 y + i - begin, y_stride);
  };
  constexpr std::integral_constant<int, 1> k1{};
  constexpr std::integral_constant<int, 2> k2{};
  constexpr std::integral_constant<int, 3> k3{};
  constexpr std::integral_constant<int, 4> k4{};
  if constexpr (kLanes == 16) {
    if (inputs == 3 || inputs == 4) {
      tiles(k2, k4, k2);
    } else if (inputs > 4 && 4 * (row_bytes + input_bytes) <= kSplitBytes) {
      tiles(k4, k4, k1);
    } else if (inputs > 4 || (inputs == 2 && 2 * input_bytes > kNearBytes)) {
      tiles(k4, k3, k2);
    }
  } else if (inputs > 2) {
    tiles(k2, k3, k2);
  }
  const int32_t how = prefetch_choice_of(kDtypeOf<T>, inputs).now();
  const int64_t ahead = how == HFF_PREFETCH_LINE ? 0 : kAhead;
  const auto in_order = [&](auto to_l2) {
    for (; i < end; ++i)
      dot_rows<T, 1, 2, 2, to_l2.value>(w + i * stride, stride, cols, x, x_stride, inputs, ahead,
                                        y + i - begin, y_stride);
  };
  if (how == HFF_PREFETCH_TO_L2 && inputs <= kTriedRows) return in_order(std::true_type{});
  in_order(std::false_type{});
}

// Rows are taken in blocks of about 32 KB: small enough to balance threads to a microsecond, large
// enough to amortise the epilogue.
constexpr int64_t kBlockBytes = 32 * 1024;
constexpr int64_t kMaxBlockRows = 128;

template <class T>
HFF_INLINE int64_t block_rows(int64_t cols) {
  const int64_t rows = kBlockBytes / (cols * static_cast<int64_t>(sizeof(T))) / 4 * 4;
  return rows < 4 ? 4 : rows > kMaxBlockRows ? kMaxBlockRows : rows;
}
HFF_INLINE int64_t blocks_of(int64_t rows, int64_t per_block) {
  return (rows + per_block - 1) / per_block;
}

// y (fp32, n values of one input, weight rows from `begin` on) + bias, in place.
template <class T>
HFF_INLINE void add_bias(const hff_linear& linear, int64_t begin, int64_t n, float* y) {
  if (linear.bias.data == nullptr) return;
  const T* bias = static_cast<const T*>(linear.bias.data) + begin;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    store_n(add(load_n(y + i, left), load_n(bias + i, left)), y + i, left);
  }
}

}  // namespace HFF_ISA
}  // namespace hff

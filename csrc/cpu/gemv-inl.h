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
// kNearBytes: inputs that stay in L1 beside the weights. Past it, with 32 registers, four rows share
//   each load of two inputs: (768, 3072) weights and four inputs on Zen 4, bf16 407 us in order, 300
//   so, fp16 344 and 250, both with non-temporal prefetches.
// kTilesAhead: rows that share inputs are read again for each group of inputs, so those of the tiles
//   to come go to L2 meanwhile. Eight inputs, (3072, 768) weights on Zen 4: bf16 271 us with
//   non-temporal prefetches 2 KB ahead, 175 so; fp16 340 and 262.
// Lost on Zen 5: four rows side by side instead of memory order (37 against 41 GB/s), blocks drawn
//   from one counter instead of contiguous shares (36 against 41).
// bf16 with AVX512_BF16: vdpbf16ps on pairs, fp32 sums; denormal inputs count as zero there, as in
//   oneDNN's bf16 path.
// f16 never uses AVX512-FP16 arithmetic: its sums would be fp16. The conversion is in AVX-512F and
//   hides in the stream.

namespace hff {
namespace HFF_ISA {

constexpr int kChains = 2;
constexpr int kInputs = 4;
constexpr int64_t kNearBytes = 16 * 1024;
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

// y[c * y_stride + r] for N weight rows (at w, w + row_stride, ...) and M inputs. A single row is
// asked for `ahead` bytes ahead, into L2 or non-temporally.
template <class T, int N, int M, bool kToL2>
HFF_INLINE void dot_tile(const T* w, int64_t row_stride, int64_t cols, const Operand<T>* x,
                         int64_t x_stride, int64_t ahead, float* y, int64_t y_stride) {
  using S = Step<T>;
  F sums[N][M][kChains];
  for (int r = 0; r < N; ++r) {
    for (int c = 0; c < M; ++c) {
      for (int u = 0; u < kChains; ++u) sums[r][c][u] = zero();
    }
  }
  int64_t k = 0;
  for (; k + kChains * S::kWidth <= cols; k += kChains * S::kWidth) {
    for (int u = 0; u < kChains; ++u) {
      const int64_t at = k + u * S::kWidth;
      typename S::Vector rows[N];
      for (int r = 0; r < N; ++r) {
        const T* p = w + r * row_stride + at;
        if (u * S::kWidth * static_cast<int64_t>(sizeof(T)) % 64 == 0) {
          if constexpr (N == 1 && kToL2) {
            prefetch_to_l2(reinterpret_cast<const char*>(p) + ahead);
          } else if constexpr (N == 1) {
            prefetch(p, ahead);
          } else {
            prefetch_to_l2(p + kTilesAhead * N * row_stride);
          }
        }
        rows[r] = S::weight(p);
      }
      for (int c = 0; c < M; ++c) {
        const typename S::Vector in = S::input(x + c * x_stride + at);
        for (int r = 0; r < N; ++r) sums[r][c][u] = S::dot(rows[r], in, sums[r][c][u]);
      }
    }
  }
  for (int u = 0; k < cols; k += S::kWidth, ++u) {
    for (int r = 0; r < N; ++r) {
      const typename S::Vector row = S::weight_n(w + r * row_stride + k, cols - k);
      for (int c = 0; c < M; ++c) {
        sums[r][c][u] = S::dot(row, S::input_n(x + c * x_stride + k, cols - k), sums[r][c][u]);
      }
    }
  }
  for (int r = 0; r < N; ++r) {
    for (int c = 0; c < M; ++c) y[c * y_stride + r] = sum(add(sums[r][c][0], sums[r][c][1]));
  }
}

// N weight rows against all inputs, M at a time.
template <class T, int N, int M, bool kToL2>
HFF_INLINE void dot_rows(const T* w, int64_t row_stride, int64_t cols, const Operand<T>* x,
                         int64_t x_stride, int64_t inputs, int64_t ahead, float* y,
                         int64_t y_stride) {
  int64_t c = 0;
  for (; c + M <= inputs; c += M) {
    dot_tile<T, N, M, kToL2>(w, row_stride, cols, x + c * x_stride, x_stride, ahead,
                             y + c * y_stride, y_stride);
  }
  for (int r = 0; r < N; ++r) {
    const T* row = w + r * row_stride;
    int64_t d = c;
    for (; d + 2 <= inputs; d += 2) {
      dot_tile<T, 1, 2, kToL2>(row, row_stride, cols, x + d * x_stride, x_stride, ahead,
                               y + d * y_stride + r, y_stride);
    }
    if (d < inputs)
      dot_tile<T, 1, 1, kToL2>(row, row_stride, cols, x + d * x_stride, x_stride, ahead,
                               y + d * y_stride + r, y_stride);
  }
}

// Weight rows [begin, end) of `linear` against `inputs` rows of x: y[input * y_stride + row -
// begin]. One or two inputs wait for memory: strictly in order. More wait for arithmetic: two rows
// share each load of an input; and four where inputs come from L2.
template <class T>
static void gemv(const hff_linear& linear, int64_t begin, int64_t end, const Operand<T>* x,
                 int64_t x_stride, int64_t inputs, float* y, int64_t y_stride) {
  const T* w = static_cast<const T*>(linear.weight.data);
  const int64_t stride = linear.row_stride, cols = linear.cols;
  const int32_t how = prefetch_choice_of(kDtypeOf<T>, inputs).now();
  const int64_t ahead = how == HFF_PREFETCH_LINE ? 0 : kAhead;
  const bool four = kLanes == 16 && inputs > 1 &&
                    inputs * cols * static_cast<int64_t>(sizeof(Operand<T>)) > kNearBytes;
  int64_t i = begin;
  if (four) {
    for (; i + 4 <= end; i += 4)
      dot_rows<T, 4, 2, false>(w + i * stride, stride, cols, x, x_stride, inputs, ahead,
                               y + i - begin, y_stride);
  } else if (inputs > kTriedRows) {
    for (; i + 2 <= end; i += 2)
      dot_rows<T, 2, kInputs, false>(w + i * stride, stride, cols, x, x_stride, inputs, ahead,
                                     y + i - begin, y_stride);
  }
  const auto in_order = [&](auto to_l2) {
    for (; i < end; ++i)
      dot_rows<T, 1, kInputs, to_l2.value>(w + i * stride, stride, cols, x, x_stride, inputs, ahead,
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

// One tile of a product: up to kTileRows rows of A by a panel (pack-inl.h), sums in registers.
//   c[r][kPanel] = a[r] . panel; a: R rows of the product's Input, `stride` apart; c: fp32
// A sum runs over k in order, fp32 products in pieces of kSumDepth.
// Bound: multiply-adds. kTileRows by two vectors of sums leave registers for two weights and an
//   input; each step is 2 kTileRows multiply-adds for kTileRows + 2 loads.
// bf16 pairs: denormal inputs and products count as zero (vdpbf16ps, tdpbf16ps), as in oneDNN.

namespace hff {
namespace HFF_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 14;  // 28 sums, 2 weights, 1 input of 32 registers
#else
constexpr int kTileRows = 6;  // 12, 2, 1 of 16
#endif
constexpr int64_t kSumDepth = 128;  // fp32 products added up before they join the sum: the error of
                                    // one chain of 768 is twice that
constexpr int64_t kMaxTileRows = 32;  // of any product; rows of a tile buffer
static_assert(kTileRows <= 15, "RowsOfTile reaches 15 rows");

// Memory that a tile fetches into L2 while it multiplies: `step` bytes for each k; mapped, or each
// prefetch walks the page table for nothing.
struct Ahead {
  const void* data;
  int64_t step;
  HFF_ALWAYS_INLINE void fetch(int64_t k) const {
    __builtin_prefetch(static_cast<const char*>(data) + k * step, 0, 2);
  }
  // What belongs to columns [k, k + kTileDepth).
  HFF_ALWAYS_INLINE void fetch_tile(int64_t k) const {
    const char* at = static_cast<const char*>(data) + k * step;
    for (int64_t line = 0; line < kTileDepth * step; line += 64)
      __builtin_prefetch(at + line, 0, 2);
  }
};

// Walks along R rows of A, up to 15. A pointer for each of 14 is more than there are general
// registers; gcc keeps the others in vector registers, whose moves take ports of multiply-adds:
// 0.90 of the peak on Zen 4 in place of 0.95. Three pointers and two strides reach all rows by base
// + index * scale; the empty asm keeps gcc from working out a pointer for each again.
template <class E, int R>
struct RowsOfTile {
  const E* base[3];
  int64_t stride, stride3;

  HFF_ALWAYS_INLINE RowsOfTile(const E* a, int64_t between)
      : base{a, a + (R > 5 ? 5 : 0) * between, a + (R > 10 ? 10 : 0) * between},
        stride(between),
        stride3(3 * between) {}
  HFF_ALWAYS_INLINE const E* row(int r) const {
    const E* b = base[r / 5];
    return r % 5 == 3 ? b + stride3 : b + r % 5 * stride;
  }
  HFF_ALWAYS_INLINE void next(int64_t columns) {
    for (const E*& b : base) b += columns;
    asm("" : "+r"(stride), "+r"(stride3));
  }
};

// c[r][kPanel] = a[r] . panel, R rows.
template <class P, int R>
struct Tile;

template <class T, int R>
struct Tile<Plain<T>, R> {
  HFF_INLINE void multiply(const float* a, int64_t stride, const T* panel, int64_t cols, float* c,
                           Ahead ahead) {
    RowsOfTile<float, R> rows(a, stride);
    for (int64_t begin = 0; begin < cols; begin += kSumDepth) {
      const int64_t end = begin + kSumDepth < cols ? begin + kSumDepth : cols;
      F sums[R][2];
      for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = zero();
      for (int64_t k = begin; k < end; ++k, rows.next(1)) {
        const F w0 = load(panel + k * kPanel), w1 = load(panel + k * kPanel + kLanes);
        ahead.fetch(k);
        for (int r = 0; r < R; ++r) {
          const F x = set1(*rows.row(r));
          sums[r][0] = fma(w0, x, sums[r][0]);
          sums[r][1] = fma(w1, x, sums[r][1]);
        }
      }
      for (int r = 0; r < R; ++r) {
        for (int v = 0; v < 2; ++v) {
          float* at = c + r * kPanel + v * kLanes;
          store(begin == 0 ? sums[r][v] : add(load(at), sums[r][v]), at);
        }
      }
    }
  }
};

#if defined(__AVX512BF16__) && !defined(HFF_TILES)
template <int R>
struct Tile<Pairs, R> {
  HFF_INLINE void multiply(const bf16* a, int64_t stride, const bf16* panel, int64_t cols, float* c,
                           Ahead ahead) {
    __m512 sums[R][2];
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    RowsOfTile<bf16, R> rows(a, stride);
    for (int64_t k = 0; k < cols; k += 2, rows.next(2)) {
      const __m512bh w0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(panel + k * kPanel));
      const __m512bh w1 =
          reinterpret_cast<__m512bh>(_mm512_loadu_si512(panel + k * kPanel + 2 * kLanes));
      ahead.fetch(k);
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        std::memcpy(&pair, rows.row(r), 4);
        const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
        sums[r][0] = _mm512_dpbf16_ps(sums[r][0], w0, x);
        sums[r][1] = _mm512_dpbf16_ps(sums[r][1], w1, x);
      }
    }
    for (int r = 0; r < R; ++r) {
      _mm512_storeu_ps(c + r * kPanel, sums[r][0]);
      _mm512_storeu_ps(c + r * kPanel + kLanes, sums[r][1]);
    }
  }
};
#endif

// The tile of `rows` rows, 1 to R.
template <class P, int R>
static void multiply_tile_of(int64_t rows, const typename P::Input* a, int64_t stride,
                             const typename P::Element* panel, int64_t cols, float* c,
                             Ahead ahead) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_tile_of<P, R - 1>(rows, a, stride, panel, cols, c, ahead);
  }
  Tile<P, R>::multiply(a, stride, panel, cols, c, ahead);
}

// Most rows of one tile of a product, and the product of up to so many.
template <class P>
constexpr int64_t tile_rows() {
#if defined(HFF_TILES)
  if constexpr (P::kDepth == 2) return kMaxTileRows;
#endif
  return kTileRows;
}
template <class P>
HFF_INLINE void multiply_rows(int64_t rows, const typename P::Input* a, int64_t stride,
                              const typename P::Element* panel, int64_t cols, float* c,
                              Ahead ahead) {
#if defined(HFF_TILES)
  if constexpr (P::kDepth == 2) {
    const auto beside = [&](int64_t k) { ahead.fetch_tile(k); };
    rows > 16 ? multiply_tiles<P, true>(a, stride, panel, cols, c, beside)
              : multiply_tiles<P, false>(a, stride, panel, cols, c, beside);
  } else
#endif
  {
    multiply_tile_of<P, kTileRows>(rows, a, stride, panel, cols, c, ahead);
  }
}
template <class P>
HFF_INLINE void multiply_rows(int64_t rows, const typename P::Input* a, int64_t stride,
                              const typename P::Element* panel, int64_t cols, float* c) {
  multiply_rows<P>(rows, a, stride, panel, cols, c, Ahead{panel, 0});
}

}  // namespace HFF_ISA
}  // namespace hff

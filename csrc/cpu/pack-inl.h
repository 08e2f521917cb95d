// Weights as panels: what the matrix kernels (gemm-inl.h) read in place of rows.
//   A panel holds kPanel weight rows (columns of the product) of all k, k outermost, so that one
//   vector load gives the same k of kLanes rows.
//   Plain<T>: panel[k][kPanel], T, widened to fp32 at the load.
//   Pairs:    panel[k / 2][kPanel][2], bf16, what vdpbf16ps and an AMX tile of B take: a tile is 16
//             pairs of k by 16 rows, its rows kPanel pairs apart. k is padded to whole tiles.
//   Split:    a tile of the bf16 values of fp32 weights, then one of those of the rests, and so on.
// Rows past the last and k past the end are zero, so that kernels need no tails.
// Work split: panels are independent. Prepacked weights (hff_pack) are a 64-byte header and the
//   panels; without them a unit packs its panels into scratch of its thread before it multiplies.
// Cost: 32-bit words are transposed in registers, 0.15 cycles an element of bf16 on Zen 5: 5 % of
//   the product at 197 rows, which is why weights are read in place by default where there is no
//   AMX.
// Rounding: none, but fp32 weights as Pairs (precision "medium") or Split ("high", |rest| < 2^-17).

namespace hff {
namespace HFF_ISA {

constexpr int64_t kPanel = 2 * kLanes;  // weight rows of a panel: two vectors of sums
constexpr int64_t kTileDepth = 32;      // k of an AMX tile of bf16

// ---- the kinds of product -----------------------------------------------------------------------

// Inputs fp32, in memory T; weights T; fp32 multiply-add.
template <class T>
struct Plain {
  using Input = float;
  using Stored = T;
  using Element = T;
  static constexpr int64_t kDepth = 1, kParts = 1;  // k of one step; operand parts
  static constexpr int32_t kLayout = 0;
  HFF_INLINE int64_t padded(int64_t k) { return sizeof(T) == 4 ? k : (k + 1) / 2 * 2; }
};
// Inputs and weights bf16, fp32 sums.
struct Pairs {
  using Input = bf16;
  using Stored = bf16;
  using Element = bf16;
  static constexpr int64_t kDepth = 2, kParts = 1;
  static constexpr int32_t kLayout = 1;
  HFF_INLINE int64_t padded(int64_t k) { return (k + kTileDepth - 1) / kTileDepth * kTileDepth; }
};
// Inputs and weights as the sum of two bf16; three of the four products.
struct Split {
  using Input = bf16;
  using Stored = bf16;
  using Element = bf16;
  static constexpr int64_t kDepth = 2, kParts = 2;
  static constexpr int32_t kLayout = 2;
  HFF_INLINE int64_t padded(int64_t k) { return Pairs::padded(k); }
};

// Where element k of an operand lies in its row, or, times kPanel, in a panel: parts take turns, a
// tile's depth each.
template <class P>
HFF_INLINE int64_t part_index(int64_t k, int64_t part) {
  if constexpr (P::kParts == 1) return k;
  return (k / kTileDepth * P::kParts + part) * kTileDepth + k % kTileDepth;
}

// Elements of one panel, all parts.
template <class P>
HFF_INLINE int64_t panel_elements(int64_t cols) {
  return P::kParts * P::padded(cols) * kPanel;
}
HFF_INLINE int64_t panels_of(int64_t rows) { return (rows + kPanel - 1) / kPanel; }

// What stands before prepacked panels, so that a call can tell them from others.
struct PackedHeader {
  uint64_t magic;
  int32_t layout, element_bytes;
  int64_t panel, rows, cols;
};
constexpr uint64_t kPackedMagic = 0x6b636170665f6668;  // "hf_fpack"
constexpr int64_t kPackedHeader = 64;
static_assert(sizeof(PackedHeader) <= kPackedHeader, "the header has its place");

template <class P>
HFF_INLINE PackedHeader packed_header(const hff_linear& l) {
  return {kPackedMagic, P::kLayout, static_cast<int32_t>(sizeof(typename P::Element)),
          kPanel,       l.rows,     l.cols};
}
// Whether `linear` carries panels for this product.
template <class P>
static bool has_panels(const hff_linear& linear) {
  PackedHeader have;
  const PackedHeader want = packed_header<P>(linear);
  std::memcpy(&have, linear.packed.data, sizeof(have));
  return std::memcmp(&have, &want, sizeof(have)) == 0;
}
template <class P>
HFF_INLINE Size packed_size(int64_t rows, int64_t cols) {
  const Size panel = Size(P::kParts * kPanel) * Size(P::padded(cols));
  return Size(kPackedHeader) +
         Size(panels_of(rows)) * panel * Size(static_cast<int64_t>(sizeof(typename P::Element)));
}

// The product that multiplies weights of type T at a precision, as an argument of function(P).
template <class T, class Function>
HFF_INLINE auto with_product(int32_t precision, Function function) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same<T, bf16>::value) return function(Pairs{});
  if constexpr (std::is_same<T, float>::value) {
    if (precision == HFF_PRECISION_MEDIUM) return function(Pairs{});
#if defined(HFF_TILES)
    if (precision == HFF_PRECISION_HIGH) return function(Split{});
#endif
  }
#endif
  (void)precision;
  return function(Plain<T>{});
}

// ---- 32-bit words, kLanes at a time -------------------------------------------------------------

#if defined(__AVX512F__)
using Words = __m512i;
HFF_INLINE Words no_words() { return _mm512_setzero_si512(); }
HFF_INLINE Words load_words(const void* p, int64_t bytes) {
  if (bytes >= 64) return _mm512_loadu_si512(p);
  return bytes <= 0 ? no_words() : _mm512_maskz_loadu_epi8(~__mmask64{0} >> (64 - bytes), p);
}
HFF_INLINE void store_words(Words w, void* p) { _mm512_storeu_si512(p, w); }
HFF_INLINE void store_halves(Words w, void* low, void* high) {
  _mm256_storeu_si256(static_cast<__m256i*>(low), _mm512_cvtepi32_epi16(w));
  _mm256_storeu_si256(static_cast<__m256i*>(high), _mm512_cvtepi32_epi16(_mm512_srli_epi32(w, 16)));
}
HFF_INLINE void transpose(Words* r) {
  Words t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // r[4 g + i], quarter q: word 4 q + i of rows 4 g .. 4 g + 3
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}
#elif defined(__AVX2__)
using Words = __m256i;
HFF_INLINE Words no_words() { return _mm256_setzero_si256(); }
HFF_INLINE Words load_words(const void* p, int64_t bytes) {
  if (bytes >= 32) return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  alignas(32) char buffer[32] = {};
  if (bytes > 0) std::memcpy(buffer, p, static_cast<size_t>(bytes));
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(buffer));
}
HFF_INLINE void store_words(Words w, void* p) { _mm256_storeu_si256(static_cast<__m256i*>(p), w); }
HFF_INLINE void store_halves(Words w, void* low, void* high) {
  const Words both = _mm256_packus_epi32(_mm256_and_si256(w, _mm256_set1_epi32(0xffff)),
                                         _mm256_srli_epi32(w, 16));  // per 128 bits: low, high
  const __m128i first = _mm256_castsi256_si128(both), second = _mm256_extracti128_si256(both, 1);
  _mm_storeu_si128(static_cast<__m128i*>(low), _mm_unpacklo_epi64(first, second));
  _mm_storeu_si128(static_cast<__m128i*>(high), _mm_unpackhi_epi64(first, second));
}
HFF_INLINE void transpose(Words* r) {
  Words t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x20);
    t[4 + i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
#else
struct Words {
  uint32_t lane[kLanes];
};
HFF_INLINE Words no_words() { return {}; }
HFF_INLINE Words load_words(const void* p, int64_t bytes) {
  Words out = {};
  const int64_t whole = static_cast<int64_t>(sizeof(out));
  if (bytes > 0) std::memcpy(&out, p, static_cast<size_t>(bytes < whole ? bytes : whole));
  return out;
}
HFF_INLINE void store_words(Words w, void* p) { std::memcpy(p, &w, sizeof(w)); }
HFF_INLINE void store_halves(Words w, void* low, void* high) {
  uint16_t halves[2][kLanes];
  for (int i = 0; i < kLanes; ++i) {
    halves[0][i] = static_cast<uint16_t>(w.lane[i]);
    halves[1][i] = static_cast<uint16_t>(w.lane[i] >> 16);
  }
  std::memcpy(low, halves[0], sizeof(halves[0]));
  std::memcpy(high, halves[1], sizeof(halves[1]));
}
HFF_INLINE void transpose(Words* r) {
  Words t[kLanes];
  for (int k = 0; k < kLanes; ++k) {
    for (int i = 0; i < kLanes; ++i) t[k].lane[i] = r[i].lane[k];
  }
  for (int k = 0; k < kLanes; ++k) r[k] = t[k];
}
#endif

HFF_INLINE Words words_of(F v) {
  Words out;
  std::memcpy(&out, &v, sizeof(out));
  return out;
}

// Stores n values of v as inputs of a product, rounded; bf16 denormals, which count as zero there,
// as zero.
HFF_INLINE void store_input_n(F v, float* p, int64_t n) { store_n(v, p, n); }
HFF_INLINE void store_input_n(F v, f16* p, int64_t n) { store_n(v, p, n); }
HFF_INLINE void store_input_n(F v, bf16* p, int64_t n) {
#if defined(__AVX512BF16__)
  const __m256i narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v.v));
  if (n >= kLanes) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
  _mm256_mask_storeu_epi16(p, first(n), narrow);
#else
  store_n(v, p, n);
#endif
}

// ---- packing ------------------------------------------------------------------------------------

// v as the bf16 values of v (part 0) or of what they leave (part 1).
HFF_INLINE F part_of(F v, int64_t part) {
  if (part == 0) return v;
  bf16 rounded[kLanes];
  store(v, rounded);
  return sub(v, load(rounded));
}

// kLanes words of a weight row from element k on; what lies past cols is zero.
template <class T, class P>
HFF_INLINE Words row_words(const T* row, int64_t k, int64_t cols, int64_t part) {
  if constexpr (sizeof(T) == sizeof(typename P::Element)) {
    prefetch(row + k, 512);
    return load_words(row + k, (cols - k) * static_cast<int64_t>(sizeof(T)));
  } else {
    bf16 rounded[2 * kLanes];
    store(part_of(load_n(row + k, cols - k), part), rounded);
    store(part_of(load_n(row + k + kLanes, cols - k - kLanes), part), rounded + kLanes);
    return load_words(rounded, sizeof(rounded));
  }
}

// Weight rows [kPanel * panel, + kPanel) of `linear` as one panel.
template <class T, class P>
static void pack_panel(const hff_linear& linear, int64_t panel, typename P::Element* out) {
  constexpr int64_t kPerWord = 4 / sizeof(typename P::Element);
  const T* rows = static_cast<const T*>(linear.weight.data);
  const int64_t depth = P::padded(linear.cols);
  for (int64_t part = 0; part < P::kParts; ++part) {
    for (int64_t half = 0; half < kPanel; half += kLanes) {
      const int64_t first = panel * kPanel + half, have = linear.rows - first;
      for (int64_t k = 0; k < depth; k += kLanes * kPerWord) {
        Words w[kLanes];
        for (int64_t r = 0; r < kLanes; ++r) {
          w[r] = r < have
                     ? row_words<T, P>(rows + (first + r) * linear.row_stride, k, linear.cols, part)
                     : no_words();
        }
        transpose(w);
        typename P::Element* to = out + part_index<P>(k, part) * kPanel + half * P::kDepth;
        for (int64_t i = 0; i < kLanes && k + i * kPerWord < depth; ++i) {
          if constexpr (P::kDepth == kPerWord) {
            store_words(w[i], to + i * kPerWord * kPanel);
          } else {
            store_halves(w[i], to + 2 * i * kPanel, to + (2 * i + 1) * kPanel);
          }
        }
      }
    }
  }
}

}  // namespace HFF_ISA
}  // namespace hff

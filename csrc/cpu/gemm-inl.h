// C = A W^T for many rows, through panels (pack-inl.h): the matrix kernels of prefill and encoders.
//   A: (rows, stride) in the product's input type, rounded to the model dtype as Hugging Face's
//   Linear sees it; k past the end zero. W: (W rows, cols), model dtype. C: fp32 in registers, then
//   through a tile buffer into the epilogue of the caller: bias, activation, residual, store.
// Work split: a unit is a group of panels by a strip of A's rows (GemmUnits). It walks its rows in
//   tiles of up to kTileRows and each tile through all panels of the group, so A comes from L2 once
//   a group and the group stays in L2. A sum runs over k in order, fp32 products in pieces of
//   kSumDepth: a row's bits depend neither on the other rows nor on threads.
// Bound: multiply-adds. kTileRows by two vectors of sums leave registers for two weights and an
//   input; each step is 2 kTileRows multiply-adds for kTileRows + 2 loads.
// Fetched meanwhile: the lines a tile goes to, and a share of the weights of the next unit.
// bf16 pairs: denormal inputs and products count as zero (vdpbf16ps, tdpbf16ps), as in oneDNN.

namespace hff {
namespace HFF_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 14;  // 28 sums, 2 weights, 1 input of 32 registers
#elif defined(__AVX2__)
constexpr int kTileRows = 6;  // 12, 2, 1 of 16
#else
constexpr int kTileRows = 2;  // 8, 4, 2 of 16, four floats each
#endif
constexpr int64_t kGroupBytes = 128 * 1024;  // panels of a group: an eighth of L2 or less
constexpr int64_t kSumDepth = 128;  // fp32 products added up before they join the sum: the error of
                                    // one chain of 768 is twice that
constexpr int64_t kMaxTileRows = 32;  // of any product; rows of a tile buffer
static_assert(kTileRows <= 15, "RowsOfTile reaches 15 rows");

// Rows of A, and of the tile buffer.
template <class P>
struct Operands {
  typename P::Input* data;
  int64_t stride;
  HFF_ALWAYS_INLINE typename P::Input* row(int64_t r) const { return data + r * stride; }
};

// Elements from one row of A to the next: whole vectors, and a line more, so that rows of 4 KB do
// not share one set of L1.
template <class P>
HFF_INLINE int64_t operand_stride(int64_t cols) {
  const int64_t whole = (cols + kTileDepth - 1) / kTileDepth * kTileDepth;
  return P::kParts * whole + 64 / static_cast<int64_t>(sizeof(typename P::Input));
}
// Rows of A with those that a tile reads past the last.
HFF_INLINE Size operand_rows(int64_t rows) {
#if defined(HFF_TILES)
  const Size sum = Size(rows) + Size(kMaxTileRows - 1);
  return sum.ok() ? Size(sum.value() / kMaxTileRows * kMaxTileRows) : sum;
#else
  return Size(rows);
#endif
}

// Whether rows of `cols` T each are A as they lie, without a copy: inputs of the product, whole steps
// of k, as many rows as tiles read. Not 4 KB apart: a tile's would share one set of L1, and a product
// of 2048^3 takes 1.25 times as long.
template <class T, class P>
HFF_INLINE bool lie_as_operands(int64_t rows, int64_t cols) {
  return std::is_same<typename P::Input, T>::value && P::kParts == 1 && P::padded(cols) == cols &&
         operand_rows(rows).fits(rows) && cols * int64_t{sizeof(T)} % 4096 != 0;
}

// Zeros behind the cols values of a row.
template <class P>
HFF_INLINE void zero_tail(typename P::Input* row, int64_t cols) {
  for (int64_t part = 0; part < P::kParts; ++part) {
    for (int64_t k = cols; k < P::padded(cols); k += kLanes)
      store_n(zero(), row + part * P::padded(cols) + k, P::padded(cols) - k);
  }
}
// v rounded to T.
template <class T>
HFF_INLINE F rounded(F v) {
  if constexpr (sizeof(T) == 4) return v;
  T lanes[kLanes];
  store(v, lanes);
  return load(lanes);
}
// Stores n values, rounded to T, as A[row][k .. k + n).
template <class T, class P>
HFF_INLINE void store_input(F v, typename P::Input* row, int64_t k, int64_t n, int64_t cols) {
  constexpr bool kRounds = std::is_same<typename P::Input, T>::value;  // the store itself
  const F value = kRounds ? v : rounded<T>(v);
  store_input_n(value, row + k, n);
  if constexpr (P::kParts == 2) store_input_n(part_of(value, 1), row + P::padded(cols) + k, n);
}

// ---- one tile -----------------------------------------------------------------------------------

// Memory that a tile fetches into L2 while it multiplies: `step` bytes for each k; mapped, or each
// prefetch walks the page table for nothing.
struct Ahead {
  const void* data;
  int64_t step;
  HFF_ALWAYS_INLINE void fetch(int64_t k) const {
    __builtin_prefetch(static_cast<const char*>(data) + k * step, 0, 2);
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
    rows > 16 ? multiply_tiles<P, true>(a, stride, panel, cols, c)
              : multiply_tiles<P, false>(a, stride, panel, cols, c);
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

// Where a product goes: row r, column j at data + (r stride + j) element_bytes. `adds`: whole panels
// are added there, in fp32, in place of what else is done with a tile.
struct Target {
  void* data;
  int64_t stride, element_bytes;
  bool adds = false;

  // Asks for the lines of a tile's rows, so that they are there when it has been multiplied.
  HFF_ALWAYS_INLINE void fetch(int64_t row, int64_t rows, int64_t column) const {
    const char* at = static_cast<const char*>(data) + (row * stride + column) * element_bytes;
    for (int64_t r = 0; r < rows; ++r, at += stride * element_bytes) {
      for (int64_t line = 0; line < kPanel * element_bytes; line += 64)
        __builtin_prefetch(at + line, 1);
    }
  }
  // Adds c[r][kPanel] to rows [row, row + rows), columns [column, column + kPanel).
  HFF_ALWAYS_INLINE void add_tile(const float* c, int64_t row, int64_t rows, int64_t column) const {
    float* onto = static_cast<float*>(data) + row * stride + column;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < kPanel; j += kLanes) {
        float* at = onto + r * stride + j;
        store(add(load(c + r * kPanel + j), load(at)), at);
      }
    }
  }
};

// ---- units --------------------------------------------------------------------------------------

HFF_INLINE int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Where part `part` of `parts` of A's rows begins, all of nearly one size. Whole tiles where AMX
// multiplies: it reads 32 rows, or 16, wherever it starts, and operand_rows are all there are.
template <class P>
HFF_INLINE int64_t cut_rows(int64_t rows, int64_t part, int64_t parts) {
  constexpr int64_t kStep = tile_rows<P>() == kMaxTileRows ? kMaxTileRows : 1;
  const int64_t at = ceil_div(rows, kStep) * part / parts * kStep;
  return at < rows ? at : rows;
}

// A block of a weight: the product of some of A's columns with it, into some of C's. Its first row
// is a panel's, its first column a multiple of kTileDepth, and without that first column it has no
// bias.
template <class T, class P>
struct Slice {
  hff_linear linear;       // the block; `packed` is the whole weight's
  int64_t stride, offset;  // elements of packed panels: from one to the next, before the block

  explicit Slice(const hff_linear& whole)
      : linear(whole), stride(panel_elements<P>(whole.cols)), offset(0) {}

  static Slice of(const hff_linear& whole, int64_t row, int64_t rows, int64_t col, int64_t cols) {
    Slice s(whole);
    const T* weight = static_cast<const T*>(whole.weight.data);
    const T* bias = static_cast<const T*>(whole.bias.data);
    s.linear.weight.data = weight + row * whole.row_stride + col;
    s.linear.bias.data = bias != nullptr && col == 0 ? bias + row : nullptr;
    s.linear.rows = rows;
    s.linear.cols = cols;
    s.offset = row / kPanel * s.stride + col * kPanel;
    return s;
  }
};

// How one product is cut: `groups` of panels times `strips` of rows, all of nearly one size.
struct GemmUnits {
  int64_t rows, panels, groups, strips;

  template <class P>
  static GemmUnits of(const hff_linear& linear, int64_t rows, int64_t threads) {
    GemmUnits u{rows, panels_of(linear.rows), 1, 1};
    const int64_t bytes =
        panel_elements<P>(linear.cols) * static_cast<int64_t>(sizeof(typename P::Element));
    const int64_t most = kGroupBytes / bytes < 1 ? 1 : kGroupBytes / bytes;
    const int64_t each = linear.packed.data != nullptr ? 4 : 2;  // more would pack panels again
    const int64_t wanted = threads == 1 ? 1 : each * threads;
    u.groups = ceil_div(u.panels, most);
    if (u.groups < wanted) u.groups = wanted < u.panels ? wanted : u.panels;
    u.groups = ceil_div(u.groups, threads) * threads;
    if (u.groups > u.panels) u.groups = u.panels;
    const int64_t tiles = ceil_div(rows, 2 * tile_rows<P>());
    u.strips = ceil_div(wanted, u.groups);
    if (u.strips > tiles) u.strips = tiles;
    return u;
  }
  HFF_ALWAYS_INLINE int64_t count() const { return groups * strips; }
};

// Elements of the scratch in which a thread packs the group of any product of up to `cols` columns.
template <class P>
HFF_INLINE int64_t group_room(int64_t cols) {
  const int64_t panel = panel_elements<P>(cols);
  const int64_t group = kGroupBytes / static_cast<int64_t>(sizeof(typename P::Element));
  return panel > group ? panel : group;
}

// The weights of the unit behind one: `bytes` of each panel, from one to the next `stride`.
struct NextPanels {
  const char* data;
  int64_t stride, bytes;

  // The share of a panel that is fetched beside one of `tiles` tiles of `cols` columns.
  HFF_ALWAYS_INLINE Ahead ahead(int64_t panel, int64_t tile, int64_t tiles, int64_t cols) const {
    return {data + panel * stride + bytes * tile / tiles, ceil_div(bytes, tiles * cols)};
  }
};

// Unit `index`: calls finish(row, rows, column, columns, c) for every tile, c[r][kPanel] in fp32.
// `more`: the caller goes on with the unit behind it, whose weights are fetched meanwhile.
template <class T, class P, class Finish>
static void gemm_unit(const Slice<T, P>& slice, const GemmUnits& units, int64_t index, bool more,
                      const Operands<P>& a, typename P::Element* scratch, const Target& target,
                      Finish finish) {
  const hff_linear& linear = slice.linear;
  const int64_t group = index / units.strips, strip = index % units.strips;
  const int64_t begin = units.panels * group / units.groups;
  const int64_t end = units.panels * (group + 1) / units.groups;
  const int64_t first = cut_rows<P>(units.rows, strip, units.strips);
  const int64_t last = cut_rows<P>(units.rows, strip + 1, units.strips);
  int64_t elements = panel_elements<P>(linear.cols);
  const typename P::Element* panels = scratch;
  const bool fetches = more && end < units.panels;
  NextPanels next{};
  if (linear.packed.data != nullptr) {
    elements = slice.stride;
    panels = reinterpret_cast<const typename P::Element*>(
                 static_cast<const char*>(linear.packed.data) + kPackedHeader) +
             slice.offset + begin * elements;
    constexpr int64_t kElement = sizeof(typename P::Element);
    next = {reinterpret_cast<const char*>(panels + (end - begin) * elements), elements * kElement,
            panel_elements<P>(linear.cols) * kElement};
  } else {
    for (int64_t p = begin; p < end; ++p)
      pack_panel<T, P>(linear, p, scratch + (p - begin) * elements);
    // without more rows, their stride may be any number
    const int64_t bytes = fetches ? kPanel * linear.row_stride * int64_t{sizeof(T)} : 0;
    next = {static_cast<const char*>(linear.weight.data) + end * bytes, bytes, bytes};
  }
  alignas(64) float c[kMaxTileRows * kPanel];
  const int64_t tiles = ceil_div(last - first, tile_rows<P>());
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = first + cut_rows<P>(last - first, t, tiles);
    const int64_t rows = first + cut_rows<P>(last - first, t + 1, tiles) - row;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t column = p * kPanel, left = linear.rows - column;
      const typename P::Element* panel = panels + (p - begin) * elements;
      const Ahead ahead = fetches ? next.ahead(p - begin, t, tiles, linear.cols) : Ahead{panel, 0};
      target.fetch(row, rows, column);
      multiply_rows<P>(rows, a.row(row), a.stride, panel, linear.cols, c, ahead);
      if (target.adds && left >= kPanel) {
        target.add_tile(c, row, rows, column);
        continue;
      }
      finish(row, rows, column, left < kPanel ? left : kPanel, c);
    }
  }
}

// Calls sink(row, column, n, values) for the vectors of a tile, bias added and activated.
template <class T, class Sink>
HFF_INLINE void finish_tile(const hff_linear& linear, int32_t activation, int64_t row, int64_t rows,
                            int64_t column, int64_t columns, const float* c, Sink sink) {
  const T* bias = static_cast<const T*>(linear.bias.data);
  for (int64_t j = 0; j < columns; j += kLanes) {
    const int64_t n = columns - j < kLanes ? columns - j : kLanes;
    const F b = bias != nullptr ? load_n(bias + column + j, n) : zero();
    for (int64_t r = 0; r < rows; ++r) {
      sink(row + r, column + j, n, activate<T>(add(load(c + r * kPanel + j), b), activation));
    }
  }
}

}  // namespace HFF_ISA
}  // namespace hff

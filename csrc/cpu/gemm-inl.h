// C = A W^T for many rows, through panels (pack-inl.h): the matrix kernels of prefill and encoders.
//   A: (rows, stride) in the product's Stored type, rounded to the model dtype as Hugging Face's
//   Linear sees it; k past the end zero. W: (W rows, cols), model dtype. C: fp32 in registers
//   (gemm-tile-inl.h), then through a tile buffer into the epilogue of the caller: bias,
//   activation, residual, store.
// Work split: a unit is a group of panels by a strip of A's rows (GemmUnits). It walks its rows in
//   tiles of up to kTileRows and each tile through all panels of the group, so A comes from L2 once
//   a group and the group stays in L2. 16-bit rows that are multiplied in fp32 are widened there, a
//   tile at a time. A row's bits depend neither on the other rows nor on threads.
// Fetched meanwhile: the lines a tile goes to, and a share of the weights of the next unit.

namespace hff {
namespace HFF_ISA {

// Rows of A. E: as they lie in memory, or the Input of tiles that read them there.
template <class P, class E = typename P::Stored>
struct Operands {
  E* data;
  int64_t stride;
  HFF_ALWAYS_INLINE E* row(int64_t r) const { return data + r * stride; }
};

// Elements from one row of A to the next: whole vectors, and a line more, so that rows of 4 KB do
// not share one set of L1.
template <class P, class E = typename P::Stored>
HFF_INLINE int64_t operand_stride(int64_t cols) {
  const int64_t whole = (cols + kTileDepth - 1) / kTileDepth * kTileDepth;
  return P::kParts * whole + 64 / static_cast<int64_t>(sizeof(E));
}
template <class P>
constexpr bool by_tiles() {
  return tile_rows<P>() == kMaxTileRows;
}
// Rows of A with those that a tile of AMX reads past the last.
template <class P>
HFF_INLINE Size operand_rows(int64_t rows) {
  if constexpr (!by_tiles<P>()) return Size(rows);
  const Size sum = Size(rows) + Size(kMaxTileRows - 1);
  return sum.ok() ? Size(sum.value() / kMaxTileRows * kMaxTileRows) : sum;
}

// Whether rows of `cols` T each are A as they lie, without a copy: of the stored type, whole steps
// of k, as many rows as tiles read. Not 4 KB apart: a tile's would share one set of L1, and a
// product of 2048^3 takes 1.25 times as long.
template <class T, class P>
HFF_INLINE bool lie_as_operands(int64_t rows, int64_t cols) {
  return std::is_same<typename P::Stored, T>::value && P::kParts == 1 && P::padded(cols) == cols &&
         operand_rows<P>(rows).fits(rows) && cols * int64_t{sizeof(T)} % 4096 != 0;
}

// Zeros behind the cols values of a row.
template <class P, class E>
HFF_INLINE void zero_tail(E* row, int64_t cols) {
  for (int64_t part = 0; part < P::kParts; ++part) {
    for (int64_t k = cols; k < P::padded(cols); k += kLanes)
      store_n(zero(), row + part_index<P>(k, part), P::padded(cols) - k);
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
template <class T, class P, class E>
HFF_INLINE void store_input(F v, E* row, int64_t k, int64_t n) {
  constexpr bool kRounds = std::is_same<E, T>::value;  // the store itself
  const F value = kRounds ? v : rounded<T>(v);
  if constexpr (P::kParts == 1) {
    store_input_n(value, row + k, n);
  } else {
    for (int64_t part = 0; part < P::kParts; ++part) {
      const F its = part_of(value, part);
      const int64_t room = kTileDepth - k % kTileDepth;  // heads of any size lie side by side
      store_input_n(its, row + part_index<P>(k, part), n < room ? n : room);
      if (n <= room) continue;
      float lanes[2 * kLanes];
      store(its, lanes);
      store_input_n(load(lanes + room), row + part_index<P>(k + room, part), n - room);
    }
  }
}

// Where a product goes: row r, column j at data + (r stride + j) element_bytes. `adds`: whole
// panels are added there, in fp32, in place of what else is done with a tile.
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

// Whether a product's inputs are wider than A as it lies.
template <class P>
constexpr bool widens() {
  return !std::is_same<typename P::Stored, typename P::Input>::value;
}

// Panels of a group, a part of L2. Where rows are widened, each group pays for it: 5 % of a product
// of 768 columns at 128 KB, 3 to 4 at 192.
template <class P>
constexpr int64_t group_bytes() {
  return (widens<P>() ? 192 : 128) * 1024;
}

// The same where AMX multiplies packed panels and A is larger than a part of L2: A comes from L3
// for every group, and tiles would wait for it. 0.75 of the time of 2048^3 on Sapphire Rapids.
constexpr int64_t kFarGroupBytes = 640 * 1024, kNearBytesOfA = 512 * 1024;

// ---- units --------------------------------------------------------------------------------------

HFF_INLINE int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Where part `part` of `parts` of A's rows begins, all of nearly one size. Whole tiles where AMX
// multiplies: it reads 32 rows, or 16, wherever it starts, and operand_rows are all there are.
template <class P>
HFF_INLINE int64_t cut_rows(int64_t rows, int64_t part, int64_t parts) {
  constexpr int64_t kStep = by_tiles<P>() ? kMaxTileRows : 1;
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
    s.offset = row / kPanel * s.stride + P::kParts * col * kPanel;
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
    const bool packed = linear.packed.data != nullptr;
    const bool far = by_tiles<P>() && packed && rows > kNearBytesOfA / (bytes / kPanel);
    const int64_t group = far ? kFarGroupBytes : group_bytes<P>();
    const int64_t most = group / bytes < 1 ? 1 : group / bytes;
    const int64_t each = packed ? 4 : 2;  // more would pack panels again
    const int64_t wanted = threads == 1 ? 1 : each * threads;
    u.groups = ceil_div(u.panels, most);
    if (!far && u.groups < wanted) u.groups = wanted < u.panels ? wanted : u.panels;
    u.groups = ceil_div(u.groups, threads) * threads;
    if (u.groups > u.panels) u.groups = u.panels;
    const int64_t tiles = ceil_div(rows, 2 * tile_rows<P>());
    u.strips = ceil_div(wanted, u.groups);
    if (u.strips > tiles) u.strips = tiles;
    return u;
  }
  HFF_ALWAYS_INLINE int64_t count() const { return groups * strips; }
};

// Elements of a thread's scratch: the rows of a tile, widened; behind them the panels of a group.
// In all, for any product of up to `cols` columns.
template <class P>
HFF_INLINE int64_t widened_room(int64_t cols) {
  constexpr int64_t kInputs = sizeof(typename P::Input) / sizeof(typename P::Element);
  return widens<P>() ? kTileRows * operand_stride<P, typename P::Input>(cols) * kInputs : 0;
}
template <class P>
HFF_INLINE int64_t unit_room(int64_t cols) {
  const int64_t panel = panel_elements<P>(cols);
  const int64_t group = group_bytes<P>() / static_cast<int64_t>(sizeof(typename P::Element));
  return widened_room<P>(cols) + (panel > group ? panel : group);
}

// The rows of A that a tile multiplies: as they are, or widened into `room`.
template <class P>
HFF_INLINE Operands<P, typename P::Input> tile_operands(const Operands<P>& a, int64_t row,
                                                        int64_t rows, int64_t cols, void* room) {
  if constexpr (widens<P>()) {
    const Operands<P, typename P::Input> wide{static_cast<typename P::Input*>(room),
                                              operand_stride<P, typename P::Input>(cols)};
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < cols; k += kLanes)
        store_n(load_n(a.row(row + r) + k, cols - k), wide.row(r) + k, cols - k);
    }
    return wide;
  } else {
    return {a.row(row), a.stride};
  }
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
  typename P::Element* const room = scratch + widened_room<P>(linear.cols);
  const typename P::Element* panels = room;
  const bool fetches = more && end < units.panels && strip + 1 == units.strips;
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
      pack_panel<T, P>(linear, p, room + (p - begin) * elements);
    // without more rows, their stride may be any number
    const int64_t bytes = fetches ? kPanel * linear.row_stride * int64_t{sizeof(T)} : 0;
    next = {static_cast<const char*>(linear.weight.data) + end * bytes, bytes, bytes};
  }
  alignas(64) float c[kMaxTileRows * kPanel];
  const int64_t tiles = ceil_div(last - first, tile_rows<P>());
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = first + cut_rows<P>(last - first, t, tiles);
    const int64_t rows = first + cut_rows<P>(last - first, t + 1, tiles) - row;
    const auto in = tile_operands(a, row, rows, linear.cols, scratch);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t column = p * kPanel, left = linear.rows - column;
      const typename P::Element* panel = panels + (p - begin) * elements;
      const Ahead ahead = fetches ? next.ahead(p - begin, t, tiles, linear.cols) : Ahead{panel, 0};
      target.fetch(row, rows, column);
      multiply_rows<P>(rows, in.data, in.stride, panel, linear.cols, c, ahead);
      if (target.adds && left >= kPanel) {
        target.add_tile(c, row, rows, column);
        continue;
      }
      finish(row, rows, column, left < kPanel ? left : kPanel, c);
    }
  }
}

// Calls sink(row, column, n, values) for the vectors of a tile, bias added and activated. Tests and
// masks of narrower tiles would take as long as an activation.
template <class T, class Sink>
HFF_INLINE void finish_tile(const hff_linear& linear, int32_t activation, int64_t row, int64_t rows,
                            int64_t column, int64_t columns, const float* c, Sink sink) {
  const T* bias = static_cast<const T*>(linear.bias.data);
  bias = bias != nullptr ? bias + column : nullptr;
  if (columns < kPanel) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t n = columns - j < kLanes ? columns - j : kLanes;
      const F b = bias != nullptr ? load_n(bias + j, n) : zero();
      for (int64_t r = 0; r < rows; ++r)
        sink(row + r, column + j, n, activate<T>(add(load(c + r * kPanel + j), b), activation));
    }
    return;
  }
  const F low = bias != nullptr ? load(bias) : zero();
  const F high = bias != nullptr ? load(bias + kLanes) : zero();
  with_activation(activation, [&](auto known) {
    for (int64_t r = 0; r < rows; ++r) {
      const float* at = c + r * kPanel;
      const F first = activate<T>(add(load(at), low), known.value);
      const F second = activate<T>(add(load(at + kLanes), high), known.value);
      sink(row + r, column, kLanes, first);
      sink(row + r, column + kLanes, kLanes, second);
    }
  });
}

}  // namespace HFF_ISA
}  // namespace hff

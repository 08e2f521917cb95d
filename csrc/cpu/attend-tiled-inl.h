// Tiled attention: the three steps of the naive kernel on a block of rows at a time, both products
// in tiles.
//   S = scale q k^T + mask over all keys;  P = exp(S - max S);  out = P v / sum P
// Work split: a unit is (batch row, k/v head, block of rows). It packs keys, block by block, as
//   panels (pack-inl.h) and multiplies its rows by them in tiles of registers (gemm-inl.h); then
//   the softmax of its rows, then values as panels likewise.
// Scratch per thread: S, block * keys, fp32 and as the product's input, beside queries, context and
//   one block of panels: it grows with keys, not with their square.
// Bytes: K and V once per block of rows from memory; S stays in L2 where the table sizes the block
//   for it (attend_table.h). Bound: multiply-adds.
// Against flash: the same products and no rescaling, but S goes through L2 once more, and its block
//   shrinks as keys grow.

namespace hff {
namespace HFF_ISA {

// What the tiled and flash kernels keep for a block of rows and a block of keys.
template <class T, class P>
struct AttendTiles {
  using Input = typename P::Input;
  using Element = typename P::Element;

  Operands<P, Input> queries;  // (block_queries, head_dim)
  float* context;              // (block_queries, context_room)
  float* totals;               // (block_queries)
  Element *keys, *values;      // a block of keys as panels
  float* bias;                 // (block_keys)
  int64_t context_room;

  void carve(Arena* arena, const hff_attend_io& io, int64_t block_queries, int64_t block_keys) {
    queries.stride = operand_stride<P, Input>(io.head_dim);
    queries.data = arena->take<Input>(operand_rows<P>(block_queries) * Size(queries.stride));
    context_room = panels_of(io.head_dim) * kPanel;
    context = arena->take<float>(Size(block_queries) * Size(context_room));
    totals = arena->take<float>(block_queries);
    keys = arena->take<Element>(panels_of(block_keys) * panel_elements<P>(io.head_dim));
    values = arena->take<Element>(context_room * block_keys);
    bias = arena->take<float>(block_keys);
  }

  // Rows [first, first + rows) of (b, g), with a context of zeros.
  void load_rows(const Attend<T>& a, int64_t b, int64_t g, int64_t first, int64_t rows) const {
    const int64_t dim = a.io.head_dim;
    for (int64_t r = 0; r < rows; ++r) {
      const T* q = a.q(b, a.head_of(g, first + r), a.query_of(first + r));
      for (int64_t d = 0; d < dim; d += kLanes) {
        const int64_t n = dim - d < kLanes ? dim - d : kLanes;
        store_input<T, P>(load_n(q + d, n), queries.row(r), d, n);
      }
      zero_tail<P>(queries.row(r), dim);
      totals[r] = 0.0f;
    }
    for (int64_t d = 0; d < rows * context_room; d += kLanes) store(zero(), context + d);
  }

  void load_keys(const Attend<T>& a, int64_t b, int64_t g, int64_t j, int64_t n) const {
    hff_linear rows = {};
    rows.weight.data = a.k(b, g, j);
    rows.rows = n;
    rows.cols = a.io.head_dim;
    rows.row_stride = a.io.k_strides.token;
    for (int64_t p = 0; p < panels_of(n); ++p)
      pack_panel<T, P>(rows, p, keys + p * panel_elements<P>(rows.cols));
  }

  // context of `rows` rows from `row` on = decay[r] context + weights values, of the first n of
  // `block` keys; whole panels both.
  HFF_ALWAYS_INLINE void add_values(int64_t row, int64_t rows, const Input* weights, int64_t stride,
                                    int64_t n, int64_t block, const float* decay) const {
    alignas(64) float product[kMaxTileRows * kPanel];
    for (int64_t d = 0; d < context_room; d += kPanel) {
      multiply_rows<P>(rows, weights, stride, values + d * block, n, product);
      for (int64_t r = 0; r < rows; ++r) {
        float* to = context + (row + r) * context_room + d;
        const F old = set1(decay[r]);
        for (int64_t v = 0; v < kPanel; v += kLanes)
          store(fma(load(to + v), old, load(product + r * kPanel + v)), to + v);
      }
    }
  }
};

// Tiles of rows [0, rows): calls each(first, n).
template <class P, class Each>
HFF_INLINE void each_tile(int64_t rows, Each each) {
  const int64_t tiles = ceil_div(rows, tile_rows<P>());
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = rows * t / tiles;
    each(first, rows * (t + 1) / tiles - first);
  }
}

HFF_INLINE int64_t whole_panels(int64_t n) { return panels_of(n) * kPanel; }

template <class T, class P>
struct TiledUnit {
  using Input = typename P::Input;
  AttendTiles<T, P> tiles;
  float* scores;   // (block_queries, row_room)
  Input* weights;  // the same as the product's input, over scores where that is fp32
  int64_t row_room;

  void carve(Arena* arena, const hff_attend_io& io, const AttendBlocks& blocks) {
    tiles.carve(arena, io, blocks.queries, blocks.keys);
    row_room = whole_panels(io.keys) + 64 / static_cast<int64_t>(sizeof(Input));
    scores = arena->take<float>(Size(blocks.queries) * Size(row_room));
    if constexpr (std::is_same<Input, float>::value) {
      weights = scores;
    } else {
      weights = arena->take<Input>(operand_rows<P>(blocks.queries) * Size(row_room));
    }
  }

  void score_rows(const Attend<T>& a, int64_t b, int64_t g, int64_t first, int64_t rows,
                  int64_t block, int64_t begin, int64_t end) const {
    alignas(64) float c[kMaxTileRows * kPanel];
    const F scale = set1(a.io.scale);
    for (int64_t j = begin; j < end; j += block) {
      const int64_t n = end - j < block ? end - j : block;
      tiles.load_keys(a, b, g, j, n);
      each_tile<P>(rows, [&](int64_t row, int64_t count) {
        const bool all = n % kPanel == 0 && a.seen_by_all(first + row, count, j, n) == n;
        for (int64_t p = 0; p < panels_of(n); ++p) {
          multiply_rows<P>(count, tiles.queries.row(row), tiles.queries.stride,
                           tiles.keys + p * panel_elements<P>(a.io.head_dim), a.io.head_dim, c);
          for (int64_t r = 0; r < count; ++r) {
            const int64_t at = first + row + r, from = p * kPanel;
            if (!all) {
              bias_of(a, b, a.head_of(g, at), a.query_of(at), j + from,
                      n - from < kPanel ? n - from : kPanel, kPanel, tiles.bias);
            }
            for (int64_t v = 0; v < kPanel; v += kLanes) {
              const F score = mul(load(c + r * kPanel + v), scale);
              store(all ? score : biased(score, tiles.bias + v),
                    scores + (row + r) * row_room + j - begin + from + v);
            }
          }
        }
      });
    }
  }

  void add_values(const Attend<T>& a, int64_t b, int64_t g, int64_t first, int64_t rows,
                  int64_t block, int64_t begin, int64_t end) const {
    float ones[kMaxTileRows];
    for (float& one : ones) one = 1.0f;
    for (int64_t j = begin; j < end; j += block) {
      const int64_t n = end - j < block ? end - j : block;
      const Input* from = weights + j - begin;
      if (pack_values<T, P>(a, b, g, j, n, whole_panels(n), tiles.values)) {
        each_tile<P>(rows, [&](int64_t row, int64_t count) {
          tiles.add_values(row, count, from + row * row_room, row_room, whole_panels(n),
                           whole_panels(n), ones);
        });
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t h = a.head_of(g, first + r);
        bias_of(a, b, h, a.query_of(first + r), j, n, n, tiles.bias);
        add_seen_values(a, b, g, j, n, from + r * row_room, tiles.bias,
                        tiles.context + r * tiles.context_room);
      }
    }
  }

  void run(const Attend<T>& a, int64_t b, int64_t g, int64_t first, int64_t rows,
           const AttendBlocks& blocks) const {
    const int64_t begin = a.first(a.query_of(first)), end = a.limit(a.query_of(first + rows - 1));
    tiles.load_rows(a, b, g, first, rows);
    score_rows(a, b, g, first, rows, blocks.keys, begin, end);
    for (int64_t r = 0; r < rows; ++r) {
      tiles.totals[r] =
          soften_row(scores + r * row_room, whole_panels(end - begin), weights + r * row_room);
    }
    add_values(a, b, g, first, rows, blocks.keys, begin, end);
    for (int64_t r = 0; r < rows; ++r) {
      store_context(a, tiles.context + r * tiles.context_room, tiles.totals[r], b,
                    a.head_of(g, first + r), a.query_of(first + r));
    }
  }
};

}  // namespace HFF_ISA
}  // namespace hff

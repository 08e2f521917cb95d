// Transformer layers for many rows: prefill and encoders, assembled from gemm-inl.h and flash-inl.h.
//   parallel:   y = x + attn(norm1(x)) + mlp(norm2(x))
//     phases norm | qkv, up | append | attend | down | o
//   sequential: a = x + attn(norm1(x)); y = a + mlp(norm2(a))
//     phases norm | qkv | append | attend | o | norm | up | down
//   post-norm:  a = norm1(x + attn(x)); y = norm2(a + mlp(a))
//     phases round | qkv | append | attend | o | norm | up | down | norm
// x: (rows, hidden) fp32 in scratch for all layers of a call. qkv: (rows, width), model dtype, as
//   hff_heads lays it out; without a cache its keys and values are read, and rotated, where they
//   lie.
// Work split: rows for norms, units of gemm-inl.h for products, units of flash-inl.h for attention;
//   a barrier per `|`. Append is left out where there is neither cache nor RoPE.
// Rounding to the model dtype: after each norm, q, k and v, after attention, after the activation
//   and at the outputs; everything else is fp32.
// Order of sums: each product as in gemm-inl.h; (mlp + attn) + x as Hugging Face adds. No bit
//   depends on threads, or on the other rows of the call.
// Bytes: weights once per phase and strip, activations from L2 or L3. Bound: multiply-adds.
// Memory: what lives at different times shares a place: qkv and act where they are not made in one
//   phase, the norms' output and the attention's.

namespace hff {
namespace HFF_ISA {

HFF_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Scratch of a call of many rows. A second carving over the same sizes hands out the same pieces.
template <class T, class P>
struct GemmScratch {
  enum { kQkv = 0, kKey, kValue, kAppend, kAttend, kO, kUp, kDown, kPhases };

  float* x;             // (rows, hidden)
  float* mlp;           // (rows, hidden): down(act) of a parallel layer, until o joins it
  T* qkv;               // (rows, qkv rows of the layer)
  Operands<P> act;      // (rows, mlp_width), over qkv but for parallel layers
  Operands<P> normed;   // (rows, hidden): input of qkv and of up, of qkv alone in a parallel layer
  Operands<P> context;  // (rows, heads * head_dim), over normed
  Operands<P> second;   // (rows, hidden): input of up in a parallel layer
  Counter* counters;    // (layers, kPhases, threads), then (threads) for the head
  // private, (threads, ...)
  typename P::Element* panels;  // (panel_room)
  float* line;                  // (line_room): a normed row before it is rounded
  float* flash;                 // (flash_room)
  int64_t panel_room, line_room, flash_room;

  void carve(Arena* arena, const hff_call& call, const hff_block* blocks, int64_t count,
             int64_t hidden, int64_t row_count) {
    int64_t qkv_width = 1, context_width = 1, mlp_width = 1, dim = 1, cols = hidden;
    bool parallel = false;
    for (int64_t l = 0; l < count; ++l) {
      const hff_block& b = blocks[l];
      qkv_width = larger(qkv_width, (b.heads.heads + 2 * b.heads.kv_heads) * b.heads.head_dim);
      context_width = larger(context_width, b.o.cols);
      mlp_width = larger(mlp_width, b.mlp_width);
      dim = larger(dim, b.heads.head_dim);
      parallel |= b.residual == HFF_RESIDUAL_PARALLEL;
    }
    cols = larger(larger(cols, context_width), mlp_width);
    const Size rows = Size(row_count), threads = call.threads;
    const auto take = [&](int64_t width, bool wanted) {
      const int64_t stride = operand_stride<P>(width);
      const Size size = wanted ? operand_rows(row_count) * Size(stride) : Size(0);
      return Operands<P>{arena->take<typename P::Input>(size), stride};
    };
    x = arena->take<float>(rows * Size(hidden));
    mlp = arena->take<float>(parallel ? rows * Size(hidden) : Size(0));
    const Size projected = rows * Size(qkv_width), tiled = operand_rows(row_count);
    act.stride = operand_stride<P>(mlp_width);
    if (parallel) {
      qkv = arena->take<T>(projected);
      act = take(mlp_width, true);
    } else {
      const Size bytes = projected * Size(sizeof(T)),
                 other = tiled * Size(act.stride) * Size(sizeof(typename P::Input));
      const bool act_larger = bytes.ok() && !(other.fits(bytes.value()));
      char* shared = arena->take<char>(act_larger ? other : bytes);
      qkv = reinterpret_cast<T*>(shared);
      act.data = reinterpret_cast<typename P::Input*>(shared);
    }
    normed = take(larger(hidden, context_width), true);
    context = normed;
    second = take(hidden, parallel);
    counters = arena->take<Counter>((Size(count) * Size(kPhases) + Size(1)) * threads);
    panel_room = group_room<P>(cols);
    line_room = (hidden + kLanes - 1) / kLanes * kLanes;
    flash_room = FlashScratch::floats(dim);
    panels = arena->take<typename P::Element>(threads * Size(panel_room));
    line = arena->take<float>(threads * Size(line_room));
    flash = arena->take<float>(threads * Size(flash_room));
    if (x == nullptr) return;
    for (int64_t i = 0; i < (count * kPhases + 1) * call.threads; ++i) new (counters + i) Counter;
  }
};

// C = act(A W^T + b) on the team, to sink(row, column, n, values); no barrier.
template <class T, class P, class Sink>
static void team_product(const hff_linear& linear, int32_t activation, const Operands<P>& a,
                         int64_t rows, Counter* counters, int thread, int width,
                         typename P::Element* panels, Sink sink) {
  const GemmUnits units = GemmUnits::of<P>(linear, rows, width);
  Shares taken(counters, units.count(), thread, width);
  for (int64_t u = taken.take(); u >= 0; u = taken.take()) {
    gemm_unit<T, P>(linear, units, u, a, panels,
                    [&](int64_t row, int64_t n, int64_t column, int64_t columns, const float* c) {
                      finish_tile<T>(linear, activation, row, n, column, columns, c, sink);
                    });
  }
}

// One layer's pass on one thread.
template <class T, class P>
struct GemmPass {
  using Scratch = GemmScratch<T, P>;
  const hff_call& call;
  const hff_block& block;
  const Scratch& scratch;
  Attention<T, T> attention;
  Counter* counters;
  Barrier* barrier;
  int thread, width;
  int64_t rows, qkv_width;
  int32_t stage;
  const hff_block_io* io;  // null inside a model: the layer is FULL and writes scratch.x

  GemmPass(const hff_call& c, const hff_block& b, const hff_cache* cache, const Scratch& s,
           int64_t layer, Barrier* wait, int t, int w, const hff_block_io* out)
      : call(c),
        block(b),
        scratch(s),
        attention(c, b.heads, cache, s.qkv,
                  (b.heads.heads + 2 * b.heads.kv_heads) * b.heads.head_dim),
        counters(s.counters + layer * Scratch::kPhases * c.threads),
        barrier(wait),
        thread(t),
        width(w),
        rows(rows_of(c)),
        qkv_width(attention.qkv_stride),
        stage(out != nullptr ? out->stage : int32_t{HFF_STAGE_FULL}),
        io(out) {}

  int64_t first_row() const { return rows * thread / width; }
  int64_t end_row() const { return rows * (thread + 1) / width; }
  float* x_row(int64_t r) const { return scratch.x + r * block.hidden; }

  template <class Sink>
  void product(int phase, const hff_linear& linear, int32_t activation, const Operands<P>& a,
               Sink sink) const {
    team_product<T, P>(linear, activation, a, rows, counters + phase * call.threads, thread, width,
                       scratch.panels + thread * scratch.panel_room, sink);
  }

  // An fp32 row, rounded to T, as a row of A.
  void round_row(const float* x, int64_t cols, typename P::Input* row) const {
    for (int64_t k = 0; k < cols; k += kLanes) {
      const int64_t n = cols - k < kLanes ? cols - k : kLanes;
      store_input<P>(rounded<T>(load_n(x + k, n)), row, k, n, cols);
    }
    zero_tail<P>(row, cols);
  }

  // This thread's rows of x: normed into A; `keep`: into x as well.
  void norm(const hff_norm& n, const Operands<P>& a, bool keep) const {
    for (int64_t r = first_row(); r < end_row(); ++r) {
      float* y = keep ? x_row(r) : scratch.line + thread * scratch.line_room;
      norm_row(x_row(r), static_cast<const T*>(n.weight.data), static_cast<const T*>(n.bias.data),
               n.kind, n.eps, block.hidden, y);
      round_row(y, block.hidden, a.row(r));
    }
  }

  // ---- phases -----------------------------------------------------------------------------------

  void norm_in() const {
    const bool post = block.residual == HFF_RESIDUAL_POST_NORM;
    if (!post) norm(block.attention_norm, scratch.normed, false);
    if (parallel() && stage != HFF_STAGE_ATTENTION) norm(block.mlp_norm, scratch.second, false);
    for (int64_t r = first_row(); post && r < end_row(); ++r)
      round_row(x_row(r), block.hidden, scratch.normed.row(r));
    barrier->wait();
  }

  // q, k and v side by side, whether they are one matrix or three.
  void qkv() const {
    const auto into = [this](int64_t offset) {
      return [this, offset](int64_t row, int64_t column, int64_t n, F v) {
        store_n(v, scratch.qkv + row * qkv_width + offset + column, n);
      };
    };
    product(Scratch::kQkv, block.qkv, HFF_ACT_NONE, scratch.normed, into(0));
    if (block.k.weight.data == nullptr) return;
    product(Scratch::kKey, block.k, HFF_ACT_NONE, scratch.normed, into(block.qkv.rows));
    product(Scratch::kValue, block.v, HFF_ACT_NONE, scratch.normed,
            into(block.qkv.rows + block.k.rows));
  }

  void up(const Operands<P>& in) const {
    T* out = stage == HFF_STAGE_ATTENTION_UP ? static_cast<T*>(io->up_out.data) : nullptr;
    product(Scratch::kUp, block.up, block.activation, in,
            [&](int64_t row, int64_t column, int64_t n, F v) {
              if (out != nullptr) return store_n(v, out + row * block.mlp_width + column, n);
              store_input<P>(rounded<T>(v), scratch.act.row(row), column, n, block.mlp_width);
            });
    if (out != nullptr) return;
    for (int64_t r = first_row(); r < end_row(); ++r)
      zero_tail<P>(scratch.act.row(r), block.mlp_width);
  }

  void append() const {
    if (!attention.kept() && block.heads.rotary_dim == 0) return;
    const int64_t tiles = ceil_div(call.queries, kQueries), heads = block.heads.kv_heads;
    Shares units(counters + Scratch::kAppend * call.threads, call.batch * heads * tiles, thread,
                 width);
    for (int64_t u = units.take(); u >= 0; u = units.take()) {
      const int64_t b = u / tiles / heads, begin = u % tiles * kQueries;
      const int64_t end = begin + kQueries, queries = attention.queries(b);
      attention.append(b, u / tiles % heads, begin, end < queries ? end : queries);
    }
    barrier->wait();
  }

  void attend() const {
    const int64_t tiles = ceil_div(attention.longest(), kQueries), heads = block.heads.heads;
    const int64_t pairs = call.batch * heads;
    const FlashScratch private_scratch(scratch.flash + thread * scratch.flash_room,
                                       block.heads.head_dim);
    for (int64_t r = first_row(); r < end_row(); ++r)
      zero_tail<P>(scratch.context.row(r), block.o.cols);
    Shares units(counters + Scratch::kAttend * call.threads, pairs * tiles, thread, width);
    for (int64_t u = units.take(); u >= 0; u = units.take()) {
      const int64_t b = u / tiles / heads, first = (tiles - 1 - u % tiles) * kQueries;
      const int64_t left = attention.queries(b) - first;
      if (left <= 0) continue;
      flash_unit(attention, b, u / tiles % heads, first, left < kQueries ? left : kQueries,
                 private_scratch, [this](int64_t row, int64_t column, int64_t n, F v) {
                   store_input<P>(rounded<T>(v), scratch.context.row(row), column, n, block.o.cols);
                 });
    }
    barrier->wait();
  }

  // x = (before + linear(a)) + x, `before` null or (rows, hidden)
  void add_product(int phase, const hff_linear& linear, const Operands<P>& a,
                   const float* before) const {
    product(phase, linear, HFF_ACT_NONE, a, [&](int64_t row, int64_t column, int64_t n, F v) {
      float* x = x_row(row) + column;
      if (before != nullptr) v = add(load_n(before + row * block.hidden + column, n), v);
      store_n(add(v, load_n(x, n)), x, n);
    });
    barrier->wait();
  }

  void down_to_mlp() const {
    product(Scratch::kDown, block.down, HFF_ACT_NONE, scratch.act,
            [&](int64_t row, int64_t column, int64_t n, F v) {
              store_n(v, scratch.mlp + row * block.hidden + column, n);
            });
    barrier->wait();
  }

  // o without a residual, to the caller.
  void o_out() const {
    T* out = static_cast<T*>(io->attention_out.data);
    product(Scratch::kO, block.o, HFF_ACT_NONE, scratch.context,
            [&](int64_t row, int64_t column, int64_t n, F v) {
              store_n(v, out + row * block.hidden + column, n);
            });
    barrier->wait();
  }

  bool parallel() const { return block.residual == HFF_RESIDUAL_PARALLEL; }

  void run() const {
    norm_in();
    qkv();
    if (parallel() && stage != HFF_STAGE_ATTENTION) up(scratch.second);
    barrier->wait();
    append();
    attend();
    if (parallel() && stage == HFF_STAGE_FULL) {
      down_to_mlp();
      return add_product(Scratch::kO, block.o, scratch.context, scratch.mlp);
    }
    if (parallel() || stage == HFF_STAGE_ATTENTION) return o_out();
    const bool post = block.residual == HFF_RESIDUAL_POST_NORM;
    add_product(Scratch::kO, block.o, scratch.context, nullptr);
    norm(post ? block.attention_norm : block.mlp_norm, scratch.normed, post);
    barrier->wait();
    up(scratch.normed);
    barrier->wait();
    if (stage != HFF_STAGE_FULL) return;
    add_product(Scratch::kDown, block.down, scratch.act, nullptr);
    if (post) norm(block.mlp_norm, scratch.normed, true);
  }
};

}  // namespace HFF_ISA
}  // namespace hff

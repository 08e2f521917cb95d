// Transformer layers for many rows: prefill and encoders, assembled from gemm-inl.h and
// attend-flash-inl.h.
//   parallel:   y = x + attn(norm1(x)) + mlp(norm2(x))
//   sequential: a = x + attn(norm1(x)); y = a + mlp(norm2(a))
//   post-norm:  a = norm1(x + attn(x)); y = norm2(a + mlp(a))
//     phases norm | { qkv | append | attend | o } | norm | { up | down | } norm
// x: (rows, hidden) fp32 in scratch for all layers of a call; o and down add to it. qkv: (rows,
//   width), model dtype, as hff_heads lays it out; queries, and without a cache keys and values,
//   are read, and rotated, where they lie.
// Slices: what is in braces runs for some heads, then the next, and for some of the MLP's width:
//   little of qkv and act is in memory at once, and it stays in L2. The cut depends on the layer
//   alone, so no bit depends on threads, or on the other rows of the call.
// Work split: rows for norms, units of gemm-inl.h for products, blocks of queries for attention;
//   a barrier per `|`, none from o to the next slice's qkv. Append is left out where there is
//   neither cache nor RoPE.
// Rounding to the model dtype: after each norm, q, k and v, after RoPE, after attention (within it
//   as attend-inl.h says), after the activation and at the outputs; everything else is fp32.
// Order of sums: each product as in gemm-inl.h, the slices of o and down in order onto x.
// Bytes: weights once per phase and strip, activations from L2 or L3. Bound: multiply-adds.
// Memory: x and the norms' output, then qkv and context of a slice, or act of one, in one place.

namespace hff {
namespace HFF_ISA {

// C = act(A W^T + b) on the team, to sink(row, column, n, values) in `target`, or added there as
// Target says, without activation and bias; no barrier.
template <class T, class P, class Sink>
static void team_product(const Slice<T, P>& slice, int32_t activation, const Operands<P>& a,
                         int64_t rows, Counter* counters, int thread, int width,
                         typename P::Element* panels, const Target& target, Sink sink) {
  const GemmUnits units = GemmUnits::of<P>(slice.linear, rows, width);
  const int64_t end = units.count() * (thread + 1) / width;
  Shares taken(counters, units.count(), thread, width);
  for (int64_t u = taken.take(); u >= 0; u = taken.take()) {
    gemm_unit<T, P>(slice, units, u, u + 1 < end, a, panels, target,
                    [&](int64_t row, int64_t n, int64_t column, int64_t columns, const float* c) {
                      finish_tile<T>(slice.linear, activation, row, n, column, columns, c, sink);
                    });
  }
}

// One layer's pass on one thread.
template <class T, class P>
struct GemmPass {
  using Scratch = GemmScratch<T, P>;
  using Weight = Slice<T, P>;
  const hff_call& call;
  const hff_block& block;
  const hff_cache* cache;
  const Scratch& scratch;
  Counter* counters;
  Barrier* barrier;
  int thread, width;
  int64_t rows;
  int32_t stage;
  const hff_block_io* io;  // null inside a model: the layer is FULL and writes scratch.x
  Slices slices;

  GemmPass(const hff_call& c, const hff_block& b, const hff_cache* kv, const Scratch& s,
           int64_t layer, Barrier* wait, int t, int w, const hff_block_io* out)
      : call(c),
        block(b),
        cache(kv),
        scratch(s),
        counters(s.layer_counters(layer, c.threads)),
        barrier(wait),
        thread(t),
        width(w),
        rows(rows_of(c)),
        stage(out != nullptr ? out->stage : int32_t{HFF_STAGE_FULL}),
        io(out),
        slices(Slices::of<P>(b, stage)) {}

  int64_t first_row() const { return rows * thread / width; }
  int64_t end_row() const { return rows * (thread + 1) / width; }
  float* x_row(int64_t r) const { return scratch.x + r * block.hidden; }
  bool parallel() const { return block.residual == HFF_RESIDUAL_PARALLEL; }
  Counter* counters_of(int64_t slice, int phase) const {
    return counters + (slice * Scratch::kPhases + phase) * call.threads;
  }

  template <class Sink>
  void product(int64_t slice, int phase, const Weight& weight, int32_t activation,
               const Operands<P>& a, const Target& target, Sink sink) const {
    using Element = typename P::Element;
    team_product<T, P>(weight, activation, a, rows, counters_of(slice, phase), thread, width,
                       scratch.template own_of<Element>(thread), target, sink);
  }

  // An fp32 row, rounded to T, as a row of A.
  void round_row(const float* x, int64_t cols, typename P::Stored* row) const {
    for (int64_t k = 0; k < cols; k += kLanes) {
      const int64_t n = cols - k < kLanes ? cols - k : kLanes;
      store_input<T, P>(load_n(x + k, n), row, k, n);
    }
    zero_tail<P>(row, cols);
  }

  // This thread's rows of x: normed into A; `keep`: into x as well.
  void norm(const hff_norm& n, const Operands<P>& a, bool keep) const {
    for (int64_t r = first_row(); r < end_row(); ++r) {
      float* y = keep ? x_row(r) : scratch.template own_of<float>(thread);
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

  // ---- a slice of heads -------------------------------------------------------------------------

  // The heads of a slice as a layer of their own: q heads [first, + heads.heads), and their k/v.
  struct SliceOfHeads {
    hff_heads heads;
    hff_cache cache;
    int64_t index, q_width, kv_width, qkv_width;
  };
  SliceOfHeads heads_of(int64_t index) const {
    SliceOfHeads s{block.heads, {}, index, 0, 0, 0};
    s.heads.heads /= slices.heads;
    s.heads.kv_heads /= slices.heads;
    s.q_width = s.heads.heads * s.heads.head_dim;
    s.kv_width = s.heads.kv_heads * s.heads.head_dim;
    s.qkv_width = s.q_width + 2 * s.kv_width;
    if (cache == nullptr) return s;
    s.cache = *cache;
    const int64_t skipped = index * s.heads.kv_heads * cache->head_stride;
    s.cache.keys.data = static_cast<T*>(cache->keys.data) + skipped;
    s.cache.values.data = static_cast<T*>(cache->values.data) + skipped;
    return s;
  }

  // q, k and v of the slice side by side, whether they are one matrix or three.
  void qkv(const SliceOfHeads& s) const {
    const auto rows_to = [&](int phase, const hff_linear& linear, int64_t row, int64_t count,
                             int64_t offset) {
      T* to = scratch.qkv + offset;
      product(s.index, phase, Weight::of(linear, row, count, 0, linear.cols), HFF_ACT_NONE,
              scratch.normed, Target{to, s.qkv_width, sizeof(T)},
              [&](int64_t r, int64_t column, int64_t n, F v) {
                store_n(v, to + r * s.qkv_width + column, n);
              });
    };
    const bool three = block.k.weight.data != nullptr;
    if (!three && (slices.heads == 1 || block.heads.qkv_layout == HFF_QKV_PER_HEAD))
      return rows_to(Scratch::kQkv, block.qkv, s.index * s.qkv_width, s.qkv_width, 0);
    const hff_linear &k = three ? block.k : block.qkv, &v = three ? block.v : block.qkv;
    const int64_t keys = three ? 0 : s.q_width * slices.heads;
    const int64_t values = three ? 0 : keys + s.kv_width * slices.heads;
    rows_to(Scratch::kQkv, block.qkv, s.index * s.q_width, s.q_width, 0);
    rows_to(Scratch::kKey, k, keys + s.index * s.kv_width, s.kv_width, s.q_width);
    rows_to(Scratch::kValue, v, values + s.index * s.kv_width, s.kv_width, s.q_width + s.kv_width);
  }

  // Rotates q and k, and writes k and v to the cache if there is one.
  void append(const SliceOfHeads& s, const Attention<T, T>& attention) const {
    if (!attention.kept() && s.heads.rotary_dim == 0) return;
    constexpr int64_t kTokens = 128;
    const int64_t tiles = ceil_div(call.queries, kTokens), heads = s.heads.kv_heads;
    Shares units(counters_of(s.index, Scratch::kAppend), call.batch * heads * tiles, thread, width);
    for (int64_t u = units.take(); u >= 0; u = units.take()) {
      const int64_t b = u / tiles / heads, g = u / tiles % heads, begin = u % tiles * kTokens;
      const int64_t queries = attention.queries(b);
      const int64_t end = begin + kTokens < queries ? begin + kTokens : queries;
      attention.append(b, g, begin, end);
      for (int64_t i = begin; s.heads.rotary_dim > 0 && i < end; ++i) {
        T* q = scratch.qkv + attention.row_index(b, i) * s.qkv_width;
        for (int64_t h = g * attention.group(); h < (g + 1) * attention.group(); ++h) {
          T* head = q + h * attention.offsets.q_stride;
          attention.rotate(head, b, i, head);
        }
      }
    }
    barrier->wait();
  }

  // The attention of sequence b as a call of attend-inl.h.
  hff_attend_io attend_io(const SliceOfHeads& s, const Attention<T, T>& attention,
                          int64_t b) const {
    hff_attend_io io = {};
    io.batch = 1;
    io.heads = s.heads.heads;
    io.kv_heads = s.heads.kv_heads;
    io.head_dim = s.heads.head_dim;
    io.queries = attention.queries(b);
    io.keys = attention.past + io.queries;
    io.scale = s.heads.scale;
    io.causal = call.causal;
    io.q.data = attention.row(b, 0);
    io.q_strides = {0, attention.offsets.q_stride, s.qkv_width};
    const int64_t at = attention.cached(b, 0, 0);
    io.k.data = static_cast<const T*>(attention.cache.keys.data) + at;
    io.v.data = static_cast<const T*>(attention.cache.values.data) + at;
    io.k_strides = io.v_strides = {0, attention.cache.head_stride, attention.cache.token_stride};
    io.mask = call.mask;
    const int64_t size = mask_element_bytes(io.mask.kind, sizeof(T));
    if (io.mask.kind != HFF_MASK_NONE) {
      io.mask.data.data =
          static_cast<const char*>(io.mask.data.data) + b * io.mask.batch_stride * size;
    }
    return io;
  }

  void attend(const SliceOfHeads& s, const Attention<T, T>& attention) const {
    Arena own(scratch.template own_of<char>(thread));
    const typename Scratch::Flash flash = Scratch::flash_of(&own, s.heads.head_dim);
    for (int64_t r = first_row(); r < end_row(); ++r)
      zero_tail<P>(scratch.context.row(r), s.q_width);
    const AttendBlocks blocks = layer_blocks<typename Scratch::Exact>(s.heads.head_dim);
    const int64_t heads = s.heads.kv_heads, block = blocks.queries;
    const int64_t tiles = ceil_div(attention.longest() * attention.group(), block);
    Shares units(counters_of(s.index, Scratch::kAttend), call.batch * heads * tiles, thread, width);
    for (int64_t u = units.take(); u >= 0; u = units.take()) {
      const int64_t b = u / tiles / heads, g = u / tiles % heads;
      const int64_t first = (tiles - 1 - u % tiles) * block;
      const hff_attend_io io = attend_io(s, attention, b);
      const Attend<T> a(io);
      const int64_t left = a.rows() - first, rows = left < block ? left : block;
      if (rows <= 0) continue;
      flash.run(a, 0, g, first, rows, 0, a.limit(a.query_of(first + rows - 1)), blocks.keys);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = attention.row_index(b, a.query_of(first + r));
        store_head(flash, r, scratch.context.row(row), a.head_of(g, first + r), s);
      }
    }
    barrier->wait();
  }

  // Row r of the block, normalised, as head h of a row of A.
  void store_head(const typename Scratch::Flash& flash, int64_t r, typename P::Stored* to,
                  int64_t h, const SliceOfHeads& s) const {
    const float* context = flash.tiles.context + r * flash.tiles.context_room;
    const float total = flash.tiles.totals[r];
    const F scale = set1(total == 0.0f ? 0.0f : 1.0f / total);
    const int64_t dim = s.heads.head_dim;
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int64_t n = dim - d < kLanes ? dim - d : kLanes;
      store_input<T, P>(mul(load(context + d), scale), to, h * dim + d, n);
    }
  }

  // context = attention of the slice's heads
  void attention(const SliceOfHeads& s) const {
    const Attention<T, T> attention(call, s.heads, cache != nullptr ? &s.cache : nullptr,
                                    scratch.qkv, s.qkv_width);
    qkv(s);
    barrier->wait();
    append(s, attention);
    attend(s, attention);
  }

  // ---- products that end a branch ---------------------------------------------------------------

  // x += linear(a); no barrier
  void add_product(int64_t slice, int phase, const Weight& weight, const Operands<P>& a) const {
    const auto onto_x = [&](int64_t row, int64_t column, int64_t n, F v) {
      float* x = x_row(row) + column;
      store_n(add(v, load_n(x, n)), x, n);
    };
    const bool adds = weight.linear.bias.data == nullptr;
    product(slice, phase, weight, HFF_ACT_NONE, a, Target{scratch.x, block.hidden, 4, adds},
            onto_x);
  }

  // o without a residual, to the caller.
  void o_out() const {
    T* out = static_cast<T*>(io->attention_out.data);
    product(0, Scratch::kO, Weight(block.o), HFF_ACT_NONE, scratch.context,
            Target{out, block.hidden, sizeof(T)}, [&](int64_t row, int64_t column, int64_t n, F v) {
              store_n(v, out + row * block.hidden + column, n);
            });
    barrier->wait();
  }

  // act = a slice of the activated up(in); to the caller where the stage ends with it
  void up(int64_t slice, const Operands<P>& in) const {
    const int64_t count = block.mlp_width / slices.mlp;
    const Weight weight = Weight::of(block.up, slice * count, count, 0, block.up.cols);
    if (stage == HFF_STAGE_ATTENTION_UP) {
      T* out = static_cast<T*>(io->up_out.data);
      product(slice, Scratch::kUp, weight, block.activation, in,
              Target{out, block.mlp_width, sizeof(T)},
              [&](int64_t row, int64_t column, int64_t n, F v) {
                store_n(v, out + row * block.mlp_width + column, n);
              });
      return barrier->wait();
    }
    const Operands<P>& act = scratch.act;
    product(slice, Scratch::kUp, weight, block.activation, in,
            Target{act.data, act.stride, sizeof(*act.data)},
            [&](int64_t row, int64_t column, int64_t n, F v) {
              store_input<T, P>(v, act.row(row), column, n);
            });
    for (int64_t r = first_row(); r < end_row(); ++r) zero_tail<P>(act.row(r), count);
    barrier->wait();
  }

  void run() const {
    norm_in();
    for (int64_t i = 0; i < slices.heads; ++i) {
      const SliceOfHeads s = heads_of(i);
      attention(s);
      if (stage != HFF_STAGE_FULL) continue;
      add_product(i, Scratch::kO, Weight::of(block.o, 0, block.hidden, i * s.q_width, s.q_width),
                  scratch.context);
      // the next slice's q, k and v do not touch what o reads, its attention waits for them
      if (i + 1 == slices.heads) barrier->wait();
    }
    const bool post = block.residual == HFF_RESIDUAL_POST_NORM;
    if (stage != HFF_STAGE_FULL && (parallel() || stage == HFF_STAGE_ATTENTION)) o_out();
    if (stage == HFF_STAGE_ATTENTION) return;
    if (!parallel()) {
      if (stage == HFF_STAGE_ATTENTION_UP) {
        add_product(0, Scratch::kO, Weight(block.o), scratch.context);
        barrier->wait();
      }
      norm(post ? block.attention_norm : block.mlp_norm, scratch.normed, post);
      barrier->wait();
    }
    for (int64_t i = 0; i < slices.mlp; ++i) {
      up(i, parallel() ? scratch.second : scratch.normed);
      if (stage != HFF_STAGE_FULL) continue;
      const int64_t count = block.mlp_width / slices.mlp;
      add_product(i, Scratch::kDown, Weight::of(block.down, 0, block.hidden, i * count, count),
                  scratch.act);
      barrier->wait();
    }
    if (post && stage == HFF_STAGE_FULL) norm(block.mlp_norm, scratch.normed, true);
  }
};

}  // namespace HFF_ISA
}  // namespace hff

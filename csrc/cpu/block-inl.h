// Transformer layers, and whole tokens, for a few rows: the fused decode path. One call, one team,
// no allocation inside.
//   parallel:   y = x + attn(norm1(x)) + mlp(norm2(x))
//     phases norm_qkv_up | attend, down | o
//   sequential: a = x + attn(norm1(x)); y = a + mlp(norm2(a))
//     phases norm_qkv | attend | o | norm_up | down
// x: (rows, hidden) fp32 in scratch for all layers of a call; weights in the model dtype, read in
//   place, once per call for all rows.
// Work split: shares of weight rows and attention units; a barrier per `|`. Attention and `down`
//   share a phase: whoever has fewer heads, or shorter ones, streams more of `down`.
// Rounding to the model dtype: after each norm, at the cache, after attention, after the activation
//   (the inputs of a projection, as Hugging Face's Linear sees them), and at the outputs.
//   Everything else is fp32.
// Order of sums: each dot as in gemv-inl.h; (mlp + attn) + x as Hugging Face adds. No bit depends
//   on threads or batch.
// Bytes: every weight once, K and V once. Bound: the read stream.

namespace hff {
namespace HFF_ISA {

// Scratch of a call; private pieces are per thread. Sizes: rows <= kFewRows.
template <class T>
struct LayerScratch {
  float* x;                  // (rows, hidden)
  float* qkv;                // (rows, qkv.rows)
  Operand<T>* context;       // (rows, heads * head_dim)
  Operand<T>* act;           // (rows, mlp_width)
  float* mlp;                // (rows, hidden): down(act) of a parallel layer, until o joins it
  float* partials;           // (rows, heads, splits, partial_floats)
  Counter* counters;         // (layers, kPhases, threads), then (threads) for the head
  std::atomic<int>* merged;  // (layers, merged_stride): splits done of each (batch row, k/v head)
  int64_t merged_stride;
  // private, (threads, ...)
  Operand<T>* normed;  // (threads, 2, rows, widest)
  float* block;        // (threads, rows, kMaxBlockRows)
};

enum { kQkv = 0, kAppend, kAttend, kO, kUp, kDown, kPhases };

// One layer's pass on one thread.
template <class T>
struct LayerPass {
  const hff_call& call;
  const hff_block& block;
  const LayerScratch<T>& scratch;
  Attention<T, float> attention;
  Counter* counters;
  std::atomic<int>* merged;
  Barrier* barrier;
  int thread, width;
  int64_t rows;
  int32_t stage;
  const hff_block_io* io;  // null inside decode: the layer is FULL and writes scratch.x

  LayerPass(const hff_call& c, const hff_block& l, const hff_cache& cache, const LayerScratch<T>& s,
            int64_t layer, Barrier* b, int t, int w, const hff_block_io* out)
      : call(c),
        block(l),
        scratch(s),
        attention(c, l.heads, &cache, s.qkv, l.qkv.rows),
        counters(s.counters + layer * kPhases * c.threads),
        merged(s.merged + layer * s.merged_stride),
        barrier(b),
        thread(t),
        width(w),
        rows(c.batch * c.queries),
        stage(out != nullptr ? out->stage : int32_t{HFF_STAGE_FULL}),
        io(out) {}

  Shares shares(int phase, int64_t units) const {
    return Shares(counters + phase * call.threads, units, thread, width);
  }
  Operand<T>* normed(int which) const {
    return scratch.normed + (thread * 2 + which) * rows * block.hidden;
  }
  float* buffer() const { return scratch.block + thread * rows * kMaxBlockRows; }

  void norm(const hff_norm& n, int which) const {
    for (int64_t r = 0; r < rows; ++r)
      norm_to_operand(n, scratch.x + r * block.hidden, normed(which) + r * block.hidden);
  }
  void norm_to_operand(const hff_norm& n, const float* x, Operand<T>* out) const {
    const T* weight = static_cast<const T*>(n.weight.data);
    const T* bias = static_cast<const T*>(n.bias.data);
    if constexpr (sizeof(Operand<T>) == sizeof(T)) {
      norm_row(x, weight, bias, n.kind, n.eps, block.hidden, out);
    } else {
      norm_row(x, weight, bias, n.kind, n.eps, block.hidden, out);
      to_operand<T>(out, block.hidden, out);
    }
  }

  // Rows [begin, end) of a projection of all call rows into buffer(), bias added.
  float* project(const hff_linear& linear, int64_t begin, int64_t end, const Operand<T>* in) const {
    float* y = buffer();
    gemv<T>(linear, begin, end, in, linear.cols, rows, y, kMaxBlockRows);
    for (int64_t r = 0; r < rows; ++r)
      add_bias<T>(linear, begin, end - begin, y + r * kMaxBlockRows);
    return y;
  }

  // Calls body(begin, end) for every block of `linear`'s rows this thread gets.
  template <class Body>
  void each_block(const hff_linear& linear, int phase, Body body) const {
    const int64_t per_block = block_rows<T>(linear.cols);
    Shares blocks = shares(phase, blocks_of(linear.rows, per_block));
    for (int64_t i = blocks.take(); i >= 0; i = blocks.take()) {
      const int64_t begin = i * per_block;
      body(begin, begin + per_block < linear.rows ? begin + per_block : linear.rows);
    }
  }

  void qkv_rows(int64_t begin, int64_t end) const {
    const float* y = project(block.qkv, begin, end, normed(0));
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(scratch.qkv + r * block.qkv.rows + begin, y + r * kMaxBlockRows,
                  (end - begin) * sizeof(float));
    }
  }
  void up_rows(int64_t begin, int64_t end, const Operand<T>* in) const {
    float* y = project(block.up, begin, end, in);
    for (int64_t r = 0; r < rows; ++r) {
      float* values = y + r * kMaxBlockRows;
      for (int64_t i = 0; i < end - begin; i += kLanes) {
        const int64_t n = end - begin - i < kLanes ? end - begin - i : kLanes;
        store_n(activate<T>(load_n(values + i, n), block.activation), values + i, n);
      }
      if (stage == HFF_STAGE_ATTENTION_UP) {
        store_rows(values, end - begin,
                   static_cast<T*>(io->up_out.data) + r * block.mlp_width + begin);
      } else {
        to_operand<T>(values, end - begin, scratch.act + r * block.mlp_width + begin);
      }
    }
  }
  static void store_rows(const float* values, int64_t n, T* out) {
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t left = n - i < kLanes ? n - i : kLanes;
      store_n(load_n(values + i, left), out + i, left);
    }
  }

  void norm_qkv_up() const {
    norm(block.attention_norm, 0);
    norm(block.mlp_norm, 1);
    const int64_t per_qkv = block_rows<T>(block.qkv.cols),
                  qkv_blocks = blocks_of(block.qkv.rows, per_qkv);
    const int64_t per_up = block_rows<T>(block.up.cols),
                  up_blocks = blocks_of(block.up.rows, per_up);
    Shares blocks = shares(kQkv, qkv_blocks + up_blocks);
    for (int64_t i = blocks.take(); i >= 0; i = blocks.take()) {
      if (i < qkv_blocks) {
        qkv_rows(i * per_qkv,
                 i * per_qkv + per_qkv < block.qkv.rows ? i * per_qkv + per_qkv : block.qkv.rows);
      } else {
        const int64_t begin = (i - qkv_blocks) * per_up;
        up_rows(begin, begin + per_up < block.up.rows ? begin + per_up : block.up.rows, normed(1));
      }
    }
    barrier->wait();
  }

  void norm_qkv() const {
    norm(block.attention_norm, 0);
    each_block(block.qkv, kQkv, [&](int64_t begin, int64_t end) { qkv_rows(begin, end); });
    barrier->wait();
  }

  // Attention units; the context of every row is complete after the next barrier.
  void attend() const {
    const int64_t heads = block.heads.kv_heads, pairs = call.batch * heads,
                  splits = attention.splits();
    if (splits > 1) {
      Shares units = shares(kAppend, pairs);
      for (int64_t u = units.take(); u >= 0; u = units.take())
        attention.append(u / heads, u % heads, 0, call.queries);
      barrier->wait();
    }
    Shares units = shares(kAttend, pairs * splits);
    for (int64_t u = units.take(); u >= 0; u = units.take()) {
      const int64_t b = u / splits / heads, g = u / splits % heads;
      if (splits == 1) attention.append(b, g, 0, call.queries);
      attend_unit(b, g, u % splits, splits);
    }
  }
  void attend_unit(int64_t b, int64_t g, int64_t split, int64_t splits) const {
    const int64_t dim = block.heads.head_dim, step = partial_floats(dim);
    const int64_t begin = split * kSplit;
    const int64_t end = begin + kSplit < attention.keys() ? begin + kSplit : attention.keys();
    float context[kMaxHead + kLanes];
    for (int64_t h = g * attention.group(); h < (g + 1) * attention.group(); ++h) {
      for (int64_t i = 0; i < call.queries; ++i) {
        const int64_t row = b * call.queries + i;
        float* part = scratch.partials + ((row * block.heads.heads + h) * splits + split) * step;
        Softmax state{0.0f, 0.0f, splits == 1 ? context : part + kLanes};
        attend_query(attention, b, i, h, begin, end, &state);
        if (splits == 1) {
          finish(&state, dim);
          to_operand<T>(context, dim, scratch.context + row * block.o.cols + h * dim);
        } else {
          part[0] = state.top;
          part[1] = state.total;
        }
      }
    }
    const int64_t pair = b * block.heads.kv_heads + g;
    if (splits == 1 || merged[pair].fetch_add(1, std::memory_order_acq_rel) + 1 < splits) return;
    for (int64_t h = g * attention.group(); h < (g + 1) * attention.group(); ++h) {
      for (int64_t row = b * call.queries; row < (b + 1) * call.queries; ++row) {
        Softmax state{0.0f, 0.0f, context};
        merge_partials(scratch.partials + (row * block.heads.heads + h) * splits * step, splits,
                       dim, &state);
        to_operand<T>(context, dim, scratch.context + row * block.o.cols + h * dim);
      }
    }
  }

  // x = (mlp + part) + x in columns [begin, begin + n); part: (rows, kMaxBlockRows); mlp: (rows,
  // hidden) or null.
  void add_to_x(int64_t begin, int64_t n, const float* part, const float* mlp) const {
    for (int64_t r = 0; r < rows; ++r) {
      float* x = scratch.x + r * block.hidden + begin;
      for (int64_t i = 0; i < n; i += kLanes) {
        const int64_t left = n - i < kLanes ? n - i : kLanes;
        F value = load_n(part + r * kMaxBlockRows + i, left);
        if (mlp != nullptr) value = add(load_n(mlp + r * block.hidden + begin + i, left), value);
        store_n(add(value, load_n(x + i, left)), x + i, left);
      }
    }
  }

  void down_to_mlp() const {
    each_block(block.down, kDown, [&](int64_t begin, int64_t end) {
      const float* y = project(block.down, begin, end, scratch.act);
      for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(scratch.mlp + r * block.hidden + begin, y + r * kMaxBlockRows,
                    (end - begin) * sizeof(float));
      }
    });
    barrier->wait();
  }

  // x += o(context), or x = (mlp + o(context)) + x
  void o_residual(const float* mlp) const {
    each_block(block.o, kO, [&](int64_t begin, int64_t end) {
      add_to_x(begin, end - begin, project(block.o, begin, end, scratch.context), mlp);
    });
    barrier->wait();
  }

  // o without a residual, to the caller.
  void o_out() const {
    each_block(block.o, kO, [&](int64_t begin, int64_t end) {
      const float* y = project(block.o, begin, end, scratch.context);
      for (int64_t r = 0; r < rows; ++r) {
        store_rows(y + r * kMaxBlockRows, end - begin,
                   static_cast<T*>(io->attention_out.data) + r * block.hidden + begin);
      }
    });
    barrier->wait();
  }

  void norm_up() const {
    norm(block.mlp_norm, 1);
    each_block(block.up, kUp, [&](int64_t begin, int64_t end) { up_rows(begin, end, normed(1)); });
    barrier->wait();
  }

  void down_residual() const {
    each_block(block.down, kDown, [&](int64_t begin, int64_t end) {
      add_to_x(begin, end - begin, project(block.down, begin, end, scratch.act), nullptr);
    });
    barrier->wait();
  }

  void run() const {
    const bool parallel = block.residual == HFF_RESIDUAL_PARALLEL;
    const bool up = stage != HFF_STAGE_ATTENTION;
    if (parallel && up) {
      norm_qkv_up();
    } else {
      norm_qkv();
    }
    attend();
    if (parallel && stage == HFF_STAGE_FULL) {
      down_to_mlp();
      return o_residual(scratch.mlp);
    }
    barrier->wait();
    if (stage == HFF_STAGE_ATTENTION || parallel) return o_out();
    o_residual(nullptr);
    norm_up();
    if (stage == HFF_STAGE_FULL) down_residual();
  }
};

}  // namespace HFF_ISA
}  // namespace hff

// The entry points of one instruction set: scratch, team, and the loop over layers. decode: x =
//   embedding[ids]; x = layer(x) for every layer; h = final_norm(x); logits = head(h), in one team
//   run.
// hidden is h rounded to the model dtype; logits are rounded once, at the store. Cache lengths move
//   after everything else.

namespace hff {
namespace HFF_ISA {

HFF_INLINE int64_t rows_of(const hff_call& call) { return call.batch * call.queries; }

template <class T>
static LayerScratch<T> carve(Arena* arena, const hff_call& call, const hff_block* blocks,
                             int64_t count, const hff_cache* caches, int64_t hidden) {
  int64_t qkv = 1, context = 1, act = 1, partials = 1, kv_heads = 1;
  for (int64_t l = 0; l < count; ++l) {
    const hff_block& b = blocks[l];
    const int64_t floats = b.heads.heads * partial_floats(b.heads.head_dim);
    qkv = b.qkv.rows > qkv ? b.qkv.rows : qkv;
    context = b.o.cols > context ? b.o.cols : context;
    act = b.mlp_width > act ? b.mlp_width : act;
    partials = floats > partials ? floats : partials;
    kv_heads = b.heads.kv_heads > kv_heads ? b.heads.kv_heads : kv_heads;
  }
  const int64_t splits = count > 0 ? (*caches[0].length + call.queries + kSplit - 1) / kSplit : 0;
  const Size rows = rows_of(call), threads = call.threads;
  LayerScratch<T> s;
  s.merged_stride = call.batch * kv_heads;
  s.x = arena->take<float>(rows * Size(hidden));
  s.qkv = arena->take<float>(rows * Size(qkv));
  s.context = arena->take<Operand<T>>(rows * Size(context));
  s.act = arena->take<Operand<T>>(rows * Size(act));
  s.mlp = arena->take<float>(rows * Size(hidden));
  s.partials = arena->take<float>(rows * Size(partials) * Size(splits > 1 ? splits : 0));
  s.counters = arena->take<Counter>((Size(count) * Size(kPhases) + Size(1)) * threads);
  s.merged = arena->take<std::atomic<int>>(Size(count) * Size(s.merged_stride));
  s.normed = arena->take<Operand<T>>(threads * Size(2) * rows * Size(hidden));
  s.block = arena->take<float>(threads * rows * Size(kMaxBlockRows));
  if (s.x == nullptr) return s;
  for (int64_t i = 0; i < (count * kPhases + 1) * call.threads; ++i) new (s.counters + i) Counter;
  for (int64_t i = 0; i < count * s.merged_stride; ++i) new (s.merged + i) std::atomic<int>(0);
  return s;
}

// Runs `carve_into` once to measure and once over this thread's scratch; false when memory is out.
template <class Carve>
static bool with_scratch(Carve carve_into) {
  Arena measure(nullptr);
  carve_into(&measure);
  void* base = measure.used().ok() ? thread_scratch(measure.used().value()) : nullptr;
  if (base == nullptr) return false;
  Arena arena(base);
  carve_into(&arena);
  return true;
}

template <class T>
static void widen_row(const T* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    store_n(load_n(in + i, left), out + i, left);
  }
}

template <class T>
static void narrow_row(const float* in, int64_t n, T* out) {
  LayerPass<T>::store_rows(in, n, out);
}

// ---- one layer ----------------------------------------------------------------------------------

template <class T>
struct BlockRun {
  const hff_call& call;
  const hff_block& block;
  const hff_cache& cache;
  const hff_block_io& io;
  LayerScratch<T> scratch;
  Barrier barrier;

  static void work(void* self, int thread, int width) {
    BlockRun& run = *static_cast<BlockRun*>(self);
    LayerPass<T>(run.call, run.block, run.cache, run.scratch, 0, &run.barrier, thread, width,
                 &run.io)
        .run();
  }
};

template <class T>
static hff_status block_call(const hff_call& call, const hff_block& block, const hff_cache& cache,
                             const hff_block_io& io) {
  LayerScratch<T> scratch;
  const bool had =
      with_scratch([&](Arena* a) { scratch = carve<T>(a, call, &block, 1, &cache, block.hidden); });
  if (!had) return fail(HFF_OUT_OF_MEMORY, "no memory for the scratch of a layer");
  const int64_t size = rows_of(call) * block.hidden;
  widen_row(static_cast<const T*>(io.x.data), size, scratch.x);
  BlockRun<T> run{call, block, cache, io, scratch, {}};
  run_on_team(call.threads, BlockRun<T>::work, &run, &run.barrier);
  const bool sum_of_attention =
      io.stage == HFF_STAGE_ATTENTION_UP && block.residual == HFF_RESIDUAL_SEQUENTIAL;
  if (io.stage == HFF_STAGE_FULL) narrow_row(scratch.x, size, static_cast<T*>(io.out.data));
  if (sum_of_attention) narrow_row(scratch.x, size, static_cast<T*>(io.attention_out.data));
  *cache.length += call.queries;
  return HFF_OK;
}

// ---- a whole token ------------------------------------------------------------------------------

template <class T>
struct DecodeRun {
  const hff_call& call;
  const hff_model& model;
  const hff_cache* caches;
  const hff_decode_io& io;
  LayerScratch<T> scratch;
  Operand<T>* last;  // (batch, keep, hidden): final norm, the head's input
  Barrier barrier;

  static void work(void* self, int thread, int width) {
    DecodeRun& run = *static_cast<DecodeRun*>(self);
    for (int64_t l = 0; l < run.model.block_count; ++l) {
      LayerPass<T>(run.call, run.model.blocks[l], run.caches[l], run.scratch, l, &run.barrier,
                   thread, width, nullptr)
          .run();
    }
    if (thread == 0) run.norm_out();
    if (run.io.logits.data == nullptr) return;
    run.barrier.wait();
    run.head_logits(thread, width);
  }

  // h = final_norm(x), to `hidden` and, for the kept queries, to the head's input.
  void norm_out() const {
    const T* weight = static_cast<const T*>(model.final_norm.weight.data);
    const T* bias = static_cast<const T*>(model.final_norm.bias.data);
    T* hidden = static_cast<T*>(io.hidden.data);
    for (int64_t r = 0; r < rows_of(call); ++r) {
      const float* x = scratch.x + r * model.hidden;
      const int64_t i = r % call.queries - (call.queries - io.keep);
      if (hidden != nullptr) {
        norm_row(x, weight, bias, model.final_norm.kind, model.final_norm.eps, model.hidden,
                 hidden + r * model.hidden);
      }
      if (io.logits.data == nullptr || i < 0) continue;
      Operand<T>* out = last + (r / call.queries * io.keep + i) * model.hidden;
      norm_row(x, weight, bias, model.final_norm.kind, model.final_norm.eps, model.hidden, out);
      if constexpr (sizeof(Operand<T>) != sizeof(T)) to_operand<T>(out, model.hidden, out);
    }
  }

  void head_logits(int thread, int width) const {
    const int64_t kept = call.batch * io.keep, per_block = block_rows<T>(model.head.cols);
    Shares blocks(scratch.counters + model.block_count * kPhases * call.threads,
                  blocks_of(model.head.rows, per_block), thread, width);
    float* y = scratch.block + thread * rows_of(call) * kMaxBlockRows;
    for (int64_t i = blocks.take(); i >= 0; i = blocks.take()) {
      const int64_t begin = i * per_block;
      const int64_t end = begin + per_block < model.head.rows ? begin + per_block : model.head.rows;
      gemv<T>(model.head, begin, end, last, model.hidden, kept, y, kMaxBlockRows);
      for (int64_t r = 0; r < kept; ++r) {
        float* values = y + r * kMaxBlockRows;
        add_bias<T>(model.head, begin, end - begin, values);
        narrow_row(values, end - begin,
                   static_cast<T*>(io.logits.data) + r * model.head.rows + begin);
      }
    }
  }
};

template <class T>
static void embed(const hff_call& call, const hff_model& model, const hff_decode_io& io, float* x) {
  if (io.ids.data == nullptr)
    return widen_row(static_cast<const T*>(io.x.data), rows_of(call) * model.hidden, x);
  const int64_t* ids = static_cast<const int64_t*>(io.ids.data);
  for (int64_t r = 0; r < rows_of(call); ++r) {
    const int64_t id =
        ids[r / call.queries * io.id_batch_stride + r % call.queries * io.id_query_stride];
    widen_row(static_cast<const T*>(model.embedding.data) + id * model.hidden, model.hidden,
              x + r * model.hidden);
  }
}

template <class T>
static hff_status decode_call(const hff_call& call, const hff_model& model, const hff_cache* caches,
                              const hff_decode_io& io) {
  LayerScratch<T> scratch;
  Operand<T>* last = nullptr;
  const bool had = with_scratch([&](Arena* a) {
    scratch = carve<T>(a, call, model.blocks, model.block_count, caches, model.hidden);
    last = a->take<Operand<T>>(Size(rows_of(call)) * Size(model.hidden));
  });
  if (!had) return fail(HFF_OUT_OF_MEMORY, "no memory for the scratch of a decode step");
  embed<T>(call, model, io, scratch.x);
  DecodeRun<T> run{call, model, caches, io, scratch, last, {}};
  run_on_team(call.threads, DecodeRun<T>::work, &run, &run.barrier);
  for (int64_t l = 0; l < model.block_count; ++l) *caches[l].length += call.queries;
  return HFF_OK;
}

// ---- attention of many rows ---------------------------------------------------------------------

template <class T>
struct FlashRun {
  Attention<T, T> attention;
  float* scratch;
  Counter* counters;
  T* out;
  Barrier barrier;

  static void work(void* self, int thread, int) {
    FlashRun& run = *static_cast<FlashRun*>(self);
    const Attention<T, T>& a = run.attention;
    const int64_t tiles = (a.call.queries + kQueries - 1) / kQueries, kv_heads = a.heads.kv_heads;
    for (int64_t u = run.counters[0].take(); u < a.call.batch * kv_heads * tiles;
         u = run.counters[0].take()) {
      const int64_t begin = u % tiles * kQueries, end = begin + kQueries;
      a.append(u / tiles / kv_heads, u / tiles % kv_heads, begin,
               end < a.call.queries ? end : a.call.queries);
    }
    run.barrier.wait();
    const int64_t heads = a.heads.heads, pairs = a.call.batch * heads, dim = a.heads.head_dim;
    const FlashScratch scratch(run.scratch + thread * FlashScratch::floats(dim), dim);
    for (int64_t u = run.counters[1].take(); u < pairs * tiles; u = run.counters[1].take()) {
      const int64_t first = (tiles - 1 - u / pairs) * kQueries, left = a.call.queries - first;
      flash_unit(a, u % pairs / heads, u % heads, first, left < kQueries ? left : kQueries, scratch,
                 run.out);
    }
  }
};

template <class T>
static hff_status attention_call(const hff_call& call, const hff_heads& heads,
                                 const hff_cache& cache, const hff_attention_io& io) {
  float* scratch = nullptr;
  Counter* counters = nullptr;
  const bool had = with_scratch([&](Arena* a) {
    scratch = a->take<float>(Size(call.threads) * Size(FlashScratch::floats(heads.head_dim)));
    counters = a->take<Counter>(2);
  });
  if (!had) return fail(HFF_OUT_OF_MEMORY, "no memory for the scratch of an attention");
  for (int i = 0; i < 2; ++i) new (counters + i) Counter;
  FlashRun<T> run{{call, heads, cache, static_cast<const T*>(io.qkv.data), io.qkv_row_stride},
                  scratch,
                  counters,
                  static_cast<T*>(io.out.data),
                  {}};
  run_on_team(call.threads, FlashRun<T>::work, &run, &run.barrier);
  *cache.length += call.queries;
  return HFF_OK;
}

// ---- single operations --------------------------------------------------------------------------

template <class T>
struct LinearRun {
  const hff_linear& linear;
  const hff_linear_io& io;
  const Operand<T>* x;
  float* buffers;     // (threads, HFF_MAX_ROWS, kMaxBlockRows)
  Counter* counters;  // (threads)

  static void work(void* self, int thread, int width) {
    const LinearRun& run = *static_cast<LinearRun*>(self);
    const hff_linear& l = run.linear;
    const int64_t per_block = block_rows<T>(l.cols);
    float* y = run.buffers + thread * HFF_MAX_ROWS * kMaxBlockRows;
    Shares blocks(run.counters, blocks_of(l.rows, per_block), thread, width);
    for (int64_t i = blocks.take(); i >= 0; i = blocks.take()) {
      const int64_t begin = i * per_block,
                    end = begin + per_block < l.rows ? begin + per_block : l.rows;
      for (int64_t row = 0; row < run.io.rows; row += HFF_MAX_ROWS) {
        const int64_t rows = run.io.rows - row < HFF_MAX_ROWS ? run.io.rows - row : HFF_MAX_ROWS;
        gemv<T>(l, begin, end, run.x + row * l.cols, l.cols, rows, y, kMaxBlockRows);
        for (int64_t r = 0; r < rows; ++r)
          run.finish_row(begin, end - begin, y + r * kMaxBlockRows, row + r);
      }
    }
  }
  void finish_row(int64_t begin, int64_t n, float* values, int64_t row) const {
    add_bias<T>(linear, begin, n, values);
    T* out = static_cast<T*>(io.out.data) + row * linear.rows + begin;
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t left = n - i < kLanes ? n - i : kLanes;
      store_n(activate(load_n(values + i, left), io.activation), out + i, left);
    }
  }
};

template <class T>
static hff_status linear_call(const hff_linear& linear, const hff_linear_io& io) {
  Operand<T>* copy = nullptr;
  float* buffers = nullptr;
  Counter* counters = nullptr;
  const bool convert = sizeof(Operand<T>) != sizeof(T);
  const Size size = Size(io.rows) * Size(linear.cols);
  const bool had = with_scratch([&](Arena* a) {
    copy = a->take<Operand<T>>(convert ? size : Size(0));
    buffers = a->take<float>(Size(io.threads) * Size(HFF_MAX_ROWS) * Size(kMaxBlockRows));
    counters = a->take<Counter>(io.threads);
  });
  if (!had) return fail(HFF_OUT_OF_MEMORY, "no memory for the scratch of a linear");
  for (int i = 0; i < io.threads; ++i) new (counters + i) Counter;
  const Operand<T>* x = static_cast<const Operand<T>*>(io.x.data);
  if constexpr (sizeof(Operand<T>) != sizeof(T)) {
    widen_row(static_cast<const T*>(io.x.data), size.value(), copy);
    x = copy;
  }
  LinearRun<T> run{linear, io, x, buffers, counters};
  run_on_team(io.threads, LinearRun<T>::work, &run);
  return HFF_OK;
}

template <class T>
static hff_status norm_call(const hff_norm& norm, const hff_norm_io& io) {
  for (int64_t r = 0; r < io.rows; ++r) {
    norm_row(static_cast<const T*>(io.x.data) + r * io.hidden,
             static_cast<const T*>(norm.weight.data), static_cast<const T*>(norm.bias.data),
             norm.kind, norm.eps, io.hidden, static_cast<T*>(io.out.data) + r * io.hidden);
  }
  return HFF_OK;
}

}  // namespace HFF_ISA
}  // namespace hff

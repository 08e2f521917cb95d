// Few rows: a layer, or a whole token in one team run.
//   x = embedding[ids]; x = layer(x) for every layer; h = final_norm(x); logits = head(h)
// hidden is h rounded to the model dtype; logits are rounded once, at the store. Cache lengths move
//   after everything else.

namespace hff {
namespace HFF_ISA {

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
static hff_status block_of_few(const hff_call& call, const hff_block& block, const hff_cache& cache,
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

// One row through the final norm, or as it is where there is none.
template <class T, class Y>
static void final_norm_row(const hff_model& model, const float* x, Y* y) {
  const hff_norm& n = model.final_norm;
  if (n.weight.data != nullptr) {
    return norm_row(x, static_cast<const T*>(n.weight.data), static_cast<const T*>(n.bias.data),
                    n.kind, n.eps, model.hidden, y);
  }
  for (int64_t k = 0; k < model.hidden; k += kLanes)
    store_n(load_n(x + k, model.hidden - k), y + k, model.hidden - k);
}

// Which row of the head's input a row of the call is; -1: none.
HFF_INLINE int64_t kept_row(const hff_call& call, const hff_model_io& io, int64_t row) {
  if (io.logits.data == nullptr) return -1;
  const int64_t i = row % call.queries - (call.queries - io.keep);
  return i < 0 ? -1 : row / call.queries * io.keep + i;
}

// Row r of the embedding, or of the caller's x.
template <class T>
static void embed_row(const hff_call& call, const hff_model& model, const hff_model_io& io,
                      int64_t r, float* x) {
  if (io.ids.data == nullptr)
    return widen_row(static_cast<const T*>(io.x.data) + r * model.hidden, model.hidden, x);
  const int64_t id = static_cast<const int64_t*>(
      io.ids.data)[r / call.queries * io.id_batch_stride + r % call.queries * io.id_query_stride];
  widen_row(static_cast<const T*>(model.embedding.data) + id * model.hidden, model.hidden, x);
}

// Logits of `kept` rows of the head's input, weight rows shared over the team.
template <class T>
static void head_rows(const hff_model& model, const Operand<T>* last, int64_t kept,
                      Counter* counters, int thread, int width, float* y, T* logits) {
  const int64_t per_block = block_rows<T>(model.head.cols);
  Shares blocks(counters, blocks_of(model.head.rows, per_block), thread, width);
  for (int64_t i = blocks.take(); i >= 0; i = blocks.take()) {
    const int64_t begin = i * per_block;
    const int64_t end = begin + per_block < model.head.rows ? begin + per_block : model.head.rows;
    gemv<T>(model.head, begin, end, last, model.hidden, kept, y, kMaxBlockRows);
    for (int64_t r = 0; r < kept; ++r) {
      float* values = y + r * kMaxBlockRows;
      add_bias<T>(model.head, begin, end - begin, values);
      narrow_row(values, end - begin, logits + r * model.head.rows + begin);
    }
  }
}

template <class T>
struct DecodeRun {
  const hff_call& call;
  const hff_model& model;
  const hff_cache* caches;
  const hff_model_io& io;
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
    head_rows(run.model, run.last, run.call.batch * run.io.keep,
              run.scratch.counters + run.model.block_count * kPhases * run.call.threads, thread,
              width, run.scratch.block + thread * rows_of(run.call) * kMaxBlockRows,
              static_cast<T*>(run.io.logits.data));
  }

  // h = final_norm(x), to `hidden` and, for the kept queries, to the head's input.
  void norm_out() const {
    T* hidden = static_cast<T*>(io.hidden.data);
    for (int64_t r = 0; r < rows_of(call); ++r) {
      const float* x = scratch.x + r * model.hidden;
      if (hidden != nullptr) final_norm_row<T>(model, x, hidden + r * model.hidden);
      const int64_t kept = kept_row(call, io, r);
      if (kept < 0) continue;
      Operand<T>* out = last + kept * model.hidden;
      final_norm_row<T>(model, x, out);
      if constexpr (sizeof(Operand<T>) != sizeof(T)) to_operand<T>(out, model.hidden, out);
    }
  }
};

// Bytes that row kernels read of a model's matrices.
template <class T>
static double weight_bytes(const hff_model& model, bool head) {
  const auto elements = [](const hff_linear& l) {
    return l.weight.data != nullptr ? static_cast<double>(l.rows) * static_cast<double>(l.cols) : 0;
  };
  double sum = head ? elements(model.head) : 0;
  for (int64_t l = 0; l < model.block_count; ++l) {
    const hff_block& b = model.blocks[l];
    sum += elements(b.qkv) + elements(b.k) + elements(b.v) + elements(b.o) + elements(b.up) +
           elements(b.down);
  }
  return sum * sizeof(T);
}

template <class T>
static hff_status model_of_few(const hff_call& call, const hff_model& model,
                               const hff_cache* caches, const hff_model_io& io) {
  LayerScratch<T> scratch;
  Operand<T>* last = nullptr;
  const bool had = with_scratch([&](Arena* a) {
    scratch = carve<T>(a, call, model.blocks, model.block_count, caches, model.hidden);
    last = a->take<Operand<T>>(Size(rows_of(call)) * Size(model.hidden));
  });
  if (!had) return fail(HFF_OUT_OF_MEMORY, "no memory for the scratch of a decode step");
  for (int64_t r = 0; r < rows_of(call); ++r)
    embed_row<T>(call, model, io, r, scratch.x + r * model.hidden);
  DecodeRun<T> run{call, model, caches, io, scratch, last, {}};
  const PrefetchTrial trial(call.dtype, rows_of(call),
                            weight_bytes<T>(model, io.logits.data != nullptr));
  run_on_team(call.threads, DecodeRun<T>::work, &run, &run.barrier);
  for (int64_t l = 0; l < model.block_count; ++l) *caches[l].length += call.queries;
  return HFF_OK;
}

}  // namespace HFF_ISA
}  // namespace hff

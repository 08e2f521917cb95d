// Many rows: a layer, or a whole model in one team run; the same steps as decode-inl.h on matrix
//   kernels. Logits of few kept rows go through row kernels.
// A thread embeds, norms and returns the same contiguous share of rows in every layer, so that the
//   result may lie where x does; what comes of the norms lies there in between.

namespace hff {
namespace HFF_ISA {

// Most rows for which row kernels stream the weights faster than matrix kernels pack them. Time of
// row kernels over that of matrix kernels, (3072, 768) weights past the caches, 2-core Zen 5: bf16
// 0.55 at 16 rows, 0.91 at 32, 1.03 at 48; fp32 0.79 at 8, 1.03 at 12, 1.45 at 24; fp16 0.92 at 16,
// 1.31 at 32. Sapphire Rapids: bf16, by AMX, 0.93 at 8, 1.5 at 12, 1.9 at 16; fp32 0.82, 1.03,
// 1.29; fp16 0.62, 0.96, 1.14. One number for all, since up to it a row's bits do not depend on the
// batch.
constexpr int64_t kFewRows = 16;

// ---- one layer ----------------------------------------------------------------------------------

template <class T, class P>
struct GemmBlockRun {
  const hff_call& call;
  const hff_block& block;
  const hff_cache* cache;
  const hff_block_io& io;
  GemmScratch<T, P> scratch;
  Barrier barrier;

  static void work(void* self, int thread, int width) {
    GemmBlockRun& run = *static_cast<GemmBlockRun*>(self);
    const TileScope tiles;
    const GemmPass<T, P> pass(run.call, run.block, run.cache, run.scratch, 0, &run.barrier, thread,
                              width, &run.io);
    const int64_t hidden = run.block.hidden;
    const T* x = static_cast<const T*>(run.io.x.data);
    for (int64_t r = pass.first_row(); r < pass.end_row(); ++r)
      widen_row(x + r * hidden, hidden, pass.x_row(r));
    pass.run();
    T* out = static_cast<T*>(run.io.stage == HFF_STAGE_FULL ? run.io.out.data
                                                            : run.io.attention_out.data);
    const bool sum_of_attention = run.io.stage == HFF_STAGE_ATTENTION_UP && !pass.parallel();
    if (run.io.stage != HFF_STAGE_FULL && !sum_of_attention) return;
    for (int64_t r = pass.first_row(); r < pass.end_row(); ++r)
      narrow_row(pass.x_row(r), hidden, out + r * hidden);
  }
};

template <class T, class P>
static hff_status block_of_many(const hff_call& call, const hff_block& block,
                                const hff_cache* cache, const hff_block_io& io) {
  GemmScratch<T, P> scratch;
  const bool had = with_scratch([&](Arena* a) {
    scratch.carve(a, call, &block, 1, block.hidden, rows_of(call), io.stage, nullptr);
  });
  if (!had) return fail(HFF_OUT_OF_MEMORY, "no memory for the scratch of a layer");
  GemmBlockRun<T, P> run{call, block, cache, io, scratch, {}};
  run_on_team(call.threads, GemmBlockRun<T, P>::work, &run, &run.barrier);
  trim_thread_scratch(kKeptScratch);
  if (cache != nullptr) *cache->length += call.queries;
  return HFF_OK;
}

// ---- a whole model ------------------------------------------------------------------------------

template <class T, class P>
struct GemmModelRun {
  const hff_call& call;
  const hff_model& model;
  const hff_cache* caches;
  const hff_model_io& io;
  GemmScratch<T, P> scratch;
  Operand<T>* last;  // (batch * keep, hidden): the head's input where those rows are few
  float* block;      // (threads, kFewRows, kMaxBlockRows)
  Barrier barrier;

  int64_t kept() const { return io.logits.data != nullptr ? call.batch * io.keep : 0; }

  static void work(void* self, int thread, int width) {
    GemmModelRun& run = *static_cast<GemmModelRun*>(self);
    const TileScope tiles;
    const int64_t rows = rows_of(run.call), hidden = run.model.hidden;
    const int64_t first = rows * thread / width, end = rows * (thread + 1) / width;
    for (int64_t r = first; r < end; ++r)
      embed_row<T>(run.call, run.model, run.io, r, run.scratch.x + r * hidden);
    for (int64_t l = 0; l < run.model.block_count; ++l) {
      GemmPass<T, P>(run.call, run.model.blocks[l],
                     run.caches != nullptr ? run.caches + l : nullptr, run.scratch, l, &run.barrier,
                     thread, width, nullptr)
          .run();
    }
    // norm_out fills other rows of `normed` than a thread's own, which a post-norm layer ends in
    if (run.kept() > 0 && run.last == nullptr) run.barrier.wait();
    for (int64_t r = first; r < end; ++r) run.norm_out(r, thread);
    if (run.kept() == 0) return;
    run.barrier.wait();
    run.head(thread, width);
  }

  void norm_out(int64_t r, int thread) const {
    const float* x = scratch.x + r * model.hidden;
    T* hidden = static_cast<T*>(io.hidden.data);
    if (hidden != nullptr) final_norm_row<T>(model, x, hidden + r * model.hidden);
    const int64_t to = kept_row(call, io, r);
    if (to < 0) return;
    float* line = scratch.template own_of<float>(thread);
    final_norm_row<T>(model, x, line);
    if (last != nullptr) return to_operand<T>(line, model.hidden, last + to * model.hidden);
    typename P::Stored* row = scratch.normed.row(to);
    for (int64_t k = 0; k < model.hidden; k += kLanes) {
      const int64_t n = model.hidden - k < kLanes ? model.hidden - k : kLanes;
      store_input<T, P>(load_n(line + k, n), row, k, n);
    }
    zero_tail<P>(row, model.hidden);
  }

  void head(int thread, int width) const {
    Counter* counters = scratch.layer_counters(model.block_count, call.threads);
    T* logits = static_cast<T*>(io.logits.data);
    if (last != nullptr) {
      return head_rows(model, last, kept(), counters, thread, width,
                       block + thread * kFewRows * kMaxBlockRows, logits);
    }
    team_product<T, P>(Slice<T, P>(model.head), HFF_ACT_NONE, scratch.normed, kept(), counters,
                       thread, width, scratch.template own_of<typename P::Element>(thread),
                       Target{logits, model.head.rows, sizeof(T)},
                       [&](int64_t row, int64_t column, int64_t n, F v) {
                         store_n(v, logits + row * model.head.rows + column, n);
                       });
  }
};

template <class T, class P>
static hff_status model_of_many(const hff_call& call, const hff_model& model,
                                const hff_cache* caches, const hff_model_io& io) {
  GemmModelRun<T, P> run{call, model, caches, io, {}, nullptr, nullptr, {}};
  const bool few = run.kept() > 0 && run.kept() <= kFewRows;
  const bool lends =
      io.logits.data == nullptr && lie_as_operands<T, P>(rows_of(call), model.hidden);
  T* const lent = lends ? static_cast<T*>(io.hidden.data) : nullptr;
  const bool had = with_scratch([&](Arena* a) {
    run.scratch.carve(a, call, model.blocks, model.block_count, model.hidden, rows_of(call),
                      HFF_STAGE_FULL, lent);
    run.last = a->take<Operand<T>>(few ? Size(run.kept()) * Size(model.hidden) : Size(0));
    run.block = a->take<float>(Size(call.threads) * Size(few ? kFewRows * kMaxBlockRows : 0));
    if (!few) run.last = nullptr;
  });
  if (!had) return fail(HFF_OUT_OF_MEMORY, "no memory for the scratch of a model's pass");
  run_on_team(call.threads, GemmModelRun<T, P>::work, &run, &run.barrier);
  trim_thread_scratch(kKeptScratch);
  for (int64_t l = 0; caches != nullptr && l < model.block_count; ++l)
    *caches[l].length += call.queries;
  return HFF_OK;
}

}  // namespace HFF_ISA
}  // namespace hff

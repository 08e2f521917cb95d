// The entry point of the attention kernels: blocks from the table, scratch, units over the team.

namespace hff {
namespace HFF_ISA {

#if defined(HFF_TILES)
constexpr Hardware kHardware = Hardware::kAmx;
#elif defined(__AVX512BF16__)
constexpr Hardware kHardware = Hardware::kAvx512Bf16;
#elif defined(__AVX512F__)
constexpr Hardware kHardware = Hardware::kAvx512;
#elif defined(__AVX2__)
constexpr Hardware kHardware = Hardware::kAvx2;
#else
constexpr Hardware kHardware = Hardware::kScalar;
#endif

constexpr int64_t kKeptScores = 64 << 20;

// The caller's blocks, or the table's; no more queries than there are, and whole panels of keys.
static AttendBlocks blocks_for(const hff_attend_io& io) {
  AttendBlocks blocks = attend_blocks(io.kernel, kHardware, io.head_dim, io.keys);
  if (io.block_queries != 0) blocks.queries = io.block_queries;
  if (io.block_keys != 0) blocks.keys = io.block_keys;
  const Size rows = Size(io.queries) * Size(io.heads / io.kv_heads);  // proven by abi_attend.h
  if (blocks.queries > rows.value()) blocks.queries = rows.value();
  if (blocks.keys > io.keys) blocks.keys = io.keys;
  blocks.keys = whole_panels(blocks.keys);
  return blocks;
}

template <class T, class P>
struct TiledRun {
  Attend<T> attend;
  AttendBlocks blocks;
  TiledUnit<T, P>* units;  // (threads)
  Counter* counter;
  Barrier barrier;

  explicit TiledRun(const hff_attend_io& io) : attend(io), blocks(blocks_for(io)) {}
  void carve(Arena* arena) {
    const int threads = attend.io.threads;
    units = arena->take<TiledUnit<T, P>>(threads);
    counter = arena->take<Counter>(1);
    for (int t = 0; t < threads; ++t) {
      TiledUnit<T, P> unit;
      unit.carve(arena, attend.io, blocks);
      if (units != nullptr) units[t] = unit;
    }
  }
  hff_status run() {
    new (counter) Counter;
    run_on_team(attend.io.threads, work, this, &barrier);
    return HFF_OK;
  }
  static void work(void* self, int thread, int) {
    TiledRun& run = *static_cast<TiledRun*>(self);
    const TileScope scope;
    const Attend<T>& a = run.attend;
    const int64_t tiles = ceil_div(a.rows(), run.blocks.queries),
                  pairs = a.io.batch * a.io.kv_heads;
    for (int64_t u = run.counter->take(); u < tiles * pairs; u = run.counter->take()) {
      const int64_t pair = u % pairs, first = (tiles - 1 - u / pairs) * run.blocks.queries;
      const int64_t left = a.rows() - first;
      run.units[thread].run(a, pair / a.io.kv_heads, pair % a.io.kv_heads, first,
                            left < run.blocks.queries ? left : run.blocks.queries, run.blocks);
    }
  }
};

template <class T, class P>
struct FlashAttendRun {
  Attend<T> attend;
  AttendBlocks blocks;
  int64_t splits, part;      // of a k/v head's keys; floats of one row's result
  FlashAttend<T, P>* units;  // (threads)
  float* parts;              // (batch, kv_heads, rows, splits, part): top, total, context
  Counter* counters;         // (2)
  Barrier barrier;

  explicit FlashAttendRun(const hff_attend_io& io)
      : attend(io),
        blocks(blocks_for(io)),
        splits(attend.rows() <= kSplitRows ? ceil_div(io.keys, kSplit) : 1),
        part(partial_floats(io.head_dim)) {
    if (attend.rows() <= kSplitRows) blocks.queries = attend.rows();
  }
  void carve(Arena* arena) {
    const hff_attend_io& io = attend.io;
    units = arena->take<FlashAttend<T, P>>(io.threads);
    counters = arena->take<Counter>(2);
    const Size heads = Size(io.batch) * Size(io.kv_heads);
    parts = arena->take<float>(heads * Size(splits > 1 ? attend.rows() : 0) * Size(splits) *
                               Size(part));
    for (int t = 0; t < io.threads; ++t) {
      FlashAttend<T, P> unit;
      unit.carve(arena, io, blocks);
      if (units != nullptr) units[t] = unit;
    }
  }
  hff_status run() {
    for (int i = 0; i < 2; ++i) new (counters + i) Counter;
    run_on_team(attend.io.threads, work, this, &barrier);
    return HFF_OK;
  }

  // Keys [begin, end) that any of the rows sees, of split s.
  void range(int64_t first, int64_t rows, int64_t s, int64_t* begin, int64_t* end) const {
    *begin = attend.first(attend.query_of(first));
    *end = attend.limit(attend.query_of(first + rows - 1));
    if (splits == 1) return;
    if (*begin < s * kSplit) *begin = s * kSplit;
    if (*end > (s + 1) * kSplit) *end = (s + 1) * kSplit;
  }

  void unit(const FlashAttend<T, P>& f, int64_t pair, int64_t first, int64_t s) const {
    const Attend<T>& a = attend;
    const int64_t b = pair / a.io.kv_heads, g = pair % a.io.kv_heads, left = a.rows() - first;
    const int64_t rows = left < blocks.queries ? left : blocks.queries;
    int64_t begin = 0, end = 0;
    range(first, rows, s, &begin, &end);
    if (a.rows() <= kRowwise) {
      f.run_rows(a, b, g, rows, begin, end);
    } else {
      f.run(a, b, g, first, rows, begin, end, blocks.keys);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float* context = f.tiles.context + r * f.tiles.context_room;
      if (splits == 1) {
        store_context(a, context, f.tiles.totals[r], b, a.head_of(g, first + r),
                      a.query_of(first + r));
        continue;
      }
      float* to = parts + ((pair * a.rows() + r) * splits + s) * part;
      to[0] = f.tops[r];
      to[1] = f.tiles.totals[r];
      for (int64_t d = 0; d < pad_lanes(a.io.head_dim); d += kLanes)
        store(load(context + d), to + kLanes + d);
    }
  }

  static void work(void* self, int thread, int) {
    FlashAttendRun& run = *static_cast<FlashAttendRun*>(self);
    const TileScope scope;
    const Attend<T>& a = run.attend;
    const FlashAttend<T, P>& f = run.units[thread];
    const int64_t tiles = ceil_div(a.rows(), run.blocks.queries),
                  pairs = a.io.batch * a.io.kv_heads;
    Counter* counters = run.counters;
    const int64_t units = pairs * tiles * run.splits;
    for (int64_t u = counters[0].take(); u < units; u = counters[0].take()) {
      const int64_t s = u % run.splits, rest = u / run.splits;
      run.unit(f, rest % pairs, (tiles - 1 - rest / pairs) * run.blocks.queries, s);
    }
    if (run.splits == 1) return;
    run.barrier.wait();
    const int64_t rows = pairs * a.rows();
    for (int64_t u = counters[1].take(); u < rows; u = counters[1].take()) {
      const int64_t pair = u / a.rows(), r = u % a.rows();
      Softmax state{kHidden, 0.0f, f.tiles.context};
      merge_partials(run.parts + u * run.splits * run.part, run.splits, a.io.head_dim, &state);
      store_context(a, state.context, 1.0f, pair / a.io.kv_heads,
                    a.head_of(pair % a.io.kv_heads, r), a.query_of(r));
    }
  }
};

// The run of an hff_attend_io's kernel, as an argument of function(run).
template <class T, class Function>
HFF_INLINE hff_status with_attend_run(const hff_attend_io& io, Function function) {
  if (io.kernel == HFF_ATTEND_NAIVE) {
    NaiveRun<T> run(io);
    return function(run);
  }
  return with_product<T>(HFF_PRECISION_HIGHEST, [&](auto product) {
    if (io.kernel == HFF_ATTEND_TILED) {
      TiledRun<T, decltype(product)> run(io);
      return function(run);
    }
    FlashAttendRun<T, decltype(product)> run(io);
    return function(run);
  });
}

template <class T>
static hff_status attend_call(const hff_attend_io& io) {
  return with_attend_run<T>(io, [](auto& run) {
    if (!with_scratch([&](Arena* arena) { run.carve(arena); }))
      return fail(HFF_OUT_OF_MEMORY, "no memory for the scratch of an attention");
    const hff_status status = run.run();
    trim_thread_scratch(kKeptScores);
    return status;
  });
}

template <class T>
static hff_status attend_plan_of(const hff_attend_io& io, hff_attend_plan* plan) {
  return with_attend_run<T>(io, [&](auto& run) {
    Arena measure(nullptr);
    run.carve(&measure);
    if (!measure.used().ok())
      return fail(HFF_OUT_OF_MEMORY, "the scratch of this attention exceeds any memory");
    plan->block_queries = run.blocks.queries;
    plan->block_keys = run.blocks.keys;
    plan->scratch_bytes = measure.used().value();
    plan->workspace_bytes = 0;
    return hff_status{HFF_OK};
  });
}

}  // namespace HFF_ISA
}  // namespace hff

// Naive attention: the definition, one pass over memory for each of its three steps.
//   S = scale q k^T + mask;  P = exp(S - max S) / sum;  out = P v
// S: (batch, heads, queries, keys) fp32 in scratch, whole: what a call needs grows with queries *
//   keys. P over S.
// Work split: a unit is one row (batch row, head, query) of a step; a barrier between steps.
// Bytes: S is written once, read and written once, read once; K and V are read once per query, from
//   the cache that holds them. Bound: loads, one per multiply-add, and memory where S exceeds L3.
// Rounding: fp32; a context is summed kSumDepth keys at a time, and those sums in order.

namespace hff {
namespace HFF_ISA {

template <class T>
struct NaiveRun {
  static constexpr AttendBlocks blocks{0, 0};  // none
  Attend<T> attend;
  float* scores;      // (batch, heads, queries, row_room)
  float* lines;       // (threads, row_room + 2 head_dim): a row's bias, its context, a part of it
  Counter* counters;  // (3)
  int64_t row_room, line_room;
  Barrier barrier;

  explicit NaiveRun(const hff_attend_io& io)
      : attend(io),
        row_room(pad_lanes(io.keys)),
        line_room(row_room + 2 * pad_lanes(io.head_dim)) {}
  void carve(Arena* arena) {
    const hff_attend_io& io = attend.io;
    const Size rows = Size(io.batch) * Size(io.heads) * Size(io.queries);
    scores = arena->take<float>(rows * Size(row_room));
    lines = arena->take<float>(Size(io.threads) * Size(line_room));
    counters = arena->take<Counter>(3);
  }
  hff_status run() {
    for (int i = 0; i < 3; ++i) new (counters + i) Counter;
    run_on_team(attend.io.threads, work, this, &barrier);
    return HFF_OK;
  }

  // Calls step(batch row, head, query, row of scores) for every row, and waits for all.
  template <class Step>
  HFF_ALWAYS_INLINE void each_row(int counter, Step step) {
    const hff_attend_io& io = attend.io;
    const int64_t rows = io.batch * io.heads * io.queries;
    for (int64_t u = counters[counter].take(); u < rows; u = counters[counter].take()) {
      const int64_t pair = u / io.queries;
      step(pair / io.heads, pair % io.heads, u % io.queries, scores + u * row_room);
    }
    barrier.wait();
  }

  void score_row(int64_t b, int64_t h, int64_t i, float* row, float* bias) const {
    const int64_t dim = attend.io.head_dim, keys = attend.io.keys;
    const T* q = attend.q(b, h, i);
    for (int64_t j = 0; j < keys; ++j) {
      const T* key = attend.k(b, h / attend.group, j);
      F dot = zero();
      for (int64_t d = 0; d < dim; d += kLanes)
        dot = fma(load_n(q + d, dim - d), load_n(key + d, dim - d), dot);
      row[j] = sum(dot);
    }
    for (int64_t j = keys; j < row_room; ++j) row[j] = 0.0f;
    bias_of(attend, b, h, i, 0, keys, row_room, bias);
    for (int64_t j = 0; j < row_room; j += kLanes)
      store(biased(mul(load(row + j), set1(attend.io.scale)), bias + j), row + j);
  }

  static void work(void* self, int thread, int) {
    NaiveRun& run = *static_cast<NaiveRun*>(self);
    const hff_attend_io& io = run.attend.io;
    float* bias = run.lines + thread * run.line_room;
    float* context = bias + run.row_room;
    run.each_row(
        0, [&](int64_t b, int64_t h, int64_t i, float* row) { run.score_row(b, h, i, row, bias); });
    run.each_row(1, [&](int64_t, int64_t, int64_t, float* row) {
      const float total = soften_row(row, run.row_room, row);
      const F scale = set1(total == 0.0f ? 0.0f : 1.0f / total);
      for (int64_t j = 0; j < run.row_room; j += kLanes) store(mul(load(row + j), scale), row + j);
    });
    run.each_row(2, [&](int64_t b, int64_t h, int64_t i, float* row) {
      bias_of(run.attend, b, h, i, 0, io.keys, run.row_room, bias);
      const int64_t dim = pad_lanes(io.head_dim);
      float* part = context + dim;
      for (int64_t d = 0; d < dim; d += kLanes) store(zero(), context + d);
      for (int64_t j = 0; j < io.keys; j += kSumDepth) {
        const int64_t n = io.keys - j < kSumDepth ? io.keys - j : kSumDepth;
        for (int64_t d = 0; d < dim; d += kLanes) store(zero(), part + d);
        add_seen_values(run.attend, b, h / run.attend.group, j, n, row + j, bias + j, part);
        for (int64_t d = 0; d < dim; d += kLanes)
          store(add(load(context + d), load(part + d)), context + d);
      }
      store_context(run.attend, context, 1.0f, b, h, i);
    });
  }
};

}  // namespace HFF_ISA
}  // namespace hff

// The read stream: every byte of a buffer once, in order, by all threads, doing nothing with it.
// What decode is held to. Each thread has a contiguous share and, when done, takes pieces of
// others', as the weights are read. Four lines a step, kStreamAhead bytes behind the prefetches.

namespace hff {
namespace HFF_ISA {

constexpr int64_t kStreamAhead = 2048;
constexpr int64_t kPiece = 256 * 1024;

struct StreamRun {
  const char* data;
  int64_t bytes;
  Counter* counters;  // (threads)
  std::atomic<int> sink;

  static void work(void* self, int thread, int width) {
    StreamRun& run = *static_cast<StreamRun*>(self);
    Shares pieces(run.counters, run.bytes / kPiece, thread, width);
    F top[4] = {zero(), zero(), zero(), zero()};
    for (int64_t piece = pieces.take(); piece >= 0; piece = pieces.take()) {
      const char* p = run.data + piece * kPiece;
      for (int64_t i = 0; i < kPiece; i += 256) {
        for (int line = 0; line < 4; ++line) {
          __builtin_prefetch(p + i + line * 64 + kStreamAhead, 0, 3);
          for (int64_t at = 0; at < 64; at += kLanes * 4) {
            top[line] =
                max(top[line], load(reinterpret_cast<const float*>(p + i + line * 64 + at)));
          }
        }
      }
    }
    if (sum(max(max(top[0], top[1]), max(top[2], top[3]))) == 1.0f)
      run.sink.store(1, std::memory_order_relaxed);
  }
};

static void read_stream(const void* data, int64_t bytes, int32_t threads) {
  Counter counters[HFF_MAX_THREADS];
  StreamRun run{static_cast<const char*>(data), bytes, counters, {0}};
  run_on_team(threads, StreamRun::work, &run);  // on HFF_MAX_THREADS at most
}

}  // namespace HFF_ISA
}  // namespace hff

// Several tokens in one call, each the largest or drawn.
//   next[b][k] = the token that the logits of step k give batch row b; step k + 1 reads next[.][k]
//   at positions one further
// Rows do not mix, so a step gives the bits of a call of its own.

namespace hff {
namespace HFF_ISA {

// next[.][k] of a step that has run: rows are units.
template <class T>
struct Choice {
  static constexpr int64_t kNone = -1;  // in place of a token that cannot be drawn

  const hff_model_io& io;
  int64_t n;  // logits of a row
  int64_t k, steps, batch;
  Counter rows;

  int64_t token(int64_t b) const {
    const T* logits = static_cast<const T*>(io.logits.data) + ((b + 1) * io.keep - 1) * n;
    if (io.sampling == nullptr) return largest_index(logits, n);
    Distribution<T> tokens(logits, n, *io.sampling);
    const double* uniforms = static_cast<const double*>(io.sampling->uniforms.data);
    return tokens.exists() ? tokens.draw(uniforms[b * steps + k]) : kNone;
  }
  static void work(void* self, int, int) {
    Choice& run = *static_cast<Choice*>(self);
    for (int64_t b = run.rows.take(); b < run.batch; b = run.rows.take())
      static_cast<int64_t*>(run.io.next.data)[b * run.steps + run.k] = run.token(b);
  }
};

template <class T>
static hff_status choose(const hff_call& call, const hff_model& model, const hff_model_io& io,
                         int64_t k, int64_t steps) {
  Choice<T> run{io, model.head.rows, k, steps, call.batch, {}};
  // the largest of a row is found in less time than a thread wakes in
  const bool together = io.sampling != nullptr && call.batch > 1;
  run_on_team(together ? call.threads : 1, Choice<T>::work, &run);
  const int64_t* next = static_cast<const int64_t*>(io.next.data) + k;
  for (int64_t b = 0; b < call.batch; ++b) {
    if (next[b * steps] == Choice<T>::kNone)
      return fail(HFF_INVALID,
                  "no token can be drawn in batch row %lld: its logits hold NaN, an infinity, or "
                  "-inf alone",
                  shown(b));
  }
  return HFF_OK;
}

// A call with `next`: io.steps tokens of every batch row, the cache longer by as many.
template <class T>
static hff_status steps_call(const hff_call& call, const hff_model& model, const hff_cache* caches,
                             const hff_model_io& io) {
  hff_call step = call;
  hff_model_io at = io;
  const int64_t steps = io.steps > 1 ? io.steps : 1;
  const int64_t row_of_table = model.blocks[0].heads.rotary_dim * int64_t(sizeof(T));
  for (int64_t k = 0; k < steps; ++k) {
    hff_status status = model_call<T>(step, model, caches, at);
    int64_t ran = k;
    if (status == HFF_OK) status = choose<T>(call, model, io, k, steps), ran = k + 1;
    if (status != HFF_OK) {
      for (int64_t l = 0; caches != nullptr && l < model.block_count; ++l)
        *caches[l].length -= ran * call.queries;
      return status;
    }
    at.ids = {static_cast<const int64_t*>(io.next.data) + k, io.next.bytes - k * 8};
    at.id_batch_stride = steps;
    // positions one further are the same positions in a table that begins one row later
    step.cos.data = static_cast<const char*>(step.cos.data) + row_of_table;
    step.sin.data = static_cast<const char*>(step.sin.data) + row_of_table;
  }
  return HFF_OK;
}

}  // namespace HFF_ISA
}  // namespace hff

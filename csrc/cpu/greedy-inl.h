// Greedy decoding: the token with the largest logit, and several steps in one call.
//   next[b][k] = argmax(logits of step k, batch row b); step k + 1 reads next[.][k] at positions one
//   further
// Logits are compared as the model's dtype holds them. The largest is the first NaN or, without one,
// the first of equals, as torch.argmax has it. Rows do not mix, so a step gives the bits of a call
// of its own.

namespace hff {
namespace HFF_ISA {

// The last n < kLanes elements; the first of them in the other lanes.
template <class T>
HFF_INLINE F load_tail(const T* x, int64_t n) {
  T lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = x[i < n ? i : 0];
  return load(lanes);
}

// Index of the largest of n >= 1 elements. Blocks are compared by vectors and the winning one is
// searched; a row that holds NaN or +Inf is searched as a whole.
template <class T>
static int64_t largest_index(const T* x, int64_t n) {
  constexpr int64_t kBlock = 64 * kLanes;
  constexpr float kInfinity = __builtin_inff();
  F unbounded = zero();  // not 0 in a lane that has seen NaN or +Inf
  float best = -kInfinity;
  int64_t at = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t end = i + kBlock < n ? i + kBlock : n;
    F block = set1(-kInfinity);
    for (int64_t k = i; k < end; k += kLanes) {
      const F v = k + kLanes <= n ? load(x + k) : load_tail(x + k, n - k);
      block = max(v, block);  // `block` where v is NaN
      unbounded = select_lt(v, set1(kInfinity), unbounded, set1(1.0f));
    }
    const float most = largest(block);
    if (most > best) best = most, at = i;
  }
  if (largest(unbounded) == 0.0f) {
    while (to_float(x[at]) != best) ++at;
    return at;
  }
  at = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float v = to_float(x[i]);
    if (v != v) return i;
    if (v > to_float(x[at])) at = i;
  }
  return at;
}

// A call with `next`: io.steps tokens of every batch row, the cache longer by as many.
template <class T>
static hff_status greedy_call(const hff_call& call, const hff_model& model, const hff_cache* caches,
                              const hff_model_io& io) {
  hff_call step = call;
  hff_model_io at = io;
  const int64_t steps = io.steps > 1 ? io.steps : 1, rows = model.head.rows;
  const int64_t row_of_table = model.blocks[0].heads.rotary_dim * int64_t(sizeof(T));
  int64_t* const next = static_cast<int64_t*>(io.next.data);
  for (int64_t k = 0; k < steps; ++k) {
    const hff_status status = model_call<T>(step, model, caches, at);
    if (status != HFF_OK) {
      for (int64_t l = 0; k > 0 && l < model.block_count; ++l)
        *caches[l].length -= k * call.queries;
      return status;
    }
    const T* logits = static_cast<const T*>(io.logits.data) + (io.keep - 1) * rows;
    for (int64_t b = 0; b < call.batch; ++b)
      next[b * steps + k] = largest_index(logits + b * io.keep * rows, rows);
    at.ids = {next + k, io.next.bytes - k * 8};
    at.id_batch_stride = steps;
    // positions one further are the same positions in a table that begins one row later
    step.cos.data = static_cast<const char*>(step.cos.data) + row_of_table;
    step.sin.data = static_cast<const char*>(step.sin.data) + row_of_table;
  }
  return HFF_OK;
}

}  // namespace HFF_ISA
}  // namespace hff

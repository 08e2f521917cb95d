// The token with the largest logit. Logits are compared as the model's dtype holds them; the
// largest is the first NaN or, without one, the first of equals, as torch.argmax has it.

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
  const bool bounded = largest(unbounded) == 0.0f;
  for (int64_t i = at; bounded && i < n; ++i) {
    if (to_float(x[i]) == best) return i;
  }
  at = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float v = to_float(x[i]);
    if (v != v) return i;
    if (v > to_float(x[at])) at = i;
  }
  return at;
}

}  // namespace HFF_ISA
}  // namespace hff

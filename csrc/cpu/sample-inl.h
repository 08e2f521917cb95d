// A token drawn by one uniform number, from logits as transformers' warpers restrict them.
//   s = logit / temperature                                    fp32
//   w = e^(s - max s)                                          fp32; fp64 sums of fp32 blocks
//   top_k: s of at least the top_k-th largest, all its equals among them
//   top_p: of those, largest first and of equals the first, the fewest whose w add up to top_p of
//          their sum; one at least
//   token = the first whose w, with those of the kept before it, exceeds uniform * (sum of kept w)
// Nothing is sorted: where the kept end is found digit by digit, from the highest, of s as an
// integer that rises with it. Nothing is stored: s and w are computed again for each pass, in
// blocks. 50,304 logits of bf16 on a core of Zen 4: 0.04 ms, with top_k 0.11, with top_p 0.13, with
// both 0.16; torch's softmax, cumsum and sort take 1.3 to 4.

namespace hff {
namespace HFF_ISA {

// Bits that rise with s, no NaN and no -0; and s again.
HFF_INLINE uint32_t rising(float s) {
  const uint32_t bits = float_to_bits(s);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}
HFF_INLINE float from_rising(uint32_t key) {
  return bits_to_float(key >> 31 != 0 ? key & 0x7fffffffu : ~key);
}

template <class T>
class Distribution {
 public:
  Distribution(const T* logits, int64_t n, const hff_sampling& how)
      : logits_(logits), n_(n), temperature_(how.temperature) {
    find_largest();
    if (!exists_) return;
    if (how.top_k > 0 && how.top_k < n) least_ = end_of<kCount>(double(how.top_k)).score;
    if (how.top_p < 1.0) keep_mass(how.top_p * mass());
  }

  // Whether the largest s is finite and none is NaN.
  bool exists() const { return exists_; }

  int64_t draw(double uniform) {
    const double target = uniform * mass();
    double before = 0;
    int64_t i = 0, token = 0;
    for (double block = fill(0); before + block <= target && i + kBlock < n_; block = fill(i)) {
      before += block;
      i += kBlock;
    }
    for (int64_t k = 0; k < kBlock && before <= target; ++k) {
      if (w_[k] == 0.0f) continue;  // one by one they may add up to less than the block
      before += w_[k];
      token = i + k;
    }
    return token;
  }

 private:
  static constexpr int64_t kBlock = 8 * kLanes;
  enum Amount { kCount, kMass };
  struct End {
    float score;
    double above;  // amount of what is larger
  };

  // -inf past the last.
  F scores(int64_t i) const {
    const int64_t left = n_ - i;
    if (left <= 0) return set1(-__builtin_inff());
    const F logits = left >= kLanes ? load(logits_ + i) : load_n(logits_ + i, left);
    const F s = add(div(logits, set1(temperature_)), zero());  // -0 becomes 0
    if (left >= kLanes) return s;
    float lanes[kLanes];
    store(s, lanes);
    for (int64_t k = left; k < kLanes; ++k) lanes[k] = -__builtin_inff();
    return load(lanes);
  }

  void find_largest() {
    constexpr float kInfinity = __builtin_inff();
    F most = set1(-kInfinity), unbounded = zero();  // not 0 in a lane that has seen NaN or +Inf
    for (int64_t i = 0; i < n_; i += kLanes) {
      const F s = scores(i);
      most = max(s, most);
      unbounded = select_lt(s, set1(kInfinity), unbounded, set1(1.0f));
    }
    most_ = largest(most);
    exists_ = largest(unbounded) == 0.0f && most_ > -kInfinity;
  }

  // s of the block from i on; the largest.
  float fill_scores(int64_t i) {
    F most = set1(-__builtin_inff());
    for (int64_t k = 0; k < kBlock; k += kLanes) {
      const F s = scores(i + k);
      store(s, s_ + k);
      most = max(s, most);
    }
    return largest(most);
  }

  // w of the block whose s are there, 0 where not kept; the sum.
  double fill_weights(int64_t i) {
    F sums = zero();
    for (int64_t k = 0; k < kBlock; k += kLanes) {
      const F s = load(s_ + k), w = exp_negative(sub(s, set1(most_)));
      const F kept = select_lt(s, set1(least_), zero(), w);
      store(kept, w_ + k);
      sums = add(sums, kept);
    }
    if (i + kBlock <= end_) return sum(sums);
    double left = 0;
    for (int64_t k = 0; k < kBlock; ++k) {
      if (s_[k] == least_ && i + k >= end_) w_[k] = 0.0f;
      left += w_[k];
    }
    return left;
  }

  double fill(int64_t i) { return fill_scores(i) < least_ ? no_weights() : fill_weights(i); }
  double no_weights() {
    for (float& w : w_) w = 0.0f;
    return 0;
  }

  double mass() {
    double all = 0;
    for (int64_t i = 0; i < n_; i += kBlock) all += fill(i);
    return all;
  }

  // The largest score that, with all larger ones, comes to `limit`; the least where none does.
  template <Amount kind>
  End end_of(double limit) {
    End end{0, 0};
    uint32_t digits = 0, known = 0;
    constexpr int kShifts[] = {21, 10, 0};
    for (const int shift : kShifts) {
      constexpr uint32_t kDigits = 1 << 11;
      double amounts[kDigits] = {};
      const uint32_t mask = shift == 0 ? kDigits / 2 - 1 : kDigits - 1;
      for (int64_t i = 0; i < n_; i += kBlock) {
        const float most = fill_scores(i);
        if (most < least_ || (known != 0 && most < from_rising(digits))) continue;
        if (kind == kMass) fill_weights(i);
        const int64_t count = n_ - i < kBlock ? n_ - i : kBlock;
        for (int64_t k = 0; k < count; ++k) {
          const uint32_t key = rising(s_[k]);
          if ((key & known) == digits)
            amounts[key >> shift & mask] += kind == kMass ? double(w_[k]) : 1.0;
        }
      }
      uint32_t digit = mask + 1;
      double above = end.above;
      for (uint32_t d = mask + 1; d-- > 0 && (above < limit || digit > mask);) {
        if (amounts[d] == 0) continue;
        digit = d, end.above = above;
        above += amounts[d];
      }
      digits |= digit << shift, known |= mask << shift;
    }
    end.score = from_rising(digits);
    return end;
  }

  void keep_mass(double limit) {
    const End end = end_of<kMass>(limit);
    double kept = end.above;
    int64_t last = 0;
    for (int64_t i = 0; i < n_ && (kept < limit || kept == 0); i += kBlock) {
      if (fill_scores(i) < end.score) continue;
      fill_weights(i);
      for (int64_t k = 0; k < kBlock && (kept < limit || kept == 0); ++k) {
        if (s_[k] != end.score) continue;
        kept += w_[k];
        last = i + k;
      }
    }
    least_ = end.score, end_ = last + 1;
  }

  const T* const logits_;
  const int64_t n_;
  const float temperature_;
  bool exists_ = false;
  float most_ = 0;
  // kept: s above least_ and, of those equal to it, the ones before index end_
  float least_ = -__builtin_inff();
  int64_t end_ = INT64_MAX;
  float s_[kBlock], w_[kBlock];
};

}  // namespace HFF_ISA
}  // namespace hff

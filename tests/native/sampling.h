// Drawing a token, as its definition reads: sorted, in fp64.
#ifndef HFF_TESTS_SAMPLING_H
#define HFF_TESTS_SAMPLING_H

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "hf_fusion.h"
#include "random.h"

namespace hff_test {

struct Sampling {
  float temperature = 1;
  int64_t top_k = 0;
  double top_p = 1;
  std::vector<double> uniforms;

  static Sampling random(Random& random, int64_t tokens) {
    Sampling s;
    s.temperature = random.pick({1.0f, 0.7f, 0.1f, 1.3f});
    s.top_k = random.pick<int64_t>({0, 0, 1, 2, 5, 50, 1000});
    s.top_p = random.pick({1.0, 1.0, 0.0, 0.3, 0.9, 0.999});
    for (int64_t i = 0; i < tokens; ++i)
      s.uniforms.push_back(random.pick({0.0, 1 - 0x1p-53, random.uniform(), random.uniform()}));
    return s;
  }
  hff_sampling abi(int64_t first = 0) const {
    hff_sampling s = {};
    s.struct_size = sizeof s;
    s.uniforms = {uniforms.data() + first, static_cast<int64_t>(uniforms.size() - first) * 8};
    s.top_p = top_p, s.top_k = top_k, s.temperature = temperature;
    return s;
  }
};

// The weight of each token, 0 where it is not kept. Needs a finite largest logit and no NaN.
inline std::vector<double> weights_of(const std::vector<float>& logits, const Sampling& how,
                                      double top_p) {
  const int64_t n = static_cast<int64_t>(logits.size());
  std::vector<float> s(logits);
  for (float& score : s) score = score / how.temperature;
  std::vector<int64_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return s[a] > s[b]; });
  std::vector<double> w(logits.size());
  double all = 0, before = 0;
  for (int64_t rank = 0; rank < n; ++rank) {
    const int64_t i = order[rank];
    const bool kept = how.top_k == 0 || rank < how.top_k || s[i] == s[order[how.top_k - 1]];
    all += w[i] = kept ? std::exp(static_cast<double>(s[i]) - s[order[0]]) : 0;
  }
  for (int64_t rank = 0; rank < n; ++rank) {
    const double weight = w[order[rank]];
    if (rank > 0 && how.top_p < 1 && before >= top_p * all) w[order[rank]] = 0;
    before += weight;
  }
  return w;
}

// Whether `uniform` lies in the share of the token, as far as fp32 weights tell.
inline bool could_draw(const std::vector<float>& logits, const Sampling& how, double uniform,
                       int64_t token) {
  constexpr double kSlack = 2e-6;
  if (token < 0 || token >= static_cast<int64_t>(logits.size())) return false;
  for (const double slack : {0.0, -kSlack, kSlack}) {
    const std::vector<double> w =
        weights_of(logits, how, how.top_p < 1 ? how.top_p + slack : how.top_p);
    const double all = std::accumulate(w.begin(), w.end(), 0.0);
    const double before = std::accumulate(w.begin(), w.begin() + token, 0.0);
    if (w[token] > 0 && before <= (uniform + kSlack) * all &&
        before + w[token] > (uniform - kSlack) * all)
      return true;
  }
  return false;
}

}  // namespace hff_test
#endif

// A seeded generator whose whole state is one printed number: the same seed gives the same case on
// every machine.
#ifndef HFF_TESTS_RANDOM_H
#define HFF_TESTS_RANDOM_H

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <vector>

namespace hff_test {

class Random {
 public:
  // Another multiple than next() adds: the next seed's numbers are not these, shifted by one.
  explicit Random(uint64_t seed) : state_(seed * 0xD1342543DE82EF95ull) { next(); }

  // splitmix64
  uint64_t next() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }

  // [0, 1)
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  // [-1, 1)
  double symmetric() { return 2.0 * uniform() - 1.0; }
  // lowest .. highest, both included
  int64_t range(int64_t lowest, int64_t highest) {
    return lowest + static_cast<int64_t>(next() % static_cast<uint64_t>(highest - lowest + 1));
  }
  bool chance(double probability) { return uniform() < probability; }

  double normal() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    return radius * std::cos(6.283185307179586 * uniform());
  }

  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[next() % choices.size()];
  }
  template <class T>
  const T& pick(const std::vector<T>& choices) {
    return choices[next() % choices.size()];
  }

 private:
  uint64_t state_;
};

}  // namespace hff_test
#endif

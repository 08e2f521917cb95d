// Copies of prepacked weights that a fuzzer may change.
#ifndef HFF_TESTS_SPOIL_H
#define HFF_TESTS_SPOIL_H

#include <cstring>
#include <vector>

#include "hf_fusion.h"

namespace hff_test {

// Spoilt, for as long as a call may read them.
class Panels {
 public:
  // `packed` becomes a copy, byte `at` of it flipped.
  void spoil(hff_input* packed, int64_t at) {
    constexpr uintptr_t kLine = 64;
    all_.emplace_back(static_cast<size_t>(packed->bytes) + kLine);
    char* copy = all_.back().data();
    copy += (kLine - reinterpret_cast<uintptr_t>(copy) % kLine) % kLine;
    std::memcpy(copy, packed->data, static_cast<size_t>(packed->bytes));
    copy[at] = static_cast<char>(~copy[at]);
    packed->data = copy;
  }
  void clear() { all_.clear(); }

 private:
  std::vector<std::vector<char>> all_;
};
constexpr int64_t kHeader = 40;  // bytes that tell panels from others

}  // namespace hff_test
#endif

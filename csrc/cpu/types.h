// Element types as they lie in memory, and their scalar conversions (round to nearest even, NaN
// kept quiet).
#pragma once

#include <cstdint>
#include <cstring>

namespace hff {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace hff

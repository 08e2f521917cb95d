// Element types as they lie in memory; vec-inl.h converts them.
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

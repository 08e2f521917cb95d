// Reductions over the 32 lanes of a warp, to all of them, in the order of xor.
#pragma once

#include "cuda/port.h"

namespace hff {
namespace cuda {

HFF_DEVICE float warp_sum(float v) {
  for (int mask = 16; mask > 0; mask /= 2) v += port::warp_xor(v, mask);
  return v;
}

// NaN where either is
HFF_DEVICE float larger(float a, float b) { return a > b || a != a ? a : b; }

HFF_DEVICE float warp_max(float v) {
  for (int mask = 16; mask > 0; mask /= 2) v = larger(v, port::warp_xor(v, mask));
  return v;
}

HFF_DEVICE uint64_t warp_largest(uint64_t v) {
  for (int mask = 16; mask > 0; mask /= 2) {
    const uint64_t other = port::warp_xor(v, mask);
    v = other > v ? other : v;
  }
  return v;
}

}  // namespace cuda
}  // namespace hff

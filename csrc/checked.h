// The only place where sizes and strides are multiplied or added on the way to an address bound.
// A Size is poisoned by overflow or a negative term and then fits no buffer.
#pragma once

#include <cstdint>

#include "include/hf_fusion.h"

// Helpers that the per-instruction-set files share must not be emitted out of line there: the
// linker keeps one copy of an inline function, and it could be the AVX-512 one.
#define HFF_ALWAYS_INLINE inline __attribute__((always_inline))

namespace hff {

class Size {
 public:
  HFF_ALWAYS_INLINE constexpr Size(int64_t value)
      : value_(value), ok_(value >= 0) {}  // NOLINT: sizes convert

  HFF_ALWAYS_INLINE Size operator*(Size other) const {
    Size out(0);
    out.ok_ = ok_ && other.ok_ && !__builtin_mul_overflow(value_, other.value_, &out.value_);
    return out;
  }
  HFF_ALWAYS_INLINE Size operator+(Size other) const {
    Size out(0);
    out.ok_ = ok_ && other.ok_ && !__builtin_add_overflow(value_, other.value_, &out.value_);
    return out;
  }
  HFF_ALWAYS_INLINE bool fits(int64_t limit) const { return ok_ && value_ <= limit; }
  HFF_ALWAYS_INLINE bool ok() const { return ok_; }
  HFF_ALWAYS_INLINE int64_t value() const { return value_; }  // only after ok()

 private:
  int64_t value_;
  bool ok_;
};

// Offset of the last element of a strided view, in elements: sum of (extent - 1) * stride. Extents
// are at least 1.
HFF_ALWAYS_INLINE Size last_offset(int64_t extent, int64_t stride) {
  return Size(extent - 1) * Size(stride);
}

HFF_ALWAYS_INLINE int64_t element_bytes(int32_t dtype) { return dtype == HFF_F32 ? 4 : 2; }

// Bytes of an element of a mask of this kind; `additive`: of one in the dtype of the call.
HFF_ALWAYS_INLINE int64_t mask_element_bytes(int32_t kind, int64_t additive) {
  return kind == HFF_MASK_BOOL ? 1 : kind == HFF_MASK_INT64 ? 8 : additive;
}

// Scratch is carved from one block: each piece starts on a cache line.
HFF_ALWAYS_INLINE Size padded(Size bytes) {
  Size sum = bytes + Size(63);
  return sum.ok() ? Size(sum.value() & ~int64_t{63}) : sum;
}

}  // namespace hff

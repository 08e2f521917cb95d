// Element types of the ABI as plain numbers: conversion, rounding to nearest even, unit in the last
// place.
#ifndef HFF_TESTS_NUMBER_H
#define HFF_TESTS_NUMBER_H

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "hf_fusion.h"

namespace hff_test {

// Beyond HFF_F32, HFF_BF16, HFF_F16: the integer buffers of a call.
constexpr int32_t kInt64 = 16;
constexpr int32_t kBool = 17;

inline int64_t element_size(int32_t dtype) {
  switch (dtype) {
    case HFF_F32:
      return 4;
    case kInt64:
      return 8;
    case kBool:
      return 1;
    default:
      return 2;
  }
}

inline const char* dtype_name(int32_t dtype) {
  return dtype == HFF_F32 ? "fp32" : dtype == HFF_BF16 ? "bf16" : dtype == HFF_F16 ? "fp16" : "int";
}

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  if (std::isnan(value)) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline uint16_t to_fp16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return static_cast<uint16_t>(sign | 0x7E00);
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7C00);
  if (magnitude < 6.103515625e-05f) {  // subnormal: multiples of 2^-24
    return static_cast<uint16_t>(sign |
                                 static_cast<uint32_t>(std::nearbyint(magnitude * 16777216.0f)));
  }
  const uint32_t m = float_bits(magnitude) - (112u << 23);
  return static_cast<uint16_t>(sign | ((m + 0xFFF + ((m >> 13) & 1)) >> 13));
}

inline float from_fp16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 31, mantissa = half & 0x3FF;
  if (exponent == 31) return bits_float(sign | 0x7F800000 | (mantissa << 13));
  if (exponent == 0) {
    const float value = static_cast<float>(mantissa) / 16777216.0f;
    return sign ? -value : value;
  }
  return bits_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline float from_bf16(uint16_t value) { return bits_float(static_cast<uint32_t>(value) << 16); }

inline float quantize(int32_t dtype, float value) {
  if (dtype == HFF_BF16) return from_bf16(to_bf16(value));
  if (dtype == HFF_F16) return from_fp16(to_fp16(value));
  return value;
}

// Lowest finite number: what Hugging Face writes into an additive mask for "masked".
inline float lowest(int32_t dtype) {
  if (dtype == HFF_BF16) return from_bf16(0xFF7F);
  if (dtype == HFF_F16) return -65504.0f;
  return -std::numeric_limits<float>::max();
}

// Distance of neighbours at this magnitude.
inline double ulp(int32_t dtype, double magnitude) {
  const int digits = dtype == HFF_BF16 ? 8 : dtype == HFF_F16 ? 11 : 24;
  const int smallest = dtype == HFF_F16 ? -24 : dtype == HFF_BF16 ? -133 : -149;
  if (!(magnitude > 0) || std::isinf(magnitude)) return std::ldexp(1.0, smallest);
  const int exponent = std::ilogb(magnitude) - (digits - 1);
  return std::ldexp(1.0, exponent > smallest ? exponent : smallest);
}

// `count` elements at `data`; the buffer belongs to an Arena.
struct Array {
  int32_t dtype = HFF_F32;
  char* data = nullptr;
  int64_t count = 0;

  int64_t bytes() const { return count * element_size(dtype); }
  explicit operator bool() const { return data != nullptr; }

  double get(int64_t i) const {
    const char* at = data + i * element_size(dtype);
    uint16_t half;
    float single;
    int64_t integer;
    switch (dtype) {
      case HFF_F32:
        std::memcpy(&single, at, 4);
        return single;
      case HFF_BF16:
        std::memcpy(&half, at, 2);
        return from_bf16(half);
      case HFF_F16:
        std::memcpy(&half, at, 2);
        return from_fp16(half);
      case kInt64:
        std::memcpy(&integer, at, 8);
        return static_cast<double>(integer);
      default:
        return static_cast<unsigned char>(*at);
    }
  }

  void set(int64_t i, double value) const {
    char* at = data + i * element_size(dtype);
    const float single = static_cast<float>(value);
    const uint16_t half = dtype == HFF_BF16 ? to_bf16(single) : to_fp16(single);
    const int64_t integer = dtype == kInt64 ? static_cast<int64_t>(value) : 0;
    switch (dtype) {
      case HFF_F32:
        std::memcpy(at, &single, 4);
        break;
      case kInt64:
        std::memcpy(at, &integer, 8);
        break;
      case kBool:
        *at = static_cast<char>(value);
        break;
      default:
        std::memcpy(at, &half, 2);
    }
  }

  hff_input input() const { return {data, data ? bytes() : 0}; }
  hff_output output() const { return {data, data ? bytes() : 0}; }
  // The elements from `first` on, with their bytes.
  hff_input input_from(int64_t first) const {
    if (!data) return {nullptr, 0};
    return {data + first * element_size(dtype), (count - first) * element_size(dtype)};
  }
  hff_output output_from(int64_t first) const {
    if (!data) return {nullptr, 0};
    return {data + first * element_size(dtype), (count - first) * element_size(dtype)};
  }
};

}  // namespace hff_test
#endif

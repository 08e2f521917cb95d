// How a check refuses: with a status and a sentence, before anything has happened.
#pragma once

#include "backend.h"

#define HFF_REQUIRE(condition, ...)                                 \
  do {                                                              \
    if (!(condition)) return ::hff::fail(HFF_INVALID, __VA_ARGS__); \
  } while (0)
#define HFF_TRY(expression)                  \
  do {                                       \
    const hff_status status_ = (expression); \
    if (status_ != HFF_OK) return status_;   \
  } while (0)

namespace hff {

inline long long shown(int64_t value) { return static_cast<long long>(value); }

}  // namespace hff

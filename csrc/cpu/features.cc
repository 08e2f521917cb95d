// See features.h.
#include "cpu/features.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hff {
namespace {

struct Leaf {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

bool bits(uint64_t word, uint64_t mask) { return (word & mask) == mask; }
constexpr uint64_t bit(int i) { return uint64_t{1} << i; }

// Zeros where there is no such leaf, or no CPUID.
Leaf leaf(unsigned number, unsigned part = 0) {
  Leaf l;
#if defined(__x86_64__)
  __get_cpuid_count(number, part, &l.a, &l.b, &l.c, &l.d);
#else
  (void)number, (void)part;
#endif
  return l;
}

// XCR0: 1 and 2 for 256 bits, 5 to 7 as well for 512.
uint64_t saved_state() {
  unsigned low = 0, high = 0;
#if defined(__x86_64__)
  constexpr uint64_t kOsxsave = bit(27);
  if (bits(leaf(1).c, kOsxsave)) asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
#endif
  return uint64_t{high} << 32 | low;
}

// Tiles are state that Linux saves only for a process that has asked.
const char* ask_for_tiles() {
  constexpr uint64_t kBf16 = bit(22), kTile = bit(24);
  if (!bits(leaf(7).d, kBf16 | kTile)) return "this CPU lacks AMX tiles of bf16";
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0
             ? nullptr
             : "the kernel does not give this process AMX state";
#else
  return "AMX is asked for on Linux only";
#endif
}

}  // namespace

const char* lacks_avx2() {
  constexpr uint64_t kFma = bit(12), kF16c = bit(29), kAvx2 = bit(5);
  return bits(leaf(1).c, kFma | kF16c) && bits(leaf(7).b, kAvx2) && bits(saved_state(), 0x06)
             ? nullptr
             : "this CPU lacks AVX2, FMA or F16C";
}

const char* lacks_avx512() {
  constexpr uint64_t kF = bit(16), kDq = bit(17), kBw = bit(30), kVl = bit(31);
  return bits(leaf(7).b, kF | kDq | kBw | kVl) && bits(saved_state(), 0xe6)
             ? lacks_avx2()
             : "this CPU lacks AVX-512 F, BW, DQ or VL";
}

const char* lacks_avx512_bf16() {
  constexpr uint64_t kBf16 = bit(5);
  return leaf(7).a >= 1 && bits(leaf(7, 1).a, kBf16) ? lacks_avx512()
                                                     : "this CPU lacks AVX512_BF16";
}

const char* lacks_amx() {
  static const char* const lacked = ask_for_tiles();
  return lacked != nullptr ? lacked : lacks_avx512_bf16();
}

}  // namespace hff

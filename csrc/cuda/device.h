// What differs between a device and the host that plays one, outside of kernels.
#pragma once

#include "cuda/program.h"

namespace hff {
namespace cuda {

#if defined(HFF_PORT_HOST)

constexpr bool kEmulated = true;

// Mostly fewer fibers: the work is the same with 2 + 1 warps as with 8 + 4.
inline Team team_of(const port::Device&) {
  return fibers::options().whole_team ? Team{kStreamWarps, kAttendWarps, 0} : Team{2, 1, 0};
}

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

#else

constexpr bool kEmulated = false;

inline Team team_of(const port::Device&) { return {kStreamWarps, kAttendWarps, 0}; }

// Makes a device the thread's current one for as long as this lives.
struct DeviceGuard {
  int before = -1;
  explicit DeviceGuard(int ordinal) {
    if (cudaGetDevice(&before) != cudaSuccess || before == ordinal)
      before = -1;
    else
      cudaSetDevice(ordinal);
  }
  ~DeviceGuard() {
    if (before >= 0) cudaSetDevice(before);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

#endif

}  // namespace cuda
}  // namespace hff

// How a kernel is launched, and on what: the host side of port.h for every back end.
#pragma once

namespace hff {
namespace port {

// Sizes in bytes of dynamic shared memory per block; `stream` is a cudaStream_t.
struct Launch {
  int grid = 1;
  int threads = 32;
  int cluster = 1;  // blocks per cluster; divides grid
  int shared_bytes = 0;
  bool cooperative = false;  // all blocks are resident at once
  bool dependent = false;    // may start before the launch ahead of it in the stream has ended
  void* stream = nullptr;
  const char* name = "kernel";  // for messages
};

struct Device {
  int arch = 0;           // 900 is sm_90
  int sms = 0;            // multiprocessors
  int shared_limit = 0;   // bytes a block may have
  int shared_per_sm = 0;  // bytes
  char name[64] = "";
};

}  // namespace port
}  // namespace hff

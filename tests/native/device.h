// The device that calls of layers and models go to under the instruction set "cuda", in builds with
// HFF_EMULATE: CUDA kernels on host fibers. Its memory is the host's, so arrays, guard pages and
// judgement are the CPU's; draws keep to what CUDA kernels take.
#ifndef HFF_TESTS_DEVICE_H
#define HFF_TESTS_DEVICE_H

#include <string>

#include "hf_fusion.h"
#include "random.h"

namespace hff_test {

struct Device {
  int32_t arch = 900, sms = 4, shared_bytes = 232448;  // shared_bytes: of a block
  int32_t plan = HFF_PLAN_AUTO;
  int32_t whole_team = 0;  // as many warps as on a device
  uint64_t seed = 1;       // of the next call's schedule; calls in a row have seeds of their own
};

// hff_select_isa, or the device for "cuda"; false, with hff_last_error(), where there is none.
bool select_isa(const std::string& isa);
bool on_device();
Device& device();
// Any of sm_80 to sm_120, 1 to 9 multiprocessors, either plan; few may have all their warps.
// Nothing on the CPU.
void draw_device(Random& random);
std::string describe_device();  // "" on the CPU

// A width as the device takes it: rounded up to 16 bytes of elements.
inline int64_t fitting(int64_t width) { return on_device() ? (width + 7) / 8 * 8 : width; }

// Sends a call to the device, with a poisoned workspace that ends at an unreadable page. No change
// on the CPU. Not HFF_OK where the device gives no workspace for it.
hff_status place(hff_call* call, const hff_model& model);
hff_status place(hff_call* call, const hff_block& block);
// After a placed call: "", or what the engine, the workspace's counters or its edges tell.
std::string check_device();

}  // namespace hff_test
#endif

// A CUDA runtime that records what is asked of it and runs nothing; device 0 is current at first.
#pragma once

namespace hff_test {

enum Kernel { kToken, kPhase, kAttendHeads, kAttentionUp, kKernels };

struct Runtime {
  int current = 0;     // device
  int resident = 8;    // most CTAs of a cluster that is resident
  int launches = -1;   // that succeed; -1: all
  int refusal = 701;   // of the one after: out of resources
  bool driver = true;  // new enough
  int arch = 90;       // of both devices
  bool (*counts)(int kernel, const void* params) = nullptr;  // whether a launch moves a length
  int error = 0;                                             // the last, not yet taken
  char kernels[kKernels];                                    // their addresses stand for them
  int room[kKernels];                                        // bytes of shared memory asked for
};
Runtime& runtime();

}  // namespace hff_test

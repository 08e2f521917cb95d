#include "cuda/kernels.h"

namespace hff {
namespace cuda {
namespace {
HFF_INSTANTIATE(phase, PhaseParams)
}  // namespace

port::Kernel<PhaseParams> phase_kernel(int32_t dtype, int batch, bool bulk) {
  return of_dtype(dtype, batch, bulk);
}

port::Kernel<AttendParams> attend_kernel(int32_t dtype) {
  return dtype == HFF_F16 ? attend_heads<port::half> : attend_heads<port::bfloat16>;
}

}  // namespace cuda
}  // namespace hff

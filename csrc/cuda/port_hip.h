// The part of port.h that HIP 5.2 has: attention kernels by themselves (attend_*.cuh) use no more.
// No clusters, barriers in shared memory, asynchronous copies, or words between blocks; kernels
// that name them do not compile here.
// A warp is 32 lanes on every device: on wave64 (gfx908, gfx90a) two of them share a wave, and
// warp_xor with masks below 32 stays inside each. HIP 5.2 has no __shfl_xor_sync, whose name later
// versions give to 64-bit masks.
#pragma once

#include <hip/hip_bfloat16.h>
#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>

#include <cmath>
#include <cstring>

#define HFF_DEVICE __device__ __forceinline__
#define HFF_HOST_DEVICE __host__ __device__ __forceinline__
// Without a bound the compiler keeps registers for 1,024 threads, and spills.
#define HFF_KERNEL(max_threads) __global__ __launch_bounds__(max_threads, 1)
#define HFF_PARAM(Params) const Params
#define HFF_UNROLL _Pragma("unroll")

namespace hff {
namespace port {
inline namespace on_hip {

using half = __half;
struct bfloat16 {
  uint16_t bits;
};
template <class P>
using Kernel = void (*)(P);

HFF_DEVICE int thread() { return int(threadIdx.x); }
HFF_DEVICE int threads() { return int(blockDim.x); }
HFF_DEVICE int block() { return int(blockIdx.x); }
HFF_DEVICE int blocks() { return int(gridDim.x); }
HFF_DEVICE int lane() { return int(threadIdx.x & 31); }
HFF_DEVICE int warp() { return int(threadIdx.x >> 5); }
HFF_DEVICE char* arena() {
  extern __shared__ __align__(1024) char hff_arena[];
  return hff_arena;
}
HFF_DEVICE void sync_block() { __syncthreads(); }
template <class T>
HFF_DEVICE T warp_xor(T value, int mask) {
  return __shfl_xor(value, mask);
}

HFF_DEVICE float to_float(half x) { return __half2float(x); }
HFF_DEVICE float to_float(bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
HFF_DEVICE float to_float(float x) { return x; }
template <class T>
HFF_DEVICE T from_float(float x);
template <>
HFF_DEVICE half from_float(float x) {
  return __float2half_rn(x);
}
template <>
HFF_DEVICE bfloat16 from_float(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};  // as on CUDA
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
HFF_DEVICE float from_float(float x) {
  return x;
}
HFF_DEVICE float exp(float x) { return expf(x); }

// ---- on the host --------------------------------------------------------------------------------

template <class P>
hff_status launch(const Launch& launch, Kernel<P> kernel, const P& params) {
  hipLaunchKernelGGL(kernel, dim3(unsigned(launch.grid)), dim3(unsigned(launch.threads)),
                     unsigned(launch.shared_bytes), static_cast<hipStream_t>(launch.stream),
                     params);
  const hipError_t error = hipGetLastError();
  if (error == hipSuccess) return HFF_OK;
  return fail(HFF_INTERNAL, "%s (%d blocks of %d threads, %d bytes shared): %s", launch.name,
              launch.grid, launch.threads, launch.shared_bytes, hipGetErrorString(error));
}

}  // namespace on_hip
}  // namespace port
}  // namespace hff

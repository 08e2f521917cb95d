// The kernels by dtype, batch and ring, each family instantiated in a file of its own.
#pragma once

#include "cuda/chain.cuh"
#include "cuda/cluster.cuh"
#include "cuda/token.cuh"

namespace hff {
namespace cuda {

port::Kernel<TokenParams> token_kernel(int32_t dtype, int batch, bool bulk);
port::Kernel<PhaseParams> phase_kernel(int32_t dtype, int batch, bool bulk);
port::Kernel<AttendParams> attend_kernel(int32_t dtype);
port::Kernel<ClusterParams> cluster_kernel(int32_t dtype, int batch, bool bulk);

// One row alone, or up to kMaxBatch; 16-bit floats of two kinds; two kinds of rings.
#define HFF_INSTANTIATE(kernel, Params)                                         \
  template <class T, class Ring>                                                \
  port::Kernel<Params> of_batch(int batch) {                                    \
    return batch == 1 ? kernel<T, 1, Ring> : kernel<T, kMaxBatch, Ring>;        \
  }                                                                             \
  template <class T>                                                            \
  port::Kernel<Params> of_ring(int batch, bool bulk) {                          \
    return bulk ? of_batch<T, BulkRing>(batch) : of_batch<T, AsyncRing>(batch); \
  }                                                                             \
  port::Kernel<Params> of_dtype(int32_t dtype, int batch, bool bulk) {          \
    return dtype == HFF_F16 ? of_ring<port::half>(batch, bulk)                  \
                            : of_ring<port::bfloat16>(batch, bulk);             \
  }

}  // namespace cuda
}  // namespace hff

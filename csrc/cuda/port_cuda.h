// port.h on CUDA: sm_80 and up. Inside a kernel, what an architecture lacks traps, except that a
// cluster of one block and a launch without overlap have their plain meaning there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#define HFF_DEVICE __device__ __forceinline__
#define HFF_HOST_DEVICE __host__ __device__ __forceinline__
#define HFF_KERNEL(max_threads) __global__ __launch_bounds__(max_threads, 1)
#define HFF_PARAM(Params) const __grid_constant__ Params
#define HFF_UNROLL _Pragma("unroll")

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define HFF_PORT_SM90 0
#else
#define HFF_PORT_SM90 1
#endif

namespace hff {
namespace port {
inline namespace on_cuda {

using half = __half;
using bfloat16 = __nv_bfloat16;
using Barrier = uint64_t;
template <class P>
using Kernel = void (*)(P);

HFF_DEVICE void trap(const char* what) {
#if defined(HFF_WATCHDOG)
  printf("block %d thread %d: %s\n", int(blockIdx.x), int(threadIdx.x), what);
#else
  (void)what;
#endif
  __trap();
}

// ---- where --------------------------------------------------------------------------------------

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

namespace internal {
HFF_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
HFF_DEVICE uint64_t global_address(const void* p) { return uint64_t(__cvta_generic_to_global(p)); }

// Traps once two seconds have passed since the first call.
struct Watchdog {
  HFF_DEVICE void check(const char* what) {
#if defined(HFF_WATCHDOG)
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (start == 0) start = now;
    if (now - start > 2000000000ull) trap(what);
#else
    (void)what;
#endif
  }
#if defined(HFF_WATCHDOG)
  uint64_t start = 0;
#endif
};
}  // namespace internal

// ---- block, warp, cluster -----------------------------------------------------------------------

HFF_DEVICE void sync_block() { __syncthreads(); }
HFF_DEVICE void sync_named(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}
HFF_DEVICE void sync_warp() { __syncwarp(); }
template <class T>
HFF_DEVICE T warp_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
HFF_DEVICE T warp_from(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
// The shuffles know `unsigned long long`, which is not uint64_t everywhere.
template <>
HFF_DEVICE uint64_t warp_xor(uint64_t value, int mask) {
  return __shfl_xor_sync(0xffffffffu, static_cast<unsigned long long>(value), mask);
}
template <>
HFF_DEVICE uint64_t warp_from(uint64_t value, int lane) {
  return __shfl_sync(0xffffffffu, static_cast<unsigned long long>(value), lane);
}

#if HFF_PORT_SM90
HFF_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}
HFF_DEVICE int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return int(size);
}
HFF_DEVICE int cluster_index() {
  uint32_t index;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return int(index);
}
HFF_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
HFF_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
template <class T>
HFF_DEVICE const T* peer(const T* shared, int rank) {
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(uint64_t(shared)), "r"(rank));
  return reinterpret_cast<const T*>(address);
}
#else
HFF_DEVICE int cluster_rank() { return 0; }
HFF_DEVICE int cluster_size() { return 1; }
HFF_DEVICE int cluster_index() { return block(); }
HFF_DEVICE void cluster_arrive() {}
HFF_DEVICE void cluster_wait() { __syncthreads(); }
template <class T>
HFF_DEVICE const T* peer(const T* shared, int) {
  return shared;
}
#endif

// ---- barriers in shared memory and copies -------------------------------------------------------

#if HFF_PORT_SM90
HFF_DEVICE void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(internal::shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
HFF_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
HFF_DEVICE void barrier_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile(
      "{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(
          internal::shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
HFF_DEVICE void barrier_arrive(Barrier* barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(
                   internal::shared_address(barrier))
               : "memory");
}
HFF_DEVICE void barrier_wait(Barrier* barrier, uint32_t parity) {
  const uint32_t address = internal::shared_address(barrier);
  internal::Watchdog watchdog;
  for (;;) {
    uint32_t done;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
    if (done) return;
    watchdog.check("barrier_wait");
  }
}
HFF_DEVICE void bulk_copy(void* shared, const void* global, uint32_t bytes, Barrier* barrier) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(internal::shared_address(shared)),
      "l"(internal::global_address(global)), "r"(bytes), "r"(internal::shared_address(barrier)),
      "l"(policy)
      : "memory");
}
#else
HFF_DEVICE void barrier_init(Barrier*, int) { trap("barrier_init needs sm_90"); }
HFF_DEVICE void barrier_init_fence() { trap("barrier_init_fence needs sm_90"); }
HFF_DEVICE void barrier_expect(Barrier*, uint32_t) { trap("barrier_expect needs sm_90"); }
HFF_DEVICE void barrier_arrive(Barrier*) { trap("barrier_arrive needs sm_90"); }
HFF_DEVICE void barrier_wait(Barrier*, uint32_t) { trap("barrier_wait needs sm_90"); }
HFF_DEVICE void bulk_copy(void*, const void*, uint32_t, Barrier*) { trap("bulk_copy needs sm_90"); }
#endif

HFF_DEVICE void copy16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(internal::shared_address(shared)),
               "l"(internal::global_address(global))
               : "memory");
}
HFF_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
HFF_DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- between blocks -----------------------------------------------------------------------------

HFF_DEVICE uint32_t load_acquire(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(internal::global_address(p))
               : "memory");
  return value;
}
HFF_DEVICE uint32_t add_acq_rel(uint32_t* p, uint32_t addend) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(internal::global_address(p)), "r"(addend)
               : "memory");
  return old;
}
HFF_DEVICE void store_relaxed(uint32_t* p, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(internal::global_address(p)), "r"(value)
               : "memory");
}
HFF_DEVICE void wait_for(const uint32_t* counter, uint32_t target) {
  internal::Watchdog watchdog;
  while (int32_t(load_acquire(counter) - target) < 0) watchdog.check("wait_for");
}

namespace internal {
template <int kBytes>
struct Fresh;
template <>
struct Fresh<2> {
  uint16_t bits;
  HFF_DEVICE explicit Fresh(uint64_t p) {
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(bits) : "l"(p) : "memory");
  }
};
template <>
struct Fresh<4> {
  uint32_t bits;
  HFF_DEVICE explicit Fresh(uint64_t p) {
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(bits) : "l"(p) : "memory");
  }
};
template <>
struct Fresh<8> {
  uint64_t bits;
  HFF_DEVICE explicit Fresh(uint64_t p) {
    asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(bits) : "l"(p) : "memory");
  }
};
template <>
struct Fresh<16> {
  uint4 bits;
  HFF_DEVICE explicit Fresh(uint64_t p) {
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "l"(p)
                 : "memory");
  }
};
}  // namespace internal

template <class T>
HFF_DEVICE T load_fresh(const T* p) {
  const internal::Fresh<int(sizeof(T))> fresh(internal::global_address(p));
  T value;
  memcpy(&value, &fresh.bits, sizeof(T));
  return value;
}

HFF_DEVICE void dependents_launch() {
#if HFF_PORT_SM90
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
HFF_DEVICE void dependencies_wait() {
#if HFF_PORT_SM90
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- numbers ------------------------------------------------------------------------------------

HFF_DEVICE float to_float(half x) { return __half2float(x); }
HFF_DEVICE float to_float(bfloat16 x) { return __bfloat162float(x); }
HFF_DEVICE float to_float(float x) { return x; }
template <class T>
HFF_DEVICE T from_float(float x);
template <>
HFF_DEVICE half from_float(float x) {
  return __float2half_rn(x);
}
template <>
HFF_DEVICE bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}
template <>
HFF_DEVICE float from_float(float x) {
  return x;
}

namespace internal {
HFF_DEVICE void unpack8(const uint4& bits, const half*, float (&out)[8]) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
  HFF_UNROLL
  for (int i = 0; i < 4; ++i) {
    __half2 pair;
    memcpy(&pair, &words[i], 4);
    const float2 wide = __half22float2(pair);
    out[2 * i] = wide.x, out[2 * i + 1] = wide.y;
  }
}
HFF_DEVICE void unpack8(const uint4& bits, const bfloat16*, float (&out)[8]) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
  HFF_UNROLL
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(words[i] << 16);
    out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}
HFF_DEVICE void spread4(const uint4& bits, float* out) {
  out[0] = __uint_as_float(bits.x), out[1] = __uint_as_float(bits.y);
  out[2] = __uint_as_float(bits.z), out[3] = __uint_as_float(bits.w);
}
HFF_DEVICE uint4 load_once(const void* p) {
  uint4 bits;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
      : "l"(global_address(p)));
  return bits;
}
}  // namespace internal

template <class T>
HFF_DEVICE void load8(const T* p, float (&out)[8]) {
  internal::unpack8(*reinterpret_cast<const uint4*>(p), p, out);
}
template <>
HFF_DEVICE void load8(const float* p, float (&out)[8]) {
  internal::spread4(reinterpret_cast<const uint4*>(p)[0], out);
  internal::spread4(reinterpret_cast<const uint4*>(p)[1], out + 4);
}
template <class T>
HFF_DEVICE void load8_once(const T* p, float (&out)[8]) {
  internal::unpack8(internal::load_once(p), p, out);
}
template <>
HFF_DEVICE void load8_once(const float* p, float (&out)[8]) {
  internal::spread4(internal::load_once(p), out);
  internal::spread4(internal::load_once(p + 4), out + 4);
}
template <class T>
HFF_DEVICE void store8(T* p, const float (&in)[8]) {
  T values[8];
  HFF_UNROLL
  for (int i = 0; i < 8; ++i) values[i] = from_float<T>(in[i]);
  uint4 bits[sizeof(T) / 2];
  memcpy(bits, values, sizeof(values));
  HFF_UNROLL
  for (int i = 0; i < int(sizeof(T)) / 2; ++i) reinterpret_cast<uint4*>(p)[i] = bits[i];
}

HFF_DEVICE float exp(float x) { return expf(x); }
HFF_DEVICE float erf(float x) { return erff(x); }
HFF_DEVICE float tanh(float x) { return tanhf(x); }
HFF_DEVICE float rsqrt(float x) { return rsqrtf(x); }
HFF_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace on_cuda
}  // namespace port
}  // namespace hff

#include "cuda/port_cuda_launch.h"

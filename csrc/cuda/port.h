// What a kernel may use of the machine it runs on: the names of hff::port below, plain C++17, plain
// loads and stores. The same kernel source is compiled by nvcc (port_cuda.h: PTX and intrinsics)
// and, with HFF_PORT_HOST, by the host compiler (port_host.h: each thread of the grid is a fiber
// under the seeded adversarial scheduler of host_fibers.h); what keeps to the names that port_hip.h
// has, by hipcc too.
//
// A kernel takes one parameter struct; blocks and grids have one dimension, blocks hold a multiple
// of 32 threads:
//   HFF_KERNEL(256) void row_sum(HFF_PARAM(Params) p);   // at most 256 threads, 1 block per SM
// HFF_DEVICE marks a function that runs in a kernel, HFF_HOST_DEVICE one that runs there and on the
// host, HFF_UNROLL the loop behind it.
//
// Where
//   int thread(), threads(), block(), blocks(), lane(), warp()
//   char* arena()    this block's dynamic shared memory, 1024-byte aligned: all there is of it
//
// Block and warp
//   void sync_block()
//   void sync_named(int id, int count)   barrier 1..15 among `count` threads, whole warps
//   void sync_warp()
//   T warp_xor(T, int mask)              the value of lane ^ mask; all 32 lanes call
//   T warp_from(T, int lane)             the value of `lane`; T: float, int, uint32_t, uint64_t
//
// Clusters (sm_90 and up; elsewhere a cluster is one block)
//   int cluster_rank(), cluster_size(), cluster_index()
//   void cluster_arrive(), cluster_wait()   release, acquire; all threads of the cluster call both
//   const T* peer(const T* shared, int rank)   the same shared address in block `rank`; that block
//     must have passed a cluster barrier before, and must not finish before the last read
//
// Barriers in shared memory (sm_90 and up): a phase completes when its arrivals and the bytes it
// expects are complete; phases have parity 0, 1, 0, ...
//   void barrier_init(Barrier*, int arrivals), barrier_init_fence()   the fence, by the same thread
//     and before a block barrier, makes them visible to copies and to the cluster
//   void barrier_expect(Barrier*, uint32_t bytes)   one arrival that adds `bytes` to the phase,
//     before their copies start
//   void barrier_arrive(Barrier*)
//   void barrier_wait(Barrier*, uint32_t parity)    until the phase of that parity is complete;
//     acquire. Phases must not run two ahead of a waiter: parity could not tell.
//
// Asynchronous copies, global to shared: 16-byte aligned, sizes positive multiples of 16
//   void bulk_copy(void* shared, const void* global, uint32_t bytes, Barrier*)   sm_90; evict-first
//   void copy16(void* shared, const void* global)   sm_80; completes with its group:
//   void copies_commit(); void copies_wait<kPending>()   until all but the last kPending groups of
//     this thread are there, for this thread
//
// Between blocks, in global memory (gpu scope)
//   uint32_t load_acquire(const uint32_t*), add_acq_rel(uint32_t*, uint32_t)   add returns the old
//   void store_relaxed(uint32_t*, uint32_t)
//   void wait_for(const uint32_t* counter, uint32_t target)   spins until counter - target, as a
//     signed number, is not negative; acquire. With HFF_WATCHDOG it traps after 2 s.
//   T load_fresh(const T*)   what another block of this kernel wrote, past L1; 2, 4, 8 or 16 bytes
//
// Programmatic dependent launch (sm_90 and up; nothing elsewhere)
//   void dependents_launch(), dependencies_wait()
//
// Numbers
//   half, bfloat16   2 bytes; conversions round to nearest even
//   float to_float(half | bfloat16 | float); T from_float<T>(float)
//   void load8(const T*, float (&)[8]), store8(T*, const float (&)[8])   16-byte aligned shared or
//     global memory, T half, bfloat16 or float
//   void load8_once(const T*, float (&)[8])   global memory that is read once and that nobody
//     writes during the kernel
//   float exp(float), erf(float), tanh(float), rsqrt(float)
//   float exp2(float)   relative error at most 2^-22, subnormals flushed
//
//   void trap(const char* what)   ends the launch with an error; never returns
//
// On the host
//   hff_status launch(const Launch&, Kernel<P>, const P&)   HFF_OK, or fail() with the reason.
//     CUDA: enqueued on the stream; host fibers: run to the end.
//   hff_status describe(int ordinal, Device*)   HFF_UNSUPPORTED with the reason where there is none
//   int max_active_clusters(Kernel<P>, const Launch&)   clusters (of one block: blocks) of that
//     launch that can be resident at once; 0 where it cannot run
#pragma once

#include "backend.h"
#include "cuda/launch.h"

#if defined(HFF_PORT_HOST)
#include "cuda/port_host.h"
#elif defined(__HIP__)
#include "cuda/port_hip.h"
#else
#include "cuda/port_cuda.h"
#endif

// port.h on the host compiler: kernels run as fibers, see host_fibers.h.
#pragma once

#include <cmath>
#include <cstring>

#include "cuda/host_fibers.h"

#define HFF_DEVICE inline
#define HFF_HOST_DEVICE inline
#define HFF_KERNEL(max_threads)
#define HFF_PARAM(Params) const Params&
#define HFF_UNROLL

namespace hff {
namespace port {
inline namespace on_host {

struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};
using Barrier = uint64_t;
template <class P>
using Kernel = void (*)(const P&);

[[noreturn]] inline void trap(const char* what) { fibers::trap(what); }

inline int thread() { return fibers::self->thread; }
inline int threads() { return fibers::self->threads; }
inline int block() { return fibers::self->block; }
inline int blocks() { return fibers::self->blocks; }
inline int lane() { return fibers::self->thread & 31; }
inline int warp() { return fibers::self->thread >> 5; }
inline char* arena() { return fibers::self->arena; }

// ---- block, warp, cluster -----------------------------------------------------------------------

inline void sync_block() { fibers::sync(0, fibers::self->threads); }
inline void sync_named(int id, int count) {
  if (id < 1 || id > 15) trap("sync_named: the id is not in 1..15");
  fibers::sync(id, count);
}
inline void sync_warp() { fibers::sync_warp(); }

namespace internal {
template <class T>
T exchange(bool by_mask, T value, int argument) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "float, int, uint32_t or uint64_t");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = fibers::warp_exchange(by_mask, argument, bits, int(sizeof(T)));
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace internal

template <class T>
T warp_xor(T value, int mask) {
  return internal::exchange(true, value, mask);
}
template <class T>
T warp_from(T value, int lane) {
  return internal::exchange(false, value, lane);
}

inline int cluster_rank() { return fibers::self->cluster_rank; }
inline int cluster_size() { return fibers::self->cluster_size; }
inline int cluster_index() { return fibers::self->block / fibers::self->cluster_size; }
inline void cluster_arrive() { fibers::cluster_arrive(); }
inline void cluster_wait() { fibers::cluster_wait(); }
template <class T>
const T* peer(const T* shared, int rank) {
  return static_cast<const T*>(fibers::peer(shared, rank));
}

// ---- barriers in shared memory and copies -------------------------------------------------------

inline void barrier_init(Barrier* barrier, int arrivals) {
  fibers::barrier_init(barrier, arrivals);
}
inline void barrier_init_fence() { fibers::barrier_init_fence(); }
inline void barrier_expect(Barrier* barrier, uint32_t bytes) {
  fibers::barrier_expect(barrier, bytes);
}
inline void barrier_arrive(Barrier* barrier) { fibers::barrier_arrive(barrier); }
inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  fibers::barrier_wait(barrier, parity);
}
inline void bulk_copy(void* shared, const void* global, uint32_t bytes, Barrier* barrier) {
  fibers::bulk_copy(shared, global, bytes, barrier);
}
inline void copy16(void* shared, const void* global) { fibers::copy16(shared, global); }
inline void copies_commit() { fibers::copies_commit(); }
template <int kPending>
void copies_wait() {
  fibers::copies_wait(kPending);
}

// ---- between blocks -----------------------------------------------------------------------------

inline uint32_t load_acquire(const uint32_t* p) { return fibers::load_acquire(p); }
inline uint32_t add_acq_rel(uint32_t* p, uint32_t addend) { return fibers::add_acq_rel(p, addend); }
inline void store_relaxed(uint32_t* p, uint32_t value) { fibers::store_relaxed(p, value); }
inline void wait_for(const uint32_t* counter, uint32_t target) {
  fibers::wait_for(counter, target);
}
template <class T>
T load_fresh(const T* p) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16,
                "2, 4, 8 or 16 bytes");
  fibers::check_access(p, sizeof(T), "load_fresh");
  fibers::switch_point();
  return *p;
}
inline void dependents_launch() { fibers::switch_point(); }
inline void dependencies_wait() { fibers::dependencies_wait(); }

// ---- numbers ------------------------------------------------------------------------------------

namespace internal {
inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
}  // namespace internal

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return internal::from_bits(uint32_t{x.bits} << 16); }
inline float to_float(half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, body = x.bits & 0x7fffu;
  if (body >= 0x7c00) return internal::from_bits(sign | 0x7f800000 | (body & 0x3ff) << 13);
  // An exact product rebiases the exponent and normalises subnormals.
  return internal::from_bits(sign | internal::to_bits(internal::from_bits(body << 13) * 0x1p112f));
}

template <class T>
T from_float(float x);
template <>
inline float from_float(float x) {
  return x;
}
template <>
inline bfloat16 from_float(float x) {
  const uint32_t bits = internal::to_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};  // what the device gives for any NaN
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline half from_float(float x) {
  const uint32_t bits = internal::to_bits(x), sign = bits >> 16 & 0x8000, body = bits & 0x7fffffff;
  if (body > 0x7f800000) return {0x7fff};                    // what the device gives for any NaN
  if (body >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds past 65504
  if (body < 0x38800000) {  // subnormal: the adder rounds at bit 2^-24
    return {uint16_t(sign | (internal::to_bits(internal::from_bits(body) + 0.5f) - 0x3f000000))};
  }
  const uint32_t rebiased = body - 0x38000000;
  return {uint16_t(sign | (rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13)};
}

template <class T>
void load8(const T* p, float (&out)[8]) {
  fibers::check_access(p, 8 * sizeof(T), "load8");
  for (int i = 0; i < 8; ++i) out[i] = to_float(p[i]);
}
template <class T>
void load8_once(const T* p, float (&out)[8]) {
  fibers::check_access(p, 8 * sizeof(T), "load8_once");
  for (int i = 0; i < 8; ++i) out[i] = to_float(p[i]);
}
template <class T>
void store8(T* p, const float (&in)[8]) {
  fibers::check_access(p, 8 * sizeof(T), "store8");
  for (int i = 0; i < 8; ++i) p[i] = from_float<T>(in[i]);
}

inline float exp(float x) { return std::exp(x); }
inline float erf(float x) { return std::erf(x); }
inline float tanh(float x) { return std::tanh(x); }
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline float exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

// ---- on the host --------------------------------------------------------------------------------

template <class P>
hff_status launch(const Launch& launch, Kernel<P> kernel, const P& params) {
  const auto invoke = [](const void* function, const void* argument) {
    (*static_cast<const Kernel<P>*>(function))(*static_cast<const P*>(argument));
  };
  if (fibers::run(launch, {invoke, &kernel, &params})) return HFF_OK;
  const char* report = fibers::report();
  return fail(HFF_INTERNAL, "%.*s", int(std::strcspn(report, "\n")), report);
}

template <class P>
int max_active_clusters(Kernel<P>, const Launch& launch) {
  return fibers::max_active_clusters(launch);
}

inline hff_status describe(int ordinal, Device* device) {
  if (ordinal != 0)
    return fail(HFF_UNSUPPORTED, "no emulated device %d: there is device 0", ordinal);
  *device = fibers::options().device;
  return HFF_OK;
}

}  // namespace on_host
}  // namespace port
}  // namespace hff

// Every name of csrc/cuda/port.h once, for the compiler: nothing runs this.
#include "cuda/port.h"

namespace hff_test {
namespace {

using namespace hff;

struct Everything {
  const port::half* half_in;
  const port::bfloat16* bfloat16_in;
  const float* float_in;
  port::half* half_out;
  port::bfloat16* bfloat16_out;
  float* float_out;
  uint32_t* words;
};
struct alignas(16) Sixteen {
  float x[4];
};

HFF_HOST_DEVICE int next_slot(int slot) { return slot == 3 ? 0 : slot + 1; }

HFF_DEVICE void copies(const Everything& p) {
  auto* barrier = reinterpret_cast<port::Barrier*>(port::arena());
  if (port::thread() == 0) {
    port::barrier_init(barrier, 2);
    port::barrier_init_fence();
  }
  port::sync_block();
  if (port::thread() == 0) {
    port::barrier_expect(barrier, 64);
    port::bulk_copy(port::arena() + 1024, p.half_in, 64, barrier);
    port::barrier_arrive(barrier);
  }
  port::barrier_wait(barrier, 0);
  port::copy16(port::arena() + 2048, p.half_in);
  port::copies_commit();
  port::copies_wait<1>();
  port::copies_wait<0>();
}

HFF_DEVICE float collectives(float x) {
  port::sync_named(1 + port::warp() / 2, 64);
  port::sync_warp();
  x += port::warp_xor(x, 16) + port::warp_from(x, port::lane() / 2);
  x += float(port::warp_xor(port::thread(), 1)) + float(port::warp_xor(uint32_t(x), 2));
  x += float(port::warp_from(uint64_t(x), 3)) + float(port::warp_xor(uint64_t(x), 4));
  port::cluster_arrive();
  port::cluster_wait();
  const auto* shared = reinterpret_cast<const float*>(port::arena());
  return x + *port::peer(shared, next_slot(port::cluster_rank()) % port::cluster_size());
}

template <class T>
HFF_DEVICE void eights(const T* in, T* out) {
  float v[8], once[8];
  port::load8(in, v);
  port::load8_once(in + 8, once);
  HFF_UNROLL
  for (int i = 0; i < 8; ++i) v[i] += once[i];
  port::store8(out, v);
  out[8] = port::from_float<T>(port::to_float(port::load_fresh(in)) + 1.0f);
}

template <class T>
HFF_KERNEL(128)
void everything(HFF_PARAM(Everything) p) {
  port::dependencies_wait();
  port::dependents_launch();
  copies(p);
  eights(p.half_in, p.half_out);
  eights(p.bfloat16_in, p.bfloat16_out);
  eights(p.float_in, p.float_out);
  const Sixteen four = port::load_fresh(reinterpret_cast<const Sixteen*>(p.float_in));
  const uint64_t two = port::load_fresh(reinterpret_cast<const uint64_t*>(p.float_in));
  float x = collectives(four.x[3]) + float(two);
  x += port::exp(x) + port::erf(x) + port::tanh(x) + port::rsqrt(x) + port::exp2(x);
  if (port::add_acq_rel(p.words, 1) == 7) port::trap("seven");
  port::store_relaxed(p.words + 1, port::load_acquire(p.words));
  port::wait_for(p.words + 2, uint32_t(port::blocks() * port::threads()));
  p.float_out[port::block() + port::cluster_index()] = port::to_float(port::from_float<T>(x));
}

}  // namespace

hff_status launch_everything(const Everything& params) {
  port::Device device;
  port::Launch launch;
  launch.cluster = 2;
  if (port::describe(0, &device) != HFF_OK) return HFF_UNSUPPORTED;
  launch.grid = port::max_active_clusters(everything<port::half>, launch) * launch.cluster;
  if (port::launch(launch, everything<float>, params) != HFF_OK) return HFF_INTERNAL;
  return port::launch(launch, everything<port::bfloat16>, params);
}

}  // namespace hff_test

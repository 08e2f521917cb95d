// From the C structs of a call to the parameters of the CUDA kernels: what fits, how rows are cut,
// and what lies where in shared memory and in the workspace. Host code without a CUDA call.
#pragma once

#include "cuda/chain.cuh"
#include "cuda/cluster.cuh"
#include "cuda/token.cuh"

namespace hff {
namespace cuda {

// Warps, CTAs and shared memory that a kernel may plan with.
struct Room {
  bool bulk;   // rings of bulk copies; else of cp.async
  int blocks;  // CTAs that share rows
  int stream_warps, attend_warps;
  int shared_bytes;  // of a CTA
};

// What all layers of a call have in common; HFF_UNSUPPORTED, with the reason, where the kernels
// cannot run it. `block` stands for all of them.
hff_status shape_of(const hff_call& call, const hff_block& block, Shape* shape);

// One layer's matrices, norms and cache, its rows cut for slots of `slot_bytes`. The same of a
// layer that differs in shape is refused.
hff_status layer_of(const hff_call& call, const hff_block& block, const hff_cache& cache,
                    const Shape& shape, int slot_bytes, Layer* layer);
hff_status head_of(const hff_model& model, int slot_bytes, Rows* head, Norm* norm);
Cache cache_of(const hff_cache& cache);

constexpr int kMostSlot = 4096, kLeastSlot = 256;  // bytes of a slot

// What a kernel holds in its inputs: norms of x, up or context, or both in turn.
enum Use { kEnters, kLeaves, kWhole };

// Shared memory of a CTA, with the ring that keeps most in flight: large, of slots that the rows
// fill. False where not even two slots a warp are left.
bool layout_of(const Shape& shape, const Room& room, int batch, Use use, int extra_floats,
               Layout* layout);

Rope rope_of(const hff_call& call);
Mask mask_of(const hff_call& call);
Source source_of(const hff_model& model, const hff_model_io& io);

// Splits of each head's keys so that all CTAs attend.
int splits_of(const Shape& shape, int batch, int blocks);
// Largest cluster for which every key head has one at a time on `sms` multiprocessors.
int cluster_of(const Shape& shape, int sms, int arch);

// The parts of a workspace, which is `bytes` long.
Scratch scratch_of(const Shape& shape, int batch, int sms, void* workspace, int64_t* bytes);

}  // namespace cuda
}  // namespace hff

// A layer as a chain of kernels, each started while the one before runs (programmatic dependent
// launch): the baseline of the token kernel, its fallback, and the full rung of a single layer.
//
//   parallel:    phase [qkv, up] | attend | phase [down, o]
//   sequential:  phase [qkv] | attend | phase [o] | phase [up] | phase [down]
//   model:       all layers, then phase [head]
//
// A phase fills its rings before it waits for its predecessor; two CTAs fit an SM, so that the
// successor's weights come in while the last rows of this one are summed. No clusters, no wait
// between CTAs: attend's splits are merged by whoever comes last.
#pragma once

#include "cuda/phases.cuh"

namespace hff {
namespace cuda {

enum PhaseKind : int32_t { kPhaseIn, kPhaseOut, kPhaseHead };

struct PhaseParams {
  Shape shape;
  Layout layout;
  Scratch scratch;
  Source source;  // x of a kPhaseIn, the residual of a kPhaseOut
  Layer layer;    // with the phase's own matrices alone
  Norm final_norm;
  Rows head;
  HeadOut head_out;
  Half half;
  void* up;   // (batch, mlp_width): out of a kPhaseIn, into a kPhaseOut
  void* out;  // (batch, hidden) T of a kPhaseOut; null: the residual stream
  int32_t kind, batch;
  int32_t counts;  // 1: the layer's cache has one token more after this
};

struct PhaseProgram {
  const PhaseParams* p;
  int block, blocks, size;

  HFF_HOST_DEVICE const Rows& rows(int index) const {
    switch (index) {
      case 0:
        return p->layer.qkv;
      case 1:
        return p->layer.k;
      case 2:
        return p->layer.v;
      case 3:
        return p->layer.up;
      case 4:
        return p->layer.down;
      case 5:
        return p->layer.o;
      default:
        return p->head;
    }
  }
  HFF_HOST_DEVICE bool span(int index, Span& s) const {
    if (index > 6) return false;
    s.count = 0;
    if (rows(index).weight != nullptr) s = part_of(rows(index), block, blocks, size);
    return true;
  }
};

template <class T, int kBatch, class Ring>
HFF_KERNEL(32 * kStreamWarps)
void phase(HFF_PARAM(PhaseParams) p) {
  if constexpr (compiled_here(Ring::kBulk)) {
    using Pieces = Stream<Ring, PhaseProgram>;
    const Group group = {1, 0, port::threads()};
    const PhaseProgram program = {&p, port::block(), port::blocks(), int(sizeof(T))};
    Pieces stream;
    stream.start(program, port::arena(), p.layout, group.warp(), group.warps());
    port::dependents_launch();
    port::dependencies_wait();
    Worker<T, kBatch, Pieces> worker(p.shape, p.scratch, p.layout, group, stream, p.batch);
    if (p.kind == kPhaseIn) worker.enter(p.layer, p.half, p.source, p.up);
    if (p.kind == kPhaseOut)
      worker.leave(p.layer, p.half, p.source, p.up, p.out, [&group](bool) { group.sync(); });
    if (p.kind == kPhaseHead) norm_head<T, kBatch>(worker, p.final_norm, p.head, p.head_out);
    const auto cache = [&p](int) -> const Cache& { return p.layer.cache; };
    if (p.counts != 0 || p.kind == kPhaseHead)
      finish(p.scratch.counters, p.layout, cache, p.counts);
  }
}

struct AttendParams {
  Shape shape;
  Layout layout;
  Scratch scratch;
  Cache cache;
  Rope rope;
  Mask mask;
  int32_t batch, splits;
};

// A CTA per (batch row, head, split).
template <class T>
HFF_KERNEL(32 * kAttendWarps)
void attend_heads(HFF_PARAM(AttendParams) p) {
  port::dependents_launch();
  port::dependencies_wait();
  const Group group = {1, 0, port::threads()};
  const int index = port::block() / p.splits, b = index / p.shape.heads;
  attend_split<T>(group, p.shape, p.scratch, p.cache, p.rope, p.mask, b, index - b * p.shape.heads,
                  port::block() - index * p.splits, p.splits,
                  reinterpret_cast<float*>(port::arena() + p.layout.attend));
}

}  // namespace cuda
}  // namespace hff

// A whole token in one launch: embedding, layers, last norm, head, and the index of the largest
// logit.
//
// One CTA an SM, all resident, two kinds of warps that share nothing but counters:
//   Streamer  kStreamWarps warps multiply: phase A (qkv and up, from norms of x), then phase C
//             (down from up, o from context, plus x), layer after layer, then the head. Their rings
//             run ahead of every wait.
//   Attender  kAttendWarps warps attend to (batch row, head, split) items meanwhile: beside the
//             down projection, which does not need them.
// Waits between CTAs, parallel residual: `ready` (all of [qkv | up] stored) by both kinds,
// `attended` (all contexts stored) before the o projection only, `summed` (the residual stream
// stored) before the next layer: a layer has two that everyone passes and one that is hidden.
// Sequential residual: qkv | attention | o | up | down, four.
// A wait: a barrier of the group, one release-add by its first thread; one thread polls by acquire,
// a barrier. Counters rise by the number of CTAs a hop, targets with them. The last CTA to finish
// sets them to zero and moves the cache lengths.
// Bytes: every weight once, the cache once (twice what a second query head of a group reads, from
// L2); activations are a thousandth. Bound: the memory's read stream.
#pragma once

#include "cuda/phases.cuh"

namespace hff {
namespace cuda {

struct TokenParams {
  Shape shape;
  Team team;
  Layout layout;
  Scratch scratch;
  Source source;
  Rope rope;
  Mask mask;
  Norm final_norm;
  Rows head;
  HeadOut out;
  int32_t batch, layer_count;
  Layer layers[kMaxLayers];
};
static_assert(sizeof(TokenParams) <= 32764, "kernel parameters have 32,764 bytes at most");

// The matrices of a layer in the order in which they are read.
constexpr int kMatrices = 6;
HFF_HOST_DEVICE const Rows& matrix(const Layer& layer, bool sequential, int index) {
  switch (index) {
    case 0:
      return layer.qkv;
    case 1:
      return layer.k;
    case 2:
      return layer.v;
    case 3:
      return sequential ? layer.o : layer.up;
    case 4:
      return sequential ? layer.up : layer.down;
    default:
      return sequential ? layer.down : layer.o;
  }
}

struct TokenProgram {
  const TokenParams* p;
  int block, blocks, size;  // size: bytes of an element

  HFF_HOST_DEVICE bool span(int index, Span& s) const {
    const int layer = index / kMatrices;
    if (layer > p->layer_count || (layer == p->layer_count && index > layer * kMatrices))
      return false;
    const Rows& rows = layer == p->layer_count
                           ? p->head
                           : matrix(p->layers[layer], p->shape.sequential != 0, index % kMatrices);
    s.count = 0;
    if (rows.weight != nullptr) s = part_of(rows, block, blocks, size);
    return true;
  }
};

// A group's place in the counters.
struct Hops {
  Group group;
  uint32_t blocks;

  HFF_DEVICE void arrive(Counters::Line& counter) const {
    group.sync();
    if (group.rank() == 0) port::add_acq_rel(&counter.value, 1);
  }
  HFF_DEVICE void wait(const Counters::Line& counter, uint32_t target) const {
    if (group.rank() == 0) port::wait_for(&counter.value, target);
    group.sync();
  }
};

template <class T, int kBatch, class Ring>
struct Streamer {
  using Pieces = Stream<Ring, TokenProgram>;
  const TokenParams& p;
  Group group;
  Hops hops;

  HFF_DEVICE explicit Streamer(const TokenParams& params)
      : p(params),
        group{1, 0, 32 * params.team.stream_warps},
        hops{group, static_cast<uint32_t>(port::blocks())} {}

  HFF_DEVICE void run() {
    const TokenProgram program = {&p, port::block(), port::blocks(), int(sizeof(T))};
    Pieces stream;
    stream.start(program, port::arena(), p.layout, group.warp(), group.warps());
    Worker<T, kBatch, Pieces> worker(p.shape, p.scratch, p.layout, group, stream, p.batch);
    Counters& counters = *p.scratch.counters;
    const int per_layer = halves(p.shape);
#pragma unroll 1
    for (int i = 0; i < p.layer_count * per_layer; ++i) {
      const int l = i / per_layer;
      const Half half = half_of(p.shape, i - l * per_layer);
      const Source source = i == 0 ? p.source : Source{};
      if (i > 0) hops.wait(counters.summed, i * hops.blocks);
      worker.enter(p.layers[l], half, source, p.scratch.up);
      hops.arrive(counters.ready);
      worker.leave(p.layers[l], half, source, p.scratch.up, nullptr, [&](bool mlp) {
        if (mlp)
          hops.wait(counters.ready, (i + 1) * hops.blocks);
        else
          hops.wait(counters.attended, static_cast<uint32_t>((l + 1) * p.batch * p.shape.heads));
      });
      hops.arrive(counters.summed);
    }
    hops.wait(counters.summed, p.layer_count * per_layer * hops.blocks);
    norm_head<T, kBatch>(worker, p.final_norm, p.head, p.out);
  }
};

template <class T>
struct Attender {
  const TokenParams& p;
  Group group;
  Hops hops;

  HFF_DEVICE explicit Attender(const TokenParams& params)
      : p(params),
        group{2, 32 * params.team.stream_warps, 32 * params.team.attend_warps},
        hops{group, static_cast<uint32_t>(port::blocks())} {}

  HFF_DEVICE void run() {
    float* shared = reinterpret_cast<float*>(port::arena() + p.layout.attend);
    const uint32_t per_layer = static_cast<uint32_t>(halves(p.shape));
    const int splits = p.team.splits, items = p.batch * p.shape.heads * splits;
    for (int l = 0; l < p.layer_count; ++l) {
      hops.wait(p.scratch.counters->ready,
                (static_cast<uint32_t>(l) * per_layer + 1) * hops.blocks);
      for (int item = port::block(); item < items; item += port::blocks()) {
        const int index = item / splits, b = index / p.shape.heads;
        const bool stored =
            attend_split<T>(group, p.shape, p.scratch, p.layers[l].cache, p.rope, p.mask, b,
                            index - b * p.shape.heads, item - index * splits, splits, shared);
        if (stored && group.rank() == 0) port::add_acq_rel(&p.scratch.counters->attended.value, 1);
      }
    }
  }
};

// Compiled for devices with bulk copies or without; the other of the two is empty there.
template <class T, int kBatch, class Ring>
HFF_KERNEL(kMaxThreads)
void token(HFF_PARAM(TokenParams) p) {
  if constexpr (compiled_here(Ring::kBulk)) {
    if (port::warp() < p.team.stream_warps)
      Streamer<T, kBatch, Ring>(p).run();
    else
      Attender<T>(p).run();
    const auto caches = [&p](int l) -> const Cache& { return p.layers[l].cache; };
    finish(p.scratch.counters, p.layout, caches, p.layer_count);
  }
}

}  // namespace cuda
}  // namespace hff

// Cases of asynchronous copies: a ring that one thread fills by bulk copies, and one that every
// thread fills by its own.
#include "port_case.h"

namespace hff_test {
namespace {

using namespace hff::port;

enum class Fault {
  kNone,
  // bulk
  kWrongParity,
  kShortExpect,
  kLongExpect,
  kMisaligned,
  kOddSize,
  kOutOfBounds,
  kNotInShared,
  kNoFence,
  kFenceElsewhere,
  kNoSync,
  kInitTwice,
  kTooManyArrivals,
  kNoFullWait,
  kNoEmptyWait,
  kReleasesFirst,
  kTileTooMany,
  // groups
  kTooManyPending,
  kNoBarrier,
  kSlotInUse,
  kNoCommit,
  kNotAwaited,
  kReadInFlight,
  // refill
  kNoSecondWait,
  kSlotTwice,
  kExpectsMore,
  kNobodyAwaits,
};

constexpr int kTile = 96;  // floats

struct Tiles {
  const float* x;  // (blocks, tiles, kTile), and 16 numbers more
  float* out;      // (blocks, kTile): sums over tiles, in order
  int tiles;
};

// ---- bulk: a lane of warp 3 fills, warps 0..2 add -----------------------------------------------

constexpr int kSlots = 3, kConsumers = kTile;
struct alignas(16) Ring {
  float slots[kSlots][kTile];
  Barrier full[kSlots], empty[kSlots];
};

template <Fault kFault>
HFF_DEVICE void fill(Ring* ring, const Tiles& p) {
  const int tiles = p.tiles + (kFault == Fault::kTileTooMany ? 1 : 0);
  constexpr uint32_t kBytes = kTile * 4, kPart = 128;
  for (int tile = 0; tile < tiles; ++tile) {
    const int slot = tile % kSlots, turn = tile / kSlots;
    if (turn > 0 && kFault != Fault::kNoEmptyWait) {
      barrier_wait(&ring->empty[slot], uint32_t(turn - 1) & 1);
    }
    const float* from = p.x + (block() * p.tiles + tile) * kTile;
    char* to = reinterpret_cast<char*>(ring->slots[slot]);
    if (kFault == Fault::kMisaligned && tile == 4) ++from;
    if (kFault == Fault::kOutOfBounds && tile == 4) to += sizeof(Ring);
    if (kFault == Fault::kNotInShared && tile == 4) to = reinterpret_cast<char*>(p.out);
    uint32_t expected = kBytes;
    if (kFault == Fault::kShortExpect && tile == 4) expected -= kPart;
    if (kFault == Fault::kLongExpect && tile == 4) expected += 16;
    barrier_expect(&ring->full[slot], expected);
    bulk_copy(to, from, kFault == Fault::kOddSize ? kPart - 8 : kPart, &ring->full[slot]);
    bulk_copy(to + kPart, from + kPart / 4, kBytes - kPart, &ring->full[slot]);
  }
}

template <Fault kFault>
HFF_DEVICE float drain(Ring* ring, const Tiles& p) {
  float sum = 0;
  for (int tile = 0; tile < p.tiles; ++tile) {
    const int slot = tile % kSlots;
    const uint32_t parity = uint32_t(tile / kSlots) & 1;
    if (kFault == Fault::kWrongParity) {
      barrier_wait(&ring->full[slot], parity ^ 1);
    } else if (kFault != Fault::kNoFullWait) {
      barrier_wait(&ring->full[slot], parity);
    }
    if (kFault == Fault::kReleasesFirst) barrier_arrive(&ring->empty[slot]);
    sum += ring->slots[slot][thread()];
    if (kFault == Fault::kReleasesFirst) continue;
    if (kFault != Fault::kTooManyArrivals) sync_warp();
    if (lane() == 0 || kFault == Fault::kTooManyArrivals) barrier_arrive(&ring->empty[slot]);
  }
  return sum;
}

template <Fault kFault>
HFF_KERNEL(128)
void bulk_ring(HFF_PARAM(Tiles) p) {
  Ring* ring = reinterpret_cast<Ring*>(arena());
  if (thread() == kConsumers) {
    for (int slot = 0; slot < kSlots; ++slot) {
      barrier_init(&ring->full[slot], 1);
      barrier_init(&ring->empty[slot], kFault == Fault::kReleasesFirst ? kConsumers : 3);
    }
    if (kFault == Fault::kInitTwice) barrier_init(&ring->full[0], 1);
    if (kFault != Fault::kNoFence && kFault != Fault::kFenceElsewhere) barrier_init_fence();
  }
  if (kFault == Fault::kFenceElsewhere) {
    sync_block();
    if (thread() == 0) barrier_init_fence();
  }
  if (kFault != Fault::kNoSync) sync_block();
  if (thread() == kConsumers) fill<kFault>(ring, p);
  if (thread() < kConsumers) p.out[block() * kTile + thread()] = drain<kFault>(ring, p);
}

// ---- groups: every thread copies 16 bytes of a tile and adds what its neighbour copied ----------

constexpr int kStages = 3;

template <Fault kFault>
HFF_DEVICE void copy_tile(float (*slots)[kTile], const Tiles& p, int tile) {
  if (tile < p.tiles && thread() < kTile / 4) {
    copy16(&slots[tile % kStages][4 * thread()],
           p.x + (block() * p.tiles + tile) * kTile + 4 * thread());
  }
  if (kFault != Fault::kNoCommit) copies_commit();
}

template <Fault kFault>
HFF_KERNEL(96)
void group_ring(HFF_PARAM(Tiles) p) {
  auto slots = reinterpret_cast<float (*)[kTile]>(arena());  // (kStages, kTile)
  for (int tile = 0; tile < kStages - 1; ++tile) copy_tile<kFault>(slots, p, tile);
  float sum = 0;
  for (int tile = 0; tile < p.tiles; ++tile) {
    if (kFault == Fault::kSlotInUse) copy_tile<kFault>(slots, p, tile + kStages - 1);
    copies_wait<kFault == Fault::kTooManyPending || kFault == Fault::kSlotInUse ? kStages - 1
                                                                                : kStages - 2>();
    if (kFault != Fault::kNoBarrier) sync_block();
    // The tile before was read by all: its slot is free.
    if (kFault != Fault::kSlotInUse) copy_tile<kFault>(slots, p, tile + kStages - 1);
    if (kFault == Fault::kReadInFlight) {
      float ahead[8];
      load8(&slots[(tile + 1) % kStages][thread() / 8 * 8], ahead);
    }
    sum += slots[tile % kStages][thread()];
  }
  if (kFault == Fault::kNotAwaited && thread() < kTile / 4) {
    copy16(&slots[p.tiles % kStages][4 * thread()], p.x);
  }
  if (kFault != Fault::kNotAwaited) copies_wait<0>();
  p.out[block() * kTile + thread()] = sum;
}

// ---- refill: one slot is filled twice with the same numbers -------------------------------------

struct Refill {
  const float* x;  // (32)
  float* out;      // (32)
};
struct alignas(16) Slot {
  float x[32];
  Barrier full;
};

template <Fault kFault>
HFF_KERNEL(32)
void refill(HFF_PARAM(Refill) p) {
  Slot* slot = reinterpret_cast<Slot*>(arena());
  if (thread() == 0) {
    barrier_init(&slot->full, 1);
    barrier_init_fence();
  }
  sync_block();
  for (uint32_t turn = 0; turn < 2; ++turn) {
    if (thread() == 0) {
      const int copies = kFault == Fault::kSlotTwice ? 2 : 1;
      barrier_expect(&slot->full, uint32_t(copies * 128));
      for (int i = 0; i < copies; ++i) bulk_copy(slot->x, p.x, 128, &slot->full);
    }
    sync_warp();
    if (turn == 0 || kFault != Fault::kNoSecondWait) barrier_wait(&slot->full, turn);
    p.out[thread()] = slot->x[thread()];
    sync_warp();
  }
  if (kFault == Fault::kNoSecondWait) barrier_wait(&slot->full, 1);
  if (kFault == Fault::kExpectsMore && thread() == 0) barrier_expect(&slot->full, 32);
  if (kFault == Fault::kNobodyAwaits && thread() == 0) bulk_copy(slot->x, p.x, 128, &slot->full);
}

template <Fault kFault>
std::string run_refill() {
  static const std::vector<float> x = scattered(32, 8);
  std::vector<float> out(x.size(), 0.0f);
  Launch launch;
  launch.shared_bytes = int(sizeof(Slot));
  launch.name = "refill";
  if (kFault == Fault::kNobodyAwaits) hff::fibers::options().late_copies = true;
  return judge(launch, refill<kFault>, Refill{x.data(), out.data()}, out, x);
}

// ---- overtaken: three phases pass a thread that awaits the first --------------------------------

struct Overtaken {};

HFF_KERNEL(64)
void overtaken(HFF_PARAM(Overtaken)) {
  Barrier* barrier = reinterpret_cast<Barrier*>(arena());
  if (thread() == 0) barrier_init(barrier, 1);
  sync_block();
  for (int i = 0; i < 3 && thread() == 0; ++i) barrier_arrive(barrier);
  if (thread() == 32) barrier_wait(barrier, 0);
}

std::string run_overtaken() {
  Launch launch;
  launch.threads = 64, launch.shared_bytes = 8;
  launch.name = "overtaken";
  return judge(launch, overtaken, Overtaken(), {}, {});
}

// ---- runs ---------------------------------------------------------------------------------------

constexpr int kBlocks = 2, kTiles = 11;

std::string run_tiles(const char* name, Kernel<Tiles> kernel, int threads, int shared) {
  static const std::vector<float> x = scattered(kBlocks * kTiles * kTile + 2 * kTile, 4);
  static const std::vector<float> expected = [] {
    std::vector<float> sums(kBlocks * kTile, 0.0f);
    for (int i = 0; i < kBlocks * kTile; ++i) {
      for (int tile = 0; tile < kTiles; ++tile) {
        sums[size_t(i)] += x[size_t((i / kTile * kTiles + tile) * kTile + i % kTile)];
      }
    }
    return sums;
  }();
  static_assert(__STDCPP_DEFAULT_NEW_ALIGNMENT__ >= 16, "copies read 16 aligned bytes");
  std::vector<float> out(expected.size(), 0.0f);
  Launch launch;
  launch.grid = kBlocks, launch.threads = threads, launch.shared_bytes = shared;
  launch.name = name;
  return judge(launch, kernel, Tiles{x.data(), out.data(), kTiles}, out, expected);
}

template <Fault kFault>
std::string run_bulk() {
  return run_tiles("bulk_ring", bulk_ring<kFault>, 128, int(sizeof(Ring)));
}
template <Fault kFault>
std::string run_groups() {
  return run_tiles("group_ring", group_ring<kFault>, 96, kStages * kTile * 4);
}
std::string run_bulk_on_sm80() {
  hff::fibers::options().device.arch = 800;
  return run_bulk<Fault::kNone>();
}

}  // namespace

const std::vector<PortCase>& ring_cases() {
  static const std::vector<PortCase> cases = {
      {"bulk_ring", nullptr, run_bulk<Fault::kNone>},
      {"bulk_ring, the wrong parity", "other bits|deadlock|arrivals of phase|parity cannot tell",
       run_bulk<Fault::kWrongParity>},
      {"bulk_ring, expects too few bytes", "which expects|other bits|is in flight",
       run_bulk<Fault::kShortExpect>},
      {"bulk_ring, expects too many bytes", "and 16 bytes missing", run_bulk<Fault::kLongExpect>},
      {"bulk_ring, a misaligned source", "aligned to 16 bytes", run_bulk<Fault::kMisaligned>},
      {"bulk_ring, a size that is no multiple of 16", "positive multiple of 16",
       run_bulk<Fault::kOddSize>},
      {"bulk_ring, beyond the block's shared memory", "the block has",
       run_bulk<Fault::kOutOfBounds>},
      {"bulk_ring, to global memory", "the block has", run_bulk<Fault::kNotInShared>},
      {"bulk_ring, no fence after the barriers' start", "no barrier_init_fence",
       run_bulk<Fault::kNoFence>},
      {"bulk_ring, another thread's fence", "no barrier_init_fence",
       run_bulk<Fault::kFenceElsewhere>},
      {"bulk_ring, no block barrier after the barriers' start", "there is no barrier at",
       run_bulk<Fault::kNoSync>},
      {"bulk_ring, a barrier is initialised twice", "there is a barrier at",
       run_bulk<Fault::kInitTwice>},
      {"bulk_ring, every lane arrives where a warp is counted",
       "other bits|arrivals of phase|parity cannot tell|in flight|deadlock",
       run_bulk<Fault::kTooManyArrivals>},
      {"bulk_ring, read without waiting",
       "other bits|arrivals of phase|parity cannot tell|deadlock", run_bulk<Fault::kNoFullWait>},
      {"bulk_ring, filled without waiting",
       "other bits|arrivals of phase|in flight|parity cannot tell", run_bulk<Fault::kNoEmptyWait>},
      {"bulk_ring, a slot is released before it is read", kOtherBits,
       run_bulk<Fault::kReleasesFirst>},
      {"bulk_ring, a tile that nobody awaits", "in flight|expects", run_bulk<Fault::kTileTooMany>},
      {"bulk_ring on sm_80", "needs sm_90, this device is sm_80", run_bulk_on_sm80},
      {"group_ring", nullptr, run_groups<Fault::kNone>},
      {"group_ring, waits for a group too few", kOtherBits, run_groups<Fault::kTooManyPending>},
      {"group_ring, no barrier between threads", "other bits|in flight",
       run_groups<Fault::kNoBarrier>},
      {"group_ring, fills a slot that is being read", kOtherBits, run_groups<Fault::kSlotInUse>},
      {"group_ring, never commits", "other bits|in flight", run_groups<Fault::kNoCommit>},
      {"group_ring, ends before its copies", "of its copies are in flight",
       run_groups<Fault::kNotAwaited>},
      {"group_ring, load8 under a copy", "is in flight", run_groups<Fault::kReadInFlight>},
      {"refill", nullptr, run_refill<Fault::kNone>},
      {"refill, reads without waiting again", kOtherBits, run_refill<Fault::kNoSecondWait>},
      {"refill, two copies to one slot", "bulk_copy: a copy to shared + ",
       run_refill<Fault::kSlotTwice>},
      {"refill, expects bytes that never come", "ends while its barrier at shared + 128 expects 32",
       run_refill<Fault::kExpectsMore>},
      {"refill, a copy that nobody awaits", "ends with 1 copies to its shared memory in flight",
       run_refill<Fault::kNobodyAwaits>},
      {"overtaken, a phase is awaited and two more pass", "parity cannot tell", run_overtaken},
  };
  return cases;
}

}  // namespace hff_test

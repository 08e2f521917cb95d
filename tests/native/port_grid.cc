// Cases between blocks: hops of a grid whose blocks are resident together, and blocks that are not.
#include "port_case.h"

namespace hff_test {
namespace {

using namespace hff::port;

enum class Fault {
  kNone,
  // grid_hop
  kBlockBarrierOnly,
  kFlagFirst,
  kOneVector,
  kPlainFlag,
  kNotCooperative,
  kTargetTooLow,
  kTargetTooHigh,
  kOthersRunAhead,
  kFlagInShared,
  // last_sums
  kSumsAsTheyCome,
  kCountsFirst,
  // turns
  kTurnNeverComes,
  kPollsByAdding,
};

// ---- grid_hop: every block computes a part of a vector from all of the one before ---------------

struct Hops {
  float* vectors;     // (2, elements)
  uint32_t* counter;  // zero
  float* out;         // (elements)
  int elements, layers;
};

HFF_HOST_DEVICE float weight(int i, int k) { return 0.0625f * float((i * 7 + k * 3) % 5 - 2); }

template <Fault kFault>
HFF_DEVICE void hop(const Hops& p, int layer) {
  if (kFault != Fault::kFlagFirst) sync_block();
  if (kFault == Fault::kBlockBarrierOnly) return;
  if (thread() == 0) {
    uint32_t target = uint32_t((layer + 1) * blocks());
    if (kFault == Fault::kTargetTooLow) target -= 1;
    if (kFault == Fault::kTargetTooHigh) target += 1;
    if (kFault == Fault::kPlainFlag) {
      *p.counter += 1;
    } else {
      uint32_t* counter = p.counter;
      if (kFault == Fault::kFlagInShared) counter = reinterpret_cast<uint32_t*>(arena());
      add_acq_rel(counter, 1);
    }
    wait_for(p.counter, target);
  }
  if (kFault != Fault::kOthersRunAhead) sync_block();
}

template <Fault kFault>
HFF_KERNEL(64)
void grid_hop(HFF_PARAM(Hops) p) {
  const int i = block() * threads() + thread();
  for (int layer = 0; layer < p.layers; ++layer) {
    const bool one = kFault == Fault::kOneVector;
    const float* from = p.vectors + (one ? 0 : layer % 2 * p.elements);
    float* to = p.vectors + (one ? 0 : (layer + 1) % 2 * p.elements);
    float sum = load_fresh(from + i);
    for (int k = 0; k < p.elements; ++k) sum += weight(i, k) * from[k];
    if (kFault == Fault::kFlagFirst) hop<kFault>(p, layer);
    to[i] = sum;
    if (kFault != Fault::kFlagFirst) hop<kFault>(p, layer);
    if (layer + 1 == p.layers) p.out[i] = to[i];
  }
}

template <Fault kFault>
std::string run_grid_hop() {
  constexpr int kBlocks = 4, kThreads = 64, kElements = kBlocks * kThreads, kLayers = 4;
  static const std::vector<float> x = scattered(kElements, 5);
  static const std::vector<float> expected = [] {
    std::vector<float> from = x, to(kElements);
    for (int layer = 0; layer < kLayers; ++layer) {
      for (int i = 0; i < kElements; ++i) {
        float sum = from[size_t(i)];
        for (int k = 0; k < kElements; ++k) sum += weight(i, k) * from[size_t(k)];
        to[size_t(i)] = sum;
      }
      from.swap(to);
    }
    return from;
  }();
  std::vector<float> vectors = x, out(kElements, 0.0f);
  vectors.resize(2 * kElements, 0.0f);
  uint32_t counter = 0;
  Launch launch;
  launch.grid = kBlocks, launch.threads = kThreads, launch.shared_bytes = 16;
  launch.cooperative = kFault != Fault::kNotCooperative;
  launch.name = "grid_hop";
  return judge(launch, grid_hop<kFault>,
               Hops{vectors.data(), &counter, out.data(), kElements, kLayers}, out, expected);
}

// ---- last_sums: the last block to arrive adds everybody's slots, in the order of blocks ---------

struct Slots {
  const float* x;      // (blocks, threads)
  float* slots;        // (blocks, threads)
  uint32_t* counters;  // two, zero
  float* out;          // (threads)
};

template <Fault kFault>
HFF_KERNEL(64)
void last_sums(HFF_PARAM(Slots) p) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(arena());
  int slot = block();
  if (kFault == Fault::kSumsAsTheyCome) {
    if (thread() == 0) shared[1] = add_acq_rel(p.counters + 1, 1);
    sync_block();
    slot = int(shared[1]);
  }
  if (kFault == Fault::kCountsFirst && thread() == 0) shared[0] = add_acq_rel(p.counters, 1);
  p.slots[slot * threads() + thread()] = p.x[block() * threads() + thread()];
  sync_block();
  if (kFault != Fault::kCountsFirst && thread() == 0) shared[0] = add_acq_rel(p.counters, 1);
  sync_block();
  if (int(shared[0]) != blocks() - 1) return;
  float sum = 0;
  for (int i = 0; i < blocks(); ++i) sum += load_fresh(p.slots + i * threads() + thread());
  p.out[thread()] = sum;
}

template <Fault kFault>
std::string run_last_sums() {
  constexpr int kBlocks = 6, kThreads = 64;
  static const std::vector<float> x = scattered(kBlocks * kThreads, 6);
  static const std::vector<float> expected = [] {
    std::vector<float> sums(kThreads, 0.0f);
    for (int i = 0; i < kBlocks * kThreads; ++i) sums[size_t(i % kThreads)] += x[size_t(i)];
    return sums;
  }();
  std::vector<float> slots(x.size(), 0.0f), out(kThreads, 0.0f);
  uint32_t counters[2] = {0, 0};
  Launch launch;
  launch.grid = kBlocks, launch.threads = kThreads, launch.shared_bytes = 8;
  launch.name = "last_sums";
  return judge(launch, last_sums<kFault>, Slots{x.data(), slots.data(), counters, out.data()}, out,
               expected);
}

// ---- turns: blocks take turns, polling a word by hand -------------------------------------------

struct Turns {
  uint32_t* turn;  // zero
  float* out;      // (blocks): the turn each had, times 2
};

template <Fault kFault>
HFF_KERNEL(32)
void turns(HFF_PARAM(Turns) p) {
  if (thread() != 0) return;
  const uint32_t mine = uint32_t(blocks() - 1 - block() + (kFault == Fault::kNone ? 0 : 1));
  uint32_t turn = load_acquire(p.turn);
  while (turn != mine) {
    turn = kFault == Fault::kPollsByAdding ? add_acq_rel(p.turn, 0) : load_acquire(p.turn);
  }
  p.out[block()] = 2.0f * float(turn);
  store_relaxed(p.turn, turn + 1);
}

template <Fault kFault>
std::string run_turns() {
  constexpr int kBlocks = 5;
  uint32_t turn = 0;
  std::vector<float> out(kBlocks, 0.0f);
  const std::vector<float> expected = {8, 6, 4, 2, 0};
  Launch launch;
  launch.grid = kBlocks, launch.cooperative = true;
  launch.name = "turns";
  if (kFault == Fault::kPollsByAdding) hff::fibers::options().most_turns = 10000;
  return judge(launch, turns<kFault>, Turns{&turn, out.data()}, out, expected);
}

}  // namespace

const std::vector<PortCase>& grid_cases() {
  static const std::vector<PortCase> cases = {
      {"grid_hop", nullptr, run_grid_hop<Fault::kNone>},
      {"grid_hop, a barrier of the block only", kOtherBits, run_grid_hop<Fault::kBlockBarrierOnly>},
      {"grid_hop, the flag before what it flags", kOtherBits, run_grid_hop<Fault::kFlagFirst>},
      {"grid_hop, reads and writes one vector", kOtherBits, run_grid_hop<Fault::kOneVector>},
      {"grid_hop, a plain store as flag", "by a plain store", run_grid_hop<Fault::kPlainFlag>},
      {"grid_hop, blocks need not be resident", "have not begun: the launch is not cooperative",
       run_grid_hop<Fault::kNotCooperative>},
      {"grid_hop, waits for one arrival too few", kOtherBits, run_grid_hop<Fault::kTargetTooLow>},
      {"grid_hop, waits for one arrival too many", "deadlock", run_grid_hop<Fault::kTargetTooHigh>},
      {"grid_hop, only one thread of the block waits", kOtherBits,
       run_grid_hop<Fault::kOthersRunAhead>},
      {"grid_hop, a flag in shared memory", "the word is in shared memory",
       run_grid_hop<Fault::kFlagInShared>},
      {"last_sums", nullptr, run_last_sums<Fault::kNone>},
      {"last_sums, in the order of arrival", kOtherBits, run_last_sums<Fault::kSumsAsTheyCome>},
      {"last_sums, counts before it stores", kOtherBits, run_last_sums<Fault::kCountsFirst>},
      {"turns", nullptr, run_turns<Fault::kNone>},
      {"turns, one that never comes", ": it stays 0", run_turns<Fault::kTurnNeverComes>},
      {"turns, one that never comes, polled by adding zero", "it does not end",
       run_turns<Fault::kPollsByAdding>},
  };
  return cases;
}

}  // namespace hff_test

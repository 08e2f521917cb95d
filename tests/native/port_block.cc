// Cases within a block, a warp and a cluster.
#include <algorithm>

#include "port_case.h"

namespace hff_test {
namespace {

using namespace hff::port;

enum class Fault {
  kNone,
  // block_sum
  kNoBarrier,
  kNoSecondBarrier,
  kPartOfWarp,
  kTwoCollectives,
  kEndsEarly,
  kWarpEndsEarly,
  kWarpEndsFirst,
  kTraps,
  // pairs
  kCount,
  kWarpMissing,
  kWarpSplit,
  // cluster_gather
  kTree,
  kSkipsBarrier,
  kArrivesTwice,
  kWaitsOnly,
  kLeaves,
  kPeerTooSoon,
  kPeerOfGlobal,
  kNoSuchRank,
  // swap
  kEndsWhileRead,
};

// Time for others to get to where they wait.
HFF_DEVICE void dawdle() {
  for (int i = 0; i < 100; ++i) sync_warp();
}

// ---- block_sum: every block adds its numbers, `rounds` times over, through the same slots -------

struct Sums {
  const float* x;  // (rounds, blocks, threads)
  float* out;      // (rounds, blocks)
  int rounds;
};

template <Fault kFault>
HFF_KERNEL(128)
void block_sum(HFF_PARAM(Sums) p) {
  float* slots = reinterpret_cast<float*>(arena());
  for (int round = 0; round < p.rounds; ++round) {
    float v = p.x[(round * blocks() + block()) * threads() + thread()];
    if (kFault == Fault::kEndsEarly && block() == 1 && thread() == 77) return;
    if (kFault == Fault::kWarpEndsEarly && block() == 1 && warp() == 2) return dawdle();
    if (kFault == Fault::kWarpEndsFirst && block() == 1) {
      if (warp() == 2) return;
      dawdle();
    }
    if (kFault == Fault::kTraps && block() == 1 && thread() == 77) trap("told to");
    if (kFault != Fault::kPartOfWarp || lane() != 9) {
      for (int mask = 16; mask > 0; mask /= 2) v += warp_xor(v, mask);
    }
    if (kFault == Fault::kTwoCollectives && lane() > 3) sync_warp();
    v = warp_from(v, 0);
    if (lane() == 0) slots[warp()] = v;
    if (kFault != Fault::kNoBarrier) sync_block();
    if (thread() == 0) {
      v = slots[0];
      for (int i = 1; i < threads() / 32; ++i) v += slots[i];
      p.out[round * blocks() + block()] = v;
    }
    if (kFault != Fault::kNoSecondBarrier) sync_block();
  }
}

float block_sum_reference(const float* x, int threads) {
  float total = 0;
  for (int warp = 0; warp < threads / 32; ++warp) {
    float v[32], next[32];
    std::memcpy(v, x + warp * 32, sizeof(v));
    for (int mask = 16; mask > 0; mask /= 2) {
      for (int i = 0; i < 32; ++i) next[i] = v[i] + v[i ^ mask];
      std::memcpy(v, next, sizeof(v));
    }
    total = warp == 0 ? v[0] : total + v[0];
  }
  return total;
}

template <Fault kFault>
std::string run_block_sum() {
  constexpr int kBlocks = 3, kThreads = 128, kRounds = 3;
  static const std::vector<float> x = scattered(kRounds * kBlocks * kThreads, 1);
  static const std::vector<float> expected = [] {
    std::vector<float> sums;
    for (int i = 0; i < kRounds * kBlocks; ++i) {
      sums.push_back(block_sum_reference(&x[size_t(i * kThreads)], kThreads));
    }
    return sums;
  }();
  std::vector<float> out(expected.size(), 0.0f);
  Launch launch;
  launch.grid = kBlocks, launch.threads = kThreads, launch.shared_bytes = 16;
  launch.name = "block_sum";
  return judge(launch, block_sum<kFault>, Sums{x.data(), out.data(), kRounds}, out, expected);
}

// ---- pairs: two halves of a block hand numbers round among themselves ---------------------------

struct Pairs {
  const float* x;  // (threads)
  float* out;      // (threads): of the next thread in the half, (rounds + 1) on
  int rounds;
};

template <Fault kFault>
HFF_KERNEL(128)
void pairs(HFF_PARAM(Pairs) p) {
  float* slots = reinterpret_cast<float*>(arena());  // (threads)
  const int half_of = threads() / 2, first = thread() / half_of * half_of;
  const int id = 1 + thread() / half_of;
  slots[thread()] = p.x[thread()];
  float v = 0;
  for (int round = 0; round < p.rounds; ++round) {
    const int wrong = kFault == Fault::kWarpSplit && round == 1 && warp() % 2 == 0 && lane() < 16;
    if (kFault == Fault::kWarpMissing && round == 1 && warp() == 3) return;
    sync_named(wrong ? 3 - id : id, kFault == Fault::kCount && warp() == 3 ? threads() : half_of);
    v = slots[first + (thread() - first + 1) % half_of];
    sync_named(id, half_of);
    slots[thread()] = v;
  }
  p.out[thread()] = v;
}

template <Fault kFault>
std::string run_pairs() {
  constexpr int kThreads = 128, kRounds = 5;
  static const std::vector<float> x = scattered(kThreads, 2);
  std::vector<float> out(kThreads, 0.0f), expected(kThreads);
  for (int i = 0; i < kThreads; ++i) {
    expected[size_t(i)] = x[size_t(i / 64 * 64 + (i + kRounds) % 64)];
  }
  Launch launch;
  launch.threads = kThreads, launch.shared_bytes = kThreads * 4;
  launch.name = "pairs";
  return judge(launch, pairs<kFault>, Pairs{x.data(), out.data(), kRounds}, out, expected);
}

// ---- cluster_gather: publish, barrier, read all in rank order, barrier --------------------------

struct Gather {
  const float* x;  // (rounds, blocks, threads)
  float* out;      // (blocks, threads)
  int rounds;
};

template <Fault kFault>
HFF_DEVICE float gather(float* slots, float v, bool last) {
  float& mine = slots[thread()];
  mine = v;
  cluster_arrive();
  cluster_wait();
  if (kFault == Fault::kTree) {
    for (int hop = 1; hop < cluster_size(); hop *= 2) {
      mine += *peer(&mine, cluster_rank() ^ hop);
      cluster_arrive();
      cluster_wait();
    }
    return mine;
  }
  const int ranks = cluster_size() + (kFault == Fault::kNoSuchRank ? 1 : 0);
  float total = *peer(&mine, 0);
  for (int rank = 1; rank < ranks; ++rank) total += *peer(&mine, rank);
  if (kFault == Fault::kNoSecondBarrier && !last) return total;
  if (kFault == Fault::kLeaves && last) return total;
  if (kFault == Fault::kSkipsBarrier && last && cluster_rank() == 1) return dawdle(), total;
  if (kFault != Fault::kWaitsOnly) cluster_arrive();
  if (kFault == Fault::kArrivesTwice) cluster_arrive();
  cluster_wait();
  return total;
}

template <Fault kFault>
HFF_KERNEL(64)
void cluster_gather(HFF_PARAM(Gather) p) {
  float* slots = reinterpret_cast<float*>(arena());  // (threads)
  if (kFault == Fault::kPeerTooSoon) p.out[0] = *peer(slots, cluster_size() - 1);
  if (kFault == Fault::kPeerOfGlobal) p.out[0] = *peer(p.x, 0);
  float total = 0;
  for (int round = 0; round < p.rounds; ++round) {
    const float v = p.x[(round * blocks() + block()) * threads() + thread()];
    total = gather<kFault>(slots, v + total, round + 1 == p.rounds);
  }
  p.out[block() * threads() + thread()] = total;
}

template <Fault kFault, int kCluster = 4>
std::string run_cluster_gather() {
  constexpr int kBlocks = 2 * kCluster, kThreads = 64, kRounds = 4;
  static const std::vector<float> x = scattered(kRounds * kBlocks * kThreads, 3);
  static const std::vector<float> expected = [] {
    std::vector<float> totals(kBlocks * kThreads, 0.0f);
    for (int round = 0; round < kRounds; ++round) {
      for (int i = 0; i < 2 * kThreads; ++i) {
        const int first = i / kThreads * kCluster, thread = i % kThreads;
        const auto at = [&](int rank) {
          return x[size_t((round * kBlocks + first + rank) * kThreads + thread)] +
                 totals[size_t((first + rank) * kThreads + thread)];
        };
        float total = at(0);
        for (int rank = 1; rank < kCluster; ++rank) total += at(rank);
        for (int rank = 0; rank < kCluster; ++rank) {
          totals[size_t((first + rank) * kThreads + thread)] = total;
        }
      }
    }
    return totals;
  }();
  std::vector<float> out(expected.size(), 0.0f);
  Launch launch;
  launch.grid = kBlocks, launch.cluster = kCluster, launch.threads = kThreads;
  launch.shared_bytes = kThreads * 4;
  launch.name = "cluster_gather";
  return judge(launch, cluster_gather<kFault>, Gather{x.data(), out.data(), kRounds}, out,
               expected);
}

// ---- swap: two blocks read each other's numbers through pointers they hold ----------------------

struct Swap {
  const float* x;  // (2, threads)
  float* out;      // (2, threads)
};

template <Fault kFault>
HFF_KERNEL(64)
void swap(HFF_PARAM(Swap) p) {
  float& mine = reinterpret_cast<float*>(arena())[thread()];
  mine = p.x[block() * threads() + thread()];
  cluster_arrive();
  cluster_wait();
  const float* other = peer(&mine, 1 - cluster_rank());
  cluster_arrive();
  cluster_wait();
  p.out[block() * threads() + thread()] = *other;
  if (kFault == Fault::kEndsWhileRead) return;
  cluster_arrive();
  cluster_wait();
}

template <Fault kFault>
std::string run_swap() {
  constexpr int kThreads = 64;
  static const std::vector<float> x = scattered(2 * kThreads, 7);
  std::vector<float> out(x.size(), 0.0f), expected = x;
  std::rotate(expected.begin(), expected.begin() + kThreads, expected.end());
  Launch launch;
  launch.grid = launch.cluster = 2, launch.threads = kThreads;
  launch.shared_bytes = kThreads * 4;
  launch.name = "swap";
  return judge(launch, swap<kFault>, Swap{x.data(), out.data()}, out, expected);
}

}  // namespace

const std::vector<PortCase>& block_cases() {
  static const std::vector<PortCase> cases = {
      {"block_sum", nullptr, run_block_sum<Fault::kNone>},
      {"block_sum, no barrier before the slots are read", kOtherBits,
       run_block_sum<Fault::kNoBarrier>},
      {"block_sum, no barrier before the slots are written again", kOtherBits,
       run_block_sum<Fault::kNoSecondBarrier>},
      {"block_sum, a lane stays away from warp_xor", "lanes of its warp are at warp_",
       run_block_sum<Fault::kPartOfWarp>},
      {"block_sum, lanes at two collectives", "of its warp are at",
       run_block_sum<Fault::kTwoCollectives>},
      {"block_sum, a thread ends while others wait", "wait for this one at|have ended",
       run_block_sum<Fault::kEndsEarly>},
      {"block_sum, a warp ends while others wait",
       "threads wait for this one at sync_block|threads of the block have ended",
       run_block_sum<Fault::kWarpEndsEarly>},
      {"block_sum, a warp ends before others wait",
       "threads wait for this one at sync_block|threads of the block have ended",
       run_block_sum<Fault::kWarpEndsFirst>},
      {"block_sum, a thread traps", "block 1 thread 77: trap: told to",
       run_block_sum<Fault::kTraps>},
      {"pairs", nullptr, run_pairs<Fault::kNone>},
      {"pairs, two counts at one barrier",
       "is one of 128 threads here and of 64 elsewhere"
       "|is one of 64 threads here and of 128 elsewhere",
       run_pairs<Fault::kCount>},
      {"pairs, a warp ends and is missed", "deadlock", run_pairs<Fault::kWarpMissing>},
      {"pairs, halves of warps at two barriers", "of warp|deadlock", run_pairs<Fault::kWarpSplit>},
      {"cluster_gather", nullptr, run_cluster_gather<Fault::kNone>},
      {"cluster_gather of 3", nullptr, run_cluster_gather<Fault::kNone, 3>},
      {"cluster_gather of 1", nullptr, run_cluster_gather<Fault::kNone, 1>},
      {"cluster_gather, pairwise tree in place", kOtherBits, run_cluster_gather<Fault::kTree>},
      {"cluster_gather, slots written before all have read", kOtherBits,
       run_cluster_gather<Fault::kNoSecondBarrier>},
      {"cluster_gather, one block skips a barrier", "wait for this one|have ended|has ended",
       run_cluster_gather<Fault::kSkipsBarrier>},
      {"cluster_gather, arrives twice", "not waited since",
       run_cluster_gather<Fault::kArrivesTwice>},
      {"cluster_gather, waits without arriving", "has not arrived before",
       run_cluster_gather<Fault::kWaitsOnly>},
      {"cluster_gather, a block ends before its slots are read", "has ended",
       run_cluster_gather<Fault::kLeaves>},
      {"cluster_gather, peer before the first barrier", "may not have begun",
       run_cluster_gather<Fault::kPeerTooSoon>},
      {"cluster_gather, peer of global memory", "not in this block's shared memory",
       run_cluster_gather<Fault::kPeerOfGlobal>},
      {"cluster_gather, a rank too many", "there is no rank 4",
       run_cluster_gather<Fault::kNoSuchRank>},
      {"swap", nullptr, run_swap<Fault::kNone>},
      {"swap, a block ends while its numbers are read", kOtherBits,
       run_swap<Fault::kEndsWhileRead>},
  };
  return cases;
}

}  // namespace hff_test

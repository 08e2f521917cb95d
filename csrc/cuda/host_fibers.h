// Runs the grid of a kernel on the calling thread, one fiber per thread of the grid, under a seeded
// scheduler that looks for what a GPU does rarely. The same seed gives the same run. Plain loads
// and stores are not seen: between two primitives a thread runs undisturbed. A race therefore shows
// as a result that depends on the seed. Hardware that reorders memory is not emulated.
//
// - Primitives of port.h are switch points. The scheduler draws who goes on: anybody; one block as
//   far as it gets; everybody but one thread, warp or block; the lowest or the highest first.
// - Blocks that need not be resident together run in random order, one to four clusters at a time.
// - A copy arrives in pieces, at a random time or as late as waiting allows, and reads its source
//   when it is issued or when it arrives. Until then its destination is poisoned.
// - Shared memory starts poisoned and is poisoned again when its block ends: mostly NaN in every
//   type, else large numbers, because max(NaN, x) hides a NaN.
// - Misuse ends the launch with a report: alignment, sizes and bounds of copies; bytes that a
//   barrier expects and gets; arrivals beyond a count; barriers that are not initialised or not
//   fenced; warps that part at a collective; threads that leave while others wait for them; shared
//   memory of a block that has ended or not begun. When nobody can run and no copy is in flight,
//   the report says who waits for what.
// - Launches never overlap, also those that may. Every thread of one that may must call
//   dependencies_wait before it ends, and before a primitive reads or writes global memory; only
//   copies to shared memory, of what no launch writes, may be under way by then.
//
// After a report the fibers are abandoned: destructors of a kernel's locals do not run. A loop that
// calls no primitive is not interrupted.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/launch.h"

namespace hff {
namespace fibers {

struct Options {
  uint64_t seed =
      1;  // changes with every launch, so that launches in a row differ; a report names it
  port::Device device = {900, 8, 232448, 233472, "host fibers"};
  bool whole_team = false;           // as many warps as on a device; else a few that do the same
  bool late_copies = false;          // copies are delivered only when nobody can run
  bool poison = true;                // false: shared memory starts as zeros
  uint64_t most_turns = 1ull << 28;  // after which the launch counts as one that does not end
};
Options& options();  // of the next launch of this thread

// What the last launch of this thread found, several lines; "" if nothing. The first line is in
// hff_last_error(). Switches: how often the scheduler changed fibers.
const char* report();
uint64_t switches();

// Calls invoke(kernel, params) as every thread of the grid. False, and a report, if something is
// wrong.
struct Entry {
  void (*invoke)(const void* kernel, const void* params);
  const void* kernel;
  const void* params;
};
bool run(const port::Launch& launch, const Entry& entry);
int max_active_clusters(const port::Launch& launch);

// ---- primitives, on a fiber; port_host.h gives them their names in kernels ----------------------

struct Identity {
  int thread, threads, block, blocks, cluster_rank, cluster_size;
  char* arena;
};
// Of the running fiber. Not initial-exec, which is faster: the loader keeps less than 2 KB for
// libraries that come later with such variables, and refuses this one where they are taken.
extern __thread const Identity* self __attribute__((visibility("hidden")));

[[noreturn]] void trap(const char* what);
void sync(int id, int count);  // barrier 0: the block
void sync_warp();
uint64_t warp_exchange(bool by_mask, int argument, uint64_t bits, int bytes);
void cluster_arrive();
void cluster_wait();
const void* peer(const void* shared, int rank);
void barrier_init(uint64_t* barrier, int arrivals);
void barrier_init_fence();
void barrier_expect(uint64_t* barrier, uint32_t bytes);
void barrier_arrive(uint64_t* barrier);
void barrier_wait(uint64_t* barrier, uint32_t parity);
void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier);
void copy16(void* shared, const void* global);
void copies_commit();
void copies_wait(int pending);
uint32_t load_acquire(const uint32_t* p);
uint32_t add_acq_rel(uint32_t* p, uint32_t addend);
void store_relaxed(uint32_t* p, uint32_t value);
void wait_for(const uint32_t* counter, uint32_t target);
void dependencies_wait();
void switch_point();
// Aligned to 16 bytes or to its size; in shared memory, of a live block and with no copy under way.
void check_access(const void* p, size_t bytes, const char* primitive);

}  // namespace fibers
}  // namespace hff

// A warp's ring of weight pieces in shared memory, and the walk that keeps it full.
//
// Addresses of weights depend on no data, so a warp asks for pieces ahead of the barriers that its
// inputs wait for: the next rows, the next matrix, the next layer. While a grid-wide wait of 2 us
// lasts, memory goes on filling rings: 192 KB an SM are 5 us of an H200's 4.3 TB/s.
// Each warp has a ring of its own and one lane is its producer: no warp waits for another, and no
// warp is spent on copying. A slot is free again after sync_warp().
// BulkRing (sm_90 and up): one bulk copy a piece, completion counted in bytes by an mbarrier a
// slot. AsyncRing (sm_80): 16 bytes a lane and cp.async, one commit group a piece, so that the
// oldest is there when at most kSlots - 1 are pending.
#pragma once

#include "cuda/program.h"

namespace hff {
namespace cuda {

struct BulkRing {
  static constexpr bool kBulk = true;
  char* slots;
  port::Barrier* full;  // (count)
  int bytes, count;
  int put, got;
  uint32_t parity;

  HFF_DEVICE void init(char* arena, const Layout& layout, int warp) {
    bytes = layout.slot_bytes;
    count = layout.slots;
    slots = arena + layout.ring + warp * count * bytes;
    full = reinterpret_cast<port::Barrier*>(arena + layout.barriers) + warp * count;
    put = got = 0;
    parity = 0;
    if (port::lane() == 0) {
      for (int i = 0; i < count; ++i) port::barrier_init(full + i, 1);
      port::barrier_init_fence();
    }
    port::sync_warp();
  }
  HFF_DEVICE int capacity() const { return count; }
  HFF_DEVICE void fetch(const char* from, int n) {
    if (port::lane() == 0) {
      port::barrier_expect(full + put, static_cast<uint32_t>(n));
      port::bulk_copy(slots + put * bytes, from, static_cast<uint32_t>(n), full + put);
    }
    put = put + 1 == count ? 0 : put + 1;
  }
  HFF_DEVICE void skip() {}
  HFF_DEVICE const char* front() {
    port::barrier_wait(full + got, parity);
    return slots + got * bytes;
  }
  HFF_DEVICE void pop() {
    port::sync_warp();
    if (++got == count) {
      got = 0;
      parity ^= 1;
    }
  }
};

struct AsyncRing {
  static constexpr bool kBulk = false;
  static constexpr int kSlots = 6;  // 8 warps x 6 x 1.5 KB = 72 KB, what sm_86 has room for
  char* slots;
  int bytes;
  int put, got;

  HFF_DEVICE void init(char* arena, const Layout& layout, int warp) {
    bytes = layout.slot_bytes;
    slots = arena + layout.ring + warp * kSlots * bytes;
    put = got = 0;
  }
  HFF_DEVICE int capacity() const { return kSlots; }
  HFF_DEVICE void fetch(const char* from, int n) {
    for (int i = 16 * port::lane(); i < n; i += 16 * 32)
      port::copy16(slots + put * bytes + i, from + i);
    port::copies_commit();
    put = put + 1 == kSlots ? 0 : put + 1;
  }
  HFF_DEVICE void skip() { port::copies_commit(); }  // groups are counted, empty ones too
  HFF_DEVICE const char* front() {
    port::copies_wait<kSlots - 1>();
    port::sync_warp();  // every lane's own part has arrived
    return slots + got * bytes;
  }
  HFF_DEVICE void pop() {
    port::sync_warp();
    got = got + 1 == kSlots ? 0 : got + 1;
  }
};

// The pieces that warp `warp` of `warps` meets: units warp, warp + warps, ... of every span in
// turn. Program: bool span(int index, Span&), false past the end; spans may be empty.
template <class Program>
struct Walk {
  Program program;
  Span span;
  Unit unit;
  int index, warp, warps;

  HFF_HOST_DEVICE void start(const Program& p, int first_warp, int warp_count) {
    program = p;
    warp = first_warp;
    warps = warp_count;
    index = -1;
    span.count = unit.row = 0;
  }
  // The next piece and its bytes; false at the end.
  HFF_HOST_DEVICE bool next(const char** from, int* bytes) {
    while (unit.row >= span.count) {
      if (!program.span(index + 1, span)) return false;
      ++index;
      unit.row = 0;
      if (span.count > 0) unit.start(warp, warps, span.pieces);
    }
    *from = span.weight + unit.row * span.stride + static_cast<int64_t>(unit.piece) * span.piece;
    *bytes = unit.piece + 1 == span.pieces ? span.last : span.piece;
    unit.advance(span.pieces);
    return true;
  }
};

// A ring fed by a walk.
template <class Ring, class Program>
struct Stream {
  Ring ring;
  Walk<Program> walk;

  HFF_DEVICE void start(const Program& program, char* arena, const Layout& layout, int warp,
                        int warps) {
    ring.init(arena, layout, warp);
    walk.start(program, warp, warps);
    for (int i = 0; i < ring.capacity(); ++i) fetch();
  }
  HFF_DEVICE void fetch() {
    const char* from;
    int bytes;
    if (walk.next(&from, &bytes))
      ring.fetch(from, bytes);
    else
      ring.skip();
  }
  HFF_DEVICE const char* front() { return ring.front(); }
  HFF_DEVICE void pop() {
    ring.pop();
    fetch();
  }
};

}  // namespace cuda
}  // namespace hff

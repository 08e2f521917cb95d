// Blocks of the tiled and flash attention kernels by hardware, head size and length: the one table.
// `hf-fusion bench attention --tune` measures it again, and says where another row would win.
#pragma once

#include <cstdint>

#include "checked.h"

namespace hff {

enum class Hardware { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmx, kGpu, kCount };

struct AttendBlocks {
  int64_t queries, keys;
};

// The first row holds that has the hardware, or kCount for any, and bounds no smaller than the
// call.
struct AttendRow {
  int32_t kernel;
  Hardware hardware;
  int64_t head_dim, keys;  // bounds
  AttendBlocks blocks;
};
constexpr int64_t kAnyLength = INT64_MAX;

constexpr AttendRow kAttendTable[] = {
    // GPU, both kernels: a lane has one key of a tile and four rows, so four multiply-adds share a
    // read of the key; at head size 256 rows and tile take 51 KB, of the 64 KB of an AMD LDS.
    {HFF_ATTEND_TILED, Hardware::kGpu, HFF_MAX_HEAD_DIM, kAnyLength, {16, 32}},
    {HFF_ATTEND_FLASH, Hardware::kGpu, HFF_MAX_HEAD_DIM, kAnyLength, {16, 32}},
    // Tiled: the scores of a block of queries, 4 bytes each, are to stay in half of a 1 MB L2. On a
    // 2-core Zen 5 VM, one head of 64 at 2,048 keys in fp32, minima: 7.2 ms so, 7.9 with 128
    // queries, 27 with 16, whose packing outweighs their products.
    {HFF_ATTEND_TILED, Hardware::kCount, HFF_MAX_HEAD_DIM, 1024, {128, 128}},
    {HFF_ATTEND_TILED, Hardware::kCount, HFF_MAX_HEAD_DIM, 4096, {64, 256}},
    {HFF_ATTEND_TILED, Hardware::kCount, HFF_MAX_HEAD_DIM, kAnyLength, {32, 256}},
    // Flash: a block packs its keys and values again, so more queries a block; up to 1,024 of them,
    // fewer, so that two threads share a head. Their q and context, 8 bytes an element, and 256
    // keys and values take 256 KB of L2 at head size 64, 512 KB at 128. On the same VM, one head at
    // 2,048 keys, minima: fp32 at head size 64 5.9 ms so, 6.5 with 128 x 128; bf16 at 128 6.6 and
    // 10.5.
    {HFF_ATTEND_FLASH, Hardware::kCount, 128, 1024, {128, 256}},
    {HFF_ATTEND_FLASH, Hardware::kCount, 128, kAnyLength, {256, 256}},
    {HFF_ATTEND_FLASH, Hardware::kCount, HFF_MAX_HEAD_DIM, kAnyLength, {128, 128}},
};

HFF_ALWAYS_INLINE constexpr AttendBlocks attend_blocks(int32_t kernel, Hardware hardware,
                                                       int64_t head_dim, int64_t keys) {
  for (const AttendRow& row : kAttendTable) {
    if (row.kernel == kernel && (row.hardware == hardware || row.hardware == Hardware::kCount) &&
        head_dim <= row.head_dim && keys <= row.keys)
      return row.blocks;
  }
  return {0, 0};
}

}  // namespace hff

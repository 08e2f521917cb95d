// AMX tiles of bf16, and the product of 32 rows by a panel on them.
//   C (32, 32) += A (32, 32 k) B (32 k, 32): two tiles of A, two of B (its rows are pairs of k, see
//   pack-inl.h), four of C; 2 KB of A and 2 KB of B are loaded for 32 K multiply-adds.
// Bound: tile loads where operands come from L2 (0.7 of the products' peak), products from L1. All
//   four loads go first: 1.15 times as fast as a load before its first product on Sapphire Rapids.
// Rows of A past the last one are read (operand_rows makes room for them) and their sums ignored.
// Split operands: high high + high low + low high; what is left out is below 2^-17 of the product.
// State: the tile configuration belongs to the thread. TileScope puts back what it found.
// HFF_TILES_EMULATED: the same instructions in plain code, for machines without AMX; tests only.

#if defined(HFF_TILES)
namespace hff {
namespace HFF_ISA {

struct alignas(64) TileConfig {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "the layout ldtilecfg reads");

#if defined(HFF_TILES_EMULATED)
struct TileState {
  float c[8][16][16];
};
static thread_local TileState t_tiles;

struct TileScope {
  TileScope() {}
};
template <int I>
HFF_INLINE void tile_zero() {
  std::memset(t_tiles.c[I], 0, sizeof(t_tiles.c[I]));
}
template <int I>
HFF_INLINE void tile_load(const bf16* p, int64_t stride_bytes) {
  for (int r = 0; r < 16; ++r)
    std::memcpy(t_tiles.c[I][r], reinterpret_cast<const char*>(p) + r * stride_bytes, 64);
}
template <int C, int A, int B>
HFF_INLINE void tile_dot() {
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 16; ++n) {
        const uint32_t a = float_to_bits(t_tiles.c[A][m][k]), b = float_to_bits(t_tiles.c[B][k][n]);
        float& sum = t_tiles.c[C][m][n];
        sum += bits_to_float(a << 16) * bits_to_float(b << 16);
        sum += bits_to_float(a & 0xffff0000) * bits_to_float(b & 0xffff0000);
      }
    }
  }
}
template <int I>
HFF_INLINE void tile_store(float* p, int64_t stride_bytes) {
  for (int r = 0; r < 16; ++r)
    std::memcpy(reinterpret_cast<char*>(p) + r * stride_bytes, t_tiles.c[I][r], 64);
}
#else
// Configures the eight tiles as 16 rows of 64 bytes for its lifetime. In asm, since GCC's
// intrinsics name 8 of the 64 bytes as read: it then drops the stores to the others.
struct TileScope {
  TileConfig found;
  TileScope() {
    asm volatile("sttilecfg %0" : "=m"(found));
    TileConfig ours;
    ours.palette = 1;
    for (int i = 0; i < 8; ++i) {
      ours.row_bytes[i] = 64;
      ours.rows[i] = 16;
    }
    configure(ours);
  }
  ~TileScope() {
    if (found.palette == 0) {
      _tile_release();
    } else {
      configure(found);
    }
  }
  HFF_INLINE void configure(const TileConfig& config) {
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  TileScope(const TileScope&) = delete;
};
// The intrinsics take their tiles as literals.
#define HFF_TILE(i) if constexpr (I == i)
template <int I>
HFF_INLINE void tile_zero() {
  HFF_TILE(0) _tile_zero(0);
  HFF_TILE(1) _tile_zero(1);
  HFF_TILE(2) _tile_zero(2);
  HFF_TILE(3) _tile_zero(3);
}
template <int I>
HFF_INLINE void tile_load(const bf16* p, int64_t stride_bytes) {
  HFF_TILE(4) _tile_loadd(4, p, stride_bytes);
  HFF_TILE(5) _tile_loadd(5, p, stride_bytes);
  HFF_TILE(6) _tile_loadd(6, p, stride_bytes);
  HFF_TILE(7) _tile_loadd(7, p, stride_bytes);
}
template <int I, int A, int B>
HFF_INLINE void tile_dot() {
  static_assert(A == 4 + I / 2 && B == 6 + I % 2, "tiles are fixed: see multiply_tiles");
  HFF_TILE(0) _tile_dpbf16ps(0, 4, 6);
  HFF_TILE(1) _tile_dpbf16ps(1, 4, 7);
  HFF_TILE(2) _tile_dpbf16ps(2, 5, 6);
  HFF_TILE(3) _tile_dpbf16ps(3, 5, 7);
}
template <int I>
HFF_INLINE void tile_store(float* p, int64_t stride_bytes) {
  HFF_TILE(0) _tile_stored(0, p, stride_bytes);
  HFF_TILE(1) _tile_stored(1, p, stride_bytes);
  HFF_TILE(2) _tile_stored(2, p, stride_bytes);
  HFF_TILE(3) _tile_stored(3, p, stride_bytes);
}
#undef HFF_TILE
#endif

// Loads a step of k of A (32 rows, or 16), and of a panel.
template <bool kTwo>
HFF_INLINE void load_a(const bf16* a, int64_t stride) {
  const int64_t stride_bytes = stride * static_cast<int64_t>(sizeof(bf16));
  tile_load<4>(a, stride_bytes);
  if constexpr (kTwo) tile_load<5>(a + 16 * stride, stride_bytes);
}
HFF_INLINE void load_b(const bf16* panel) {
  constexpr int64_t kPairBytes = kPanel * 2 * sizeof(bf16);
  tile_load<6>(panel, kPairBytes);
  tile_load<7>(panel + 2 * kLanes, kPairBytes);
}
// Tiles 0 .. 3 += what is loaded.
template <bool kTwo>
HFF_INLINE void add_dots() {
  tile_dot<0, 4, 6>();
  tile_dot<1, 4, 7>();
  if constexpr (kTwo) {
    tile_dot<2, 5, 6>();
    tile_dot<3, 5, 7>();
  }
}

// c[32][kPanel] = a (32 rows, or 16) times one panel; calls beside(k) with the loads of each step.
template <class P, bool kTwo, class Beside>
static void multiply_tiles(const bf16* a, int64_t stride, const bf16* panel, int64_t cols, float* c,
                           Beside beside) {
  asm volatile("" : : : "memory");  // GCC's tile loads do not say what they read
  tile_zero<0>();
  tile_zero<1>();
  if constexpr (kTwo) {
    tile_zero<2>();
    tile_zero<3>();
  }
  for (int64_t k = 0; k < P::padded(cols); k += kTileDepth) {
    const bf16 *high = a + P::kParts * k, *weights = panel + P::kParts * k * kPanel;
    load_a<kTwo>(high, stride);
    if constexpr (P::kParts == 2) {
      load_b(weights + kTileDepth * kPanel);
      add_dots<kTwo>();
    }
    load_b(weights);
    beside(k);
    add_dots<kTwo>();
    if constexpr (P::kParts == 2) {
      load_a<kTwo>(high + kTileDepth, stride);
      add_dots<kTwo>();
    }
  }
  constexpr int64_t kRowBytes = kPanel * sizeof(float);
  tile_store<0>(c, kRowBytes);
  tile_store<1>(c + 16, kRowBytes);
  if constexpr (kTwo) {
    tile_store<2>(c + 16 * kPanel, kRowBytes);
    tile_store<3>(c + 16 * kPanel + 16, kRowBytes);
  }
}

// Whether the tiles of this CPU compute what they should.
static bool tiles_work() {
  const TileScope scope;
  bf16 a[32 * kTileDepth], panel[kTileDepth * kPanel];
  float c[32 * kPanel];
  for (int i = 0; i < 32 * kTileDepth; ++i) from_float(static_cast<float>(i % 7 - 3), a + i);
  for (int i = 0; i < kTileDepth * kPanel; ++i)
    from_float(static_cast<float>(i % 5 - 2), panel + i);
  multiply_tiles<Pairs, true>(a, kTileDepth, panel, kTileDepth, c, [](int64_t) {});
  for (int r = 0; r < 32; ++r) {
    for (int j = 0; j < kPanel; ++j) {
      float want = 0.0f;
      for (int k = 0; k < kTileDepth; ++k)
        want += to_float(a[r * kTileDepth + k]) * to_float(panel[(k / 2 * kPanel + j) * 2 + k % 2]);
      if (c[r * kPanel + j] != want) return false;
    }
  }
  return true;
}

}  // namespace HFF_ISA
}  // namespace hff
#else
namespace hff {
namespace HFF_ISA {
struct TileScope {  // nothing to configure
  TileScope() {}
};
}  // namespace HFF_ISA
}  // namespace hff
#endif

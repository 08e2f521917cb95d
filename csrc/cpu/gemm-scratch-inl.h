// Scratch of a call of many rows (gemm-block-inl.h), and how its layers are cut so that it is
// small.
//   per row: hidden in fp32 and as an operand; then q, k, v and context of a slice of heads, or a
//     slice of the MLP's width, whichever is larger
//   per thread: a tile's rows and a product's panels, or attention's blocks
// A model's pass keeps the operand in its result, where that can hold it.

namespace hff {
namespace HFF_ISA {

HFF_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// How often a layer's heads, and its MLP's width, are cut.
constexpr int64_t kMostSlices = 3;
struct Slices {
  int64_t heads = 1, mlp = 1;

  // A slice has whole panels and steps of k, and four panels or more to share.
  HFF_INLINE int64_t most(int64_t count, int64_t depth, int64_t rows) {
    for (int64_t n = kMostSlices; n > 1; --n) {
      if (count % n == 0 && count / n * depth % kTileDepth == 0 && count / n * rows >= 4 * kPanel)
        return n;
    }
    return 1;
  }
  template <class P>
  static Slices of(const hff_block& b, int32_t stage) {
    Slices s;
    if (stage != HFF_STAGE_FULL) return s;
    const hff_heads& h = b.heads;
    s.heads = most(h.kv_heads, h.head_dim, (h.heads / h.kv_heads + 2) * h.head_dim);
    if (b.mlp_width % kTileDepth == 0)
      s.mlp = most(b.mlp_width / kTileDepth, kTileDepth, kTileDepth);
    return s;
  }
};

// Of attention in a layer: 256 keys of 64 in 16 bits (197 are a ViT's patches), 64 in fp32, whose
// scratch counts.
template <class P>
HFF_INLINE AttendBlocks layer_blocks(int64_t dim) {
  const int64_t keys = sizeof(typename P::Element) == 2 ? 256 * 64 / dim / kPanel * kPanel : 64;
  return {128, keys > 256 ? 256 : keys < 64 ? 64 : keys};
}

// Scratch of a call of many rows. A second carving over the same sizes hands out the same pieces.
template <class T, class P>
struct GemmScratch {
  // of q k^T and of weights by v: fp32 is multiplied as fp32 whatever the precision of products
  using Exact = typename std::conditional<std::is_same<T, float>::value, Plain<float>, P>::type;
  using Flash = FlashAttend<T, Exact>;
  enum { kQkv = 0, kKey, kValue, kAppend, kAttend, kO, kUp, kDown, kPhases };

  float* x;             // (rows, hidden)
  Operands<P> normed;   // (rows, hidden): input of qkv, and of up but in a parallel layer
  Operands<P> second;   // (rows, hidden): input of up in a parallel layer
  T* qkv;               // (rows, qkv rows of a slice)
  Operands<P> context;  // (rows, a slice's heads * head_dim)
  Operands<P> act;      // (rows, a slice of mlp_width), over qkv and context
  Counter* counters;    // (layers, kMostSlices, kPhases, threads), then (threads) for the head
  char* own;            // (threads, own_room): panels, a normed row, or the scratch of attention
  int64_t own_room;

  template <class Element>
  Element* own_of(int thread) const {
    return reinterpret_cast<Element*>(own + thread * own_room);
  }

  // lent: (rows, hidden) that lie as operands, free until the last layer has ended; or null.
  void carve(Arena* arena, const hff_call& call, const hff_block* blocks, int64_t count,
             int64_t hidden, int64_t row_count, int32_t stage, T* lent) {
    int64_t qkv_width = 1, context_width = 1, mlp_width = 1, flash_room = 0, cols = hidden;
    bool parallel = false;
    for (int64_t l = 0; l < count; ++l) {
      const hff_block& b = blocks[l];
      const Slices slices = Slices::of<P>(b, stage);
      const int64_t heads = b.heads.heads / slices.heads,
                    kv_heads = b.heads.kv_heads / slices.heads;
      qkv_width = larger(qkv_width, (heads + 2 * kv_heads) * b.heads.head_dim);
      context_width = larger(context_width, heads * b.heads.head_dim);
      mlp_width = larger(mlp_width, b.mlp_width / slices.mlp);
      Arena flash(nullptr);
      flash_of(&flash, b.heads.head_dim);
      flash_room = larger(flash_room, flash.used().value());
      parallel |= b.residual == HFF_RESIDUAL_PARALLEL;
    }
    cols = larger(larger(cols, context_width), mlp_width);
    const Size rows = Size(row_count), threads = call.threads;
    constexpr int64_t kStored = static_cast<int64_t>(sizeof(typename P::Stored));
    const auto bytes_of = [&](int64_t stride) {
      return operand_rows<P>(row_count) * Size(stride) * Size(kStored);
    };
    const auto take = [&](int64_t width, bool wanted) {
      const int64_t stride = operand_stride<P>(width);
      char* data = arena->take<char>(wanted ? bytes_of(stride) : Size(0));
      return Operands<P>{reinterpret_cast<typename P::Stored*>(data), stride};
    };
    x = arena->take<float>(rows * Size(hidden));
    normed = take(hidden, lent == nullptr);
    if (lent != nullptr) normed = {reinterpret_cast<typename P::Stored*>(lent), hidden};
    second = take(hidden, parallel);
    context.stride = operand_stride<P>(context_width);
    act.stride = operand_stride<P>(mlp_width);
    const Size projected = padded(rows * Size(qkv_width) * Size(int64_t{sizeof(T)}));
    const Size attending = projected + bytes_of(context.stride), between = bytes_of(act.stride);
    const bool act_larger = attending.ok() && !between.fits(attending.value());
    char* shared = arena->take<char>(act_larger ? between : attending);
    counters = arena->take<Counter>(counter_count(count, call.threads));
    const int64_t panels = unit_room<P>(cols) * int64_t{sizeof(typename P::Element)};
    own_room = larger(larger(panels, pad_lanes(hidden) * 4), flash_room);
    own_room = (own_room + 63) / 64 * 64;
    own = arena->take<char>(threads * Size(own_room));
    if (x == nullptr) return;
    qkv = reinterpret_cast<T*>(shared);
    context.data = reinterpret_cast<typename P::Stored*>(shared + projected.value());
    act.data = reinterpret_cast<typename P::Stored*>(shared);
    const int64_t counted = counter_count(count, call.threads).value();
    for (int64_t i = 0; i < counted; ++i) new (counters + i) Counter;
  }
  static Flash flash_of(Arena* arena, int64_t dim) {
    hff_attend_io io = {};
    io.head_dim = dim;
    Flash flash;
    flash.carve(arena, io, layer_blocks<Exact>(dim));
    return flash;
  }
  static Size counter_count(int64_t layers, int32_t threads) {
    return (Size(layers) * Size(kMostSlices * kPhases) + Size(1)) * Size(threads);
  }
  Counter* layer_counters(int64_t layer, int32_t threads) const {
    return counters + layer * kMostSlices * kPhases * threads;
  }
};

}  // namespace HFF_ISA
}  // namespace hff

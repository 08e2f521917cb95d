#include "cuda/plan.h"

#include <algorithm>
#include <cstring>

namespace hff {
namespace cuda {
namespace {

constexpr int kElement = 2;             // bytes of fp16 and bf16
constexpr int kLeastSums = 1024;        // sums of pieces held at once, where nothing asks for more
constexpr int kMostSlots = 16;          // of a warp
constexpr int64_t kMostRows = 1 << 30;  // rows and columns are 32-bit numbers in kernels

#define HFF_SUPPORTED(condition, ...)                                   \
  do {                                                                  \
    if (!(condition)) return ::hff::fail(HFF_UNSUPPORTED, __VA_ARGS__); \
  } while (0)

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

Norm norm_of(const hff_norm& n) {
  return {n.weight.data, n.bias.data, n.eps, n.kind == HFF_NORM_RMS};
}

hff_status rows_of(const hff_linear& l, int slot_bytes, const char* name, Rows* rows) {
  HFF_SUPPORTED(l.rows < kMostRows && l.cols < kMostRows, "%s is (%lld, %lld)", name, shown(l.rows),
                shown(l.cols));
  HFF_SUPPORTED(l.cols % 8 == 0 && l.row_stride % 8 == 0 && aligned(l.weight.data),
                "%s has rows of %lld elements, %lld apart: CUDA kernels read 16 aligned bytes",
                name, shown(l.cols), shown(l.row_stride));
  const int cols = static_cast<int>(l.cols), most = slot_bytes / kElement;
  const int pieces = (cols + most - 1) / most, piece = ((cols + pieces - 1) / pieces + 7) / 8 * 8;
  *rows = {l.weight.data, l.bias.data,
           l.row_stride,  static_cast<int32_t>(l.rows),
           cols,          (cols + piece - 1) / piece,
           piece};
  return HFF_OK;
}

}  // namespace

hff_status shape_of(const hff_call& call, const hff_block& block, Shape* shape) {
  const hff_heads& h = block.heads;
  HFF_SUPPORTED(call.dtype != HFF_F32, "CUDA kernels take fp16 and bf16, the call is fp32");
  HFF_SUPPORTED(call.starts.data == nullptr && call.queries == 1,
                "CUDA kernels take one query a sequence, the call has %lld", shown(call.queries));
  HFF_SUPPORTED(call.batch <= kMaxBatch, "CUDA kernels take batches up to %d, the call has %lld",
                kMaxBatch, shown(call.batch));
  HFF_SUPPORTED(h.head_dim % 8 == 0 && h.heads <= 256,
                "CUDA kernels take up to 256 heads of a multiple of 8, these are %lld of %lld",
                shown(h.heads), shown(h.head_dim));
  HFF_SUPPORTED(block.residual != HFF_RESIDUAL_POST_NORM, "CUDA kernels have no post-norm layers");
  HFF_SUPPORTED(block.hidden < kMostRows && block.mlp_width < kMostRows,
                "hidden is %lld, mlp_width %lld", shown(block.hidden), shown(block.mlp_width));
  shape->hidden = static_cast<int32_t>(block.hidden);
  shape->heads = static_cast<int32_t>(h.heads);
  shape->kv_heads = static_cast<int32_t>(h.kv_heads);
  shape->head_dim = static_cast<int32_t>(h.head_dim);
  shape->rotary_dim = static_cast<int32_t>(h.rotary_dim);
  shape->mlp_width = static_cast<int32_t>(block.mlp_width);
  shape->sequential = block.residual == HFF_RESIDUAL_SEQUENTIAL;
  shape->per_head = h.qkv_layout == HFF_QKV_PER_HEAD;
  shape->activation = block.activation;
  shape->scale = h.scale;
  return HFF_OK;
}

hff_status layer_of(const hff_call& call, const hff_block& block, const hff_cache& cache,
                    const Shape& shape, int slot_bytes, Layer* layer) {
  Shape own;
  HFF_TRY(shape_of(call, block, &own));
  HFF_SUPPORTED(std::memcmp(&own, &shape, sizeof(own)) == 0, "layers differ in shape");
  *layer = {};
  HFF_TRY(rows_of(block.qkv, slot_bytes, "qkv", &layer->qkv));
  if (block.k.weight.data != nullptr) {
    HFF_TRY(rows_of(block.k, slot_bytes, "k", &layer->k));
    HFF_TRY(rows_of(block.v, slot_bytes, "v", &layer->v));
  }
  HFF_TRY(rows_of(block.up, slot_bytes, "up", &layer->up));
  HFF_TRY(rows_of(block.o, slot_bytes, "o", &layer->o));
  HFF_TRY(rows_of(block.down, slot_bytes, "down", &layer->down));
  layer->attention_norm = norm_of(block.attention_norm);
  layer->mlp_norm = norm_of(block.mlp_norm);
  const bool even =
      cache.batch_stride % 8 == 0 && cache.head_stride % 8 == 0 && cache.token_stride % 8 == 0;
  HFF_SUPPORTED(even && aligned(cache.keys.data) && aligned(cache.values.data),
                "cache rows are not 16-byte aligned");
  layer->cache = cache_of(cache);
  return HFF_OK;
}

Cache cache_of(const hff_cache& c) {
  return {c.keys.data,   c.values.data,  c.length,  c.batch_stride,
          c.head_stride, c.token_stride, c.capacity};
}

hff_status head_of(const hff_model& model, int slot_bytes, Rows* head, Norm* norm) {
  *norm = norm_of(model.final_norm);
  *head = {};
  return model.head.weight.data == nullptr ? HFF_OK : rows_of(model.head, slot_bytes, "head", head);
}

namespace {

// How much of slots of `bytes` the rows of a layer fill.
double fill_of(const Shape& shape, int bytes) {
  const int64_t rows[4][2] = {{shape.qkv(), shape.hidden},
                              {shape.mlp_width, shape.hidden},
                              {shape.hidden, shape.mlp_width},
                              {shape.hidden, shape.context()}};
  double read = 0.0, held = 0.0;
  for (const auto& r : rows) {
    const int64_t row = r[1] * kElement, pieces = (row + bytes - 1) / bytes;
    read += static_cast<double>(r[0] * row);
    held += static_cast<double>(r[0] * pieces * bytes);
  }
  return read / held;
}

int width_of(const Shape& shape, Use use) {
  const int in = shape.sequential ? shape.hidden : 2 * shape.hidden;
  const int out = std::max(shape.mlp_width, shape.context());
  return use == kEnters ? in : use == kLeaves ? out : std::max(in, out);
}

// The layout with slots of `slot_bytes`.
bool layout_with(const Shape& shape, const Room& room, int batch, Use use, int extra_floats,
                 int slot_bytes, Layout* layout) {
  const int lanes = batch == 1 ? 1 : kMaxBatch;  // batch rows that kernels compute
  const int most = slot_bytes / kElement, warps = room.stream_warps;
  const int pieces = (shape.mlp_width + most - 1) / most + (shape.context() + most - 1) / most + 2;
  const int rows = use == kEnters ? 1 : (shape.hidden + room.blocks - 1) / room.blocks;
  int64_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const int64_t begin = at;
    at = (at + bytes + 127) / 128 * 128;
    return static_cast<int32_t>(begin);
  };
  *layout = {};
  layout->slot_bytes = slot_bytes;
  layout->barriers = take(int64_t{8} * warps * kMostSlots);
  layout->reduce = take(int64_t{8} * warps * kMaxBatch);
  layout->input_stride = width_of(shape, use);
  layout->inputs = take(int64_t{kElement} * lanes * layout->input_stride);
  // x is read before the first sum is written
  layout->sum_count =
      std::max({batch * shape.hidden, rows * pieces * lanes, 2 * warps * lanes, kLeastSums});
  layout->x = layout->sums = take(int64_t{4} * layout->sum_count);
  const int attend_warps = room.attend_warps > 0 ? room.attend_warps : warps;
  const bool attends = use == kWhole || extra_floats > 0;
  const int attend = attends ? attend_floats(shape.head_dim, attend_warps) : 0;
  layout->attend = take(int64_t{4} * (attend + extra_floats));
  const int64_t slots = (room.shared_bytes - at) / (int64_t{warps} * slot_bytes);
  layout->slots = static_cast<int32_t>(std::min<int64_t>(slots, kMostSlots));
  if (!room.bulk) layout->slots = slots >= AsyncRing::kSlots ? AsyncRing::kSlots : 0;
  if (layout->slots < 2) return false;
  layout->ring = take(int64_t{warps} * layout->slots * slot_bytes);
  layout->total = static_cast<int32_t>(at);
  return true;
}

}  // namespace

bool layout_of(const Shape& shape, const Room& room, int batch, Use use, int extra_floats,
               Layout* layout) {
  constexpr double kEnough = 16384.0;  // bytes in flight that half of the memory's rate needs
  constexpr double kOverhead = 64.0;   // bytes of time that a copy takes besides its own
  double best = 0.0;
  for (int bytes = kMostSlot; bytes >= kLeastSlot; bytes -= 128) {
    Layout tried;
    if (!layout_with(shape, room, batch, use, extra_floats, bytes, &tried)) continue;
    const double flight = fill_of(shape, bytes) * room.stream_warps * tried.slots * bytes;
    const double score = flight / (flight + kEnough) * bytes / (bytes + kOverhead);
    if (score > best) {
      best = score;
      *layout = tried;
    }
  }
  return best > 0.0;
}

Rope rope_of(const hff_call& call) {
  return {call.cos.data, call.sin.data, static_cast<const int64_t*>(call.positions.data),
          call.position_batch_stride, call.rope_rows};
}

Mask mask_of(const hff_call& call) {
  return {call.mask.data.data, call.mask.batch_stride, call.mask.key_stride, call.mask.keys,
          call.mask.kind};
}

Source source_of(const hff_model& model, const hff_model_io& io) {
  if (io.ids.data == nullptr) return {nullptr, nullptr, 0, 0, io.x.data};
  return {model.embedding.data, static_cast<const int64_t*>(io.ids.data), io.id_batch_stride,
          model.vocab, nullptr};
}

int splits_of(const Shape& shape, int batch, int blocks) {
  return std::min(std::max(blocks / (batch * shape.heads), 1), kMaxSplits);
}

int cluster_of(const Shape& shape, int sms, int arch) {
  if (arch < 900) return 1;
  int size = 8;
  while (size > 1 && shape.kv_heads * size > sms) size /= 2;
  return size;
}

Scratch scratch_of(const Shape& shape, int batch, int sms, void* workspace, int64_t* bytes) {
  int64_t at = 0;
  const auto take = [&at, workspace](int64_t size) -> void* {
    char* begin = static_cast<char*>(workspace) + at;
    at = (at + size + 255) / 256 * 256;
    return workspace != nullptr ? begin : nullptr;
  };
  const int64_t splits = splits_of(shape, batch, sms);
  const int64_t parts = std::max(int64_t{batch} * shape.heads * splits * (shape.head_dim + 2),
                                 int64_t{shape.kv_heads} * batch * shape.hidden);
  Scratch s;
  s.counters = static_cast<Counters*>(take(sizeof(Counters)));
  s.x = static_cast<float*>(take(int64_t{4} * batch * shape.hidden));
  s.qkv = take(int64_t{kElement} * batch * shape.qkv());
  s.up = take(int64_t{kElement} * batch * shape.mlp_width);
  s.context = take(int64_t{kElement} * batch * shape.context());
  s.parts = static_cast<float*>(take(4 * parts));
  s.best = static_cast<uint64_t*>(take(int64_t{8} * sms * batch));
  *bytes = at;
  return s;
}

}  // namespace cuda
}  // namespace hff

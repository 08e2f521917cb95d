// Row 26: strides past 2^31 and 2^32 elements, over memory that is mapped but not there until it is
// written. The same numbers at small strides give the same bits.
#include <sys/mman.h>

#include <cstdio>

#include "trial.h"

namespace hff_test {
namespace {

// Arrays of any length; only pages that are touched exist.
class Sparse {
 public:
  Sparse() = default;
  Sparse(const Sparse&) = delete;
  Sparse& operator=(const Sparse&) = delete;
  ~Sparse() {
    for (const auto& [data, bytes] : mapped_) munmap(data, bytes);
  }
  Array array(int32_t dtype, int64_t count) {
    const size_t bytes = static_cast<size_t>(count * element_size(dtype));
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) refused = true;
    if (data == MAP_FAILED) return {};
    mapped_.push_back({data, bytes});
    Array array;
    array.dtype = dtype, array.count = count, array.data = static_cast<char*>(data);
    return array;
  }
  bool refused = false;

 private:
  std::vector<std::pair<void*, size_t>> mapped_;
};

int64_t far(Random& random) {
  return random.pick<int64_t>({(1ll << 31) - 1, 1ll << 31, (1ll << 31) + 5, (1ll << 32) + 7});
}

LinearData spread(Sparse& sparse, const LinearData& l, int64_t stride) {
  LinearData out = l;
  out.row_stride = stride;
  out.weight = sparse.array(l.weight.dtype, (l.rows - 1) * stride + l.cols);
  for (int64_t i = 0; !sparse.refused && i < l.rows * l.cols; ++i)
    out.weight.set(i / l.cols * stride + i % l.cols,
                   l.weight.get(i / l.cols * l.row_stride + i % l.cols));
  return out;
}

// One of the three strides is far; the others are as they were.
CacheData spread(Sparse& sparse, const CacheData& c, int which, int64_t stride) {
  CacheData out = c;
  (which == 0 ? out.token_stride : which == 1 ? out.head_stride : out.batch_stride) = stride;
  const int64_t count = out.at(c.batch - 1, c.heads - 1, c.capacity - 1) + c.head_dim;
  out.keys = sparse.array(c.keys.dtype, count), out.values = sparse.array(c.keys.dtype, count);
  for (int64_t b = 0; !sparse.refused && b < c.batch; ++b) {
    for (int64_t head = 0; head < c.heads; ++head) {
      for (int64_t i = 0; i < c.past * c.head_dim; ++i) {
        const int64_t t = i / c.head_dim, d = i % c.head_dim;
        out.keys.set(out.at(b, head, t) + d, c.keys.get(c.at(b, head, t) + d));
        out.values.set(out.at(b, head, t) + d, c.values.get(c.at(b, head, t) + d));
      }
    }
  }
  return out;
}

// Masks and positions by query stride.
CallData spread(Sparse& sparse, const CallData& c, int64_t stride) {
  CallData out = c;
  MaskData& mask = out.mask;
  if (mask.kind != HFF_MASK_NONE) {
    mask.query_stride = stride, mask.batch_stride = c.queries * stride;
    mask.data = sparse.array(c.mask.data.dtype, c.batch * mask.batch_stride);
  }
  if (c.positions) {
    out.position_query_stride = stride, out.position_batch_stride = c.queries * stride;
    out.positions = sparse.array(kInt64, c.batch * out.position_batch_stride);
  }
  for (int64_t b = 0; !sparse.refused && b < c.batch; ++b) {
    for (int64_t i = 0; i < c.queries; ++i) {
      if (c.positions)
        out.positions.set(b * out.position_batch_stride + i * stride,
                          static_cast<double>(c.position(b, i)));
      for (int64_t j = 0; j < mask.keys; ++j)
        mask.data.set(mask.at(b, i, j), c.mask.data.get(c.mask.at(b, i, j)));
    }
  }
  return out;
}

using Bytes = std::vector<char>;

Bytes append(Bytes all, const Array& array) {
  all.insert(all.end(), array.data, array.data + array.bytes());
  return all;
}

// A layer's output, and what was appended; empty where the call fails.
Bytes layer_bits(Arena& arena, const BlockData& b, const CallData& c, const CacheData& cache,
                 const Array& x, int32_t threads) {
  const hff_call call = c.abi(threads, 0, c.batch);
  const hff_cache kv = cache.abi();
  const hff_cache* given = c.cached ? &kv : nullptr;
  const Array out = arena.output(c.dtype, c.rows() * b.hidden);
  if (c.cached) cache.length.set(0, static_cast<double>(c.past));
  const hff_block block = b.abi();
  const hff_block_io io = {sizeof io, x.input(), {}, {}, out.output(), HFF_STAGE_FULL, 0};
  if (hff_block_forward(&call, &block, given, &io) != HFF_OK) return {};
  Bytes all = append({}, out);
  for (int64_t i = 0; c.cached && i < c.batch * cache.heads * c.queries; ++i) {
    const int64_t at =
        cache.at(i / c.queries / cache.heads, i / c.queries % cache.heads, c.past + i % c.queries);
    const int64_t from = at * element_size(c.dtype),
                  to = from + b.heads.head_dim * element_size(c.dtype);
    all.insert(all.end(), cache.keys.data + from, cache.keys.data + to);
    all.insert(all.end(), cache.values.data + from, cache.values.data + to);
  }
  return all;
}

// A layer whose cache, mask and positions are far apart.
std::string layer_trial(Random& random, Sparse& sparse, std::string* shape) {
  Arena arena(&random);
  Design tiny;
  tiny.size = Size::kTiny;
  const int32_t dtype = draw_dtype(random, tiny);
  HeadsData heads = HeadsData::random(random, 16);
  CallData call = draw_call(random, arena, tiny, dtype, heads, false);
  const int64_t hidden = random.range(1, 18);
  const BlockData block = BlockData::random(
      random, arena, dtype, heads, hidden, random.range(1, 20),
      static_cast<int32_t>(random.range(HFF_RESIDUAL_PARALLEL, HFF_RESIDUAL_POST_NORM)),
      HFF_ACT_GELU_ERF, HFF_NORM_LAYER);
  CacheData cache;
  if (call.cached)
    cache = CacheData::random(random, arena, dtype, call.batch, heads, call.past, call.queries);
  const Array x = arena.input(dtype, call.rows() * hidden);
  fill_uniform(random, x, 1.7);
  const Bytes near = layer_bits(arena, block, call, cache, x, 2);

  const int64_t stride = far(random);
  const int which = static_cast<int>(random.range(0, 2));
  if (call.cached) cache = spread(sparse, cache, which, stride);
  call = spread(sparse, call, stride);
  *shape = "block " + describe(call, heads) + " stride " + std::to_string(stride) + " of " +
           std::to_string(which);
  if (sparse.refused) return "";
  const Bytes wide = layer_bits(arena, block, call, cache, x, 1);
  if (near.empty() || wide.empty()) return std::string("refused: ") + hff_last_error();
  return near == wide ? "" : "other bits than at small strides";
}

std::string linear_trial(Random& random, Sparse& sparse, std::string* shape) {
  Arena arena(&random);
  const int32_t dtype = draw_dtype(random, Design{}), precision = draw_precision(random);
  const int64_t rows = random.pick<int64_t>({1, 5, 17, 33}), stride = far(random);
  const LinearData near =
      LinearData::random(random, arena, dtype, random.range(2, 40), random.range(1, 40));
  LinearData wide = spread(sparse, near, stride);
  *shape = std::string("linear ") + dtype_name(dtype) + " rows " + std::to_string(rows) + " W (" +
           std::to_string(near.rows) + ", " + std::to_string(near.cols) + ") precision " +
           std::to_string(precision) + " row_stride " + std::to_string(stride);
  if (sparse.refused) return "";
  const Array x = arena.input(dtype, rows * near.cols);
  fill_uniform(random, x, 1.7);
  const auto bits = [&](const LinearData& l) -> Bytes {
    const Array out = arena.output(dtype, rows * l.rows);
    const hff_linear linear = l.abi();
    const hff_linear_io io = {sizeof io,    dtype,     2,         rows,
                              HFF_ACT_NONE, precision, x.input(), out.output()};
    return hff_linear_forward(&linear, &io) == HFF_OK ? append({}, out) : Bytes{};
  };
  const Bytes expected = bits(near);
  if (expected.empty() || bits(wide) != expected) return "other bits than at small strides";
  wide.pack(arena, precision);
  return bits(wide) == expected ? "" : "other bits from panels of far rows";
}

}  // namespace

bool run_strides(const Options& options, const std::string& isa) {
  Tally tally(options, "strides", "row 26 strides past 2^31 and 2^32", isa);
  if (HFF_TESTS_TSAN) {
    tally.skip("ThreadSanitizer shadows every mapped page");
    return tally.print();
  }
  for (int64_t i = 0; i < options.count(60); ++i) {
    const uint64_t seed = options.seed + static_cast<uint64_t>(i);
    Random random(seed);
    Sparse sparse;
    std::string shape;
    tally.begin(seed, "");
    const std::string failure = random.chance(0.4) ? linear_trial(random, sparse, &shape)
                                                   : layer_trial(random, sparse, &shape);
    tally.describe(shape);
    tally.end(failure);
    if (sparse.refused) {
      tally.skip("the system maps no views of hundreds of GB");
      break;
    }
  }
  return tally.print();
}

}  // namespace hff_test

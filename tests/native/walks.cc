#include "walks.h"

#if defined(HFF_PORT_HOST)

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <map>
#include <utility>
#include <vector>

namespace hff {
namespace cuda {

using hff_test::Random;

std::string text(const char* format, ...) {
  char out[200];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(out, sizeof out, format, arguments);
  va_end(arguments);
  return out;
}

std::vector<const Rows*> entered(const Layer& layer, const Half& half) {
  std::vector<const Rows*> all;
  if (half.attention) all = {&layer.qkv, &layer.k, &layer.v};
  if (half.mlp) all.push_back(&layer.up);
  return all;
}
std::vector<const Rows*> left(const Layer& layer, const Half& half) {
  std::vector<const Rows*> all;
  if (half.mlp) all.push_back(&layer.down);
  if (half.attention) all.push_back(&layer.o);
  return all;
}

namespace {

// How often each piece was read.
using Reads = std::map<std::pair<const void*, int>, std::vector<int>>;  // (matrix, row): pieces

std::string count_piece(const std::vector<const Rows*>& matrices, const char* from, int bytes,
                        int slot_bytes, Reads* reads) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes <= 0 || bytes % 16 != 0)
    return text("%d bytes at %p", bytes, static_cast<const void*>(from));
  if (bytes > slot_bytes) return text("a piece of %d bytes in a slot of %d", bytes, slot_bytes);
  for (const Rows* m : matrices) {
    const int64_t offset = from - static_cast<const char*>(m->weight), stride = m->stride * kSize;
    if (offset < 0 || offset >= m->rows * stride) continue;
    const int64_t row = offset / stride, column = offset % stride / kSize;
    const int64_t piece = column / m->piece;
    if (column % m->piece != 0 || piece >= m->pieces)
      return text("a piece begins at column %lld of %d", static_cast<long long>(column), m->cols);
    const int64_t end = column + bytes / kSize;
    if (end != std::min<int64_t>(column + m->piece, m->cols))
      return text("a piece ends at column %lld of %d", static_cast<long long>(end), m->cols);
    auto& counts = (*reads)[{m->weight, static_cast<int>(row)}];
    counts.resize(static_cast<size_t>(m->pieces));
    ++counts[static_cast<size_t>(piece)];
    return "";
  }
  return text("%p is in no matrix", static_cast<const void*>(from));
}

std::string check_reads(const std::vector<const Rows*>& matrices, const Reads& reads) {
  size_t rows = 0;
  for (const Rows* m : matrices) rows += static_cast<size_t>(m->rows);
  if (reads.size() != rows) return text("%zu rows of %zu were read", reads.size(), rows);
  for (const auto& [where, counts] : reads) {
    for (const int count : counts) {
      if (count != 1) return text("a piece of row %d was read %d times", where.second, count);
    }
  }
  return "";
}

// The pieces that a warp uses: of each span in turn, units warp, warp + warps, ...
std::vector<const char*> pieces_used(const std::vector<Span>& spans, int warp, int warps) {
  std::vector<const char*> all;
  for (const Span& span : spans) {
    for (int unit = warp; unit < span.count * span.pieces; unit += warps)
      all.push_back(span.weight + unit / span.pieces * span.stride +
                    static_cast<int64_t>(unit % span.pieces) * span.piece);
  }
  return all;
}

// Walks `program` for every warp of a CTA, against the spans that its kernel consumes.
template <class Program>
std::string walk_block(const Program& program, const std::vector<const Rows*>& matrices,
                       const std::vector<Span>& consumed, int warps, int slot_bytes, Reads* reads) {
  for (int warp = 0; warp < warps; ++warp) {
    const std::vector<const char*> used = pieces_used(consumed, warp, warps);
    Walk<Program> walk;
    walk.start(program, warp, warps);
    const char* from = nullptr;
    int bytes = 0;
    size_t met = 0;
    for (; walk.next(&from, &bytes); ++met) {
      const std::string failure = count_piece(matrices, from, bytes, slot_bytes, reads);
      if (!failure.empty()) return failure;
      if (met >= used.size() || used[met] != from)
        return text("warp %d asks for another piece than it uses, number %zu", warp, met);
    }
    if (met != used.size())
      return text("warp %d asks for %zu of %zu pieces", warp, met, used.size());
    if (walk.next(&from, &bytes)) return "a walk goes on past its end";
  }
  return "";
}

void keep_given(std::vector<const Rows*>& matrices) {
  matrices.erase(std::remove_if(matrices.begin(), matrices.end(),
                                [](const Rows* m) { return m->weight == nullptr; }),
                 matrices.end());
}

std::vector<Span> parts(const std::vector<const Rows*>& matrices, int block, int blocks) {
  std::vector<Span> all;
  for (const Rows* m : matrices) all.push_back(part_of(*m, block, blocks, kSize));
  return all;
}

}  // namespace

std::string walk_token(Random& random, const TokenParams& p, int blocks) {
  std::vector<const Rows*> matrices;
  for (int l = 0; l < p.layer_count; ++l) {
    for (int i = 0; i < halves(p.shape); ++i) {
      const Half half = half_of(p.shape, i);
      for (const Rows* m : entered(p.layers[l], half)) matrices.push_back(m);
      for (const Rows* m : left(p.layers[l], half)) matrices.push_back(m);
    }
  }
  matrices.push_back(&p.head);
  keep_given(matrices);
  const int warps = static_cast<int>(random.range(1, kStreamWarps));
  Reads reads;
  for (int block = 0; block < blocks; ++block) {
    const TokenProgram program = {&p, block, blocks, kSize};
    const std::string failure = walk_block(program, matrices, parts(matrices, block, blocks), warps,
                                           p.layout.slot_bytes, &reads);
    if (!failure.empty()) return "token: " + failure;
  }
  return check_reads(matrices, reads);
}

std::string walk_phase(Random& random, const PhaseParams& p, int blocks) {
  std::vector<const Rows*> matrices = {&p.head};
  if (p.kind == kPhaseIn) matrices = entered(p.layer, p.half);
  if (p.kind == kPhaseOut) matrices = left(p.layer, p.half);
  keep_given(matrices);
  const int warps = static_cast<int>(random.range(1, kStreamWarps));
  Reads reads;
  for (int block = 0; block < blocks; ++block) {
    const PhaseProgram program = {&p, block, blocks, kSize};
    const std::string failure = walk_block(program, matrices, parts(matrices, block, blocks), warps,
                                           p.layout.slot_bytes, &reads);
    if (!failure.empty()) return "phase: " + failure;
  }
  return check_reads(matrices, reads);
}

// q, k and v of the CTA's share of its head, then its rows of up.
std::string walk_cluster(Random& random, const ClusterParams& p, int ranks) {
  std::vector<const Rows*> matrices = {&p.layer.qkv, &p.layer.k, &p.layer.v, &p.layer.up};
  keep_given(matrices);
  const int warps = static_cast<int>(random.range(1, kStreamWarps));
  const int blocks = p.shape.kv_heads * ranks;
  Reads reads;
  for (int block = 0; block < blocks; ++block) {
    const int head = block / ranks, rank = block % ranks;
    std::vector<Span> spans;
    for (int i = 0; i < 3; ++i) {
      const Section s = section_of(p.layer, p.shape, head, i);
      const int begin = share(s.count, rank, ranks), end = share(s.count, rank + 1, ranks);
      spans.push_back(span_of(*s.rows, s.first + begin, end - begin, kSize));
    }
    if (p.layer.up.weight != nullptr) spans.push_back(part_of(p.layer.up, block, blocks, kSize));
    const ClusterProgram program = {&p, head, rank, ranks, block, blocks, kSize};
    const std::string failure =
        walk_block(program, matrices, spans, warps, p.layout.slot_bytes, &reads);
    if (!failure.empty()) return "attention_up: " + failure;
  }
  return check_reads(matrices, reads);
}

}  // namespace cuda
}  // namespace hff

#endif

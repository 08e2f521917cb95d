// Random calls (rows, context, positions, masks) and the fields a fuzzer may spoil.
#include "case.h"

namespace hff_test {

std::string describe(const CallData& call, const HeadsData& heads) {
  const char* masks[] = {"none", "bool", "int64", "additive"};
  return std::string(dtype_name(call.dtype)) + " precision " + std::to_string(call.precision) +
         " batch " + std::to_string(call.batch) + " queries " + std::to_string(call.queries) +
         (call.cached ? " past " + std::to_string(call.past) : " no cache") +
         (call.starts ? " ragged rows " + std::to_string(call.rows()) : "") +
         (call.causal ? " causal" : "") + " heads " + std::to_string(heads.heads) + "/" +
         std::to_string(heads.kv_heads) + " dim " + std::to_string(heads.head_dim) + " rotary " +
         std::to_string(heads.rotary_dim) +
         (heads.layout == HFF_QKV_STACKED ? " stacked" : " per-head") + " mask " +
         masks[call.mask.kind];
}

int32_t draw_dtype(Random& random, const Design& design) {
  int32_t drawn = random.pick<int32_t>({HFF_F32, HFF_BF16, HFF_F16});
  if (on_device() && drawn == HFF_F32) drawn = random.pick<int32_t>({HFF_BF16, HFF_F16});
  return design.dtype >= 0 ? design.dtype : drawn;
}

int32_t draw_residual(Random& random) {
  const int32_t drawn =
      static_cast<int32_t>(random.range(HFF_RESIDUAL_PARALLEL, HFF_RESIDUAL_POST_NORM));
  return on_device() && drawn == HFF_RESIDUAL_POST_NORM ? HFF_RESIDUAL_SEQUENTIAL : drawn;
}

int32_t draw_precision(Random& random) {
  return random.pick<int32_t>(
      {HFF_PRECISION_HIGHEST, HFF_PRECISION_HIGHEST, HFF_PRECISION_HIGH, HFF_PRECISION_MEDIUM});
}

Parts parts_of(int32_t dtype, int32_t precision) {
  const std::string isa = hff_isa();
  if (dtype != HFF_F32 || precision == HFF_PRECISION_HIGHEST) return Parts::kWhole;
  const bool tiles = isa == "amx" || isa == "amx_emulated";
  if (precision == HFF_PRECISION_HIGH) return tiles ? Parts::kTwo : Parts::kWhole;
  return tiles || isa == "avx512_bf16" ? Parts::kOne : Parts::kWhole;
}

void fill_starts(Random& random, Arena& arena, CallData& call) {
  call.starts = arena.input(kInt64, call.batch + 1);
  const int64_t full = random.range(0, call.batch - 1);  // so that there is a row
  int64_t row = 0;
  for (int64_t b = 0; b <= call.batch; ++b) {
    call.starts.set(b, static_cast<double>(row));
    const int64_t some = random.chance(0.2) ? 0 : random.range(1, call.queries);
    row += b == full && random.chance(0.7) ? call.queries : std::max<int64_t>(some, b == full);
  }
}

// cos and sin of position * base^(-2 i / rotary_dim), both halves alike, as a rotary module gives
// them. Positions: past + i, shifted per batch row (left padding) or not, or anything inside the
// table.
void fill_rotary(Random& random, Arena& arena, const HeadsData& heads, CallData& call) {
  const int64_t dim = heads.rotary_dim;
  const bool shared = random.chance(0.4), anywhere = random.chance(0.2);
  call.rope_rows = call.keys() + call.room + random.range(0, 5);
  if (dim == 0 && random.chance(0.5)) {
    call.rope_rows = 0;
    return;
  }
  call.position_query_stride = random.pick<int64_t>({1, 1, 3});
  call.position_batch_stride =
      shared ? 0 : (call.queries - 1) * call.position_query_stride + random.range(1, 4);
  const int64_t last = (call.batch - 1) * call.position_batch_stride +
                       (call.queries - 1) * call.position_query_stride;
  call.positions = arena.input(kInt64, last + 1);
  for (int64_t i = 0; i <= last; ++i) call.positions.set(i, -1e15);  // never to be read
  for (int64_t b = 0; b < (shared ? 1 : call.batch); ++b) {
    const int64_t shift = random.chance(0.5) ? 0 : random.range(0, call.past);
    for (int64_t i = 0; i < call.queries; ++i) {
      const int64_t position =
          anywhere ? random.range(0, call.rope_rows - 1) : call.past - shift + i;
      call.positions.set(b * call.position_batch_stride + i * call.position_query_stride,
                         static_cast<double>(position));
    }
  }
  call.cos = arena.input(call.dtype, call.rope_rows * dim);
  call.sin = arena.input(call.dtype, call.rope_rows * dim);
  for (int64_t p = 0; p < call.rope_rows; ++p) {
    for (int64_t d = 0; d < dim; ++d) {
      const int64_t pair = d % (dim / 2);
      const double angle =
          static_cast<double>(p) *
          std::pow(10000.0, -2.0 * static_cast<double>(pair) / static_cast<double>(dim));
      call.cos.set(p * dim + d, std::cos(angle));
      call.sin.set(p * dim + d, std::sin(angle));
    }
  }
}

namespace {

double draw_mask_value(Random& random, int32_t kind, int32_t dtype, bool visible) {
  if (kind == HFF_MASK_BOOL) return visible ? 1 : 0;
  if (kind == HFF_MASK_INT64) return visible ? random.pick({1.0, 1.0, 7.0, -1.0}) : 0;
  if (!visible)
    return random.chance(0.5) ? static_cast<double>(lowest(dtype))
                              : -std::numeric_limits<double>::infinity();
  return random.chance(0.5) ? 0.0 : random.symmetric();
}

}  // namespace

void fill_mask(Random& random, Arena& arena, CallData& call, int32_t kind, bool one_for_all) {
  MaskData& mask = call.mask;
  mask.kind = kind;
  if (kind == HFF_MASK_NONE) return;
  mask.keys = call.keys() + call.room + (random.chance(0.4) ? random.range(1, 20) : 0);
  const bool shared_batch = random.chance(0.3), shared_query = one_for_all || random.chance(0.3);
  mask.key_stride = random.pick<int64_t>({1, 1, 1, 2});
  const int64_t row = (mask.keys - 1) * mask.key_stride + 1;
  mask.query_stride = shared_query ? 0 : row + random.range(0, 3);
  mask.batch_stride =
      shared_batch ? 0 : (call.queries - 1) * mask.query_stride + row + random.range(0, 3);
  mask.data = arena.input(kind == HFF_MASK_BOOL    ? kBool
                          : kind == HFF_MASK_INT64 ? kInt64
                                                   : call.dtype,
                          mask.at(call.batch - 1, call.queries - 1, mask.keys - 1) + 1);
  const double seen = random.pick({0.3, 0.8, 1.0});
  for (int64_t b = 0; b < (shared_batch ? 1 : call.batch); ++b) {
    const int64_t padding =
        one_for_all ? random.range(0, call.keys()) * (random.chance(0.5) ? 1 : 0) : 0;
    for (int64_t i = 0; i < (shared_query ? 1 : call.queries); ++i) {
      const bool nothing = !one_for_all && random.chance(0.1);
      for (int64_t j = 0; j < mask.keys; ++j) {
        const bool hole = (j < call.past || !call.cached) && !random.chance(seen);
        const bool visible = one_for_all ? j >= padding && !hole : !nothing && random.chance(seen);
        mask.data.set(mask.at(b, i, j), draw_mask_value(random, kind, call.dtype, visible));
      }
    }
  }
}

void spoil_unseen(Random& random, const CallData& call, const CacheData& cache) {
  for (int64_t b = 0; b < call.batch; ++b) {
    for (int64_t j = 0; j < call.past; ++j) {
      bool seen = false;
      for (int64_t i = 0; i < call.queries; ++i)
        seen = seen || !std::isinf(call.mask.bias(b, i, j));
      if (seen) continue;
      for (int64_t head = 0; head < cache.heads; ++head) {
        const int64_t at = cache.at(b, head, j) + random.range(0, cache.head_dim - 1);
        cache.keys.set(at, random.pick({std::nan(""), HUGE_VAL, -HUGE_VAL}));
        cache.values.set(at, random.pick({std::nan(""), HUGE_VAL, -HUGE_VAL}));
      }
    }
  }
}

void draw_long_rows(Random& random, int64_t* hidden, int64_t* mlp) {
  if (!on_device() || !random.chance(0.15)) return;
  const int64_t length = random.range(780, 2700), narrow = random.range(8, 24);
  const bool wide = random.chance(0.3);
  *hidden = wide ? length : narrow, *mlp = wide ? narrow : length;
}

namespace {

// At most 16 rows, or more: one long prompt, many short ones, or many sequences of one token.
void draw_rows(Random& random, bool tiny, CallData& call) {
  call.batch = random.pick<int64_t>({1, 1, 1, 2, 3, 4, 7, 8, 16});
  call.queries = random.range(1, std::min<int64_t>(16 / call.batch, tiny ? 3 : 16));
  if (random.chance(0.5)) call.queries = 1;
  if (tiny) call.batch = std::min<int64_t>(call.batch, 3);
  if (on_device()) call.batch = std::min<int64_t>(call.batch, 4), call.queries = 1;
  if (on_device()) return;
  if (!random.chance(tiny ? 0.2 : 0.35)) return;
  switch (random.range(0, 3)) {
    case 0:
      call.batch = 1, call.queries = random.range(17, tiny ? 20 : 200);
      break;
    case 1:
      call.batch = random.range(17, tiny ? 19 : 40), call.queries = 1;
      break;
    default:
      call.batch = random.range(2, 6);
      call.queries = random.range(16 / call.batch + 1, tiny ? 10 : 40);
  }
}

}  // namespace

CallData draw_call(Random& random, Arena& arena, const Design& design, int32_t dtype,
                   HeadsData& heads, bool one_for_all) {
  const bool tiny = design.size == Size::kTiny, designed = design.batch > 0;
  CallData call;
  call.dtype = dtype;
  call.precision = draw_precision(random);
  draw_rows(random, tiny, call);
  call.room = design.room;
  if (design.room > 0) call.queries = 1;
  call.past = random.pick<int64_t>({0, 1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127,
                                    random.range(0, 200), random.range(0, 600),
                                    random.range(500, 530), random.range(1000, 1100)});
  if (tiny) call.past = random.range(0, 9);
  if (call.rows() > 16) call.past = std::min<int64_t>(call.past, 6000 / call.rows());
  call.cached = on_device() || design.room > 0 || random.chance(0.7);
  call.causal = random.chance(call.cached ? 0.9 : 0.5);
  bool ragged = !call.cached && random.chance(0.4);
  if (designed) {
    call.batch = design.batch, call.queries = design.queries, call.past = design.past;
    call.cached = call.causal = design.past >= 0;
    call.precision = HFF_PRECISION_HIGHEST;
    ragged = false;
  }
  if (!call.cached) call.past = 0;
  if (ragged) heads.rotary_dim = 0;
  fill_rotary(random, arena, heads, call);
  if (on_device() && call.positions && random.chance(0.3)) {  // as the kernels count by themselves
    call.counted = true;
    for (int64_t i = 0; i < call.positions.count; ++i)
      call.positions.set(i, static_cast<double>(call.past));
  }
  if (ragged) fill_starts(random, arena, call);
  const int32_t kind =
      random.pick<int32_t>({HFF_MASK_NONE, HFF_MASK_BOOL, HFF_MASK_INT64, HFF_MASK_ADDITIVE});
  fill_mask(random, arena, call, designed || ragged ? HFF_MASK_NONE : kind, one_for_all);
  return call;
}

CacheData draw_cache(Random& random, Case& c, const Design& design, const CallData& call,
                     const HeadsData& heads) {
  if (!call.cached) return {};
  const CacheData cache = CacheData::random(random, c.arena, call.dtype, call.batch, heads,
                                            call.past, call.queries + call.room);
  c.lengths.push_back(cache.length);
  c.capacities.push_back(cache.capacity);
  c.queries = call.queries;
  if (design.nan_behind_mask) spoil_unseen(random, call, cache);
  return cache;
}

void list_fields(std::vector<Field>& fields, hff_input& input, const char* name) {
  fields.push_back({Field::kPointer, &input.data, name});
  fields.push_back({Field::kBytes, &input.bytes, name});
}

void list_fields(std::vector<Field>& fields, hff_output& output, const char* name) {
  fields.push_back({Field::kPointer, &output.data, name});
  fields.push_back({Field::kBytes, &output.bytes, name});
}

void list_fields(std::vector<Field>& fields, hff_call& call) {
  fields.push_back({Field::kStructSize, &call.struct_size, "call.struct_size"});
  fields.push_back({Field::kEnum, &call.dtype, "call.dtype"});
  fields.push_back({Field::kThreads, &call.threads, "call.threads"});
  fields.push_back({Field::kSize, &call.batch, "call.batch"});
  fields.push_back({Field::kSize, &call.queries, "call.queries"});
  fields.push_back({Field::kEnum, &call.causal, "call.causal"});
  fields.push_back({Field::kEnum, &call.precision, "call.precision"});
  list_fields(fields, call.starts, "call.starts");
  // the starts themselves: a copy of the case's own (CallData::abi)
  auto* starts = static_cast<int64_t*>(const_cast<void*>(call.starts.data));
  for (int64_t b = 0; starts && b <= call.batch; ++b)
    fields.push_back({Field::kSize, starts + b, b ? "starts[b]" : "starts[0]"});
  list_fields(fields, call.positions, "call.positions");
  fields.push_back({Field::kSize, &call.position_batch_stride, "call.position_batch_stride"});
  fields.push_back({Field::kSize, &call.position_query_stride, "call.position_query_stride"});
  list_fields(fields, call.cos, "call.cos");
  list_fields(fields, call.sin, "call.sin");
  fields.push_back({Field::kSize, &call.rope_rows, "call.rope_rows"});
  list_fields(fields, call.mask.data, "mask.data");
  fields.push_back({Field::kSize, &call.mask.batch_stride, "mask.batch_stride"});
  fields.push_back({Field::kSize, &call.mask.query_stride, "mask.query_stride"});
  fields.push_back({Field::kSize, &call.mask.key_stride, "mask.key_stride"});
  fields.push_back({Field::kSize, &call.mask.keys, "mask.keys"});
  fields.push_back({Field::kEnum, &call.mask.kind, "mask.kind"});
  fields.push_back({Field::kEnum, &call.device, "call.device"});
  fields.push_back({Field::kEnum, &call.ordinal, "call.ordinal"});
  fields.push_back({Field::kEnum, &call.plan, "call.plan"});
  list_fields(fields, call.workspace, "call.workspace");
}

void list_fields(std::vector<Field>& fields, hff_heads& heads) {
  fields.push_back({Field::kSize, &heads.heads, "heads.heads"});
  fields.push_back({Field::kSize, &heads.kv_heads, "heads.kv_heads"});
  fields.push_back({Field::kSize, &heads.head_dim, "heads.head_dim"});
  fields.push_back({Field::kSize, &heads.rotary_dim, "heads.rotary_dim"});
  fields.push_back({Field::kFloat, &heads.scale, "heads.scale"});
  fields.push_back({Field::kEnum, &heads.qkv_layout, "heads.qkv_layout"});
}

void list_fields(std::vector<Field>& fields, hff_norm& norm) {
  list_fields(fields, norm.weight, "norm.weight");
  list_fields(fields, norm.bias, "norm.bias");
  fields.push_back({Field::kFloat, &norm.eps, "norm.eps"});
  fields.push_back({Field::kEnum, &norm.kind, "norm.kind"});
}

void list_fields(std::vector<Field>& fields, hff_linear& linear) {
  list_fields(fields, linear.weight, "linear.weight");
  list_fields(fields, linear.bias, "linear.bias");
  list_fields(fields, linear.packed, "linear.packed");
  if (linear.packed.data) fields.push_back({Field::kPanels, &linear.packed, "linear.panels"});
  fields.push_back({Field::kSize, &linear.rows, "linear.rows"});
  fields.push_back({Field::kSize, &linear.cols, "linear.cols"});
  fields.push_back({Field::kSize, &linear.row_stride, "linear.row_stride"});
}

void list_fields(std::vector<Field>& fields, hff_block& block) {
  list_fields(fields, block.heads);
  fields.push_back({Field::kSize, &block.hidden, "block.hidden"});
  fields.push_back({Field::kSize, &block.mlp_width, "block.mlp_width"});
  fields.push_back({Field::kEnum, &block.residual, "block.residual"});
  fields.push_back({Field::kEnum, &block.activation, "block.activation"});
  list_fields(fields, block.attention_norm);
  list_fields(fields, block.mlp_norm);
  for (hff_linear* linear : {&block.qkv, &block.k, &block.v, &block.o, &block.up, &block.down}) {
    if (linear->weight.data) list_fields(fields, *linear);
  }
  if (block.k.weight.data)
    fields.push_back({Field::kPointer, const_cast<void**>(&block.v.weight.data), "v.weight"});
}

void list_fields(std::vector<Field>& fields, hff_cache& cache) {
  list_fields(fields, cache.keys, "cache.keys");
  list_fields(fields, cache.values, "cache.values");
  fields.push_back({Field::kSize, &cache.batch_stride, "cache.batch_stride"});
  fields.push_back({Field::kSize, &cache.head_stride, "cache.head_stride"});
  fields.push_back({Field::kSize, &cache.token_stride, "cache.token_stride"});
  fields.push_back({Field::kSize, &cache.capacity, "cache.capacity"});
  fields.push_back({Field::kPointer, &cache.length, "cache.length"});
  fields.push_back({Field::kCell, cache.length, "cache.length[0]"});
}

}  // namespace hff_test

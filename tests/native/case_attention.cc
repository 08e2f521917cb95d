// hff_attention_forward: RoPE, append to the cache if there is one, and masked softmax attention from projected q, k, v.
#include "case.h"

namespace hff_test {
namespace {

class AttentionCase : public CaseOf<AttentionCase> {
 public:
  AttentionCase(Random& random, const Design& design)
      : CaseOf(&random), dtype_(draw_dtype(random, design)) {
    heads_ = HeadsData::random(random, design.size == Size::kTiny ? 16 : 256);
    if (design.heads) {
      heads_.heads = heads_.kv_heads = design.heads;
      heads_.head_dim = design.hidden / design.heads;
      heads_.rotary_dim = heads_.head_dim / 4 / 2 * 2;
      heads_.layout = HFF_QKV_PER_HEAD;
    }
    call_ = draw_call(random, arena, design, dtype_, heads_, false);
    if (design.exact) show_one_key(random);
    cache_ = draw_cache(random, *this, design, call_, heads_);
    stride_ = heads_.qkv_width() + (random.chance(0.3) ? random.range(1, 7) : 0);
    qkv_ = arena.input(dtype_, (call_.rows() - 1) * stride_ + heads_.qkv_width());
    fill_uniform(random, qkv_, random.pick({1.7, 1.7, 4.0}));
    out_ = arena.output(dtype_, call_.rows() * heads_.width());
    results.push_back(contiguous("out", out_));
    if (call_.cached) results.push_back(appended("keys", cache_.keys, cache_, call_.queries));
    if (call_.cached) results.push_back(appended("values", cache_.values, cache_, call_.queries));
    independent_errors = call_.rows() * heads_.heads;  // a score errs for its whole head
    if (call_.positions && !call_.counted)
      indices.push_back({"positions", call_.positions, call_.rope_rows, heads_.rotary_dim > 0});
    spots = {{"qkv", qkv_, stride_}};
  }

  const char* kernel() const override { return "attention"; }
  int32_t dtype() const override { return dtype_; }
  int64_t independent_rows() const override { return call_.batch; }
  bool has_rows(int64_t first, int64_t count) const override {
    return call_.first_row(first + count) > call_.first_row(first);
  }
  int64_t bytes_read() const override {
    return 2 * call_.batch * heads_.kv_heads * call_.keys() * heads_.head_dim *
           element_size(dtype_);
  }
  std::string shape() const override {
    return describe(call_, heads_) + " qkv stride " + std::to_string(stride_);
  }

  hff_status call_rows(int64_t first, int64_t count, int32_t threads) override {
    const hff_heads heads = heads_.abi();
    const hff_call call = call_.abi(threads, first, count);
    const hff_cache cache = cache_.abi(first);
    const hff_attention_io io = make_io(first);
    return hff_attention_forward(&call, &heads, call_.cached ? &cache : nullptr, &io);
  }

  hff_status call_changed(const std::function<void(std::vector<Field>&)>& change) override {
    hff_heads heads = heads_.abi();
    hff_call call = call_.abi(1, 0, call_.batch, true);
    hff_cache cache = cache_.abi();
    hff_attention_io io = make_io(0);
    std::vector<Field> fields;
    list_fields(fields, call);
    list_fields(fields, heads);
    hff_cache* given = call_.cached ? &cache : nullptr;
    if (given) list_fields(fields, cache);
    fields.push_back({Field::kPointer, &given, "cache"});
    fields.push_back({Field::kStructSize, &io.struct_size, "io.struct_size"});
    list_fields(fields, io.qkv, "io.qkv");
    fields.push_back({Field::kSize, &io.qkv_row_stride, "io.qkv_row_stride"});
    list_fields(fields, io.out, "io.out");
    change(fields);
    return hff_attention_forward(&call, &heads, given, &io);
  }

  template <class A>
  std::vector<Row<A>> evaluate(const A& a, bool mark) {
    Rows<A> qkv(static_cast<size_t>(call_.rows()), Row<A>(static_cast<size_t>(heads_.qkv_width())));
    for (int64_t r = 0; r < call_.rows(); ++r) {
      for (int64_t c = 0; c < heads_.qkv_width(); ++c) {
        qkv[r][c] = static_cast<typename A::Number>(qkv_.get(r * stride_ + c));
      }
    }
    const Attended<A> attended = attend(a, heads_, call_, cache_, qkv);
    if (mark) results[0].free = spread(attended.all_masked, heads_.width());
    if (!call_.cached) return {flatten<A>(attended.context)};
    return {flatten<A>(attended.context), attended.keys, attended.values};
  }

 private:
  // The softmax of one score is 1: the context is that key's value, bit for bit.
  void show_one_key(Random& random) {
    if (call_.starts) {  // no mask: sequences of one row
      for (int64_t b = 0; b <= call_.batch; ++b) call_.starts.set(b, static_cast<double>(b));
      return;
    }
    if (call_.mask.kind == HFF_MASK_NONE) fill_mask(random, arena, call_, HFF_MASK_BOOL, false);
    const MaskData& mask = call_.mask;
    for (int64_t b = 0; b < call_.batch; ++b) {
      for (int64_t i = 0; i < call_.queries; ++i) {
        const int64_t shown = random.range(0, mask.query_stride ? call_.past + i : call_.past);
        const bool masks_add = mask.kind == HFF_MASK_ADDITIVE;
        for (int64_t j = 0; j < mask.keys; ++j) {
          const double hidden = masks_add ? -std::numeric_limits<double>::infinity() : 0;
          mask.data.set(mask.at(b, i, j), j == shown ? (masks_add ? 0 : 1) : hidden);
        }
      }
    }
  }

  hff_attention_io make_io(int64_t first) const {
    hff_attention_io io = {};
    io.struct_size = sizeof io;
    io.qkv = qkv_.input_from(call_.first_row(first) * stride_);
    io.qkv_row_stride = stride_;
    io.out = out_.output_from(call_.first_row(first) * heads_.width());
    return io;
  }

  int32_t dtype_;
  HeadsData heads_;
  CallData call_;
  CacheData cache_;
  int64_t stride_ = 0;
  Array qkv_, out_;
};

}  // namespace

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

std::unique_ptr<Case> make_attention(Random& random, const Design& design) {
  return std::make_unique<AttentionCase>(random, design);
}

}  // namespace hff_test

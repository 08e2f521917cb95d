// hff_block_forward: one transformer layer, at each of its stages.
#include "case.h"

namespace hff_test {
namespace {

class BlockCase : public CaseOf<BlockCase> {
 public:
  BlockCase(Random& random, const Design& design)
      : CaseOf(&random), dtype_(draw_dtype(random, design)) {
    const bool tiny = design.size == Size::kTiny, designed = design.heads > 0;
    HeadsData heads = HeadsData::random(random, tiny ? 16 : 192);
    int64_t hidden =
        random.chance(0.4) ? heads.width() : random.pick<int64_t>({37, 64, random.range(1, 200)});
    int64_t mlp = random.chance(0.4) ? 4 * hidden : random.range(1, 300);
    if (tiny) hidden = random.range(1, 18), mlp = random.range(1, 20);
    draw_long_rows(random, &hidden, &mlp);
    hidden = fitting(hidden), mlp = fitting(mlp);
    if (designed) {
      heads.heads = heads.kv_heads = design.heads;
      heads.head_dim = design.hidden / design.heads;
      heads.rotary_dim = heads.head_dim / 4 / 2 * 2;
      heads.layout = HFF_QKV_PER_HEAD;
      hidden = design.hidden;
      mlp = design.mlp ? design.mlp : 4 * hidden;
    }
    stage_ = designed ? design.stage
                      : static_cast<int32_t>(random.range(HFF_STAGE_ATTENTION, HFF_STAGE_FULL));
    call_ = draw_call(random, arena, design, dtype_, heads, false);
    if (call_.rows() > CallData::kFewRows && !designed) {
      mlp = random.chance(0.2) ? 256 : std::min<int64_t>(mlp, 130);  // 256: in slices on every set
      hidden = std::min<int64_t>(hidden, 130);
    }
    block_ = BlockData::random(random, arena, dtype_, heads, hidden, mlp,
                               designed ? design.residual : draw_residual(random),
                               static_cast<int32_t>(random.range(HFF_ACT_NONE, HFF_ACT_SILU)),
                               random.pick<int32_t>({HFF_NORM_LAYER, HFF_NORM_RMS}));
    for (LinearData* l : linears()) l->wants_panels &= !designed || design.packed;
    cache_ = draw_cache(random, *this, design, call_, heads);
    x_ = arena.input(dtype_, call_.rows() * hidden);
    fill_normal(random, x_, 0.0, 1.0);
    if (stage_ == HFF_STAGE_FULL) {
      out_ = arena.output(dtype_, call_.rows() * hidden);
      results.push_back(contiguous("out", out_));
    } else {
      attention_out_ = arena.output(dtype_, call_.rows() * hidden);
      results.push_back(contiguous("attention_out", attention_out_));
    }
    if (stage_ == HFF_STAGE_ATTENTION_UP) {
      up_out_ = arena.output(dtype_, call_.rows() * mlp);
      results.push_back(contiguous("up_out", up_out_));
    }
    if (call_.cached) results.push_back(appended("keys", cache_.keys, cache_, call_.queries));
    if (call_.cached) results.push_back(appended("values", cache_.values, cache_, call_.queries));
    if (call_.positions && !call_.counted)
      indices.push_back(
          {"positions", call_.positions, call_.rope_rows, block_.heads.rotary_dim > 0});
    spots = {{"x", x_, hidden}};
  }

  const char* kernel() const override { return "block"; }
  int32_t dtype() const override { return dtype_; }
  int32_t precision() const override { return call_.precision; }
  std::vector<LinearData*> linears() override { return block_.linears(); }
  int64_t independent_rows() const override { return call_.batch; }
  bool has_rows(int64_t first, int64_t count) const override {
    return call_.first_row(first + count) > call_.first_row(first);
  }
  int64_t fewest_alike() const override {
    return on_device() ? call_.batch : call_.fewest_alike(block_.row_kernels());
  }
  int64_t bytes_read() const override {
    const HeadsData& h = block_.heads;
    return block_.weight_bytes() +
           2 * call_.batch * h.kv_heads * call_.keys() * h.head_dim * element_size(dtype_);
  }
  std::string shape() const override {
    constexpr const char* kResiduals[] = {" parallel", " sequential", " post-norm"};
    return describe_device() + describe(call_, block_.heads) + " hidden " +
           std::to_string(block_.hidden) + " mlp " + std::to_string(block_.mlp_width) +
           kResiduals[block_.residual] + (block_.separate() ? " q, k, v" : " qkv") +
           " activation " + std::to_string(block_.activation) +
           (block_.attention_norm.kind ? " rms" : " layer") +
           (block_.mlp_norm.kind ? " rms" : " layer") + " stage " + std::to_string(stage_);
  }

  hff_status call_rows(int64_t first, int64_t count, int32_t threads) override {
    const hff_block block = block_.abi();
    hff_call call = call_.abi(threads, first, count);
    const hff_status status = place(&call, block);
    if (status != HFF_OK) return status;
    const hff_cache cache = cache_.abi(first);
    const hff_block_io io = make_io(first);
    return hff_block_forward(&call, &block, call_.cached ? &cache : nullptr, &io);
  }

  hff_status call_changed(const std::function<void(std::vector<Field>&)>& change) override {
    hff_block block = block_.abi();
    hff_call call = call_.abi(1, 0, call_.batch, true);
    hff_cache cache = cache_.abi();
    hff_block_io io = make_io(0);
    const hff_status status = place(&call, block);
    if (status != HFF_OK) return status;
    std::vector<Field> fields;
    list_fields(fields, call);
    list_fields(fields, block);
    hff_cache* given = call_.cached ? &cache : nullptr;
    if (given) list_fields(fields, cache);
    fields.push_back({Field::kPointer, &given, "cache"});
    fields.push_back({Field::kStructSize, &io.struct_size, "io.struct_size"});
    fields.push_back({Field::kEnum, &io.stage, "io.stage"});
    list_fields(fields, io.x, "io.x");
    list_fields(fields, io.attention_out, "io.attention_out");
    list_fields(fields, io.up_out, "io.up_out");
    list_fields(fields, io.out, "io.out");
    change(fields);
    return hff_block_forward(&call, &block, given, &io);
  }

  template <class A>
  std::vector<Row<A>> evaluate(const A& a, bool mark) {
    const BlockResult<A> r =
        block(a, block_, call_, cache_, read_rows<A>(x_, call_.rows(), block_.hidden));
    const Rows<A>& attention = stage_ == HFF_STAGE_ATTENTION ? r.projected : r.attention;
    std::vector<Row<A>> all{flatten<A>(stage_ == HFF_STAGE_FULL ? r.out : attention)};
    if (stage_ == HFF_STAGE_ATTENTION_UP) all.push_back(flatten<A>(r.act));
    if (mark) {
      results[0].free = spread(r.attended.all_masked, block_.hidden);
      // Parallel: the MLP does not see the attention.
      if (all.size() == 2 && block_.residual != HFF_RESIDUAL_PARALLEL) {
        results[1].free = spread(r.attended.all_masked, block_.mlp_width);
      }
    }
    if (call_.cached) all.insert(all.end(), {r.attended.keys, r.attended.values});
    return all;
  }

 private:
  hff_block_io make_io(int64_t first) const {
    const int64_t row = call_.first_row(first);
    hff_block_io io = {};
    io.struct_size = sizeof io;
    io.stage = stage_;
    io.x = x_.input_from(row * block_.hidden);
    io.attention_out = attention_out_.output_from(row * block_.hidden);
    io.up_out = up_out_.output_from(row * block_.mlp_width);
    io.out = out_.output_from(row * block_.hidden);
    return io;
  }

  int32_t dtype_, stage_ = HFF_STAGE_FULL;
  CallData call_;
  BlockData block_;
  CacheData cache_;
  Array x_, attention_out_, up_out_, out_;
};

}  // namespace

std::unique_ptr<Case> make_block(Random& random, const Design& design) {
  return std::make_unique<BlockCase>(random, design);
}

}  // namespace hff_test

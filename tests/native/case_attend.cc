// hff_attend: naive, tiled and flash attention on strided q, k, v, with every mask, window and
// length.
#include "case.h"

namespace hff_test {
namespace {

constexpr const char* kNames[] = {"naive", "tiled", "flash"};

// A (batch, heads, tokens, head_dim) tensor.
struct TokenData {
  Array array;
  hff_strides strides;

  int64_t at(int64_t b, int64_t h, int64_t t) const {
    return b * strides.batch + h * strides.head + t * strides.token;
  }
  // Heads outside tokens or inside them, with or without gaps.
  static TokenData random(Random& random, Arena& arena, int32_t dtype, int64_t batch, int64_t heads,
                          int64_t tokens, int64_t dim, bool out) {
    TokenData d;
    const int64_t gap = random.chance(0.3) ? random.range(1, 5) : 0;
    if (random.chance(0.5)) {
      d.strides.token = dim + gap;
      d.strides.head = tokens * d.strides.token + gap;
      d.strides.batch = heads * d.strides.head + gap;
    } else {
      d.strides.head = dim + gap;
      d.strides.token = heads * d.strides.head + gap;
      d.strides.batch = tokens * d.strides.token + gap;
    }
    const int64_t count = d.at(batch - 1, heads - 1, tokens - 1) + dim;
    d.array = out ? arena.output(dtype, count) : arena.input(dtype, count);
    return d;
  }
};

class AttendCase : public CaseOf<AttendCase> {
 public:
  AttendCase(Random& random, const Design& design)
      : CaseOf(&random), dtype_(draw_dtype(random, design)) {
    const bool tiny = design.size == Size::kTiny;
    kernel_ = static_cast<int32_t>(random.range(HFF_ATTEND_NAIVE, HFF_ATTEND_FLASH));
    heads_ = HeadsData::random(random, tiny ? 16 : 256);
    if (!tiny && heads_.head_dim <= 32 && random.chance(0.3))  // many rows to a k/v head: MQA
      heads_.heads = 4 * heads_.heads, heads_.kv_heads = random.pick<int64_t>({1, 2, 4});
    while (heads_.heads % heads_.kv_heads != 0) --heads_.kv_heads;
    draw_lengths(random, tiny);
    if (design.heads) benchmark(design);
    draw_mask(random, design);
    q_ = TokenData::random(random, arena, dtype_, batch_, heads_.heads, queries_, dim(), false);
    k_ = TokenData::random(random, arena, dtype_, batch_, heads_.kv_heads, keys_, dim(), false);
    v_ = TokenData::random(random, arena, dtype_, batch_, heads_.kv_heads, keys_, dim(), false);
    out_ = TokenData::random(random, arena, dtype_, batch_, heads_.heads, queries_, dim(), true);
    for (const TokenData* d : {&q_, &k_, &v_}) fill_uniform(random, d->array, 1.7);
    if (design.nan_behind_mask) spoil_unseen_keys(random);
    results.push_back({"out", out_.array, {}, {}, {}, {}, 0, false});
    for (int64_t b = 0; b < batch_; ++b) {
      for (int64_t h = 0; h < heads_.heads; ++h) {
        for (int64_t i = 0; i < queries_ * dim(); ++i)
          results[0].at.push_back(out_.at(b, h, i / dim()) + i % dim());
      }
    }
    independent_errors = batch_ * heads_.heads * queries_;  // a score errs for its whole row
    spots = {{"q", q_.array, dim()}, {"k", k_.array, dim()}, {"v", v_.array, dim()}};
  }

  const char* kernel() const override { return "attend"; }
  int32_t dtype() const override { return dtype_; }
  int64_t independent_rows() const override { return batch_; }
  int64_t bytes_read() const override {
    return 2 * batch_ * heads_.kv_heads * keys_ * dim() * element_size(dtype_);
  }
  std::string shape() const override {
    const char* masks[] = {"none", "bool", "int64", "additive"};
    return std::string(kNames[kernel_]) + " " + dtype_name(dtype_) + " batch " +
           std::to_string(batch_) + " heads " + std::to_string(heads_.heads) + "/" +
           std::to_string(heads_.kv_heads) + " dim " + std::to_string(dim()) + " queries " +
           std::to_string(queries_) + " keys " + std::to_string(keys_) +
           (causal_ ? " causal" : "") + " window " + std::to_string(window_) + " mask " +
           masks[mask_.kind] + " blocks " + std::to_string(blocks_[0]) + ", " +
           std::to_string(blocks_[1]);
  }

  hff_status call_rows(int64_t first, int64_t count, int32_t threads) override {
    const hff_attend_io io = make_io(first, count, threads);
    return hff_attend(&io);
  }

  hff_status call_changed(const std::function<void(std::vector<Field>&)>& change) override {
    hff_attend_io io = make_io(0, batch_, 1);
    std::vector<Field> fields;
    fields.push_back({Field::kStructSize, &io.struct_size, "io.struct_size"});
    fields.push_back({Field::kEnum, &io.kernel, "io.kernel"});
    fields.push_back({Field::kEnum, &io.dtype, "io.dtype"});
    fields.push_back({Field::kThreads, &io.threads, "io.threads"});
    fields.push_back({Field::kEnum, &io.causal, "io.causal"});
    fields.push_back({Field::kEnum, &io.device, "io.device"});
    fields.push_back({Field::kEnum, &io.ordinal, "io.ordinal"});
    fields.push_back({Field::kFloat, &io.scale, "io.scale"});
    for (auto& [name, size] : {std::pair<const char*, int64_t*>{"io.batch", &io.batch},
                               {"io.heads", &io.heads},
                               {"io.kv_heads", &io.kv_heads},
                               {"io.head_dim", &io.head_dim},
                               {"io.queries", &io.queries},
                               {"io.keys", &io.keys},
                               {"io.window", &io.window},
                               {"io.block_queries", &io.block_queries},
                               {"io.block_keys", &io.block_keys},
                               {"io.mask_head_stride", &io.mask_head_stride}})
      fields.push_back({Field::kSize, size, name});
    for (hff_strides* s : {&io.q_strides, &io.k_strides, &io.v_strides, &io.out_strides}) {
      for (int64_t* stride : {&s->batch, &s->head, &s->token})
        fields.push_back({Field::kSize, stride, "stride"});
    }
    list_fields(fields, io.q, "io.q");
    list_fields(fields, io.k, "io.k");
    list_fields(fields, io.v, "io.v");
    list_fields(fields, io.out, "io.out");
    list_fields(fields, io.mask.data, "mask.data");
    fields.push_back({Field::kSize, &io.mask.batch_stride, "mask.batch_stride"});
    fields.push_back({Field::kSize, &io.mask.query_stride, "mask.query_stride"});
    fields.push_back({Field::kSize, &io.mask.key_stride, "mask.key_stride"});
    fields.push_back({Field::kSize, &io.mask.keys, "mask.keys"});
    fields.push_back({Field::kEnum, &io.mask.kind, "mask.kind"});
    change(fields);
    return hff_attend(&io);
  }

  template <class A>
  std::vector<Row<A>> evaluate(const A& a, bool mark) {
    using Number = typename A::Number;
    Row<A> context;
    std::vector<char> free;
    const auto row = [&](const TokenData& d, int64_t b, int64_t h, int64_t t) {
      Row<A> values(static_cast<size_t>(dim()));
      for (int64_t e = 0; e < dim(); ++e)
        values[e] = static_cast<Number>(d.array.get(d.at(b, h, t) + e));
      return values;
    };
    for (int64_t b = 0; b < batch_; ++b) {
      for (int64_t h = 0; h < heads_.heads; ++h) {
        const int64_t g = h / (heads_.heads / heads_.kv_heads);
        Row<A> keys, values;
        for (int64_t j = 0; j < keys_; ++j) {
          const Row<A> key = row(k_, b, g, j), value = row(v_, b, g, j);
          keys.insert(keys.end(), key.begin(), key.end());
          values.insert(values.end(), value.begin(), value.end());
        }
        for (int64_t i = 0; i < queries_; ++i) {
          const std::vector<double> bias = bias_of(b, h, i);
          bool dead = std::all_of(bias.begin(), bias.end(), [](double x) { return std::isinf(x); });
          Row<A> out(static_cast<size_t>(dim()), 0);
          if (!dead) out = softmax_average(a, heads_, row(q_, b, h, i), keys, values, bias, &dead);
          context.insert(context.end(), out.begin(), out.end());
          free.insert(free.end(), static_cast<size_t>(dim()), dead ? 1 : 0);
        }
      }
    }
    if (mark) results[0].free = free;
    return {context};
  }

 private:
  int64_t dim() const { return heads_.head_dim; }

  void draw_lengths(Random& random, bool tiny) {
    const std::initializer_list<int64_t> around = {1, 1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65};
    batch_ = random.pick<int64_t>({1, 1, 2, 3});
    queries_ = random.chance(0.3) ? 1 : random.pick(around);
    if (random.chance(0.2)) queries_ = random.range(1, 200);
    keys_ = random.chance(0.5) ? random.pick(around) : random.range(1, 300);
    if (random.chance(0.3)) keys_ = queries_;
    if (random.chance(0.15)) queries_ = random.range(1, 3), keys_ = random.range(500, 1100);
    if (tiny) queries_ = random.range(1, 9), keys_ = random.range(1, 12);
    while (batch_ * heads_.heads * queries_ * keys_ * dim() > 1500000) {
      if (queries_ > 1) {
        queries_ = (queries_ + 1) / 2;
      } else if (batch_ > 1) {
        batch_ = 1;
      } else {
        keys_ = (keys_ + 1) / 2;
      }
    }
    causal_ = random.chance(0.5);
    if (causal_ && random.chance(0.4)) window_ = random.range(1, keys_ + 3);
    if (random.chance(0.5)) blocks_[0] = random.range(1, 70), blocks_[1] = random.range(1, 150);
    if (random.chance(0.1)) heads_.scale = 1.0f;  // T5's
  }

  void benchmark(const Design& design) {
    heads_.heads = heads_.kv_heads = design.heads;
    heads_.head_dim = design.hidden / design.heads;
    heads_.scale = 0.125f;
    batch_ = design.batch, queries_ = design.queries, keys_ = design.past + design.queries;
    causal_ = true;
    kernel_ = HFF_ATTEND_FLASH;
    window_ = blocks_[0] = blocks_[1] = 0;
  }

  void draw_mask(Random& random, const Design& design) {
    CallData call;  // whose queries are those of all heads, one head after the other
    call.dtype = dtype_;
    call.batch = batch_;
    call.queries = queries_;
    call.past = keys_;
    call.cached = call.causal = false;
    shared_heads_ = random.chance(0.6);
    const int64_t kinds =
        design.heads ? 0 : random.range(HFF_MASK_NONE + design.exact, HFF_MASK_ADDITIVE);
    CallData all = call;
    if (!shared_heads_) all.queries = queries_ * heads_.heads;
    all.past = std::max<int64_t>(keys_ - all.queries, 0);
    fill_mask(random, arena, all, static_cast<int32_t>(kinds), false);
    mask_ = all.mask;
    if (design.exact) show_one_key(random, all.queries);
  }

  void show_one_key(Random& random, int64_t rows) {
    causal_ = false, window_ = 0;
    const bool adds = mask_.kind == HFF_MASK_ADDITIVE;
    for (int64_t row = 0; row < batch_ * rows; ++row) {
      const int64_t shown = random.range(0, keys_ - 1);
      for (int64_t j = 0; j < mask_.keys; ++j) {
        mask_.data.set(mask_.at(row / rows, row % rows, j), j == shown ? !adds
                                                            : adds     ? -HUGE_VAL
                                                                       : 0.0);
      }
    }
  }

  int64_t mask_head_stride() const { return shared_heads_ ? 0 : queries_ * mask_.query_stride; }

  // What (b, h, i) adds to each key's score; minus infinity where it is hidden.
  std::vector<double> bias_of(int64_t b, int64_t h, int64_t i) const {
    const int64_t limit = causal_ ? keys_ - queries_ + i + 1 : keys_;
    const int64_t first = window_ ? limit - window_ : 0;
    std::vector<double> bias(static_cast<size_t>(keys_), -HUGE_VAL);
    for (int64_t j = std::max<int64_t>(first, 0); j < limit; ++j)
      bias[j] = mask_.bias(b, shared_heads_ ? i : h * queries_ + i, j);
    return bias;
  }

  void spoil_unseen_keys(Random& random) {
    const int64_t group = heads_.heads / heads_.kv_heads;
    for (int64_t b = 0; b < batch_; ++b) {
      std::vector<char> seen(static_cast<size_t>(heads_.kv_heads * keys_), 0);
      for (int64_t row = 0; row < heads_.heads * queries_; ++row) {
        const int64_t h = row / queries_;
        const std::vector<double> bias = bias_of(b, h, row % queries_);
        for (int64_t j = 0; j < keys_; ++j)
          if (!std::isinf(bias[j])) seen[h / group * keys_ + j] = 1;
      }
      for (int64_t at = 0; at < heads_.kv_heads * keys_; ++at) {
        if (seen[at]) continue;
        for (const TokenData* d : {&k_, &v_}) {
          d->array.set(d->at(b, at / keys_, at % keys_) + random.range(0, dim() - 1),
                       random.pick({std::nan(""), HUGE_VAL, -HUGE_VAL}));
        }
      }
    }
  }

  hff_attend_io make_io(int64_t first, int64_t count, int32_t threads) const {
    hff_attend_io io = {};
    io.struct_size = sizeof io;
    io.kernel = kernel_;
    io.dtype = dtype_;
    io.threads = threads;
    io.causal = causal_ ? 1 : 0;
    io.batch = count;
    io.heads = heads_.heads;
    io.kv_heads = heads_.kv_heads;
    io.head_dim = dim();
    io.queries = queries_;
    io.keys = keys_;
    io.window = window_;
    io.q = q_.array.input_from(first * q_.strides.batch);
    io.k = k_.array.input_from(first * k_.strides.batch);
    io.v = v_.array.input_from(first * v_.strides.batch);
    io.out = out_.array.output_from(first * out_.strides.batch);
    io.q_strides = q_.strides;
    io.k_strides = k_.strides;
    io.v_strides = v_.strides;
    io.out_strides = out_.strides;
    io.mask = mask_.abi(first);
    io.mask_head_stride = mask_head_stride();
    io.scale = heads_.scale;
    io.block_queries = blocks_[0];
    io.block_keys = blocks_[1];
    return io;
  }

  int32_t dtype_, kernel_ = 0;
  HeadsData heads_;
  int64_t batch_ = 1, queries_ = 1, keys_ = 1, window_ = 0, blocks_[2] = {0, 0};
  bool causal_ = false, shared_heads_ = true;
  TokenData q_, k_, v_, out_;
  MaskData mask_;
};

}  // namespace

std::unique_ptr<Case> make_attend(Random& random, const Design& design) {
  return std::make_unique<AttendCase>(random, design);
}

}  // namespace hff_test

// hff_model_forward: token ids (or embeddings) to hidden states and logits, all layers in one call:
// decode, prefill and encoders.
#include <cstring>

#include "case.h"

namespace hff_test {
namespace {

class ModelCase : public CaseOf<ModelCase> {
 public:
  ModelCase(Random& random, const Design& design)
      : CaseOf(&random), dtype_(draw_dtype(random, design)) {
    const bool tiny = design.size == Size::kTiny;
    HeadsData heads = HeadsData::random(random, tiny ? 16 : 96);
    hidden_ =
        random.chance(0.4) ? heads.width() : random.pick<int64_t>({37, 64, random.range(4, 120)});
    int64_t mlp = random.chance(0.4) ? 4 * hidden_ : random.range(1, 200),
            layers = random.range(1, tiny ? 2 : 3);
    vocab_ = random.range(1, tiny ? 9 : 90);
    if (tiny) hidden_ = random.range(4, 18), mlp = random.range(1, 20);
    if (on_device() && random.chance(0.1)) vocab_ = random.range(500, 1200);
    draw_long_rows(random, &hidden_, &mlp);
    hidden_ = fitting(hidden_), mlp = fitting(mlp);
    if (design.heads) {
      heads.heads = heads.kv_heads = design.heads;
      heads.head_dim = design.hidden / design.heads;
      heads.rotary_dim = heads.head_dim / 4 / 2 * 2;
      heads.layout = HFF_QKV_PER_HEAD;
      hidden_ = design.hidden, layers = design.layers, vocab_ = design.vocab;
      mlp = design.mlp ? design.mlp : 4 * hidden_;
    }
    call_ = draw_call(random, arena, design, dtype_, heads, true);
    if (call_.rows() > CallData::kFewRows && !design.heads) {
      hidden_ = std::min<int64_t>(hidden_, 70);
      mlp = random.chance(0.2) ? 256 : std::min<int64_t>(mlp, 100);  // 256: in slices on every set
      layers = std::min<int64_t>(layers, 2);
    }
    const int32_t kind = random.pick<int32_t>({HFF_NORM_LAYER, HFF_NORM_RMS});
    const int32_t residual = design.heads ? design.residual : draw_residual(random);
    const int32_t activation = static_cast<int32_t>(random.range(HFF_ACT_GELU_ERF, HFF_ACT_SILU));
    for (int64_t layer = 0; layer < layers; ++layer) {
      blocks_.push_back(BlockData::random(random, arena, dtype_, heads, hidden_, mlp, residual,
                                          activation, kind));
      caches_.push_back(draw_cache(random, *this, design, call_, heads));
    }
    if (call_.positions && !call_.counted)
      indices.push_back(
          {"positions", call_.positions, call_.rope_rows, blocks_[0].heads.rotary_dim > 0});
    if (design.heads || random.chance(0.8))
      norm_ = NormData::random(random, arena, dtype_, hidden_, kind);
    fill_inputs(random);
    add_outputs(random, design.heads > 0);
    for (LinearData* l : linears()) l->wants_panels &= !design.heads || design.packed;
    if (ids_) indices.push_back({"ids", ids_, vocab_, true});
    spots = {x_ ? Spot{"x", x_, hidden_} : Spot{"embedding", embedding_, hidden_}};
  }

  const char* kernel() const override { return "model"; }
  int32_t dtype() const override { return dtype_; }
  int32_t precision() const override { return call_.precision; }
  std::vector<LinearData*> linears() override {
    std::vector<LinearData*> all;
    for (BlockData& block : blocks_) {
      for (LinearData* linear : block.linears()) all.push_back(linear);
    }
    if (head_.weight) all.push_back(&head_);
    return all;
  }
  int64_t independent_rows() const override { return call_.batch; }
  bool has_rows(int64_t first, int64_t count) const override {
    return call_.first_row(first + count) > call_.first_row(first);
  }
  int64_t fewest_alike() const override {
    if (on_device()) return call_.batch;
    bool row_kernels = true;
    for (const BlockData& block : blocks_) row_kernels = row_kernels && block.row_kernels();
    const int64_t few = CallData::kFewRows, layers = call_.fewest_alike(row_kernels);
    return call_.batch * keep_ > few ? std::max(layers, few / keep_ + 1) : layers;
  }
  int64_t bytes_read() const override {
    int64_t bytes = head_.weight.bytes();
    for (const BlockData& b : blocks_) {
      bytes += b.weight_bytes();
      bytes += 2 * call_.batch * b.heads.kv_heads * call_.keys() * b.heads.head_dim *
               element_size(dtype_);
    }
    return bytes;
  }
  std::string shape() const override {
    constexpr const char* kResiduals[] = {" parallel", " sequential", " post-norm"};
    return describe_device() + describe(call_, blocks_[0].heads) + " hidden " +
           std::to_string(hidden_) + " mlp " + std::to_string(blocks_[0].mlp_width) + " layers " +
           std::to_string(blocks_.size()) + kResiduals[blocks_[0].residual] + " activation " +
           std::to_string(blocks_[0].activation) +
           (!norm_.weight ? " no norm"
            : norm_.kind  ? " rms"
                          : " layer") +
           (ids_ ? " ids" : " embeds") + " vocab " + std::to_string(vocab_) + " keep " +
           std::to_string(keep_) + (hidden_out_ ? " hidden_out" : "") +
           (in_place_ ? " in place" : "");
  }

  hff_status call_rows(int64_t first, int64_t count, int32_t threads) override {
    hff_call call = call_.abi(threads, first, count);
    std::vector<hff_block> blocks;
    std::vector<hff_cache> caches;
    const hff_model model = make_model(first, blocks, caches);
    const hff_status status = place(&call, model);
    if (status != HFF_OK) return status;
    hff_sampling sampling;
    hff_model_io io = make_io(first, &sampling);
    const hff_cache* given = call_.cached ? caches.data() : nullptr;
    if (!in_place_) return hff_model_forward(&call, &model, given, &io);
    const hff_input x = io.x;
    const int64_t rows = call_.first_row(first + count) - call_.first_row(first);
    const size_t bytes = static_cast<size_t>(rows * hidden_ * element_size(dtype_));
    char* const place = static_cast<char*>(io.hidden.data);
    const std::vector<char> before(place, place + bytes);
    std::memcpy(place, x.data, bytes);
    io.x = {place, io.hidden.bytes};
    const hff_status ended = hff_model_forward(&call, &model, given, &io);
    // a call that fails has left x, and so what lay there before it
    if (ended != HFF_OK && std::memcmp(place, x.data, bytes) == 0)
      std::memcpy(place, before.data(), bytes);
    return ended;
  }

  int64_t most_steps() const override {
    if (on_device() || call_.queries != 1 || !ids_ || !head_.weight || !call_.cached) return 0;
    int64_t steps = caches_[0].capacity - caches_[0].past;
    for (const CacheData& cache : caches_) steps = std::min(steps, cache.capacity - cache.past);
    if (call_.mask.kind != HFF_MASK_NONE)
      steps = std::min(steps, call_.mask.keys - caches_[0].past);
    const bool turned = call_.positions && blocks_[0].heads.rotary_dim > 0;
    for (int64_t b = 0; turned && b < call_.batch; ++b)
      steps = std::min(steps, call_.rope_rows - call_.position(b, 0));
    return steps;
  }

  hff_status call_steps(int64_t steps, bool together, int32_t threads,
                        std::vector<int64_t>* tokens) override {
    hff_call call = call_.abi(threads, 0, call_.batch);
    std::vector<hff_block> blocks;
    std::vector<hff_cache> caches;
    const hff_model model = make_model(0, blocks, caches);
    hff_sampling sampling;
    hff_model_io io = make_io(0, &sampling);
    tokens->assign(static_cast<size_t>(call_.batch * steps), -1);
    io.next = {tokens->data(), static_cast<int64_t>(tokens->size() * sizeof(int64_t))};
    io.steps = steps;
    if (together) return hff_model_forward(&call, &model, caches.data(), &io);
    io.steps = 1;
    std::vector<int64_t> ids(static_cast<size_t>(call_.batch)), positions = ids, next = ids;
    const Next drawn = chosen;
    for (int64_t k = 0; k < steps; ++k) {
      if (io.sampling) {
        chosen.sampling.uniforms.clear();
        for (int64_t b = 0; b < call_.batch; ++b)
          chosen.sampling.uniforms.push_back(drawn.sampling.uniforms[b * steps + k]);
        sampling = chosen.sampling.abi();
      }
      for (int64_t b = 0; call_.positions && b < call_.batch; ++b)
        positions[static_cast<size_t>(b)] = call_.position(b, 0) + k;
      if (call_.positions) call.positions = {positions.data(), 8 * call_.batch};
      call.position_batch_stride = 1;
      io.next = {next.data(), 8 * call_.batch};
      const hff_status status = hff_model_forward(&call, &model, caches.data(), &io);
      if (status != HFF_OK) return status;
      for (int64_t b = 0; b < call_.batch; ++b) {
        const int64_t token = (*tokens)[static_cast<size_t>(b * steps + k)] = next[b];
        if (io.sampling &&
            !could_draw(chosen.row(b), chosen.sampling, chosen.sampling.uniforms[b], token))
          misdrawn = "step " + std::to_string(k) + " draws " + std::to_string(token);
      }
      ids = next;
      io.ids = {ids.data(), 8 * call_.batch}, io.id_batch_stride = 1;
    }
    chosen = drawn;
    return HFF_OK;
  }

  hff_status call_changed(const std::function<void(std::vector<Field>&)>& change) override {
    hff_call call = call_.abi(1, 0, call_.batch, true);
    std::vector<hff_block> blocks;
    std::vector<hff_cache> caches;
    hff_model model = make_model(0, blocks, caches);
    hff_sampling sampling;
    hff_model_io io = make_io(0, &sampling);
    const hff_status status = place(&call, model);
    if (status != HFF_OK) return status;
    std::vector<Field> fields;
    list_fields(fields, call);
    list_fields(fields, blocks.back());
    hff_cache* given = call_.cached ? caches.data() : nullptr;
    if (given) list_fields(fields, caches.back());
    fields.push_back({Field::kPointer, &given, "cache"});
    if (norm_.weight) list_fields(fields, model.final_norm);
    if (head_.weight) list_fields(fields, model.head);
    fields.push_back({Field::kStructSize, &model.struct_size, "model.struct_size"});
    fields.push_back({Field::kSize, &model.hidden, "model.hidden"});
    fields.push_back({Field::kSize, &model.vocab, "model.vocab"});
    list_fields(fields, model.embedding, "model.embedding");
    fields.push_back({Field::kPointer, &model.blocks, "model.blocks"});
    fields.push_back({Field::kStructSize, &io.struct_size, "io.struct_size"});
    list_fields(fields, io.ids, "io.ids");
    fields.push_back({Field::kSize, &io.id_batch_stride, "io.id_batch_stride"});
    fields.push_back({Field::kSize, &io.id_query_stride, "io.id_query_stride"});
    list_fields(fields, io.x, "io.x");
    list_fields(fields, io.logits, "io.logits");
    list_fields(fields, io.hidden, "io.hidden");
    list_fields(fields, io.next, "io.next");
    if (io.sampling) {
      fields.push_back({Field::kPointer, &io.sampling, "io.sampling"});
      fields.push_back({Field::kStructSize, &sampling.struct_size, "sampling.struct_size"});
      list_fields(fields, sampling.uniforms, "sampling.uniforms");
      fields.push_back({Field::kFloat, &sampling.temperature, "sampling.temperature"});
      fields.push_back({Field::kSize, &sampling.top_k, "sampling.top_k"});
      fields.push_back({Field::kDouble, &sampling.top_p, "sampling.top_p"});
    }
    fields.push_back({Field::kSize, &io.keep, "io.keep"});
    fields.push_back({Field::kSize, &io.steps, "io.steps"});
    change(fields);
    // a stride of 0 makes a call of any number of rows well-formed, and long
    if (!given && io.id_query_stride == 0 && call.queries > 1000) io.id_query_stride = 1;
    return hff_model_forward(&call, &model, given, &io);
  }

  template <class A>
  std::vector<Row<A>> evaluate(const A& a, bool mark) {
    Rows<A> x = ids_ ? Rows<A>() : read_rows<A>(x_, call_.rows(), hidden_);
    if (ids_) {
      const Rows<A> table = read_rows<A>(embedding_, vocab_, hidden_);
      for (int64_t r = 0; r < call_.rows(); ++r) {
        x.push_back(
            table[static_cast<size_t>(ids_.get(id_at(r / call_.queries, r % call_.queries)))]);
      }
    }
    std::vector<Row<A>> appended_rows;
    std::vector<char> free(static_cast<size_t>(call_.rows()), 0);
    const size_t first_cache = results.size() - (call_.cached ? 2 * blocks_.size() : 0);
    for (size_t layer = 0; layer < blocks_.size(); ++layer) {
      const BlockResult<A> r = block(a, blocks_[layer], call_, caches_[layer], x);
      x = r.out;
      if (call_.cached) {
        appended_rows.push_back(r.attended.keys);
        appended_rows.push_back(r.attended.values);
      }
      if (mark && call_.cached) {
        const auto marks = spread_cache(free, caches_[layer], call_.queries);
        results[first_cache + 2 * layer].free = marks;
        results[first_cache + 2 * layer + 1].free = marks;
      }
      free = r.attended.all_masked;  // the same rows in every layer
    }
    if (norm_.weight) x = norm(a, norm_, x);
    std::vector<Row<A>> all;
    if (hidden_out_) all.push_back(flatten<A>(x));
    if (hidden_out_ && mark) results[0].free = spread(free, hidden_);
    if (head_.weight) {
      Rows<A> kept;
      std::vector<char> kept_free;
      for (int64_t r = 0; r < call_.rows(); ++r) {
        if (r % call_.queries < call_.queries - keep_) continue;
        kept.push_back(x[r]);
        kept_free.push_back(free[r]);
      }
      if (mark) results[all.size()].free = spread(kept_free, vocab_);
      all.push_back(flatten<A>(linear(a, head_, kept)));
    }
    all.insert(all.end(), appended_rows.begin(), appended_rows.end());
    return all;
  }

 private:
  int64_t id_at(int64_t b, int64_t i) const { return b * id_batch_stride_ + i * id_query_stride_; }

  void fill_inputs(Random& random) {
    embedding_ = arena.input(dtype_, vocab_ * hidden_);
    fill_uniform(random, embedding_, 1.7);
    if (call_.room == 0 && (call_.starts || random.chance(0.3))) {
      x_ = arena.input(dtype_, call_.rows() * hidden_);
      fill_uniform(random, x_, 1.7);
      return;
    }
    id_query_stride_ = random.pick<int64_t>({1, 1, 2});
    id_batch_stride_ = (call_.queries - 1) * id_query_stride_ + random.range(1, 3);
    ids_ = arena.input(kInt64, id_at(call_.batch - 1, call_.queries - 1) + 1);
    for (int64_t i = 0; i < ids_.count; ++i) ids_.set(i, -1e15);  // never to be read
    for (int64_t r = 0; r < call_.rows(); ++r) {
      ids_.set(id_at(r / call_.queries, r % call_.queries),
               static_cast<double>(random.range(0, vocab_ - 1)));
    }
  }

  void add_outputs(Random& random, bool designed) {
    // of many rows a result without logits lends its memory to the layers
    const double chance = call_.rows() > CallData::kFewRows ? 0.4 : 0.7;
    const bool with_head = designed || call_.room > 0 || (!call_.starts && random.chance(chance));
    if (!with_head || random.chance(0.3)) {
      hidden_out_ = arena.output(dtype_, call_.rows() * hidden_);
      in_place_ = x_ && !on_device() && random.chance(0.5);
      results.push_back(contiguous("hidden", hidden_out_));
    }
    if (with_head) {
      keep_ = random.chance(0.5) ? 1 : random.range(1, call_.queries);
      head_ = LinearData::random(random, arena, dtype_, vocab_, hidden_);
      logits_ = arena.output(dtype_, call_.batch * keep_ * vocab_);
      results.push_back(contiguous("logits", logits_));
      chosen = {{}, logits_, vocab_, keep_, {}};
      if (on_device() || random.chance(0.4)) chosen.next = arena.output(kInt64, call_.batch);
    }
    for (const CacheData& cache : caches_) {
      if (!call_.cached) break;
      results.push_back(appended("keys", cache.keys, cache, call_.queries));
      results.push_back(appended("values", cache.values, cache, call_.queries));
    }
  }

  hff_model make_model(int64_t first, std::vector<hff_block>& blocks,
                       std::vector<hff_cache>& caches) const {
    for (const BlockData& block : blocks_) blocks.push_back(block.abi());
    for (const CacheData& cache : caches_) caches.push_back(cache.abi(first));
    hff_model model = {};
    model.struct_size = sizeof model;
    model.hidden = hidden_;
    model.vocab = vocab_;
    model.embedding = embedding_.input();
    model.blocks = blocks.data();
    model.block_count = static_cast<int64_t>(blocks.size());
    model.final_norm = norm_.abi();
    model.head = head_.abi();
    return model;
  }

  hff_model_io make_io(int64_t first, hff_sampling* sampling) const {
    hff_model_io io = {};
    io.struct_size = sizeof io;
    io.ids = ids_.input_from(first * id_batch_stride_);
    io.id_batch_stride = id_batch_stride_;
    io.id_query_stride = id_query_stride_;
    io.x = x_.input_from(call_.first_row(first) * hidden_);
    io.logits = logits_.output_from(first * keep_ * vocab_);
    io.next = chosen.next.output_from(first);
    if (!chosen.sampling.uniforms.empty()) {
      *sampling = chosen.sampling.abi(first);
      io.sampling = sampling;
    }
    io.hidden = hidden_out_.output_from(call_.first_row(first) * hidden_);
    io.keep = keep_;
    return io;
  }

  int32_t dtype_;
  int64_t hidden_ = 0, vocab_ = 0, keep_ = 0, id_batch_stride_ = 0, id_query_stride_ = 0;
  bool in_place_ = false;  // hidden over x
  CallData call_;
  std::vector<BlockData> blocks_;
  std::vector<CacheData> caches_;
  NormData norm_;
  LinearData head_;
  Array embedding_, ids_, x_, logits_, hidden_out_;
};

}  // namespace

std::unique_ptr<Case> make_model(Random& random, const Design& design) {
  return std::make_unique<ModelCase>(random, design);
}

}  // namespace hff_test

// hff_norm_forward: LayerNorm and RMSNorm over rows of any width.
#include "case.h"

namespace hff_test {
namespace {

class NormCase : public CaseOf<NormCase> {
 public:
  NormCase(Random& random, const Design& design)
      : CaseOf(&random), dtype_(draw_dtype(random, design)) {
    const bool tiny = design.size == Size::kTiny;
    rows_ = design.batch ? design.batch : random.range(1, tiny ? 3 : 20);
    hidden_ = design.hidden ? design.hidden
              : tiny ? random.range(1, 20)
                     : random.pick<int64_t>({random.range(1, 80), random.range(1, 80), 37, 128, 512,
                                             random.range(1, 1200)});
    norm_ = NormData::random(random, arena, dtype_, hidden_,
                             random.pick<int32_t>({HFF_NORM_LAYER, HFF_NORM_RMS}));
    x_ = arena.input(dtype_, rows_ * hidden_);
    fill_normal(random, x_, random.pick({0.0, 0.0, 0.5, 3.0}), random.pick({1.0, 1.0, 0.1, 5.0}));
    out_ = arena.output(dtype_, rows_ * hidden_);
    results.push_back(contiguous("out", out_));
    spots = {{"x", x_, hidden_}, {"weight", norm_.weight, hidden_}};
  }

  const char* kernel() const override { return "norm"; }
  int32_t dtype() const override { return dtype_; }
  int64_t independent_rows() const override { return rows_; }
  int64_t bytes_read() const override { return x_.bytes() + out_.bytes(); }
  std::string shape() const override {
    return std::string(dtype_name(dtype_)) + (norm_.kind == HFF_NORM_RMS ? " rms" : " layer") +
           " rows " + std::to_string(rows_) + " hidden " + std::to_string(hidden_) +
           (norm_.bias ? " bias" : "");
  }

  hff_status call_rows(int64_t first, int64_t count, int32_t threads) override {
    const hff_norm norm = norm_.abi();
    const hff_norm_io io = make_io(first, count, threads);
    return hff_norm_forward(&norm, &io);
  }

  hff_status call_changed(const std::function<void(std::vector<Field>&)>& change) override {
    hff_norm norm = norm_.abi();
    hff_norm_io io = make_io(0, rows_, 1);
    std::vector<Field> fields;
    list_fields(fields, norm);
    fields.push_back({Field::kStructSize, &io.struct_size, "io.struct_size"});
    fields.push_back({Field::kEnum, &io.dtype, "io.dtype"});
    fields.push_back({Field::kThreads, &io.threads, "io.threads"});
    fields.push_back({Field::kSize, &io.rows, "io.rows"});
    fields.push_back({Field::kSize, &io.hidden, "io.hidden"});
    list_fields(fields, io.x, "io.x");
    list_fields(fields, io.out, "io.out");
    change(fields);
    return hff_norm_forward(&norm, &io);
  }

  template <class A>
  std::vector<Row<A>> evaluate(const A& a, bool) {
    return {flatten<A>(norm(a, norm_, read_rows<A>(x_, rows_, hidden_)))};
  }

 private:
  hff_norm_io make_io(int64_t first, int64_t count, int32_t threads) const {
    hff_norm_io io = {};
    io.struct_size = sizeof io;
    io.dtype = dtype_;
    io.threads = threads;
    io.rows = count;
    io.hidden = hidden_;
    io.x = x_.input_from(first * hidden_);
    io.out = out_.output_from(first * hidden_);
    return io;
  }

  int32_t dtype_;
  int64_t rows_ = 0, hidden_ = 0;
  NormData norm_;
  Array x_, out_;
};

}  // namespace

std::unique_ptr<Case> make_norm(Random& random, const Design& design) {
  return std::make_unique<NormCase>(random, design);
}

}  // namespace hff_test

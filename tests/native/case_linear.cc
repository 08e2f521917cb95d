// hff_linear_forward: y = act(W x + b) for a few rows in one pass over W.
#include "case.h"

namespace hff_test {
namespace {

class LinearCase : public CaseOf<LinearCase> {
 public:
  LinearCase(Random& random, const Design& design)
      : CaseOf(&random), dtype_(draw_dtype(random, design)) {
    const bool tiny = design.size == Size::kTiny;
    rows_ = design.batch ? design.batch : random.range(1, tiny ? 3 : HFF_MAX_ROWS);
    if (random.chance(0.4) && !design.batch) rows_ = 1;
    const auto extent = [&random, tiny] {
      return tiny ? random.range(1, 20)
                  : random.pick<int64_t>(
                        {random.range(1, 65), 64 + random.range(0, 64), random.range(1, 400), 37});
    };
    const int64_t outputs = design.width ? design.width : extent(),
                  inputs = design.hidden ? design.hidden : extent();
    activation_ = design.exact ? random.pick<int32_t>({HFF_ACT_NONE, HFF_ACT_RELU})
                               : static_cast<int32_t>(random.range(HFF_ACT_NONE, HFF_ACT_SILU));
    linear_ = LinearData::random(random, arena, dtype_, outputs, inputs);
    x_ = arena.input(dtype_, rows_ * inputs);
    fill_normal(random, x_, 0.0, 1.0);
    if (design.exact) fill_integers(random);
    out_ = arena.output(dtype_, rows_ * outputs);
    results.push_back(contiguous("out", out_));
    spots = {{"x", x_, inputs}, {"weight", linear_.weight, linear_.row_stride}};
  }

  const char* kernel() const override { return "linear"; }
  int32_t dtype() const override { return dtype_; }
  int64_t independent_rows() const override { return rows_; }
  int64_t bytes_read() const override { return linear_.weight.bytes(); }
  std::string shape() const override {
    return std::string(dtype_name(dtype_)) + " x (" + std::to_string(rows_) + ", " +
           std::to_string(linear_.cols) + ") W rows " + std::to_string(linear_.rows) +
           " row_stride " + std::to_string(linear_.row_stride) + (linear_.bias ? " bias" : "") +
           " activation " + std::to_string(activation_);
  }

  hff_status call_rows(int64_t first, int64_t count, int32_t threads) override {
    const hff_linear linear = linear_.abi();
    const hff_linear_io io = make_io(first, count, threads);
    return hff_linear_forward(&linear, &io);
  }

  hff_status call_changed(const std::function<void(std::vector<Field>&)>& change) override {
    hff_linear linear = linear_.abi();
    hff_linear_io io = make_io(0, rows_, 1);
    std::vector<Field> fields;
    list_fields(fields, linear);
    fields.push_back({Field::kStructSize, &io.struct_size, "io.struct_size"});
    fields.push_back({Field::kEnum, &io.dtype, "io.dtype"});
    fields.push_back({Field::kThreads, &io.threads, "io.threads"});
    fields.push_back({Field::kSize, &io.rows, "io.rows"});
    fields.push_back({Field::kEnum, &io.activation, "io.activation"});
    list_fields(fields, io.x, "io.x");
    list_fields(fields, io.out, "io.out");
    change(fields);
    return hff_linear_forward(&linear, &io);
  }

  template <class A>
  std::vector<Row<A>> evaluate(const A& a, bool) {
    return {flatten<A>(
        activate(a, activation_, linear(a, linear_, read_rows<A>(x_, rows_, linear_.cols))))};
  }

 private:
  // Every partial sum is an integer below 2^24: exact in fp32 in any order. The result is rounded
  // once.
  void fill_integers(Random& random) {
    const int64_t largest = random.pick<int64_t>({1, 8, 60});
    for (const Array* array : {&linear_.weight, &x_, &linear_.bias}) {
      for (int64_t i = 0; i < array->count; ++i) {
        array->set(i, static_cast<double>(random.range(-largest, largest)));
      }
    }
    if (dtype_ != HFF_F16 || largest < 60) return;
    for (int64_t i = 0; i < x_.count; ++i) {  // stays below 65504
      if (i % linear_.cols >= 16) x_.set(i, 0);
    }
  }

  hff_linear_io make_io(int64_t first, int64_t count, int32_t threads) const {
    hff_linear_io io = {};
    io.struct_size = sizeof io;
    io.dtype = dtype_;
    io.threads = threads;
    io.rows = count;
    io.activation = activation_;
    io.x = x_.input_from(first * linear_.cols);
    io.out = out_.output_from(first * linear_.rows);
    return io;
  }

  int32_t dtype_, activation_ = HFF_ACT_NONE;
  int64_t rows_ = 0;
  LinearData linear_;
  Array x_, out_;
};

}  // namespace

std::unique_ptr<Case> make_linear(Random& random, const Design& design) {
  return std::make_unique<LinearCase>(random, design);
}

}  // namespace hff_test

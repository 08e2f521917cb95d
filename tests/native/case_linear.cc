// hff_linear_forward, y = act(W x + b): for a few rows in one pass over W, for many through panels.
#include "case.h"

namespace hff_test {
namespace {

class LinearCase : public CaseOf<LinearCase> {
 public:
  LinearCase(Random& random, const Design& design)
      : CaseOf(&random), dtype_(draw_dtype(random, design)) {
    const bool tiny = design.size == Size::kTiny, designed = design.batch > 0;
    const auto extent = [&random, tiny] {
      return tiny ? random.range(1, 20)
                  : random.pick<int64_t>(
                        {random.range(1, 65), 64 + random.range(0, 64), random.range(1, 400), 37});
    };
    int64_t outputs = designed ? design.width : extent();
    int64_t inputs = designed ? design.hidden : extent();
    rows_ = designed ? design.batch : random.range(1, tiny ? 3 : kFewRows);
    if (random.chance(0.4) && !designed) rows_ = 1;
    if (!designed && random.chance(tiny ? 0.3 : 0.5)) draw_many(random, tiny, outputs, inputs);
    precision_ = designed ? HFF_PRECISION_HIGHEST : draw_precision(random);
    activation_ = design.exact ? random.pick<int32_t>({HFF_ACT_NONE, HFF_ACT_RELU})
                               : static_cast<int32_t>(random.range(HFF_ACT_NONE, HFF_ACT_SILU));
    linear_ = LinearData::random(random, arena, dtype_, outputs, inputs);
    if (designed) linear_.wants_panels = design.packed;
    x_ = arena.input(dtype_, rows_ * inputs);
    fill_normal(random, x_, 0.0, 1.0);
    if (design.exact) fill_integers(random);
    out_ = arena.output(dtype_, rows_ * outputs);
    results.push_back(contiguous("out", out_));
    spots = {{"x", x_, inputs}, {"weight", linear_.weight, linear_.row_stride}};
  }

  const char* kernel() const override { return "linear"; }
  int32_t dtype() const override { return dtype_; }
  int32_t precision() const override { return precision_; }
  std::vector<LinearData*> linears() override { return {&linear_}; }
  int64_t independent_rows() const override { return rows_; }
  int64_t fewest_alike() const override { return rows_ > kFewRows ? kFewRows + 1 : 1; }
  int64_t bytes_read() const override { return linear_.weight.bytes(); }
  std::string shape() const override {
    return std::string(dtype_name(dtype_)) + " x (" + std::to_string(rows_) + ", " +
           std::to_string(linear_.cols) + ") W rows " + std::to_string(linear_.rows) +
           " row_stride " + std::to_string(linear_.row_stride) + (linear_.bias ? " bias" : "") +
           " activation " + std::to_string(activation_) + " precision " +
           std::to_string(precision_) + (linear_.wants_panels ? " packed" : "");
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
    fields.push_back({Field::kEnum, &io.precision, "io.precision"});
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
  static constexpr int64_t kFewRows = CallData::kFewRows;

  // More rows than row kernels take: sizes around the edges of tiles, panels and pieces of a sum.
  void draw_many(Random& random, bool tiny, int64_t& outputs, int64_t& inputs) {
    rows_ = tiny ? random.range(17, 20)
                 : random.pick<int64_t>({17, 18, 28, 29, 32 * random.range(1, 12),
                                         random.range(17, 64), random.range(17, 400)});
    if (tiny) return;
    inputs = random.pick<int64_t>({1, 3, 31, 32, 37, 127, 128, 129, 255, 257, 768, inputs});
    outputs = random.pick<int64_t>({1, 5, 16, 17, 32, 33, 70, outputs});
    while (rows_ * inputs * outputs > kMostProducts)
      outputs = (outputs + 1) / 2, rows_ -= rows_ / 8;
  }
  static constexpr int64_t kMostProducts = 1 << 21;  // milliseconds of the reference

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
    io.precision = precision_;
    io.x = x_.input_from(first * linear_.cols);
    io.out = out_.output_from(first * linear_.rows);
    return io;
  }

  int32_t dtype_, activation_ = HFF_ACT_NONE, precision_ = HFF_PRECISION_HIGHEST;
  int64_t rows_ = 0;
  LinearData linear_;
  Array x_, out_;
};

}  // namespace

std::unique_ptr<Case> make_linear(Random& random, const Design& design) {
  return std::make_unique<LinearCase>(random, design);
}

}  // namespace hff_test

// hff_pack: a weight as panels. What they hold is the library's own affair (the linear case
// multiplies by them); here: every byte is written, none depends on what was there or on threads.
#include "case.h"

namespace hff_test {
namespace {

class PackCase : public Case {
 public:
  PackCase(Random& random, const Design& design)
      : Case(&random), dtype_(draw_dtype(random, design)), precision_(draw_precision(random)) {
    const bool tiny = design.size == Size::kTiny;
    const auto extent = [&random, tiny] {
      return tiny ? random.range(1, 40)
                  : random.pick<int64_t>({1, 3, 15, 16, 17, 31, 32, 33, 70, random.range(1, 300)});
    };
    const int64_t rows = extent(), cols = extent();
    linear_ = LinearData::random(random, arena, dtype_, rows, cols);
    linear_.wants_panels = false;
    packed_ = arena.panels(hff_packed_bytes(dtype_, precision_, rows, cols), true);
    results.push_back(contiguous("packed", packed_));
    spots = {{"weight", linear_.weight, linear_.row_stride}};
  }

  const char* kernel() const override { return "pack"; }
  int32_t dtype() const override { return dtype_; }
  int32_t precision() const override { return precision_; }
  int64_t independent_rows() const override { return 1; }
  int64_t bytes_read() const override { return linear_.weight.bytes() + packed_.bytes(); }
  std::string shape() const override {
    return std::string(dtype_name(dtype_)) + " precision " + std::to_string(precision_) + " (" +
           std::to_string(linear_.rows) + ", " + std::to_string(linear_.cols) + ") row_stride " +
           std::to_string(linear_.row_stride);
  }

  hff_status call_rows(int64_t, int64_t, int32_t threads) override {
    const hff_linear linear = linear_.abi();
    const hff_output out = packed_.output();
    return hff_pack(&linear, dtype_, precision_, threads, &out);
  }

  hff_status call_changed(const std::function<void(std::vector<Field>&)>& change) override {
    hff_linear linear = linear_.abi();
    hff_output out = packed_.output();
    int32_t dtype = dtype_, precision = precision_, threads = 1;
    std::vector<Field> fields;
    list_fields(fields, linear);
    fields.push_back({Field::kEnum, &dtype, "io.dtype"});
    fields.push_back({Field::kEnum, &precision, "io.precision"});
    fields.push_back({Field::kThreads, &threads, "io.threads"});
    list_fields(fields, out, "io.out");
    change(fields);
    return hff_pack(&linear, dtype, precision, threads, &out);
  }

  // The same packing over zeros.
  void compute_reference(bool) override {
    Array again = arena.panels(packed_.bytes());
    std::memset(again.data, 0, static_cast<size_t>(again.bytes()));
    const hff_linear linear = linear_.abi();
    const hff_output out = again.output();
    if (hff_pack(&linear, dtype_, precision_, 1, &out) != HFF_OK) return;
    for (int64_t i = 0; i < again.count; ++i) results[0].exact.push_back(again.get(i));
    results[0].stock = {results[0].exact};
  }

 private:
  int32_t dtype_, precision_;
  LinearData linear_;
  Array packed_;
};

}  // namespace

std::unique_ptr<Case> make_pack(Random& random, const Design& design) {
  return std::make_unique<PackCase>(random, design);
}

}  // namespace hff_test

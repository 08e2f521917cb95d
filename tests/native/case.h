// A case is one call of one kernel on random or designed data, with its reference. The same cases
// run as test, benchmark and fuzz; trial.h judges them.
#ifndef HFF_TESTS_CASE_H
#define HFF_TESTS_CASE_H

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "reference.h"
#include "sampling.h"

namespace hff_test {

// How large random shapes get. Tiny: for fuzzing, a call of a few microseconds.
enum class Size { kTiny, kNormal };

// Elements of one output that the kernel must write, with what they must be.
struct Result {
  std::string name;
  Array array;
  std::vector<int64_t> at;  // element indices
  std::vector<char> free;   // per element: only finiteness is asked (no key visible); empty: none
  std::vector<double> exact;
  std::vector<std::vector<double>> stock;  // samples: orders of summation, luck of rounding
  double allowance = 0;  // absolute, derived by the case where sums are long; 0 elsewhere
  bool halves = false;   // fp32 by products of bf16: judged as bf16
  bool split = false;    // fp32 by products of two bf16 parts: 2^-15 more, and Inf may become NaN
};

// An input whose numbers a case may be spoilt with before it is sealed: rows of `width` elements.
struct Spot {
  const char* name;
  Array array;
  int64_t width;
};

// Ids or positions: int64, each below `limit`.
struct Indices {
  const char* name;
  Array array;
  int64_t limit;
  bool read;  // every element between the strides' gaps is looked up
};

// (batch) int64: the index of the largest logit of each batch row's last kept query, the first of
// equals; or what `sampling`, if it has uniforms, draws.
struct Next {
  Array next, logits;
  int64_t vocab = 0, keep = 1;
  Sampling sampling;

  std::vector<float> row(int64_t b) const {
    std::vector<float> out(static_cast<size_t>(vocab));
    for (int64_t i = 0; i < vocab; ++i)
      out[i] = static_cast<float>(logits.get(((b + 1) * keep - 1) * vocab + i));
    return out;
  }
};

// A pointer into a copied struct that a fuzzer may change.
struct Field {
  enum Kind {
    kSize,
    kEnum,
    kBytes,
    kPointer,
    kFloat,
    kDouble,
    kStructSize,
    kThreads,
    kCell,
    kPanels  // an hff_input of packed weights
  } kind;
  void* where;
  const char* name;
};

class Case {
 public:
  explicit Case(Random* random) : arena(random) {}
  virtual ~Case() = default;

  virtual const char* kernel() const = 0;
  virtual std::string shape() const = 0;
  virtual int32_t dtype() const = 0;
  virtual int32_t precision() const { return HFF_PRECISION_HIGHEST; }
  virtual std::vector<LinearData*> linears() { return {}; }
  // Rows that the kernel promises to treat alone: `count` of them from `first` on.
  virtual int64_t independent_rows() const = 0;
  // Fewest of them that run through the same kernels as all do.
  virtual int64_t fewest_alike() const { return 1; }
  virtual hff_status call_rows(int64_t first, int64_t count, int32_t threads) = 0;
  // The truth, and samples of stock's error where `judged` by it.
  virtual void compute_reference(bool judged = true) = 0;
  // Sequences may be empty: whether these batch rows hold any row at all.
  virtual bool has_rows(int64_t, int64_t) const { return true; }
  // Calls with structs that `change` may spoil.
  virtual hff_status call_changed(const std::function<void(std::vector<Field>&)>& change) = 0;
  // Steps that the case has room for, 0 where it is no such call; and `steps` of them, in one call
  // or in a call each, with their tokens, (batch, steps); a call each checks what is drawn.
  virtual int64_t most_steps() const { return 0; }
  virtual hff_status call_steps(int64_t, bool, int32_t, std::vector<int64_t>*) {
    return HFF_INVALID;
  }
  // Bytes that must cross from memory once per call: weights, and the cache as far as it is read.
  virtual int64_t bytes_read() const = 0;

  hff_status call(int32_t threads) { return call_rows(0, independent_rows(), threads); }
  // Packs the weights that are to be packed; then inputs are read-only.
  void seal() {
    for (LinearData* linear : linears()) {
      if (linear->wants_panels) linear->pack(arena, precision());
    }
    arena.seal();
  }
  // To the state before the first call.
  void restore() { arena.restore(); }

  Arena arena;
  std::vector<Result> results;
  std::vector<Array> lengths;       // cells a successful call advances, by `queries`
  std::vector<int64_t> capacities;  // of the caches that they belong to
  int64_t queries = 0;
  Next chosen;
  std::string misdrawn;  // of call_steps
  std::vector<Spot> spots;
  // Outputs that depend on one and the same rounded number err together: how many groups there are,
  // at least.
  int64_t independent_errors = INT64_MAX;
  std::vector<Indices> indices;
};

// What products under the chosen instruction set may see of fp32 operands.
Parts parts_of(int32_t dtype, int32_t precision);

// Runs Derived::evaluate(arithmetic) for the truth and for stock, and stores the values in
// `results`. evaluate returns one vector per result, in order; `free` marks come with the truth.
template <class Derived>
class CaseOf : public Case {
 public:
  using Case::Case;

  void compute_reference(bool judged) override {
    auto& self = static_cast<Derived&>(*this);
    const auto exact = self.evaluate(Exact{}, true);
    for (size_t r = 0; r < results.size(); ++r)
      results[r].exact.assign(exact[r].begin(), exact[r].end()), results[r].stock.clear();
    if (!judged) return;
    const Parts parts = parts_of(dtype(), precision());
    for (Result& result : results) {
      result.halves = parts == Parts::kOne;
      result.split = parts == Parts::kTwo;
    }
    add_stock({dtype(), false, nullptr, parts});
    // Rounding to 16 bits hides the order of fp32 sums.
    if (dtype() == HFF_F32) add_stock({dtype(), true, nullptr, parts});
    int64_t fewest = independent_errors;
    for (const Result& result : results) {
      fewest = std::min(fewest, static_cast<int64_t>(result.at.size()));
    }
    Random luck(7);
    const int64_t samples = std::min(kSamples, 2 * kFewErrors / fewest);
    for (int64_t sample = 0; fewest < kFewErrors && sample < samples; ++sample) {
      add_stock({dtype(), false, &luck, parts});
    }
  }

 private:
  // The largest of 64 errors scatters by a fifth; one error, by itself. The largest of 16 more
  // samples is about twice the standard deviation; fewer do where each holds several errors.
  static constexpr int64_t kFewErrors = 64, kSamples = 16;

  void add_stock(const Stock& arithmetic) {
    const auto stock = static_cast<Derived&>(*this).evaluate(arithmetic, false);
    for (size_t r = 0; r < results.size(); ++r) {
      results[r].stock.emplace_back(stock[r].begin(), stock[r].end());
    }
  }
};

inline Result contiguous(std::string name, const Array& array) {
  Result result{std::move(name), array, {}, {}, {}, {}, 0, false};
  for (int64_t i = 0; i < array.count; ++i) result.at.push_back(i);
  return result;
}

// The elements of a cache that a call appends, in the order of Attended::keys.
inline Result appended(std::string name, const Array& array, const CacheData& cache,
                       int64_t queries) {
  Result result{std::move(name), array, {}, {}, {}, {}, 0, false};
  for (int64_t b = 0; b < cache.batch; ++b) {
    for (int64_t head = 0; head < cache.heads; ++head) {
      for (int64_t t = cache.past; t < cache.past + queries; ++t) {
        for (int64_t d = 0; d < cache.head_dim; ++d) result.at.push_back(cache.at(b, head, t) + d);
      }
    }
  }
  return result;
}

template <class A>
Row<A> flatten(const Rows<A>& rows) {
  Row<A> all;
  for (const Row<A>& row : rows) all.insert(all.end(), row.begin(), row.end());
  return all;
}

// Per row marks, repeated for every element of the row.
inline std::vector<char> spread(const std::vector<char>& rows, int64_t width) {
  std::vector<char> all;
  for (const char mark : rows) all.insert(all.end(), static_cast<size_t>(width), mark);
  return all;
}

// The same for appended keys or values: (batch, kv_heads, queries, head_dim).
inline std::vector<char> spread_cache(const std::vector<char>& rows, const CacheData& c,
                                      int64_t queries) {
  std::vector<char> all;
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t head = 0; head < c.heads; ++head) {
      for (int64_t i = 0; i < queries; ++i) {
        all.insert(all.end(), static_cast<size_t>(c.head_dim), rows[b * queries + i]);
      }
    }
  }
  return all;
}

// What a case of each kernel may be told; unset fields are drawn.
struct Design {
  Size size = Size::kNormal;
  int32_t dtype = -1;
  bool nan_behind_mask = false;
  int64_t room = 0;    // model: one token a row, with ids, logits and caches for as many more
  bool exact = false;  // integers (linear) or one visible key (attend): bit equality is asked
  // Benchmarks: fixed shapes.
  int64_t hidden = 0, width = 0, heads = 0, past = -1, queries = 0, batch = 0, layers = 0,
          vocab = 0, mlp = 0;  // past -1: no cache; mlp 0: 4 * hidden
  int32_t residual = HFF_RESIDUAL_PARALLEL, stage = HFF_STAGE_FULL;
  bool packed = false;
};

std::unique_ptr<Case> make_norm(Random& random, const Design& design);
std::unique_ptr<Case> make_linear(Random& random, const Design& design);
std::unique_ptr<Case> make_block(Random& random, const Design& design);
std::unique_ptr<Case> make_model(Random& random, const Design& design);
std::unique_ptr<Case> make_pack(Random& random, const Design& design);
std::unique_ptr<Case> make_attend(Random& random, const Design& design);

struct Kernel {
  const char* name;
  std::unique_ptr<Case> (*make)(Random&, const Design&);
};
constexpr Kernel kKernels[] = {{"norm", make_norm},   {"linear", make_linear},
                               {"block", make_block}, {"model", make_model},
                               {"pack", make_pack},   {"attend", make_attend}};

std::string describe(const CallData& call, const HeadsData& heads);

// Fields of shared structs, for call_changed.
void list_fields(std::vector<Field>& fields, hff_call& call);
void list_fields(std::vector<Field>& fields, hff_heads& heads);
void list_fields(std::vector<Field>& fields, hff_norm& norm);
void list_fields(std::vector<Field>& fields, hff_linear& linear);
void list_fields(std::vector<Field>& fields, hff_block& block);
void list_fields(std::vector<Field>& fields, hff_cache& cache);
void list_fields(std::vector<Field>& fields, hff_input& input, const char* name);
void list_fields(std::vector<Field>& fields, hff_output& output, const char* name);

int32_t draw_dtype(Random& random, const Design& design);
// NaN and Inf into the keys and values of every past token that no query of its batch row sees.
void spoil_unseen(Random& random, const CallData& call, const CacheData& cache);
int32_t draw_precision(Random& random);
int32_t draw_residual(Random& random);
// Few rows or many, with a cache or without, ragged or not (then without RoPE), causality,
// positions, rotary tables and mask.
CallData draw_call(Random& random, Arena& arena, const Design& design, int32_t dtype,
                   HeadsData& heads, bool one_for_all);
// The cache of a call, appended rows among the results; nothing for a call without.
CacheData draw_cache(Random& random, Case& c, const Design& design, const CallData& call,
                     const HeadsData& heads);
// On the device, at times: rows longer than a slot of its rings, more rows than it sums at once.
void draw_long_rows(Random& random, int64_t* hidden, int64_t* mlp);

}  // namespace hff_test
#endif

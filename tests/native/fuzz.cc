// Row 8: structs that contradict themselves. The library refuses, or does something inside the
// buffers it was given; a refused call has changed nothing. Buffers are never shorter than their
// struct says: that lie cannot be found out.
#include <chrono>
#include <cinttypes>
#include <climits>
#include <cstdio>
#include <iterator>
#include <map>

#include "spoil.h"
#include "trial.h"

namespace hff_test {
namespace {

constexpr uint64_t kTrialsPerBase = 64;

// Edges of the type, of 32 bits, of the old value, and the smallest factors that overflow with it.
// Wraps freely.
int64_t hostile_size(Random& random, int64_t old) {
  const uint64_t was = static_cast<uint64_t>(old), most = INT64_MAX;
  const uint64_t factor = old > 0 ? most / was : most;
  const uint64_t sizes[] = {0,
                            1,
                            2,
                            3,
                            17,
                            was - 1,
                            was + 1,
                            was * 2,
                            0 - was,
                            0ull - 1,
                            most,
                            most + 1,
                            most + 2,
                            most / 2,
                            most / 4 + 1,
                            most / 8 + 1,
                            factor,
                            factor + 1,
                            1ull << 31,
                            (1ull << 31) - 1,
                            1ull << 32,
                            (1ull << 32) + was,
                            1ull << 33,
                            1ull << 62,
                            (1ull << 61) + was,
                            2 * factor + 2,
                            static_cast<uint64_t>(random.range(-40, 400))};
  return static_cast<int64_t>(sizes[random.next() % std::size(sizes)]);
}

int64_t hostile_index(Random& random, int64_t limit) {
  return random.pick<int64_t>({-1, -1, limit, limit, limit + 1, INT64_MIN, INT64_MAX, 1ll << 20,
                               1ll << 32, (1ll << 61) + 1, -(1ll << 32)});
}

// Fewer bytes than there are; never more.
int64_t hostile_bytes(Random& random, int64_t was) {
  if (was <= 0) return random.pick<int64_t>({0, -1, INT64_MIN});
  return random.pick<int64_t>({0, -1, INT64_MIN, was - 1, was - 2, was - 4, was - 8, was / 2, -was,
                               random.range(0, was - 1)});
}

void spoil_pointer(Random& random, std::vector<Field>& fields, size_t at) {
  void* pointer = nullptr;
  std::memcpy(&pointer, fields[at].where, sizeof pointer);
  const bool has_bytes = at + 1 < fields.size() && fields[at + 1].kind == Field::kBytes;
  if (!pointer) return;
  if (has_bytes && random.chance(0.3)) {  // misaligned, within the buffer
    auto* bytes = static_cast<int64_t*>(fields[at + 1].where);
    if (*bytes < 2) return;
    pointer = static_cast<char*>(pointer) + 1;
    *bytes -= 1;
  } else {
    pointer = nullptr;
  }
  std::memcpy(fields[at].where, &pointer, sizeof pointer);
}

Panels panels;

void spoil_panels(Random& random, const Field& field) {
  auto* packed = static_cast<hff_input*>(field.where);
  if (!packed->data || packed->bytes < 64) return;  // spoilt already
  if (reinterpret_cast<uintptr_t>(packed->data) % 64) return;
  panels.spoil(packed, random.chance(0.8) ? random.range(0, kHeader - 1)
                                          : random.range(0, packed->bytes - 1));
}

void spoil_field(Random& random, std::vector<Field>& fields, size_t at, bool* cell_changed) {
  const Field& field = fields[at];
  auto* size = static_cast<int64_t*>(field.where);
  auto* small = static_cast<int32_t*>(field.where);
  switch (field.kind) {
    case Field::kSize:
      *size = hostile_size(random, *size);
      break;
    case Field::kBytes:
      *size = hostile_bytes(random, *size);
      break;
    case Field::kEnum:
      *small = random.pick<int32_t>({-1, 0, 1, 2, 3, 4, 5, 6, 99, INT32_MAX, INT32_MIN});
      break;
    case Field::kThreads:
      *small = random.pick<int32_t>({0, -1, 2, INT32_MIN, INT32_MAX, 100000});
      break;
    case Field::kPointer:
      spoil_pointer(random, fields, at);
      break;
    case Field::kFloat: {
      const float value =
          random.pick({std::nanf(""), HUGE_VALF, -HUGE_VALF, -1.0f, 0.0f, 1e-42f, 3e38f});
      std::memcpy(field.where, &value, sizeof value);
      break;
    }
    case Field::kDouble: {
      const double value =
          random.pick({std::nan(""), HUGE_VAL, -HUGE_VAL, -1.0, 0.0, 1e-310, 1.0, 1.5, 1e300});
      std::memcpy(field.where, &value, sizeof value);
      break;
    }
    case Field::kPanels:
      spoil_panels(random, field);
      break;
    case Field::kStructSize: {
      auto* bytes = static_cast<uint64_t*>(field.where);
      *bytes = random.pick<uint64_t>(
          {0, 1, *bytes - 1, *bytes + 1, *bytes - 8, *bytes + 8, UINT64_MAX, 1ull << 32});
      break;
    }
    case Field::kCell:
      *cell_changed = true;
      // initial lengths are 0 .. 9, capacities up to 21
      *size =
          random.pick<int64_t>({-1, INT64_MIN, INT64_MAX, 5, 12, 40, INT64_MAX - 1, 1ll << 32, 0});
  }
}

struct Base {
  std::unique_ptr<Random> random;
  std::unique_ptr<Case> c;
  std::vector<char> sealed, expected;  // outputs before and after a good call
  std::string failure;
  bool good = true;  // the call without spoilt fields succeeds
};

// Ids, or positions, outside their table; the spoilt calls then start from a call that is refused,
// or reads no index.
std::unique_ptr<Base> hostile_indices(std::unique_ptr<Base> base) {
  Random& random = *base->random;
  const Indices spoilt = random.pick(base->c->indices);
  const int64_t which =
      random.range(0, 2);  // all, only the first, only the last: these are never gaps
  for (int64_t i = 0; i < spoilt.array.count; ++i) {
    if ((which == 1 && i > 0) || (which == 2 && i + 1 < spoilt.array.count)) continue;
    const int64_t value = hostile_index(random, spoilt.limit);
    std::memcpy(spoilt.array.data + 8 * i, &value, 8);
  }
  base->c->seal();
  base->sealed = base->c->arena.outputs();
  const hff_status status = base->c->call(1);
  base->expected = base->c->arena.outputs();
  base->good = status == HFF_OK;
  if (status && status != HFF_OUT_OF_RANGE)
    base->failure = "a hostile index gives status " + std::to_string(status);
  if (status && !base->c->arena.outputs_as_sealed())
    base->failure = "a hostile index changed outputs";
  if (!status && spoilt.read) base->failure = "a hostile index was taken";
  base->c->restore();
  return base;
}

std::unique_ptr<Base> make_base(const Options& options, uint64_t seed) {
  auto base = std::make_unique<Base>();
  base->random = std::make_unique<Random>(seed);
  Design design;
  design.size = Size::kTiny;
  const Kernel& kernel = pick_kernel(*base->random, options);
  base->c = kernel.make(*base->random, design);
  if (!on_device() && base->c->chosen.next && base->random->chance(0.5))
    base->c->chosen.sampling = Sampling::random(*base->random, base->c->independent_rows());
  if (!base->c->indices.empty() && base->random->chance(0.2))
    return hostile_indices(std::move(base));
  base->c->seal();
  base->sealed = base->c->arena.outputs();
  base->failure = call_checked(*base->c, 0, base->c->independent_rows(), 1);
  base->expected = base->c->arena.outputs();
  base->c->restore();
  return base;
}

// One call with 0 to 4 spoilt fields.
std::string spoilt_call(Base& base, Random& random, std::string* what,
                        std::map<hff_status, int64_t>* statuses) {
  int64_t* cell = nullptr;
  int64_t cell_value = 0;
  const int64_t changes = random.chance(0.03) ? 0 : random.pick<int64_t>({1, 1, 1, 2, 2, 3, 4});
  const auto begin = std::chrono::steady_clock::now();
  const hff_status status = base.c->call_changed([&](std::vector<Field>& fields) {
    for (int64_t n = 0; n < changes; ++n) {
      const size_t at = static_cast<size_t>(random.next() % fields.size());
      bool cell_changed = false;
      spoil_field(random, fields, at, &cell_changed);
      if (cell_changed) cell = static_cast<int64_t*>(fields[at].where), cell_value = *cell;
      *what += std::string(*what == "" ? "" : ", ") + fields[at].name;
      if (fields[at].kind == Field::kSize)
        *what += " " + std::to_string(*static_cast<int64_t*>(fields[at].where));
    }
  });
  panels.clear();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  ++(*statuses)[status];
  if (took.count() > 1.0) return "took " + std::to_string(took.count()) + " s";
  if (status < HFF_OK || status >= HFF_INTERNAL)
    return "status " + std::to_string(status) + ": " + hff_last_error();
  if (!base.c->arena.canaries_intact()) return "wrote outside an output buffer";
  if (status == HFF_OK) {
    return changes == 0 && base.c->arena.outputs() != base.expected
               ? "an unspoilt call gives other bits"
               : "";
  }
  if (changes == 0 && base.good)
    return std::string("an unspoilt call was refused: ") + hff_last_error();
  if (!hff_last_error() || !*hff_last_error()) return "refused without a sentence";
  if (cell && *cell != cell_value) return "refused and advanced a cache length";
  if (cell) {  // put the length back before comparing
    for (const Buffer& buffer : base.c->arena.buffers()) {
      if (buffer.data == reinterpret_cast<char*>(cell))
        std::memcpy(cell, buffer.initial.data(), sizeof *cell);
    }
  }
  return base.c->arena.outputs() == base.sealed ? "" : "refused and changed an output";
}

// Missing top-level structs.
bool run_null(const Options& options, const std::string& isa) {
  Tally tally(options, "null", "row 8 null structs", isa);
  hff_call call = {};
  hff_model model = {};
  hff_cache cache = {};
  hff_block block = {};
  hff_linear linear = {};
  hff_norm norm = {};
  hff_model_io model_io = {};
  hff_block_io block_io = {};
  hff_linear_io linear_io = {};
  hff_norm_io norm_io = {};
  hff_attend_io attend_io = {};
  hff_attend_plan plan = {};
  for (unsigned given = 0; given < 16; ++given) {
    const auto pass = [given](unsigned bit, auto* pointer) {
      return given >> bit & 1 ? pointer : nullptr;
    };
    const hff_status statuses[] = {
        hff_model_forward(pass(0, &call), pass(1, &model), pass(2, &cache), pass(3, &model_io)),
        hff_block_forward(pass(0, &call), pass(1, &block), pass(2, &cache), pass(3, &block_io)),
        hff_linear_forward(pass(0, &linear), pass(1, &linear_io)),
        hff_norm_forward(pass(0, &norm), pass(1, &norm_io)),
        hff_attend(pass(0, &attend_io)),
        hff_plan_attend(pass(0, &attend_io), pass(1, &plan))};
    for (const hff_status status : statuses) {
      tally.begin(given, "");
      tally.end(status == HFF_INVALID
                    ? ""
                    : "status " + std::to_string(status) + ", expected HFF_INVALID");
    }
  }
  for (int given = 1; given < 7; ++given) {  // all three of OpenMP's functions, or none
    const auto pass = [given, &call](int bit) {
      return given >> bit & 1 ? static_cast<void*>(&call) : nullptr;
    };
    tally.begin(static_cast<uint64_t>(given), "");
    tally.end(hff_use_openmp(pass(0), pass(1), pass(2)) == HFF_INVALID
                  ? ""
                  : "hff_use_openmp took a part");
  }
  return tally.print();
}

}  // namespace

bool run_fuzz(const Options& options, const std::string& isa) {
  const bool null_clean = run_null(options, isa);
  Tally tally(options, "fuzz", "row 8 spoilt structs", isa);
  std::unique_ptr<Base> base;
  std::map<hff_status, int64_t> statuses;
  for (int64_t i = 0; i < options.count(100000); ++i) {
    const uint64_t seed = options.seed + static_cast<uint64_t>(i);
    tally.begin(seed, options.kernels().size() == 1 ? options.kernels()[0]->name : "");
    if (!base || seed % kTrialsPerBase == 0) base = make_base(options, seed / kTrialsPerBase);
    Random random(seed);
    std::string what;
    std::string failure =
        base->failure.empty() ? spoilt_call(*base, random, &what, &statuses) : base->failure;
    base->c->restore();
    if (!failure.empty()) {
      tally.describe("spoilt " + what + "; " + base->c->kernel() + " " + base->c->shape());
      base = make_base(options, seed / kTrialsPerBase);
    }
    tally.end(failure);
  }
  const bool clean = tally.print();
  std::printf("     statuses:");
  for (const auto& [status, count] : statuses) std::printf(" %d: %" PRId64, status, count);
  std::printf("\n");
  return run_refusals(options, isa) && null_clean && clean;
}

}  // namespace hff_test

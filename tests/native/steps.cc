// Row 16, steps: several in one call give the tokens, logits and caches, to the bit, of as
// many calls of one step each; where an allocation fails on the way, no cache is longer.
#include <algorithm>
#include <cstring>
#include <thread>

#include "trial.h"

// Exported by builds with -DHFF_FAULTS only.
extern "C" __attribute__((weak)) void hff_fault_allocation(int64_t k);

namespace hff_test {
namespace {

constexpr int64_t kMostSteps = 6;

// The first case from `random` with room for two steps.
std::unique_ptr<Case> draw_steps(Random& random) {
  for (;;) {
    Design design;
    design.size = random.chance(0.5) ? Size::kTiny : Size::kNormal;
    design.room = random.range(1, kMostSteps);
    auto c = make_model(random, design);
    if (c->most_steps() > 1) return c;
  }
}

std::string told(hff_status status) {
  return status == HFF_OK ? "" : "status " + std::to_string(status) + ": " + hff_last_error();
}

// The k-th allocation fails, for every k that there is.
std::string fail_allocations(Case& c, int64_t steps) {
  for (int64_t k = 1; k < 100; ++k) {
    c.restore();
    hff_status status = HFF_OK;
    std::vector<int64_t> tokens;
    std::thread([&] {
      hff_fault_allocation(k);
      status = c.call_steps(steps, true, 2, &tokens);
      hff_fault_allocation(0);
    }).join();
    if (status == HFF_OK) return k > steps ? "" : "fewer allocations than steps";
    if (status != HFF_OUT_OF_MEMORY)
      return "a failed allocation gives status " + std::to_string(status);
    for (size_t i = 0; i < c.lengths.size(); ++i) {
      for (const Buffer& buffer : c.arena.buffers()) {
        if (buffer.data == c.lengths[i].data && std::memcmp(buffer.data, buffer.initial.data(), 8))
          return "allocation " + std::to_string(k) + " failed and a cache is longer";
      }
    }
  }
  return "allocations without end";
}

}  // namespace

bool run_steps(const Options& options, const std::string& isa) {
  Tally tally(options, "steps", "row 16 steps: one call, or a call each", isa);
  for (int64_t i = 0; i < options.count(150); ++i) {
    const uint64_t seed = options.seed + static_cast<uint64_t>(i);
    Random random(seed);
    tally.begin(seed, "");
    const auto c = draw_steps(random);
    const int64_t steps = random.range(2, std::min(kMostSteps, c->most_steps()));
    if (random.chance(0.5))
      c->chosen.sampling = Sampling::random(random, c->independent_rows() * steps);
    tally.describe(std::to_string(steps) + (c->chosen.sampling.uniforms.empty() ? "" : " drawn") +
                   " steps, model " + c->shape());
    c->seal();
    std::vector<int64_t> apart, together;
    std::string failure = told(c->call_steps(steps, false, 1, &apart));
    const std::vector<char> expected = c->arena.outputs();
    c->restore();
    if (failure.empty())
      failure = told(c->call_steps(steps, true, random.pick({1, 2, 3}), &together));
    if (failure.empty()) failure = c->misdrawn;
    if (failure.empty() && together != apart) failure = "other tokens than one at a time";
    if (failure.empty() && c->arena.outputs() != expected)
      failure = "other logits or caches than one at a time";
    if (failure.empty() && !c->arena.canaries_intact()) failure = "wrote outside an output buffer";
    c->restore();
    if (failure.empty() && told(c->call_steps(c->most_steps() + 1, true, 1, &together)).empty())
      failure = "took a step more than there is room for";
    if (failure.empty() && !c->arena.outputs_as_sealed()) failure = "refused and changed an output";
    if (failure.empty() && hff_fault_allocation) failure = fail_allocations(*c, steps);
    tally.end(failure);
  }
  return tally.print();
}

}  // namespace hff_test

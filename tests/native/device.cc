#include "device.h"

#include <cstring>

#include "buffers.h"

#if defined(HFF_PORT_HOST)
#include "cuda/program.h"

extern "C" {
void hff_emulate(int32_t arch, int32_t sms, int32_t shared_bytes, int32_t whole_team,
                 uint64_t seed);
const char* hff_emulation_report(void);
}
#endif

namespace hff_test {
namespace {

bool selected = false;
Device current;

#if defined(HFF_PORT_HOST)

constexpr int64_t kCounters = sizeof(hff::cuda::Counters);  // zero between calls

// One workspace for all calls, each at its end.
struct Workspace {
  char* pages = nullptr;
  int64_t page_bytes = 0;
  char* data = nullptr;
  int64_t bytes = 0;

  void take(int64_t wanted) {
    if (wanted > page_bytes) {
      page_bytes = PagePool::rounded(wanted);
      pages = PagePool::acquire(page_bytes);  // the one before stays: there are few
    }
    bytes = wanted;
    data = pages + page_bytes - wanted;
    std::memset(pages, kCanary, static_cast<size_t>(page_bytes - wanted));
    std::memset(data, 0xFF, static_cast<size_t>(wanted));
    std::memset(data, 0, kCounters);
  }
  bool edge_intact() const {
    return std::all_of(pages, data,
                       [](char c) { return static_cast<unsigned char>(c) == kCanary; });
  }
} workspace;

#endif

}  // namespace

bool on_device() { return selected; }
Device& device() { return current; }

#if defined(HFF_PORT_HOST)

bool select_isa(const std::string& isa) {
  selected = isa == "cuda";
  return selected || hff_select_isa(isa.c_str()) == HFF_OK;
}

void draw_device(Random& random) {
  if (!selected) return;
  constexpr int32_t kArchs[][2] = {{800, 166912}, {860, 101376},  {890, 101376},
                                   {900, 232448}, {1000, 232448}, {1200, 101376}};
  const auto& drawn = kArchs[random.range(0, 5)];
  current.arch = drawn[0], current.shared_bytes = drawn[1];
  current.sms = static_cast<int32_t>(random.range(1, 9));
  current.plan = random.pick<int32_t>({HFF_PLAN_TOKEN, HFF_PLAN_CHAIN, HFF_PLAN_AUTO});
  current.whole_team = current.sms <= 2 && random.chance(0.5);
  current.seed = random.next();
}

std::string describe_device() {
  if (!selected) return "";
  constexpr const char* kPlans[] = {"auto", "chain", "token"};
  return "sm_" + std::to_string(current.arch / 10) + ", " + std::to_string(current.sms) +
         " SMs, plan " + kPlans[current.plan] + (current.whole_team != 0 ? ", all warps: " : ": ");
}

hff_status place(hff_call* call, const hff_model& model) {
  if (!selected) return HFF_OK;
  hff_emulate(current.arch, current.sms, current.shared_bytes, current.whole_team, current.seed++);
  call->device = HFF_DEVICE_CUDA;
  call->plan = current.plan;
  const int64_t bytes = hff_workspace_bytes(call, &model);
  if (bytes == 0) return HFF_UNSUPPORTED;
  workspace.take(bytes);
  call->workspace = {workspace.data, workspace.bytes};
  return HFF_OK;
}

std::string check_device() {
  if (!selected) return "";
  const std::string report = hff_emulation_report();
  if (!report.empty()) return report;
  if (!workspace.edge_intact()) return "wrote before the workspace";
  for (int64_t i = 0; i < kCounters; ++i) {
    if (workspace.data[i] != 0)
      return "byte " + std::to_string(i) + " of the workspace's counters is not zero again";
  }
  return "";
}

#else

bool select_isa(const std::string& isa) { return hff_select_isa(isa.c_str()) == HFF_OK; }
void draw_device(Random&) {}
std::string describe_device() { return ""; }
hff_status place(hff_call*, const hff_model&) { return HFF_OK; }
std::string check_device() { return ""; }

#endif

hff_status place(hff_call* call, const hff_block& block) {
  hff_model model = {};
  model.struct_size = sizeof model;
  model.hidden = block.hidden;
  model.blocks = &block;
  model.block_count = 1;
  return place(call, model);
}

}  // namespace hff_test

// Chooses the instruction set once, and holds what all of them share: scratch, huge pages, the read
// stream, errors.
#include "backend.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/arena.h"
#include "cpu/features.h"
#include "cpu/team.h"

namespace hff {

#define HFF_DECLARE_ISA(isa)     \
  namespace isa {                \
  extern const Backend kBackend; \
  const char* absent();          \
  }
HFF_DECLARE_ISA(scalar)
HFF_DECLARE_ISA(avx2)
HFF_DECLARE_ISA(avx512)
HFF_DECLARE_ISA(avx512_bf16)
HFF_DECLARE_ISA(amx)
namespace amx {
bool tiles_checked();
}
#if defined(HFF_FAULTS)
HFF_DECLARE_ISA(amx_emulated)
#endif

namespace {

struct Isa {
  const char* name;
  const Backend* backend;
  const char* (*absent)();  // from this build
  const char* (*lacked)();  // by this machine

  // Why it cannot be had; null: it can.
  const char* missing() const {
    const char* why = absent();
    return why != nullptr ? why : lacked();
  }
};

const char* lacks_nothing() { return nullptr; }

// Virtual machines have been seen to advertise tiles without having them: tried, once.
const char* lacks_working_tiles() {
  if (lacks_amx() != nullptr) return lacks_amx();
  static const bool checked = amx::tiles_checked();
  return checked ? nullptr : "the AMX tiles of this CPU compute wrong values";
}

const Isa kIsas[] = {
    {"scalar", &scalar::kBackend, scalar::absent, lacks_nothing},
    {"avx2", &avx2::kBackend, avx2::absent, lacks_avx2},
    {"avx512", &avx512::kBackend, avx512::absent, lacks_avx512},
    {"avx512_bf16", &avx512_bf16::kBackend, avx512_bf16::absent, lacks_avx512_bf16},
#if defined(HFF_FAULTS)
    {"amx_emulated", &amx_emulated::kBackend, amx_emulated::absent, lacks_avx512_bf16},
#endif
    {"amx", &amx::kBackend, amx::absent, lacks_working_tiles}};
constexpr int kIsaCount = sizeof(kIsas) / sizeof(kIsas[0]);

std::atomic<const Isa*> g_isa{nullptr};
thread_local char t_error[512] = "";

const Isa* best_isa() {
  const Isa* best = &kIsas[0];
  for (const Isa& isa : kIsas) {
    if (std::strcmp(isa.name, "amx_emulated") != 0 && isa.missing() == nullptr) best = &isa;
  }
  return best;
}

struct ScratchBlock {
  void* base = nullptr;
  int64_t bytes = 0, asked = 0;
  ~ScratchBlock() { std::free(base); }
};
thread_local ScratchBlock t_scratch;

#if defined(HFF_FAULTS)
std::atomic<int64_t> g_fail_allocation{0};
#endif

}  // namespace

hff_status fail(hff_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(t_error, sizeof(t_error), format, arguments);
  va_end(arguments);
  return status;
}

void* thread_scratch(int64_t bytes) {
#if defined(HFF_FAULTS)
  if (g_fail_allocation.load() > 0 && g_fail_allocation.fetch_sub(1) == 1) return nullptr;
#endif
  t_scratch.asked = bytes;
  if (t_scratch.base != nullptr && t_scratch.bytes >= bytes) return t_scratch.base;
  const Size rounded = padded(Size(bytes < 4096 ? 4096 : bytes));
  void* base =
      rounded.ok() ? std::aligned_alloc(64, static_cast<size_t>(rounded.value())) : nullptr;
  if (base == nullptr) return nullptr;
  std::free(t_scratch.base);
  t_scratch.base = base;
  t_scratch.bytes = rounded.value();
  return base;
}

void trim_thread_scratch(int64_t most) {
  if (t_scratch.bytes <= most) return;
  std::free(t_scratch.base);
  t_scratch.base = nullptr;
  t_scratch.bytes = 0;
}

// Every HFF_SAMPLED_ROWS-th row by one line of it, each word mixed by a multiplication. The lines
// lie pages apart: those of kAheadRows sampled rows are under way at a time.
uint64_t fingerprint(const hff_linear& l, int64_t size, int64_t phase, uint64_t sum) {
  constexpr int64_t kLine = 64, kAheadRows = 24;
  constexpr uint64_t kMix = 0x9e3779b97f4a7c15;
  const int64_t bytes = l.cols * size, lines = (bytes - 1) / kLine + 1;
  const char* rows = static_cast<const char*>(l.weight.data);
  const auto offset = [&](int64_t r) { return (phase / HFF_SAMPLED_ROWS + r) % lines * kLine; };
  const auto fetch = [&](int64_t r) {
    if (r < l.rows) __builtin_prefetch(rows + r * l.row_stride * size + offset(r));
  };
  const int64_t first = phase % HFF_SAMPLED_ROWS;
  for (int64_t i = 0; i < kAheadRows; ++i) fetch(first + i * HFF_SAMPLED_ROWS);
  for (int64_t r = first; r < l.rows; r += HFF_SAMPLED_ROWS) {
    fetch(r + kAheadRows * HFF_SAMPLED_ROWS);
    const int64_t at = offset(r), left = bytes - at;
    const char* from = rows + r * l.row_stride * size + at;
    uint64_t words[kLine / 8] = {};
    if (left >= kLine) {
      std::memcpy(words, from, kLine);
    } else {
      std::memcpy(words, from, static_cast<size_t>(left));
    }
    uint64_t line = 0;
    for (const uint64_t word : words) line = (line ^ word) * kMix;
    sum = (sum ^ line ^ line >> 32) * kMix;
  }
  return sum;
}

const Backend* cpu_backend() {
  if (hff_isa() == nullptr) return nullptr;
  return g_isa.load(std::memory_order_acquire)->backend;
}

}  // namespace hff

extern "C" {

const char* hff_last_error(void) { return hff::t_error; }

int64_t hff_scratch_bytes(void) { return hff::t_scratch.asked; }

const char* hff_isa_name(int32_t index, const char** reason) {
  if (index < 0 || index >= hff::kIsaCount) return nullptr;
  if (reason != nullptr) *reason = hff::kIsas[index].missing();
  return hff::kIsas[index].name;
}

hff_status hff_select_isa(const char* name) {
  if (name == nullptr) name = std::getenv("HF_FUSION_ISA");
  if (name == nullptr || *name == '\0') {
    hff::g_isa.store(hff::best_isa(), std::memory_order_release);
    return HFF_OK;
  }
  for (const hff::Isa& isa : hff::kIsas) {
    if (std::strcmp(isa.name, name) != 0) continue;
    const char* missing = isa.missing();
    if (missing != nullptr) {
      return hff::fail(HFF_UNSUPPORTED, "instruction set %s was asked for, but %s", name, missing);
    }
    hff::g_isa.store(&isa, std::memory_order_release);
    return HFF_OK;
  }
  return hff::fail(
      HFF_UNSUPPORTED,
      "instruction set '%.64s' is unknown; expected scalar, avx2, avx512, avx512_bf16 or amx",
      name);
}

const char* hff_isa(void) {
  const hff::Isa* isa = hff::g_isa.load(std::memory_order_acquire);
  if (isa == nullptr) {
    if (hff_select_isa(nullptr) != HFF_OK) return nullptr;
    isa = hff::g_isa.load(std::memory_order_acquire);
  }
  return isa->name;
}

hff_status hff_use_openmp(void* parallel, void* thread_num, void* num_threads) {
  if (parallel == nullptr && thread_num == nullptr && num_threads == nullptr) {
    hff::use_openmp(nullptr);
    return HFF_OK;
  }
  if (parallel == nullptr || thread_num == nullptr || num_threads == nullptr) {
    return hff::fail(HFF_INVALID, "hff_use_openmp takes three functions or none");
  }
  hff::OpenMp openmp;
  std::memcpy(&openmp.parallel, &parallel, sizeof(parallel));
  std::memcpy(&openmp.thread, &thread_num, sizeof(thread_num));
  std::memcpy(&openmp.width, &num_threads, sizeof(num_threads));
  hff::use_openmp(&openmp);
  return HFF_OK;
}

int64_t hff_huge_pages(const void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kHuge = 2 << 20;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, Linux 6.1
  if (data == nullptr || bytes < kHuge) return 0;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~uintptr_t(kHuge - 1);
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~uintptr_t(kHuge - 1);
  if (end <= begin) return 0;
  int64_t backed = 0;
  for (uintptr_t at = begin; at < end; at += kHuge) {
    if (madvise(reinterpret_cast<void*>(at), kHuge, kCollapse) == 0)
      backed += kHuge;
    else if (backed == 0)
      return 0;  // not to be had here: do not ask again for every page
  }
  return backed;
#else
  (void)data;
  (void)bytes;
  return 0;
#endif
}

double hff_read_stream(const void* data, int64_t bytes, int32_t threads) {
  const hff::Backend* backend = hff::cpu_backend();
  if (data == nullptr || bytes <= 0 || threads < 1 || backend == nullptr) return 0.0;
  timespec before, after;
  clock_gettime(CLOCK_MONOTONIC, &before);
  backend->read_stream(data, bytes, threads);
  clock_gettime(CLOCK_MONOTONIC, &after);
  return static_cast<double>(after.tv_sec - before.tv_sec) +
         1e-9 * static_cast<double>(after.tv_nsec - before.tv_nsec);
}

#if defined(HFF_FAULTS)
// The k-th scratch request from now fails; 0 disarms.
HFF_API void hff_fault_allocation(int64_t k) { hff::g_fail_allocation.store(k); }
#endif

}  // extern "C"

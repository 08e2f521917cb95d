// The table a back end fills. abi.cc has validated every argument; a null entry means unsupported.
#pragma once

#include "include/hf_fusion.h"

namespace hff {

struct Backend {
  // caches, or a cache, may be null: nothing is kept
  hff_status (*model)(const hff_call&, const hff_model&, const hff_cache*, const hff_model_io&);
  hff_status (*block)(const hff_call&, const hff_block&, const hff_cache*, const hff_block_io&);
  hff_status (*linear)(const hff_linear&, const hff_linear_io&);
  hff_status (*norm)(const hff_norm&, const hff_norm_io&);
  int64_t (*packed_bytes)(int32_t dtype, int32_t precision, int64_t rows, int64_t cols);
  // Whether linear.packed, at least 64 bytes, starts as this back end's packing of linear does.
  bool (*packed_fits)(const hff_linear&, int32_t dtype, int32_t precision);
  hff_status (*pack)(const hff_linear&, int32_t dtype, int32_t precision, int32_t threads,
                     void* out);
  void (*read_stream)(const void* data, int64_t bytes, int32_t threads);
  // CUDA: hff_workspace_bytes; 0 after fail()
  int64_t (*workspace_bytes)(const hff_call&, const hff_model&);
  hff_status (*attend)(const hff_attend_io&);
  hff_status (*plan_attend)(const hff_attend_io&, hff_attend_plan* out);  // all but struct_size
};

// The CPU back end under the chosen instruction set; chooses on first use. Null if HF_FUSION_ISA
// cannot be had.
const Backend* cpu_backend();

// The CUDA back end, and what it finds; null, and HFF_UNSUPPORTED, with the reason in
// hff_last_error(), where this build has none or the machine no driver or device.
const Backend* cuda_backend(int32_t ordinal);
hff_status describe_cuda(int32_t ordinal, hff_device* out);

// `sum` mixed with a sample of a matrix of elements of `size` bytes, as hff_fingerprint says.
uint64_t fingerprint(const hff_linear& linear, int64_t size, int64_t phase, uint64_t sum);

// Keeps one sentence for hff_last_error() of this thread and returns `status`.
hff_status fail(hff_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// As an argument of fail().
inline long long shown(int64_t value) { return static_cast<long long>(value); }

}  // namespace hff

// Returns from a function of hff_status where `expression` fails.
#define HFF_TRY(expression)                  \
  do {                                       \
    const hff_status status_ = (expression); \
    if (status_ != HFF_OK) return status_;   \
  } while (0)

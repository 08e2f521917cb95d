// A build without CUDA: every question about it is answered with the reason, HFF_CUDA_ABSENT, that
// CMake found.
#include "backend.h"

namespace hff {
namespace {

hff_status absent() {
  return fail(HFF_UNSUPPORTED, "this build has no CUDA back end: %s", HFF_CUDA_ABSENT);
}

}  // namespace

const Backend* cuda_backend(int32_t) {
  absent();
  return nullptr;
}

hff_status describe_cuda(int32_t, hff_device*) { return absent(); }

}  // namespace hff

// A build without nvcc: every question about CUDA is answered with the reason.
#include "backend.h"

namespace hff {
namespace {

hff_status absent() {
  return fail(HFF_UNSUPPORTED,
              "this build has no CUDA back end: nvcc was not found when it was built");
}

}  // namespace

const Backend* cuda_backend(int32_t) {
  absent();
  return nullptr;
}

hff_status describe_cuda(int32_t, hff_device*) { return absent(); }

}  // namespace hff

#include "cuda/kernels.h"

namespace hff {
namespace cuda {
namespace {
HFF_INSTANTIATE(attention_up, ClusterParams)
}  // namespace

port::Kernel<ClusterParams> cluster_kernel(int32_t dtype, int batch, bool bulk) {
  return of_dtype(dtype, batch, bulk);
}

}  // namespace cuda
}  // namespace hff

// These functions are all there are: one that waits for a device or allocates on it, which a
// capture forbids, would not link.
#include "runtime.h"

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>

namespace hff_test {

Runtime& runtime() {
  static Runtime one = {};
  return one;
}

namespace {

cudaError_t answer(cudaError_t error) {
  if (error != cudaSuccess) runtime().error = error;
  return error;
}

int index_of(const void* kernel) {
  return static_cast<int>(static_cast<const char*>(kernel) - runtime().kernels);
}

const cudaLaunchAttributeValue* find(const cudaLaunchConfig_t& c, cudaLaunchAttributeID id) {
  for (unsigned i = 0; i < c.numAttrs; ++i) {
    if (c.attrs[i].id == id) return &c.attrs[i].val;
  }
  return nullptr;
}

}  // namespace
}  // namespace hff_test

using namespace hff_test;  // NOLINT

extern "C" {

// what nvcc's own start-up calls
char __cudaInitModule(void**) { return 0; }
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

const char* cudaGetErrorString(cudaError_t) { return "no luck"; }
cudaError_t cudaGetLastError() {
  const int error = runtime().error;
  runtime().error = cudaSuccess;
  return static_cast<cudaError_t>(error);
}
cudaError_t cudaGetDevice(int* device) {
  *device = runtime().current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  runtime().current = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = runtime().driver ? 2 : 0;
  return answer(runtime().driver ? cudaSuccess : cudaErrorInsufficientDriver);
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  std::memset(p, 0, sizeof *p);
  std::strcpy(p->name, "recorder");
  p->major = runtime().arch / 10, p->minor = runtime().arch % 10, p->multiProcessorCount = 132;
  p->sharedMemPerBlockOptin = 232448, p->sharedMemPerMultiprocessor = 233472;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  *value = name == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 232448 : 132;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute name, int value) {
  if (name == cudaFuncAttributeMaxDynamicSharedMemorySize) runtime().room[index_of(kernel)] = value;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*, const cudaLaunchConfig_t* c) {
  const auto* cluster = find(*c, cudaLaunchAttributeClusterDimension);
  *count = static_cast<int>(cluster->clusterDim.x) <= runtime().resident ? 1 : 0;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int, size_t) {
  *count = 1;
  return cudaSuccess;
}

// Prints: kernel, device, stream, CTAs, and what is out of the ordinary.
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* kernel, void** params) {
  constexpr const char* kNames[kKernels] = {"token", "phase", "attend_heads", "attention_up"};
  if (runtime().launches == 0) return answer(static_cast<cudaError_t>(runtime().refusal));
  --runtime().launches;
  const int index = index_of(kernel), room = runtime().room[index];
  std::printf("%s %d %p %u", kNames[index], runtime().current, static_cast<void*>(c->stream),
              c->gridDim.x);
  const auto* cluster = find(*c, cudaLaunchAttributeClusterDimension);
  const auto* cooperative = find(*c, cudaLaunchAttributeCooperative);
  const auto* dependent = find(*c, cudaLaunchAttributeProgrammaticStreamSerialization);
  if (cluster != nullptr) std::printf(" clusters of %u", cluster->clusterDim.x);
  if (cooperative != nullptr && cooperative->cooperative != 0) std::printf(" cooperative");
  if (dependent != nullptr && dependent->programmaticStreamSerializationAllowed != 0)
    std::printf(" dependent");
  if (runtime().counts != nullptr && runtime().counts(index, params[0])) std::printf(" counts");
  if (c->dynamicSmemBytes > static_cast<size_t>(room > 49152 ? room : 49152))
    std::printf(" without its shared memory");
  std::printf("\n");
  return cudaSuccess;
}
}

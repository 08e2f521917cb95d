// The host side of port.h on CUDA.
#pragma once

namespace hff {
namespace port {
inline namespace on_cuda {

inline hff_status cuda_failed(const Launch& launch, const char* what, cudaError_t error) {
  cudaGetLastError();  // so that a later caller does not find this error and take it for its own
  const bool absent =
      error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
  return fail(absent ? HFF_UNSUPPORTED : HFF_INTERNAL,
              "%s (%d blocks of %d threads, clusters of %d, %d bytes shared): %s: %s", launch.name,
              launch.grid, launch.threads, launch.cluster, launch.shared_bytes, what,
              cudaGetErrorString(error));
}

// `attributes` has room for three.
inline cudaLaunchConfig_t launch_config(const Launch& launch, cudaLaunchAttribute* attributes) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(launch.grid));
  config.blockDim = dim3(unsigned(launch.threads));
  config.dynamicSmemBytes = size_t(launch.shared_bytes);
  config.stream = static_cast<cudaStream_t>(launch.stream);
  config.attrs = attributes;
  if (launch.cluster > 1) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = unsigned(launch.cluster), a.val.clusterDim.y = a.val.clusterDim.z = 1;
  }
  if (launch.cooperative) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeCooperative;
    a.val.cooperative = 1;
  }
  if (launch.dependent) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  return config;
}

// Shared memory beyond 48 KiB and clusters beyond 8 blocks must be asked for. What is asked for is
// the function's, not the launch's: always the most, so that no thread takes from another.
inline cudaError_t opt_in(const void* kernel, const Launch& launch) {
  cudaError_t error = cudaSuccess;
  if (launch.shared_bytes > 48 * 1024) {
    int device = 0, most = 0;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  if (error == cudaSuccess && launch.cluster > 8) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return error;
}

template <class P>
hff_status launch(const Launch& launch, Kernel<P> kernel, const P& params) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = opt_in(function, launch);
  if (error != cudaSuccess) return cuda_failed(launch, "cudaFuncSetAttribute", error);
  cudaLaunchAttribute attributes[3];
  const cudaLaunchConfig_t config = launch_config(launch, attributes);
  void* arguments[] = {const_cast<P*>(&params)};
  error = cudaLaunchKernelExC(&config, function, arguments);
  return error == cudaSuccess ? HFF_OK : cuda_failed(launch, "cudaLaunchKernelExC", error);
}

template <class P>
int max_active_clusters(Kernel<P> kernel, const Launch& launch) {
  const void* function = reinterpret_cast<const void*>(kernel);
  int count = 0;
  cudaError_t error = opt_in(function, launch);
  if (error == cudaSuccess && launch.cluster > 1) {
    cudaLaunchAttribute attributes[3];
    const cudaLaunchConfig_t config = launch_config(launch, attributes);
    error = cudaOccupancyMaxActiveClusters(&count, function, &config);
  } else if (error == cudaSuccess) {
    int device = 0, sms = 0;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, function, launch.threads,
                                                            size_t(launch.shared_bytes));
    }
    count *= sms;
  }
  if (error == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

// The architectures that CMake had kernels compiled for, with a slash between.
#if !defined(HFF_CUDA_IMAGES)
#define HFF_CUDA_IMAGES "native"
#endif

// Whether one of them runs on sm_`arch`: code on its major version from its minor one on, PTX on
// all that follow, but neither elsewhere with an `a`. Of a name the launches will tell.
inline bool runs_on(int arch) {
  for (const char* at = HFF_CUDA_IMAGES; *at != '\0'; at += std::strcspn(at, "0123456789")) {
    char* kind = nullptr;
    const int own = int(std::strtol(at, &kind, 10));
    if (kind == at) return true;
    const bool same = own / 10 == arch / 10 && own <= arch;
    const bool code = *kind == 'f' || std::strncmp(kind, "-real", 5) == 0;
    if (*kind == 'a' ? own == arch : code ? same : own <= arch) return true;
    at = kind;
  }
  return false;
}

inline hff_status describe(int ordinal, Device* device) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || ordinal < 0 || ordinal >= count) {
    cudaGetLastError();
    return fail(HFF_UNSUPPORTED, "no CUDA device %d: %s, %d devices", ordinal,
                cudaGetErrorString(error), count);
  }
  cudaDeviceProp properties;
  error = cudaGetDeviceProperties(&properties, ordinal);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return fail(HFF_UNSUPPORTED, "CUDA device %d: %s", ordinal, cudaGetErrorString(error));
  }
  if (properties.major < 8) {
    return fail(HFF_UNSUPPORTED, "CUDA device %d, %s, is sm_%d%d: sm_80 is the least", ordinal,
                properties.name, properties.major, properties.minor);
  }
  if (!runs_on(properties.major * 10 + properties.minor)) {
    return fail(HFF_UNSUPPORTED, "CUDA device %d, %s, is sm_%d%d: this build has kernels for %s",
                ordinal, properties.name, properties.major, properties.minor, HFF_CUDA_IMAGES);
  }
  device->arch = properties.major * 100 + properties.minor * 10;
  device->sms = properties.multiProcessorCount;
  device->shared_limit = int(properties.sharedMemPerBlockOptin);
  device->shared_per_sm = int(properties.sharedMemPerMultiprocessor);
  std::strncpy(device->name, properties.name, sizeof(device->name) - 1);
  return HFF_OK;
}

}  // namespace on_cuda
}  // namespace port
}  // namespace hff

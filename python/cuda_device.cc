#include "cuda_device.h"

#include "flexprefill/types.h"

#if defined(FLEXPREFILL_PYTHON_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace flexprefill {

#if defined(FLEXPREFILL_PYTHON_CUDA)

namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw Error(ErrorCode::kInternal, std::string(what) + ": " + cudaGetErrorString(status));
  }
}

}  // namespace

CudaInfo cuda_info() {
  CudaInfo info;
  info.built = true;
  info.runtime = CUDART_VERSION;
  int driver = 0, count = 0;
  if (cudaDriverGetVersion(&driver) == cudaSuccess) info.driver = driver;
  if (const cudaError_t status = cudaGetDeviceCount(&count); status != cudaSuccess) {
    info.error = cudaGetErrorString(status);
    cudaGetLastError();  // a machine without a card is no error of the caller's
    return info;
  }
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, i), "cudaGetDeviceProperties");
    info.devices.push_back({properties.name, properties.major, properties.minor,
                            properties.multiProcessorCount,
                            static_cast<int64_t>(properties.totalGlobalMem)});
  }
  return info;
}

DeviceGuard::DeviceGuard(int32_t device) {
  if (device < 0) return;
  int current = 0;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current == device) return;
  check(cudaSetDevice(device), "cudaSetDevice");
  previous_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

void wait_for_stream(int32_t device, void* stream) {
  const DeviceGuard guard(device);
  check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "cudaStreamSynchronize");
}

void copy_to_host(void* to, const void* from, size_t bytes, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, on), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(on), "cudaStreamSynchronize");
}

#else

CudaInfo cuda_info() { return {}; }

// Without CUDA every call on device memory was refused before it could come here.
DeviceGuard::DeviceGuard(int32_t) {}
DeviceGuard::~DeviceGuard() = default;
void wait_for_stream(int32_t, void*) {}
void copy_to_host(void*, const void*, size_t, void*) {}

#endif

}  // namespace flexprefill

// Launching kernels, and the few things that a kernel and its launch share.
#ifndef FLEXPREFILL_SRC_CUDA_LAUNCH_CUH_
#define FLEXPREFILL_SRC_CUDA_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/cuda_check.h"

namespace flexprefill {

// The kernel's dynamic shared memory; all shared memory of our kernels is dynamic.
__device__ inline std::byte* shared_memory() {
  extern __shared__ __align__(1024) unsigned char flexprefill_shared_memory[];
  return reinterpret_cast<std::byte*>(flexprefill_shared_memory);
}

// `shared_bytes` may be up to the device's opt-in limit.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {
    cuda_check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               "shared memory of a kernel");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cuda_check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...),
             "launch of a kernel");
}

// 2^x, relative error 2^-22; -inf gives 0.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_CUDA_LAUNCH_CUH_

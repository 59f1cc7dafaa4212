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

// Whether the device starts a kernel before the one before it has ended (backend_cuda.cc): compute
// capability 9.0, for which all kernels that overlap are compiled.
bool overlaps_kernels();

namespace launch_detail {

template <typename... Parameters, typename... Arguments>
void launch(bool overlapped, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, void* stream, const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {
    cuda_check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               "shared memory of a kernel");
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = overlapped ? 1 : 0;
  cuda_check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...),
             "launch of a kernel");
}

}  // namespace launch_detail

// For a kernel without shared memory beside which one with much of it is to run: a multiprocessor
// divides its memory into L1 and shared anew only when it is empty.
template <typename... Parameters>
void leave_shared_memory(void (*kernel)(Parameters...)) {
  cuda_check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                  cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared),
             "shared memory beside a kernel");
}

// `shared_bytes` may be up to the device's opt-in limit.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  launch_detail::launch(false, kernel, grid, block, shared_bytes, stream, arguments...);
}

// As launch. Where the device can, the kernel's CTAs start when all of the kernel before
// have called start_next_kernel() or ended; that hides the time of a launch. Every thread of such a
// kernel calls await_previous_kernel() before it touches what earlier kernels of the stream write
// or read, and before it ends: so the kernels after it can rely on all that came before.
template <typename... Parameters, typename... Arguments>
void launch_overlapped(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                       void* stream, const Arguments&... arguments) {
  launch_detail::launch(overlaps_kernels(), kernel, grid, block, shared_bytes, stream,
                        arguments...);
}

__device__ inline void await_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// In the place of await_previous_kernel(), of a kernel that runs beside the one before it: that one
// calls start_next_kernel() after it has awaited all that came before, and the two touch nothing
// that the other one writes. It is enough that one CTA ends after it; the last one, which is not
// kept waiting for long.
__device__ inline void await_kernel_beside() {
  if (blockIdx.x + 1 == gridDim.x) await_previous_kernel();
}

// After await_previous_kernel(), or else the next kernel but one could meet this one.
__device__ inline void start_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// *to = value if `yes`, by an instruction under a predicate: ptxas waits for running products
// (wgmma) before a branch that a warp may not take together.
__device__ inline void store_if(bool yes, float* to, float value) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.f32 [%1], %2;\n}\n" ::"r"(
                   static_cast<int32_t>(yes)),
               "l"(__cvta_generic_to_global(to)), "f"(value)
               : "memory");
}

// 2^x, relative error 2^-22; -inf gives 0.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x), relative error 2^-22, from .5 to 2 an absolute one; below 2^-126 -inf.
__device__ inline float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_CUDA_LAUNCH_CUH_

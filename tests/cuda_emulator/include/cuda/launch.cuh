// The emulator's side of src/cuda/launch.cuh.
#ifndef FLEXPREFILL_SRC_CUDA_LAUNCH_CUH_
#define FLEXPREFILL_SRC_CUDA_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <tuple>

#include "cuda/cuda_check.h"
#include "cuda_emulator/emulator.h"
#include "cuda_emulator/runtime.h"

namespace flexprefill {

inline std::byte* shared_memory() { return cuda_emulator::shared_memory(); }

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  // The parameters are copied now, as a launch does.
  const std::tuple<Parameters...> parameters(static_cast<Parameters>(arguments)...);
  cuda_emulator::on_stream(static_cast<cudaStream_t>(stream), [=] {
    cuda_emulator::run_grid({grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes,
                            [&] { std::apply(kernel, parameters); });
  });
}

template <typename... Parameters>
void leave_shared_memory(void (*)(Parameters...)) {}

// Kernels do not overlap here; but a thread that ends without having awaited the kernel before is
// an error.
template <typename... Parameters, typename... Arguments>
void launch_overlapped(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                       void* stream, const Arguments&... arguments) {
  const std::tuple<Parameters...> parameters(static_cast<Parameters>(arguments)...);
  cuda_emulator::on_stream(static_cast<cudaStream_t>(stream), [=] {
    cuda_emulator::run_grid({grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes,
                            [&] {
                              cuda_emulator::begin_overlapped();
                              std::apply(kernel, parameters);
                              cuda_emulator::end_overlapped();
                            });
  });
}

inline void await_previous_kernel() { cuda_emulator::await_previous(); }
inline void await_kernel_beside() { cuda_emulator::await_previous(); }
inline void start_next_kernel() {}

inline void store_if(bool yes, float* to, float value) {
  if (yes) *to = value;
}

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126F ? 0.0F : y;  // results and arguments that are subnormal count as 0
}

inline float log2_approx(float x) { return std::log2(x < 0x1p-126F ? 0.0F : x); }

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_CUDA_LAUNCH_CUH_

// What launches need of the emulated CUDA runtime (runtime.cc defines its functions).
#ifndef FLEXPREFILL_TESTS_CUDA_EMULATOR_RUNTIME_H_
#define FLEXPREFILL_TESTS_CUDA_EMULATOR_RUNTIME_H_

#include <cuda_runtime_api.h>

#include <functional>

namespace cuda_emulator {

// Runs `work` now, with device memory open to it; where the stream is captured, at every launch of
// the graph instead.
void on_stream(cudaStream_t stream, std::function<void()> work);

}  // namespace cuda_emulator

#endif  // FLEXPREFILL_TESTS_CUDA_EMULATOR_RUNTIME_H_

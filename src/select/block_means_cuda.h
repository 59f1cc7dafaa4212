// Means of the key blocks on the device: for selectors that score them, and for attend's mean
// correction.
#ifndef FLEXPREFILL_SRC_SELECT_BLOCK_MEANS_CUDA_H_
#define FLEXPREFILL_SRC_SELECT_BLOCK_MEANS_CUDA_H_

#include <cstddef>
#include <cstdint>

#include "cuda/device_problem.h"

namespace flexprefill {

enum class MeanType {
  kElement,  // rounded to the call's element type
  kFloat,
};

// Fills to [problem.mean_rows, d] with the means of the blocks of `rows` (problem.k and d_qk, or
// problem.v and d_v); DeviceSequence::first_mean leads into it. The last block of a sequence has
// the mean of the keys that exist.
void block_means(const DeviceProblem& problem, const DeviceTensor& rows, int32_t d, MeanType type,
                 std::byte* to, void* stream);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_BLOCK_MEANS_CUDA_H_

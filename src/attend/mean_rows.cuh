// The mean correction on the device (BlockIndex::mean_correction): the means that a row counts the
// blocks through that it has dropped.
#ifndef FLEXPREFILL_SRC_ATTEND_MEAN_ROWS_CUH_
#define FLEXPREFILL_SRC_ATTEND_MEAN_ROWS_CUH_

#include <cstddef>
#include <cstdint>

#include "arena.h"
#include "cuda/device_problem.h"
#include "select/block_means_cuda.h"

namespace flexprefill {

// [problem.mean_rows, d_qk or d_v] in the element type; nullptr: no mean correction.
// DeviceSequence::first_mean leads into them.
struct MeanRows {
  std::byte *k = nullptr, *v = nullptr;
};

// Takes the memory if `rows` ask for it.
inline MeanRows take_mean_rows(const DeviceProblem& problem, const DeviceRows& rows, Arena& arena) {
  if (!rows.mean_correction) return {};
  const auto take = [&](int32_t d) {
    return arena.take<std::byte>(problem.mean_rows * d * sizeof(uint16_t));
  };
  std::byte* k = take(problem.d_qk);
  return {.k = k, .v = take(problem.d_v)};
}

// Fills them on the stream.
inline void make_mean_rows(const DeviceProblem& problem, const MeanRows& means, void* stream) {
  if (means.k == nullptr) return;
  block_means(problem, problem.k, problem.d_qk, MeanType::kElement, means.k, stream);
  block_means(problem, problem.v, problem.d_v, MeanType::kElement, means.v, stream);
}

// Of 64 blocks, those before block `diagonal` that a row with this word has not kept: bit j is
// block 64 * n + j.
__device__ inline uint64_t dropped_blocks_of(uint64_t kept, int32_t n, int32_t diagonal) {
  const int32_t before = diagonal - 64 * n;
  return before <= 0 ? 0 : ~kept & (~uint64_t{0} >> (before < 64 ? 64 - before : 0));
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_ATTEND_MEAN_ROWS_CUH_

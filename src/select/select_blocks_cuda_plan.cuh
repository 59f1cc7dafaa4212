// What the kernels that score blocks share: a call's parameters, and its tasks.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CUDA_PLAN_CUH_
#define FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CUDA_PLAN_CUH_

#include <cfloat>
#include <cstddef>
#include <cstdint>

#include "flexprefill/select.h"
#include "select/select_device.cuh"

namespace flexprefill {

struct BlockScores {
  // [mean_rows, d] as block_means writes them: FlashPrefill elements, MInference floats.
  const std::byte* k_means;
  const float* q_means;  // [index_rows, d]: MInference
  float* scratch;        // [CTAs, scratch_floats]
  int64_t scratch_floats;
  int32_t tile_blocks;  // query blocks of a task
  int32_t tasks;        // some of them gaps
  int32_t stages;       // of a ProductTile's ring
  int32_t pitch;        // of a row of scores in the scratch: the most key blocks
  XAttention antidiagonal;
  FlashPrefill means;

  __device__ float* own_scratch() const { return scratch + blockIdx.x * scratch_floats; }
};

// A few query blocks of one head. Tasks are numbered so that long rows come first and the heads of
// a K/V head are neighbours, which share keys in L2.
struct BlockTask {
  HeadView view;
  int32_t kv;
  int32_t first_block, blocks;  // absolute number of the first
  int32_t first_row;            // where it begins, in queries of the sequence; may be negative
  bool any;

  // tile_blocks: query blocks of a task, or a function that says it of a DeviceSequence.
  __device__ BlockTask(const SelectProblem& select, int32_t tile_blocks, int32_t task)
      : BlockTask(select, task, [&](const DeviceSequence&) { return tile_blocks; }) {}
  template <typename TileBlocks>
  __device__ BlockTask(const SelectProblem& select, int32_t task,
                       const TileBlocks& tile_blocks_of) {
    const DeviceProblem& problem = select.problem;
    const int32_t turn = task % problem.h_q;
    int32_t rest = task / problem.h_q;
    const int32_t s = rest % problem.b;
    rest /= problem.b;
    kv = turn / problem.group();
    const int32_t head = problem.q_head(kv, turn % problem.group());
    view = {s, head, s * problem.h_q + head};
    const DeviceSequence& sequence = problem.sequences[s];
    const int32_t tile_blocks = tile_blocks_of(sequence);
    const int32_t tiles = (sequence.n_q + tile_blocks - 1) / tile_blocks;
    const int32_t first = (tiles - 1 - rest) * tile_blocks;
    any = rest < tiles && select.sequences[s].probed != 0 &&
          select.kind_of(head) == HeadRule::Kind::kBlocks;
    first_block = sequence.first_q_block + first;
    blocks = sequence.n_q - first < tile_blocks ? sequence.n_q - first : tile_blocks;
    first_row = first_block * problem.block_size - sequence.first_position();
  }

  // Of query block i (absolute) among the rows of the call.
  __device__ int64_t row_number(const SelectProblem& select, int32_t i) const {
    const DeviceSequence& sequence = select.problem.sequences[view.sequence];
    return sequence.first_row + int64_t{view.head} * sequence.n_q + i - sequence.first_q_block;
  }

  // The words of query block i.
  __device__ uint64_t* row(const SelectProblem& select, int32_t i) const {
    const DeviceSequence& sequence = select.problem.sequences[view.sequence];
    return select.bits + sequence.first_word +
           (row_number(select, i) - sequence.first_row) * sequence.words_per_row;
  }
};

// The scores of a thread, multiplied by the scale unless it is above 0: then exponentials do that.
template <int kScores>
__device__ inline float scale_scores(float scale, float (&scores)[kScores]) {
  if (scale > 0) return scale;
#pragma unroll
  for (float& score : scores) score *= scale;
  return 1;
}

// The greatest in units of log2 that exponentials can be relative to: `scale` times a score may not
// be finite.
__device__ inline float scaled_max(float highest, float scale) {
  return fmaxf(highest * scale, -FLT_MAX);
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CUDA_PLAN_CUH_

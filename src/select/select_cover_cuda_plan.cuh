// What the kernels of BlockCover share: a call's parameters, and sums of exponentials.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_COVER_CUDA_PLAN_CUH_
#define FLEXPREFILL_SRC_SELECT_SELECT_COVER_CUDA_PLAN_CUH_

#include <cstddef>
#include <cstdint>

#include "select/block_rules.h"
#include "select/select_blocks_cuda_plan.cuh"
#include "select/select_blocks_cuda_rows.cuh"
#include "select/select_blocks_cuda_tile.cuh"
#include "select/select_cover_cuda.h"
#include "select/select_device.cuh"

namespace flexprefill {

using CoverTile = ProductTile<2, true>;
static_assert(kCoverAskingRows == CoverTile::kRows);

struct CoverParams {
  CoverMemory memory;
  BlockCoverRule rule;
  int32_t block_size;
  int32_t most_per_block;  // means of a block, of any sequence
  int32_t tasks;           // of the map, some of them gaps
  bool map_pools;          // the map makes the means of its queries itself; on Hopper only
  int32_t stages;          // of the ring
  int32_t slices;          // of a head's columns
  int32_t ring_bytes;      // with the resident rows
  uint32_t* drawn;         // tasks of the map that CTAs drew; 0

  // Tokens of a sequence's means, how many of them a block has, and query blocks of a task.
  __device__ int32_t pool(const DeviceSequence& sequence) const {
    return static_cast<int32_t>(cover_pool(block_size, sequence.s_kv));
  }
  __device__ int32_t per_block(const DeviceSequence& sequence) const {
    return block_size / pool(sequence);
  }
  __device__ int32_t tile_blocks(const DeviceSequence& sequence) const {
    return CoverTile::kRows / per_block(sequence);
  }

  // Query blocks that hold asking rows, at most.
  __host__ __device__ static int32_t groups(int32_t block_size) {
    return static_cast<int32_t>(kCoverAskingSpan) / block_size + 1;
  }
};

// Means lie in memory in the order in which a thread of the map on Hopper adds up its scores: of 16
// by 16 means, those of a query block and of a key block are one thread's, or a neighbour's.
constexpr int32_t kMeansTogether = 16;
__device__ inline int32_t query_place(int32_t mean) {
  return mean / kMeansTogether * kMeansTogether + mean % 2 * 8 + mean % kMeansTogether / 2;
}
__device__ inline int32_t key_place(int32_t mean) {
  return mean / kMeansTogether * kMeansTogether + mean / 2 % 2 * 8 + mean % kMeansTogether / 4 * 2 +
         mean % 2;
}
// Where a head's means begin, which have room for whole groups of 16. head: of all sequences'.
__device__ inline int64_t first_mean_of(const CoverParams& p, int64_t blocks_before, int32_t head) {
  return blocks_before * p.most_per_block + int64_t{head} * kMeansTogether;
}
__device__ inline int64_t first_key_mean(const SelectProblem& select, const CoverParams& p,
                                         int32_t s, int32_t kv) {
  const DeviceSequence& sequence = select.problem.sequences[s];
  return first_mean_of(p, sequence.first_mean + int64_t{kv} * sequence.n_kv,
                       s * select.problem.h_kv + kv);
}
__device__ inline int64_t first_query_mean(const SelectProblem& select, const CoverParams& p,
                                           int32_t s, int32_t head) {
  const DeviceSequence& sequence = select.problem.sequences[s];
  return first_mean_of(p, sequence.first_row + int64_t{head} * sequence.n_q,
                       s * select.problem.h_q + head);
}

// A head's arrays.
struct CoverHead {
  HeadView view;
  int64_t first_block;  // of arrays with an entry a key block
  int64_t first_word;

  __device__ CoverHead(const SelectProblem& select, const HeadView& head) : view(head) {
    const SelectSequence& plan = select.sequences[head.sequence];
    const DeviceSequence& sequence = select.problem.sequences[head.sequence];
    first_block = plan.first_block + static_cast<int64_t>(head.head) * sequence.n_kv;
    first_word = plan.first_word + static_cast<int64_t>(head.head) * sequence.words_per_row;
  }
};

// As scale_scores of select_blocks_cuda_plan.cuh.
__device__ inline float scale_scores(float scale, TileScores& x) {
  if (scale > 0) return scale;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (float& score : x[m][n]) score *= scale;
    }
  }
  return 1;
}

// Score (r, n, e) of a thread: row me.row0 + 16 (r / 2) + 8 (r % 2), column me.column0 + 8 n + e.
__device__ inline float& score_at(TileScores& x, int r, int n, int e) {
  return x[r / 2][n][2 * (r % 2) + e];
}
__device__ inline int32_t row_at(const TileThread& me, int r) {
  return me.row0 + 16 * (r / 2) + 8 * (r % 2);
}

// max and sum of exp2(score - max) of several parts of a row, put together.
struct RowSum {
  float max = -FLT_MAX, sum = 0;

  __device__ void add(float more_max, float more_sum) {
    const float highest = fmaxf(max, more_max);
    sum = sum * exp2_approx(max - highest) + more_sum * exp2_approx(more_max - highest);
    max = highest;
  }
  __device__ float log() const { return max + log2f(sum); }
};

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_COVER_CUDA_PLAN_CUH_

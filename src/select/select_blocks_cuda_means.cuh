// FlashPrefill's scores: each query times the mean of each key block, in the element type. A CTA
// has 128 rows of queries (one query block or several) in shared memory and walks over tiles of 128
// means.
//
// Rows go by quarters of 32, which lie in one query block. A tile leaves in the scratch
//   sums     [4, n_kv]      of each quarter, over its rows: exp2(score - the warp's greatest)
//   maxima   [4, strips]    of each quarter and strip of 64 means
// and in the end the quarters of a query block are put together and a warp decides. What bounds it:
// 128 exponentials a thread and tile beside as many products as d / 16 steps hold.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CUDA_MEANS_CUH_
#define FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CUDA_MEANS_CUH_

#include "select/probe_cuda.cuh"
#include "select/select_blocks_cuda_plan.cuh"
#include "select/select_blocks_cuda_rows.cuh"
#include "select/select_blocks_cuda_tile.cuh"

namespace flexprefill {

using MeansTile = ProductTile<2, true>;
constexpr int kQuarters = MeansTile::kRows / 32;
constexpr int kStrip = 64;

// Strips of the tiles that n_kv means fill.
__host__ __device__ inline int32_t strips_of(int32_t n_kv) {
  return (n_kv + MeansTile::kColumns - 1) / MeansTile::kColumns * (MeansTile::kColumns / kStrip);
}
// Floats of a CTA's scratch.
inline int64_t means_scratch(int32_t n_kv) { return kQuarters * (int64_t{n_kv} + strips_of(n_kv)); }

struct MeansTask {
  int32_t block_size;
  int32_t s_kv, n_kv;
  int32_t position;    // of the tile's first row
  int32_t begin, end;  // rows that have queries
  int32_t tiles;
  int32_t pitch, strips;  // of the scratch
  float *sums, *maxima;

  __device__ MeansTask(const SelectProblem& select, const BlockScores& p, const BlockTask& task) {
    const DeviceSequence& sequence = select.problem.sequences[task.view.sequence];
    block_size = select.problem.block_size;
    s_kv = sequence.s_kv;
    n_kv = sequence.n_kv;
    position = task.first_block * block_size;
    begin = task.first_row < 0 ? -task.first_row : 0;
    const int32_t left = sequence.s_q - task.first_row;
    end = left < MeansTile::kRows ? left : MeansTile::kRows;
    tiles = (task.first_block + task.blocks - 1) / MeansTile::kColumns + 1;
    pitch = p.pitch;
    strips = strips_of(p.pitch);
    sums = p.own_scratch();
    maxima = sums + int64_t{kQuarters} * pitch;
  }
  // Means that a row of the tile sees: of blocks whose last key it sees.
  __device__ int32_t seen(int32_t row) const {
    if (row < begin || row >= end) return 0;
    return position + row == s_kv - 1 ? n_kv : (position + row + 1) / block_size;
  }
  // Of the 64 rows from `row` on, the most; rows ascend in what they see, but for those that do
  // not exist.
  __device__ int32_t most_seen(int32_t row) const {
    const int32_t last = row + 63 < end ? row + 63 : end - 1;
    return last < row ? 0 : seen(last);
  }
};

// Where a tile has rows that do not see all of its means, those scores become -inf.
__device__ inline void mask_means_tile(const MeansTask& task, const TileThread& me, int32_t column,
                                       TileScores& x) {
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    const int m = r / 2, half = r % 2;
    const int32_t seen = task.seen(me.row0 + 16 * m + 8 * half) - column;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = x[m][n][2 * half + e];
        score = 8 * n + e < seen ? score : -INFINITY;
      }
    }
  }
}

// The scores of a tile, x, become sums and maxima in the scratch.
__device__ inline void finish_means_tile(const MeansTask& task, float scale, int32_t tile,
                                         TileScores& x) {
  const auto me = TileThread::of<MeansTile>();
  const int32_t first_column = tile * MeansTile::kColumns + me.first_column();
  const int32_t column = tile * MeansTile::kColumns + me.column0;
  const bool masked =
      task.seen(me.first_row()) < first_column + kStrip || me.first_row() + 64 > task.end;
  if (!(scale > 0)) {  // the greatest is looked for before the scale
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (float& score : x[m][n]) score *= scale;
      }
    }
    scale = 1;
  }
  if (masked) mask_means_tile(task, me, column, x);
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const int32_t quarter = me.first_row() / 32 + q;
    float highest = -FLT_MAX;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int m = 2 * q + r / 2, half = r % 2;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) highest = fmaxf(highest, x[m][n][2 * half + e]);
      }
    }
    // In units of log2 from here on; FLT_MAX may become infinite.
    highest = fmaxf(max_warp(highest) * scale, -FLT_MAX);
    float sums[8][2] = {};
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int m = 2 * q + r / 2, half = r % 2;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          sums[n][e] += exp2_approx(fmaf(x[m][n][2 * half + e], scale, -highest));
        }
      }
    }
    const float2 sum = sum_columns(sums, me.lane);
    const int32_t block = column + me.lane / 4 * 8;
    float* to = task.sums + int64_t{quarter} * task.pitch;
    if (block < task.n_kv) to[block] = sum.x;
    if (block + 1 < task.n_kv) to[block + 1] = sum.y;
    if (me.lane == 0) task.maxima[quarter * task.strips + first_column / kStrip] = highest;
  }
}

// After the tiles: the rows' scores in the place of their first quarter's sums, then a warp a row.
__device__ inline void decide_means(const SelectProblem& select, const BlockScores& p,
                                    const BlockTask& task, const MeansTask& means) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t per_block = means.block_size / 32;  // quarters
  for (int32_t b = 0; b < task.blocks; ++b) {
    const int32_t i = task.first_block + b;
    const int32_t first = b * per_block;
    const int32_t begin = first > means.begin / 32 ? first : means.begin / 32;
    const int32_t most = (means.end + 31) / 32;
    const int32_t end = first + per_block < most ? first + per_block : most;
    float greatest = -FLT_MAX;
    for (int32_t q = begin; q < end; ++q) {
      for (int32_t strip = 0; strip <= i / kStrip; ++strip) {
        greatest = fmaxf(greatest, means.maxima[q * means.strips + strip]);
      }
    }
    for (int32_t j = thread; j <= i; j += MeansTile::kThreads) {
      float score = 0;
      for (int32_t q = begin; q < end; ++q) {
        score = fmaf(means.sums[int64_t{q} * means.pitch + j],
                     exp2_approx(means.maxima[q * means.strips + j / kStrip] - greatest), score);
      }
      means.sums[int64_t{first} * means.pitch + j] = score;
    }
  }
  __syncthreads();
  const FlashPrefillRule rule = flash_prefill_rule(p.means, means.s_kv, means.block_size);
  for (int32_t b = thread / 32; b < task.blocks; b += MeansTile::kThreads / 32) {
    const int32_t i = task.first_block + b;
    const float* row = means.sums + int64_t{b} * per_block * means.pitch;
    float sum = 0;
    for (int32_t j = thread % 32; j <= i; j += 32) sum += row[j];
    if (sum_warp(sum) > 0) {
      keep_above_warp(row, i, means.n_kv, rule, task.row(select, i));
    } else if (thread % 32 == 0) {
      select.set_not_finite(task.view.number);
    }
  }
}

template <typename Element>
__global__ void __launch_bounds__(MeansTile::kThreads, 2)
    mean_scores_kernel(const __grid_constant__ SelectProblem select,
                       const __grid_constant__ BlockScores p) {
  await_previous_kernel();
  start_next_kernel();
  const DeviceProblem& problem = select.problem;
  std::byte* shared = shared_memory();
  const int32_t steps = MeansTile::steps(problem.d_qk);
  for (auto t = static_cast<int32_t>(blockIdx.x); t < p.tasks;
       t += static_cast<int32_t>(gridDim.x)) {
    const BlockTask task(select, p.tile_blocks, t);
    if (!task.any) continue;
    const DeviceSequence& sequence = problem.sequences[task.view.sequence];
    const MeansTask means(select, p, task);
    const std::byte* q =
        problem.q_row(problem.q, task.view.sequence, task.view.head, task.first_row);
    const std::byte* k =
        p.k_means +
        (sequence.first_mean + static_cast<int64_t>(task.kv) * sequence.n_kv) * problem.d_qk * 2;
    for_each_product<Element, MeansTile>(
        shared, p.stages, means.tiles, steps,
        [&](std::byte* to, int32_t step) {
          load_stage_rows<MeansTile::kRows, MeansTile::kThreads>(
              to, step * MeansTile::kDepth, problem.d_qk, select.q_aligned, problem.q.data,
              [&](int32_t r) -> const std::byte* {
                const bool there = r >= means.begin && r < means.end;
                return there ? q + r * problem.q.row_stride * 2 : nullptr;
              });
        },
        [&](std::byte* to, int32_t tile, int32_t step) {
          load_stage_rows<MeansTile::kColumns, MeansTile::kThreads>(
              to, step * MeansTile::kDepth, problem.d_qk, true, p.k_means,
              [&](int32_t r) -> const std::byte* {
                const int32_t j = tile * MeansTile::kColumns + r;
                return j < means.n_kv ? k + static_cast<int64_t>(j) * problem.d_qk * 2 : nullptr;
              });
        },
        [&](int32_t tile) {
          const auto me = TileThread::of<MeansTile>();
          return tile * MeansTile::kColumns + me.first_column() < means.most_seen(me.first_row());
        },
        [&](int32_t tile, TileScores& scores) {
          finish_means_tile(means, select.scale_log2, tile, scores);
        });
    __syncthreads();
    decide_means(select, p, task, means);
    __syncthreads();
  }
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CUDA_MEANS_CUH_

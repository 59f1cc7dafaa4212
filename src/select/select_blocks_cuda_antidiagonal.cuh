// XAttention's scores. Queries and keys are taken in groups of `stride` tokens, a group being one
// row of stride * d elements, the queries' in reverse order: a pair of groups scores the product of
// their rows. A CTA has 128 groups of queries and walks over tiles of 256 groups of keys.
//
// A group's softmax is known at the end of its row only, so each tile leaves in the scratch
//   sums     [128, n_kv]   of each key block, exp2(score - the tile's maximum)
//   maxima   [tiles, 128]  of each tile
// and then a warp puts the rows of a query block together and decides. What bounds it: the
// products, 1 / stride of those of dense attention's scores.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CUDA_ANTIDIAGONAL_CUH_
#define FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CUDA_ANTIDIAGONAL_CUH_

#include "select/select_blocks_cuda_plan.cuh"
#include "select/select_blocks_cuda_rows.cuh"
#include "select/select_blocks_cuda_tile.cuh"

namespace flexprefill {

using AntidiagonalTile = ProductTile<4, false>;

struct AntidiagonalShared {
  // Beside the ring: while tiles are made, maxima of a warp's columns; then of each row the
  // greatest maximum and what its exponentials weigh.
  float row_max[AntidiagonalTile::kWarpsN][AntidiagonalTile::kRows];
  float offset[AntidiagonalTile::kRows], weight[AntidiagonalTile::kRows];
};

// Floats of a CTA's scratch for n_kv key blocks of a sequence of s_kv tokens.
inline int64_t antidiagonal_scratch(int64_t n_kv, int64_t s_kv, int64_t stride) {
  const int64_t tiles = s_kv / (stride * AntidiagonalTile::kColumns) + 1;
  return AntidiagonalTile::kRows * (n_kv + tiles);
}

// A task in groups of `stride` tokens.
struct GroupTask {
  int32_t stride, per_block;  // tokens of a group; groups of a block
  int32_t first;              // group of the tile's first row
  int32_t begin, end;         // groups that have queries
  int32_t tiles;              // of keys
  float *sums, *maxima;       // in the scratch

  __device__ GroupTask(const SelectProblem& select, const BlockScores& p, const BlockTask& task) {
    const DeviceSequence& sequence = select.problem.sequences[task.view.sequence];
    stride = p.antidiagonal.stride;
    per_block = select.problem.block_size / stride;
    first = task.first_block * per_block;
    const int32_t position = sequence.first_position() / stride;
    begin = position > first ? position : first;
    const int32_t last = (sequence.s_kv - 1) / stride,
                  tile_last = first + AntidiagonalTile::kRows - 1;
    end = (last < tile_last ? last : tile_last) + 1;
    tiles = (end - 1) / AntidiagonalTile::kColumns + 1;
    sums = p.own_scratch();
    maxima = sums + int64_t{AntidiagonalTile::kRows} * p.pitch;
  }
};

// The scores of a tile, x, become sums and maxima in the scratch.
__device__ inline void finish_group_tile(const GroupTask& task, int32_t pitch, int32_t n_kv,
                                         float scale, int32_t tile, bool busy,
                                         AntidiagonalShared& shared, TileScores& x) {
  const auto me = TileThread::of<AntidiagonalTile>();
  const int32_t column = tile * AntidiagonalTile::kColumns + me.column0;
  const int32_t warp_column = me.warp % AntidiagonalTile::kWarpsN;
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    const int m = r / 2, half = r % 2;
    const int32_t row = me.row0 + 16 * m + 8 * half;
    const int32_t last = task.first + row - column;  // column offsets that the group sees
    float highest = -FLT_MAX;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = x[m][n][2 * half + e];
        score = busy && 8 * n + e <= last ? score * scale : -INFINITY;
        highest = fmaxf(highest, score);
      }
    }
    highest = fmaxf(highest, __shfl_xor_sync(kWholeWarp, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(kWholeWarp, highest, 2));
    if (me.lane % 4 == 0) shared.row_max[warp_column][row] = highest;
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    const int m = r / 2, half = r % 2;
    const int32_t row = me.row0 + 16 * m + 8 * half;
    float highest = -FLT_MAX;
#pragma unroll
    for (int w = 0; w < AntidiagonalTile::kWarpsN; ++w) {
      highest = fmaxf(highest, shared.row_max[w][row]);
    }
    if (warp_column == 0 && me.lane % 4 == 0) {
      task.maxima[tile * AntidiagonalTile::kRows + row] = highest;
    }
    float sum[8];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      sum[n] =
          exp2_approx(x[m][n][2 * half] - highest) + exp2_approx(x[m][n][2 * half + 1] - highest);
      if (task.per_block >= 4) sum[n] += __shfl_xor_sync(kWholeWarp, sum[n], 1);
      if (task.per_block >= 8) sum[n] += __shfl_xor_sync(kWholeWarp, sum[n], 2);
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int32_t group = column + 8 * n, block = group / task.per_block;
      if (group % task.per_block != 0 || block >= n_kv) continue;
      task.sums[int64_t{row} * pitch + block] =
          sum[n] + (task.per_block == 16 ? sum[n / 2 * 2 + 1] : 0.0f);
    }
  }
}

// One warp: the scores of query block i to row, from its groups [begin, end), rows of the tile.
// False if a group has no softmax.
__device__ inline bool combine_groups(const GroupTask& task, int32_t pitch, int32_t i,
                                      int32_t begin, int32_t end, AntidiagonalShared& shared,
                                      float* row) {
  const auto lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int32_t tile_blocks = AntidiagonalTile::kColumns / task.per_block;
  const auto factor = [&](int32_t r, int32_t j, float highest) {
    return exp2_approx(task.maxima[j / tile_blocks * AntidiagonalTile::kRows + r] - highest);
  };
  bool good = true;
  for (int32_t r = begin; r < end; ++r) {
    float highest = -FLT_MAX;
    for (int32_t t = lane; t <= i / tile_blocks; t += 32) {
      highest = fmaxf(highest, task.maxima[t * AntidiagonalTile::kRows + r]);
    }
    highest = max_warp(highest);
    float sum = 0;
    for (int32_t j = lane; j <= i; j += 32) {
      sum = fmaf(task.sums[int64_t{r} * pitch + j], factor(r, j, highest), sum);
    }
    sum = sum_warp(sum);
    good = good && sum > 0;
    if (lane == 0) {
      shared.offset[r] = highest;
      shared.weight[r] = 1.0f / (sum * static_cast<float>(end - begin));
    }
  }
  __syncwarp();
  for (int32_t j = lane; j <= i; j += 32) {
    float score = 0;
    for (int32_t r = begin; r < end; ++r) {
      const float p = task.sums[int64_t{r} * pitch + j] * factor(r, j, shared.offset[r]);
      score = fmaf(p, shared.weight[r], score);
    }
    row[j] = score;
  }
  __syncwarp();
  return good;
}

// After the tiles: a warp a query block.
__device__ inline void decide_groups(const SelectProblem& select, const BlockScores& p,
                                     const BlockTask& task, const GroupTask& groups,
                                     AntidiagonalShared& shared) {
  const int32_t n_kv = select.problem.sequences[task.view.sequence].n_kv;
  for (int32_t b = static_cast<int32_t>(threadIdx.x) / 32; b < task.blocks;
       b += AntidiagonalTile::kThreads / 32) {
    const int32_t i = task.first_block + b;
    const int32_t first = b * groups.per_block;
    const int32_t begin = first > groups.begin - groups.first ? first : groups.begin - groups.first;
    const int32_t last = first + groups.per_block;
    const int32_t end = last < groups.end - groups.first ? last : groups.end - groups.first;
    float* row = groups.sums + int64_t{first} * p.pitch;  // in the place of its first group's
    if (combine_groups(groups, p.pitch, i, begin, end, shared, row)) {
      keep_reaching_warp(row, i, n_kv, p.antidiagonal.threshold, task.row(select, i));
    } else {
      select.set_not_finite(task.view.number);
    }
  }
}

template <typename Element>
__global__ void __launch_bounds__(AntidiagonalTile::kThreads, 1)
    antidiagonal_kernel(const __grid_constant__ SelectProblem select,
                        const __grid_constant__ BlockScores p) {
  await_previous_kernel();
  start_next_kernel();
  const DeviceProblem& problem = select.problem;
  std::byte* ring = shared_memory();
  auto& shared =
      *reinterpret_cast<AntidiagonalShared*>(ring + p.stages * AntidiagonalTile::kStageBytes);
  const int32_t steps = AntidiagonalTile::steps(problem.d_qk);
  const float scale = select.scale_log2 / static_cast<float>(p.antidiagonal.stride);
  for (auto t = static_cast<int32_t>(blockIdx.x); t < p.tasks;
       t += static_cast<int32_t>(gridDim.x)) {
    const BlockTask task(select, p.tile_blocks, t);
    if (!task.any) continue;
    const DeviceSequence& sequence = problem.sequences[task.view.sequence];
    const GroupTask groups(select, p, task);
    const int32_t stride = groups.stride;
    const bool paged = problem.page_table != nullptr;
    const std::byte* q = problem.q_row(problem.q, task.view.sequence, task.view.head, 0);
    const std::byte* k =
        paged ? nullptr : problem.kv_row(problem.k, task.view.sequence, task.kv, 0);
    const int64_t q_stride = problem.q.row_stride * 2, k_stride = problem.k.row_stride * 2;
    const auto busy = [&](int32_t tile) {
      const auto me = TileThread::of<AntidiagonalTile>();
      const int32_t last = groups.first + me.first_row() + 63;
      return tile * AntidiagonalTile::kColumns + me.first_column() <=
                 (last < groups.end ? last : groups.end - 1) &&
             groups.first + me.first_row() < groups.end;
    };
    for_each_product<Element, AntidiagonalTile>(
        ring, p.stages, groups.tiles, stride * steps,
        [&](std::byte* to, int32_t step) {
          const int32_t first = task.first_row + stride - 1 - step / steps;
          load_stage_rows<AntidiagonalTile::kRows, AntidiagonalTile::kThreads>(
              to, step % steps * AntidiagonalTile::kDepth, problem.d_qk, select.q_aligned,
              problem.q.data, [&](int32_t r) -> const std::byte* {
                const int32_t i = first + r * stride;
                return i >= 0 && i < sequence.s_q ? q + i * q_stride : nullptr;
              });
        },
        [&](std::byte* to, int32_t tile, int32_t step) {
          const int32_t first = tile * AntidiagonalTile::kColumns * stride + step / steps;
          load_stage_rows<AntidiagonalTile::kColumns, AntidiagonalTile::kThreads>(
              to, step % steps * AntidiagonalTile::kDepth, problem.d_qk, select.k_aligned,
              problem.k.data, [&](int32_t r) -> const std::byte* {
                const int32_t j = first + r * stride;
                if (j >= sequence.s_kv) return nullptr;
                return paged ? problem.kv_row(problem.k, task.view.sequence, task.kv, j)
                             : k + j * k_stride;
              });
        },
        busy,
        [&](int32_t tile, TileScores& scores) {
          finish_group_tile(groups, p.pitch, sequence.n_kv, scale, tile, busy(tile), shared,
                            scores);
        });
    __syncthreads();
    decide_groups(select, p, task, groups, shared);
    __syncthreads();
  }
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CUDA_ANTIDIAGONAL_CUH_

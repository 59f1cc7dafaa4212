// Scores of MInference's block-sparse heads: softmax over the key blocks of
// scale * mean(q block) . mean(k block), in fp32 throughout. A kernel makes the means of query
// blocks, which reads Q once; in the next one a CTA takes those of 32 blocks and walks over tiles
// of 128 means of keys; logits go to the scratch [32, n_kv], and a warp a row makes the softmax and
// decides.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CUDA_POOLED_CUH_
#define FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CUDA_POOLED_CUH_

#include "select/select_blocks_cuda_plan.cuh"
#include "select/select_blocks_cuda_rows.cuh"

namespace flexprefill {

constexpr int kPooledThreads = 256;
constexpr int kPooledRows = 32;
constexpr int kPooledColumns = 128;
constexpr int kPooledDepth = 32;  // of the keys' means in shared memory
constexpr int kPooledPitch = kPooledDepth + 4;
constexpr int kPooledMostDim = 256;

struct PooledShared {
  float q[kPooledRows * (kPooledMostDim + 4)];
  float k[kPooledColumns * kPooledPitch];
};

inline int64_t pooled_scratch(int64_t n_kv) { return kPooledRows * n_kv; }

// Beside the means of keys. CTA: a query block of a head.
constexpr int kQueryMeansThreads = 256;
template <typename Element>
__global__ void __launch_bounds__(kQueryMeansThreads, 4)
    query_means_kernel(const __grid_constant__ SelectProblem select, float* to) {
  await_kernel_beside();
  start_next_kernel();
  const DeviceProblem& problem = select.problem;
  const auto block = static_cast<int32_t>(blockIdx.x % problem.max_n_q);
  const HeadView view = HeadView::of(select, static_cast<int32_t>(blockIdx.x / problem.max_n_q));
  const DeviceSequence& sequence = problem.sequences[view.sequence];
  if (block >= sequence.n_q || select.sequences[view.sequence].probed == 0 ||
      select.kind_of(view.head) != HeadRule::Kind::kBlocks) {
    return;
  }
  const int32_t first =
      (sequence.first_q_block + block) * problem.block_size - sequence.first_position();
  const int32_t begin = max(first, 0), end = min(first + problem.block_size, sequence.s_q);
  const std::byte* q = problem.q_row(problem.q, view.sequence, view.head, begin);
  const int64_t row = sequence.first_row + int64_t{view.head} * sequence.n_q + block;
  mean_rows_cta<Element, kQueryMeansThreads>(
      end - begin, problem.d_qk, select.q_aligned, reinterpret_cast<float*>(shared_memory()),
      to + row * problem.d_qk, [&](int32_t i) { return q + i * problem.q.row_stride * 2; });
}

// The means of the task's query blocks.
__device__ inline void load_queries(const float* means, int32_t blocks, int32_t d,
                                    PooledShared& shared) {
  for (auto e = static_cast<int32_t>(threadIdx.x); e < blocks * (d / 4); e += kPooledThreads) {
    const int32_t b = e / (d / 4), c = e % (d / 4) * 4;
    *reinterpret_cast<float4*>(&shared.q[b * (d + 4) + c]) =
        *reinterpret_cast<const float4*>(means + int64_t{b} * d + c);
  }
}

// logits[row][first + column] of 128 columns.
__device__ inline void pooled_tile(const float* k, int32_t columns, int32_t d, float scale,
                                   PooledShared& shared, float* logits, int64_t pitch) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t row = thread / 32 * 4, column = thread % 32;  // rows + 0 .. 3, columns + 32 j
  float dots[4][4] = {};
  for (int32_t first = 0; first < d; first += kPooledDepth) {
    __syncthreads();
    for (int32_t e = thread; e < kPooledColumns * kPooledDepth / 4; e += kPooledThreads) {
      const int32_t j = e / (kPooledDepth / 4), c = first + e % (kPooledDepth / 4) * 4;
      const float4 zero = {0, 0, 0, 0};
      *reinterpret_cast<float4*>(&shared.k[j * kPooledPitch + c - first]) =
          j < columns && c < d
              ? *reinterpret_cast<const float4*>(k + static_cast<int64_t>(j) * d + c)
              : zero;
    }
    __syncthreads();
    const int32_t depth = d - first < kPooledDepth ? d - first : kPooledDepth;
#pragma unroll 1
    for (int32_t c = 0; c < depth; c += 4) {
      float4 a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = *reinterpret_cast<const float4*>(&shared.q[(row + i) * (d + 4) + first + c]);
        b[i] = *reinterpret_cast<const float4*>(&shared.k[(column + 32 * i) * kPooledPitch + c]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float& dot = dots[i][j];
          dot = fmaf(a[i].x, b[j].x, dot);
          dot = fmaf(a[i].y, b[j].y, dot);
          dot = fmaf(a[i].z, b[j].z, dot);
          dot = fmaf(a[i].w, b[j].w, dot);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (column + 32 * j < columns)
        logits[(row + i) * pitch + column + 32 * j] = dots[i][j] * scale;
    }
  }
}

// One warp: the softmax of row [i + 1] in place. False if it has none.
__device__ inline bool softmax_warp(float* row, int32_t i) {
  const auto lane = static_cast<int32_t>(threadIdx.x) % 32;
  float highest = -INFINITY;
  for (int32_t j = lane; j <= i; j += 32) highest = fmaxf(highest, row[j]);
  highest = max_warp(highest);
  float sum = 0;
  for (int32_t j = lane; j <= i; j += 32) {
    row[j] = exp2_approx(row[j] - highest);
    sum += row[j];
  }
  sum = sum_warp(sum);
  for (int32_t j = lane; j <= i; j += 32) row[j] *= 1.0f / sum;
  __syncwarp();
  return sum > 0;
}

// One warp decides by logits [i + 1]: softmax_warp and keep_best_warp. False if it has no softmax.
__device__ inline bool decide_long_row(float* logits, int32_t i, int32_t n, int64_t count,
                                       uint64_t* row) {
  if (!softmax_warp(logits, i)) return false;
  keep_best_warp(logits, i, n, count, row);
  return true;
}

// The same in registers: a lane has entries lane, lane + 32, ..., kEntries of them; i < 32
// kEntries.
template <int kEntries>
__device__ inline bool decide_row(const float* logits, int32_t i, int32_t n, int64_t count,
                                  uint64_t* row) {
  const int32_t lane = lane_here();
  float x[kEntries];
  float highest = -INFINITY;
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    x[e] = lane + 32 * e <= i ? logits[lane + 32 * e] : -INFINITY;
    highest = fmaxf(highest, x[e]);
  }
  highest = max_warp(highest);
  float sum = 0;
#pragma unroll
  for (float& entry : x) {
    entry = exp2_approx(entry - highest);
    sum += entry;
  }
  sum = sum_warp(sum);
  if (!(sum > 0)) return false;
#pragma unroll
  for (float& entry : x) entry *= 1.0f / sum;
  keep_best_entries(x, i, n, count, row);
  return true;
}

__global__ void __launch_bounds__(kPooledThreads, 2)
    pooled_scores_kernel(const __grid_constant__ SelectProblem select,
                         const __grid_constant__ BlockScores p) {
  await_previous_kernel();
  start_next_kernel();
  const DeviceProblem& problem = select.problem;
  auto& shared = *reinterpret_cast<PooledShared*>(shared_memory());
  const int32_t d = problem.d_qk;
  float* logits = p.own_scratch();
  for (auto t = static_cast<int32_t>(blockIdx.x); t < p.tasks;
       t += static_cast<int32_t>(gridDim.x)) {
    const BlockTask task(select, p.tile_blocks, t);
    if (!task.any) continue;
    const DeviceSequence& sequence = problem.sequences[task.view.sequence];
    load_queries(p.q_means + task.row_number(select, task.first_block) * d, task.blocks, d, shared);
    const float* k = reinterpret_cast<const float*>(p.k_means) +
                     (sequence.first_mean + static_cast<int64_t>(task.kv) * sequence.n_kv) * d;
    const int32_t most = task.first_block + task.blocks;
    for (int32_t first = 0; first < most; first += kPooledColumns) {
      const int32_t columns = most - first < kPooledColumns ? most - first : kPooledColumns;
      pooled_tile(k + static_cast<int64_t>(first) * d, columns, d, select.scale_log2, shared,
                  logits + first, p.pitch);
    }
    __syncthreads();
    const int64_t count = select.rules[task.view.head].vertical;
    const int32_t n = sequence.n_kv;
    for (int32_t b = static_cast<int32_t>(threadIdx.x) / 32; b < task.blocks;
         b += kPooledThreads / 32) {
      const int32_t i = task.first_block + b;
      float* scores = logits + static_cast<int64_t>(b) * p.pitch;
      uint64_t* row = task.row(select, i);
      const bool decided = i < 32 * 8    ? decide_row<8>(scores, i, n, count, row)
                           : i < 32 * 32 ? decide_row<32>(scores, i, n, count, row)
                                         : decide_long_row(scores, i, n, count, row);
      if (!decided && threadIdx.x % 32 == 0) select.set_not_finite(task.view.number);
    }
    __syncthreads();
  }
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CUDA_POOLED_CUH_

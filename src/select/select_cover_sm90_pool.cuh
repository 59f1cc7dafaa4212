// BlockCover's means of queries on Hopper, made by the CTA of the map that needs them: while it
// reads its queries, the multiprocessor's other CTA computes. A mean is a product with ones: tile t
// of 128 queries times rows that are ones where a mean has its tokens, and the tiles of 64 means
// add up in one accumulator.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_COVER_SM90_POOL_CUH_
#define FLEXPREFILL_SRC_SELECT_SELECT_COVER_SM90_POOL_CUH_

#include "math.h"
#include "select/select_cover_cuda_map.cuh"
#include "select/select_cover_sm90_tiles.cuh"

namespace flexprefill {

// The tiles of 128 queries of a task that hold some of the sequence's.
struct QueryTiles {
  int32_t first = 0, count = 0;

  __device__ int32_t end() const { return first + count; }

  QueryTiles() = default;
  __device__ explicit QueryTiles(const MeansMapTask& task) {
    const int32_t token = task.first * task.pool;  // of tile 0
    first = max(task.position - token, 0) / 128;
    count = min(task.pool, (task.s_kv - token + 127) / 128) - first;
  }
};

// One thread.
template <typename Shape>
__device__ inline void load_queries(const CoverSm90Params& params, const HeadView& view,
                                    const MeansMapTask& task, int32_t tile, sm90::Barrier* full,
                                    uint16_t* to) {
  const DeviceSequence& sequence = params.select.problem.sequences[view.sequence];
  const int32_t row =
      static_cast<int32_t>(sequence.q_start) + task.first * task.pool + tile * 128 - task.position;
  sm90::barrier_arrive_expect(full, Shape::kTileBytes);
#pragma unroll 1
  for (int32_t c = 0; c < Shape::kChunks; ++c) {
    sm90::tma_load(&params.queries, full, to + c * 128 * sm90::kChunkColumns,
                   c * sm90::kChunkColumns, row, view.head,
                   params.q_packed != 0 ? 0 : view.sequence);
  }
}

// The CTA: rows of a tile that are not the sequence's own become zeros; others' might not be
// finite.
template <typename Shape>
__device__ inline void clear_other_queries(const MeansMapTask& task, int32_t tile,
                                           uint16_t* queries) {
  const int32_t token = task.first * task.pool + tile * 128;
  const int32_t begin = task.position - token, end = task.s_kv - token;
  if (begin <= 0 && end >= 128) return;
  // A row's part of a chunk: 8 units of 16 bytes.
#pragma unroll 1
  for (auto e = static_cast<int32_t>(threadIdx.x); e < Shape::kChunks * 128 * 8;
       e += kCoverComputeThreads) {
    const int32_t row = e / 8 % 128;
    if (row < begin || row >= end) reinterpret_cast<uint4*>(queries)[e] = {0, 0, 0, 0};
  }
  sm90::fence_proxy_async();
  __syncthreads();
}

// Zeros but for one row of ones: from row 63 - r on, 64 rows of which row r is ones. A multiple of
// 16 queries all belong to one mean.
template <typename Element>
struct RowOfOnes {
  alignas(16) uint4 rows[2][128];

  __device__ void init() {
    constexpr uint32_t kOnes = std::is_same_v<Element, __nv_bfloat16> ? 0x3f803f80u : 0x3c003c00u;
    const auto thread = static_cast<int32_t>(threadIdx.x);
    const uint32_t x = thread % 128 == 63 ? kOnes : 0;
    rows[thread / 128][thread % 128] = {x, x, x, x};
  }
};
static_assert(kCoverComputeThreads == 256);

// A warpgroup's part of 64 means: chunks of 64 columns, every second one.
template <typename Shape>
struct PooledQueries {
  static constexpr int kChunks = (Shape::kChunks + 1) / 2;
  float sums[kChunks][32] = {};

  // Adds 128 queries, whose first mean is number first_mean of these.
  template <int kPool>
  __device__ __forceinline__ void add(const RowOfOnes<typename Shape::Element>& ones,
                                      const uint16_t* queries, int32_t group, int32_t first_mean) {
    constexpr uint32_t kRows8 = 8 * sm90::kChunkRowBytes;
    // first_mean is a multiple of 4 or 8: the places of the tile's means are as far from its own as
    // those of the first ones from 0, at most kFurthest.
    constexpr int kSteps = kPool / 16;  // of a mean
    constexpr int kFurthest = kPool == 32 ? 9 : 11;
    const uint64_t a = sm90::wgmma_descriptor_plain(
        ones.rows[0] + 63 - kFurthest - query_place(first_mean), sizeof(ones.rows[0]), 128);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int32_t chunk = 2 * c + group;
      if (Shape::kChunks % 2 != 0 && chunk >= Shape::kChunks) break;
      const uint64_t b =
          sm90::wgmma_descriptor(queries + chunk * 128 * sm90::kChunkColumns, 0, kRows8);
      sm90::wgmma_pin(sums[c]);
      sm90::wgmma_fence();
#pragma unroll
      for (int step = 0; step < 8; ++step) {
        sm90::wgmma_ss_mn<typename Shape::Element>(
            sums[c], sm90::wgmma_descriptor_at(a, 16 * (kFurthest - query_place(step / kSteps))),
            sm90::wgmma_descriptor_at(b, step * 2 * kRows8));
      }
      sm90::wgmma_commit();
      sm90::wgmma_wait<0>();
      sm90::wgmma_pin(sums[c]);
    }
  }

  // To the rows that the map multiplies, from number 64 * half on.
  __device__ __forceinline__ void store(const MeansMapTask& task, int32_t group, int32_t half,
                                        uint16_t* rows) {
    const int32_t lane = lane_here();
    const int32_t row = 64 * half + static_cast<int32_t>(threadIdx.x) / 32 % 4 * 16 + lane / 4;
    const int32_t mean = row + lane / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool exists = mean + r >= task.begin && mean + r < task.end;
      const float factor = exists ? 1.0f / static_cast<float>(task.tokens(mean + r)) : 0.0f;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int32_t chunk = 2 * c + group;
        if (Shape::kChunks % 2 != 0 && chunk >= Shape::kChunks) break;
        uint16_t* to = rows + (chunk * 128 + row + 8 * r) * sm90::kChunkColumns + lane % 4 * 2;
#pragma unroll
        for (int g = 0; g < 8; ++g) {
          *reinterpret_cast<uint32_t*>(to + (g ^ lane / 4) * 8) = pack<typename Shape::Element>(
              sums[c][4 * g + 2 * r] * factor, sums[c][4 * g + 2 * r + 1] * factor);
        }
      }
    }
  }
};

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_COVER_SM90_POOL_CUH_

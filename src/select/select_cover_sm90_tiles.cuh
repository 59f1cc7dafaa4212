// BlockCover on Hopper: what its two kernels share. A CTA has 128 rows of one head in shared memory
// and walks over tiles of 128 columns, which TMA brings through a ring. Each of two warpgroups
// multiplies 64 rows by a tile, waits, and works on the scores, 64 a thread: two CTAs fit on a
// multiprocessor, and the products of some warpgroups run under the exponentials of others.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_COVER_SM90_TILES_CUH_
#define FLEXPREFILL_SRC_SELECT_SELECT_COVER_SM90_TILES_CUH_

#include <cstdint>

#include "cuda/sm90.cuh"
#include "select/select_cover_cuda_plan.cuh"

namespace flexprefill {

struct CoverSm90Params {
  sm90::TensorMap keys, queries, key_means, query_means;
  SelectProblem select;
  CoverParams cover;
  int32_t box_rows;             // keys that one load brings
  int32_t q_packed, kv_packed;  // no dimension of sequences
};

// Kernels: element type and head dim as padded. Head dims up to it run through it; zeros fill up.
template <typename Element_, int kDim_>
struct CoverShape {
  using Element = Element_;
  static constexpr int kDim = kDim_;
  static constexpr int kChunks = kDim / sm90::kChunkColumns;
  static constexpr int kTileBytes = 128 * kDim * 2;
  // Affects speed only: what fits.
  static constexpr int kCtas = kDim <= 128 ? 2 : 1;
  static constexpr int kStages = kDim == 64 ? 4 : kDim == 192 ? 3 : 2;
};

constexpr int kCoverComputeThreads = 2 * sm90::kWarpgroupThreads;

// In chunks of 64 columns (sm90.cuh).
template <typename Shape>
struct CoverTiles {
  alignas(1024) uint16_t rows[128 * Shape::kDim];
  alignas(1024) uint16_t columns[Shape::kStages][128 * Shape::kDim];
  sm90::Barrier rows_full;
  sm90::Barrier full[Shape::kStages], empty[Shape::kStages];

  __device__ void init() {
    sm90::barrier_init(&rows_full, 1);
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      sm90::barrier_init(&full[stage], 1);
      sm90::barrier_init(&empty[stage], kCoverComputeThreads / 32);
    }
    sm90::barrier_init_fence();
  }
};

// The ring's next stage.
template <typename Shape>
struct CoverRing {
  uint32_t stage = 0, parity = 0;
  __device__ void advance() {
    if (++stage < Shape::kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// One thread: 128 rows of means from `row` on.
template <typename Shape>
__device__ inline void load_means(const sm90::TensorMap& map, sm90::Barrier* full, uint16_t* to,
                                  int32_t row) {
  sm90::barrier_arrive_expect(full, Shape::kTileBytes);
#pragma unroll 1
  for (int32_t c = 0; c < Shape::kChunks; ++c) {
    sm90::tma_load(&map, full, to + c * 128 * sm90::kChunkColumns, c * sm90::kChunkColumns, row, 0,
                   0);
  }
}

// Scores 4 g + 2 r + e of a thread: row first_row + 8 r of the CTA's, column 8 g + first_column +
// e.
struct CoverThread {
  int32_t group, lane;
  int32_t warp_row, first_row, first_column;

  __device__ CoverThread()
      // Shuffled so that the compiler knows that a warp's threads stay together.
      : group(__shfl_sync(kWholeWarp, static_cast<int32_t>(threadIdx.x) / 128, 0)),
        lane(static_cast<int32_t>(threadIdx.x) % 32),
        warp_row(static_cast<int32_t>(threadIdx.x) / 32 * 16),
        first_row(warp_row + lane / 4),
        first_column(lane % 4 * 2) {}
};

// One warpgroup: its rows by kN columns of a stage, from `column` on.
template <typename Shape, int kN>
__device__ __forceinline__ void multiply_columns(const CoverTiles<Shape>& tiles, int32_t group,
                                                 uint32_t stage, int32_t column,
                                                 float (&scores)[kN / 2]) {
  constexpr uint32_t kRows8 = 8 * sm90::kChunkRowBytes;
  const uint64_t a =
      sm90::wgmma_descriptor(tiles.rows + group * 64 * sm90::kChunkColumns, 16, kRows8);
  const uint64_t b =
      sm90::wgmma_descriptor(tiles.columns[stage] + column * sm90::kChunkColumns, 16, kRows8);
  sm90::wgmma_pin(scores);
  sm90::wgmma_fence();
#pragma unroll
  for (int step = 0; step < Shape::kDim / 16; ++step) {
    const int bytes = step / 4 * 128 * sm90::kChunkRowBytes + step % 4 * 32;
    sm90::wgmma_ss<typename Shape::Element, kN>(scores, sm90::wgmma_descriptor_at(a, bytes),
                                                sm90::wgmma_descriptor_at(b, bytes), step > 0);
  }
  sm90::wgmma_commit();
  sm90::wgmma_wait<0>();
  sm90::wgmma_pin(scores);
}

// Sums of exponentials up to it are as exact as others.
constexpr float kMostSum = 0x1p100f;

// Of a thread's scores of its row r: 0 or 1.
__device__ __forceinline__ float greatest_score(const float (&scores)[64], int r) {
  float greatest = -FLT_MAX;
#pragma unroll
  for (int g = 0; g < 16; ++g) {
    greatest = fmaxf(greatest, fmaxf(scores[4 * g + 2 * r], scores[4 * g + 2 * r + 1]));
  }
  return greatest;
}

// Over the four lanes that have a row.
__device__ inline float max_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 2));
}
__device__ inline float sum_quad(float x) {
  x += __shfl_xor_sync(kWholeWarp, x, 1);
  return x + __shfl_xor_sync(kWholeWarp, x, 2);
}

// select_cover_sm90_kernels.cuh, instantiated in select_cover_sm90_*.cu.
template <typename Shape>
void launch_cover_asks_sm90(const CoverSm90Params& params, uint32_t ctas, void* stream);
template <typename Shape>
void launch_cover_map_sm90(const CoverSm90Params& params, uint32_t ctas, void* stream);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_COVER_SM90_TILES_CUH_

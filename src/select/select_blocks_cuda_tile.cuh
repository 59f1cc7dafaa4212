// Products of a tile of 128 rows by 128 or 256 columns, for the selectors that score blocks:
// both operands in the element type, summed in fp32 by mma.sync.
//
// A CTA of two rows of warps, kWarpsN to a row, each with 64 x 64 scores in registers. The operands
// come by cp.async in stages of 64 columns to a ring in shared memory. The left one stays there for
// all tiles of a task (kResident) or comes with every stage.
//
// In shared memory a row of a stage has 128 bytes; unit c of 16 bytes of row r lies at c ^ (r % 8),
// so that ldmatrix meets no bank twice.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CUDA_TILE_CUH_
#define FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CUDA_TILE_CUH_

#include <algorithm>
#include <cfloat>
#include <cstddef>
#include <cstdint>

#include "cuda/backend_cuda.h"
#include "cuda/launch.cuh"
#include "select/select_device.cuh"

namespace flexprefill {

// Stages of a product's ring that leave room for `ctas` of its kernel's CTAs on a
// multiprocessor; beside: what else a CTA has in shared memory.
template <typename Tile>
int32_t ring_stages(int32_t d, int64_t beside, int64_t ctas) {
  constexpr int64_t kReserved = 1024;
  const int64_t most = device_info().shared_bytes;
  return Tile::stages(d, std::min(most, (most + kReserved) / ctas - kReserved) - beside);
}

using TileScores = float[4][8][4];  // [16 rows][8 columns], mma's fragments

// How a kernel's tiles are cut; affects speed only.
template <int kWarpsN_, bool kResident_>
struct ProductTile {
  static constexpr int kWarpsN = kWarpsN_;
  static constexpr bool kResident = kResident_;
  static constexpr int kThreads = 64 * kWarpsN;
  static constexpr int kRows = 128;
  static constexpr int kColumns = 64 * kWarpsN;
  static constexpr int kDepth = 64;  // elements of a stage
  static constexpr int kRowsBytes = kRows * kDepth * 2;
  static constexpr int kColumnsBytes = kColumns * kDepth * 2;
  static constexpr int kStageBytes = kColumnsBytes + (kResident ? 0 : kRowsBytes);
  static constexpr int kMostStages = 4;

  // Depth in stages.
  __host__ __device__ static int32_t steps(int32_t d) { return (d + kDepth - 1) / kDepth; }
  static int64_t resident_bytes(int32_t d) {
    return kResident ? int64_t{steps(d)} * kRowsBytes : 0;
  }
  // As many stages as `bytes` hold.
  static int32_t stages(int32_t d, int64_t bytes) {
    return static_cast<int32_t>(
        std::clamp<int64_t>((bytes - resident_bytes(d)) / kStageBytes, 2, kMostStages));
  }
  static size_t shared_bytes(int32_t d, int32_t stages) {
    return static_cast<size_t>(resident_bytes(d) + int64_t{stages} * kStageBytes);
  }
};

// Copies columns [column, column + 64) of kRows rows of d elements; row(i) is nullptr where there
// is none. What is not there becomes 0. `any`: an address that may be named.
template <int kRows, int kThreads, typename Row>
__device__ inline void load_stage_rows(std::byte* to, int32_t column, int32_t d, bool aligned,
                                       const std::byte* any, const Row& row) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t unit = thread % 8, c = column + unit * 8;
#pragma unroll 2  // more cost registers
  for (int32_t i = thread / 8; i < kRows; i += kThreads / 8) {
    const std::byte* from = row(i);
    const bool there = from != nullptr && c < d;
    from = there ? from + c * 2 : any;
    std::byte* at = to + i * 128 + (unit ^ (i % 8)) * 16;
    if (aligned) {
      cp_async<16>(shared_address(at), from, there ? 16 : 0);
    } else {
      *reinterpret_cast<uint4*>(at) = there ? load_eight(from, false) : uint4{0, 0, 0, 0};
    }
  }
}

// Where a thread's scores lie in a tile: rows row0 + 16 m + 8 half, columns column0 + 8 n, + 1.
struct TileThread {
  int32_t warp, lane, row0, column0;
  template <typename Tile>
  __device__ static TileThread of() {
    const auto thread = static_cast<int32_t>(threadIdx.x);
    const int32_t warp = thread / 32, lane = thread % 32;
    return {warp, lane, warp / Tile::kWarpsN * 64 + lane / 4,
            warp % Tile::kWarpsN * 64 + lane % 4 * 2};
  }
  __device__ int32_t first_row() const { return row0 - lane / 4; }
  __device__ int32_t first_column() const { return column0 - lane % 4 * 2; }
};

// One warp: scores += the products of one stage.
template <typename Element>
__device__ inline void multiply_stage(uint32_t rows, uint32_t columns, const TileThread& me,
                                      TileScores& scores) {
  const int32_t lane = me.lane;
  const uint32_t a_row = rows + (me.first_row() + lane % 16) * 128;
  const uint32_t b_row = columns + (me.first_column() + lane % 8 + lane / 16 * 8) * 128;
  const int32_t a_unit = lane / 16, b_unit = lane / 8 % 2, turn = lane % 8;
#pragma unroll
  for (int32_t k16 = 0; k16 < 4; ++k16) {
    uint32_t a[4][4], b[4][4];
#pragma unroll
    for (int32_t m = 0; m < 4; ++m) {
      ldmatrix_x4(a[m], a_row + m * 16 * 128 + ((2 * k16 + a_unit) ^ turn) * 16);
    }
#pragma unroll
    for (int32_t j = 0; j < 4; ++j) {
      ldmatrix_x4(b[j], b_row + j * 16 * 128 + ((2 * k16 + b_unit) ^ turn) * 16);
    }
#pragma unroll
    for (int32_t m = 0; m < 4; ++m) {
#pragma unroll
      for (int32_t j = 0; j < 4; ++j) {
        mma_m16n8k16<Element>(scores[m][2 * j], a[m], b[j][0], b[j][1]);
        mma_m16n8k16<Element>(scores[m][2 * j + 1], a[m], b[j][2], b[j][3]);
      }
    }
  }
}

// Waits until at most stages - 2 of the youngest stages are under way.
__device__ inline void await_stage(int32_t stages) {
  if (stages == 2) {
    cp_async_wait<0>();
  } else if (stages == 3) {
    cp_async_wait<1>();
  } else {
    cp_async_wait<2>();
  }
  __syncthreads();
}

// What a task loads: rows(to, step) and columns(to, tile, step) copy one stage of an operand;
// busy(tile): whether the warp needs its part of the tile. After it finish(tile, scores), by all
// threads together.
//
// `shared` is laid out as ProductTile says and free; it is free again after a barrier.
template <typename Element, typename Tile, typename Rows, typename Columns, typename Busy,
          typename Finish>
__device__ inline void for_each_product(std::byte* shared, int32_t stages, int32_t tiles,
                                        int32_t steps, const Rows& rows, const Columns& columns,
                                        const Busy& busy, const Finish& finish) {
  const auto me = TileThread::of<Tile>();
  std::byte* ring = shared + (Tile::kResident ? steps * Tile::kRowsBytes : 0);
  int32_t next_tile = 0, next_step = 0, next_slot = 0;  // of the stage that is loaded next
  const auto load_next = [&] {
    if (next_tile < tiles) {
      std::byte* to = ring + next_slot * Tile::kStageBytes;
      columns(to, next_tile, next_step);
      if constexpr (!Tile::kResident) rows(to + Tile::kColumnsBytes, next_step);
      if (++next_step == steps) {
        next_step = 0;
        ++next_tile;
      }
      if (++next_slot == stages) next_slot = 0;
    }
    cp_async_commit();
  };
  if constexpr (Tile::kResident) {
    for (int32_t step = 0; step < steps; ++step) rows(shared + step * Tile::kRowsBytes, step);
  }
  for (int32_t i = 0; i < stages - 1; ++i) load_next();

  int32_t slot = 0;
  for (int32_t tile = 0; tile < tiles; ++tile) {
    TileScores scores = {};
    const bool needed = busy(tile);
    for (int32_t step = 0; step < steps; ++step) {
      await_stage(stages);
      load_next();
      const uint32_t stage = shared_address(ring + slot * Tile::kStageBytes);
      if (++slot == stages) slot = 0;
      if (!needed) continue;
      multiply_stage<Element>(Tile::kResident ? shared_address(shared) + step * Tile::kRowsBytes
                                              : stage + Tile::kColumnsBytes,
                              stage, me, scores);
    }
    finish(tile, scores);
  }
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CUDA_TILE_CUH_

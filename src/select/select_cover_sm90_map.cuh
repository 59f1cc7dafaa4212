// BlockCover's map on Hopper. What is computed: select_cover_cuda_map.cuh.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_COVER_SM90_MAP_CUH_
#define FLEXPREFILL_SRC_SELECT_SELECT_COVER_SM90_MAP_CUH_

#include "select/select_cover_cuda_map.cuh"
#include "select/select_cover_sm90_pool.cuh"
#include "select/select_cover_sm90_tiles.cuh"

namespace flexprefill {

template <typename Shape>
struct CoverMapShared {
  CoverTiles<Shape> tiles;
  uint32_t released[Shape::kStages];  // how often warps did not need it any more
  // The task in work, by one thread for all: registers are short.
  int32_t next_task;
  bool skips;
  BlockTask task;
  MeansMapTask means;
  int32_t first_key_row;  // of the keys' first mean
  RowOfOnes<typename Shape::Element> ones;
  QueryTiles queries;  // to be read; none: their means were made before
};

// Scores 4 g + 2 r + e of a thread are of the means of queries first_row + r and of keys 16 (g / 2)
// + first_column + 2 (g % 2) + e, counted from the tile's: the order of query_place and key_place.
struct MapThread {
  int32_t lane, warp_row, first_row, first_column;

  // Worked out anew for each tile: registers are short.
  __device__ MapThread()
      : lane(lane_here()),
        warp_row(static_cast<int32_t>(threadIdx.x) / 32 * 16),
        first_row(warp_row + lane / 4 * 2),
        first_column(lane % 4 * 4) {}
};

using CoverScores = float[64];

// Means of keys that a row does not see become -inf; a ragged last one counts by its tokens.
// column: the tile's first.
__device__ __forceinline__ void mask_means(const MeansMapTask& task, const MapThread& me,
                                           int32_t column, float scale, CoverScores& scores) {
  if (column + 127 <= task.first + me.warp_row) return;
  column += me.first_column;
  const int32_t last_mean = (task.s_kv - 1) / task.pool;
  const int32_t ragged = task.s_kv - last_mean * task.pool;
  const float less = ragged < task.pool
                         ? log2f(static_cast<float>(ragged) / static_cast<float>(task.pool)) / scale
                         : 0.0f;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int32_t last = task.first + me.first_row + r - column;
#pragma unroll
    for (int g = 0; g < 16; ++g) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int32_t own = g / 2 * 16 + g % 2 * 2 + e;
        float& score = scores[4 * g + 2 * r + e];
        if (own > last) score = -INFINITY;
        if (own == last_mean - column) score += less;
      }
    }
  }
}

// Pass 1: the thread's part of its two rows, relative to what it was before if that will do.
// `first`: nothing was before.
__device__ __forceinline__ void add_means(bool first, float scale, const CoverScores& scores,
                                          RowSum (&rows)[2]) {
  if (!first) {
    float sums[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float parts[2] = {rows[r].sum, 0};
#pragma unroll
      for (int g = 0; g < 16; ++g) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          parts[e] += exp2_approx(fmaf(scores[4 * g + 2 * r + e], scale, -rows[r].max));
        }
      }
      sums[r] = parts[0] + parts[1];
    }
    const bool good = sums[0] < kMostSum && sums[1] < kMostSum;
    if (__all_sync(kWholeWarp, good ? 1 : 0) != 0) {
      rows[0].sum = sums[0];
      rows[1].sum = sums[1];
      return;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float highest = fmaxf(scaled_max(greatest_score(scores, r), scale), rows[r].max);
    float parts[2] = {rows[r].sum * exp2_approx(rows[r].max - highest), 0};
#pragma unroll
    for (int g = 0; g < 16; ++g) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        parts[e] += exp2_approx(fmaf(scores[4 * g + 2 * r + e], scale, -highest));
      }
    }
    rows[r] = {highest, parts[0] + parts[1]};
  }
}

// After pass 1: log2 of a row's weight in its block over its sum; -inf where there is no row. True
// if it has no softmax.
__device__ __forceinline__ bool finish_row(const MeansMapTask& task, int32_t r, RowSum row,
                                           float& offset) {
  const float highest = max_quad(row.max);
  row = {highest, sum_quad(row.sum * exp2_approx(row.max - highest))};
  offset = -INFINITY;
  if (r < task.begin || r >= task.end) return false;
  const float share = static_cast<float>(task.tokens(r)) / static_cast<float>(task.block_tokens(r));
  offset = log2f(share) - row.log();
  return !(row.sum > 0);
}

// Pass 2: probabilities, summed to blocks of kPer by kPer means, to the map.
template <int kPer>
__device__ __forceinline__ void write_means(const MeansMapTask& task, const MapThread& me,
                                            int32_t column, float scale, CoverScores& scores,
                                            const float (&offsets)[2]) {
  const int32_t c = me.lane % 4, odd = me.lane / 4 % 2;
  __half* to = task.map + int64_t{me.first_row / kPer} * task.pitch + column / kPer;
  const auto p = [&](int g, int r, int e) {
    return exp2_approx(fmaf(scores[4 * g + 2 * r + e], scale, offsets[r]));
  };
  const auto put = [&](int32_t block, float low, float high) {
    *reinterpret_cast<__half2*>(to + block) = __floats2half2_rn(low * kMapUnits, high * kMapUnits);
  };
  if constexpr (kPer == 1) {
#pragma unroll
    for (int g = 0; g < 16; ++g) {
      const int32_t block = g / 2 * 16 + 4 * c + g % 2 * 2;
      put(block, p(g, 0, 0), p(g, 0, 1));
      put(block + task.pitch, p(g, 1, 0), p(g, 1, 1));
    }
  } else if constexpr (kPer == 2) {
#pragma unroll
    for (int g = 0; g < 16; g += 2) {
      float sums[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sums[h] = p(g + h, 0, 0) + p(g + h, 0, 1) + (p(g + h, 1, 0) + p(g + h, 1, 1));
      }
      put(g / 2 * 8 + 2 * c, sums[0], sums[1]);
    }
  } else {
    // A block's other two rows are four lanes away. Lanes a pair apart put their blocks together.
    float sums[8];
#pragma unroll
    for (int g = 0; g < 16; g += 2) {
      sums[g / 2] = p(g, 0, 0) + p(g, 0, 1) + (p(g, 1, 0) + p(g, 1, 1)) +
                    (p(g + 1, 0, 0) + p(g + 1, 0, 1) + (p(g + 1, 1, 0) + p(g + 1, 1, 1)));
    }
    exchange_halves<8>(sums, 4);  // 16 columns 2 k + odd
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      to[4 * (2 * k + odd) + c] = __float2half_rn(sums[k] * kMapUnits);
    }
  }
}

// Rows that do not exist hold anything: to make zeros of their probabilities.
__device__ __forceinline__ void clear_missing_rows(const float (&offsets)[2], CoverScores& scores) {
  const bool exists = offsets[0] > -INFINITY && offsets[1] > -INFINITY;
  if (__all_sync(kWholeWarp, exists ? 1 : 0) != 0) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int g = 0; g < 16; ++g) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = scores[4 * g + 2 * r + e];
        score = offsets[r] > -INFINITY ? score : 0;
      }
    }
  }
}

// Loads of a task: tiles of queries, numbers -count to -1, or its rows; its columns for one pass,
// from 0 on, and again for the other. There is no warp for them, so that each thread may have 128
// registers: of the warps that read a tile, the last one has another loaded in its place. Means
// that do not exist were not written: as rows they are left out, as columns masked.
template <typename Shape>
__device__ inline void load_columns(const CoverSm90Params& params, int32_t load, uint32_t stage,
                                    CoverMapShared<Shape>& shared) {
  const int32_t tiles = shared.means.tiles, tile = load < tiles ? load : load - tiles;
  load_means<Shape>(params.key_means, &shared.tiles.full[stage], shared.tiles.columns[stage],
                    shared.first_key_row + tile * 128);
}
template <typename Shape>
__device__ inline void load_tile(const CoverSm90Params& params, int32_t load, uint32_t stage,
                                 CoverMapShared<Shape>& shared) {
  if (load >= 0) return load_columns(params, load, stage, shared);
  load_queries<Shape>(params, shared.task.view, shared.means, shared.queries.end() + load,
                      &shared.tiles.full[stage], shared.tiles.columns[stage]);
}

// One thread; nobody reads rows or columns.
template <typename Shape>
__device__ inline void start_loads(const CoverSm90Params& params, CoverRing<Shape> ring,
                                   CoverMapShared<Shape>& shared) {
  shared.first_key_row = static_cast<int32_t>(
      first_key_mean(params.select, params.cover, shared.task.view.sequence, shared.task.kv));
  if (shared.queries.count == 0) {
    const BlockTask& task = shared.task;
    const DeviceSequence& sequence = params.select.problem.sequences[task.view.sequence];
    const int64_t first =
        first_query_mean(params.select, params.cover, task.view.sequence, task.view.head) +
        int64_t{task.first_block - sequence.first_q_block} * shared.means.per_block;
    load_means<Shape>(params.query_means, &shared.tiles.rows_full, shared.tiles.rows,
                      static_cast<int32_t>(first));
  }
  const int32_t first = -shared.queries.count;
#pragma unroll 1
  for (int32_t n = 0; n < Shape::kStages && first + n < 2 * shared.means.tiles; ++n) {
    load_tile(params, first + n, ring.stage, shared);
    ring.advance();
  }
}

// One lane of a warp that does not read load number `load` any more. kColumns: neither it nor what
// comes in its place is queries; known beforehand, it saves registers.
template <bool kColumns, typename Shape>
__device__ inline void release_tile(const CoverSm90Params& params, int32_t load,
                                    const CoverRing<Shape>& ring, CoverMapShared<Shape>& shared) {
  constexpr uint32_t kWarps = kCoverComputeThreads / 32;
  sm90::Barrier* empty = &shared.tiles.empty[ring.stage];
  sm90::barrier_arrive(empty);
  if (atomicAdd(&shared.released[ring.stage], 1u) % kWarps != kWarps - 1) return;
  if (load + Shape::kStages >= 2 * shared.means.tiles) return;
  sm90::barrier_wait(empty, ring.parity);  // over: orders what was read
  if constexpr (kColumns) {
    load_columns(params, load + Shape::kStages, ring.stage, shared);
  } else {
    load_tile(params, load + Shape::kStages, ring.stage, shared);
  }
}

// Means of the task's queries, to its rows: 64 of them, then the others.
template <typename Shape>
__device__ __forceinline__ void pool_queries(const CoverSm90Params& params, int32_t group,
                                             CoverRing<Shape>& ring,
                                             CoverMapShared<Shape>& shared) {
  const MeansMapTask& task = shared.means;
  const int32_t end = same_in_warp(shared.queries.end()), pool = same_in_warp(task.pool);
  int32_t tile = same_in_warp(shared.queries.first);
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    PooledQueries<Shape> means;
#pragma unroll 1
    for (; tile < min(end, (half + 1) * pool / 2); ++tile) {
      uint16_t* queries = shared.tiles.columns[ring.stage];
      sm90::barrier_wait(&shared.tiles.full[ring.stage], ring.parity);
      clear_other_queries<Shape>(task, tile, queries);
      if (pool == 32) {
        means.template add<32>(shared.ones, queries, group, tile * 4 - 64 * half);
      } else {
        means.template add<16>(shared.ones, queries, group, tile * 8 - 64 * half);
      }
      __syncwarp();
      if (lane_here() == 0) release_tile<false>(params, tile - end, ring, shared);
      ring.advance();
    }
    means.store(task, group, half, shared.tiles.rows);
  }
  sm90::fence_proxy_async();
  __syncthreads();
}

// Both passes. True where a row of the thread has no softmax.
template <typename Shape>
__device__ __forceinline__ bool compute_map(const CoverSm90Params& params, uint32_t& rows_parity,
                                            CoverRing<Shape>& ring, CoverMapShared<Shape>& shared) {
  const MeansMapTask& task = shared.means;
  const int32_t group = same_in_warp(static_cast<int32_t>(threadIdx.x) / sm90::kWarpgroupThreads);
  if (same_in_warp(shared.queries.count) > 0) {
    pool_queries(params, group, ring, shared);
  } else {
    sm90::barrier_wait(&shared.tiles.rows_full, rows_parity);
    rows_parity ^= 1;
  }
  const int32_t last_row = same_in_warp(task.first) + group * 64 + 63;  // of the warpgroup
  const int32_t tiles = same_in_warp(task.tiles);
  CoverScores scores;
  // work(me, column, scale): of each tile that the warpgroup's rows see some of.
  const auto pass = [&](int32_t first_load, const auto& work) {
#pragma unroll 1
    for (int32_t tile = 0; tile < tiles; ++tile) {
      sm90::barrier_wait(&shared.tiles.full[ring.stage], ring.parity);
      const int32_t column = tile * 128;
      const bool needed = column <= last_row;
      if (needed) multiply_columns<Shape, 128>(shared.tiles, group, ring.stage, 0, scores);
      __syncwarp();
      if (lane_here() == 0) release_tile<true>(params, first_load + tile, ring, shared);
      ring.advance();
      if (!needed) continue;
      const float scale = scale_scores(params.select.scale_log2, scores);
      const MapThread me;
      mask_means(task, me, column, scale, scores);
      work(me, column, scale);
    }
  };
  RowSum rows[2];
  pass(0, [&](const MapThread&, int32_t column, float scale) {
    add_means(column == 0, scale, scores, rows);
  });
  // Pass 1 needs the means alone, which were there before the columns' kernel let this one start.
  await_previous_kernel();
  start_next_kernel();
  float offsets[2];
  bool bad = false;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    bad = finish_row(task, MapThread().first_row + r, rows[r], offsets[r]) || bad;
  }
  pass(tiles, [&](const MapThread& me, int32_t column, float scale) {
    clear_missing_rows(offsets, scores);
    if (task.per_block == 4) {
      write_means<4>(task, me, column, scale, scores, offsets);
    } else if (task.per_block == 2) {
      write_means<2>(task, me, column, scale, scores, offsets);
    } else {
      write_means<1>(task, me, column, scale, scores, offsets);
    }
  });
  return bad;
}

template <typename Shape>
__global__ void __launch_bounds__(kCoverComputeThreads, Shape::kCtas)
    cover_map_sm90_kernel(const __grid_constant__ CoverSm90Params params) {
  static_assert(sizeof(CoverTiles<Shape>::columns) >=
                kCoverComputeThreads / 32 * sizeof(CoverSharedWarp));
  const SelectProblem& select = params.select;
  auto& shared = *reinterpret_cast<CoverMapShared<Shape>*>(shared_memory());
  const auto thread = static_cast<int32_t>(threadIdx.x);
  if (thread == 0) shared.tiles.init();
  if (thread < Shape::kStages) shared.released[thread] = 0;
  shared.ones.init();
  sm90::fence_proxy_async();
  CoverRing<Shape> ring;
  uint32_t rows_parity = 0;
  auto t = static_cast<int32_t>(blockIdx.x);
  while (t < params.cover.tasks) {
    if (thread == 0) {
      shared.task = map_task(select, params.cover, t);
      // Asked by one: other CTAs write it meanwhile, and so may the kernel before.
      shared.skips = !shared.task.any || select.not_finite[shared.task.view.number] != 0;
      if (!shared.skips) {
        shared.means = MeansMapTask(select, params.cover, shared.task);
        shared.queries = params.cover.map_pools ? QueryTiles(shared.means) : QueryTiles();
        start_loads(params, ring, shared);
      }
    }
    __syncthreads();
    const bool skips = same_in_warp(shared.skips ? 1 : 0) != 0;
    bool bad = false;
    if (!skips) bad = compute_map(params, rows_parity, ring, shared);
    // Each CTA begins with one of the longest tasks, and draws the others when it is about to need
    // one: drawn a task ahead, the last ones went to CTAs that still had much to do.
    if (thread == 0) {
      shared.next_task = static_cast<int32_t>(gridDim.x + atomicAdd(params.cover.drawn, 1u));
    }
    bad = __syncthreads_or(bad ? 1 : 0) != 0;
    if (!skips) {
      if (bad) {
        if (thread == 0) select.set_not_finite(shared.task.view.number);
      } else {
        decide_map<kCoverComputeThreads / 32>(
            select, params.cover, shared.task, shared.means,
            reinterpret_cast<CoverSharedWarp*>(shared.tiles.columns));
        sm90::fence_proxy_async();  // TMA writes there next
      }
    }
    t = same_in_warp(shared.next_task);
    __syncthreads();
  }
  await_previous_kernel();  // should all tasks have been skipped
}

template <typename Shape>
void launch_cover_map_sm90(const CoverSm90Params& params, uint32_t ctas, void* stream) {
  launch_overlapped(cover_map_sm90_kernel<Shape>, dim3(ctas), dim3(kCoverComputeThreads),
                    sizeof(CoverMapShared<Shape>), stream, params);
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_COVER_SM90_MAP_CUH_

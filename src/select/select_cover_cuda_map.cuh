// BlockCover's map, and what each row of it keeps. A CTA has 128 means of queries of one head, with
// blocks of 128 those of 32 query blocks, and walks over tiles of 128 means of keys, twice:
//
//   pass 1   max and sum of each row's exponentials, in registers
//   pass 2   the products again, each a probability now: summed over the means of a query block and
//            of a key block, 16 numbers to one, they are the map's entries, which go to the CTA's
//            scratch [query blocks, n_kv]
//
// and then a warp a row decides. What bounds it: products and exponentials, as many, twice. (Once
// would do with a scratch that holds a row for each mean and the maxima of each tile, but that is
// four times as large: at 128k tokens more than the workspace may have for two CTAs a
// multiprocessor, which cover each other's exponentials.)
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_COVER_CUDA_MAP_CUH_
#define FLEXPREFILL_SRC_SELECT_SELECT_COVER_CUDA_MAP_CUH_

#include "select/select_cover_cuda_plan.cuh"
#include "select/select_cover_cuda_rows.cuh"

namespace flexprefill {

struct MapShared {
  // Pass 1: max and sum of each thread's part of its rows (registers are short), then of the rows
  // in both halves of their columns.
  union {
    float parts[16][CoverTile::kThreads];
    float2 sums[2][CoverTile::kRows];
  };
  float offset[CoverTile::kRows];  // log2: of the row's weight in its block over its sum
};

inline int64_t cover_scratch_bytes(int64_t tile_blocks, int64_t n_kv) {
  return tile_blocks * n_kv * static_cast<int64_t>(sizeof(__half));
}

__device__ inline BlockTask map_task(const SelectProblem& select, const CoverParams& p, int32_t t) {
  return {select, t, [&](const DeviceSequence& sequence) { return p.tile_blocks(sequence); }};
}

// A task in means.
struct MeansMapTask {
  int32_t pool, per_block;
  int32_t first;       // number of the tile's first mean of queries, and of the keys' beside it
  int32_t begin, end;  // rows of the tile that have queries
  int32_t s_kv, n_kv, position;
  int32_t tiles, pitch;
  __half* map;

  __device__ MeansMapTask(const SelectProblem& select, const CoverParams& p,
                          const BlockTask& task) {
    const DeviceSequence& sequence = select.problem.sequences[task.view.sequence];
    pool = p.pool(sequence);
    per_block = p.per_block(sequence);
    first = task.first_block * per_block;
    s_kv = sequence.s_kv;
    n_kv = sequence.n_kv;
    position = sequence.first_position();
    const int32_t from = position / pool - first, to = (s_kv + pool - 1) / pool - first;
    begin = from > 0 ? from : 0;
    end = to < CoverTile::kRows ? to : CoverTile::kRows;
    tiles = (first + end - 1) / CoverTile::kColumns + 1;
    pitch = p.memory.pitch;
    map = reinterpret_cast<__half*>(p.memory.scratch + blockIdx.x * p.memory.scratch_bytes);
  }
  // Tokens of row r, which exists.
  __device__ int32_t tokens(int32_t r) const {
    const int32_t from = (first + r) * pool, to = from + pool;
    return (to < s_kv ? to : s_kv) - (from > position ? from : position);
  }
  // Tokens of the block of row r.
  __device__ int32_t block_tokens(int32_t r) const {
    const int32_t size = per_block * pool, from = (first + r) / per_block * size;
    const int32_t to = from + size < s_kv ? from + size : s_kv;
    return to - (from > position ? from : position);
  }
  // Whether a warp's rows see some of its columns of a tile.
  __device__ bool sees(const TileThread& me, int32_t tile) const {
    return tile * CoverTile::kColumns + me.first_column() <= first + me.first_row() + 63;
  }
};

// Means of keys that a row does not see become -inf; a ragged last one counts by its tokens.
__device__ inline void mask_means(const MeansMapTask& task, const TileThread& me, int32_t tile,
                                  float scale, TileScores& x) {
  const int32_t column = tile * CoverTile::kColumns + me.column0;
  if (tile * CoverTile::kColumns + me.first_column() + 63 <= task.first + me.first_row()) return;
  const int32_t last_mean = (task.s_kv - 1) / task.pool, ragged = task.s_kv - last_mean * task.pool;
  const float less = ragged < task.pool
                         ? log2f(static_cast<float>(ragged) / static_cast<float>(task.pool)) / scale
                         : 0.0f;
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    const int32_t last = task.first + row_at(me, r) - column;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = score_at(x, r, n, e);
        if (8 * n + e > last) score = -INFINITY;
        if (8 * n + e == last_mean - column) score += less;
      }
    }
  }
}

// Pass 1 of a tile: the thread's parts of its rows' sums.
__device__ inline void add_row_sums(float scale, TileScores& x, MapShared& shared) {
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    float& max = shared.parts[r][threadIdx.x];
    float& sum = shared.parts[8 + r][threadIdx.x];
    const float old_max = max;
    float highest = -FLT_MAX;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) highest = fmaxf(highest, score_at(x, r, n, e));
    }
    highest = fmaxf(scaled_max(highest, scale), old_max);
    float parts[2] = {sum * exp2_approx(old_max - highest), 0};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        parts[e] += exp2_approx(fmaf(score_at(x, r, n, e), scale, -highest));
      }
    }
    max = highest;
    sum = parts[0] + parts[1];
  }
}

// The rows' offsets from all parts, to shared.offset; false if a row has no softmax. Ends with a
// barrier.
__device__ inline bool finish_row_sums(const MeansMapTask& task, MapShared& shared) {
  const auto me = TileThread::of<CoverTile>();
  const auto thread = static_cast<int32_t>(threadIdx.x);
  float max[8], sum[8];
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    max[r] = shared.parts[r][thread];
    sum[r] = shared.parts[8 + r][thread];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    float highest = fmaxf(max[r], __shfl_xor_sync(kWholeWarp, max[r], 1));
    highest = fmaxf(highest, __shfl_xor_sync(kWholeWarp, highest, 2));
    float total = sum[r] * exp2_approx(max[r] - highest);
    total += __shfl_xor_sync(kWholeWarp, total, 1);
    total += __shfl_xor_sync(kWholeWarp, total, 2);
    if (me.lane % 4 == 0) {
      shared.sums[me.first_column() / 64][row_at(me, r)] = {highest, total};
    }
  }
  __syncthreads();
  RowSum row;
  row.add(shared.sums[0][thread].x, shared.sums[0][thread].y);
  row.add(shared.sums[1][thread].x, shared.sums[1][thread].y);
  const bool exists = thread >= task.begin && thread < task.end;
  float offset = -INFINITY;
  if (exists) {
    const float share =
        static_cast<float>(task.tokens(thread)) / static_cast<float>(task.block_tokens(thread));
    offset = log2f(share) - row.log();
  }
  shared.offset[thread] = offset;
  return __syncthreads_count(exists && !(row.sum > 0) ? 1 : 0) == 0;
}

// Pass 2 of a tile: its probabilities, summed to blocks of kPer by kPer means, to the map.
template <int kPer>
__device__ inline void write_map_tile(const MeansMapTask& task, const TileThread& me, int32_t tile,
                                      float scale, TileScores& x, const MapShared& shared) {
  const int32_t c = me.lane % 4, row_lane = me.lane / 4;
  // Rows of this thread from 8 q on; q = 0 .. 7 as row_at counts them.
#pragma unroll
  for (int q = 0; q < 8; ++q) {
    const float offset = shared.offset[row_at(me, q)];
    const bool exists = offset > -INFINITY;
    float sums[8 * (kPer == 1 ? 2 : 1)];  // [n], or [n][e] with single means
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float first = exists ? exp2_approx(fmaf(score_at(x, q, n, 0), scale, offset)) : 0;
      const float second = exists ? exp2_approx(fmaf(score_at(x, q, n, 1), scale, offset)) : 0;
      if constexpr (kPer == 1) {
        sums[2 * n] = first;
        sums[2 * n + 1] = second;
      } else {
        sums[n] = first + second;
      }
    }
    // The row of the map, and how many of the sums are left and which they are.
    const int32_t row = row_at(me, q) / kPer;
    __half* to = task.map + int64_t{row} * task.pitch;
    const int32_t block0 = (tile * CoverTile::kColumns + me.first_column()) / kPer;
    const auto put = [&](int32_t block, float sum) {
      to[block] = __float2half_rn(sum * kMapUnits);
    };
    if constexpr (kPer == 4) {
      exchange_halves<8>(sums, 1);  // columns 2 c, 2 c + 1: n = 2 k + c % 2
      exchange_halves<4>(sums, 4);  // rows: k = 2 l + row_lane % 2
      exchange_halves<2>(sums, 8);  // l = row_lane / 2 % 2
      const int32_t k = row_lane / 2 % 2 * 2 + row_lane % 2;
      put(block0 + 2 * (2 * k + c % 2) + c / 2, sums[0]);
    } else if constexpr (kPer == 2) {
      exchange_halves<8>(sums, 4);  // n = 2 k + row_lane % 2
#pragma unroll
      for (int k = 0; k < 4; ++k) put(block0 + 4 * (2 * k + row_lane % 2) + c, sums[k]);
    } else {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        put(block0 + 8 * n + 2 * c, sums[2 * n]);
        put(block0 + 8 * n + 2 * c + 1, sums[2 * n + 1]);
      }
    }
  }
}

// After the passes: a warp a row. `shared`: of each of the kWarps warps, free.
template <int32_t kWarps>
__device__ inline void decide_map(const SelectProblem& select, const CoverParams& p,
                                  const BlockTask& task, const MeansMapTask& means,
                                  CoverSharedWarp* shared) {
  const int32_t lane = lane_here(), warp = static_cast<int32_t>(threadIdx.x) / 32;
  const CoverHead head(select, task.view);
  const AskingRows asking(select.problem.sequences[task.view.sequence].s_q);
  const auto asks_from =
      static_cast<int32_t>((means.position + asking.row(0)) / select.problem.block_size);
  const float* most_asked = p.memory.most_asked + head.first_block;
  CoverSharedWarp& own = shared[warp];
  for (int32_t e = lane; e < 8 * 32; e += 32) {
    *reinterpret_cast<uint4*>(own.bins[e / 32][e % 32]) = {0, 0, 0, 0};
  }
  __syncwarp();
  float least = 1;
  int32_t below = 0;
#pragma unroll 1
  for (int32_t b = warp; b < task.blocks; b += kWarps) {
    const int32_t i = task.first_block + b;
    const uint64_t* columns = i >= asks_from ? p.memory.columns + head.first_word : nullptr;
    const RowMass mass =
        keep_cover_warp(means.map + int64_t{b} * means.pitch, i, means.n_kv, p.rule, columns,
                        most_asked, select.audit != nullptr, own, task.row(select, i));
    least = fminf(least, mass.share());
    below += mass.kept < mass.wanted ? 1 : 0;
  }
  if (lane != 0 || select.audit == nullptr) return;
  atomicMin(p.memory.least_share + task.view.number, std::bit_cast<uint32_t>(least));
  if (below > 0) atomicAdd(p.memory.rows_below + task.view.number, below);
}

template <typename Element>
__global__ void __launch_bounds__(CoverTile::kThreads, 2)
    cover_map_kernel(const __grid_constant__ SelectProblem select,
                     const __grid_constant__ CoverParams p) {
  await_previous_kernel();
  start_next_kernel();
  const DeviceProblem& problem = select.problem;
  std::byte* ring = shared_memory();
  auto& shared = *reinterpret_cast<MapShared*>(ring + p.ring_bytes);
  const int32_t d = problem.d_qk, steps = CoverTile::steps(d);
  for (auto t = static_cast<int32_t>(blockIdx.x); t < p.tasks;
       t += static_cast<int32_t>(gridDim.x)) {
    const BlockTask task = map_task(select, p, t);
    // Asked together: other CTAs write it meanwhile.
    const bool skip = !task.any || select.not_finite[task.view.number] != 0;
    if (__syncthreads_count(skip ? 1 : 0) != 0) continue;
    const DeviceSequence& sequence = problem.sequences[task.view.sequence];
    const MeansMapTask means(select, p, task);
    const int64_t row_bytes = int64_t{d} * 2;
    const std::byte* q =
        p.memory.q_means + (first_query_mean(select, p, task.view.sequence, task.view.head) +
                            means.first - int64_t{sequence.first_q_block} * means.per_block) *
                               row_bytes;
    const std::byte* k =
        p.memory.k_means + first_key_mean(select, p, task.view.sequence, task.kv) * row_bytes;
    const int32_t seen = means.first + means.end;  // means of keys that some row sees
    const auto rows = [&](std::byte* to, int32_t step) {
      load_stage_rows<CoverTile::kRows, CoverTile::kThreads>(
          to, step * CoverTile::kDepth, d, true, p.memory.q_means,
          [&](int32_t r) -> const std::byte* {
            return r >= means.begin && r < means.end ? q + query_place(r) * row_bytes : nullptr;
          });
    };
    const auto columns = [&](std::byte* to, int32_t tile, int32_t step) {
      load_stage_rows<CoverTile::kColumns, CoverTile::kThreads>(
          to, step * CoverTile::kDepth, d, true, p.memory.k_means,
          [&](int32_t r) -> const std::byte* {
            const int32_t c = tile * CoverTile::kColumns + r;
            return c < seen ? k + key_place(c) * row_bytes : nullptr;
          });
    };
    const auto busy = [&](int32_t tile) { return means.sees(TileThread::of<CoverTile>(), tile); };
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      shared.parts[r][threadIdx.x] = -FLT_MAX;
      shared.parts[8 + r][threadIdx.x] = 0;
    }
    for_each_product<Element, CoverTile>(
        ring, p.stages, means.tiles, steps, rows, columns, busy, [&](int32_t tile, TileScores& x) {
          if (!busy(tile)) return;
          const float scale = scale_scores(select.scale_log2, x);
          mask_means(means, TileThread::of<CoverTile>(), tile, scale, x);
          add_row_sums(scale, x, shared);
        });
    const bool good = finish_row_sums(means, shared);
    if (good) {
      for_each_product<Element, CoverTile>(
          ring, p.stages, means.tiles, steps, [](std::byte*, int32_t) {}, columns, busy,
          [&](int32_t tile, TileScores& x) {
            if (!busy(tile)) return;
            const auto me = TileThread::of<CoverTile>();
            const float scale = scale_scores(select.scale_log2, x);
            mask_means(means, me, tile, scale, x);
            if (means.per_block == 4) {
              write_map_tile<4>(means, me, tile, scale, x, shared);
            } else if (means.per_block == 2) {
              write_map_tile<2>(means, me, tile, scale, x, shared);
            } else {
              write_map_tile<1>(means, me, tile, scale, x, shared);
            }
          });
    } else if (threadIdx.x == 0) {
      select.set_not_finite(task.view.number);
    }
    __syncthreads();
    if (good) {
      decide_map<CoverTile::kThreads / 32>(select, p, task, means,
                                           reinterpret_cast<CoverSharedWarp*>(ring));
    }
    __syncthreads();
  }
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_COVER_CUDA_MAP_CUH_

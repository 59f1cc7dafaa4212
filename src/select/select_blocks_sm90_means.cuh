// FlashPrefill's scores on Hopper. What is computed: select_blocks_cuda_means.cuh.
//
// A CTA, one on a multiprocessor, has 128 or 256 query rows of one head in shared memory and walks
// over strips of 64 block means. The first warpgroup has a warp that loads and three that decide;
// of the others each multiplies 64 means by 128 rows, [64, d] x [d, 128], so that a thread has 32
// queries of two means, and the sums over a block's queries are nearly all its own. Rows of the
// next task come while a task is in work, and it is decided while the next one is.
//
//   sums   [blocks, pitch]       over a query block's rows: exp2(score - the warp's reference)
//   bases  [blocks, pitch / 16]  those references, of a warp's 16 means
//
// A reference is the greatest score of the warp's first strip of the task, and stays as long as
// no sum passes kMostSum: later strips take no maximum.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_SM90_MEANS_CUH_
#define FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_SM90_MEANS_CUH_

#include <cfloat>
#include <cstdint>

#include "cuda/sm90.cuh"
#include "select/select_blocks_cuda_plan.cuh"
#include "select/select_blocks_cuda_rows.cuh"

namespace flexprefill {

struct MeansSm90Params {
  sm90::TensorMap queries, means;
  SelectProblem select;
  BlockScores scores;
  int32_t q_packed;  // no dimension of sequences
};

constexpr int kStripMeans = 64;
constexpr int kBaseMeans = 16;  // of a warp, which share a reference
constexpr float kMostSum = 0x1p64f;

// Kernels: element type and head dim as padded. Head dims up to it run through it; zeros fill up.
template <typename Element_, int kDim_>
struct MeansShape {
  using Element = Element_;
  static constexpr int kDim = kDim_;
  static constexpr int kChunks = kDim / sm90::kChunkColumns;
  static constexpr int kStripBytes = kStripMeans * kDim * 2;
  // Affects speed only: what fits. Rows go by halves of 128; kTurns warpgroups share a half and
  // take its strips in turn. A stage is always the same turn's: kStages is a multiple of kTurns.
  static constexpr int kHalves = kDim <= 128 ? 2 : 1;
  static constexpr int kTurns = kDim <= 128 ? 2 : kDim == 192 ? 4 : 3;
  static constexpr int kStages = kDim == 64 ? 8 : kDim == 128 ? 6 : kDim == 192 ? 4 : 3;
  static_assert(kStages % kTurns == 0);
  static constexpr int kRows = 128 * kHalves;
  static constexpr int kWarpgroups = kHalves * kTurns;
  static constexpr int kThreads = (1 + kWarpgroups) * sm90::kWarpgroupThreads;
};

constexpr int kMeansDeciders = 3;  // warps

// Where a warp stands in a CTA's scratch.
struct MeansScratch {
  float *sums, *bases;
  int32_t pitch;

  // slot: 0 or 1.
  __device__ MeansScratch(const BlockScores& p, uint32_t slot) : pitch(p.pitch) {
    sums = p.own_scratch() + slot * (p.scratch_floats / 2);
    bases = sums + int64_t{p.tile_blocks} * pitch;
  }
  __device__ float* sums_of(int32_t block) const { return sums + int64_t{block} * pitch; }
  __device__ float* bases_of(int32_t block) const {
    return bases + int64_t{block} * (pitch / kBaseMeans);
  }
};

// Rows are counted from the task's first.
struct MeansSm90Task {
  BlockTask blocks;
  int32_t s_kv, n_kv, block_size;
  int32_t position;    // of the first row
  int32_t begin, end;  // rows that have queries
  int32_t strips;      // that the last row sees; 0: no more tasks

  MeansSm90Task() = default;
  __device__ MeansSm90Task(const SelectProblem& select, const BlockTask& task, int32_t rows)
      : blocks(task) {
    const DeviceSequence& sequence = select.problem.sequences[task.view.sequence];
    s_kv = sequence.s_kv;
    n_kv = sequence.n_kv;
    block_size = select.problem.block_size;
    position = task.first_block * block_size;
    begin = max(-task.first_row, 0);
    end = min(sequence.s_q - task.first_row, rows);
    strips = strips_of(end - 1);
  }
  // Strips of which a row sees some: of blocks whose last key it sees.
  __device__ int32_t strips_of(int32_t row) const {
    const int32_t seen = position + row == s_kv - 1 ? n_kv : (position + row + 1) / block_size;
    return (seen + kStripMeans - 1) / kStripMeans;
  }
  // Of the 128 rows from `row` on, the most; rows ascend in what they see.
  __device__ int32_t most_strips(int32_t row) const {
    const int32_t last = min(row + 128, end) - 1;
    return last < max(row, begin) ? 0 : strips_of(last);
  }
  // Whether some of the 128 rows from `row` on do not exist or do not see all of a strip.
  __device__ bool is_masked(int32_t row, int32_t strip) const {
    return row < begin || row + 128 > end ||
           (strip + 1) * kStripMeans * block_size > position + row + 1;
  }
  // The first row that sees mean j.
  __device__ int32_t first_row(int32_t j) const {
    if (j >= n_kv) return end;
    return max(min((j + 1) * block_size, s_kv) - 1 - position, begin);
  }
};

template <typename Shape>
struct MeansShared {
  // In chunks of 64 columns (sm90.cuh).
  alignas(1024) uint16_t rows[2][Shape::kHalves][128 * Shape::kDim];
  alignas(1024) uint16_t strips[Shape::kStages][kStripMeans * Shape::kDim];
  // Of the two slots that tasks take in turn: it has rows and a task, scores, a decision.
  sm90::Barrier loaded[2], scored[2], decided[2];
  sm90::Barrier full[Shape::kStages], empty[Shape::kStages];
  MeansSm90Task tasks[2];  // published by `loaded`

  __device__ void init() {
    for (int slot = 0; slot < 2; ++slot) {
      sm90::barrier_init(&loaded[slot], 1);
      sm90::barrier_init(&scored[slot], Shape::kWarpgroups * 4);
      sm90::barrier_init(&decided[slot], kMeansDeciders);
    }
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      sm90::barrier_init(&full[stage], 1);
      sm90::barrier_init(&empty[stage], Shape::kHalves * 4);
    }
    sm90::barrier_init_fence();
  }
};

// A place in a ring; the parity is that of the phase in which it gets full.
template <uint32_t kSize>
struct MeansRing {
  uint32_t place = 0, parity = 0;
  __device__ void advance(uint32_t by = 1) {
    place += by;
    if (place < kSize) return;
    place -= kSize;
    parity ^= 1;
  }
};

// ---- Loads: one thread -------------------------------------------------------------------------

template <typename Shape>
__device__ void load_means_task(const MeansSm90Params& params, const MeansSm90Task& task,
                                uint32_t slot, MeansRing<Shape::kStages>& ring,
                                MeansShared<Shape>& shared) {
  const DeviceSequence& sequence = params.select.problem.sequences[task.blocks.view.sequence];
  const auto row = static_cast<int32_t>(sequence.q_start) + task.blocks.first_row;
  const int32_t outer = params.q_packed != 0 ? 0 : task.blocks.view.sequence;
  shared.tasks[slot] = task;
  sm90::barrier_arrive_expect(&shared.loaded[slot], Shape::kRows * Shape::kDim * 2);
#pragma unroll 1
  for (int32_t half = 0; half < Shape::kHalves; ++half) {
#pragma unroll 1
    for (int32_t c = 0; c < Shape::kChunks; ++c) {
      sm90::tma_load(&params.queries, &shared.loaded[slot],
                     shared.rows[slot][half] + c * 128 * sm90::kChunkColumns,
                     c * sm90::kChunkColumns, row + half * 128, task.blocks.view.head, outer);
    }
  }
  const auto first =
      static_cast<int32_t>(sequence.first_mean + int64_t{task.blocks.kv} * task.n_kv);
#pragma unroll 1
  for (int32_t strip = 0; strip < task.strips; ++strip) {
    sm90::barrier_wait(&shared.empty[ring.place], ring.parity ^ 1);
    sm90::barrier_arrive_expect(&shared.full[ring.place], Shape::kStripBytes);
#pragma unroll 1
    for (int32_t c = 0; c < Shape::kChunks; ++c) {
      sm90::tma_load(&params.means, &shared.full[ring.place],
                     shared.strips[ring.place] + c * kStripMeans * sm90::kChunkColumns,
                     c * sm90::kChunkColumns, first + strip * kStripMeans, 0, 0);
    }
    ring.advance();
  }
}

template <typename Shape>
__device__ void load_all_means(const MeansSm90Params& params, MeansShared<Shape>& shared) {
  MeansRing<Shape::kStages> ring;
  MeansRing<2> slot;
#pragma unroll 1
  for (auto t = static_cast<int32_t>(blockIdx.x); t < params.scores.tasks;
       t += static_cast<int32_t>(gridDim.x)) {
    const BlockTask blocks(params.select, params.scores.tile_blocks, t);
    if (!blocks.any) continue;
    sm90::barrier_wait(&shared.decided[slot.place], slot.parity ^ 1);
    load_means_task(params, MeansSm90Task(params.select, blocks, Shape::kRows), slot.place, ring,
                    shared);
    slot.advance();
  }
  sm90::barrier_wait(&shared.decided[slot.place], slot.parity ^ 1);
  shared.tasks[slot.place].strips = 0;
  sm90::barrier_arrive(&shared.loaded[slot.place]);
}

// ---- Scores: a warpgroup -----------------------------------------------------------------------

// Score 4 g + 2 r + e of a thread: of mean first_mean + 8 r of the strip and row 8 g + first_row +
// e of the half.
struct MeansThread {
  int32_t lane, first_mean, first_row;

  // Worked out anew for each strip: registers are short.
  __device__ MeansThread()
      : lane(lane_here()),
        first_mean(static_cast<int32_t>(threadIdx.x) / 32 % 4 * kBaseMeans + lane / 4),
        first_row(lane % 4 * 2) {}
};

using StripScores = float[64];

template <typename Shape>
__device__ __forceinline__ void multiply_strip(const uint16_t* strip, const uint16_t* rows,
                                               StripScores& scores) {
  constexpr uint32_t kRows8 = 8 * sm90::kChunkRowBytes;
  const uint64_t a = sm90::wgmma_descriptor(strip, 16, kRows8);
  const uint64_t b = sm90::wgmma_descriptor(rows, 16, kRows8);
  sm90::wgmma_pin(scores);
  sm90::wgmma_fence();
#pragma unroll
  for (int step = 0; step < Shape::kDim / 16; ++step) {
    const int chunk = step / 4 * sm90::kChunkRowBytes, within = step % 4 * 32;
    sm90::wgmma_ss<typename Shape::Element, 128>(
        scores, sm90::wgmma_descriptor_at(a, chunk * kStripMeans + within),
        sm90::wgmma_descriptor_at(b, chunk * 128 + within), step > 0);
  }
  sm90::wgmma_commit();
  sm90::wgmma_wait<0>();
  sm90::wgmma_pin(scores);
}

// Scores of rows that do not exist or do not see a mean become -inf. row: the half's first.
__device__ __forceinline__ void mask_strip(const MeansSm90Task& task, int32_t row, int32_t strip,
                                           StripScores& scores) {
  const MeansThread me;
  const int32_t end = task.end - row - me.first_row;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int32_t first =
        task.first_row(strip * kStripMeans + me.first_mean + 8 * r) - row - me.first_row;
#pragma unroll
    for (int g = 0; g < 16; ++g) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool seen = 8 * g + e >= first && 8 * g + e < end;
        float& score = scores[4 * g + 2 * r + e];
        score = seen ? score : -INFINITY;
      }
    }
  }
}

// The negative of a warp's reference for each 32 rows, which is one for a query block.
// kPer: query blocks of 128 rows.
template <int kPer>
__device__ __forceinline__ void take_bases(float scale, const StripScores& scores,
                                           float (&less)[4]) {
  float most[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    most[q] = -FLT_MAX;
#pragma unroll
    for (int s = 0; s < 16; ++s) most[q] = fmaxf(most[q], scores[16 * q + s]);
  }
#pragma unroll
  for (int q = 0; q < 4; q += 4 / kPer) {
#pragma unroll
    for (int other = 1; other < 4 / kPer; ++other) most[q] = fmaxf(most[q], most[q + other]);
    // In units of log2 from here on; FLT_MAX may become infinite.
    most[q] = -scaled_max(max_warp(most[q]), scale);
#pragma unroll
    for (int other = 0; other < 4 / kPer; ++other) less[q + other] = most[q];
  }
}

// Sums over a query block's rows of a thread and of the three others that have its means. A lane
// gets those of mean first_mean + 8 (lane % 2), kPer == 4: of blocks lane / 2 % 2 + {0, 2}; 2: of
// block lane / 2 % 2.
template <int kPer>
__device__ __forceinline__ void sum_strip(float scale, const StripScores& scores,
                                          const float (&less)[4], float (&sums)[2]) {
  float own[8];
#pragma unroll
  for (int q = 0; q < 4; ++q) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = 0;
#pragma unroll
      for (int g = 4 * q; g < 4 * q + 4; ++g) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          sum += exp2_approx(fmaf(scores[4 * g + 2 * r + e], scale, less[q]));
        }
      }
      own[2 * q + r] = sum;
    }
  }
  if constexpr (kPer == 4) {
    exchange_halves<8>(own, 1);
    exchange_halves<4>(own, 2);
  } else if constexpr (kPer == 2) {
#pragma unroll
    for (int k = 0; k < 4; ++k) own[k] = own[k / 2 * 4 + k % 2] + own[k / 2 * 4 + k % 2 + 2];
    exchange_halves<4>(own, 1);
    exchange_halves<2>(own, 2);
  } else {
#pragma unroll
    for (int r = 0; r < 2; ++r) own[r] += own[2 + r] + (own[4 + r] + own[6 + r]);
    exchange_halves<2>(own, 1);
    own[0] += __shfl_xor_sync(kWholeWarp, own[0], 2);
  }
  sums[0] = own[0];
  sums[1] = own[1];
}

// The scores of a strip become sums in the scratch. block: the half's first of the task's.
// `fresh`: it is the first of the task.
template <int kPer>
__device__ __forceinline__ void finish_strip(const MeansScratch& scratch, int32_t block,
                                             int32_t strip, float scale, bool fresh,
                                             const StripScores& scores, float (&less)[4]) {
  float sums[2];
#pragma unroll 1
  for (;; fresh = true) {
    if (fresh) take_bases<kPer>(scale, scores, less);
    sum_strip<kPer>(scale, scores, less, sums);
    if (fresh) break;
    const bool small = sums[0] < kMostSum && (kPer < 4 || sums[1] < kMostSum);
    if (__all_sync(kWholeWarp, small ? 1 : 0) != 0) break;
  }
  const MeansThread me;
  const int32_t odd = me.lane / 2 % 2;
  const int32_t j = strip * kStripMeans + me.first_mean + me.lane % 2 * 8;
  float* to = scratch.sums_of(block) + j;
  if constexpr (kPer == 1) {
    if (odd == 0) *to = sums[0];
  } else {
    to += odd * scratch.pitch;
    *to = sums[0];
    if constexpr (kPer == 4) to[2 * scratch.pitch] = sums[1];
  }
  if (me.lane != 0) return;
#pragma unroll
  for (int b = 0; b < kPer; ++b) {
    scratch.bases_of(block + b)[j / kBaseMeans] = -less[b * (4 / kPer)];
  }
}

template <typename Shape>
__device__ void score_means(const MeansSm90Params& params, int32_t half, uint32_t turn,
                            MeansShared<Shape>& shared) {
  MeansRing<Shape::kStages> ring;
  ring.place = turn;
  MeansRing<2> slot;
  uint32_t next = turn;  // of the strips that come, the first of its own
#pragma unroll 1
  for (;; slot.advance()) {
    sm90::barrier_wait(&shared.loaded[slot.place], slot.parity);
    const MeansSm90Task& task = shared.tasks[slot.place];
    const auto strips = static_cast<uint32_t>(same_in_warp(task.strips));
    if (strips == 0) return;
    const auto needed = static_cast<uint32_t>(same_in_warp(task.most_strips(half * 128)));
    const int32_t per = same_in_warp(128 / task.block_size);
    float less[4];
    bool fresh = true;
#pragma unroll 1
    for (; next < strips; next += Shape::kTurns) {
      sm90::barrier_wait(&shared.full[ring.place], ring.parity);
      StripScores scores;
      if (next < needed) {
        multiply_strip<Shape>(shared.strips[ring.place], shared.rows[slot.place][half], scores);
      }
      __syncwarp();
      if (lane_here() == 0) sm90::barrier_arrive(&shared.empty[ring.place]);
      ring.advance(Shape::kTurns);
      if (next >= needed) continue;
      const auto strip = static_cast<int32_t>(next);
      const float scale = scale_scores(params.select.scale_log2, scores);
      if (task.is_masked(half * 128, strip)) mask_strip(task, half * 128, strip, scores);
      const MeansScratch scratch(params.scores, slot.place);
      if (per == 1) {
        finish_strip<1>(scratch, half, strip, scale, fresh, scores, less);
      } else if (per == 2) {
        finish_strip<2>(scratch, half * 2, strip, scale, fresh, scores, less);
      } else {
        finish_strip<4>(scratch, half * 4, strip, scale, fresh, scores, less);
      }
      fresh = false;
    }
    next -= strips;
    __syncwarp();
    if (lane_here() == 0) sm90::barrier_arrive(&shared.scored[slot.place]);
  }
}

// ---- Decisions: a warp a query block -----------------------------------------------------------

__device__ inline void decide_means_row(const MeansSm90Params& params, const MeansSm90Task& task,
                                        const MeansScratch& scratch, int32_t block) {
  const int32_t lane = lane_here(), i = task.blocks.first_block + block;
  float* sums = scratch.sums_of(block);
  const float* bases = scratch.bases_of(block);
  float greatest = -FLT_MAX;
  for (int32_t g = lane; g <= i / kBaseMeans; g += 32) greatest = fmaxf(greatest, bases[g]);
  greatest = max_warp(greatest);
  float total = 0;
  constexpr int kAtOnce = 4;  // loads under way
#pragma unroll 1
  for (int32_t j = lane; j <= i; j += 32 * kAtOnce) {
    float some[kAtOnce], base[kAtOnce];
#pragma unroll
    for (int l = 0; l < kAtOnce; ++l) {
      const bool there = j + 32 * l <= i;
      some[l] = there ? sums[j + 32 * l] : 0.0f;
      base[l] = there ? bases[(j + 32 * l) / kBaseMeans] : greatest;
    }
#pragma unroll
    for (int l = 0; l < kAtOnce; ++l) {
      const float score = some[l] * exp2_approx(base[l] - greatest);
      if (j + 32 * l <= i) sums[j + 32 * l] = score;
      total += score;
    }
  }
  if (sum_warp(total) > 0) {
    const FlashPrefillRule rule =
        flash_prefill_rule(params.scores.means, task.s_kv, task.block_size);
    keep_above_warp(sums, i, task.n_kv, rule, task.blocks.row(params.select, i));
  } else if (lane == 0) {
    params.select.set_not_finite(task.blocks.view.number);
  }
}

template <typename Shape>
__device__ void decide_all_means(const MeansSm90Params& params, int32_t warp,
                                 MeansShared<Shape>& shared) {
  MeansRing<2> slot;
#pragma unroll 1
  for (;; slot.advance()) {
    sm90::barrier_wait(&shared.loaded[slot.place], slot.parity);
    const MeansSm90Task& task = shared.tasks[slot.place];
    if (same_in_warp(task.strips) == 0) return;
    const int32_t blocks = same_in_warp(task.blocks.blocks);
    sm90::barrier_wait(&shared.scored[slot.place], slot.parity);
#pragma unroll 1
    for (int32_t block = warp; block < blocks; block += kMeansDeciders) {
      decide_means_row(params, task, MeansScratch(params.scores, slot.place), block);
    }
    __syncwarp();
    if (lane_here() == 0) sm90::barrier_arrive(&shared.decided[slot.place]);
  }
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    mean_scores_sm90_kernel(const __grid_constant__ MeansSm90Params params) {
  auto& shared = *reinterpret_cast<MeansShared<Shape>*>(shared_memory());
  const int32_t warp = same_in_warp(static_cast<int32_t>(threadIdx.x) / 32);
  if (threadIdx.x == 0) shared.init();
  await_previous_kernel();
  start_next_kernel();
  __syncthreads();
  if (warp < 4) {
    if (warp > 0) {
      decide_all_means<Shape>(params, warp - 1, shared);
    } else if (threadIdx.x == 0) {
      load_all_means<Shape>(params, shared);
    }
  } else {
    const int32_t warpgroup = warp / 4 - 1;
    score_means<Shape>(params, warpgroup % Shape::kHalves,
                       static_cast<uint32_t>(warpgroup / Shape::kHalves), shared);
  }
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_SM90_MEANS_CUH_

// The probe of select on Hopper: the warp that brings probes and keys to shared memory, and the
// warps that see to block means.
#ifndef FLEXPREFILL_SRC_SELECT_PROBE_SM90_LOAD_CUH_
#define FLEXPREFILL_SRC_SELECT_PROBE_SM90_LOAD_CUH_

#include <cstdint>

#include "select/pool_cuda.cuh"
#include "select/probe_sm90_plan.cuh"

namespace flexprefill {

// One warp: the probes, then the tiles of all streams through the ring.
template <typename Shape, int kStages>
class ProbeLoader {
 public:
  __device__ ProbeLoader(const ProbeSm90Params& params, const ProbeSm90Task<Shape>& task,
                         ProbeTiles<Shape, kStages>& tiles)
      : params_(params),
        task_(task),
        tiles_(tiles),
        lane_(static_cast<int32_t>(threadIdx.x) % 32) {}

  __device__ void run() {
    const ProbeRing<Shape, kStages> ring(params_.select, task_);
    bool probes = false;
    ring.for_each([&](int32_t stream, int32_t i, uint32_t place) {
      const ProbeChunk chunk(params_.select, task_.sequence, task_.first_chunk + stream);
      load_keys(chunk.begin + i * 128, chunk.end, place);
      // Behind the first tile: both are needed at once, and the keys come from further away.
      if (!probes) load_probes();
      probes = true;
    });
  }

 private:
  __device__ void load_probes() {
    if (lane_ != 0) return;
    const DeviceProblem& problem = params_.select.problem;
    const int32_t row = static_cast<int32_t>(problem.sequences[task_.sequence].q_start) +
                        params_.select.sequences[task_.sequence].probe_first_row;
    sm90::barrier_arrive_expect(&tiles_.q_full, Shape::kHeads * Shape::kTileBytes);
#pragma unroll 1
    for (int32_t h = 0; h < Shape::kHeads; ++h) {
#pragma unroll 1
      for (int32_t c = 0; c < Shape::kChunks; ++c) {
        sm90::tma_load(&params_.q_map, &tiles_.q_full, tiles_.q[h] + c * 128 * sm90::kChunkColumns,
                       c * sm90::kChunkColumns, row, task_.head(h),
                       params_.q_packed != 0 ? 0 : task_.sequence);
      }
    }
  }

  // Lane l brings box l. Pages past the last key are not looked up; what their keys' places hold is
  // masked.
  __device__ void load_keys(int32_t first_key, int32_t end, uint32_t place) {
    const DeviceProblem& problem = params_.select.problem;
    const int32_t keys = min(end - first_key, 128), box_rows = params_.box_rows;
    int32_t boxes = 1;
    int32_t row = static_cast<int32_t>(problem.sequences[task_.sequence].kv_start) + first_key;
    int32_t page = params_.kv_packed != 0 ? 0 : task_.sequence;
    if (problem.page_table != nullptr) {
      boxes = (keys + box_rows - 1) / box_rows;
      const uint32_t key = first_key + lane_ * box_rows, page_size = problem.page_size;
      const uint32_t nth = key / page_size;
      row = static_cast<int32_t>(key - nth * page_size);
      if (lane_ < boxes) {
        page = problem.page_table[task_.sequence * problem.page_table_stride + nth];
      }
    }
    using Ring = ProbeRing<Shape, kStages>;
    const uint32_t stage = Ring::stage(place);
    sm90::Barrier* full = &tiles_.k_full[stage];
    sm90::barrier_wait(&tiles_.k_empty[stage], Ring::parity(place) ^ 1);
    if (lane_ == 0) {
      sm90::barrier_arrive_expect(full, boxes * Shape::kChunks * box_rows * sm90::kChunkRowBytes);
    }
    __syncwarp();
    if (lane_ >= boxes) return;
#pragma unroll 1
    for (int32_t c = 0; c < Shape::kChunks; ++c) {
      sm90::tma_load(&params_.k_map, full,
                     tiles_.k[stage] + (c * 128 + lane_ * box_rows) * sm90::kChunkColumns,
                     c * sm90::kChunkColumns, row, task_.kv, page);
    }
  }

  const ProbeSm90Params& params_;
  const ProbeSm90Task<Shape>& task_;
  ProbeTiles<Shape, kStages>& tiles_;
  const int32_t lane_;
};

// A unit of 16 bytes of a row of a tile, where the swizzle has put it.
__device__ inline const uint4& swizzled_unit(const uint16_t* chunk, int32_t row, int32_t unit) {
  return *reinterpret_cast<const uint4*>(chunk + row * sm90::kChunkColumns + (unit ^ row % 8) * 8);
}

template <typename Element>
__device__ inline void add_unit(float (&sums)[8], const uint4& x) {
  const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    sums[2 * e] += Operand<Element>::low(pairs[e]);
    sums[2 * e + 1] += Operand<Element>::high(pairs[e]);
  }
}

// Pass 1: means of the key blocks, by kProbePoolWarps warps. The CTAs that read the same keys take
// turns with tiles, and the warps with chunks of 64 columns.
template <typename Shape, int kStages>
class KeyPooler {
 public:
  __device__ KeyPooler(const ProbeSm90Params& params, const ProbeSm90Task<Shape>& task,
                       ProbeTiles<Shape, kStages>& tiles, int warp)
      : select_(params.select),
        slices_(params.slices),
        task_(task),
        tiles_(tiles),
        warp_(warp),
        lane_(static_cast<int32_t>(threadIdx.x) % 32) {}

  __device__ void run() {
    const ProbeRing<Shape, kStages> ring(select_, task_);
    int32_t turn = 0;  // whose chunk of columns is next
    ring.for_each([&](int32_t stream, int32_t i, uint32_t place) {
      const uint32_t stage = ring.stage(place);
      sm90::barrier_wait(&tiles_.k_full[stage], ring.parity(place));
      if (select_.by_blocks && i % slices_ == task_.slice) {
        const ProbeChunk chunk(select_, task_.sequence, task_.first_chunk + stream);
#pragma unroll 1
        for (int32_t c = 0; c < Shape::kChunks; ++c) {
          if (turn == warp_) pool(tiles_.k[stage], c, chunk.begin + i * 128, chunk.end);
          turn = turn + 1 < kProbePoolWarps ? turn + 1 : 0;
        }
      }
      probe_arrive(&tiles_.k_empty[stage]);
    });
  }

 private:
  // A chunk of columns of a tile.
  __device__ void pool(const uint16_t* tile, int32_t c, int32_t first_key, int32_t end) {
    const DeviceProblem& problem = select_.problem;
    const int32_t s_kv = problem.sequences[task_.sequence].s_kv;
    const int64_t first_block =
        select_.sequences[task_.sequence].first_kv_block +
        static_cast<int64_t>(task_.kv) * problem.sequences[task_.sequence].n_kv;
    const int32_t column = c * sm90::kChunkColumns + lane_ % 8 * 8 + lane_ / 8 * 2;
#pragma unroll 1
    for (int32_t key = 0; key < min(end - first_key, 128); key += problem.block_size) {
      const int32_t keys = min(s_kv - first_key - key, problem.block_size);
      const float2 sums = sum_block(tile + c * 128 * sm90::kChunkColumns, key, keys);
      const float inverse = 1.0f / static_cast<float>(keys);
      if (column >= problem.d_qk) continue;
      float* to = select_.k_means +
                  (first_block + (first_key + key) / problem.block_size) * problem.d_qk + column;
      *reinterpret_cast<float2*>(to) = {sums.x * inverse, sums.y * inverse};
    }
  }

  // Over rows [first, first + rows) of a chunk, `first` a multiple of 8: lane 8 q + u gets columns
  // 8 u + 2 q and the next.
  __device__ float2 sum_block(const uint16_t* chunk, int32_t first, int32_t rows) const {
    using Element = typename Shape::Element;
    float sums[8] = {};
    const int32_t row = lane_ / 8, unit = lane_ % 8;
    // Every fourth row from `row` on. These two and those a multiple of eight below them lie where
    // an offset known when compiled leads.
    const uint4* even = &swizzled_unit(chunk, first + row, unit);
    const uint4* odd = &swizzled_unit(chunk, first + row + 4, unit);
    constexpr int kEightRows = sm90::kChunkRowBytes * 8 / sizeof(uint4);
    constexpr int kAtOnce = 32;
    int32_t done = 0;
#pragma unroll 1
    for (; done + kAtOnce <= rows; done += kAtOnce) {
      uint4 some[kAtOnce / 4];
#pragma unroll
      for (int i = 0; i < kAtOnce / 8; ++i) {
        some[2 * i] = even[i * kEightRows];
        some[2 * i + 1] = odd[i * kEightRows];
      }
#pragma unroll
      for (const uint4& eight : some) add_unit<Element>(sums, eight);
      even += kAtOnce / 8 * kEightRows;
      odd += kAtOnce / 8 * kEightRows;
    }
#pragma unroll 1
    for (int32_t r = done + row; r < rows; r += 4) {
      add_unit<Element>(sums, swizzled_unit(chunk, first + r, unit));
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      sums[e] += __shfl_xor_sync(0xffffffffu, sums[e], 8);
      sums[e] += __shfl_xor_sync(0xffffffffu, sums[e], 16);
    }
    float2 own = {sums[0], sums[1]};
#pragma unroll
    for (int q = 1; q < 4; ++q) {
      if (lane_ / 8 == q) own = {sums[2 * q], sums[2 * q + 1]};
    }
    return own;
  }

  const SelectProblem& select_;
  const int32_t slices_;
  const ProbeSm90Task<Shape>& task_;
  ProbeTiles<Shape, kStages>& tiles_;
  const int warp_;
  const int32_t lane_;
};

// Pass 2: the logits of the probes' means by the means of the CTA's key blocks, by kProbePoolWarps
// warps. `thread` counts theirs.
template <typename Shape, int kStages>
__device__ void pool_probes(const ProbeSm90Params& params, const ProbeSm90Task<Shape>& task,
                            ProbeTiles<Shape, kStages>& tiles, ProbeScoresExtra<Shape>& extra,
                            int32_t thread) {
  constexpr int kThreads = kProbePoolWarps * 32, kPoolBarrier = 1;
  const SelectProblem& select = params.select;
  if (!select.by_blocks) return;
  const DeviceProblem& problem = select.problem;
  const SelectSequence& plan = select.sequences[task.sequence];
  sm90::barrier_wait(&tiles.q_full, 0);
  const int32_t units = problem.d_qk / 8;
  const float inverse = 1.0f / static_cast<float>(plan.probe_rows);
#pragma unroll 1
  for (int32_t e = thread; e < Shape::kHeads * units; e += kThreads) {
    const int32_t h = e / units, unit = e % units;
    const uint16_t* chunk = tiles.q[h] + unit / 8 * 128 * sm90::kChunkColumns;
    float sums[8] = {};
#pragma unroll 4
    for (int32_t row = 0; row < plan.probe_rows; ++row) {
      add_unit<typename Shape::Element>(sums, swizzled_unit(chunk, row, unit % 8));
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) extra.mean[h][unit * 8 + i] = sums[i] * inverse;
  }
  sm90::named_barrier_sync(kPoolBarrier, kThreads);
  const ProbeChunk first(select, task.sequence, task.first_chunk);
  const ProbeChunk last(select, task.sequence, task.first_chunk + Shape::kStreams - 1);
  const int32_t end = (max(first.end, last.end) + problem.block_size - 1) / problem.block_size;
#pragma unroll 1
  for (int32_t h = 0; h < Shape::kHeads; ++h) {
    const int32_t head = task.head(h);
    pool_blocks<kThreads>(select, {task.sequence, head, task.sequence * problem.h_q + head},
                          first.begin / problem.block_size, end, thread, extra.mean[h]);
  }
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_PROBE_SM90_LOAD_CUH_

// BlockCover's asking rows on Hopper. What is computed: select_cover_cuda_asks.cuh.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_COVER_SM90_ASKS_CUH_
#define FLEXPREFILL_SRC_SELECT_SELECT_COVER_SM90_ASKS_CUH_

#include "select/select_cover_sm90_tiles.cuh"

namespace flexprefill {

constexpr int kCoverAsksThreads = kCoverComputeThreads + 32;  // the last warp loads

template <typename Shape>
struct CoverAsksTask {
  int32_t sequence, kv, head;
  int32_t chunk, first_key, tiles;
  bool any;

  __device__ explicit CoverAsksTask(const CoverSm90Params& params) {
    const DeviceProblem& problem = params.select.problem;
    const CoverMemory& memory = params.cover.memory;
    // The heads of a group next to each other: they read the same keys.
    auto rest = static_cast<int32_t>(blockIdx.x);
    const int32_t g = rest % problem.group();
    rest /= problem.group();
    chunk = rest % memory.max_chunks;
    rest /= memory.max_chunks;
    kv = rest % problem.h_kv;
    sequence = rest / problem.h_kv;
    head = problem.q_head(kv, g);
    const int32_t s_kv = problem.sequences[sequence].s_kv;
    first_key = chunk * memory.chunk_tiles * 128;
    any = params.select.sequences[sequence].probed != 0 && first_key < s_kv;
    tiles = min((s_kv - first_key + 127) / 128, memory.chunk_tiles);
  }
};

// The loading warp. Lane l brings box l. Pages past the last key are not looked up; what their
// keys' places hold is masked.
template <typename Shape>
__device__ void load_asked_keys(const CoverSm90Params& params, const CoverAsksTask<Shape>& task,
                                CoverTiles<Shape>& tiles) {
  const DeviceProblem& problem = params.select.problem;
  const DeviceSequence& sequence = problem.sequences[task.sequence];
  const auto lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int32_t box_rows = params.box_rows;
  CoverRing<Shape> ring;
#pragma unroll 1
  for (int32_t tile = 0; tile < task.tiles; ++tile) {
    const int32_t key = task.first_key + tile * 128;
    int32_t boxes = 1, row = static_cast<int32_t>(sequence.kv_start) + key;
    int32_t page = params.kv_packed != 0 ? 0 : task.sequence;
    if (problem.page_table != nullptr) {
      boxes = (min(sequence.s_kv - key, 128) + box_rows - 1) / box_rows;
      const uint32_t own = key + lane * box_rows, page_size = problem.page_size;
      const uint32_t nth = own / page_size;
      row = static_cast<int32_t>(own - nth * page_size);
      if (lane < boxes) page = problem.page_table[task.sequence * problem.page_table_stride + nth];
    }
    sm90::Barrier* full = &tiles.full[ring.stage];
    sm90::barrier_wait(&tiles.empty[ring.stage], ring.parity ^ 1);
    if (lane == 0) {
      sm90::barrier_arrive_expect(full, boxes * Shape::kChunks * box_rows * sm90::kChunkRowBytes);
    }
    __syncwarp();
    if (lane < boxes) {
#pragma unroll 1
      for (int32_t c = 0; c < Shape::kChunks; ++c) {
        sm90::tma_load(
            &params.keys, full,
            tiles.columns[ring.stage] + (c * 128 + lane * box_rows) * sm90::kChunkColumns,
            c * sm90::kChunkColumns, row, task.kv, page);
      }
    }
    __syncwarp();
    ring.advance();
  }
}

// The computing threads: the asking rows to shared memory. They are not next to each other, and
// maybe not evenly apart, so TMA would have to bring them one by one.
template <typename Shape>
__device__ void load_asking_rows(const CoverSm90Params& params, const CoverAsksTask<Shape>& task,
                                 const AskingRows& asking, CoverTiles<Shape>& tiles) {
  const DeviceProblem& problem = params.select.problem;
  constexpr int32_t kUnits = Shape::kDim / 8;
  const std::byte* q = problem.q_row(problem.q, task.sequence, task.head, 0);
  const int64_t stride = problem.q.row_stride * 2;
  const auto thread = static_cast<int32_t>(threadIdx.x);
#pragma unroll 8
  for (int32_t e = thread; e < 128 * kUnits; e += kCoverComputeThreads) {
    const int32_t row = e / kUnits, unit = e % kUnits;
    uint4 x{0, 0, 0, 0};
    if (row < asking.count && unit * 8 < problem.d_qk) {
      x = *reinterpret_cast<const uint4*>(q + asking.row(row) * stride + unit * 16);
    }
    uint16_t* to = tiles.rows + (unit / 8 * 128 + row) * sm90::kChunkColumns;
    *reinterpret_cast<uint4*>(to + (unit % 8 ^ row % 8) * 8) = x;
  }
  sm90::fence_proxy_async();
  sm90::named_barrier_sync(1, kCoverComputeThreads);
}

// Scores of keys that a row does not see become -inf. key: the tile's first.
__device__ __forceinline__ void mask_asks(const CoverThread& me, const AskingRows& asking,
                                          int32_t position, int32_t key, float (&scores)[64]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int32_t row = me.first_row + 8 * r;
    const int32_t last = row < asking.count ? position + static_cast<int32_t>(asking.row(row)) -
                                                  key - me.first_column
                                            : -1;
#pragma unroll
    for (int g = 0; g < 16; ++g) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (8 * g + e > last) scores[4 * g + 2 * r + e] = -INFINITY;
      }
    }
  }
}

// What the sums of the thread's two rows are relative to becomes at least their greatest score.
__device__ __forceinline__ void raise_max(float scale, const float (&scores)[64],
                                          RowSum (&rows)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rows[r].add(scaled_max(max_quad(greatest_score(scores, r)), scale), 0);
  }
}

// A tile of kBlocks blocks, of which `blocks` exist: the thread's two rows' logarithms to masses,
// which point to its first row in the first block. Exponentials are relative to the greatest score
// of the first tile, until that is far too little: another maximum is mostly not needed.
template <int kBlocks>
__device__ __forceinline__ void add_asks(bool first, float scale, const float (&scores)[64],
                                         int32_t blocks, float* masses, RowSum (&rows)[2]) {
  constexpr int kGroups = 16 / kBlocks;
  // At most once more after a maximum: what is not a number is never little enough.
  bool raised = first;
#pragma unroll 1
  while (true) {
    if (raised) raise_max(scale, scores, rows);
    float sums[2] = {rows[0].sum, rows[1].sum};
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float parts[2] = {};
#pragma unroll
        for (int g = b * kGroups; g < (b + 1) * kGroups; ++g) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            parts[e] += exp2_approx(fmaf(scores[4 * g + 2 * r + e], scale, -rows[r].max));
          }
        }
        const float sum = sum_quad(parts[0] + parts[1]);
        sums[r] += sum;
        store_if(threadIdx.x % 4 == 0 && b < blocks, masses + b * 128 + 8 * r,
                 rows[r].max + log2_approx(sum));
      }
    }
    const bool good = sums[0] < kMostSum && sums[1] < kMostSum;
    if (raised || __all_sync(kWholeWarp, good ? 1 : 0) != 0) {
      rows[0].sum = sums[0];
      rows[1].sum = sums[1];
      return;
    }
    raised = true;
  }
}

// The kernel runs beside the one that makes means, of which it needs none.
template <typename Shape>
__device__ void compute_asks(const CoverSm90Params& params, const CoverAsksTask<Shape>& task,
                             CoverTiles<Shape>& tiles) {
  const SelectProblem& select = params.select;
  const DeviceProblem& problem = select.problem;
  const DeviceSequence& sequence = problem.sequences[task.sequence];
  const AskingRows asking(sequence.s_q);
  load_asking_rows(params, task, asking, tiles);
  const CoverThread me;
  const CoverHead head(select, {task.sequence, task.head, task.sequence * problem.h_q + task.head});
  const int32_t position = sequence.first_position();
  const int32_t first_masked = position + static_cast<int32_t>(asking.row(0)) + 1;
  const int32_t tile_blocks = 128 / problem.block_size;
  const int32_t first_block = task.first_key / problem.block_size;
  int32_t blocks = sequence.n_kv - first_block;  // from the tile's first on
  float* masses =
      params.cover.memory.masses + (head.first_block + first_block) * 128 + me.first_row;
  RowSum rows[2];
  CoverRing<Shape> ring;
  float scores[64];
#pragma unroll 1
  for (int32_t tile = 0; tile < task.tiles; ++tile) {
    if (tile + 1 == task.tiles) {
      await_kernel_beside();
      start_next_kernel();
    }
    sm90::barrier_wait(&tiles.full[ring.stage], ring.parity);
    multiply_columns<Shape, 128>(tiles, me.group, ring.stage, 0, scores);
    __syncwarp();
    if (me.lane == 0) sm90::barrier_arrive(&tiles.empty[ring.stage]);
    ring.advance();
    const int32_t key = task.first_key + tile * 128;
    const float scale = scale_scores(select.scale_log2, scores);
    if (key + 128 > first_masked) mask_asks(me, asking, position, key, scores);
    if (tile_blocks == 1) {
      add_asks<1>(tile == 0, scale, scores, blocks, masses, rows);
    } else if (tile_blocks == 2) {
      add_asks<2>(tile == 0, scale, scores, blocks, masses, rows);
    } else {
      add_asks<4>(tile == 0, scale, scores, blocks, masses, rows);
    }
    masses += tile_blocks * 128;
    blocks -= tile_blocks;
  }
  float2* stats = params.cover.memory.chunk_stats +
                  (int64_t{head.view.number} * params.cover.memory.max_chunks + task.chunk) * 128 +
                  me.first_row;
  if (me.lane % 4 != 0) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) stats[8 * r] = {rows[r].max, rows[r].sum};
}

template <typename Shape>
__global__ void __launch_bounds__(kCoverAsksThreads, Shape::kCtas)
    cover_asks_sm90_kernel(const __grid_constant__ CoverSm90Params params) {
  const CoverAsksTask<Shape> task(params);
  if (!task.any) return await_kernel_beside();
  auto& tiles = *reinterpret_cast<CoverTiles<Shape>*>(shared_memory());
  if (threadIdx.x == 0) tiles.init();
  __syncthreads();
  if (threadIdx.x >= kCoverComputeThreads) {
    load_asked_keys(params, task, tiles);
    await_kernel_beside();
  } else {
    compute_asks(params, task, tiles);
  }
}

template <typename Shape>
void launch_cover_asks_sm90(const CoverSm90Params& params, uint32_t ctas, void* stream) {
  launch_overlapped(cover_asks_sm90_kernel<Shape>, dim3(ctas), dim3(kCoverAsksThreads),
                    sizeof(CoverTiles<Shape>), stream, params);
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_COVER_SM90_ASKS_CUH_

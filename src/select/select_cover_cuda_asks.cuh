// BlockCover's asking rows: the logarithm of each row's mass in each key block, and the columns.
//
//   asks_kernel     S = Q K^T of the asking rows of one head by a chunk of keys. A tile of 128 keys
//                   holds whole blocks, so of each row and block one number is left: log2 of the
//                   sum of exp2(score). What bounds it: products and exponentials, as many.
//   columns_kernel  a row's sum over all chunks, the largest mass of each block, and by the last
//                   CTA of a head the cover of these.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_COVER_CUDA_ASKS_CUH_
#define FLEXPREFILL_SRC_SELECT_SELECT_COVER_CUDA_ASKS_CUH_

#include "select/select_cover_cuda_plan.cuh"
#include "select/take_cuda.cuh"

namespace flexprefill {

// Beside the ring: max and sum of each row in each part of a tile's columns, parts of 32 columns
// with blocks of 32, otherwise of 64.
struct AsksShared {
  float2 stats[4][CoverTile::kRows];
};

// Max and sum of the thread's rows in its 64 columns, and in both halves of them if `halves`, by
// the quads' first lanes.
__device__ inline void asks_stats(const TileThread& me, float scale, bool halves, TileScores& x,
                                  AsksShared& shared) {
  const int32_t part = me.first_column() / (halves ? 32 : 64);
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    float highest[2] = {-FLT_MAX, -FLT_MAX};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) highest[n / 4] = fmaxf(highest[n / 4], score_at(x, r, n, e));
    }
    if (!halves) highest[0] = highest[1] = fmaxf(highest[0], highest[1]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& max = highest[half];
      if (half == 1 && !halves) {
        max = highest[0];
        continue;
      }
      max = fmaxf(max, __shfl_xor_sync(kWholeWarp, max, 1));
      max = scaled_max(fmaxf(max, __shfl_xor_sync(kWholeWarp, max, 2)), scale);
    }
    float sum[2] = {};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        sum[n / 4] += exp2_approx(fmaf(score_at(x, r, n, e), scale, -highest[n / 4]));
      }
    }
    if (!halves) sum[0] += sum[1];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 1 && !halves) continue;
      sum[half] += __shfl_xor_sync(kWholeWarp, sum[half], 1);
      sum[half] += __shfl_xor_sync(kWholeWarp, sum[half], 2);
    }
    if (me.lane % 4 == 0) {
      shared.stats[part][row_at(me, r)] = {highest[0], sum[0]};
      if (halves) shared.stats[part + 1][row_at(me, r)] = {highest[1], sum[1]};
    }
  }
}

// Scores of keys that a row does not see become -inf; first: where key 0 of the tile stands.
__device__ inline void mask_asks(const TileThread& me, const AskingRows& asking, int32_t position,
                                 int32_t first, TileScores& x) {
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    const int32_t row = row_at(me, r);
    const int32_t last = row < asking.count
                             ? position + static_cast<int32_t>(asking.row(row)) - first - me.column0
                             : -1;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = score_at(x, r, n, e);
        score = 8 * n + e <= last ? score : -INFINITY;
      }
    }
  }
}

template <typename Element>
__global__ void __launch_bounds__(CoverTile::kThreads, 2)
    asks_kernel(const __grid_constant__ SelectProblem select,
                const __grid_constant__ CoverParams p) {
  await_previous_kernel();
  start_next_kernel();
  const DeviceProblem& problem = select.problem;
  // The heads of a group next to each other: they read the same keys.
  auto rest = static_cast<int32_t>(blockIdx.x);
  const int32_t g = rest % problem.group();
  rest /= problem.group();
  const int32_t chunk = rest % p.memory.max_chunks;
  rest /= p.memory.max_chunks;
  const int32_t kv = rest % problem.h_kv, s = rest / problem.h_kv;
  const DeviceSequence& sequence = problem.sequences[s];
  const int32_t first = chunk * p.memory.chunk_tiles * CoverTile::kColumns;
  if (select.sequences[s].probed == 0 || first >= sequence.s_kv) return;
  const int32_t left = (sequence.s_kv - first + CoverTile::kColumns - 1) / CoverTile::kColumns;
  const int32_t tiles = left < p.memory.chunk_tiles ? left : p.memory.chunk_tiles;
  const int32_t h = problem.q_head(kv, g);
  const CoverHead head(select, {s, h, s * problem.h_q + h});
  const AskingRows asking(sequence.s_q);
  const int32_t position = sequence.first_position();
  const int32_t first_masked = position + static_cast<int32_t>(asking.row(0)) + 1;

  std::byte* ring = shared_memory();
  auto& shared = *reinterpret_cast<AsksShared*>(ring + p.ring_bytes);
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const std::byte* q = problem.q_row(problem.q, s, h, 0);
  const bool paged = problem.page_table != nullptr;
  const std::byte* k = paged ? nullptr : problem.kv_row(problem.k, s, kv, 0);
  const int64_t q_stride = problem.q.row_stride * 2, k_stride = problem.k.row_stride * 2;
  const bool halves = problem.block_size == 32;
  const int32_t tile_blocks = CoverTile::kColumns / problem.block_size;
  float* masses = p.memory.masses + head.first_block * CoverTile::kRows + thread;
  RowSum row;  // number `thread`
  for_each_product<Element, CoverTile>(
      ring, p.stages, tiles, CoverTile::steps(problem.d_qk),
      [&](std::byte* to, int32_t step) {
        load_stage_rows<CoverTile::kRows, CoverTile::kThreads>(
            to, step * CoverTile::kDepth, problem.d_qk, select.q_aligned, problem.q.data,
            [&](int32_t r) -> const std::byte* {
              return r < asking.count ? q + asking.row(r) * q_stride : nullptr;
            });
      },
      [&](std::byte* to, int32_t tile, int32_t step) {
        load_stage_rows<CoverTile::kColumns, CoverTile::kThreads>(
            to, step * CoverTile::kDepth, problem.d_qk, select.k_aligned, problem.k.data,
            [&](int32_t r) -> const std::byte* {
              const int32_t j = first + tile * CoverTile::kColumns + r;
              if (j >= sequence.s_kv) return nullptr;
              return paged ? problem.kv_row(problem.k, s, kv, j) : k + j * k_stride;
            });
      },
      [](int32_t) { return true; },
      [&](int32_t tile, TileScores& x) {
        const auto me = TileThread::of<CoverTile>();
        const int32_t key = first + tile * CoverTile::kColumns;
        const float scale = scale_scores(select.scale_log2, x);
        if (key + CoverTile::kColumns > first_masked) mask_asks(me, asking, position, key, x);
        asks_stats(me, scale, halves, x, shared);
        __syncthreads();
#pragma unroll 1
        for (int32_t b = 0; b < tile_blocks; ++b) {
          RowSum block;
          block.add(shared.stats[b][thread].x, shared.stats[b][thread].y);
          if (tile_blocks == 1) block.add(shared.stats[1][thread].x, shared.stats[1][thread].y);
          const int32_t j = key / problem.block_size + b;
          if (j < sequence.n_kv) masses[int64_t{j} * CoverTile::kRows] = block.log();
          row.add(block.max, block.sum);
        }
      });
  p.memory
      .chunk_stats[(int64_t{head.view.number} * p.memory.max_chunks + chunk) * CoverTile::kRows +
                   thread] = {row.max, row.sum};
}

// ---- Columns ------------------------------------------------------------------------------------

constexpr int kColumnsThreads = 256;
constexpr int32_t kColumnsSlice = 256;  // key blocks of a CTA

struct ColumnsShared {
  float offset[CoverTile::kRows];  // log2 of the sum of each row
  union {
    TakeShared<kColumnsThreads> take;
    uint64_t sums[kColumnsThreads / 32 + 1];
    uint32_t ties[kColumnsThreads / 32];
  };
  uint32_t flag;
};

// The asking rows' logarithms of their sums, to shared.offset. False where one has no softmax.
__device__ inline bool sum_asking_rows(const CoverParams& p, const CoverHead& head,
                                       const AskingRows& asking, int32_t s_kv,
                                       ColumnsShared& shared) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t chunk_keys = p.memory.chunk_tiles * CoverTile::kColumns;
  const int32_t chunks = (s_kv + chunk_keys - 1) / chunk_keys;
  bool bad = false;
  if (thread < asking.count) {
    const float2* from = p.memory.chunk_stats +
                         int64_t{head.view.number} * p.memory.max_chunks * CoverTile::kRows +
                         thread;
    RowSum row;
#pragma unroll 4
    for (int32_t c = 0; c < chunks; ++c) {
      const float2 part = from[int64_t{c} * CoverTile::kRows];
      row.add(part.x, part.y);
    }
    bad = !(row.sum > 0);
    shared.offset[thread] = row.log();
  }
  return __syncthreads_count(bad ? 1 : 0) == 0;
}

// The cover of the maxima, by the head's last CTA.
__device__ inline void cover_columns(const CoverParams& p, const CoverHead& head, int32_t n,
                                     int32_t words, ColumnsShared& shared) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const float* most_asked = p.memory.most_asked + head.first_block;
  uint64_t* columns = p.memory.columns + head.first_word;
  uint64_t total = 0;
  for (int32_t j = thread; j < n; j += kColumnsThreads) {
    total += fixed_mass_of(__ldcg(most_asked + j));
  }
  total = sum_cta<kColumnsThreads>(total, shared.sums);
  const uint64_t wanted = mass_to_reach(p.rule.column_share, total);
  const bool all = p.rule.column_share >= 1.0f;
  if (all || wanted == 0) {
    for (int32_t w = thread; w < words; w += kColumnsThreads) {
      columns[w] = all ? range_word(0, n, w) : 0;
    }
    return;
  }
  Taken taken = take_mass_cta<kColumnsThreads>(SpanEntries<kColumnsThreads>{most_asked, n}, n,
                                               wanted - 1, shared.take);
  ++taken.ties;
  __syncthreads();
  write_taken_bits<kColumnsThreads>(
      n, taken, false, [&](int32_t e) { return __ldcg(most_asked + e); }, shared.ties, columns);
}

static __global__ void __launch_bounds__(kColumnsThreads, 2)  // without the 2 it spills
    columns_kernel(const __grid_constant__ SelectProblem select,
                   const __grid_constant__ CoverParams p) {
  await_previous_kernel();
  start_next_kernel();
  const DeviceProblem& problem = select.problem;
  const auto x = static_cast<int32_t>(blockIdx.x);
  const CoverHead head(select, HeadView::of(select, x / p.slices));
  const int32_t slice = x % p.slices;
  const DeviceSequence& sequence = problem.sequences[head.view.sequence];
  const int32_t n = sequence.n_kv, slices = (n + kColumnsSlice - 1) / kColumnsSlice;
  if (select.sequences[head.view.sequence].probed == 0 || slice >= slices) return;
  auto& shared = *reinterpret_cast<ColumnsShared*>(shared_memory());
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const AskingRows asking(sequence.s_q);
  if (thread == 0 && slice == 0) {
    p.memory.least_share[head.view.number] = std::bit_cast<uint32_t>(1.0f);
    p.memory.rows_below[head.view.number] = 0;
  }
  if (!sum_asking_rows(p, head, asking, sequence.s_kv, shared)) {
    if (thread == 0) select.set_not_finite(head.view.number);
    return;
  }
  // A lane has four rows; `group`: their query blocks, counted from the first asking row's.
  const int32_t lane = thread % 32, groups = CoverParams::groups(problem.block_size);
  const auto block_of = [&](int64_t k) {
    return static_cast<int32_t>((sequence.first_position() + asking.row(k)) / problem.block_size);
  };
  float offset[4];
  int32_t group[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int32_t k = 4 * lane + e;
    offset[e] = k < asking.count ? shared.offset[k] : INFINITY;
    group[e] = k < asking.count ? block_of(k) - block_of(0) : -1;
  }
  const int32_t first = slice * kColumnsSlice;
  const int32_t end = n < first + kColumnsSlice ? n : first + kColumnsSlice;
#pragma unroll 1
  for (int32_t j = first + thread / 32; j < end; j += kColumnsThreads / 32) {
    const float4 logs = *reinterpret_cast<const float4*>(
        p.memory.masses + (head.first_block + j) * CoverTile::kRows + 4 * lane);
    // Rows that do not exist have numbers of no meaning: an infinity or a NaN at worst.
    float mass[4] = {logs.x - offset[0], logs.y - offset[1], logs.z - offset[2],
                     logs.w - offset[3]};
#pragma unroll
    for (int e = 0; e < 4; ++e) mass[e] = group[e] < 0 ? 0.0f : exp2_approx(mass[e]);
    const float most = max_warp(fmaxf(fmaxf(mass[0], mass[1]), fmaxf(mass[2], mass[3])));
    if (lane == 0) p.memory.most_asked[head.first_block + j] = most;
    if (p.memory.group_mass == nullptr) continue;
#pragma unroll 1
    for (int32_t g = 0; g < groups; ++g) {
      float sum = 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) sum += group[e] == g ? mass[e] : 0.0f;
      sum = sum_warp(sum);
      if (lane == 0) {
        p.memory.group_mass[head.first_block * groups + int64_t{g} * n + j] = sum;
      }
    }
  }
  if (!is_last_cta(select.tickets + 2 * head.view.number, slices, shared.flag)) return;
  cover_columns(p, head, n, sequence.words_per_row, shared);
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_COVER_CUDA_ASKS_CUH_

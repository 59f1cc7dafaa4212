// The probe of select on the device: A = softmax(scale * q_probe k^T) of each query head, 128 probe
// rows by all keys, in two passes by mma.sync.
//   pass 1   row max and sum of each chunk of keys; means of the key blocks
//   pass 2   with the rows' max and sum over all chunks: vertical and slash scores, block masses
// A CTA has one query head's probe in shared memory and walks over a chunk of keys in tiles of 128,
// which come by cp.async in stages of 64 columns. The CTAs of the query heads that share a K/V head
// are neighbours, so that K comes from L2 for all but the first. Four warps hold the tile's scores
// in registers, 64 x 64 each.
#ifndef FLEXPREFILL_SRC_SELECT_PROBE_CUDA_CUH_
#define FLEXPREFILL_SRC_SELECT_PROBE_CUDA_CUH_

#include <cfloat>

#include "cuda/launch.cuh"
#include "select/select_device.cuh"

namespace flexprefill {

constexpr int kProbeThreads = 128;
constexpr int kProbeRows = 128;  // of a tile
constexpr int kProbeKeys = 128;
constexpr int kStageColumns = 64;
// Bytes from row to row: an odd number of 16 bytes, so that ldmatrix meets no bank twice.
constexpr int kStagePitch = kStageColumns * 2 + 16;
constexpr int kStageBytes = kProbeKeys * kStagePitch;

struct ProbeShared {
  float column_sums[2][2][kProbeKeys];                   // [probe's query block][warp row]
  float row_max[2][kProbeRows], row_sum[2][kProbeRows];  // [warp column]
  float offset[kProbeRows];
  float k_sums[4][kStageColumns];  // [32 keys]
  // Pass 1, of each thread's 8 rows over its keys: the maximum so far and the sum of exp2(x - max).
  // Not in registers, which the scores fill.
  float max[8][kProbeThreads], sum[8][kProbeThreads];
  int32_t dead[kProbeThreads / 32];
};

// Eight partial diagonals of a warp's 64 x 64 scores, one for each row number modulo 8. Entry e of
// row g lies at g * 135 + g / 4 + e: 32 threads that write together meet 32 banks.
constexpr int kDiagonals = 127;
__device__ inline int diagonal_entry(int g, int e) { return g * 135 + g / 4 + e; }
constexpr int kDiagonalFloats = 8 * 136;  // of a warp
static_assert(4 * kDiagonalFloats * 4 <= kStageBytes, "the diagonals borrow a stage");

inline int32_t q_pitch(int32_t d) {
  return (d + kStageColumns - 1) / kStageColumns * kStageColumns * 2 + 16;
}
// One or two stages; `stages` is a launch parameter, as small cards hold one beside a wide probe.
inline size_t probe_shared_bytes(int32_t d, int stages) {
  return static_cast<size_t>(kProbeRows) * q_pitch(d) + stages * kStageBytes + sizeof(ProbeShared);
}

// What one CTA does.
struct ProbeTask {
  int32_t sequence, kv, head, number;  // number: sequence * h_q + head
  int32_t turn;                        // of `group` CTAs that read the same keys
  int32_t chunk;
  int32_t begin, end;  // keys
  bool any;

  __device__ explicit ProbeTask(const SelectProblem& select) {
    const DeviceProblem& problem = select.problem;
    auto x = static_cast<int32_t>(blockIdx.x);
    turn = x % problem.group();
    x /= problem.group();
    chunk = x % select.max_chunks;
    x /= select.max_chunks;
    kv = x % problem.h_kv;
    sequence = x / problem.h_kv;
    head = problem.q_head(kv, turn);
    number = sequence * problem.h_q + head;
    const SelectSequence& plan = select.sequences[sequence];
    any = plan.probed != 0 && chunk < plan.chunks && select.asks_probe(head);
    const int64_t first = static_cast<int64_t>(chunk) * select.chunk_keys;
    const int64_t s_kv = problem.sequences[sequence].s_kv;
    begin = static_cast<int32_t>(first);
    end = static_cast<int32_t>(first + select.chunk_keys < s_kv ? first + select.chunk_keys : s_kv);
  }
  // Of arrays with an entry a chunk.
  __device__ int64_t chunk_number(const SelectSequence& plan, int32_t c) const {
    return plan.first_chunk + static_cast<int64_t>(head) * plan.chunks + c;
  }
};

// Copies columns [column, column + 64) of `rows` rows, row(i), to 128 rows `pitch` bytes apart;
// what lies beyond rows or d becomes 0.
template <typename Row>
__device__ inline void load_columns(std::byte* to, int32_t pitch, int32_t rows, int32_t column,
                                    int32_t d, bool aligned, const Row& row) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t c = column + thread % 8 * 8;
  std::byte* piece = to + thread % 8 * 16;
#pragma unroll 2  // more cost registers
  for (int32_t i = thread / 8; i < 128; i += kProbeThreads / 8) {
    const bool there = i < rows && c < d;
    const std::byte* from = row(there ? i : 0) + (there ? c : 0) * 2;
    std::byte* shared = piece + i * pitch;
    if (aligned) {
      cp_async<16>(shared_address(shared), from, there ? 16 : 0);
    } else {
      *reinterpret_cast<uint4*>(shared) = there ? load_eight(from, false) : uint4{0, 0, 0, 0};
    }
  }
}

using ProbeScores = float[4][8][4];  // [16 rows][8 keys], mma's fragments

// stage(shared memory, first column, tile) once a stage has arrived; tile(first key, scores,
// scratch of kStageBytes) for each tile of the task's keys, all threads together; after a barrier
// that tile() calls itself, the scratch is its own.
template <typename Element, typename Stage, typename Tile>
__device__ inline void for_each_probe_tile(const SelectProblem& select, const ProbeTask& task,
                                           std::byte* shared, int32_t stages, const Stage& stage,
                                           const Tile& tile) {
  const DeviceProblem& problem = select.problem;
  const SelectSequence& plan = select.sequences[task.sequence];
  const int32_t d = problem.d_qk;
  const int32_t steps = (d + kStageColumns - 1) / kStageColumns;
  const int32_t pitch = steps * kStageColumns * 2 + 16;
  std::byte* sQ = shared;
  std::byte* sK = shared + kProbeRows * pitch;
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int32_t warp_row = warp / 2 * 64, warp_key = warp % 2 * 64;

  const std::byte* q = problem.q_row(problem.q, task.sequence, task.head, plan.probe_first_row);
  const int64_t q_stride = problem.q.row_stride * 2;
  for (int32_t step = 0; step < steps; ++step) {
    load_columns(sQ + step * kStageColumns * 2, pitch, plan.probe_rows, step * kStageColumns, d,
                 select.q_aligned, [&](int32_t i) { return q + i * q_stride; });
  }
  const bool paged = problem.page_table != nullptr;
  const std::byte* k =
      paged ? nullptr : problem.kv_row(problem.k, task.sequence, task.kv, task.begin);
  const int64_t k_stride = problem.k.row_stride * 2;
  // Loads stage number `n` of the chunk.
  const auto load_stage = [&](int32_t n, std::byte* to) {
    const int32_t first = n / steps * kProbeKeys;
    const int32_t left = task.end - task.begin - first;
    load_columns(to, kStagePitch, left < kProbeKeys ? left : kProbeKeys, n % steps * kStageColumns,
                 d, select.k_aligned, [&](int32_t i) {
                   return paged ? problem.kv_row(problem.k, task.sequence, task.kv,
                                                 int64_t{task.begin} + first + i)
                                : k + (int64_t{first} + i) * k_stride;
                 });
    cp_async_commit();
  };

  const int32_t all = (task.end - task.begin + kProbeKeys - 1) / kProbeKeys * steps;
  if (stages == 2) load_stage(0, sK);
  const uint32_t a_row = shared_address(sQ) + (warp_row + lane % 16) * pitch + lane / 16 * 16;
  const uint32_t b_row = (warp_key + lane % 8 + lane / 16 * 8) * kStagePitch + lane / 8 % 2 * 16;
  const bool busy = plan.probe_rows > warp_row;  // block sizes below 128 leave warps without rows

  for (int32_t n = 0; n < all;) {
    float scores[4][8][4] = {};
    const int32_t first_key = task.begin + n / steps * kProbeKeys;
    std::byte* current = sK;
    for (int32_t step = 0; step < steps; ++step, ++n) {
      current = sK + (stages == 2 ? n % 2 * kStageBytes : 0);
      if (stages == 1) {
        __syncthreads();
        load_stage(n, current);
      }
      cp_async_wait<0>();
      __syncthreads();
      if (stages == 2 && n + 1 < all) load_stage(n + 1, sK + (n + 1) % 2 * kStageBytes);
      stage(current, step, n);
      if (!busy) continue;
      const uint32_t a_step = a_row + step * kStageColumns * 2;
      const uint32_t b_step = shared_address(current) + b_row;
#pragma unroll
      for (int32_t k16 = 0; k16 < kStageColumns / 16; ++k16) {
        uint32_t a[4][4], b[4][4];
#pragma unroll
        for (int32_t m = 0; m < 4; ++m) ldmatrix_x4(a[m], a_step + m * 16 * pitch + k16 * 32);
#pragma unroll
        for (int32_t j = 0; j < 4; ++j) {
          ldmatrix_x4(b[j], b_step + j * 16 * kStagePitch + k16 * 32);
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
    tile(first_key, scores, current);
  }
}

// Where a thread's scores lie in the tile: rows row0 + 16 m + 8 half, keys key0 + 8 n, + 1.
struct ProbeThread {
  int32_t warp, lane, row0, key0;
  bool busy;    // the warp has rows of the probe
  bool ragged;  // and not 64 of them
  __device__ explicit ProbeThread(const SelectSequence& plan) {
    warp = static_cast<int32_t>(threadIdx.x) / 32;
    lane = static_cast<int32_t>(threadIdx.x) % 32;
    row0 = warp / 2 * 64 + lane / 4;
    key0 = warp % 2 * 64 + lane % 4 * 2;
    busy = plan.probe_rows > warp / 2 * 64;
    ragged = plan.probe_rows < warp / 2 * 64 + 64;
  }
  // Whether some row of the warp must not see some key of the tile.
  __device__ bool masked(const SelectSequence& plan, int32_t first_key) const {
    return ragged || first_key + kProbeKeys - 1 > plan.probe_position + warp / 2 * 64;
  }
  // The last key of the tile that a row sees, counted from the tile's first; rows that are none
  // of the probe see no key.
  __device__ int32_t last_key(const SelectSequence& plan, int32_t row, int32_t first_key) const {
    return row < plan.probe_rows ? plan.probe_position + row - first_key : -1;
  }
};

// ---- Pass 1 -----------------------------------------------------------------------------------

// Sums of a stage's columns over each key block, and from them the block means.
template <typename Element>
__device__ inline void pool_stage(const SelectProblem& select, const ProbeTask& task,
                                  ProbeShared& scratch, const std::byte* sK, int32_t step,
                                  int32_t first_key) {
  const DeviceProblem& problem = select.problem;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t warp = thread / 32, lane = thread % 32;
  float low = 0, high = 0;
#pragma unroll 8
  for (int32_t i = 0; i < 32; ++i) {
    const uint32_t pair =
        *reinterpret_cast<const uint32_t*>(sK + (warp * 32 + i) * kStagePitch + lane * 4);
    low += Operand<Element>::low(pair);
    high += Operand<Element>::high(pair);
  }
  scratch.k_sums[warp][2 * lane] = low;
  scratch.k_sums[warp][2 * lane + 1] = high;
  __syncthreads();
  const DeviceSequence& sequence = problem.sequences[task.sequence];
  const int32_t block_size = problem.block_size, warps = block_size / 32;
  for (int32_t e = thread; e < kProbeKeys / block_size * kStageColumns; e += kProbeThreads) {
    const int32_t key = first_key + e / kStageColumns * block_size;
    const int32_t column = step * kStageColumns + e % kStageColumns;
    if (key >= task.end || column >= problem.d_qk) continue;
    float sum = 0;
    for (int32_t w = 0; w < warps; ++w) {
      sum += scratch.k_sums[e / kStageColumns * warps + w][e % kStageColumns];
    }
    const int32_t keys = sequence.s_kv - key < block_size ? sequence.s_kv - key : block_size;
    const int64_t block = select.sequences[task.sequence].first_kv_block +
                          static_cast<int64_t>(task.kv) * sequence.n_kv + key / block_size;
    select.k_means[block * problem.d_qk + column] = sum * (1.0f / static_cast<float>(keys));
  }
}

template <typename Element>
__global__ void __launch_bounds__(kProbeThreads, 2)
    probe_stats_kernel(const SelectProblem select, int32_t stages) {
  await_previous_kernel();
  start_next_kernel();
  const ProbeTask task(select);
  if (!task.any) return;
  const SelectSequence& plan = select.sequences[task.sequence];
  const int32_t steps = (select.problem.d_qk + kStageColumns - 1) / kStageColumns;
  std::byte* shared = shared_memory();
  auto& scratch = *reinterpret_cast<ProbeShared*>(
      shared + kProbeRows * (steps * kStageColumns * 2 + 16) + stages * kStageBytes);
  const ProbeThread me(plan);
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    scratch.max[r][threadIdx.x] = -FLT_MAX;
    scratch.sum[r][threadIdx.x] = 0;
  }
  for_each_probe_tile<Element>(
      select, task, shared, stages,
      [&](const std::byte* sK, int32_t step, int32_t n) {
        // The CTAs of a group take turns.
        if (select.by_blocks && n % select.problem.group() == task.turn) {
          pool_stage<Element>(select, task, scratch, sK, step, task.begin + n / steps * kProbeKeys);
        }
      },
      [&](int32_t first_key, ProbeScores& scores, std::byte*) {
        if (!me.busy) return;
        const bool masked = me.masked(plan, first_key);
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          const int m = r / 2, half = r % 2;
          const int32_t last = me.last_key(plan, me.row0 + 16 * m + 8 * half, first_key) - me.key0;
          const float before = scratch.max[r][threadIdx.x];
          float highest = before;
#pragma unroll
          for (int n = 0; n < 8; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& x = scores[m][n][2 * half + e];
              x = masked && 8 * n + e > last ? -INFINITY : x * select.scale_log2;
              highest = fmaxf(highest, x);
            }
          }
          float total = scratch.sum[r][threadIdx.x] * exp2_approx(before - highest);
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            total += exp2_approx(scores[m][n][2 * half] - highest);
            total += exp2_approx(scores[m][n][2 * half + 1] - highest);
          }
          scratch.max[r][threadIdx.x] = highest;
          scratch.sum[r][threadIdx.x] = total;
        }
      });
  // Four lanes, then two warps, share a row.
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    const float own = scratch.max[r][threadIdx.x];
    float highest = fmaxf(own, __shfl_xor_sync(0xffffffffu, own, 1));
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
    float total = scratch.sum[r][threadIdx.x] * exp2_approx(own - highest);
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    if (me.lane % 4 == 0) {
      const int row = me.row0 + 16 * (r / 2) + 8 * (r % 2);
      scratch.row_max[me.warp % 2][row] = highest;
      scratch.row_sum[me.warp % 2][row] = total;
    }
  }
  __syncthreads();
  const auto row = static_cast<int32_t>(threadIdx.x);
  const float a = scratch.row_max[0][row], b = scratch.row_max[1][row];
  const float highest = fmaxf(a, b);
  select.chunk_stats[task.chunk_number(plan, task.chunk) * kProbeRows + row] = {
      highest, scratch.row_sum[0][row] * exp2_approx(a - highest) +
                   scratch.row_sum[1][row] * exp2_approx(b - highest)};
}

// ---- Pass 2 -----------------------------------------------------------------------------------

// offset[row] such that exp2(scale * s - offset) is the row's softmax over the number of rows.
// False if a row has no softmax: an infinite score made its sum NaN, or every score is -inf.
__device__ inline bool finish_softmax(const SelectProblem& select, const ProbeTask& task,
                                      const SelectSequence& plan, ProbeShared& scratch) {
  const auto row = static_cast<int32_t>(threadIdx.x);
  const float2* stats = select.chunk_stats + task.chunk_number(plan, 0) * kProbeRows + row;
  float max = -FLT_MAX, sum = 0;
  for (int32_t c = 0; c < plan.chunks; ++c) {
    const float2 chunk = stats[static_cast<int64_t>(c) * kProbeRows];
    const float highest = fmaxf(max, chunk.x);
    sum = sum * exp2_approx(max - highest) + chunk.y * exp2_approx(chunk.x - highest);
    max = highest;
  }
  const bool used = row < plan.probe_rows;
  scratch.offset[row] = used ? max + log2f(sum * static_cast<float>(plan.probe_rows)) : 0.0f;
  const bool dead = __any_sync(0xffffffffu, used && !(sum > 0)) != 0;
  if (row % 32 == 0) scratch.dead[row / 32] = dead;
  __syncthreads();
  return (scratch.dead[0] | scratch.dead[1] | scratch.dead[2] | scratch.dead[3]) == 0;
}

// Sums over the eight lanes that share their columns. Each lane starts with 16 sums, columns 8 n
// and 8 n + 1 of its pair for n = 0 .. 7, and ends with those of n = lane / 4.
__device__ inline float2 sum_columns(const float (&sums)[8][2], int32_t lane) {
  float four[4][2], two[2][2];
  const bool upper4 = (lane & 16) != 0, upper2 = (lane & 8) != 0, upper1 = (lane & 4) != 0;
  float2 one;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float keep = upper4 ? sums[n + 4][e] : sums[n][e];
      const float give = upper4 ? sums[n][e] : sums[n + 4][e];
      four[n][e] = keep + __shfl_xor_sync(0xffffffffu, give, 16);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float keep = upper2 ? four[n + 2][e] : four[n][e];
      const float give = upper2 ? four[n][e] : four[n + 2][e];
      two[n][e] = keep + __shfl_xor_sync(0xffffffffu, give, 8);
    }
    const float keep = upper1 ? two[1][e] : two[0][e];
    const float give = upper1 ? two[0][e] : two[1][e];
    (e == 0 ? one.x : one.y) = keep + __shfl_xor_sync(0xffffffffu, give, 4);
  }
  return one;
}

// The sum over the tile's diagonal row - key = `offset`, from the warps' partial diagonals.
__device__ inline float tile_diagonal(const float* diagonals, int32_t offset) {
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < 4; ++warp) {
    const int32_t e = offset - 64 * (warp / 2 - warp % 2) + 63;
    if (e < 0 || e >= kDiagonals) continue;
#pragma unroll
    for (int g = 0; g < 8; ++g) {
      // Rows g, g + 8, ... of the warp have the diagonals g - 63 .. g + 56.
      if (e >= g && e <= g + 119) {
        sum += diagonals[warp * kDiagonalFloats + diagonal_entry(g, e)];
      }
    }
  }
  return sum;
}

// kAudit: block masses too, by token if there is a window.
template <typename Element, bool kAudit>
__global__ void __launch_bounds__(kProbeThreads, 2)
    probe_scores_kernel(const SelectProblem select, int32_t stages) {
  await_previous_kernel();
  start_next_kernel();
  const ProbeTask task(select);
  if (!task.any) return;
  const DeviceProblem& problem = select.problem;
  const SelectSequence& plan = select.sequences[task.sequence];
  const int32_t steps = (problem.d_qk + kStageColumns - 1) / kStageColumns;
  std::byte* shared = shared_memory();
  auto& scratch = *reinterpret_cast<ProbeShared*>(
      shared + kProbeRows * (steps * kStageColumns * 2 + 16) + stages * kStageBytes);
  const bool alive = finish_softmax(select, task, plan, scratch);
  const auto thread = static_cast<int32_t>(threadIdx.x);
  if (task.chunk == 0 && thread == 0) select.dead[task.number] = alive ? 0 : 1;
  if (!alive) return;

  const ProbeThread me(plan);
  const int32_t s_kv = problem.sequences[task.sequence].s_kv;
  const int32_t n_kv = problem.sequences[task.sequence].n_kv;
  const bool windowed = kAudit && select.local_window > 0;
  const int64_t head_key = plan.first_key + static_cast<int64_t>(task.head) * s_kv;
  float* tail = select.slash_tails + task.chunk_number(plan, task.chunk) * kProbeRows;
  // Diagonal u = key - row of the probe is distance position - u. After a tile whose first key is
  // j, thread t finishes diagonal j - 127 + t, and carries diagonal j + 1 + t to the next tile.
  float carry = 0;
  const auto store_diagonal = [&](int32_t u, float value) {
    if (select.slash == nullptr) return;
    if (u < task.begin && task.chunk > 0) {
      tail[u - task.begin + kProbeRows - 1] = value;  // the chunk before has more of it
    } else if (u <= plan.probe_position && plan.probe_position - u < s_kv) {
      select.slash[head_key + (plan.probe_position - u)] = value;
    }
  };
  int32_t next_key = task.begin;
  for_each_probe_tile<Element>(
      select, task, shared, stages, [](const std::byte*, int32_t, int32_t) {},
      [&](int32_t first_key, ProbeScores& scores, std::byte* borrowed) {
        auto* diagonals = reinterpret_cast<float*>(borrowed);
        const bool masked = windowed || me.masked(plan, first_key);
        float column[8][2] = {}, above[8][2] = {};
        float diagonal[15][2] = {};  // sums of the 8 x 8 blocks of scores on a diagonal of blocks
        if (me.busy) {
#pragma unroll
          for (int r = 0; r < 8; ++r) {
            const int m = r / 2, half = r % 2;
            const int32_t row = me.row0 + 16 * m + 8 * half;
            const int32_t last = me.last_key(plan, row, first_key) - me.key0;
            const bool second = kAudit && row >= plan.probe_split;
            const float offset = scratch.offset[row];
#pragma unroll
            for (int n = 0; n < 8; ++n) {
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                float a = exp2_approx(fmaf(scores[m][n][2 * half + e], select.scale_log2, -offset));
                if (masked) {
                  bool seen = 8 * n + e <= last;
                  if constexpr (kAudit) {
                    // The window lets a key be seen by its number or by its distance.
                    const int64_t seen_key = int64_t{first_key} + me.key0 + 8 * n + e;
                    seen = seen && (!windowed || seen_key < select.global_window ||
                                    plan.probe_position + row - seen_key < select.local_window);
                  }
                  if (!seen) a = 0;
                }
                if constexpr (kAudit) {
                  above[n][e] += second ? a : 0;
                  column[n][e] += second ? 0 : a;
                } else {
                  column[n][e] += a;
                }
                diagonal[r - n + 7][e] += a;
              }
            }
          }
        }
        const float2 sums = sum_columns(column, me.lane);
        const int32_t key = me.key0 + me.lane / 4 * 8;
        scratch.column_sums[0][me.warp / 2][key] = sums.x;
        scratch.column_sums[0][me.warp / 2][key + 1] = sums.y;
        if constexpr (kAudit) {
          const float2 more = sum_columns(above, me.lane);
          scratch.column_sums[1][me.warp / 2][key] = more.x;
          scratch.column_sums[1][me.warp / 2][key + 1] = more.y;
        }
        __syncthreads();  // all warps are done with the stage
        const int32_t g = me.lane / 4;
        float* mine = diagonals + me.warp * kDiagonalFloats;
#pragma unroll
        for (int b = 0; b < 15; ++b) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            // row - key = 8 (b - 7) + g - (2 (lane % 4) + e), entries counted from -63.
            mine[diagonal_entry(g, 8 * b + 7 + g - me.lane % 4 * 2 - e)] = diagonal[b][e];
          }
        }
        __syncthreads();
        store_diagonal(first_key - 127 + thread, carry + tile_diagonal(diagonals, 127 - thread));
        carry = tile_diagonal(diagonals, -1 - thread);
        next_key = first_key + kProbeKeys;
        float total = scratch.column_sums[0][0][thread] + scratch.column_sums[0][1][thread];
        if constexpr (kAudit) {
          const float second =
              scratch.column_sums[1][0][thread] + scratch.column_sums[1][1][thread];
          const int32_t blocks = kProbeKeys / problem.block_size;
          if (thread < 2 * blocks) {
            const int32_t half = thread / blocks, first = thread % blocks * problem.block_size;
            float mass = 0;
            for (int32_t j = first; j < first + problem.block_size; ++j) {
              mass += scratch.column_sums[half][0][j] + scratch.column_sums[half][1][j];
            }
            if (first_key + first < s_kv) {
              select.block_mass[2 * (plan.first_block + static_cast<int64_t>(task.head) * n_kv) +
                                half * static_cast<int64_t>(n_kv) +
                                (first_key + first) / problem.block_size] = mass;
            }
          }
          total += second;
        }
        if (select.vertical != nullptr && first_key + thread < s_kv) {
          select.vertical[head_key + first_key + thread] = total;
        }
      });
  // The diagonals from the last tile's second key on; thread 127 carries none.
  if (thread < kProbeRows - 1) store_diagonal(next_key - 127 + thread, carry);
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_PROBE_CUDA_CUH_

// BlockCover's means of up to 32 queries and keys, in the element type. Each element of Q and K is
// read once, from memory, which bounds it as long as enough loads are under way; so tensor cores
// add the rows up, and a warp has loads of the next 64 columns under way meanwhile.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_COVER_CUDA_MEANS_CUH_
#define FLEXPREFILL_SRC_SELECT_SELECT_COVER_CUDA_MEANS_CUH_

#include <algorithm>

#include "cuda/backend_cuda.h"
#include "cuda/launch.cuh"
#include "cuda/sm80.cuh"
#include "math.h"
#include "select/select_cover_cuda_plan.cuh"

namespace flexprefill {

constexpr int kPoolMeansThreads = 128;
constexpr int64_t kPoolMeansCtas = 4;        // of a multiprocessor
constexpr int64_t kPoolMeansCtasBeside = 2;  // where the asking rows' CTAs are to fit, too

// Numbers of means, some of them gaps: first those of keys, then those of queries. Heads are
// neighbours, as they mostly are in memory.
struct PoolMeans {
  uint32_t keys, queries;
};

// A mean: up to 32 rows, and where it goes. No rows: a gap.
struct PooledMean {
  const std::byte* rows = nullptr;
  std::byte* to = nullptr;
  int32_t n = 0;
  int32_t sequence, head, first;  // of its first row: the key, or the query
};

__device__ inline PooledMean find_mean(const SelectProblem& select, const CoverParams& p,
                                       bool of_keys, uint32_t number) {
  const DeviceProblem& problem = select.problem;
  const uint32_t heads = of_keys ? problem.h_kv : problem.h_q;
  const uint32_t each = (of_keys ? problem.max_n_kv : problem.max_n_q) * p.most_per_block;
  const auto h = static_cast<int32_t>(number % heads);
  const auto nth = static_cast<int32_t>(number / heads % each);
  const auto s = static_cast<int32_t>(number / heads / each);
  PooledMean mean;
  if (select.sequences[s].probed == 0) return mean;
  const DeviceSequence& sequence = problem.sequences[s];
  const int32_t blocks = of_keys ? sequence.n_kv : sequence.n_q;
  const int32_t position = of_keys ? 0 : sequence.first_position();
  const int32_t tokens = p.pool(sequence), per_block = p.per_block(sequence);
  const int32_t begin = ((of_keys ? 0 : sequence.first_q_block) * per_block + nth) * tokens;
  const int32_t from = max(begin, position), to = min(begin + tokens, sequence.s_kv);
  if (nth >= blocks * per_block || from >= to) return mean;
  const int64_t row = of_keys ? first_key_mean(select, p, s, h) + key_place(nth)
                              : first_query_mean(select, p, s, h) + query_place(nth);
  mean.to = (of_keys ? p.memory.k_means : p.memory.q_means) + row * problem.d_qk * 2;
  mean.n = to - from;
  mean.sequence = s;
  mean.head = h;
  mean.first = from - position;
  mean.rows = of_keys ? problem.kv_row(problem.k, s, h, from)
                      : problem.q_row(problem.q, s, h, from - position);
  return mean;
}

// A warp's part of a mean on its way: 64 columns. Lane 4 u + r has unit u (eight columns) of rows
// r, r + 4, ...
struct PooledRows {
  uint4 eights[8];
  std::byte* to;  // the lane's unit, if it is to write one
  int32_t n;

  __device__ void load(const std::byte* rows, int64_t stride, int32_t unit, int32_t units) {
    const auto lane = static_cast<int32_t>(threadIdx.x) % 32;
    const std::byte* at = rows + lane % 4 * stride + (unit + lane / 4) * 16;
#pragma unroll
    for (int l = 0; l < 8; ++l) {
      eights[l] = lane % 4 + 4 * l < n && unit + lane / 4 < units
                      ? *reinterpret_cast<const uint4*>(at)
                      : uint4{0, 0, 0, 0};
      at += 4 * stride;
    }
  }

  // Lanes 0 to 7 write unit 2 (lane % 4) + lane / 4. A pair of columns of 16 rows is an operand
  // [16, 8] of whose rows the even ones are of the lower column, the odd ones of the higher: the
  // sums of both are two rows of ones and zeros times it.
  template <typename Element>
  __device__ void store_mean() const {
    const auto lane = static_cast<int32_t>(threadIdx.x) % 32;
    const uint32_t ones = lane < 4   ? pack<Element>(1.0f, 0.0f)
                          : lane < 8 ? pack<Element>(0.0f, 1.0f)
                                     : 0u;
    const uint32_t sides[4] = {ones, 0, ones, 0};
    const float factor = 1.0f / static_cast<float>(n);
    // Lanes 0 to 3 get the lower columns of two units, lanes 4 to 7 the higher ones.
    const bool upper = lane / 4 % 2 != 0;
    uint32_t pairs[4];
#pragma unroll
    for (int p = 0; p < 4; p += 2) {  // by two: registers are short
      float sums[2][4] = {};
#pragma unroll
      for (int l = 0; l < 8; l += 2) {
        const uint4& a = eights[l];
        const uint4& b = eights[l + 1];
        mma_m16n8k16<Element>(sums[0], sides, p == 0 ? a.x : a.z, p == 0 ? b.x : b.z);
        mma_m16n8k16<Element>(sums[1], sides, p == 0 ? a.y : a.w, p == 0 ? b.y : b.w);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float own = (upper ? sums[e][1] : sums[e][0]) * factor;
        const float other =
            __shfl_xor_sync(kWholeWarp, (upper ? sums[e][0] : sums[e][1]) * factor, 4);
        pairs[p + e] = upper ? pack<Element>(other, own) : pack<Element>(own, other);
      }
    }
    if (to != nullptr) *reinterpret_cast<uint4*>(to) = {pairs[0], pairs[1], pairs[2], pairs[3]};
  }
};

__device__ inline const std::byte* from_lane(const std::byte* pointer, int32_t lane) {
  return reinterpret_cast<const std::byte*>(
      __shfl_sync(kWholeWarp, reinterpret_cast<unsigned long long>(pointer), lane));
}

// A warp: the means numbered `first`, first + step, ... below `end`, whose rows are evenly apart
// and on 16 bytes. 64 columns are added up while the loads of the next 64 are under way; where 32
// means lie is worked out by a lane each.
template <typename Element>
__device__ inline void pool_near_rows(const SelectProblem& select, const CoverParams& p,
                                      bool of_keys, uint32_t first, uint32_t end, uint32_t step) {
  const auto lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int32_t units = select.problem.d_qk / 8;
  const int64_t stride = (of_keys ? select.problem.k : select.problem.q).row_stride * 2;
  PooledMean mine;
  int32_t nth = 0, unit = 0;  // of what is loaded next
  const auto load = [&](PooledRows& next) {
    next.n = 0;
    if (first >= end) return;
    if (nth % 32 == 0 && unit == 0) {
      const int64_t number = first + int64_t{lane} * step;
      mine = number < end ? find_mean(select, p, of_keys, static_cast<uint32_t>(number))
                          : PooledMean{};
    }
    next.n = __shfl_sync(kWholeWarp, mine.n, nth % 32);
    const int32_t own = unit + 2 * (lane % 4) + lane / 4;
    auto* to = const_cast<std::byte*>(from_lane(mine.to, nth % 32));
    next.to = lane < 8 && own < units ? to + own * 16 : nullptr;
    next.load(from_lane(mine.rows, nth % 32), stride, unit, units);
    unit += 8;
    if (unit < units) return;
    unit = 0;
    ++nth;
    first += step;
  };
  PooledRows rows[2];
  load(rows[0]);
  load(rows[1]);
  bool more = true;
#pragma unroll 1
  while (more) {
    more = first < end;
#pragma unroll
    for (PooledRows& now : rows) {
      if (now.n > 0) now.store_mean<Element>();
      load(now);
    }
    more = more || rows[0].n > 0 || rows[1].n > 0;
  }
}

// A warp: the mean of rows wherever they are.
template <typename Element>
__device__ inline void pool_any_rows(const SelectProblem& select, bool of_keys,
                                     const PooledMean& mean) {
  const DeviceProblem& problem = select.problem;
  const auto lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int32_t units = problem.d_qk / 8;  // of a row, 2 to 32
  const int32_t together = 32 / units;     // rows that the warp reads at once
  const int32_t unit = lane % units;
  const int32_t begin = lane < together * units ? lane / units : mean.n;
  float sums[8] = {};
  if (of_keys && problem.page_table != nullptr) {
    sum_eights<Element, 4>(
        begin, mean.n, together, select.k_aligned,
        [&](int32_t i) {
          return problem.kv_row(problem.k, mean.sequence, mean.head, mean.first + i) + unit * 16;
        },
        sums);
  } else {
    const int64_t stride = (of_keys ? problem.k : problem.q).row_stride * 2;
    sum_eights<Element, 1>(
        begin, mean.n, together, false,
        [&](int32_t i) { return mean.rows + i * stride + unit * 16; }, sums);
  }
  float means[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) means[e] = sums[e];
#pragma unroll 1
  for (int32_t from = units; from < together * units; from += units) {
#pragma unroll
    for (int e = 0; e < 8; ++e) means[e] += __shfl_sync(kWholeWarp, sums[e], unit + from);
  }
  const float factor = 1.0f / static_cast<float>(mean.n);
#pragma unroll
  for (float& x : means) x *= factor;
  if (lane < units) {
    reinterpret_cast<uint4*>(mean.to)[lane] = {
        pack<Element>(means[0], means[1]), pack<Element>(means[2], means[3]),
        pack<Element>(means[4], means[5]), pack<Element>(means[6], means[7])};
  }
}

// A warp a mean, in turns. All CTAs are there at once. On Hopper they leave room, so the asking
// rows' products run meanwhile: of a quarter's 512 x 32 registers two of these warps take 2 x 112
// and three of cover_asks_sm90_kernel's 3 x 96.
template <typename Element>
__global__ void __maxnreg__(112)
    pool_means_kernel(const __grid_constant__ SelectProblem select,
                      const __grid_constant__ CoverParams p, const PoolMeans means) {
  await_previous_kernel();
  start_next_kernel();
  constexpr uint32_t kWarps = kPoolMeansThreads / 32;
  const uint32_t first = blockIdx.x * kWarps + threadIdx.x / 32;
#pragma unroll 1
  for (int32_t side = 0; side < 2; ++side) {
    const bool of_keys = side == 0;
    pool_near_rows<Element>(select, p, of_keys, first, of_keys ? means.keys : means.queries,
                            gridDim.x * kWarps);
  }
}

// Those whose rows are not on 16 bytes, or lie in pages of which a mean needs several.
template <typename Element>
__global__ void __launch_bounds__(kPoolMeansThreads, kPoolMeansCtas)
    pool_any_means_kernel(const __grid_constant__ SelectProblem select,
                          const __grid_constant__ CoverParams p, const PoolMeans means) {
  await_previous_kernel();
  start_next_kernel();
  constexpr uint32_t kWarps = kPoolMeansThreads / 32;
#pragma unroll 1
  for (uint32_t number = blockIdx.x * kWarps + threadIdx.x / 32;
       number < means.keys + means.queries; number += gridDim.x * kWarps) {
    const bool of_keys = number < means.keys;
    const PooledMean mean = find_mean(select, p, of_keys, of_keys ? number : number - means.keys);
    if (mean.n > 0) pool_any_rows<Element>(select, of_keys, mean);
  }
}

// beside: leaves room for the kernel after it.
template <typename Element>
void launch_pool_means(const SelectProblem& select, const CoverParams& p, bool beside,
                       void* stream) {
  const DeviceProblem& problem = select.problem;
  const int64_t keys = int64_t{problem.max_n_kv} * p.most_per_block * problem.b * problem.h_kv;
  const int64_t queries = int64_t{problem.max_n_q} * p.most_per_block * problem.b * problem.h_q;
  const bool near_keys =
      select.k_aligned && (problem.page_table == nullptr || problem.page_size % kCoverPool == 0);
  const auto launch = [&](auto kernel, bool takes_keys, bool takes_queries) {
    const PoolMeans means{takes_keys ? grid_of(keys) : 0, takes_queries ? grid_of(queries) : 0};
    const int64_t count = int64_t{means.keys} + means.queries;
    if (count == 0) return;
    const int64_t most =
        (beside ? kPoolMeansCtasBeside : kPoolMeansCtas) * device_info().multiprocessors;
    const int64_t ctas = std::min(ceil_div(count, kPoolMeansThreads / 32), most);
    if (beside) leave_shared_memory(kernel);
    launch_overlapped(kernel, dim3(grid_of(ctas)), dim3(kPoolMeansThreads), 0, stream, select, p,
                      means);
  };
  launch(pool_any_means_kernel<Element>, !near_keys, !select.q_aligned);
  launch(pool_means_kernel<Element>, near_keys, select.q_aligned);
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_COVER_CUDA_MEANS_CUH_

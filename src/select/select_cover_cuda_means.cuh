// BlockCover's means of up to 32 queries and keys, in the element type. Each element of Q and K is
// read once, from memory, which bounds it as long as enough loads are under way; so tensor cores
// add the rows up, and a warp has loads of the next 64 columns under way meanwhile. 32 tokens go
// together also where they are two means of 16.
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
constexpr int32_t kPoolSpan = 32;            // tokens that a warp adds up at once
static_assert(kCoverPool == kPoolSpan);      // or else half as many
constexpr int64_t kPoolMeansCtas = 4;        // of a multiprocessor
constexpr int64_t kPoolMeansCtasBeside = 2;  // where the asking rows' CTAs are to fit, too

// Numbers of spans of 32 tokens, some of them gaps: first those of keys, then those of queries.
// Heads are neighbours, as they mostly are in memory.
struct PoolSpans {
  uint32_t keys, queries;
};

// 32 tokens of which begin .. end - 1 exist: of one mean, or of two of 16. In one register.
struct PoolTokens {
  uint32_t packed = 0;

  PoolTokens() = default;
  __device__ explicit PoolTokens(uint32_t bits) : packed(bits) {}
  __device__ PoolTokens(int32_t begin, int32_t end, bool two)
      : packed(static_cast<uint32_t>(begin | end << 8) | (two ? 1u << 16 : 0u)) {}

  __device__ int32_t begin() const { return static_cast<int32_t>(packed & 0xff); }
  __device__ int32_t end() const { return static_cast<int32_t>(packed >> 8 & 0xff); }
  __device__ bool two() const { return packed >> 16 != 0; }
  __device__ bool any() const { return packed != 0; }
  // Of the first mean, or of the second.
  __device__ int32_t count(bool second) const {
    const int32_t from = second ? 16 : 0, to = two() && !second ? 16 : 32;
    return max(min(end(), to) - max(begin(), from), 0);
  }
};

// Where the rows are, and where their mean goes, or the first of two. No tokens: a gap.
struct PoolSpan {
  const std::byte* rows = nullptr;  // of token 0, even if there is no such row
  uint32_t to = 0;                  // in units of 16 bytes
  PoolTokens tokens;
  int32_t sequence, head, first;  // of token 0: the key, or the query
};

// The number of a warp's nth span: warps take turns.
__device__ inline uint32_t pool_span(uint32_t nth) {
  constexpr uint32_t kWarps = kPoolMeansThreads / 32;
  return (nth * gridDim.x + blockIdx.x) * kWarps + threadIdx.x / 32;
}

// Means of one span lie so far apart (query_place, key_place).
__device__ inline uint32_t means_apart(bool of_keys) { return of_keys ? 1 : 8; }

__device__ inline PoolSpan find_span(const SelectProblem& select, const CoverParams& p,
                                     bool of_keys, uint32_t number) {
  const DeviceProblem& problem = select.problem;
  const uint32_t heads = of_keys ? problem.h_kv : problem.h_q;
  const int32_t per_block = p.block_size / kPoolSpan;
  const uint32_t each = (of_keys ? problem.max_n_kv : problem.max_n_q) * per_block;
  const auto h = static_cast<int32_t>(number % heads);
  const auto nth = static_cast<int32_t>(number / heads % each);
  const auto s = static_cast<int32_t>(number / heads / each);
  PoolSpan span;
  if (select.sequences[s].probed == 0) return span;
  const DeviceSequence& sequence = problem.sequences[s];
  const int32_t blocks = of_keys ? sequence.n_kv : sequence.n_q;
  const int32_t position = of_keys ? 0 : sequence.first_position();
  const int32_t token = ((of_keys ? 0 : sequence.first_q_block) * per_block + nth) * kPoolSpan;
  const int32_t begin = max(position - token, 0), end = min(sequence.s_kv - token, kPoolSpan);
  if (nth >= blocks * per_block || begin >= end) return span;
  const bool two = p.pool(sequence) < kPoolSpan;
  const int32_t mean = two ? 2 * nth : nth;
  const int64_t row = of_keys ? first_key_mean(select, p, s, h) + key_place(mean)
                              : first_query_mean(select, p, s, h) + query_place(mean);
  span.to = static_cast<uint32_t>(row * (problem.d_qk / 8));
  span.tokens = {begin, end, two};
  span.sequence = s;
  span.head = h;
  span.first = token - position;
  const std::byte* first = of_keys ? problem.kv_row(problem.k, s, h, token + begin)
                                   : problem.q_row(problem.q, s, h, span.first + begin);
  span.rows = first - begin * (of_keys ? problem.k : problem.q).row_stride * 2;
  return span;
}

__device__ inline const std::byte* from_lane(const std::byte* pointer, int32_t lane) {
  return reinterpret_cast<const std::byte*>(
      __shfl_sync(kWholeWarp, reinterpret_cast<unsigned long long>(pointer), lane));
}

// A warp's part of a span on its way: 64 columns. Lane 4 u + r has unit u (eight columns) of rows
// r, r + 4, ...
struct PooledRows {
  static constexpr uint32_t kNone = 0xffffffff;
  uint4 eights[8];
  uint32_t to;  // the lane's unit, if it is to write one
  PoolTokens tokens;

  // mine: of lane `source`.
  __device__ void load(const PoolSpan& mine, int32_t source, int64_t stride, int32_t unit,
                       int32_t units, uint32_t apart) {
    const auto lane = static_cast<int32_t>(threadIdx.x) % 32;
    tokens = PoolTokens(__shfl_sync(kWholeWarp, mine.tokens.packed, source));
    const int32_t own = unit + 2 * (lane % 4) + lane / 4 % 2;
    const bool second = lane >= 8;
    const bool writes = lane < (tokens.two() ? 16 : 8) && own < units && tokens.count(second) > 0;
    to = __shfl_sync(kWholeWarp, mine.to, source) + (second ? apart : 0) + own;
    if (!writes) to = kNone;
    const std::byte* at = from_lane(mine.rows, source) + lane % 4 * stride + (unit + lane / 4) * 16;
#pragma unroll
    for (int l = 0; l < 8; ++l) {
      const int32_t row = lane % 4 + 4 * l;
      eights[l] = row >= tokens.begin() && row < tokens.end() && unit + lane / 4 < units
                      ? *reinterpret_cast<const uint4*>(at)
                      : uint4{0, 0, 0, 0};
      at += 4 * stride;
    }
  }

  // Lanes 0 to 7 write unit 2 (lane % 4) + lane / 4, and the next eight that of the second mean. A
  // pair of columns of 16 rows is an operand [16, 8] of whose rows the even ones are of the lower
  // column, the odd ones of the higher: the sums of both are two rows of ones and zeros times it,
  // which for the second mean are the next two.
  template <typename Element>
  __device__ void store_means(std::byte* means) const {
    const auto lane = static_cast<int32_t>(threadIdx.x) % 32;
    const auto side = [&](int32_t row) {
      return lane / 4 == row       ? pack<Element>(1.0f, 0.0f)
             : lane / 4 == row + 1 ? pack<Element>(0.0f, 1.0f)
                                   : 0u;
    };
    const uint32_t low = side(0), high = side(tokens.two() ? 2 : 0);
    const uint32_t sides[2][4] = {{low, 0, low, 0}, {high, 0, high, 0}};
    const float factor = 1.0f / static_cast<float>(tokens.count(lane >= 8));
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
        mma_m16n8k16<Element>(sums[0], sides[l / 4], p == 0 ? a.x : a.z, p == 0 ? b.x : b.z);
        mma_m16n8k16<Element>(sums[1], sides[l / 4], p == 0 ? a.y : a.w, p == 0 ? b.y : b.w);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float own = (upper ? sums[e][1] : sums[e][0]) * factor;
        const float other =
            __shfl_xor_sync(kWholeWarp, (upper ? sums[e][0] : sums[e][1]) * factor, 4);
        pairs[p + e] = upper ? pack<Element>(other, own) : pack<Element>(own, other);
      }
    }
    if (to == kNone) return;
    reinterpret_cast<uint4*>(means)[to] = {pairs[0], pairs[1], pairs[2], pairs[3]};
  }
};

// A warp's spans among `all`, whose rows are evenly apart and on 16 bytes. 64 columns are added up
// while the loads of the next 64 are under way; where 32 spans lie is worked out by a lane each.
template <typename Element>
__device__ inline void pool_near_rows(const SelectProblem& select, const CoverParams& p,
                                      bool of_keys, uint32_t all) {
  const auto lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int32_t units = select.problem.d_qk / 8;
  const int64_t stride = (of_keys ? select.problem.k : select.problem.q).row_stride * 2;
  PoolSpan mine;
  uint32_t nth = 0;  // of what is loaded next
  int32_t unit = 0;
  const auto load = [&](PooledRows& next) {
    next.tokens = {};
    if (pool_span(nth) >= all) return;
    if (nth % 32 == 0 && unit == 0) {
      const uint32_t number = pool_span(nth + lane);
      mine = number < all ? find_span(select, p, of_keys, number) : PoolSpan{};
    }
    next.load(mine, static_cast<int32_t>(nth % 32), stride, unit, units,
              means_apart(of_keys) * units);
    unit += 8;
    if (unit < units) return;
    unit = 0;
    ++nth;
  };
  PooledRows rows[2];
  load(rows[0]);
  load(rows[1]);
  bool more = true;
#pragma unroll 1
  while (more) {
    more = pool_span(nth) < all;
#pragma unroll
    for (PooledRows& now : rows) {
      if (now.tokens.any()) {
        now.store_means<Element>(of_keys ? p.memory.k_means : p.memory.q_means);
      }
      load(now);
    }
    more = more || rows[0].tokens.any() || rows[1].tokens.any();
  }
}

// A warp: one mean of a span, the first or the second, of rows wherever they are.
template <typename Element>
__device__ inline void pool_any_rows(const SelectProblem& select, const CoverParams& p,
                                     bool of_keys, const PoolSpan& span, bool second) {
  const int32_t tokens = span.tokens.count(second);
  if (tokens == 0) return;
  const DeviceProblem& problem = select.problem;
  const auto lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int32_t units = problem.d_qk / 8;  // of a row, 2 to 32
  const int32_t together = 32 / units;     // rows that the warp reads at once
  const int32_t unit = lane % units;
  const int32_t begin = lane < together * units ? lane / units : tokens;
  const int32_t first = span.first + max(span.tokens.begin(), second ? 16 : 0);
  float sums[8] = {};
  if (of_keys && problem.page_table != nullptr) {
    sum_eights<Element, 4>(
        begin, tokens, together, select.k_aligned,
        [&](int32_t i) {
          return problem.kv_row(problem.k, span.sequence, span.head, first + i) + unit * 16;
        },
        sums);
  } else {
    const int64_t stride = (of_keys ? problem.k : problem.q).row_stride * 2;
    const std::byte* rows = span.rows + (first - span.first) * stride;
    sum_eights<Element, 1>(
        begin, tokens, together, false, [&](int32_t i) { return rows + i * stride + unit * 16; },
        sums);
  }
  float means[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) means[e] = sums[e];
#pragma unroll 1
  for (int32_t from = units; from < together * units; from += units) {
#pragma unroll
    for (int e = 0; e < 8; ++e) means[e] += __shfl_sync(kWholeWarp, sums[e], unit + from);
  }
  const float factor = 1.0f / static_cast<float>(tokens);
#pragma unroll
  for (float& x : means) x *= factor;
  if (lane < units) {
    std::byte* to = of_keys ? p.memory.k_means : p.memory.q_means;
    reinterpret_cast<uint4*>(to)[span.to + (second ? means_apart(of_keys) * units : 0) + lane] = {
        pack<Element>(means[0], means[1]), pack<Element>(means[2], means[3]),
        pack<Element>(means[4], means[5]), pack<Element>(means[6], means[7])};
  }
}

// A warp a span, in turns. All CTAs are there at once. On Hopper they leave room for one
// of the two CTAs of asking rows: of a quarter's 512 x 32 registers two of these warps take 2 x 112
// and three of cover_asks_sm90_kernel's 3 x 96.
template <typename Element>
__global__ void __maxnreg__(112)
    pool_means_kernel(const __grid_constant__ SelectProblem select,
                      const __grid_constant__ CoverParams p, const PoolSpans spans) {
  await_previous_kernel();
  start_next_kernel();
#pragma unroll 1
  for (int32_t side = 0; side < 2; ++side) {
    const bool of_keys = side == 0;
    pool_near_rows<Element>(select, p, of_keys, of_keys ? spans.keys : spans.queries);
  }
}

// Those whose rows are not on 16 bytes, or lie in pages of which a mean needs several.
template <typename Element>
__global__ void __launch_bounds__(kPoolMeansThreads, kPoolMeansCtas)
    pool_any_means_kernel(const __grid_constant__ SelectProblem select,
                          const __grid_constant__ CoverParams p, const PoolSpans spans) {
  await_previous_kernel();
  start_next_kernel();
#pragma unroll 1
  for (uint32_t nth = 0; pool_span(nth) < spans.keys + spans.queries; ++nth) {
    const uint32_t number = pool_span(nth);
    const bool of_keys = number < spans.keys;
    const PoolSpan span = find_span(select, p, of_keys, of_keys ? number : number - spans.keys);
    pool_any_rows<Element>(select, p, of_keys, span, false);
    if (span.tokens.two()) pool_any_rows<Element>(select, p, of_keys, span, true);
  }
}

// Means of queries only where the map does not make them. beside: leaves room for the kernel after
// it.
template <typename Element>
void launch_pool_means(const SelectProblem& select, const CoverParams& p, bool beside,
                       void* stream) {
  const DeviceProblem& problem = select.problem;
  const int64_t per_block = p.block_size / kPoolSpan;
  const int64_t keys = int64_t{problem.max_n_kv} * per_block * problem.b * problem.h_kv;
  const int64_t queries = int64_t{problem.max_n_q} * per_block * problem.b * problem.h_q;
  const bool near_keys =
      select.k_aligned && (problem.page_table == nullptr || problem.page_size % kPoolSpan == 0);
  const auto launch = [&](auto kernel, bool takes_keys, bool takes_queries) {
    const PoolSpans spans{takes_keys ? grid_of(keys) : 0, takes_queries ? grid_of(queries) : 0};
    const int64_t count = int64_t{spans.keys} + spans.queries;
    if (count == 0) return;
    const int64_t most =
        (beside ? kPoolMeansCtasBeside : kPoolMeansCtas) * device_info().multiprocessors;
    const int64_t ctas = std::min(ceil_div(count, kPoolMeansThreads / 32), most);
    if (beside) leave_shared_memory(kernel);
    launch_overlapped(kernel, dim3(grid_of(ctas)), dim3(kPoolMeansThreads), 0, stream, select, p,
                      spans);
  };
  launch(pool_any_means_kernel<Element>, !near_keys, !p.map_pools && !select.q_aligned);
  launch(pool_means_kernel<Element>, near_keys, !p.map_pools && select.q_aligned);
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_COVER_CUDA_MEANS_CUH_

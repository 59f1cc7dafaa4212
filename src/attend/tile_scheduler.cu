#include "attend/tile_scheduler.cuh"

#include <limits>

#include "cuda/launch.cuh"

namespace flexprefill {
namespace {

constexpr int32_t kSortThreads = 1024;
constexpr int32_t kCountThreads = 256;
constexpr int32_t kBuckets = 256;
// Below so many words of bits the one CTA that sorts also counts; affects speed only.
constexpr int64_t kFewWords = 32 * 1024;

// Longest first: 0 to 7 blocks have a bucket each, then every power of two has eight.
__device__ int32_t bucket_of(int32_t length) {
  int32_t ascending = length;
  if (length >= 8) {
    const int32_t shift = 28 - __clz(length);  // length >> shift is in [8, 16)
    ascending = 8 * shift + (length >> shift);
  }
  return kBuckets - 1 - ascending;
}

// Kept blocks of a row, summed over `step` threads of which this is number `first`.
__device__ int32_t count_blocks(const DeviceProblem& problem, const DeviceRows& rows, int64_t row,
                                int32_t first, int32_t step) {
  const IndexRow place = index_row(problem, row);
  const DeviceSequence& sequence = problem.sequences[place.sequence];
  if (rows.bits == nullptr) return first == 0 ? sequence.first_q_block + place.q_row + 1 : 0;
  const uint64_t* words = rows.row(sequence, place.head, place.q_row);
  int32_t n = 0;
  for (int32_t w = first; w < sequence.words_per_row; w += step) n += __popcll(words[w]);
  return n;
}

// One warp a row.
__global__ void __launch_bounds__(kCountThreads)
    count_rows(DeviceProblem problem, DeviceRows rows, int32_t* lengths) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kCountThreads / 32) +
                      static_cast<int32_t>(threadIdx.x) / 32;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  if (row >= problem.index_rows) return;
  int32_t n = count_blocks(problem, rows, row, lane, 32);
  for (int32_t step = 16; step > 0; step /= 2) n += __shfl_xor_sync(0xffffffff, n, step);
  if (lane == 0) lengths[row] = n;
}

// A counting sort by one CTA. Threads of a warp that meet in a bucket add to it once.
__global__ void __launch_bounds__(kSortThreads)
    sort_rows(DeviceProblem problem, DeviceRows rows, RowOrder order, bool counted) {
  auto* counts = reinterpret_cast<int32_t*>(shared_memory());  // [kBuckets], then first places
  int32_t* totals = counts + kBuckets;                         // [kBuckets], inclusive sums
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const auto n_rows = static_cast<int32_t>(problem.index_rows);
  if (thread < kBuckets) counts[thread] = 0;
  __syncthreads();

  // Adds every thread's bucket (-1: none) to counts; returns what was there before, threads of
  // lower number first within a warp.
  const auto add = [&](int32_t bucket) {
    const uint32_t same = __match_any_sync(0xffffffff, bucket);
    const int32_t leader = __ffs(static_cast<int>(same)) - 1, lane = thread % 32;
    int32_t before = 0;
    if (lane == leader && bucket >= 0) before = atomicAdd(counts + bucket, __popc(same));
    before = __shfl_sync(0xffffffff, before, leader);
    return before + __popc(same & ((1u << lane) - 1));
  };

  for (int32_t base = 0; base < n_rows; base += kSortThreads) {
    const int32_t row = base + thread;
    int32_t bucket = -1;
    if (row < n_rows) {
      if (!counted) order.lengths[row] = count_blocks(problem, rows, row, 0, 1);
      bucket = bucket_of(order.lengths[row]);
    }
    add(bucket);
  }
  __syncthreads();

  const int32_t count = thread < kBuckets ? counts[thread] : 0;
  if (thread < kBuckets) totals[thread] = count;
  __syncthreads();
  for (int32_t step = 1; step < kBuckets; step *= 2) {
    const int32_t before = thread >= step && thread < kBuckets ? totals[thread - step] : 0;
    __syncthreads();
    if (thread < kBuckets) totals[thread] += before;
    __syncthreads();
  }
  if (thread < kBuckets) counts[thread] = totals[thread] - count;
  __syncthreads();

  for (int32_t base = 0; base < n_rows; base += kSortThreads) {
    int32_t row = 0, bucket = -1;
    if (base + thread < n_rows) {
      const IndexRow at = swept_row(problem, base + thread);
      const DeviceSequence& sequence = problem.sequences[at.sequence];
      row = static_cast<int32_t>(sequence.first_row) + at.head * sequence.n_q + at.q_row;
      bucket = bucket_of(order.lengths[row]);
    }
    const int32_t place = add(bucket);
    if (bucket >= 0) order.rows[place] = row;
  }
}

}  // namespace

RowOrder take_row_order(const DeviceProblem& problem, Arena& arena) {
  if (problem.index_rows > std::numeric_limits<int32_t>::max()) {
    throw Error(ErrorCode::kUnsupported,
                "q: expected at most 2^31 - 1 query blocks of all heads and sequences, got " +
                    std::to_string(problem.index_rows));
  }
  return {arena.take<int32_t>(problem.index_rows), arena.take<int32_t>(problem.index_rows)};
}

void order_rows(const DeviceProblem& problem, const DeviceRows& rows, const RowOrder& order,
                void* stream) {
  const int64_t words = problem.index_rows * ((problem.max_n_kv + 63) / 64);
  const bool count_apart = rows.bits != nullptr && words > kFewWords;
  if (count_apart) {
    constexpr int64_t kRowsPerCta = kCountThreads / 32;
    const auto ctas = static_cast<uint32_t>((problem.index_rows + kRowsPerCta - 1) / kRowsPerCta);
    launch(count_rows, dim3(ctas), dim3(kCountThreads), 0, stream, problem, rows, order.lengths);
  }
  launch(sort_rows, dim3(1), dim3(kSortThreads), 2 * kBuckets * sizeof(int32_t), stream, problem,
         rows, order, count_apart);
}

}  // namespace flexprefill

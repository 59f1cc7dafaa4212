// CSR from bits: the blocks of each group of rows are counted; then every group adds up the counts
// of those before it and writes its rows from there. Where there are few bits, every group counts
// all those before it, in the same kernel. Bits from CSR: a warp writes a row.
#include "cuda/device_index.h"

#include <algorithm>

#include "cuda/launch.cuh"

namespace flexprefill {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Rows of a group, a CTA's: few, as a row takes a warp a chain of dependent loads; but at most
// kMostGroups groups, as each reads the counts of all.
constexpr int kLeastRows = 32;
constexpr int64_t kMostGroups = 2048;

// Up to so many words of bits (16k tokens, 32 heads) counting all before a group takes less time
// than a kernel of its own: a launch, and two waits of each CTA for others' writes.
constexpr int64_t kFewWords = 16384;
constexpr int kFewRows = 16;  // of a group then

int64_t group_rows(int64_t rows) {
  return std::max<int64_t>(kLeastRows, (rows + kMostGroups - 1) / kMostGroups);
}
int64_t group_count(int64_t rows) { return (rows + group_rows(rows) - 1) / group_rows(rows); }

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }

// One row of the index and the words of its bits.
struct IndexRow {
  int64_t first_word;
  int32_t words;
  int32_t diagonal;  // the row's last causal block
};

__device__ inline IndexRow find_row(const DeviceProblem& problem, int64_t row) {
  int32_t low = 0, high = problem.b - 1;  // the last sequence that starts at or before the row
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (problem.sequences[middle].first_row <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const DeviceSequence& sequence = problem.sequences[low];
  const int64_t in_sequence = row - sequence.first_row;
  return {.first_word = sequence.first_word + in_sequence * sequence.words_per_row,
          .words = sequence.words_per_row,
          .diagonal = sequence.first_q_block + static_cast<int32_t>(in_sequence % sequence.n_q)};
}

__device__ inline int64_t warp_sum(int64_t value) {
  for (int delta = kWarp / 2; delta > 0; delta /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, delta);
  }
  return value;
}

// Sum of `value` over the lanes below this one.
__device__ inline int64_t warp_sum_below(int64_t value) {
  int64_t sum = value;
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const int64_t other = __shfl_up_sync(kWholeWarp, sum, delta);
    if (lane_id() >= delta) sum += other;
  }
  return sum - value;
}

// Kept blocks of a row; the whole warp calls it.
__device__ inline int64_t row_count(const uint64_t* words, int32_t n) {
  int64_t count = 0;
  for (int32_t w = lane_id(); w < n; w += kWarp) count += __popcll(words[w]);
  return warp_sum(count);
}

// The sum of `value` over a CTA; scratch [kWarps]. Every thread gets it.
__device__ inline int64_t cta_sum(int64_t value, int64_t* scratch) {
  value = warp_sum(value);
  if (lane_id() == 0) scratch[warp_id()] = value;
  __syncthreads();
  value = 0;
  for (int w = 0; w < kWarps; ++w) value += scratch[w];
  __syncthreads();
  return value;
}

// indptr[r + 1] = kept blocks of row r; sums[g] = those of group g's rows.
__global__ void __launch_bounds__(kThreads)
    count_rows(const __grid_constant__ DeviceProblem problem, const uint64_t* bits, int64_t rows,
               int64_t* indptr, int64_t* sums) {
  await_previous_kernel();
  start_next_kernel();
  auto* scratch = reinterpret_cast<int64_t*>(shared_memory());  // [kWarps]
  const int64_t first = static_cast<int64_t>(blockIdx.x) * rows;
  int64_t sum = 0;
  for (int64_t i = warp_id(); i < rows && first + i < problem.index_rows; i += kWarps) {
    const IndexRow row = find_row(problem, first + i);
    const int64_t count = row_count(bits + row.first_word, row.words);
    if (lane_id() == 0) {
      indptr[first + i + 1] = count;
      sum += count;
    }
  }
  sum = cta_sum(sum, scratch);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// The kept blocks of a row from indices[0] on; the whole warp calls it.
__device__ inline void write_row(const uint64_t* words, int32_t n, int32_t* indices) {
  const uint64_t low = uint64_t{1} << lane_id(), high = low << kWarp;  // a lane's two bits
#pragma unroll 4
  for (int32_t w = 0; w < n; ++w) {
    const uint64_t word = words[w];
    if ((word & low) != 0) indices[__popcll(word & (low - 1))] = w * 64 + lane_id();
    if ((word & high) != 0) indices[__popcll(word & (high - 1))] = w * 64 + kWarp + lane_id();
    indices += __popcll(word);
  }
}

// Turns the counts of group blockIdx.x in indptr into starts and writes its rows there.
__global__ void __launch_bounds__(kThreads)
    write_rows(const __grid_constant__ DeviceProblem problem, const uint64_t* bits, int64_t rows,
               const int64_t* sums, int64_t* indptr, int32_t* indices) {
  await_previous_kernel();
  start_next_kernel();
  auto* scratch = reinterpret_cast<int64_t*>(shared_memory());  // [kWarps]
  const int64_t first = static_cast<int64_t>(blockIdx.x) * rows;
  int64_t below = 0;
  for (int64_t g = threadIdx.x; g < blockIdx.x; g += kThreads) below += sums[g];
  below = cta_sum(below, scratch);
  const int64_t group_start = below;
  if (blockIdx.x == 0 && threadIdx.x == 0) indptr[0] = 0;
  for (int64_t begin = 0; begin < rows; begin += kThreads) {  // mostly one round
    const int64_t r = first + begin + threadIdx.x;
    const bool there = begin + threadIdx.x < rows && r < problem.index_rows;
    const int64_t count = there ? indptr[r + 1] : 0;
    const int64_t in_warp = warp_sum_below(count);
    if (lane_id() == kWarp - 1) scratch[warp_id()] = in_warp + count;
    __syncthreads();
    int64_t start = below + in_warp;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp_id()) start += scratch[w];
      below += scratch[w];
    }
    if (there) indptr[r + 1] = start + count;
    __syncthreads();
  }
  for (int64_t i = warp_id(); i < rows && first + i < problem.index_rows; i += kWarps) {
    const IndexRow row = find_row(problem, first + i);
    // Another CTA may just be writing the end of the row before the group's first.
    const int64_t start = i > 0 ? indptr[first + i] : group_start;
    write_row(bits + row.first_word, row.words, indices + start);
  }
}

// All of it by each group: counts what comes before and its own rows, at most kFewRows, and writes
// them.
__global__ void __launch_bounds__(kThreads)
    write_few_rows(const __grid_constant__ DeviceProblem problem, const uint64_t* bits,
                   int64_t* indptr, int32_t* indices) {
  await_previous_kernel();
  start_next_kernel();
  struct Shared {
    int64_t scratch[kWarps];
    int32_t counts[kFewRows];
  };
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kFewRows;
  const int32_t rows = static_cast<int32_t>(
      problem.index_rows - first < kFewRows ? problem.index_rows - first : kFewRows);
  for (int32_t i = warp_id(); i < rows; i += kWarps) {
    const IndexRow row = find_row(problem, first + i);
    const int64_t count = row_count(bits + row.first_word, row.words);
    if (lane_id() == 0) shared.counts[i] = static_cast<int32_t>(count);
  }
  // Rows lie in their order, without gaps.
  const auto before = static_cast<int32_t>(find_row(problem, first).first_word);
  int64_t below = 0;
#pragma unroll 8
  for (int32_t w = static_cast<int32_t>(threadIdx.x); w < before; w += kThreads) {
    below += __popcll(bits[w]);
  }
  below = cta_sum(below, shared.scratch);  // with barriers
  if (first == 0 && threadIdx.x == 0) indptr[0] = 0;
  for (int32_t i = warp_id(); i < rows; i += kWarps) {
    const IndexRow row = find_row(problem, first + i);
    int64_t start = below;
    for (int32_t r = 0; r < i; ++r) start += shared.counts[r];
    if (lane_id() == 0) indptr[first + i + 1] = start + shared.counts[i];
    write_row(bits + row.first_word, row.words, indices + start);
  }
}

__global__ void __launch_bounds__(kThreads)
    set_bits(const __grid_constant__ DeviceProblem problem, const int64_t* indptr,
             const int32_t* indices, int64_t capacity, uint64_t* bits) {
  await_previous_kernel();
  start_next_kernel();
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id();
  if (r >= problem.index_rows) return;
  const IndexRow row = find_row(problem, r);
  uint64_t* words = bits + row.first_word;
  for (int32_t w = lane_id(); w < row.words; w += kWarp) words[w] = 0;
  __syncwarp();
  const int64_t begin = indptr[r] < 0 ? 0 : indptr[r];
  const int64_t end = indptr[r + 1] < capacity ? indptr[r + 1] : capacity;
  for (int64_t e = begin + lane_id(); e < end; e += kWarp) {
    const int32_t j = indices[e];
    if (j < 0 || j > row.diagonal) continue;
    atomicOr(reinterpret_cast<unsigned long long*>(words + j / 64), 1ull << (j % 64));
  }
}

}  // namespace

int64_t* lay_out_csr_sums(int64_t index_rows, Arena& arena) {
  return arena.take<int64_t>(group_count(index_rows));
}

void bits_to_csr(const DeviceProblem& problem, const uint64_t* bits, int64_t words, int64_t* sums,
                 const DeviceBlockIndex& index, void* stream) {
  const int64_t groups = group_count(problem.index_rows), rows = group_rows(problem.index_rows);
  if (groups == 0) {  // an empty batch
    cuda_check(cudaMemsetAsync(index.indptr, 0, sizeof(int64_t), static_cast<cudaStream_t>(stream)),
               "index");
    return;
  }
  if (words <= kFewWords) {
    const dim3 few((problem.index_rows + kFewRows - 1) / kFewRows);
    launch_overlapped(write_few_rows, few, dim3(kThreads),
                      kWarps * sizeof(int64_t) + kFewRows * sizeof(int32_t), stream, problem, bits,
                      index.indptr, index.indices);
    return;
  }
  const dim3 grid(static_cast<unsigned>(groups));
  launch_overlapped(count_rows, grid, dim3(kThreads), kWarps * sizeof(int64_t), stream, problem,
                    bits, rows, index.indptr, sums);
  launch_overlapped(write_rows, grid, dim3(kThreads), kWarps * sizeof(int64_t), stream, problem,
                    bits, rows, sums, index.indptr, index.indices);
}

void csr_to_bits(const DeviceProblem& problem, const DeviceBlockIndex& index, uint64_t* bits,
                 void* stream) {
  const int64_t ctas = (problem.index_rows + kWarps - 1) / kWarps;
  if (ctas == 0) return;
  launch_overlapped(set_bits, dim3(static_cast<unsigned>(ctas)), dim3(kThreads), 0, stream, problem,
                    index.indptr, index.indices, index.capacity, bits);
}

}  // namespace flexprefill

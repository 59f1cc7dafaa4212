// CSR from bits: the blocks of each group of rows are counted, the counts summed up, and every
// group writes its rows from there. Bits from CSR: a warp writes a row.
#include "cuda/device_index.h"

#include <algorithm>

#include "cuda/launch.cuh"

namespace flexprefill {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRowsPerGroup = 256;  // a CTA's

int64_t group_count(int64_t rows) { return (rows + kRowsPerGroup - 1) / kRowsPerGroup; }

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

// indptr[r + 1] = kept blocks of row r; sums[g] = those of group g's rows.
__global__ void __launch_bounds__(kThreads)
    count_rows(const __grid_constant__ DeviceProblem problem, const uint64_t* bits, int64_t* indptr,
               int64_t* sums) {
  auto* warp_sums = reinterpret_cast<int64_t*>(shared_memory());  // [kWarps]
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRowsPerGroup;
  int64_t sum = 0;
  for (int i = warp_id(); i < kRowsPerGroup && first + i < problem.index_rows; i += kWarps) {
    const IndexRow row = find_row(problem, first + i);
    const int64_t count = row_count(bits + row.first_word, row.words);
    if (lane_id() == 0) indptr[first + i + 1] = count;
    sum += count;
  }
  if (lane_id() == 0) warp_sums[warp_id()] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) sum += warp_sums[w];
    sums[blockIdx.x] = sum;
  }
}

// sums[g] becomes the sum over the groups below g. One warp.
__global__ void __launch_bounds__(kWarp) sum_groups(int64_t* sums, int64_t groups) {
  int64_t below = 0;
  for (int64_t first = 0; first < groups; first += kWarp) {
    const int64_t g = first + lane_id();
    const int64_t value = g < groups ? sums[g] : 0;
    const int64_t sum = below + warp_sum_below(value);
    if (g < groups) sums[g] = sum;
    below = __shfl_sync(kWholeWarp, sum + value, kWarp - 1);
  }
}

// Turns the counts in indptr into starts and writes the rows there.
__global__ void __launch_bounds__(kThreads)
    write_rows(const __grid_constant__ DeviceProblem problem, const uint64_t* bits,
               const int64_t* sums, int64_t* indptr, int32_t* indices) {
  auto* starts = reinterpret_cast<int64_t*>(shared_memory());  // [kRowsPerGroup]
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRowsPerGroup;
  if (warp_id() == 0) {
    int64_t below = sums[blockIdx.x];
    for (int i = lane_id(); i < kRowsPerGroup; i += kWarp) {
      const int64_t r = first + i;
      const int64_t count = r < problem.index_rows ? indptr[r + 1] : 0;
      starts[i] = below + warp_sum_below(count);
      if (r < problem.index_rows) indptr[r + 1] = starts[i] + count;
      below = __shfl_sync(kWholeWarp, starts[i] + count, kWarp - 1);
    }
    if (blockIdx.x == 0 && lane_id() == 0) indptr[0] = 0;
  }
  __syncthreads();
  for (int i = warp_id(); i < kRowsPerGroup && first + i < problem.index_rows; i += kWarps) {
    const IndexRow row = find_row(problem, first + i);
    int64_t start = starts[i];
    for (int32_t chunk = 0; chunk < row.words; chunk += kWarp) {
      const int32_t w = chunk + lane_id();
      uint64_t left = w < row.words ? bits[row.first_word + w] : 0;
      const int64_t count = __popcll(left);
      const int64_t below = warp_sum_below(count);
      for (int32_t* to = indices + start + below; left != 0; left &= left - 1) {
        *to++ = w * 64 + __ffsll(static_cast<long long>(left)) - 1;
      }
      start += __shfl_sync(kWholeWarp, below + count, kWarp - 1);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    set_bits(const __grid_constant__ DeviceProblem problem, const int64_t* indptr,
             const int32_t* indices, int64_t capacity, uint64_t* bits) {
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

void bits_to_csr(const DeviceProblem& problem, const uint64_t* bits, int64_t* sums,
                 const DeviceBlockIndex& index, void* stream) {
  const int64_t groups = group_count(problem.index_rows);
  if (groups == 0) {  // an empty batch
    cuda_check(cudaMemsetAsync(index.indptr, 0, sizeof(int64_t), static_cast<cudaStream_t>(stream)),
               "index");
    return;
  }
  const dim3 grid(static_cast<unsigned>(groups));
  launch(count_rows, grid, dim3(kThreads), kWarps * sizeof(int64_t), stream, problem, bits,
         index.indptr, sums);
  launch(sum_groups, dim3(1), dim3(kWarp), 0, stream, sums, groups);
  launch(write_rows, grid, dim3(kThreads), kRowsPerGroup * sizeof(int64_t), stream, problem, bits,
         sums, index.indptr, index.indices);
}

void csr_to_bits(const DeviceProblem& problem, const DeviceBlockIndex& index, uint64_t* bits,
                 void* stream) {
  const int64_t ctas = (problem.index_rows + kWarps - 1) / kWarps;
  if (ctas == 0) return;
  launch(set_bits, dim3(static_cast<unsigned>(ctas)), dim3(kThreads), 0, stream, problem,
         index.indptr, index.indices, index.capacity, bits);
}

}  // namespace flexprefill

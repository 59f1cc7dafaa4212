// A validated call as kernels see it: plain structs of device pointers, made from a Problem.
// Offsets are int64 elements; a call may reach beyond 2^31 of them.
#ifndef FLEXPREFILL_SRC_CUDA_DEVICE_PROBLEM_H_
#define FLEXPREFILL_SRC_CUDA_DEVICE_PROBLEM_H_

#include <cstddef>
#include <cstdint>

#include "arena.h"
#include "index/block_row.h"
#include "problem.h"

#if defined(__CUDACC__)
#define FLEXPREFILL_HOST_DEVICE_INLINE __host__ __device__ inline
#else
#define FLEXPREFILL_HOST_DEVICE_INLINE inline
#endif

namespace flexprefill {

struct DeviceSequence {
  int64_t q_start, kv_start;  // packed: first row of the sequence; 0 otherwise
  int64_t first_row;          // of the index; rows in the order query head, query block
  int64_t first_word;         // of the bits
  int64_t first_mean;  // of arrays with a row a key block: K/V head h's begin h * n_kv rows later
  int32_t s_q, s_kv;
  int32_t first_q_block, n_q, n_kv;
  int32_t words_per_row;
  // In a table with a stride of 64 bytes, its size without this, ptxas spills in select's
  // probe_stats_kernel (152 bytes on sm_90a).
  int64_t unused;

  // Where query row 0 stands.
  FLEXPREFILL_HOST_DEVICE_INLINE int32_t first_position() const { return s_kv - s_q; }
};

// q, k, v or out. Strides count elements of `element_bytes`.
struct DeviceTensor {
  std::byte* data;
  int64_t sequence_stride;  // batch: between sequences; paged: between pages; packed: 0
  int64_t row_stride, head_stride;
  int32_t element_bytes;
};

struct DeviceProblem {
  DeviceTensor q, k, v, out;
  float* lse;  // nullptr: not asked for
  int64_t lse_sequence_stride, lse_head_stride;
  const int32_t* page_table;  // device memory; nullptr: not paged
  int64_t page_table_stride;
  int32_t page_size;
  int32_t b, h_q, h_kv, d_qk, d_v, block_size;
  DType dtype;  // float16 or bfloat16
  bool gqa_interleave;
  float scale;                      // softmax scale
  const DeviceSequence* sequences;  // [b], in the workspace
  int32_t max_n_q, max_n_kv;        // over the sequences
  int64_t index_rows;               // of all sequences and heads
  int64_t mean_rows;                // of arrays with a row a key block
  // For launches: the sum over the sequences of n_q.
  int64_t q_blocks;

  FLEXPREFILL_HOST_DEVICE_INLINE int32_t group() const { return h_q / h_kv; }
  FLEXPREFILL_HOST_DEVICE_INLINE int32_t kv_head(int32_t h) const {
    return gqa_interleave ? h % h_kv : h / group();
  }
  FLEXPREFILL_HOST_DEVICE_INLINE int32_t q_head(int32_t kv, int32_t g) const {
    return gqa_interleave ? g * h_kv + kv : kv * group() + g;
  }
  // Row i of q or out.
  FLEXPREFILL_HOST_DEVICE_INLINE std::byte* q_row(const DeviceTensor& t, int32_t sequence,
                                                  int32_t head, int64_t i) const {
    return t.data + (sequence * t.sequence_stride + head * t.head_stride +
                     (sequences[sequence].q_start + i) * t.row_stride) *
                        t.element_bytes;
  }
  // Row j of k or v.
  FLEXPREFILL_HOST_DEVICE_INLINE std::byte* kv_row(const DeviceTensor& t, int32_t sequence,
                                                   int32_t kv_head, int64_t j) const {
    int64_t page = sequence;
    int64_t row = sequences[sequence].kv_start + j;
    if (page_table != nullptr) {
      const auto own = static_cast<uint32_t>(j);  // 64 bits would be divided by a function
      page = page_table[sequence * page_table_stride + own / page_size];
      row = own % page_size;
    }
    return t.data + (page * t.sequence_stride + kv_head * t.head_stride + row * t.row_stride) *
                        t.element_bytes;
  }
  // lse of (sequence, head, row 0), contiguous over rows.
  FLEXPREFILL_HOST_DEVICE_INLINE float* lse_row(int32_t sequence, int32_t head) const {
    return lse + sequence * lse_sequence_stride + head * lse_head_stride +
           sequences[sequence].q_start;
  }
};

// What attend walks over on the device: bits in the layout of BlockBits, or every causal block.
struct DeviceRows {
  const uint64_t* bits;  // nullptr: every causal block
  TokenWindow window;
  bool mean_correction = false;  // BlockIndex::mean_correction

  // Words of one row; q_row counts from the sequence's first query block.
  FLEXPREFILL_HOST_DEVICE_INLINE const uint64_t* row(const DeviceSequence& sequence, int32_t head,
                                                     int32_t q_row) const {
    return bits + sequence.first_word +
           (static_cast<int64_t>(head) * sequence.n_q + q_row) * sequence.words_per_row;
  }
};

// Lays the table of sequences out in the arena and, if `stream` calls are allowed (the arena does
// not count), fills it on the stream from kernel parameters: nothing that a CUDA graph replays
// reads host memory. The element type, alignment and the rest are as make_problem checked them.
DeviceProblem make_device_problem(const Problem& problem, Arena& arena, void* stream);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_CUDA_DEVICE_PROBLEM_H_

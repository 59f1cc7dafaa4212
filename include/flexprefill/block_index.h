// BlockIndex: which key blocks every query block of every head attends to (CSR).
#ifndef FLEXPREFILL_BLOCK_INDEX_H_
#define FLEXPREFILL_BLOCK_INDEX_H_

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "flexprefill/types.h"

namespace flexprefill {

struct SequenceLengths {
  int64_t s_q = 0;
  int64_t s_kv = 0;
};

// The block grid of one sequence. It is anchored at absolute token 0, for queries and for keys: a
// chunk that starts in the middle of a block has a partial first query block.
struct BlockGrid {
  int64_t first_q_block = 0;  // absolute number of the block that holds query row 0
  int64_t n_q = 0;            // query blocks
  int64_t n_kv = 0;           // key blocks; the last query block is number n_kv - 1
};
FLEXPREFILL_API BlockGrid block_grid(SequenceLengths lengths, int32_t block_size);
// Causal blocks of one head: sum over the query blocks of (absolute number + 1).
FLEXPREFILL_API int64_t causal_blocks(const BlockGrid& grid);

// Rows in the order sequence, query head, query block; row r keeps the key blocks
// indices[indptr[r] .. indptr[r + 1]), ascending, none after the row's diagonal block.
// A row without blocks is allowed: its output is 0 and its lse -inf.
//
// With `global_window` or `local_window` above 0, kept blocks are masked further by token: query i
// sees key j only if j < global_window or pos_i - j < local_window (streaming_llm, exact).
//
// With `mean_correction`, the blocks before its diagonal that a row does not keep are not left out:
// each counts as block_size keys that all are the mean of its keys, and whose values are the mean
// of its values (FlashPrefill's zero-order correction, arXiv 2608.19758), means rounded to the
// element type. Not together with windows.
struct FLEXPREFILL_API BlockIndex {
  int32_t block_size = 128;
  int32_t h_q = 0;
  int64_t global_window = 0;
  int64_t local_window = 0;
  bool mean_correction = false;
  std::vector<SequenceLengths> sequences;
  std::vector<int64_t> indptr{0};  // [rows + 1]
  std::vector<int32_t> indices;    // [indptr.back()]

  int64_t row_count() const;  // sum over sequences of h_q * n_q
  // Throws Error(kInvalidArgument) naming the first row that is out of range, not ascending or
  // after its diagonal, or an indptr that is not a running sum.
  void check() const;
  double density() const;  // kept causal blocks / all causal blocks; 1 for an empty index
  // One byte string, little-endian, versioned; `deserialize` checks everything that it reads.
  std::string serialize() const;
  static BlockIndex deserialize(std::span<const char> bytes);
};

// A BlockIndex in the memory of a CUDA device: the same rows and the same CSR arrays, for
// select_on_device and attend_on_device, which never wait for the device. Borrowed: the caller owns
// the memory. Lengths, heads and block size are those of the input it is used with.
struct DeviceBlockIndex {
  int64_t* indptr = nullptr;   // [device_block_index_rows + 1]
  int32_t* indices = nullptr;  // [capacity]
  int64_t capacity = 0;        // select_on_device needs device_block_index_capacity
  int64_t global_window = 0;   // as in BlockIndex
  int64_t local_window = 0;
  bool mean_correction = false;
};
// Rows of the index of an input: sum over sequences of h_q * n_q. Both look at shapes and lengths
// of q and k alone. The element type must be one of a CUDA call's.
FLEXPREFILL_API int64_t device_block_index_rows(const AttentionInput& input);
// The worst case of an index: every causal block of every head. With 32 heads, 128k tokens and
// blocks of 128 that is 16.8 million indices, 67 MB: 4 % of q, k and v (d 128, 8 K/V heads).
FLEXPREFILL_API int64_t device_block_index_capacity(const AttentionInput& input);

// The index that keeps every causal block.
FLEXPREFILL_API BlockIndex dense_block_index(std::span<const SequenceLengths> sequences,
                                             int32_t h_q, int32_t block_size);

}  // namespace flexprefill

#endif  // FLEXPREFILL_BLOCK_INDEX_H_

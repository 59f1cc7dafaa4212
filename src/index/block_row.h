// The only decode of a row of the index, whatever its form: dense, CSR or one bit a block.
#ifndef FLEXPREFILL_SRC_INDEX_BLOCK_ROW_H_
#define FLEXPREFILL_SRC_INDEX_BLOCK_ROW_H_

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "flexprefill/block_index.h"
#include "problem.h"

namespace flexprefill {

// Kept blocks as bits, one row after another in the order of BlockIndex. Bit j of a row is key
// block j; rows of a sequence have ceil(n_kv / 64) words.
struct BlockBits {
  uint64_t* words = nullptr;
  std::vector<int64_t> first_word;  // [b + 1]: first word of each sequence

  static BlockBits layout(const Problem& problem) {
    BlockBits bits;
    bits.first_word.assign(1, 0);
    for (const BlockGrid& grid : problem.grids) {
      bits.first_word.push_back(bits.first_word.back() +
                                problem.h_q * grid.n_q * words_per_row(grid));
    }
    return bits;
  }
  static int64_t words_per_row(const BlockGrid& grid) { return (grid.n_kv + 63) / 64; }
  int64_t word_count() const { return first_word.back(); }
  // q_row counts from the sequence's first query block.
  uint64_t* row(const Problem& problem, int64_t sequence, int32_t head, int64_t q_row) const {
    const BlockGrid& grid = problem.grids[sequence];
    return words + first_word[sequence] + (head * grid.n_q + q_row) * words_per_row(grid);
  }
};

// Keys beyond the causal rule that a query sees, by token; 0, 0: all.
struct TokenWindow {
  int64_t global_window = 0;
  int64_t local_window = 0;

  // Windows of any int64, cut to the longest sequence so that positions can be added to them.
  static TokenWindow of(int64_t global_window, int64_t local_window) {
    constexpr int64_t kMostKeys = int64_t{1} << 31;
    return {std::min(global_window, kMostKeys), std::min(local_window, kMostKeys)};
  }
  bool active() const { return global_window > 0 || local_window > 0; }
  bool sees(int64_t query_position, int64_t key) const {
    return key <= query_position &&
           (!active() || key < global_window || query_position - key < local_window);
  }
};

// What attend walks over.
struct BlockRows {
  const BlockIndex* csr = nullptr;  // one of csr and bits, or neither: every causal block
  const BlockBits* bits = nullptr;
  TokenWindow window;
  bool mean_correction = false;  // BlockIndex::mean_correction

  // Kept key blocks of one row, ascending, into blocks[n_kv]; returns how many.
  int64_t decode(const Problem& problem, int64_t sequence, int32_t head, int64_t q_row,
                 int32_t* blocks) const {
    const BlockGrid& grid = problem.grids[sequence];
    int64_t n = 0;
    if (csr != nullptr) {
      const int64_t r = problem.index_row(sequence, head, q_row);
      for (int64_t e = csr->indptr[r]; e < csr->indptr[r + 1]; ++e) blocks[n++] = csr->indices[e];
    } else if (bits != nullptr) {
      const uint64_t* words = bits->row(problem, sequence, head, q_row);
      for (int64_t w = 0; w < BlockBits::words_per_row(grid); ++w) {
        for (uint64_t left = words[w]; left != 0; left &= left - 1) {
          blocks[n++] = static_cast<int32_t>(w * 64 + std::countr_zero(left));
        }
      }
    } else {
      const int64_t last = grid.first_q_block + q_row;
      for (int32_t j = 0; j <= last; ++j) blocks[n++] = j;
    }
    return n;
  }
};

// CSR from bits.
BlockIndex to_block_index(const Problem& problem, const BlockBits& bits, TokenWindow window,
                          bool mean_correction = false);

// The blocks before `diagonal` that are not among the n kept ones (ascending), into blocks
// [diagonal]; returns how many.
inline int64_t dropped_blocks(const int32_t* kept, int64_t n, int64_t diagonal, int32_t* blocks) {
  int64_t dropped = 0, e = 0;
  for (int32_t j = 0; j < diagonal; ++j) {
    if (e < n && kept[e] == j) {
      ++e;
    } else {
      blocks[dropped++] = j;
    }
  }
  return dropped;
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_INDEX_BLOCK_ROW_H_

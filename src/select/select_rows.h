// What the selectors of every host backend share around pattern.h: where the probe lies, which
// sequences stay dense, and how a head's rows and its audit are written.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_ROWS_H_
#define FLEXPREFILL_SRC_SELECT_SELECT_ROWS_H_

#include <algorithm>
#include <bit>
#include <cstdint>
#include <variant>

#include "index/block_row.h"
#include "math.h"
#include "problem.h"
#include "select/pattern.h"

namespace flexprefill {

// The probe: the last min(B, s_q) queries of a sequence. Where the last block is ragged they lie
// in two query blocks.
struct Probe {
  int64_t rows = 0;         // P
  int64_t first_row = 0;    // the probe's first row, counted from the sequence's first query
  int64_t position = 0;     // where that row stands
  int64_t first_block = 0;  // absolute number of its query block
  int64_t split = 0;        // rows in that block; the others lie in the next one

  Probe(SequenceLengths lengths, int64_t block_size) {
    rows = std::min(block_size, lengths.s_q);
    first_row = lengths.s_q - rows;
    position = lengths.s_kv - rows;
    first_block = position / block_size;
    split = std::min(rows, (first_block + 1) * block_size - position);
  }
  int64_t blocks() const { return split < rows ? 2 : 1; }
};

// The query rows [begin, end) of query block q_row of a sequence; a chunk's first block is partial.
struct RowRange {
  int64_t begin = 0;
  int64_t end = 0;
};
inline RowRange q_block_rows(SequenceLengths lengths, const BlockGrid& grid, int64_t block_size,
                             int64_t q_row) {
  const int64_t first_position = lengths.s_kv - lengths.s_q;
  const int64_t block_position = (grid.first_q_block + q_row) * block_size;
  return {std::max(block_position - first_position, int64_t{0}),
          std::min(block_position + block_size - first_position, lengths.s_q)};
}

// Key block j's share of a whole block: 1 for all but a ragged last one.
inline double key_share(int64_t s_kv, int64_t block_size, int64_t j) {
  return static_cast<double>(std::min(block_size, s_kv - j * block_size)) /
         static_cast<double>(block_size);
}

// Sequences that are too short to gain: the probe would cost as much, or the budget is everything;
// and a cover of everything.
// A window is exact at any length, so StreamingLlm has no such sequences.
inline bool stays_dense(SequenceLengths lengths, int64_t block_size, const Pattern& pattern) {
  if (std::holds_alternative<Dense>(pattern)) return true;
  if (std::holds_alternative<StreamingLlm>(pattern)) return false;
  if (lengths.s_q <= block_size || lengths.s_kv <= 2 * block_size) return true;
  if (const auto* cover = std::get_if<BlockCover>(&pattern)) return cover->gamma >= 1;
  const auto* flex = std::get_if<FlexPrefill>(&pattern);
  return flex != nullptr &&
         whole_blocks(lengths.s_kv, block_size) <= whole_blocks(flex->min_budget, block_size);
}

// The rows of one query head of one sequence in the index.
struct HeadRows {
  const Problem& problem;
  const BlockBits& bits;
  int64_t sequence;
  int32_t head;

  const BlockGrid& grid() const { return problem.grids[sequence]; }
  uint64_t* row(int64_t q_row) const { return bits.row(problem, sequence, head, q_row); }
  // The row of an absolute query block.
  uint64_t* block_row(int64_t i) const { return row(i - grid().first_q_block); }

  void write_dense() const {
    for (int64_t r = 0; r < grid().n_q; ++r) {
      write_dense_row(grid().n_kv, grid().first_q_block + r, row(r));
    }
  }
  void write_window(const StreamingLlm& window) const {
    const SequenceLengths lengths = problem.lengths[sequence];
    for (int64_t r = 0; r < grid().n_q; ++r) {
      const int64_t begin = q_block_rows(lengths, grid(), problem.block_size, r).begin;
      write_window_row(window, lengths.s_kv - lengths.s_q + begin, problem.block_size, grid().n_kv,
                       grid().first_q_block + r, row(r));
    }
  }
  void write_choice(const BlockChoice& choice) const {
    for (int64_t r = 0; r < grid().n_q; ++r) {
      write_row(choice, grid().n_kv, grid().first_q_block + r, row(r));
    }
  }
  // Step 6: adds the blocks that cover gamma of the map (pattern.h has its layout).
  void keep_map(const float* map, int64_t size, float gamma, Histogram* histogram) const {
    Taken taken = cover_map(map, size, grid().n_q, gamma, histogram);
    for (int64_t r = 0; r < grid().n_q; ++r) {
      const int64_t i = grid().first_q_block + r;
      keep_map_row(map, i, taken, row(r));
      map += i + 1;
    }
  }
  float density() const {
    int64_t kept = 0;
    const int64_t words = BlockBits::words_per_row(grid()) * grid().n_q;
    for (int64_t w = 0; w < words; ++w) kept += std::popcount(row(0)[w]);
    return static_cast<float>(static_cast<double>(kept) /
                              static_cast<double>(causal_blocks(grid())));
  }
};

inline HeadAudit make_audit(const HeadChoice& choice, double kept_mass, float density) {
  return {.pattern = choice.pattern,
          .jsd_sqrt = choice.jsd_sqrt,
          .vertical_blocks = static_cast<int32_t>(choice.vertical_blocks),
          .slash_blocks = static_cast<int32_t>(choice.slash_blocks),
          .kept_mass = static_cast<float>(kept_mass),
          .density = density};
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_ROWS_H_

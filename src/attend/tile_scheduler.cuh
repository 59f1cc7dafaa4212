// The order in which attend's kernels take the rows of the index: long rows first, so that the last
// ones to finish are short.
//
// A row is a query block of one query head of one sequence; rows are numbered as in the index
// (DeviceSequence::first_row, then query head, then query block).
#ifndef FLEXPREFILL_SRC_ATTEND_TILE_SCHEDULER_CUH_
#define FLEXPREFILL_SRC_ATTEND_TILE_SCHEDULER_CUH_

#include <cstdint>

#include "arena.h"
#include "cuda/device_problem.h"

namespace flexprefill {

struct IndexRow {
  int32_t sequence, head;
  int32_t q_row;  // counts from the sequence's first query block
};

// What the order kernels write. Device memory; nullptr when the arena counts.
struct RowOrder {
  int32_t* rows;     // [index_rows], longest first
  int32_t* lengths;  // [index_rows], kept blocks of each row
};

// Takes the memory of an order: 8 bytes a row. Throws Error(kUnsupported) beyond 2^31 - 1 rows.
RowOrder take_row_order(const DeviceProblem& problem, Arena& arena);

// Whether attend needs no order in memory: the rows of one dense sequence are swept as they are.
inline bool order_is_implied(const DeviceProblem& problem, const DeviceRows& rows) {
  return rows.bits == nullptr && problem.b == 1;
}

// Writes the order on the stream, one launch or two. Rows whose numbers of kept blocks are within
// an eighth of each other count as equally long; they stay about in the order of the sweep.
void order_rows(const DeviceProblem& problem, const DeviceRows& rows, const RowOrder& order,
                void* stream);

// The sequence that holds row number `row`, or place `row` of the sweep.
__device__ inline int32_t sequence_of_row(const DeviceProblem& problem, int64_t row) {
  int32_t low = 0, high = problem.b - 1;  // the last sequence that starts at or before `row`
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (problem.sequences[middle].first_row <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Row number `row` of the index.
__device__ inline IndexRow index_row(const DeviceProblem& problem, int64_t row) {
  const int32_t s = sequence_of_row(problem, row);
  const DeviceSequence& sequence = problem.sequences[s];
  const auto within = static_cast<int32_t>(row - sequence.first_row);
  return {s, within / sequence.n_q, within % sequence.n_q};
}

// The row at `place` of the sweep: of a sequence, its last query block first, and the heads of one
// query block, which share K and V, one after another.
__device__ inline IndexRow swept_row(const DeviceProblem& problem, int64_t place) {
  const int32_t s = sequence_of_row(problem, place);
  const DeviceSequence& sequence = problem.sequences[s];
  const auto within = static_cast<int32_t>(place - sequence.first_row);
  const int32_t h = within % problem.h_q;
  return {s, problem.q_head(h / problem.group(), h % problem.group()),
          sequence.n_q - 1 - within / problem.h_q};
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_ATTEND_TILE_SCHEDULER_CUH_

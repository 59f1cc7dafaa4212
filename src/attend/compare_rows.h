// The comparison with dense attention, for rows in whatever form they are.
#ifndef FLEXPREFILL_SRC_ATTEND_COMPARE_ROWS_H_
#define FLEXPREFILL_SRC_ATTEND_COMPARE_ROWS_H_

#include <cstdint>
#include <span>

#include "flexprefill/compare.h"
#include "index/block_row.h"
#include "problem.h"

namespace flexprefill {

// compare_with_dense of a validated call on host memory, whose output attend made of `kept`.
void compare_rows(const Problem& problem, const BlockRows& kept, int64_t rows,
                  const Execution& execution, std::span<DenseComparison> heads);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_ATTEND_COMPARE_ROWS_H_

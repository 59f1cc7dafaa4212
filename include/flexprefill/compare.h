// compare_with_dense: what a selection has cost, against dense attention on a sample of rows.
#ifndef FLEXPREFILL_COMPARE_H_
#define FLEXPREFILL_COMPARE_H_

#include <cstdint>
#include <span>

#include "flexprefill/block_index.h"
#include "flexprefill/types.h"

namespace flexprefill {

// Of one query head of one sequence, over its sampled rows.
struct DenseComparison {
  float kept_mass = 1;        // mean share of the dense attention on keys that the row keeps
  float least_kept_mass = 1;  // of the worst row
  float error = 0;            // root mean square of (out - dense), over that of dense
  int32_t rows = 0;           // sampled
};

// Computes `rows` query rows of every head densely, in double precision, spread evenly over each
// sequence with the last one among them (all, if there are fewer), and compares with `out`, which
// attend made of `index`. heads: [b * h_q], sequence-major. Host memory and host backends only; the
// cost is rows / s_q of a slow dense attention. A NaN in a row shows in its head's figures. Throws
// Error before anything is written; allocates its scratch.
FLEXPREFILL_API void compare_with_dense(const AttentionInput& input, const BlockIndex& index,
                                        const TensorView& out, int64_t rows,
                                        const Execution& execution,
                                        std::span<DenseComparison> heads);

}  // namespace flexprefill

#endif  // FLEXPREFILL_COMPARE_H_

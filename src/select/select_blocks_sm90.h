// FlashPrefill's scores on cards of compute capability 9.0, as select_blocks_cuda.cu calls it in
// the place of mean_scores_kernel: products by wgmma.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_SM90_H_
#define FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_SM90_H_

#include <cstdint>

#include "problem.h"

namespace flexprefill {

struct BlockScores;
struct SelectProblem;

// Whether it can take the call: TMA needs rows of q on 16 bytes.
bool mean_scores_sm90_takes(const Problem& problem);

// Query rows of a task.
int32_t mean_scores_sm90_rows(const Problem& problem);
// Of a row of so many scores, whole strips; and floats of a CTA's scratch of such rows.
int32_t mean_scores_sm90_pitch(int64_t n_kv);
int64_t mean_scores_sm90_scratch(const Problem& problem, int32_t pitch);

// `ctas`: at most one a multiprocessor.
void mean_scores_sm90(const Problem& problem, const SelectProblem& select,
                      const BlockScores& scores, int64_t ctas, void* stream);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_SM90_H_

// BlockCover's two large kernels on cards of compute capability 9.0, as select_cover_cuda.cu calls
// them in the place of asks_kernel and cover_map_kernel: the same grids and memory, products by
// wgmma.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_COVER_SM90_H_
#define FLEXPREFILL_SRC_SELECT_SELECT_COVER_SM90_H_

#include "problem.h"

namespace flexprefill {

struct CoverParams;
struct SelectProblem;

// The problem is one that probe_sm90_takes.
void cover_asks_sm90(const Problem& problem, const SelectProblem& select, const CoverParams& cover,
                     void* stream);
void cover_map_sm90(const Problem& problem, const SelectProblem& select, const CoverParams& cover,
                    void* stream);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_COVER_SM90_H_

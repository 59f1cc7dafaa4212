// select on the CPU for BlockCover: what select_cpu.cc needs of it.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_COVER_CPU_H_
#define FLEXPREFILL_SRC_SELECT_SELECT_COVER_CPU_H_

#include <span>

#include "arena.h"
#include "index/block_row.h"
#include "problem.h"

namespace flexprefill {

// As select_cpu, whose pattern is a BlockCover.
void select_cover_cpu(const Problem& problem, const BlockCover& pattern, const Execution& execution,
                      Arena& arena, const BlockBits& bits, std::span<HeadAudit> audit);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_COVER_CPU_H_

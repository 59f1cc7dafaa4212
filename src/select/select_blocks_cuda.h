// select on the device for heads whose blocks are scored one by one (block_rules.h): what
// select_cuda.cu needs of it.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CUDA_H_
#define FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CUDA_H_

#include <cstddef>
#include <cstdint>

#include "arena.h"
#include "cuda/device_problem.h"
#include "flexprefill/select.h"

namespace flexprefill {

struct SelectProblem;

// Which rules the query heads of a call follow.
struct HeadKinds {
  explicit HeadKinds(const Problem& problem, const Pattern& pattern);
  bool probe = false, blocks = false;
  bool differ = false;  // from head to head: HeadRule says which
};

struct BlockScoreMemory {
  std::byte* k_means = nullptr;
  float* q_means = nullptr;
  float* scratch = nullptr;
  int64_t ctas = 0, scratch_floats = 0;
  int32_t pitch = 0;
  bool sm90 = false;  // scores by wgmma
};
// Takes the memory from the arena, also that of select.rules and select.not_finite; nothing for
// patterns that need none. When the arena counts, fields of `select` become nullptr. hopper: the
// device has wgmma and TMA, and the caller lets them be used.
BlockScoreMemory lay_out_block_scores(const Problem& problem, const Pattern& pattern, bool hopper,
                                      Arena& arena, SelectProblem& select);

// Both on the stream, in this order: fills select.rules; writes the rows of every head of
// Kind::kBlocks that has scores, and select.not_finite.
void write_head_rules(const Problem& problem, const Pattern& pattern, const SelectProblem& select,
                      void* stream);
void select_by_blocks(const Problem& problem, const Pattern& pattern, const SelectProblem& select,
                      const BlockScoreMemory& memory, void* stream);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CUDA_H_

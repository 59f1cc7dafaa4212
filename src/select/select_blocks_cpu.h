// select on the CPU for heads whose blocks are scored one by one (block_rules.h): what
// select_cpu.cc needs of it.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CPU_H_
#define FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CPU_H_

#include <cstdint>

#include "arena.h"
#include "cpu/tile_ops.h"
#include "index/block_row.h"
#include "problem.h"
#include "select/select_ops.h"
#include "select/select_rows.h"

namespace flexprefill {

// mean [d] = mean of the rows [begin, end) of `view`, which have the problem's element type.
void mean_rows(const SelectOps& ops, const RowView& view, RowRange range, int32_t d, DType dtype,
               float* mean);

class BlockScoreSelector {
 public:
  // Takes its memory from the arena, nothing if no head of the pattern needs it.
  BlockScoreSelector(Arena& arena, const Problem& problem, const Pattern& pattern,
                     CpuTarget cpu_target, int workers);

  // Writes the rows of every head of the sequence that by_block_scores; heads whose scores meet a
  // NaN keep everything.
  void select(int64_t sequence, const BlockBits& bits) const;
  // Whether the last select has left the head dense for a NaN.
  bool is_dense(int32_t head) const { return has_nan_[head] != 0; }
  bool needed() const { return needed_; }

 private:
  struct Worker;
  struct Rows;  // query blocks of one head

  void pool_keys(int64_t sequence) const;
  bool score_antidiagonals(const Worker& worker, const Rows& rows) const;
  bool score_means(const Worker& worker, const Rows& rows) const;
  bool score_pooled(const Worker& worker, const Rows& rows) const;
  void gather(const RowView& view, int64_t first, int64_t step, int64_t n, RowRange valid,
              std::byte* to) const;

  const Problem& problem_;
  const Pattern& pattern_;
  const TileOps& tiles_;    // of the inputs' type
  const TileOps& tiles32_;  // of float, for means
  const SelectOps& ops_;
  int workers_;
  bool needed_ = false;
  int64_t blocks_per_task_ = 1;
  uint8_t* has_nan_ = nullptr;  // [h_q]
  float* k_means_ = nullptr;    // [h_kv, n_kv, d]
  Worker* per_worker_ = nullptr;
};

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CPU_H_

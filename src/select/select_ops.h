// The vector code of select_cpu that is not a product of tiles: one table per instruction set.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_OPS_H_
#define FLEXPREFILL_SRC_SELECT_SELECT_OPS_H_

#include <cstddef>
#include <cstdint>

#include "flexprefill/types.h"

namespace flexprefill {

// A tile of scores: n keys by one panel of probe rows, s[key * panel + lane], as TileOps::scores
// leaves them. Lane l stands one token after lane l - 1.
struct ScoreTile {
  const float* s = nullptr;
  int panel = 0;
  int n = 0;
  float scale = 0;                 // softmax scale in units of log2
  const float* visible = nullptr;  // [panel]: lane l sees keys 0 .. visible[l] - 1; nullptr: all
};

struct SelectOps {
  static constexpr int kMaxLanes = 16;

  // Folds the tile into the running max [panel] and sum [panel] of each lane's exp2(scale * s -
  // max). They begin as TileOps::kNoMax and 0. A NaN, or a score of +inf, makes the sum NaN.
  void (*row_stats)(const ScoreTile& tile, float* max, float* sum);

  // With A = exp2(scale * s - max) * inverse for each lane, adds A(key, lane) to
  //   slash[lane - key]
  //   below[key], lanes < split, or above[key], the others: kMaxLanes partial sums for each key
  void (*masses)(const ScoreTile& tile, const float* max, const float* inverse, int split,
                 float* slash, float* below, float* above);

  // sums[key] = the kMaxLanes partial sums of each of n keys.
  void (*sum_lanes)(const float* partial, int n, float* sums);

  // The softmax of each lane in blocks of keys, in two steps. First, for every `per_block` keys of
  // the tile, sum[block * stride + lane] of exp2(scale * s - max) with the max[...] that it is
  // relative to: reference[lane], which begins as TileOps::kNoMax and is raised where a sum would
  // become too great. The tile's last key counts `last_weight` times.
  void (*block_stats)(const ScoreTile& tile, int per_block, float last_weight, int64_t stride,
                      float* reference, float* max, float* sum);
  // Then from those of n blocks, [n, lanes], lanes <= kMaxShareLanes whole vectors: sum becomes
  // each block's share of its lane's softmax, times weight[lane]; total[lane] is the lane's sum
  // relative to its greatest max. Where that is not above 0 (or NaN) there is no softmax, and
  // shares are 0. most: nullptr, or [n], the largest share of each block.
  void (*block_shares)(const float* max, int64_t n, int lanes, const float* weight, float* sum,
                       float* total, float* most);
  static constexpr int kMaxShareLanes = 128;

  // sums[d] += n rows that lie `stride` bytes apart.
  void (*add_rows)(const std::byte* rows, int64_t stride, int64_t n, int d, DType dtype,
                   float* sums);

  // row[j] = exp2(scale * a . b_j) / (their sum), j < n; rows of b [n, d]. The last entry counts
  // `last_share` times. A NaN anywhere makes every entry NaN.
  void (*softmax_dots)(const float* a, const float* b, int64_t n, int d, float scale,
                       float last_share, float* row);
};

// The table that goes with tile_ops of the same target, which the caller has resolved.
const SelectOps& select_ops(CpuTarget target);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_OPS_H_

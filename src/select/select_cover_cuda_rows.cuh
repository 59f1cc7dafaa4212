// BlockCover's decisions of block_rules.h by one warp a row: bit-equal given equal scores.
//
// score(j): the row of the map, key blocks 0 .. i. The whole warp calls these functions together.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_COVER_CUDA_ROWS_CUH_
#define FLEXPREFILL_SRC_SELECT_SELECT_COVER_CUDA_ROWS_CUH_

#include "select/select_blocks_cuda_rows.cuh"

namespace flexprefill {

__device__ inline bool always_keeps(int64_t i, int64_t j) { return j == 0 || j == i || j == i - 1; }

// Writes the words of row i: keep(j), asked by all lanes for 32 blocks at a time in ascending
// order, at most `i` of them. Every lane gets how many are kept.
template <typename Keep>
__device__ inline int32_t write_cover_row(int64_t i, int64_t n, uint64_t* row, const Keep& keep) {
  const auto lane = static_cast<int64_t>(threadIdx.x % 32);
  int32_t count = 0;
  for (int64_t w = 0; w < (n + 63) / 64; ++w) {
    uint64_t word = 0;
    for (int half = 0; half < 2; ++half) {
      const int64_t j = 64 * w + 32 * half + lane;
      const bool kept = keep(j, j <= i) && j <= i;
      const uint32_t bits = __ballot_sync(kWholeWarp, kept ? 1 : 0);
      count += __popc(bits);
      word |= static_cast<uint64_t>(bits) << (32 * half);
    }
    if (lane == 0) row[w] = word;
  }
  __syncwarp();
  return count;
}

// limit_row, for a row that has too many blocks.
template <typename Score>
__device__ inline void limit_row_warp(const Score& score, int64_t i, int64_t n, int64_t most,
                                      const uint64_t* columns, const float* most_asked,
                                      uint64_t* row) {
  const auto lane = static_cast<int64_t>(threadIdx.x % 32);
  const auto is_column = [&](int64_t j) {
    return columns != nullptr && has_bit(columns, j) && !always_keeps(i, j);
  };
  uint32_t own = 0;
  for (int64_t j = lane; j <= i; j += 32) own += is_column(j) ? 1 : 0;
  const int64_t asked = __reduce_add_sync(kWholeWarp, own);
  const int64_t left = most - (i > 1 ? kCoverLeastBlocks : i + 1);
  const bool columns_alone = asked > left;
  // Which blocks compete for the places that are left, and by what.
  const auto competes = [&](int64_t j) {
    return columns_alone ? is_column(j) : has_bit(row, j) && !is_column(j) && !always_keeps(i, j);
  };
  const auto value = [&](int64_t j) { return columns_alone ? most_asked[j] : score(j); };
  TakenWarp taken{};
  taken.taken =
      take_largest_warp([&](int64_t j) { return competes(j) ? value(j) : -1.0f; }, i + 1,
                        Weight::kCount, static_cast<uint64_t>(columns_alone ? left : left - asked));
  write_cover_row(i, n, row, [&](int64_t j, bool there) {
    const bool eligible = there && competes(j);
    const bool takes = taken.takes(eligible ? value(j) : -1.0f, eligible);
    return takes || (there && (always_keeps(i, j) || (!columns_alone && is_column(j))));
  });
}

// keep_cover. columns: nullptr where the row takes none.
template <typename Score>
__device__ inline RowMass keep_cover_warp(const Score& score, int64_t i, int64_t n,
                                          const BlockCoverRule& rule, const uint64_t* columns,
                                          const float* most_asked, uint64_t* row) {
  const auto lane = static_cast<int64_t>(threadIdx.x % 32);
  RowMass mass;
  for (int64_t j = lane; j <= i; j += 32) mass.total += fixed_mass_of(score(j));
  mass.total = sum_warp_u64(mass.total);
  mass.wanted = mass_to_reach(rule.gamma, mass.total);
  uint64_t have = fixed_mass_of(score(0));
  if (i > 0) have += fixed_mass_of(score(i));
  if (i > 1) have += fixed_mass_of(score(i - 1));
  const bool more = i > 2 && have < mass.wanted;
  TakenWarp taken{};
  if (more) {
    taken.taken = take_largest_warp([&](int64_t e) { return score(e + 1); }, i - 2, Weight::kMass,
                                    mass.wanted - have - 1);
    ++taken.taken.ties;
  }
  const int32_t count = write_cover_row(i, n, row, [&](int64_t j, bool there) {
    const bool eligible = there && !always_keeps(i, j);
    const bool takes = more && taken.takes(eligible ? score(j) : -1.0f, eligible);
    return takes || (there && (always_keeps(i, j) || (columns != nullptr && has_bit(columns, j))));
  });
  if (count > rule.most_blocks) {
    limit_row_warp(score, i, n, rule.most_blocks, columns, most_asked, row);
  }
  for (int64_t j = lane; j <= i; j += 32) {
    if (has_bit(row, j)) mass.kept += fixed_mass_of(score(j));
  }
  mass.kept = sum_warp_u64(mass.kept);
  return mass;
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_COVER_CUDA_ROWS_CUH_

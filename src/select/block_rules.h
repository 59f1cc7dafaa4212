// The decisions of the patterns that score each block of a row by itself: XAttention, FlashPrefill,
// BlockCover and the block-sparse heads of MInference. Like pattern.h: plain code over pointers,
// for the host and for a device, shared by all backends.
//
// scores [i + 1]: key blocks 0 .. i of query block i (absolute numbers), >= 0 without NaN.
// row [ceil(n / 64)]: the row's bits, which are overwritten. n: key blocks of the sequence.
#ifndef FLEXPREFILL_SRC_SELECT_BLOCK_RULES_H_
#define FLEXPREFILL_SRC_SELECT_BLOCK_RULES_H_

#include <cmath>
#include <cstdint>
#include <variant>

#include "select/pattern.h"

namespace flexprefill {

FLEXPREFILL_HOST_DEVICE inline void clear_row(int64_t n, uint64_t* row) {
  for (int64_t w = 0; w < (n + 63) / 64; ++w) row[w] = 0;
}

// What the blocks of a row must reach together, of a row that weighs `total`; units of fixed_mass.
FLEXPREFILL_HOST_DEVICE inline uint64_t mass_to_reach(float threshold, uint64_t total) {
  return static_cast<uint64_t>(
      std::ceil(static_cast<double>(threshold) * static_cast<double>(total)));
}

FLEXPREFILL_HOST_DEVICE inline uint64_t sum_of_masses(const float* scores, int64_t size) {
  uint64_t sum = 0;
  for (int64_t j = 0; j < size; ++j) sum += fixed_mass(scores[j]);
  return sum;
}

// Adds to the row's bits, where blocks that weigh `have` are kept already, the largest of blocks
// begin .. end - 1 until all together reach `wanted`; ties to the lower index. What they weigh
// then.
FLEXPREFILL_HOST_DEVICE inline uint64_t add_reaching(const float* scores, int64_t begin,
                                                     int64_t end, uint64_t have, uint64_t wanted,
                                                     Histogram* histogram, uint64_t* row) {
  if (have >= wanted) return have;
  // Those whose running sum stays below what is left to reach, and the one that reaches it: the
  // next of the value at which the walk stopped.
  Taken taken =
      take_largest(scores + begin, end - begin, Weight::kMass, wanted - have - 1, histogram);
  ++taken.ties;
  // No branch: half of the blocks may be taken, in any order.
  for (int64_t j = begin; j < end; ++j) {
    row[j / 64] |= static_cast<uint64_t>(taken.takes(scores[j])) << (j % 64);
  }
  return have + taken.weight + fixed_mass(std::bit_cast<float>(taken.threshold));
}

// XAttention: blocks 0 and i, then the largest until their sum reaches `threshold` of the row's;
// ties to the lower index. Scores sum to about 1.
FLEXPREFILL_HOST_DEVICE inline void keep_reaching(const float* scores, int64_t i, int64_t n,
                                                  float threshold, Histogram* histogram,
                                                  uint64_t* row) {
  if (threshold >= 1.0f) return write_dense_row(n, i, row);
  clear_row(n, row);
  set_bit(row, 0);
  set_bit(row, i);
  const uint64_t wanted = mass_to_reach(threshold, sum_of_masses(scores, i + 1));
  const uint64_t have = fixed_mass(scores[0]) + (i > 0 ? fixed_mass(scores[i]) : 0);
  add_reaching(scores, 1, i, have, wanted, histogram, row);
}

// FlashPrefill's options in blocks of one sequence.
struct FlashPrefillRule {
  float alpha = 0;
  int64_t global_blocks = 0;
  int64_t local_blocks = 1;
  int64_t first_full = 0;  // query blocks from here on keep everything

  // Whether query block i keeps block j whatever it scores.
  FLEXPREFILL_HOST_DEVICE bool always_keeps(int64_t i, int64_t j) const {
    return j < global_blocks || i - j < local_blocks;
  }
};

FLEXPREFILL_HOST_DEVICE inline FlashPrefillRule flash_prefill_rule(const FlashPrefill& pattern,
                                                                   int64_t s_kv,
                                                                   int64_t block_size) {
  const int64_t before = s_kv > pattern.last_queries ? s_kv - pattern.last_queries : 0;
  return {.alpha = pattern.alpha,
          .global_blocks = whole_blocks(pattern.global_window, block_size),
          .local_blocks = whole_blocks(pattern.local_window, block_size),
          .first_full = pattern.last_queries > 0 ? before / block_size : s_kv};
}

// FlashPrefill: the scores of at least alpha times the greatest, and what the rule always keeps.
FLEXPREFILL_HOST_DEVICE inline void keep_above(const float* scores, int64_t i, int64_t n,
                                               const FlashPrefillRule& rule, uint64_t* row) {
  if (i >= rule.first_full) return write_dense_row(n, i, row);
  clear_row(n, row);
  float greatest = 0;
  for (int64_t j = 0; j <= i; ++j) greatest = scores[j] > greatest ? scores[j] : greatest;
  const float least = rule.alpha * greatest;
  for (int64_t j = 0; j <= i; ++j) {
    if (scores[j] >= least || rule.always_keeps(i, j)) set_bit(row, j);
  }
}

// Block-sparse: block i and the `count` - 1 best before it; ties to the lower index.
FLEXPREFILL_HOST_DEVICE inline void keep_best(const float* scores, int64_t i, int64_t n,
                                              int64_t count, Histogram* histogram, uint64_t* row) {
  if (count > i) return write_dense_row(n, i, row);
  clear_row(n, row);
  set_bit(row, i);
  if (count <= 1) return;
  Taken taken =
      take_largest(scores, i, Weight::kCount, static_cast<uint64_t>(count - 1), histogram);
  for (int64_t j = 0; j < i; ++j) {
    if (taken.takes(scores[j])) set_bit(row, j);
  }
}

// ---- BlockCover -------------------------------------------------------------------------------

// What are no options: figures in docs/block_cover.md.
constexpr int64_t kCoverPool = 32;         // tokens of a mean, of queries and of keys, at most
constexpr int64_t kCoverNear = 128;        // tokens before a query block that are always kept
constexpr int64_t kCoverAskingRows = 128;  // whose attention is known exactly
constexpr int64_t kCoverAskingSpan = 512;  // the last rows, among which those are

// Tokens of a mean of a sequence: finer where blocks are, as long as the map stays cheaper than
// the asking rows.
FLEXPREFILL_HOST_DEVICE inline int64_t cover_pool(int64_t block_size, int64_t s_kv) {
  return block_size <= 64 && s_kv <= 16384 ? 16 : kCoverPool;
}

// The rows of a call that ask for columns: the last one, and others before it at even distances.
struct AskingRows {
  int64_t s_q = 0;
  int32_t span = 0;
  int32_t count = 0;

  FLEXPREFILL_HOST_DEVICE explicit AskingRows(int64_t rows)
      : s_q(rows),
        span(static_cast<int32_t>(rows < kCoverAskingSpan ? rows : kCoverAskingSpan)),
        count(span < kCoverAskingRows ? span : static_cast<int32_t>(kCoverAskingRows)) {}
  // The k-th of them, counted from the call's first row; ascending.
  FLEXPREFILL_HOST_DEVICE int64_t row(int64_t k) const {
    return s_q - 1 - (count - 1 - static_cast<int32_t>(k)) * span / count;
  }
};

// BlockCover's options for blocks.
struct BlockCoverRule {
  float gamma = 0;
  float column_share = 0;
  int32_t near = 1;         // blocks before i that row i always keeps
  int64_t most_blocks = 0;  // of a row
};

FLEXPREFILL_HOST_DEVICE inline BlockCoverRule block_cover_rule(const BlockCover& pattern,
                                                               int64_t block_size) {
  const auto near = static_cast<int32_t>(kCoverNear / block_size);
  int64_t most = std::numeric_limits<int64_t>::max();
  if (pattern.max_budget) {
    most = clamp_blocks(whole_blocks(*pattern.max_budget, block_size), near + 2, most);
  }
  return {pattern.gamma, pattern.column_share, near, most};
}

// Word w of what row i always keeps: blocks 0 and i - near to i.
FLEXPREFILL_HOST_DEVICE inline uint64_t always_word(int64_t i, int32_t near, int64_t w) {
  return range_word(0, 1, w) | range_word(i > near ? i - near : 0, i + 1, w);
}

// The columns: the fewest blocks that hold `share` of all; ties to the lower index.
//   most_asked  [n], the largest mass that an asking row has in each key block, in [0, 1]
FLEXPREFILL_HOST_DEVICE inline void choose_columns(const float* most_asked, int64_t n, float share,
                                                   Histogram* histogram, uint64_t* columns) {
  if (share >= 1.0f) return write_dense_row(n, n - 1, columns);
  clear_row(n, columns);
  const uint64_t wanted = mass_to_reach(share, sum_of_masses(most_asked, n));
  add_reaching(most_asked, 0, n, 0, wanted, histogram, columns);
}

// What a row of a map holds and what of it is kept, in units of fixed_mass.
struct RowMass {
  uint64_t total = 0;
  uint64_t wanted = 0;  // gamma of it
  uint64_t kept = 0;

  FLEXPREFILL_HOST_DEVICE float share() const {
    return static_cast<float>(static_cast<double>(kept) / static_cast<double>(total));
  }
};

// Of the blocks that are set in `from` and not in `kept`, adds the `count` with the largest scores
// to `kept`; ties to the lower index. scratch [n].
FLEXPREFILL_HOST_DEVICE inline void add_best_of(const float* scores, int64_t n,
                                                const uint64_t* from, int64_t count,
                                                Histogram* histogram, float* scratch,
                                                uint64_t* kept) {
  int64_t size = 0;
  for (int64_t j = 0; j < n; ++j) {
    if (has_bit(from, j) && !has_bit(kept, j)) scratch[size++] = scores[j];
  }
  Taken taken =
      take_largest(scratch, size, Weight::kCount, static_cast<uint64_t>(count), histogram);
  size = 0;
  for (int64_t j = 0; j < n; ++j) {
    if (has_bit(from, j) && !has_bit(kept, j) && taken.takes(scratch[size++])) set_bit(kept, j);
  }
}

FLEXPREFILL_HOST_DEVICE inline int64_t count_bits(const uint64_t* bits, int64_t n) {
  int64_t count = 0;
  for (int64_t w = 0; w < (n + 63) / 64; ++w) count += std::popcount(bits[w]);
  return count;
}

// Takes a row down to the rule's most blocks, which are at least those that it always keeps: these,
// then columns, those first that are asked for most, then the blocks with the largest scores; ties
// to the lower index.
//   columns, most_asked  of the row's head, or nullptr where the row takes none
//   scratch [n], words [2 * ceil(n / 64)]
FLEXPREFILL_HOST_DEVICE inline void limit_row(const float* scores, int64_t i, int64_t n,
                                              const BlockCoverRule& rule, const uint64_t* columns,
                                              const float* most_asked, Histogram* histogram,
                                              float* scratch, uint64_t* words, uint64_t* row) {
  if (count_bits(row, n) <= rule.most_blocks) return;
  const int64_t size = (n + 63) / 64;
  uint64_t* kept = words;
  uint64_t* asked = words + size;
  for (int64_t w = 0; w < size; ++w) {
    kept[w] = always_word(i, rule.near, w);
    asked[w] = columns != nullptr ? (row[w] & columns[w]) | kept[w] : kept[w];
  }
  int64_t left = rule.most_blocks - count_bits(kept, n);
  const int64_t columns_left = count_bits(asked, n) - count_bits(kept, n);
  if (columns_left > left) {
    add_best_of(most_asked, i + 1, asked, left, histogram, scratch, kept);
  } else {
    for (int64_t w = 0; w < size; ++w) kept[w] = asked[w];
    add_best_of(scores, i + 1, row, left - columns_left, histogram, scratch, kept);
  }
  for (int64_t w = 0; w < size; ++w) row[w] = kept[w];
}

// Row i of a head: blocks 0 and i - near to i, then the largest until their sum reaches gamma of
// the row's, ties to the lower index; the columns before i, if given; no more blocks than the rule
// says.
//   scores [i + 1]  the row of the map, sums to about 1
// For the other arguments see limit_row, which alone uses most_asked, scratch and words.
FLEXPREFILL_HOST_DEVICE inline RowMass keep_cover(const float* scores, int64_t i, int64_t n,
                                                  const BlockCoverRule& rule,
                                                  const uint64_t* columns, const float* most_asked,
                                                  Histogram* histogram, float* scratch,
                                                  uint64_t* words, uint64_t* row) {
  for (int64_t w = 0; w < (n + 63) / 64; ++w) row[w] = always_word(i, rule.near, w);
  RowMass mass;
  mass.total = sum_of_masses(scores, i + 1);
  mass.wanted = mass_to_reach(rule.gamma, mass.total);
  const int64_t far = i - rule.near;  // from here on all are kept
  uint64_t have = fixed_mass(scores[0]);
  for (int64_t j = far > 1 ? far : 1; j <= i; ++j) have += fixed_mass(scores[j]);
  mass.kept = have;
  if (far > 1) mass.kept = add_reaching(scores, 1, far, have, mass.wanted, histogram, row);
  if (columns == nullptr && i < rule.most_blocks) return mass;
  for (int64_t w = 0; columns != nullptr && w < (n + 63) / 64; ++w) {
    row[w] |= columns[w] & range_word(0, i + 1, w);
  }
  limit_row(scores, i, n, rule, columns, most_asked, histogram, scratch, words, row);
  mass.kept = 0;
  for (int64_t j = 0; j <= i; ++j) {
    mass.kept += has_bit(row, j) ? fixed_mass(scores[j]) : 0;
  }
  return mass;
}

// ---- Which rule a head follows ---------------------------------------------------------------

// Whether the head's rows come from block scores.
inline bool by_block_scores(const Pattern& pattern, int32_t head) {
  if (const auto* heads = std::get_if<MInference>(&pattern)) {
    return heads->heads[head].kind == MInferenceHead::Kind::kBlockSparse;
  }
  return std::holds_alternative<XAttention>(pattern) ||
         std::holds_alternative<FlashPrefill>(pattern);
}

// Whether the head is chosen by the probe's scores.
inline bool by_probe(const Pattern& pattern, int32_t head) {
  if (const auto* heads = std::get_if<MInference>(&pattern)) {
    return heads->heads[head].kind == MInferenceHead::Kind::kVerticalSlash;
  }
  return std::holds_alternative<FlexPrefill>(pattern) ||
         std::holds_alternative<VerticalSlash>(pattern);
}

// Sizes of a head that by_probe has them fixed.
inline VerticalSlash fixed_sizes(const Pattern& pattern, int32_t head) {
  if (const auto* heads = std::get_if<MInference>(&pattern)) {
    return {heads->heads[head].vertical_size, heads->heads[head].slash_size};
  }
  return std::get<VerticalSlash>(pattern);
}

inline StreamingLlm a_shape_window(const MInferenceHead& head) {
  return {head.vertical_size, head.slash_size};
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_BLOCK_RULES_H_

// The decisions of the patterns that score each block of a row by itself: XAttention, FlashPrefill
// and the block-sparse heads of MInference. Like pattern.h: plain code over pointers, for the host
// and for a device, shared by all backends.
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

// XAttention: blocks 0 and i, then the largest until their sum reaches `threshold` of the row's;
// ties to the lower index. Scores sum to about 1.
FLEXPREFILL_HOST_DEVICE inline void keep_reaching(const float* scores, int64_t i, int64_t n,
                                                  float threshold, Histogram* histogram,
                                                  uint64_t* row) {
  if (threshold >= 1.0f) return write_dense_row(n, i, row);
  clear_row(n, row);
  set_bit(row, 0);
  set_bit(row, i);
  uint64_t total = 0;
  for (int64_t j = 0; j <= i; ++j) total += fixed_mass(scores[j]);
  const uint64_t wanted = mass_to_reach(threshold, total);
  const uint64_t have = fixed_mass(scores[0]) + (i > 0 ? fixed_mass(scores[i]) : 0);
  if (have >= wanted) return;
  // Those whose running sum stays below what is left to reach, and the one that reaches it: the
  // next of the value at which the walk stopped.
  Taken taken = take_largest(scores + 1, i - 1, Weight::kMass, wanted - have - 1, histogram);
  ++taken.ties;
  for (int64_t j = 1; j < i; ++j) {
    if (taken.takes(scores[j])) set_bit(row, j);
  }
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

// The device's decisions on scores that a test makes up (select_choice_kernels.cu).
#ifndef FLEXPREFILL_TESTS_SELECT_CHOICE_H_
#define FLEXPREFILL_TESTS_SELECT_CHOICE_H_

#include <cstdint>
#include <vector>

#include "flexprefill/select.h"
#include "select/block_rules.h"
#include "select/pattern.h"

namespace flexprefill::testing {

// One head of one sequence, d_qk 16.
struct ChoiceInput {
  SequenceLengths lengths;
  int32_t block_size = 64;
  FlexPrefill pattern;
  std::vector<float> vertical, slash;  // [s_kv]
  std::vector<float> pooled;           // [n_kv]: logits in units of log2
  std::vector<float> q;                // [n_q, 16]: that of every row of a query block
  std::vector<float> k_means;          // [n_kv, 16]
  int64_t small_map = 256;             // key blocks of a map that one CTA decides
};

struct ChoiceResult {
  HeadChoice choice;
  std::vector<float> vertical_block, slash_block, pooled;  // [n_kv]
  std::vector<uint64_t> vertical_bits, slash_bits;         // [words]
  // Query-aware heads.
  std::vector<float> map;      // pattern.h has its layout
  std::vector<uint64_t> kept;  // [n_q, words]: what the map keeps
};

// Whether a device can run it.
bool has_device();
ChoiceResult choose_on_device(const ChoiceInput& input);

// take_largest of pattern.h by a CTA, and the entries that are taken as bits [words], in
// their order and from the last to the first.
struct TakenOnDevice {
  Taken taken;
  std::vector<uint64_t> bits, reversed;
};
TakenOnDevice take_on_device(const std::vector<float>& x, Weight weight, uint64_t limit);

// The rules of block_rules.h by a warp. scores [i + 1]; the row's words, of n blocks.
enum class RowRule { kReaching, kAbove, kBest, kBestEntries, kCover };
struct RowInput {
  RowRule rule = RowRule::kReaching;
  std::vector<float> scores;
  int64_t n = 0;
  float threshold = 0;     // kReaching
  FlashPrefillRule above;  // kAbove
  int64_t count = 0;       // kBest, kBestEntries
  BlockCoverRule cover;    // kCover, and the columns [words], empty: none, with their masses [n]
  std::vector<uint64_t> columns;
  std::vector<float> most_asked;
};
// mass: nullptr, or what kCover keeps of its row.
std::vector<uint64_t> keep_row_on_device(const RowInput& input, RowMass* mass = nullptr);

}  // namespace flexprefill::testing

#endif  // FLEXPREFILL_TESTS_SELECT_CHOICE_H_

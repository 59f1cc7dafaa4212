// Never slower than dense: when prefill takes the exact dense path although its pattern is sparse.
// The only place with such figures. Only what the host knows decides: shapes, not what a head
// keeps.
#ifndef FLEXPREFILL_SRC_ATTEND_DENSE_RULE_H_
#define FLEXPREFILL_SRC_ATTEND_DENSE_RULE_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <variant>

#include "problem.h"
#include "select/select_rows.h"

namespace flexprefill {

// Sequences with fewer queries or fewer keys do not gain from selecting, by measurement.
struct DenseRule {
  Backend backend;
  int64_t least_s_q;
  int64_t least_s_kv;
};

// 0: nothing measured that would say so; what select itself leaves dense (stays_dense) counts.
inline constexpr std::array kDenseRules{
    DenseRule{Backend::kReference, 0, 0},
    DenseRule{Backend::kCpu, 0, 0},
    DenseRule{Backend::kSm80, 0, 0},
    DenseRule{Backend::kSm90, 0, 0},
};

// Of a backend that computes: kAuto is kCpu, kCuda what the card has.
inline const DenseRule& dense_rule(Backend backend) {
  const auto rule = std::find_if(kDenseRules.begin(), kDenseRules.end(),
                                 [&](const DenseRule& r) { return r.backend == backend; });
  return rule == kDenseRules.end() ? kDenseRules[1] : *rule;
}

// Whether the whole call is dense: then neither the index nor a figure of a head is computed. A
// window is the caller's wish and not an estimate, so StreamingLlm stays what it is.
inline bool prefill_is_dense(const DenseRule& rule, const Problem& problem,
                             const Pattern& pattern) {
  if (std::holds_alternative<Dense>(pattern)) return true;
  if (std::holds_alternative<StreamingLlm>(pattern)) return false;
  return std::all_of(problem.lengths.begin(), problem.lengths.end(), [&](SequenceLengths lengths) {
    return lengths.s_q < rule.least_s_q || lengths.s_kv < rule.least_s_kv ||
           stays_dense(lengths, problem.block_size, pattern);
  });
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_ATTEND_DENSE_RULE_H_

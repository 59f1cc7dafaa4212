// Never slower than dense: when prefill takes the exact dense path although its pattern is sparse.
// The only place with such figures. Only what the host knows decides: shapes, pattern and card, not
// what a head keeps.
#ifndef FLEXPREFILL_SRC_ATTEND_DENSE_RULE_H_
#define FLEXPREFILL_SRC_ATTEND_DENSE_RULE_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <variant>

#include "problem.h"
#include "select/select_rows.h"

namespace flexprefill {

// What a backend was measured to take. bench/fit_dense_rule.py finds these numbers from
// `bench/gpu_bench.py --sections rule`, with FlexPrefill; they weigh the other patterns too.
struct DenseRule {
  Backend backend;
  double select_us;       // of a call, whatever its size
  double select_tile_us;  // one multiprocessor: a query head's probe by 128 keys, d 128
  double attend_tile_us;  // one multiprocessor: 128 queries by 128 keys, d 128
};

// 0: nothing measured that would say so; what select itself leaves dense (stays_dense) counts. On
// the CPU select takes at most 8 % of dense mode's time from 4k tokens on (README.md), and below
// that the budget decides.
// sm90: H200, 2026-11-26, commit 2ebaa3e (bench/results/dense_rule.json). sm80: H200, 2026-11-24,
// commit 74df23b, before any tuning.
inline constexpr std::array kDenseRules{
    DenseRule{Backend::kReference, 0, 0, 0},
    DenseRule{Backend::kCpu, 0, 0, 0},
    DenseRule{Backend::kSm80, 190, 8.4, 3.9},
    DenseRule{Backend::kSm90, 50, 4.6, 1.7},
};

// Of what a pattern can leave out at most, what is reckoned to be left out. Heads that look at
// everything keep everything, and that is known only when select has run. On the measured table,
// with any share from .6 to .9, structured inputs lose less than 1 % on average to the better of
// the two, and random ones, of which nearly every block is kept, 5 to 8 %; at 1 these lose 13 %, at
// .5 structured ones 2 %, one of them 46 %.
inline constexpr double kSavedShare = 0.7;

// Of a backend that computes: kAuto is kCpu, kCuda what the card has.
inline const DenseRule& dense_rule(Backend backend) {
  const auto rule = std::find_if(kDenseRules.begin(), kDenseRules.end(),
                                 [&](const DenseRule& r) { return r.backend == backend; });
  return rule == kDenseRules.end() ? kDenseRules[1] : *rule;
}

// The fewest key blocks that a pattern may keep in a row that has as many: its budget, however
// well the input suits it.
inline int64_t least_blocks(const Pattern& pattern, int64_t block_size) {
  return std::visit(
      [&](const auto& p) -> int64_t {
        using P = std::decay_t<decltype(p)>;
        if constexpr (std::is_same_v<P, FlexPrefill>) {
          // As many columns as diagonals; one block is both.
          return std::max<int64_t>(2 * whole_blocks(p.min_budget, block_size) - 1, 1);
        } else if constexpr (std::is_same_v<P, VerticalSlash>) {
          return std::max<int64_t>(whole_blocks(p.vertical_size, block_size) +
                                       whole_blocks(p.slash_size, block_size) - 1,
                                   1);
        } else {
          return 1;
        }
      },
      pattern);
}

// Estimated microseconds of what selecting costs and of what it can save at most.
struct DenseEstimate {
  double cost = 0;
  double saving = 0;
};

inline DenseEstimate estimate(const DenseRule& rule, const Problem& problem, const Pattern& pattern,
                              int64_t multiprocessors) {
  // 128 x 128 scores, of head dims as the measured ones.
  const double tile = static_cast<double>(problem.block_size) / 128;
  const double select_tile = rule.select_tile_us * tile * problem.d_qk / 128;
  const double attend_tile = rule.attend_tile_us * tile * tile * (problem.d_qk + problem.d_v) / 256;
  const int64_t least = least_blocks(pattern, problem.block_size);
  double probe = 0, saved = 0, longest = 0;  // tiles
  for (int64_t s = 0; s < problem.b(); ++s) {
    const BlockGrid& grid = problem.grids[s];
    if (stays_dense(problem.lengths[s], problem.block_size, pattern)) continue;
    probe += static_cast<double>(problem.h_q) * static_cast<double>(grid.n_kv);
    for (int64_t i = grid.first_q_block; i < grid.first_q_block + grid.n_q; ++i) {
      const auto row = static_cast<double>(std::max<int64_t>(i + 1 - least, 0));
      saved += row * problem.h_q;
      longest = std::max(longest, row);
    }
  }
  // Few rows leave multiprocessors idle: the longest row is then what is waited for.
  const auto all = static_cast<double>(multiprocessors);
  return {.cost = rule.select_us + probe / all * select_tile,
          .saving = std::max(saved / all, longest) * attend_tile};
}

// Whether the whole call is dense: then neither the index nor a figure of a head is computed. A
// window is the caller's wish and not an estimate, so StreamingLlm stays what it is.
inline bool prefill_is_dense(const DenseRule& rule, const Problem& problem, const Pattern& pattern,
                             int64_t multiprocessors = 1) {
  if (std::holds_alternative<Dense>(pattern)) return true;
  if (std::holds_alternative<StreamingLlm>(pattern)) return false;
  if (std::all_of(problem.lengths.begin(), problem.lengths.end(), [&](SequenceLengths lengths) {
        return stays_dense(lengths, problem.block_size, pattern);
      })) {
    return true;
  }
  if (rule.attend_tile_us == 0) return false;
  const DenseEstimate found = estimate(rule, problem, pattern, multiprocessors);
  return found.cost >= kSavedShare * found.saving;
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_ATTEND_DENSE_RULE_H_

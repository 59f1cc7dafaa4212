// Every check of a pattern, on the host, before any work.
#include <string>
#include <variant>

#include "problem.h"

namespace flexprefill {
namespace {

[[noreturn]] void refuse(const std::string& message) {
  throw Error(ErrorCode::kInvalidArgument, message);
}

void check_unit(float value, const std::string& name, bool zero_allowed) {
  const bool in_range = zero_allowed ? value >= 0 && value <= 1 : value > 0 && value <= 1;
  if (!in_range) {  // also a NaN
    refuse(name + ": expected a number in " + (zero_allowed ? "[0" : "(0") + ", 1], got " +
           std::to_string(value));
  }
}

void check_at_least(int64_t value, int64_t least, const std::string& name) {
  if (value < least) {
    refuse(name + ": expected at least " + std::to_string(least) + " tokens, got " +
           std::to_string(value));
  }
}

struct PatternCheck {
  void operator()(const Dense&) const {}
  void operator()(const FlexPrefill& p) const {
    check_unit(p.gamma, "gamma", false);
    check_unit(p.tau, "tau", true);
    check_at_least(p.min_budget, 0, "min_budget");
    if (p.max_budget) {
      check_at_least(*p.max_budget, 0, "max_budget");
      if (*p.max_budget < p.min_budget) {
        refuse("max_budget: expected at least min_budget = " + std::to_string(p.min_budget) +
               ", got " + std::to_string(*p.max_budget));
      }
    }
  }
  void operator()(const VerticalSlash& p) const {
    check_at_least(p.vertical_size, 0, "vertical_size");
    check_at_least(p.slash_size, 0, "slash_size");
  }
  void operator()(const StreamingLlm& p) const {
    check_at_least(p.global_window, 0, "global_window");
    check_at_least(p.local_window, 1, "local_window");
  }
  void operator()(const XAttention& p) const {
    if (p.stride != 8 && p.stride != 16) {
      refuse("stride: expected 8 or 16 tokens, got " + std::to_string(p.stride));
    }
    check_unit(p.threshold, "threshold", false);
  }
  void operator()(const FlashPrefill& p) const {
    check_unit(p.alpha, "alpha", true);
    check_at_least(p.global_window, 0, "global_window");
    check_at_least(p.local_window, 1, "local_window");
    check_at_least(p.last_queries, 0, "last_queries");
  }
  void operator()(const MInference& p) const {
    for (size_t h = 0; h < p.heads.size(); ++h) {
      const MInferenceHead& head = p.heads[h];
      const std::string name = "heads[" + std::to_string(h) + "].";
      const auto kind = static_cast<int32_t>(head.kind);
      if (kind < 0 || kind > static_cast<int32_t>(MInferenceHead::Kind::kBlockSparse)) {
        refuse(name + "kind: expected 0, 1 or 2, got " + std::to_string(kind));
      }
      check_at_least(head.vertical_size, 0, name + "vertical_size");
      check_at_least(head.slash_size, head.kind == MInferenceHead::Kind::kAShape ? 1 : 0,
                     name + "slash_size");
    }
  }
  void operator()(const BlockCover& p) const {
    check_unit(p.gamma, "gamma", false);
    check_unit(p.column_share, "column_share", true);
    if (p.max_budget) check_at_least(*p.max_budget, 0, "max_budget");
  }
};

}  // namespace

void validate_pattern(const Pattern& pattern) { std::visit(PatternCheck{}, pattern); }

void validate_pattern_heads(const Problem& problem, const Pattern& pattern) {
  const auto* heads = std::get_if<MInference>(&pattern);
  if (heads != nullptr && static_cast<int64_t>(heads->heads.size()) != problem.h_q) {
    refuse("heads: expected one for each of h_q = " + std::to_string(problem.h_q) +
           " query heads, got " + std::to_string(heads->heads.size()));
  }
}

}  // namespace flexprefill

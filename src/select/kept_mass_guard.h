// The floor of the kept mass: judges a selection by its figures, raises gamma, or gives it up for
// dense attention. The same decisions for every backend.
#ifndef FLEXPREFILL_SRC_SELECT_KEPT_MASS_GUARD_H_
#define FLEXPREFILL_SRC_SELECT_KEPT_MASS_GUARD_H_

#include <algorithm>
#include <optional>
#include <span>
#include <variant>

#include "flexprefill/flexprefill.h"

namespace flexprefill {

class KeptMassGuard {
 public:
  KeptMassGuard(const Pattern& pattern, std::optional<float> floor)
      : pattern_(pattern), floor_(floor) {}

  const Pattern& pattern() const { return pattern_; }
  bool active() const { return floor_.has_value(); }
  Guard done() const { return done_; }
  float raised_gamma() { return done_ == Guard::kRaisedGamma ? *gamma() : 0; }

  // Calls select(pattern), which writes `heads`, until every head keeps the floor; false if none of
  // the patterns tried does: `heads` then says dense.
  template <typename Select>
  bool select(std::span<HeadAudit> heads, Select&& select) {
    for (int raises = 0;; ++raises) {
      select(pattern_);
      if (!floor_ || keeps(heads)) return true;
      if (gamma() == nullptr || *gamma() >= 1 || raises == kMostRaises) break;
      *gamma() = (1 + *gamma()) / 2;
      done_ = Guard::kRaisedGamma;
    }
    done_ = Guard::kDense;
    std::fill(heads.begin(), heads.end(), HeadAudit{});
    return false;
  }

 private:
  static constexpr int kMostRaises = 3;
  // Sums of rounded masses: what keeps everything must pass a floor of 1. A NaN does not.
  static constexpr float kRounding = 1e-5f;

  bool keeps(std::span<const HeadAudit> heads) const {
    return std::all_of(heads.begin(), heads.end(), [&](const HeadAudit& head) {
      return head.kept_mass >= *floor_ - kRounding;
    });
  }
  // Of the patterns that have one which is a share of the mass.
  float* gamma() {
    if (auto* flex_prefill = std::get_if<FlexPrefill>(&pattern_)) return &flex_prefill->gamma;
    if (auto* cover = std::get_if<BlockCover>(&pattern_)) return &cover->gamma;
    return nullptr;
  }

  Pattern pattern_;
  std::optional<float> floor_;
  Guard done_ = Guard::kNone;
};

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_KEPT_MASS_GUARD_H_

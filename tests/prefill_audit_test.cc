// prefill with an audit: the floor of the kept mass and the comparison with dense attention, on
// every backend.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "case_table.h"
#include "staged_call.h"
#include "test_executions.h"

namespace flexprefill::testing {
namespace {

Case audited_case(const Execution& execution, Layout layout = Layout::kPaged) {
  return {.name = "audited",
          .lengths = {{200, 300}, {200, 300}},
          .h_q = 4,
          .h_kv = 2,
          .d_qk = 32,
          .d_v = 32,
          .dtype = widest_dtype(execution),
          .block_size = 32,
          .layout = layout,
          .seed = 7};
}

// Heads whose least kept mass lies between those of two selections say which of them was taken.
constexpr FlexPrefill kLow{.gamma = 0.5f, .tau = 0, .min_budget = 0};
constexpr BlockCover kLowCover{.gamma = 0.2f, .column_share = 0};

class PrefillAuditTest : public ::testing::TestWithParam<Execution> {
 protected:
  // The whole of a call in `data`, whose outputs are poisoned first.
  PrefillAudit run(CaseData& data, const Pattern& pattern, PrefillAudit audit = {}) const {
    data.poison();
    StagedCall call(data, GetParam());
    const size_t bytes = prefill_workspace_size(call.input, pattern, GetParam());
    prefill(call.input, pattern, GetParam(), call.workspace(bytes), call.out, call.lse, audit);
    call.finish();
    return audit;
  }
  float least_mass(CaseData& data, const Pattern& pattern) const {
    std::vector<HeadAudit> heads(8);
    run(data, pattern, {.heads = heads});
    return std::min_element(heads.begin(), heads.end(),
                            [](const auto& a, const auto& b) { return a.kept_mass < b.kept_mass; })
        ->kept_mass;
  }
  std::string message_of(CaseData& data, PrefillAudit audit, ErrorCode code) const {
    try {
      run(data, kLow, audit);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), code) << error.what();
      EXPECT_TRUE(std::isnan(data.out_at(0, 0, 0, 0)));  // nothing was written
      return error.what();
    }
    return "no error";
  }
};

void expect_same_outputs(const CaseData& a, const CaseData& b) {
  for (int64_t s = 0; s < 2; ++s) {
    for (int32_t h = 0; h < a.c.h_q; ++h) {
      for (int64_t i = 0; i < a.lengths[s].s_q; ++i) {
        ASSERT_EQ(a.lse_at(s, h, i), b.lse_at(s, h, i)) << "head " << h << " row " << i;
        for (int32_t c = 0; c < a.c.d_v; ++c) {
          ASSERT_EQ(a.out_at(s, i, h, c), b.out_at(s, i, h, c)) << "head " << h << " row " << i;
        }
      }
    }
  }
}

TEST_P(PrefillAuditTest, AFloorThatIsKeptChangesNothing) {
  CaseData plain(audited_case(GetParam())), guarded(plain.c);
  run(plain, kLow);
  std::vector<HeadAudit> heads(8);
  const PrefillAudit audit = run(guarded, kLow, {.heads = heads, .min_kept_mass = 0.01f});
  EXPECT_EQ(audit.guard, Guard::kNone);
  EXPECT_EQ(audit.gamma, 0);
  EXPECT_LT(heads[0].density, 1);
  expect_same_outputs(plain, guarded);
}

TEST_P(PrefillAuditTest, AFloorRaisesGammaHalfWayToOne) {
  CaseData wanted(audited_case(GetParam())), guarded(wanted.c);
  FlexPrefill raised = kLow;
  raised.gamma = 0.75f;
  BlockCover raised_cover = kLowCover;
  raised_cover.gamma = 0.6f;
  const std::vector<std::pair<Pattern, Pattern>> pairs{{kLow, raised}, {kLowCover, raised_cover}};
  for (const auto& [low, high] : pairs) {
    const float below = least_mass(wanted, low), above = least_mass(wanted, high);
    ASSERT_LT(below, above - 1e-3f);
    std::vector<HeadAudit> heads(8), wanted_heads(8);
    run(wanted, high, {.heads = wanted_heads});
    const PrefillAudit audit =
        run(guarded, low, {.heads = heads, .min_kept_mass = (below + above) / 2});
    EXPECT_EQ(audit.guard, Guard::kRaisedGamma);
    EXPECT_FLOAT_EQ(audit.gamma, std::holds_alternative<FlexPrefill>(low) ? 0.75f : 0.6f);
    for (size_t h = 0; h < heads.size(); ++h) {
      EXPECT_EQ(std::memcmp(&heads[h], &wanted_heads[h], sizeof(HeadAudit)), 0) << "head " << h;
    }
    expect_same_outputs(wanted, guarded);
    // The figures of the heads need not be asked for.
    EXPECT_EQ(run(guarded, low, {.min_kept_mass = (below + above) / 2}).gamma, audit.gamma);
    expect_same_outputs(wanted, guarded);
  }
}

TEST_P(PrefillAuditTest, AFloorThatNoGammaKeepsGivesDenseAttention) {
  CaseData dense(audited_case(GetParam())), guarded(dense.c);
  run(dense, Dense{});
  // Some have no gamma, one has no more of it to give, some a budget in the way.
  const std::vector<Pattern> patterns{
      FlexPrefill{.gamma = 0.5f, .tau = 0, .min_budget = 0, .max_budget = 32},
      VerticalSlash{32, 32},
      StreamingLlm{16, 40},
      FlashPrefill{.alpha = 0.9f, .global_window = 32, .local_window = 32, .last_queries = 0},
      FlexPrefill{.gamma = 1, .tau = 0, .min_budget = 0, .max_budget = 32},
      BlockCover{.gamma = 0.9f, .column_share = 0, .max_budget = 96}};
  for (const Pattern& pattern : patterns) {
    SCOPED_TRACE(pattern.index());
    std::vector<HeadAudit> heads(8);
    const PrefillAudit audit = run(guarded, pattern, {.heads = heads, .min_kept_mass = 1});
    EXPECT_EQ(audit.guard, Guard::kDense);
    EXPECT_EQ(audit.gamma, 0);
    for (const HeadAudit& head : heads) {
      EXPECT_EQ(head.pattern, HeadPattern::kDense);
      EXPECT_EQ(head.kept_mass, 1);
      EXPECT_EQ(head.density, 1);
    }
    expect_same_outputs(dense, guarded);
  }
}

TEST_P(PrefillAuditTest, WhatIsDenseKeepsEveryFloor) {
  CaseData data(audited_case(GetParam()));
  EXPECT_EQ(run(data, Dense{}, {.min_kept_mass = 1}).guard, Guard::kNone);
  // A budget as long as the sequence: nothing is selected.
  EXPECT_EQ(run(data, FlexPrefill{}, {.min_kept_mass = 1}).guard, Guard::kNone);
}

TEST_P(PrefillAuditTest, ABudgetThatMissesGammaIsReported) {
  CaseData data(audited_case(GetParam()));
  std::vector<HeadAudit> heads(8);
  run(data, BlockCover{.gamma = 0.9f}, {.heads = heads});
  for (const HeadAudit& head : heads) {
    EXPECT_GE(head.least_row_mass, 0.9f - 1e-3f);
    EXPECT_EQ(head.rows_below_gamma, 0);
  }
  run(data, BlockCover{.gamma = 0.9f, .max_budget = 96}, {.heads = heads});
  for (const HeadAudit& head : heads) {
    EXPECT_LT(head.least_row_mass, 0.9f);
    EXPECT_GT(head.rows_below_gamma, 0);
  }
}

TEST_P(PrefillAuditTest, TheComparisonIsThatOfTheStages) {
  if (is_cuda(GetParam().backend)) GTEST_SKIP() << "host memory only";
  CaseData data(audited_case(GetParam()));
  const std::vector<Pattern> patterns{kLow, StreamingLlm{16, 40}, Dense{}};
  for (const Pattern& pattern : patterns) {
    std::vector<DenseComparison> got(8), wanted(8);
    run(data, pattern, {.compared_rows = 20, .comparison = got});
    WorkspaceBuffer buffer;
    BlockIndex index;
    const size_t bytes = select_workspace_size(data.input, pattern, GetParam());
    select(data.input, pattern, GetParam(), buffer.reserve(bytes), index);
    compare_with_dense(data.input, index, data.out, 20, GetParam(), wanted);
    for (size_t h = 0; h < got.size(); ++h) {
      EXPECT_EQ(std::memcmp(&got[h], &wanted[h], sizeof(DenseComparison)), 0) << "head " << h;
      EXPECT_EQ(got[h].rows, 20);
      EXPECT_EQ(got[h].error < 1e-3f, std::holds_alternative<Dense>(pattern));
    }
  }
  // Of what the guard made of the call.
  std::vector<DenseComparison> figures(8);
  run(data, kLow, {.min_kept_mass = 1, .compared_rows = 20, .comparison = figures});
  for (const DenseComparison& figure : figures) {
    EXPECT_EQ(figure.kept_mass, 1);
    EXPECT_LT(figure.error, 1e-3f);
  }
}

TEST_P(PrefillAuditTest, BadAuditsAreRefused) {
  CaseData data(audited_case(GetParam()));
  std::vector<DenseComparison> figures(8);
  for (const float floor : {-0.1f, 1.5f, std::numeric_limits<float>::quiet_NaN()}) {
    EXPECT_NE(message_of(data, {.min_kept_mass = floor}, ErrorCode::kInvalidArgument)
                  .find("min_kept_mass: expected a number in [0, 1], got "),
              std::string::npos);
  }
  EXPECT_EQ(message_of(data, {.compared_rows = -1}, ErrorCode::kInvalidArgument),
            "compared_rows: expected at least 0, got -1");
  EXPECT_EQ(message_of(data, {.compared_rows = 5}, ErrorCode::kInvalidArgument),
            "comparison: expected 8 entries for 5 compared rows, got 0");
  EXPECT_EQ(message_of(data, {.comparison = figures}, ErrorCode::kInvalidArgument),
            "comparison: expected 0 entries for 0 compared rows, got 8");
  if (!is_cuda(GetParam().backend)) return;
  EXPECT_NE(message_of(data, {.compared_rows = 5, .comparison = figures}, ErrorCode::kUnsupported)
                .find("compared_rows: the comparison with dense attention runs on host memory"),
            std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(Executions, PrefillAuditTest, ::testing::ValuesIn(executions()),
                         [](const auto& param_info) { return execution_name(param_info.param); });

}  // namespace
}  // namespace flexprefill::testing

// When prefill is dense although its pattern is sparse.
#include <gtest/gtest.h>

#include <array>

#include "attend/dense_rule.h"
#include "case_table.h"

namespace flexprefill::testing {
namespace {

Problem problem_of(const CaseData& data) {
  return make_problem(data.input, Purpose::kAttendSize, Backend::kCpu);
}

TEST(DenseRuleOf, WithoutFiguresOnlyWhatSelectLeavesDense) {
  const CaseData data(Case{.name = "dense", .lengths = {{500, 700}, {500, 700}}});
  const Problem problem = problem_of(data);
  const DenseRule none{Backend::kSm90, 0, 0, 0};
  const Pattern flex = FlexPrefill{.min_budget = 64};
  EXPECT_FALSE(prefill_is_dense(none, problem, flex));
  EXPECT_TRUE(prefill_is_dense(none, problem, FlexPrefill{.min_budget = 700}));
  EXPECT_TRUE(prefill_is_dense(none, problem, Dense{}));
  EXPECT_FALSE(prefill_is_dense(none, problem, StreamingLlm{}));
  for (const Backend backend : {Backend::kReference, Backend::kCpu, Backend::kSm80, Backend::kSm90})
    EXPECT_EQ(dense_rule(backend).backend, backend);
  EXPECT_EQ(dense_rule(Backend::kAuto).backend, Backend::kCpu);
}

TEST(DenseRuleOf, CostAgainstWhatCanBeSaved) {
  // 8 key blocks, all of them queries; one head of 64.
  const CaseData data(
      Case{.name = "dense", .lengths = {{1024, 1024}}, .h_q = 1, .h_kv = 1, .d_qk = 64, .d_v = 64});
  Problem problem = problem_of(data);
  ASSERT_EQ(problem.grids[0].n_kv, 1024 / problem.block_size);
  const DenseRule rule{Backend::kSm90, 10, 2, 4};
  const Pattern flex = FlexPrefill{.min_budget = 2 * problem.block_size};
  // Rows keep 3 blocks at least: 0 + 0 + 0 + 1 + ... + 5 = 15 tiles of 2 us; 8 of 1 us are probed.
  const double unit = problem.block_size / 128.0;
  const double n = static_cast<double>(problem.grids[0].n_kv);
  const DenseEstimate found = estimate(rule, problem, flex, 1);
  EXPECT_DOUBLE_EQ(found.cost, 10 + n * unit);
  EXPECT_DOUBLE_EQ(found.saving, (n - 3) * (n - 2) / 2 * 2 * unit * unit);
  // With as many multiprocessors as rows the longest row counts.
  EXPECT_DOUBLE_EQ(estimate(rule, problem, flex, 1000).saving, (n - 3) * 2 * unit * unit);
  const double enough = kSavedShare * found.saving;
  EXPECT_FALSE(prefill_is_dense({Backend::kSm90, enough - 2 * n, 2, 4}, problem, flex, 1));
  EXPECT_TRUE(prefill_is_dense({Backend::kSm90, enough, 2, 4}, problem, flex, 1));
  EXPECT_FALSE(prefill_is_dense({Backend::kSm90, 1e9, 2, 4}, problem, StreamingLlm{}, 1));
}

TEST(DenseRuleOf, LeastBlocksOfAPattern) {
  EXPECT_EQ(least_blocks(FlexPrefill{.min_budget = 512}, 128), 7);
  EXPECT_EQ(least_blocks(FlexPrefill{.min_budget = 0}, 128), 1);
  EXPECT_EQ(least_blocks(VerticalSlash{1024, 1000}, 128), 15);
  EXPECT_EQ(least_blocks(VerticalSlash{0, 0}, 128), 1);
}

// What was measured: at 2k tokens dense was faster, from 4k on sparse (32 and 8 heads, d 128,
// H200).
TEST(DenseRuleOf, AgreesWithTheMeasuredTable) {
  const Pattern flex = FlexPrefill{.min_budget = 512};
  const auto dense = [&](int64_t n) {
    const std::array<int64_t, 4> q{1, n, 32, 128}, kv{1, n, 8, 128};
    AttentionInput input;
    input.q = contiguous_view(nullptr, DType::kBFloat16, q);
    input.k = input.v = contiguous_view(nullptr, DType::kBFloat16, kv);
    const Problem problem = make_problem(input, Purpose::kAttendSize, Backend::kCpu);
    return prefill_is_dense(dense_rule(Backend::kSm90), problem, flex, 132);
  };
  EXPECT_TRUE(dense(2048));
  for (const int64_t n : {4096, 8192, 16384, 32768, 65536, 131072}) EXPECT_FALSE(dense(n)) << n;
}

}  // namespace
}  // namespace flexprefill::testing

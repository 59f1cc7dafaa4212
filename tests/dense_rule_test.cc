// When prefill is dense although its pattern is sparse.
#include <gtest/gtest.h>

#include "attend/dense_rule.h"
#include "case_table.h"

namespace flexprefill::testing {
namespace {

// The table says nothing yet that would change a call; what it may say works.
TEST(DenseRuleOf, ABackendDecidesByShapesAlone) {
  const CaseData data(Case{.name = "dense", .lengths = {{500, 700}, {500, 700}}});
  const Problem problem = make_problem(data.input, Purpose::kSelectSize, Backend::kCpu);
  const DenseRule none{Backend::kSm90, 0, 0}, queries{Backend::kSm90, 501, 0},
      keys{Backend::kSm90, 0, 701};
  const Pattern flex = FlexPrefill{.min_budget = 64}, window = StreamingLlm{};
  EXPECT_FALSE(prefill_is_dense(none, problem, flex));
  EXPECT_TRUE(prefill_is_dense(none, problem, FlexPrefill{.min_budget = 700}));
  EXPECT_TRUE(prefill_is_dense(none, problem, Dense{}));
  EXPECT_TRUE(prefill_is_dense(queries, problem, flex));
  EXPECT_TRUE(prefill_is_dense(keys, problem, VerticalSlash{}));
  EXPECT_FALSE(prefill_is_dense({Backend::kSm90, 500, 700}, problem, flex));
  EXPECT_FALSE(prefill_is_dense(queries, problem, window));
  for (const Backend backend : {Backend::kReference, Backend::kCpu, Backend::kSm80, Backend::kSm90})
    EXPECT_EQ(dense_rule(backend).backend, backend);
  EXPECT_EQ(dense_rule(Backend::kAuto).backend, Backend::kCpu);
}

}  // namespace
}  // namespace flexprefill::testing

// select: every backend and CPU target against the oracle of select_oracle.h.
#include <gtest/gtest.h>
#include <oneapi/tbb/global_control.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "case_table.h"
#include "math.h"
#include "select_oracle.h"
#include "selection.h"
#include "staged_call.h"
#include "test_executions.h"

namespace flexprefill::testing {
namespace {

// Those that take the case's element type.
std::vector<Execution> executions_for(const CaseData& data) {
  std::vector<Execution> all = executions(Stage::kSelect);
  std::erase_if(all, [&](const Execution& e) { return !takes(e, data.c.dtype); });
  return all;
}

bool short_sequence(SequenceLengths lengths, const Case& c, int64_t min_budget) {
  return lengths.s_q <= c.block_size || lengths.s_kv <= 2 * c.block_size ||
         lengths.s_kv <= (min_budget + c.block_size - 1) / c.block_size * c.block_size;
}

void expect_dense(const Selection& selection, int64_t s, int32_t h) {
  EXPECT_TRUE(selection.is_dense(s, h));
  const HeadAudit& audit = selection.head(s, h);
  EXPECT_EQ(audit.pattern, HeadPattern::kDense);
  EXPECT_EQ(audit.kept_mass, 1);
  EXPECT_EQ(audit.density, 1);
}

class SelectCase : public ::testing::TestWithParam<Case> {
 protected:
  // body(sequence, head, oracle) for every head.
  template <typename Body>
  void for_each_head(const CaseData& data, const Body& body) {
    for (int64_t s = 0; s < static_cast<int64_t>(data.lengths.size()); ++s) {
      for (int32_t h = 0; h < data.c.h_q; ++h) {
        body(s, h, oracles_.try_emplace({s, h}, data, s, h).first->second);
      }
    }
  }

 private:
  std::map<std::pair<int64_t, int32_t>, Oracle> oracles_;  // of the one `data` of a test
};

TEST_P(SelectCase, FlexPrefillDecidesAsTheOracle) {
  const CaseData data(GetParam());
  const int64_t block = data.c.block_size;
  const std::vector<FlexPrefill> patterns{
      {.gamma = 0.9f, .tau = 0.1f, .min_budget = block},
      {.gamma = 0.7f, .tau = 0, .min_budget = 0},
      {.gamma = 0.9f, .tau = 1, .min_budget = 0},
      {.gamma = 1, .tau = 0, .min_budget = 0},
      {.gamma = 1, .tau = 1, .min_budget = 0},
      {.gamma = 0.95f, .tau = 0.1f, .min_budget = 2 * block, .max_budget = 3 * block}};
  // [execution][pattern]; the kernels of CUDA are others without an audit.
  std::vector<std::vector<Selection>> selections, without_audit;
  const std::vector<Execution> all = executions_for(data);
  for (const Execution& execution : all) {
    selections.emplace_back();
    without_audit.emplace_back();
    for (const FlexPrefill& pattern : patterns) {
      selections.back().push_back(run(data, pattern, execution));
      if (!is_cuda(execution.backend)) continue;
      without_audit.back().push_back(run(data, pattern, execution, false));
    }
  }
  int64_t blocks = 0, undecided = 0;
  for_each_head(data, [&](int64_t s, int32_t h, Oracle& oracle) {
    for (size_t p = 0; p < patterns.size(); ++p) {
      const bool is_short = short_sequence(data.lengths[s], data.c, patterns[p].min_budget);
      Oracle::Decision want;
      if (!is_short) want = oracle.flex_prefill(patterns[p]);
      for (size_t e = 0; e < selections.size(); ++e) {
        SCOPED_TRACE(execution_name(all[e]) + " sequence " + std::to_string(s) + " head " +
                     std::to_string(h) + " pattern " + std::to_string(p));
        const Selection& got = selections[e][p];
        if (is_short) {
          expect_dense(got, s, h);
          continue;
        }
        if (!without_audit[e].empty()) {
          check_blocks(without_audit[e][p], oracle, s, h, want.must, want.may);
        }
        check_head(got, oracle, s, h, want.must, want.may);
        const HeadAudit& audit = got.head(s, h);
        EXPECT_NEAR(audit.jsd_sqrt, oracle.jsd, 1e-5 + oracle.slack / std::max(oracle.jsd, 1e-3));
        if (audit.pattern == HeadPattern::kQueryAware) {
          EXPECT_TRUE(want.may_be_query_aware);
        } else {
          ASSERT_EQ(audit.pattern, HeadPattern::kVerticalSlash);
          EXPECT_TRUE(want.may_be_vertical_slash);
          EXPECT_TRUE(want.vertical_blocks.holds(audit.vertical_blocks));
          EXPECT_TRUE(want.slash_blocks.holds(audit.slash_blocks));
        }
      }
      for (size_t i = 0; i < want.must.size(); ++i) {
        for (size_t j = 0; j < want.must[i].size(); ++j) {
          ++blocks;
          undecided += want.may[i][j] && !want.must[i][j];
        }
      }
    }
  });
  // The oracle is worth something: it leaves few blocks open, but where scores tie by design.
  if (data.c.fill != Fill::kEqual) {
    EXPECT_LE(undecided, 1 + blocks / 20);
  }
}

TEST_P(SelectCase, VerticalSlashKeepsTheBestBlocks) {
  const CaseData data(GetParam());
  const int64_t block = data.c.block_size;
  for (const VerticalSlash& pattern : {VerticalSlash{block + 1, 2 * block}, VerticalSlash{0, 1},
                                       VerticalSlash{1000 * block, block}}) {
    std::vector<Selection> selections;
    for (const Execution& execution : executions_for(data)) {
      selections.push_back(run(data, pattern, execution));
    }
    for_each_head(data, [&](int64_t s, int32_t h, Oracle& oracle) {
      const auto blocks = [&](int64_t tokens) {
        const int64_t n = std::clamp<int64_t>((tokens + block - 1) / block, 1, oracle.grid.n_kv);
        return Range{n, n};
      };
      const Range n_v = blocks(pattern.vertical_size), n_s = blocks(pattern.slash_size);
      const auto [must, may] = oracle.vertical_slash(n_v, n_s);
      for (const Selection& got : selections) {
        if (short_sequence(data.lengths[s], data.c, 0)) {
          expect_dense(got, s, h);
          continue;
        }
        check_head(got, oracle, s, h, must, may);
        EXPECT_EQ(got.head(s, h).pattern, HeadPattern::kVerticalSlash);
        EXPECT_EQ(got.head(s, h).vertical_blocks, n_v.low);
        EXPECT_EQ(got.head(s, h).slash_blocks, n_s.low);
      }
    });
  }
}

TEST_P(SelectCase, StreamingLlmKeepsTheBlocksOfItsWindow) {
  const CaseData data(GetParam());
  for (const StreamingLlm& pattern : {StreamingLlm{10, 70}, StreamingLlm{0, 1},
                                      StreamingLlm{200, 33}, StreamingLlm{64, 1 << 20}}) {
    std::vector<Selection> selections;
    for (const Execution& execution : executions_for(data)) {
      selections.push_back(run(data, pattern, execution));
    }
    const auto sees = [&](int64_t position, int64_t key) {
      return key <= position &&
             (key < pattern.global_window || position - key < pattern.local_window);
    };
    for_each_head(data, [&](int64_t s, int32_t h, const Oracle& oracle) {
      const SequenceLengths lengths = data.lengths[s];
      Flags want(oracle.grid.n_q, std::vector<bool>(oracle.grid.n_kv));
      for (int64_t q = lengths.s_kv - lengths.s_q; q < lengths.s_kv; ++q) {
        for (int64_t k = 0; k <= q; ++k) {
          if (sees(q, k))
            want[q / oracle.block - oracle.grid.first_q_block][k / oracle.block] = true;
        }
      }
      for (const Selection& got : selections) {
        for (int64_t r = 0; r < oracle.grid.n_q; ++r) {
          for (int64_t j = 0; j < oracle.grid.n_kv; ++j) {
            ASSERT_EQ(got.keeps(s, h, r, j), want[r][j]) << "row " << r << " block " << j;
          }
        }
        EXPECT_EQ(got.head(s, h).pattern, HeadPattern::kStreaming);
        EXPECT_NEAR(got.head(s, h).kept_mass, oracle.mass(sees), 1e-5 + oracle.slack);
        EXPECT_EQ(got.index.global_window, pattern.global_window);
        EXPECT_EQ(got.index.local_window, pattern.local_window);
      }
    });
  }
}

// A sequence that spans several of the CPU backend's tasks, with head dims that the table's small
// cases lack.
std::vector<Case> select_cases() {
  std::vector<Case> cases = all_cases();
  cases.push_back({.name = "several_chunks",
                   .lengths = {{1500, 2333}},
                   .h_q = 2,
                   .h_kv = 1,
                   .d_qk = 32,
                   .d_v = 16,
                   .block_size = 128,
                   .fill = Fill::kStructured,
                   .seed = 91});
  cases.push_back({.name = "several_chunks_paged",
                   .lengths = {{1100, 1100}, {200, 1300}},
                   .h_q = 2,
                   .h_kv = 2,
                   .d_qk = 16,
                   .d_v = 16,
                   .dtype = DType::kBFloat16,
                   .block_size = 64,
                   .layout = Layout::kPaged,
                   .seed = 92});
  cases.push_back({.name = "many_blocks",
                   .lengths = {{2500, 2500}},
                   .h_q = 1,
                   .h_kv = 1,
                   .d_qk = 16,
                   .d_v = 16,
                   .block_size = 32,
                   .fill = Fill::kStructured,
                   .seed = 93});
  cases.push_back({.name = "many_blocks_in_turns",  // more maps than there is room for at a time
                   .lengths = {{300, 300}, {4300, 4300}},
                   .h_q = 2,
                   .h_kv = 1,
                   .d_qk = 16,
                   .d_v = 16,
                   .dtype = DType::kBFloat16,
                   .block_size = 32,
                   .layout = Layout::kPacked,
                   .fill = Fill::kStructured,
                   .seed = 95});
  cases.push_back({.name = "large_maps",
                   .lengths = {{8300, 8300}},
                   .h_q = 1,
                   .h_kv = 1,
                   .d_qk = 16,
                   .d_v = 16,
                   .dtype = DType::kFloat16,
                   .block_size = 32,
                   .fill = Fill::kStructured,
                   .seed = 96});
  cases.push_back({.name = "many_blocks_of_a_chunk",  // a map of several tiles of 64 blocks
                   .lengths = {{2300, 4900}},
                   .h_q = 2,
                   .h_kv = 1,
                   .d_qk = 24,
                   .d_v = 16,
                   .dtype = DType::kBFloat16,
                   .block_size = 32,
                   .fill = Fill::kStructured,
                   .seed = 94});
  return cases;
}

INSTANTIATE_TEST_SUITE_P(CaseTable, SelectCase, ::testing::ValuesIn(select_cases()),
                         [](const auto& param_info) { return param_info.param.name; });

class SelectOn : public ::testing::TestWithParam<Execution> {
 protected:
  Selection select_with(const CaseData& data, const Pattern& pattern) const {
    return run(data, pattern, GetParam());
  }
};

Case medium_case(const Execution& execution, Fill fill = Fill::kStructured) {
  return {.name = "medium",
          .lengths = {{700, 1200}},
          .h_q = 4,
          .h_kv = 2,
          .d_qk = 32,
          .d_v = 32,
          .dtype = widest_dtype(execution),
          .block_size = 64,
          .fill = fill,
          .seed = 5};
}

TEST_P(SelectOn, SameBitsForAnyNumberOfThreads) {
  if (GetParam().backend == Backend::kReference) GTEST_SKIP() << "one thread";
  // More than the machine may have, which TBB would not start by itself.
  namespace tbb = oneapi::tbb;
  const tbb::global_control allow(tbb::global_control::max_allowed_parallelism, 8);
  CaseData data(Case{.name = "threads",
                     .lengths = {{2500, 2500}, {2500, 2500}},
                     .h_q = 4,
                     .h_kv = 2,
                     .d_qk = 64,
                     .d_v = 64,
                     .dtype = DType::kBFloat16,
                     .fill = Fill::kStructured});
  for (const Pattern& pattern :
       {Pattern(FlexPrefill{.min_budget = 128}), Pattern(FlexPrefill{.tau = 1, .min_budget = 128}),
        Pattern(VerticalSlash{256, 512}), Pattern(StreamingLlm{70, 333})}) {
    Execution execution = GetParam();
    execution.num_threads = 1;
    const Selection one = run(data, pattern, execution);
    for (const int32_t threads : thread_counts(execution)) {
      execution.num_threads = threads;
      expect_equal(one, run(data, pattern, execution));
    }
  }
}

TEST_P(SelectOn, ANaNKeepsItsHeadsDenseAndNoOther) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  for (const float bad : {nan, inf}) {
    for (const FlexPrefill& pattern : {FlexPrefill{.gamma = 0.5f, .tau = 0, .min_budget = 64},
                                       FlexPrefill{.gamma = 0.5f, .tau = 1, .min_budget = 64}}) {
      // Every query of heads 2 and 3 sees key 333 of K/V head 1. A column that no query leaves
      // at 0, so that an infinity shows in every score.
      CaseData key(medium_case(GetParam()));
      const Selection clean = select_with(key, pattern);
      EXPECT_FALSE(clean.is_dense(0, 0));
      key.set_k(0, 333, 1, 0, bad);
      const Selection got = select_with(key, pattern);
      for (const int32_t h : {0, 1}) EXPECT_EQ(got.kept(0, h), clean.kept(0, h));
      for (const int32_t h : {2, 3}) expect_dense(got, 0, h);
      // A query outside the probe counts where the map is made.
      CaseData query(medium_case(GetParam()));
      query.set_q(0, 100, 1, 0, bad);
      const Selection map = select_with(query, pattern);
      for (const int32_t h : {0, 2, 3}) EXPECT_EQ(map.kept(0, h), clean.kept(0, h));
      if (pattern.tau > 0) {
        expect_dense(map, 0, 1);
      } else {
        EXPECT_EQ(map.kept(0, 1), clean.kept(0, 1));
      }
      // Values have no say.
      CaseData value(medium_case(GetParam()));
      value.set_v(0, 333, 1, 0, bad);
      expect_equal(select_with(value, pattern), clean);
    }
  }
}

TEST_P(SelectOn, ShortSequencesAreDense) {
  const auto is_dense = [&](SequenceLengths lengths, const Pattern& pattern) {
    CaseData data(Case{.name = "short",
                       .lengths = {lengths},
                       .h_q = 1,
                       .h_kv = 1,
                       .d_qk = 16,
                       .d_v = 16,
                       .dtype = widest_dtype(GetParam()),
                       .block_size = 64,
                       .fill = Fill::kStructured});
    return select_with(data, pattern).head(0, 0).pattern == HeadPattern::kDense;
  };
  const FlexPrefill flex{.min_budget = 0}, budget{.min_budget = 300};
  EXPECT_TRUE(is_dense({64, 1000}, flex));
  EXPECT_FALSE(is_dense({65, 1000}, flex));
  EXPECT_TRUE(is_dense({128, 128}, flex));
  EXPECT_FALSE(is_dense({129, 129}, flex));
  EXPECT_TRUE(is_dense({320, 320}, budget));
  EXPECT_FALSE(is_dense({321, 321}, budget));
  EXPECT_TRUE(is_dense({64, 1000}, VerticalSlash{}));
  EXPECT_FALSE(is_dense({65, 1000}, VerticalSlash{}));
  EXPECT_FALSE(is_dense({1, 1}, StreamingLlm{}));
  EXPECT_TRUE(is_dense({500, 500}, Dense{}));
}

TEST_P(SelectOn, EqualScoresGoToTheLowerIndex) {
  // 8 blocks of equal scores but for the causal edge: distances beyond 0 and 1 all tie.
  CaseData data(Case{.name = "equal",
                     .lengths = {{512, 512}},
                     .h_q = 1,
                     .h_kv = 1,
                     .d_qk = 16,
                     .d_v = 16,
                     .dtype = widest_dtype(GetParam()),
                     .block_size = 64,
                     .fill = Fill::kEqual});
  for (int64_t i = 0; i < 512; ++i) {
    for (int32_t c = 0; c < 16; ++c) data.set_q(0, i, 0, c, 0);  // every logit is exactly 0
  }
  const Selection got = select_with(data, VerticalSlash{3 * 64, 64});
  for (int64_t i = 0; i < 8; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      EXPECT_EQ(got.keeps(0, 0, i, j), j < 3 || j == i) << "row " << i << " block " << j;
    }
  }
}

TEST_P(SelectOn, SoftmaxScaleCounts) {
  // With scale 0 every score is flat: gamma keeps its share of everything; sharp scores, few.
  CaseData data(medium_case(GetParam()));
  const FlexPrefill pattern{.gamma = 0.9f, .tau = 0, .min_budget = 64};
  data.input.softmax_scale = 0.0f;
  const Selection flat = select_with(data, pattern);
  data.input.softmax_scale = 2.0f;
  const Selection sharp = select_with(data, pattern);
  for (int32_t h = 0; h < 4; ++h) {
    EXPECT_GE(flat.head(0, h).vertical_blocks, 17);  // .9 of 1200 keys: block 16, and one more
    EXPECT_LE(sharp.head(0, h).vertical_blocks, 4);
    Oracle oracle(data, 0, h);
    const Oracle::Decision want = oracle.flex_prefill(pattern);
    check_head(sharp, oracle, 0, h, want.must, want.may);
  }
}

TEST_P(SelectOn, AWorkspaceOneByteShortIsRefused) {
  const CaseData data(medium_case(GetParam()));
  const Pattern pattern = FlexPrefill{.min_budget = 64};
  const size_t bytes = select_workspace_size(data.input, pattern, GetParam());
  StagedCall call(data.input, {}, {}, GetParam());
  const Workspace memory = call.workspace(bytes + 1);
  BlockIndex index;
  std::vector<HeadAudit> audit(4);  // counted by the size query
  // The size is for any alignment: this is the worst.
  const size_t misaligned = reinterpret_cast<uintptr_t>(memory.data) % 64 == 0 ? 1 : 0;
  void* data_at = static_cast<std::byte*>(memory.data) + misaligned;
  EXPECT_NO_THROW(select(call.input, pattern, GetParam(), {data_at, bytes}, index, audit));
  call.finish();
  try {
    select(call.input, pattern, GetParam(), {memory.data, bytes - 128}, index, audit);
    FAIL() << "expected an error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kWorkspaceTooSmall);
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, SelectOn, ::testing::ValuesIn(executions(Stage::kSelect)),
                         [](const auto& param_info) { return execution_name(param_info.param); });

// Bytes beyond q, k, v and out, as a share of q, k and v; bf16, d 128, two threads.
double memory_share(int64_t tokens, int64_t h_q, int64_t h_kv, const auto& size_query) {
  const std::array<int64_t, 4> q{1, tokens, h_q, 128}, kv{1, tokens, h_kv, 128};
  alignas(64) static std::byte nothing[64];  // a size query reads no element
  AttentionInput input;
  input.q = contiguous_view(nothing, DType::kBFloat16, q);
  input.k = input.v = contiguous_view(nothing, DType::kBFloat16, kv);
  return static_cast<double>(size_query(input)) /
         static_cast<double>(2 * tokens * 128 * (h_q + 2 * h_kv));
}

TEST(SelectMemory, IsAFewPercentOfTheInputs) {
  std::vector<Execution> all = cuda_executions(Stage::kPrefill);
  all.push_back({.backend = Backend::kCpu, .num_threads = 2});
  for (const Execution& execution : all) {
    for (const Pattern& pattern : {Pattern(FlexPrefill{}), Pattern(VerticalSlash{}),
                                   Pattern(StreamingLlm{}), Pattern(BlockCover{})}) {
      const auto select_bytes = [&](const AttentionInput& input) {
        return select_workspace_size(input, pattern, execution);
      };
      const auto prefill_bytes = [&](const AttentionInput& input) {
        return prefill_workspace_size(input, pattern, execution);
      };
      EXPECT_LE(memory_share(131072, 32, 8, prefill_bytes), 0.05);
      EXPECT_LE(memory_share(32768, 8, 2, prefill_bytes), 0.1);
      EXPECT_LE(memory_share(32768, 8, 2, select_bytes), is_cuda(execution.backend) ? 0.1 : 0.03);
    }
  }
}

}  // namespace
}  // namespace flexprefill::testing

// BlockCover: its decisions against sorts, and every backend and CPU target against plain loops in
// double precision (block_cover_oracle.h).
#include <gtest/gtest.h>
#include <oneapi/tbb/global_control.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "block_cover_oracle.h"
#include "case_table.h"
#include "select/block_rules.h"
#include "select_oracle.h"
#include "selection.h"
#include "test_executions.h"

namespace flexprefill::testing {
namespace {

// ---- Decisions from given scores --------------------------------------------------------------

std::vector<float> random_shares(std::mt19937& random, int64_t size) {
  std::normal_distribution<double> normal;
  std::vector<double> wide(size);
  for (double& x : wide) {
    const uint32_t kind = random() % 10;
    x = kind == 0 ? 0 : kind < 4 ? 0.01 : std::exp(3 * normal(random));  // zeros and ties
  }
  const double sum = std::accumulate(wide.begin(), wide.end(), 1e-30);
  std::vector<float> shares;
  for (const double x : wide) shares.push_back(static_cast<float>(x / sum));
  return shares;
}

int64_t mass_of(float x) { return std::llround(std::ldexp(static_cast<double>(x), 40)); }

// Blocks in the order of a rule: largest score first, ties by index.
std::vector<int64_t> by_score(const std::vector<float>& scores, const std::set<int64_t>& blocks) {
  std::vector<int64_t> order(blocks.begin(), blocks.end());
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
  return order;
}

// Adds the largest of `blocks` to `kept` until all of kept reach `share` of all scores.
void cover_by_sort(const std::vector<float>& scores, double share, const std::set<int64_t>& blocks,
                   std::set<int64_t>& kept) {
  int64_t total = 0, sum = 0;
  for (const float x : scores) total += mass_of(x);
  for (const int64_t j : kept) sum += mass_of(scores[j]);
  for (const int64_t j : by_score(scores, blocks)) {
    if (static_cast<double>(sum) >= share * static_cast<double>(total)) return;
    if (kept.insert(j).second) sum += mass_of(scores[j]);
  }
}

struct RowBySort {
  std::set<int64_t> kept, columns;
};

RowBySort row_by_sort(const std::vector<float>& scores, const BlockCoverRule& rule, bool asks,
                      const std::vector<float>& most_asked) {
  const auto i = static_cast<int64_t>(scores.size()) - 1;
  const auto n = static_cast<int64_t>(most_asked.size());
  std::set<int64_t> row_blocks, all;
  for (int64_t j = 0; j < n; ++j) all.insert(j);
  for (int64_t j = 0; j <= i; ++j) row_blocks.insert(j);
  std::set<int64_t> always{0};
  for (int64_t j = std::max<int64_t>(i - rule.near, 0); j <= i; ++j) always.insert(j);
  RowBySort out;
  cover_by_sort(most_asked, static_cast<double>(rule.column_share), all, out.columns);
  out.kept = always;
  cover_by_sort(scores, static_cast<double>(rule.gamma), row_blocks, out.kept);
  std::set<int64_t> asked;
  for (const int64_t j : out.columns) {
    if (asks && j <= i) asked.insert(j);
  }
  const std::set<int64_t> cover = out.kept;
  out.kept.insert(asked.begin(), asked.end());
  if (static_cast<int64_t>(out.kept.size()) <= rule.most_blocks) return out;
  out.kept = always;
  for (const auto& order : {by_score(most_asked, asked), by_score(scores, cover)}) {
    for (const int64_t j : order) {
      if (static_cast<int64_t>(out.kept.size()) < rule.most_blocks) out.kept.insert(j);
    }
  }
  return out;
}

TEST(BlockCoverRow, AgreesWithSorts) {
  std::mt19937 random(3);
  Histogram histogram;
  for (const int64_t n : {3, 4, 17, 64, 65, 200}) {
    std::vector<float> scratch(n);
    const int64_t size = (n + 63) / 64;
    std::vector<uint64_t> columns(size), words(2 * size), row(size);
    for (int trial = 0; trial < 200; ++trial) {
      const int64_t i = static_cast<int64_t>(random() % static_cast<uint32_t>(n));
      const std::vector<float> scores = random_shares(random, i + 1);
      const std::vector<float> most_asked = random_shares(random, n);
      const float gammas[] = {0.01f, 0.5f, 0.9f, 0.999f}, shares[] = {0, 0.3f, 0.8f, 0.99f};
      BlockCoverRule rule{gammas[random() % 4], shares[random() % 4], 1 << random() % 3,
                          std::numeric_limits<int64_t>::max()};
      if (trial % 2 == 0) rule.most_blocks = rule.near + 2 + static_cast<int64_t>(random() % 12);
      const bool asks = trial % 3 != 0;
      const RowBySort want = row_by_sort(scores, rule, asks, most_asked);

      std::fill(columns.begin(), columns.end(), ~uint64_t{0});
      std::fill(row.begin(), row.end(), ~uint64_t{0});
      choose_columns(most_asked.data(), n, rule.column_share, &histogram, columns.data());
      const RowMass mass =
          keep_cover(scores.data(), i, n, rule, asks ? columns.data() : nullptr, most_asked.data(),
                     &histogram, scratch.data(), words.data(), row.data());
      int64_t total = 0, kept = 0;
      for (int64_t j = 0; j < 64 * size; ++j) {
        ASSERT_EQ(has_bit(columns.data(), j), want.columns.contains(j)) << "column " << j;
        ASSERT_EQ(has_bit(row.data(), j), want.kept.contains(j)) << "row " << i << " block " << j;
        if (j <= i) total += mass_of(scores[j]);
        if (want.kept.contains(j)) kept += mass_of(scores[j]);
      }
      EXPECT_EQ(static_cast<int64_t>(mass.total), total);
      EXPECT_EQ(static_cast<int64_t>(mass.kept), kept);
      if (rule.most_blocks > n) {
        EXPECT_GE(mass.kept, mass.wanted);
      }
    }
  }
}

TEST(BlockCoverRow, AShareOfOneIsEveryColumn) {
  Histogram histogram;
  const std::vector<float> most_asked{0.5f, 0, 0.25f};
  uint64_t columns = 0;
  choose_columns(most_asked.data(), 3, 1.0f, &histogram, &columns);
  EXPECT_EQ(columns, 0b111);
  choose_columns(most_asked.data(), 3, 0.0f, &histogram, &columns);
  EXPECT_EQ(columns, 0);
}

TEST(BlockCoverRule, BudgetsAreWholeBlocksAndHoldWhatIsAlwaysKept) {
  constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();
  for (const int64_t block : {32, 64, 128}) {
    const auto most = [&](std::optional<int64_t> budget) {
      return block_cover_rule({.max_budget = budget}, block).most_blocks;
    };
    const int64_t least = block_cover_rule({}, block).near + 2;
    EXPECT_EQ(least, block == 32 ? 6 : block == 64 ? 4 : 3);
    EXPECT_EQ(most({}), kLargest);
    EXPECT_EQ(most(0), least);
    EXPECT_EQ(most((least - 1) * block), least);
    EXPECT_EQ(most(least * block), least);
    EXPECT_EQ(most(least * block + 1), least + 1);
    EXPECT_EQ(most(kLargest), whole_blocks(kLargest, block));
  }
}

TEST(BlockCoverRule, MeansAreFinerInShortSequencesOfSmallBlocks) {
  for (const int64_t block : {32, 64}) {
    EXPECT_EQ(cover_pool(block, 1), 16);
    EXPECT_EQ(cover_pool(block, 16384), 16);
    EXPECT_EQ(cover_pool(block, 16385), 32);
  }
  EXPECT_EQ(cover_pool(128, 1), 32);
  EXPECT_EQ(cover_pool(128, 16385), 32);
}

TEST(AskingRows, AreSpreadOverTheLastRows) {
  const AskingRows few(77), some(300), many(100000);
  EXPECT_EQ(few.count, 77);
  EXPECT_EQ(some.count, 128);
  EXPECT_EQ(many.count, 128);
  for (const AskingRows& rows : {few, some, many}) {
    EXPECT_EQ(rows.row(rows.count - 1), rows.s_q - 1);
    EXPECT_GE(rows.row(0), rows.s_q - 512);
    for (int64_t k = 1; k < rows.count; ++k) EXPECT_GT(rows.row(k), rows.row(k - 1));
  }
  EXPECT_EQ(many.row(0), 100000 - 1 - 508);
  EXPECT_EQ(few.row(0), 0);
  EXPECT_LT(some.row(0), 3);
}

// ---- Scores of every backend ------------------------------------------------------------------

bool stays_short(SequenceLengths lengths, const Case& c) {
  return lengths.s_q <= c.block_size || lengths.s_kv <= 2 * c.block_size;
}

// Rows before those that ask; several tasks, panels and tiles of means; chunks that start inside a
// block and inside a mean; pages.
std::vector<Case> cover_cases() {
  std::vector<Case> cases = all_cases();
  cases.push_back({.name = "longer",
                   .lengths = {{1500, 1733}},
                   .d_qk = 32,
                   .d_v = 16,
                   .block_size = 128,
                   .fill = Fill::kStructured,
                   .seed = 91});
  cases.push_back({.name = "longer_paged",
                   .lengths = {{701, 1100}, {200, 1301}},
                   .h_q = 2,
                   .h_kv = 2,
                   .d_qk = 16,
                   .d_v = 16,
                   .dtype = DType::kBFloat16,
                   .block_size = 64,
                   .layout = Layout::kPaged,
                   .seed = 92});
  cases.push_back({.name = "many_blocks",
                   .lengths = {{1400, 1403}},
                   .h_q = 1,
                   .h_kv = 1,
                   .d_qk = 16,
                   .d_v = 16,
                   .block_size = 32,
                   .fill = Fill::kStructured,
                   .seed = 93});
  cases.push_back({.name = "many_blocks_of_a_chunk",  // several tiles of means
                   .lengths = {{2300, 4901}},
                   .h_q = 2,
                   .h_kv = 1,
                   .d_qk = 24,
                   .d_v = 16,
                   .dtype = DType::kBFloat16,
                   .block_size = 32,
                   .fill = Fill::kStructured,
                   .seed = 94});
  cases.push_back({.name = "ends_with_one_token",
                   .lengths = {{800, 1025}, {800, 1025}},
                   .h_q = 4,
                   .h_kv = 2,
                   .d_qk = 16,
                   .d_v = 16,
                   .dtype = DType::kFloat16,
                   .block_size = 128,
                   .gqa_interleave = true,
                   .seed = 95});
  cases.push_back({.name = "means_of_16_and_of_32",
                   .lengths = {{400, 16385}, {520, 1001}, {400, 16384}},
                   .h_q = 1,
                   .h_kv = 1,
                   .d_qk = 16,
                   .d_v = 16,
                   .dtype = DType::kBFloat16,
                   .block_size = 64,
                   .layout = Layout::kPacked,
                   .fill = Fill::kStructured,
                   .seed = 96});
  cases.push_back({.name = "one_and_two_means_of_a_block",
                   .lengths = {{333, 16384}, {333, 16401}, {900, 900}},
                   .h_q = 1,
                   .h_kv = 1,
                   .d_qk = 16,
                   .d_v = 16,
                   .block_size = 32,
                   .layout = Layout::kPaged,
                   .fill = Fill::kStructured,
                   .seed = 97});
  // Sums relative to the greatest score of earlier keys overflow in most tiles, also of means. The
  // greatest lie before the neighbours, which are always kept; the first rows do not ask.
  for (const DType dtype : {DType::kFloat32, DType::kFloat16}) {
    cases.push_back({.name = dtype == DType::kFloat32 ? "rising_scores" : "rising_scores_f16",
                     .lengths = {{700, 4901}},
                     .h_q = 2,
                     .h_kv = 1,
                     .d_qk = 16,
                     .d_v = 16,
                     .dtype = dtype,
                     .block_size = 32,
                     .fill = Fill::kRising,
                     .seed = 100});
  }
  // Enough tasks that on Hopper the map makes the means of its queries itself.
  cases.push_back({.name = "many_tasks",
                   .lengths = {{300, 521}, {413, 413}, {137, 700}, {129, 129}},
                   .h_q = 15,
                   .h_kv = 3,
                   .d_qk = 16,
                   .d_v = 16,
                   .dtype = DType::kBFloat16,
                   .block_size = 64,
                   .layout = Layout::kPacked,
                   .fill = Fill::kStructured,
                   .seed = 98});
  cases.push_back({.name = "many_tasks_paged",
                   .lengths = {{290, 521}, {413, 413}, {131, 700}},
                   .h_q = 16,
                   .h_kv = 8,
                   .d_qk = 136,
                   .d_v = 16,
                   .dtype = DType::kFloat16,
                   .block_size = 128,
                   .layout = Layout::kPaged,
                   .seed = 99});
  return cases;
}

class BlockCoverCase : public ::testing::TestWithParam<Case> {};

TEST_P(BlockCoverCase, KeepsWhatTheOracleSays) {
  const CaseData data(GetParam());
  const int64_t block = data.c.block_size;
  const int64_t least_budget = block + 128 + block;  // what a row always keeps
  const std::vector<BlockCover> patterns{
      {},
      {.gamma = 0.5f, .column_share = 0},
      {.gamma = 0.05f, .column_share = 0.95f},
      {.gamma = 0.97f, .column_share = 1},
      {.gamma = 0.9f, .column_share = 0.6f, .max_budget = least_budget + block},
      {.gamma = 0.8f, .column_share = 0.8f, .max_budget = least_budget - 1}};
  std::vector<Execution> all = executions(Stage::kSelect);
  std::erase_if(all, [&](const Execution& e) { return !takes(e, data.c.dtype); });
  std::vector<std::vector<Selection>> selections;  // [execution][pattern]
  for (const Execution& execution : all) {
    selections.emplace_back();
    for (const BlockCover& pattern : patterns) {
      selections.back().push_back(run(data, pattern, execution));
    }
  }
  int64_t blocks = 0, undecided = 0;
  for (int64_t s = 0; s < static_cast<int64_t>(data.lengths.size()); ++s) {
    for (int32_t h = 0; h < data.c.h_q; ++h) {
      if (stays_short(data.lengths[s], data.c)) {
        for (const auto& of_execution : selections) {
          for (const Selection& got : of_execution) {
            EXPECT_TRUE(got.is_dense(s, h));
            EXPECT_EQ(got.head(s, h).pattern, HeadPattern::kDense);
          }
        }
        continue;
      }
      const CoverOracle oracle(data, s, h);
      for (size_t p = 0; p < patterns.size(); ++p) {
        const BlockCover& pattern = patterns[p];
        const int64_t most = pattern.max_budget
                                 ? std::max(least_budget, *pattern.max_budget) / block
                                 : std::numeric_limits<int64_t>::max();
        for (size_t e = 0; e < selections.size(); ++e) {
          SCOPED_TRACE(execution_name(all[e]) + " sequence " + std::to_string(s) + " head " +
                       std::to_string(h) + " pattern " + std::to_string(p));
          const double off = oracle.map_slack(all[e]);
          const auto [must, may] = oracle.decide(pattern, off);
          const Selection& got = selections[e][p];
          double least = 1;
          int64_t surely_below = 0, maybe_below = 0;
          for (int64_t r = 0; r < oracle.grid.n_q; ++r) {
            const int64_t i = oracle.grid.first_q_block + r;
            int64_t count = 0, least_count = 0, most_count = 0;
            double kept = 0;
            for (int64_t j = 0; j < oracle.grid.n_kv; ++j) {
              const bool keeps = got.keeps(s, h, r, j);
              count += keeps;
              least_count += must[r][j];
              most_count += may[r][j];
              kept += keeps ? oracle.map[r][j] : 0;
              if (!pattern.max_budget) {
                ASSERT_TRUE(keeps || !must[r][j]) << "left out: row " << r << " block " << j;
              }
              ASSERT_TRUE(!keeps || may[r][j]) << "kept: row " << r << " block " << j;
              ASSERT_TRUE(keeps || !oracle.always_keeps(i, j)) << "row " << r << " block " << j;
            }
            ASSERT_LE(count, std::min(most, most_count));
            ASSERT_GE(count, std::min(most, least_count));
            least = std::min(least, kept);
            surely_below += kept < pattern.gamma - off;
            maybe_below += kept < pattern.gamma + off;
          }
          const HeadAudit& audit = got.head(s, h);
          EXPECT_EQ(audit.pattern, HeadPattern::kBlockCover);
          EXPECT_NEAR(audit.least_row_mass, least, 1e-5 + off);
          EXPECT_GE(audit.rows_below_gamma, surely_below);
          EXPECT_LE(audit.rows_below_gamma, pattern.max_budget ? maybe_below : 0);
          double mass = 0;
          for (size_t k = 0; k < oracle.exact.size(); ++k) {
            for (int64_t j = 0; j < oracle.grid.n_kv; ++j) {
              const int64_t r = oracle.asking_block[k] - oracle.grid.first_q_block;
              if (got.keeps(s, h, r, j)) mass += oracle.exact[k][j];
            }
          }
          EXPECT_NEAR(audit.kept_mass, mass / static_cast<double>(oracle.exact.size()),
                      1e-5 + oracle.slack);
          EXPECT_FLOAT_EQ(audit.density, static_cast<float>(got.kept(s, h)) /
                                             static_cast<float>(causal_blocks(oracle.grid)));
        }
        const auto [must, may] = oracle.decide(pattern, oracle.slack);
        for (size_t r = 0; r < must.size(); ++r) {
          for (size_t j = 0; j < must[r].size(); ++j) {
            ++blocks;
            undecided += may[r][j] && !must[r][j];
          }
        }
      }
    }
  }
  // The oracle is worth something, but where scores tie by design.
  if (data.c.fill != Fill::kEqual && data.c.fill != Fill::kZeroMass) {
    EXPECT_LE(undecided, 2 + blocks / 20);
  }
}

INSTANTIATE_TEST_SUITE_P(CaseTable, BlockCoverCase, ::testing::ValuesIn(cover_cases()),
                         [](const auto& param_info) { return param_info.param.name; });

class BlockCoverOn : public ::testing::TestWithParam<Execution> {};

Case medium_case(const Execution& execution) {
  return {.name = "medium",
          .lengths = {{900, 1200}, {900, 1200}},
          .h_q = 4,
          .h_kv = 2,
          .d_qk = 32,
          .d_v = 32,
          .dtype = widest_dtype(execution),
          .block_size = 64,
          .fill = Fill::kStructured,
          .seed = 5};
}

TEST_P(BlockCoverOn, SameBitsForAnyNumberOfThreads) {
  if (GetParam().backend == Backend::kReference) GTEST_SKIP() << "one thread";
  namespace tbb = oneapi::tbb;
  const tbb::global_control allow(tbb::global_control::max_allowed_parallelism, 8);
  const CaseData data(medium_case(GetParam()));
  for (const BlockCover& pattern : {BlockCover{}, BlockCover{.gamma = 0.99f, .max_budget = 320}}) {
    Execution execution = GetParam();
    execution.num_threads = 1;
    const Selection one = run(data, pattern, execution);
    for (const int32_t threads : thread_counts(execution)) {
      execution.num_threads = threads;
      expect_equal(one, run(data, pattern, execution));
    }
  }
}

TEST_P(BlockCoverOn, TheAuditChangesNothing) {
  const CaseData data(medium_case(GetParam()));
  const Selection audited = run(data, BlockCover{}, GetParam());
  const Selection plain = run(data, BlockCover{}, GetParam(), false);
  EXPECT_EQ(plain.index.indptr, audited.index.indptr);
  EXPECT_EQ(plain.index.indices, audited.index.indices);
}

TEST_P(BlockCoverOn, ANaNKeepsItsHeadsDenseAndNoOther) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    CaseData key(medium_case(GetParam()));
    const Selection clean = run(key, BlockCover{}, GetParam());
    key.set_k(0, 333, 1, 0, bad);
    const Selection got = run(key, BlockCover{}, GetParam());
    for (const int32_t h : {0, 1}) EXPECT_EQ(got.kept(0, h), clean.kept(0, h));
    for (const int32_t h : {2, 3}) {
      EXPECT_TRUE(got.is_dense(0, h)) << "head " << h;
      EXPECT_EQ(got.head(0, h).pattern, HeadPattern::kDense);
    }
    for (const int32_t h : {0, 1, 2, 3}) EXPECT_EQ(got.kept(1, h), clean.kept(1, h));
    for (const int64_t i : {100, 899}) {  // before the rows that ask, and among them
      CaseData query(medium_case(GetParam()));
      query.set_q(0, i, 0, 0, bad);
      const Selection map = run(query, BlockCover{}, GetParam());
      EXPECT_TRUE(map.is_dense(0, 0));
      EXPECT_EQ(map.head(0, 0).pattern, HeadPattern::kDense);
      for (const int32_t h : {1, 2, 3}) EXPECT_EQ(map.kept(0, h), clean.kept(0, h));
    }
  }
}

TEST_P(BlockCoverOn, EqualScoresGoToTheLowerIndex) {
  CaseData data(Case{.name = "equal",
                     .lengths = {{1024, 1024}},
                     .h_q = 1,
                     .h_kv = 1,
                     .d_qk = 16,
                     .d_v = 16,
                     .dtype = widest_dtype(GetParam()),
                     .block_size = 64,
                     .fill = Fill::kEqual});
  for (int64_t i = 0; i < 1024; ++i) {
    for (int32_t c = 0; c < 16; ++c) data.set_q(0, i, 0, c, 0);  // every logit is exactly 0
  }
  const Selection got = run(data, BlockCover{.gamma = 0.5f, .column_share = 0}, GetParam());
  // Row 15: 16 blocks of .0640 each but for its own, .0397. Blocks 0 and 13 to 15 hold .232, so
  // five more are needed for half of it.
  for (int64_t j = 0; j < 16; ++j) {
    EXPECT_EQ(got.keeps(0, 0, 15, j), j < 6 || j >= 13) << "block " << j;
  }
}

TEST_P(BlockCoverOn, ANeedleThatOneRowAsksForIsKeptForTheLastRows) {
  // Key 200 answers the query at 1103 alone: no mean shows it.
  CaseData data(medium_case(GetParam()));
  for (int32_t c = 0; c < 32; ++c) {
    data.set_k(0, 200, 0, c, c == 31 ? 30.0f : 0.0f);
    for (int64_t i = 0; i < 900; ++i) data.set_q(0, i, 0, 31, i == 803 ? 20.0f : 0.0f);
  }
  const Selection with = run(data, BlockCover{.gamma = 0.3f}, GetParam());
  const Selection without = run(data, BlockCover{.gamma = 0.3f, .column_share = 0}, GetParam());
  // The first row that asks, 391, stands in query block 10, the seventh; row 803 in block 17.
  for (int64_t r = 0; r < 15; ++r) {
    EXPECT_EQ(with.keeps(0, 0, r, 200 / 64), r >= 6 || without.keeps(0, 0, r, 200 / 64));
  }
  EXPECT_FALSE(without.keeps(0, 0, 13, 200 / 64));
  EXPECT_GE(with.head(0, 0).vertical_blocks, 1);
  EXPECT_EQ(without.head(0, 0).vertical_blocks, 0);
}

TEST_P(BlockCoverOn, GammaOneIsDense) {
  const CaseData data(medium_case(GetParam()));
  const Selection got = run(data, BlockCover{.gamma = 1}, GetParam());
  for (const int32_t h : {0, 1, 2, 3}) {
    EXPECT_TRUE(got.is_dense(1, h));
    EXPECT_EQ(got.head(1, h).pattern, HeadPattern::kDense);
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, BlockCoverOn, ::testing::ValuesIn(executions(Stage::kSelect)),
                         [](const auto& param_info) { return execution_name(param_info.param); });

}  // namespace
}  // namespace flexprefill::testing

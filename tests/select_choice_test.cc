// The device's decisions are those of pattern.h, bit by bit, given equal scores.
#include "select_choice.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <string>

namespace flexprefill::testing {
namespace {

// Scores of many magnitudes that sum to 1, some of them 0, many of them equal.
std::vector<float> random_scores(std::mt19937& random, int64_t size, bool flat) {
  std::normal_distribution<double> normal;
  std::uniform_int_distribution<int> kind(0, 9);
  std::vector<double> wide(size);
  for (double& x : wide) {
    const int k = kind(random);
    x = flat ? 1 : k == 0 ? 0 : k < 4 ? 0.01 : std::exp(3 * normal(random));
  }
  if (size == 1) wide[0] = 1;  // a 0 alone would become NaN
  const double sum = std::accumulate(wide.begin(), wide.end(), 0.0);
  std::vector<float> scores;
  for (const double x : wide) scores.push_back(static_cast<float>(x / sum));
  return scores;
}

class SelectChoice : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_device()) GTEST_SKIP() << "no CUDA device";
  }
};

TEST_F(SelectChoice, TakesTheSameEntries) {
  std::mt19937 random(1);
  Histogram histogram;
  for (const int64_t size : {1, 2, 33, 1000, 8192, 20001}) {
    for (const bool flat : {false, true}) {
      const std::vector<float> x = random_scores(random, size, flat);
      std::vector<std::pair<Weight, uint64_t>> rules;
      for (const float gamma : {0.0f, 0.5f, 0.9f, 1.0f}) {
        rules.emplace_back(Weight::kMass, mass_limit(gamma, 1));
      }
      for (const int64_t k : {int64_t{0}, int64_t{1}, size / 2, size + 3}) {
        rules.emplace_back(Weight::kCount, static_cast<uint64_t>(k));
      }
      for (const auto& [weight, limit] : rules) {
        SCOPED_TRACE("size " + std::to_string(size) + " limit " + std::to_string(limit));
        const TakenOnDevice got = take_on_device(x, weight, limit);
        const Taken want = take_largest(x.data(), size, weight, limit, &histogram);
        EXPECT_EQ(got.taken.count, want.count);
        EXPECT_EQ(got.taken.threshold, want.threshold);
        EXPECT_EQ(got.taken.ties, want.ties);
        Taken rest = want;
        std::vector<uint64_t> bits(got.bits.size()), reversed(bits);
        for (int64_t e = 0; e < size; ++e) {
          if (!rest.takes(x[e])) continue;
          set_bit(bits.data(), e);
          set_bit(reversed.data(), size - 1 - e);
        }
        EXPECT_EQ(got.bits, bits);
        EXPECT_EQ(got.reversed, reversed);
      }
    }
  }
}

ChoiceInput choice_input(std::mt19937& random, SequenceLengths lengths, int32_t block_size,
                         bool flat) {
  ChoiceInput input{.lengths = lengths, .block_size = block_size, .pattern = {}};
  input.pattern.min_budget = 0;
  input.vertical = random_scores(random, lengths.s_kv, flat);
  input.slash = random_scores(random, lengths.s_kv, flat);
  const BlockGrid grid = block_grid(lengths, block_size);
  // Few values, so that many entries of a map tie.
  std::uniform_int_distribution<int> value(0, 3);
  for (int64_t e = 0; e < 16 * grid.n_q; ++e) {
    input.q.push_back(flat ? 0.0f : 0.5f * static_cast<float>(value(random)));
  }
  for (int64_t e = 0; e < grid.n_kv; ++e) {
    input.pooled.push_back(static_cast<float>(value(random)));
  }
  for (int64_t e = 0; e < 16 * grid.n_kv; ++e) {
    input.k_means.push_back(0.25f * static_cast<float>(value(random)));
  }
  return input;
}

TEST_F(SelectChoice, ChoosesTheSameBlocks) {
  std::mt19937 random(2);
  Histogram histogram;
  const std::vector<std::pair<SequenceLengths, int32_t>> shapes{
      {{300, 300}, 64}, {{2100, 2177}, 32}, {{9000, 9000}, 128}, {{20000, 20011}, 32}};
  for (const auto& [lengths, block_size] : shapes) {
    for (const bool flat : {false, true}) {
      ChoiceInput input = choice_input(random, lengths, block_size, flat);
      for (const float gamma : {0.3f, 0.9f, 1.0f}) {
        SCOPED_TRACE("s_kv " + std::to_string(lengths.s_kv) + " gamma " + std::to_string(gamma));
        input.pattern.gamma = gamma;
        input.pattern.tau = 0;
        const ChoiceResult got = choose_on_device(input);
        const int64_t n = block_grid(lengths, block_size).n_kv;
        std::vector<float> vertical_block(n), slash_block(n);
        std::vector<uint64_t> vertical_bits((n + 63) / 64), slash_bits((n + 63) / 64);
        const HeadChoice want = choose_flex_prefill(
            input.vertical.data(), input.slash.data(), got.pooled.data(), lengths.s_kv, block_size,
            flex_prefill_rule(input.pattern, block_size, n),
            {vertical_block.data(), slash_block.data(), vertical_bits.data(), slash_bits.data()},
            &histogram);
        EXPECT_EQ(got.vertical_block, vertical_block);
        EXPECT_EQ(got.slash_block, slash_block);
        EXPECT_NEAR(got.choice.jsd_sqrt, want.jsd_sqrt, 1e-7);
        EXPECT_EQ(got.choice.pattern, want.pattern);
        EXPECT_EQ(got.choice.vertical_blocks, want.vertical_blocks);
        EXPECT_EQ(got.choice.slash_blocks, want.slash_blocks);
        EXPECT_EQ(got.vertical_bits, vertical_bits);
        EXPECT_EQ(got.slash_bits, slash_bits);
      }
    }
  }
}

TEST_F(SelectChoice, KeepsTheSameBlocksOfAMap) {
  std::mt19937 random(3);
  Histogram histogram;
  // Of one tile, of several, and a chunk that starts at block 67.
  const std::vector<SequenceLengths> shapes{{300, 300}, {4300, 4300}, {4600, 8900}};
  for (const SequenceLengths lengths : shapes) {
    for (const bool flat : {false, true}) {
      ChoiceInput input = choice_input(random, lengths, 64, flat);
      input.pattern.tau = 1;
      for (const float gamma : {0.2f, 0.5f, 0.9f, 1.0f}) {
        SCOPED_TRACE("s_kv " + std::to_string(lengths.s_kv) + " gamma " + std::to_string(gamma));
        input.pattern.gamma = gamma;
        // By one CTA, and by many.
        input.small_map = gamma == 0.5f || lengths.s_q == 300 ? 256 : 0;
        const ChoiceResult got = choose_on_device(input);
        ASSERT_EQ(got.choice.pattern, HeadPattern::kQueryAware);
        const BlockGrid grid = block_grid(lengths, 64);
        const int64_t words = (grid.n_kv + 63) / 64;
        std::vector<uint64_t> want(grid.n_q * words, 0);
        Taken taken = cover_map(got.map.data(), static_cast<int64_t>(got.map.size()), grid.n_q,
                                gamma, &histogram);
        const float* row = got.map.data();
        double mass = 0;
        for (int64_t r = 0; r < grid.n_q; ++r) {
          const int64_t i = grid.first_q_block + r;
          keep_map_row(row, i, taken, want.data() + r * words);
          mass += std::accumulate(row, row + i + 1, 0.0);
          row += i + 1;
        }
        EXPECT_NEAR(mass, static_cast<double>(grid.n_q), 1e-3);
        EXPECT_EQ(got.kept, want);
      }
    }
  }
}

// Scores for a row of i + 1 blocks in all sizes, also many that are equal or below 2^-40.
TEST_F(SelectChoice, AWarpKeepsTheSameBlocksOfARow) {
  std::mt19937 random(4);
  Histogram histogram;
  for (const int64_t size : {1, 2, 3, 31, 64, 65, 256, 500, 1024, 1300}) {
    for (const int kind : {0, 1, 2, 3}) {
      RowInput input;
      input.scores =
          kind == 3 ? std::vector<float>(size, 0.0f) : random_scores(random, size, kind == 1);
      if (kind == 2) {
        for (float& x : input.scores) x = std::ldexp(x, -static_cast<int>(random() % 45));
      }
      const int64_t i = size - 1;
      input.n = size + 3;
      std::vector<uint64_t> want((input.n + 63) / 64);
      const auto check = [&](const std::string& name) {
        EXPECT_EQ(keep_row_on_device(input), want) << name << " size " << size << " kind " << kind;
      };
      input.rule = RowRule::kReaching;
      for (const float threshold : {0.01f, 0.5f, 0.9f, 0.999999f, 1.0f}) {
        input.threshold = threshold;
        keep_reaching(input.scores.data(), i, input.n, threshold, &histogram, want.data());
        check("reaching " + std::to_string(threshold));
      }
      input.rule = RowRule::kAbove;
      for (const float alpha : {0.0f, 0.1f, 1.0f}) {
        for (const int64_t first_full : {i, i + 1}) {
          input.above = {.alpha = alpha,
                         .global_blocks = size / 10,
                         .local_blocks = 2,
                         .first_full = first_full};
          keep_above(input.scores.data(), i, input.n, input.above, want.data());
          check("above " + std::to_string(alpha));
        }
      }
      for (const int64_t count : {int64_t{0}, int64_t{1}, int64_t{2}, size / 2, size - 1, size}) {
        input.count = count;
        keep_best(input.scores.data(), i, input.n, count, &histogram, want.data());
        input.rule = RowRule::kBest;
        check("best " + std::to_string(count));
        input.rule = RowRule::kBestEntries;
        if (size <= 1024) check("best of entries " + std::to_string(count));
      }
    }
  }
}

// What the device's map holds of x.
float as_map_entry(float x) {
  int exponent = 0;
  std::frexp(x, &exponent);
  const int unit = std::max(exponent - 11, -39);
  return std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
}

TEST_F(SelectChoice, AWarpCoversTheSameBlocksOfARow) {
  std::mt19937 random(5);
  Histogram histogram;
  for (const int64_t size : {1, 2, 3, 4, 5, 33, 64, 65, 300, 1300}) {
    for (const int trial : {0, 1, 2, 3, 4, 5}) {
      RowInput input;
      input.rule = RowRule::kCover;
      input.scores = random_scores(random, size, trial == 1);
      if (trial == 2) {
        for (float& x : input.scores) x = std::ldexp(x, -static_cast<int>(random() % 45));
      }
      for (float& x : input.scores) x = as_map_entry(x);
      const int64_t i = size - 1;
      input.n = size + 3;
      input.most_asked = random_scores(random, input.n, trial == 3);
      const size_t words = static_cast<size_t>((input.n + 63) / 64);
      std::vector<uint64_t> want(words), columns(words), scratch_words(2 * words);
      std::vector<float> scratch(static_cast<size_t>(input.n));
      choose_columns(input.most_asked.data(), input.n, 0.4f, &histogram, columns.data());
      if (trial != 4) input.columns = columns;
      const int32_t near = 1 << trial % 3;
      for (const float gamma : {0.01f, 0.6f, 0.9f, 0.999999f}) {
        for (const int64_t more : {int64_t{0}, int64_t{1}, size / 8, size / 2, size}) {
          const int64_t most = near + 2 + more;
          SCOPED_TRACE("size " + std::to_string(size) + " trial " + std::to_string(trial) +
                       " gamma " + std::to_string(gamma) + " most " + std::to_string(most));
          input.cover = {.gamma = gamma, .column_share = 0.4f, .near = near, .most_blocks = most};
          const RowMass mass =
              keep_cover(input.scores.data(), i, input.n, input.cover,
                         trial == 4 ? nullptr : columns.data(), input.most_asked.data(), &histogram,
                         scratch.data(), scratch_words.data(), want.data());
          RowMass got;
          ASSERT_EQ(keep_row_on_device(input, &got), want);
          EXPECT_EQ(got.total, mass.total);
          EXPECT_EQ(got.wanted, mass.wanted);
          EXPECT_EQ(got.kept, mass.kept);
        }
      }
    }
  }
}

}  // namespace
}  // namespace flexprefill::testing

// The decisions of pattern.h against plain ones: sorts, loops over bits, sums in long double.
#include "select/pattern.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

namespace flexprefill {
namespace {

// Scores of many magnitudes that sum to about 1, some of them 0 or equal.
std::vector<float> random_scores(std::mt19937& random, int64_t size) {
  std::normal_distribution<double> normal;
  std::uniform_int_distribution<int> kind(0, 9);
  std::vector<double> wide(size);
  for (double& x : wide) {
    const int k = kind(random);
    x = k == 0 ? 0 : k == 1 ? 0.001 : std::exp(4 * normal(random));
  }
  const double sum = std::accumulate(wide.begin(), wide.end(), 0.0);
  std::vector<float> scores;
  for (const double x : wide) scores.push_back(static_cast<float>(x / sum));
  return scores;
}

// The rule by a sort, over the same rounded masses; order: largest first, ties by index.
std::vector<bool> taken_by_sort(const std::vector<float>& x, Weight weight, uint64_t limit) {
  std::vector<size_t> order(x.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return x[a] > x[b]; });
  std::vector<bool> taken(x.size());
  long double sum = 0;
  for (const size_t e : order) {
    sum += weight == Weight::kCount ? 1.0L : std::floor(x[e] * 0x1p40L + 0.5L);
    if (sum > static_cast<long double>(limit)) break;
    taken[e] = true;
  }
  return taken;
}

TEST(TakeLargest, AgreesWithASort) {
  std::mt19937 random(1);
  Histogram histogram;
  for (int trial = 0; trial < 400; ++trial) {
    const std::vector<float> x = random_scores(random, 1 + trial);
    std::vector<std::pair<Weight, uint64_t>> rules;
    for (const float gamma : {0.0f, 0.3f, 0.9f, 0.999f, 1.0f}) {
      rules.emplace_back(Weight::kMass, mass_limit(gamma, 1));
    }
    for (const uint64_t k : {uint64_t{0}, uint64_t{1}, x.size() / 2, x.size(), x.size() + 3}) {
      rules.emplace_back(Weight::kCount, k);
    }
    for (const auto& [weight, limit] : rules) {
      const std::vector<bool> want = taken_by_sort(x, weight, limit);
      Taken taken = take_largest(x.data(), trial + 1, weight, limit, &histogram);
      EXPECT_EQ(taken.count, std::count(want.begin(), want.end(), true));
      for (size_t e = 0; e < x.size(); ++e) {
        ASSERT_EQ(taken.takes(x[e]), want[e])
            << "trial " << trial << " limit " << limit << " entry " << e;
      }
    }
  }
}

TEST(FixedMass, IsTheRoundedProduct) {
  std::mt19937 random(7);
  std::uniform_real_distribution<double> exponent(-60, 22);
  for (int trial = 0; trial < 100000; ++trial) {
    const auto x = static_cast<float>(std::exp2(exponent(random)));
    ASSERT_EQ(fixed_mass(x), static_cast<uint64_t>(std::floor(std::ldexp(double{x}, 40) + 0.5)));
  }
  EXPECT_EQ(fixed_mass(0.0f), 0);
  EXPECT_EQ(fixed_mass(1e-40f), 0);
  EXPECT_EQ(fixed_mass(std::ldexp(1.0f, -41)), 1);
  EXPECT_EQ(fixed_mass(std::nextafter(std::ldexp(1.0f, -41), 0.0f)), 0);
}

TEST(Cover, CountsOneMoreThanFits) {
  Histogram histogram;
  const std::vector<float> x{0.125f, 0.5f, 0.25f, 0.125f};
  EXPECT_EQ(cover(x.data(), 4, 0.4f, &histogram), 1);
  EXPECT_EQ(cover(x.data(), 4, 0.5f, &histogram), 2);  // a running sum that equals gamma fits
  EXPECT_EQ(cover(x.data(), 4, 0.75f, &histogram), 3);
  EXPECT_EQ(cover(x.data(), 4, 0.875f, &histogram), 4);
  EXPECT_EQ(cover(x.data(), 4, 0.9f, &histogram), 4);
  EXPECT_EQ(cover(x.data(), 4, 1.0f, &histogram), 5);
}

TEST(Cover, AllOfTheMassIsEveryEntryWhateverItsRounding) {
  Histogram histogram;
  std::vector<float> x(1000, 0.001f + 1e-9f);  // sums to a little more than 1
  x.resize(1500, 0.0f);
  EXPECT_EQ(cover(x.data(), 1500, 1.0f, &histogram), 1501);
}

TEST(Budgets, AreBlocksWithinTheSequence) {
  const auto rule = [](int64_t low, std::optional<int64_t> high) {
    return flex_prefill_rule({.gamma = 0.9f, .tau = 0.1f, .min_budget = low, .max_budget = high},
                             128, 20);
  };
  constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();
  EXPECT_EQ(rule(0, {}).min_blocks, 1);
  EXPECT_EQ(rule(129, {}).min_blocks, 2);
  EXPECT_EQ(rule(0, {}).max_blocks, 20);
  EXPECT_EQ(rule(0, 1000).max_blocks, 8);
  EXPECT_EQ(rule(0, kLargest).max_blocks, 20);
  // cover // B + 1, then the budget.
  EXPECT_EQ(cover_blocks(127, 128, rule(0, {})), 1);
  EXPECT_EQ(cover_blocks(128, 128, rule(0, {})), 2);
  EXPECT_EQ(cover_blocks(1, 128, rule(500, {})), 4);
  EXPECT_EQ(cover_blocks(2000, 128, rule(500, 600)), 5);
  EXPECT_EQ(cover_blocks(2600, 128, rule(0, {})), 20);
}

TEST(JsdSqrt, KnownValues) {
  const std::vector<float> even{0.5f, 0.5f, 0, 0}, other{0, 0, 0.25f, 0.75f}, one{1, 0, 0, 0};
  EXPECT_EQ(jsd_sqrt(even.data(), even.data(), 4), 0);
  // Nothing in common: log 2; exact zeros on both sides give no NaN.
  EXPECT_NEAR(jsd_sqrt(even.data(), other.data(), 4), std::sqrt(std::log(2.0)), 1e-7);
  // 1/2 (log 4/3 + 1/2 log 2/3 + 1/2 log 2)
  const double half = (std::log(4.0 / 3) + 0.5 * std::log(2.0 / 3) + 0.5 * std::log(2.0)) / 2;
  EXPECT_NEAR(jsd_sqrt(one.data(), even.data(), 4), std::sqrt(half), 1e-7);
}

TEST(BlockSums, AddLanesAsAWarp) {
  // Lane 0 holds entries 0 and 32, lane 16 entry 16: 1 is lost beside 2^60 unless those two are
  // added first.
  std::vector<float> x(40, 0.0f);
  x[0] = std::ldexp(1.0f, 60);
  x[32] = -x[0];
  x[16] = 1;
  EXPECT_EQ(warp_order_sum(x.data(), 40), 1);
  std::swap(x[16], x[32]);
  EXPECT_EQ(warp_order_sum(x.data(), 40), 0);
}

TEST(BlockSums, LastBlockMayBeRagged) {
  const std::vector<float> x{1, 2, 3, 4, 5, 6, 7};
  std::vector<float> sums(3);
  block_sums(x.data(), 7, 3, sums.data());
  EXPECT_EQ(sums, (std::vector<float>{6, 15, 7}));
}

TEST(Rows, AreTheUnionOfBlocksAndDistances) {
  std::mt19937 random(2);
  for (const int64_t n : {3, 63, 64, 65, 130, 200}) {
    const int64_t words = (n + 63) / 64;
    std::vector<uint64_t> vertical_bits(words), slash_bits(words), row(words);
    std::vector<float> vertical(n), slash(n);
    for (int64_t e = 0; e < n; ++e) {
      vertical[e] = static_cast<float>(random() % 8);  // many ties
      slash[e] = static_cast<float>(random() % 8);
    }
    const BlockChoice choice{vertical.data(), slash.data(), vertical_bits.data(),
                             slash_bits.data()};
    Histogram histogram;
    const int64_t n_v = 1 + n / 5, n_s = 1 + n / 3;
    choose_vertical_slash(n, n_v, n_s, choice, &histogram);
    // Entry 0 first, then by score, then by index.
    const auto best = [&](std::vector<float> x, int64_t count) {
      x[0] = std::numeric_limits<float>::infinity();
      return taken_by_sort(x, Weight::kCount, static_cast<uint64_t>(count));
    };
    const std::vector<bool> in_v = best(vertical, n_v), in_s = best(slash, n_s);
    for (int64_t i = 0; i < n; ++i) {
      std::fill(row.begin(), row.end(), ~uint64_t{0});
      write_row(choice, n, i, row.data());
      for (int64_t j = 0; j < 64 * words; ++j) {
        ASSERT_EQ(has_bit(row.data(), j), j <= i && (in_v[j] || in_s[i - j]))
            << "n " << n << " row " << i << " block " << j;
      }
      write_dense_row(n, i, row.data());
      for (int64_t j = 0; j < 64 * words; ++j) ASSERT_EQ(has_bit(row.data(), j), j <= i);
    }
  }
}

TEST(Rows, OfAWindowAreTheBlocksItTouches) {
  constexpr int64_t kBlock = 8, kLength = 83, kBlocks = 11;
  for (const int64_t first_position : {0, 29, 64}) {  // of the chunk
    for (const int64_t global : {0, 1, 8, 9, 200}) {
      for (const int64_t local : {1, 2, 8, 9, 17, 200}) {
        const StreamingLlm window{global, local};
        for (int64_t i = first_position / kBlock; i < kBlocks; ++i) {
          uint64_t row = 0, want = 0;
          const int64_t begin = std::max(i * kBlock, first_position);
          write_window_row(window, begin, kBlock, kBlocks, i, &row);
          for (int64_t q = begin; q < std::min((i + 1) * kBlock, kLength); ++q) {
            for (int64_t k = 0; k <= q; ++k) {
              if (k < global || q - k < local) set_bit(&want, k / kBlock);
            }
          }
          ASSERT_EQ(row, want) << "chunk at " << first_position << " global " << global << " local "
                               << local << " row " << i;
        }
      }
    }
  }
}

TEST(Map, TiesGoToTheLowerRowAndBlock) {
  // Rows 0 to 2 of four equal entries in row 3: .25 each; gamma keeps 2 of them.
  const std::vector<float> map{1, 0.5f, 0.5f, 1, 0, 0, 0.25f, 0.25f, 0.25f, 0.25f};
  Histogram histogram;
  Taken taken = cover_map(map.data(), 10, 4, 3.5f / 4, &histogram);
  std::vector<uint64_t> rows(4, 0);
  const float* row = map.data();
  for (int64_t i = 0; i < 4; row += ++i) keep_map_row(row, i, taken, &rows[i]);
  EXPECT_EQ(rows, (std::vector<uint64_t>{0b1, 0b11, 0b1, 0b11}));
}

}  // namespace
}  // namespace flexprefill

// An oracle for BlockCover, plain loops in double precision.
//
// As in select_oracle.h, an implementation whose scores are off by what fp32 rounding can do may
// decide differently at a threshold and nowhere else: for every block the oracle says whether it
// must be kept, and whether it may.
#ifndef FLEXPREFILL_TESTS_BLOCK_COVER_ORACLE_H_
#define FLEXPREFILL_TESTS_BLOCK_COVER_ORACLE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "case_table.h"
#include "select_oracle.h"
#include "test_executions.h"

namespace flexprefill::testing {

// One query head of one sequence.
class CoverOracle {
 public:
  CoverOracle(const CaseData& data, int64_t s, int32_t h) : data_(data), s_(s), h_(h) {
    const Case& c = data.c;
    kv_ = c.gqa_interleave ? h % c.h_kv : h / (c.h_q / c.h_kv);
    lengths_ = data.lengths[s];
    grid = block_grid(lengths_, c.block_size);
    block_ = c.block_size;
    pool_ = block_ <= 64 && lengths_.s_kv <= 16384 ? 16 : 32;
    offset_ = lengths_.s_kv - lengths_.s_q;
    scale_ = data.input.softmax_scale.value_or(1 / std::sqrt(static_cast<float>(c.d_qk)));
    ask();
    make_map();
  }

  BlockGrid grid;
  double slack = 4e-6;         // relative error of a score
  double largest_logit = 0;    // of the map, products by their sizes
  std::vector<Numbers> exact;  // [asking rows][n]
  std::vector<int64_t> asking_block;
  std::vector<Numbers> map;  // [n_q][n]

  // Relative error of the map's entries. All but the reference have means rounded to the element
  // type, CUDA has entries of 11 bits.
  double map_slack(const Execution& execution) const {
    const DType dtype = data_.c.dtype;
    if (execution.backend == Backend::kReference || dtype == DType::kFloat32) return slack;
    const double rounding = dtype == DType::kBFloat16 ? 0x1p-9 : 0x1p-12;
    const double entries = is_cuda(execution.backend) ? 0x1p-11 : 0;
    return slack + 4 * rounding * largest_logit + entries;
  }

  // Block 0, and the blocks with the 128 tokens before the row's own.
  bool always_keeps(int64_t i, int64_t j) const {
    return j == 0 || (j <= i && (i - j) * block_ <= 128);
  }

  // What a row without max_budget must and may keep.
  std::pair<Flags, Flags> decide(const BlockCover& pattern, double off) const {
    Flags must(grid.n_q, std::vector<bool>(grid.n_kv)), may = must;
    Numbers most(grid.n_kv, 0.0);
    for (const Numbers& row : exact) {
      for (int64_t j = 0; j < grid.n_kv; ++j) most[j] = std::max(most[j], row[j]);
    }
    std::vector<bool> must_column(grid.n_kv), may_column(grid.n_kv), none(grid.n_kv);
    cover(most, none, pattern.column_share, slack, must_column, may_column);
    for (int64_t r = 0; r < grid.n_q; ++r) {
      const int64_t i = grid.first_q_block + r;
      std::vector<bool> always(i + 1);
      for (int64_t j = 0; j <= i; ++j) always[j] = always_keeps(i, j);
      cover(Numbers(map[r].begin(), map[r].begin() + i + 1), always, pattern.gamma, off, must[r],
            may[r]);
      for (int64_t j = 0; i >= asking_block[0] && j <= i; ++j) {
        must[r][j] = must[r][j] || must_column[j];
        may[r][j] = may[r][j] || may_column[j];
      }
    }
    return {must, may};
  }

 private:
  Numbers row_of(bool query, int64_t i) const {
    return query ? data_.q_row(s_, i, h_) : data_.k_row(s_, i, kv_);
  }
  // An error of a logit is a relative error of its exponential.
  double logit(const Numbers& a, const Numbers& b) {
    const auto n = static_cast<int64_t>(a.size());
    slack = std::max(slack, 4e-7 * std::abs(scale_) * dot_of_sizes(a.data(), b.data(), n));
    return scale_ * dot(a.data(), b.data(), n);
  }
  static void softmax(Numbers& x, const Numbers& weights) {
    const double max = *std::max_element(x.begin(), x.end());
    double sum = 0;
    for (size_t e = 0; e < x.size(); ++e) sum += x[e] = weights[e] * std::exp(x[e] - max);
    for (double& value : x) value /= sum;
  }

  void ask() {
    const int64_t span = std::min<int64_t>(512, lengths_.s_q), rows = std::min<int64_t>(128, span);
    std::vector<Numbers> keys;
    for (int64_t j = 0; j < lengths_.s_kv; ++j) keys.push_back(row_of(false, j));
    for (int64_t k = 0; k < rows; ++k) {
      const int64_t i = lengths_.s_q - 1 - (rows - 1 - k) * span / rows;
      const Numbers q = row_of(true, i);
      Numbers p, mass(grid.n_kv, 0.0);
      for (int64_t j = 0; j <= offset_ + i; ++j) p.push_back(logit(q, keys[j]));
      softmax(p, Numbers(p.size(), 1.0));
      for (size_t j = 0; j < p.size(); ++j) mass[j / block_] += p[j];
      exact.push_back(mass);
      asking_block.push_back((offset_ + i) / block_);
    }
  }

  // Sums of rows of pool_ tokens; the mean of those that exist, and their number.
  std::pair<Numbers, double> pool(bool query, int64_t number) {
    Numbers mean(data_.c.d_qk, 0.0);
    double count = 0;
    for (int64_t p = pool_ * number; p < pool_ * (number + 1) && p < lengths_.s_kv; ++p) {
      if (query && p < offset_) continue;
      const Numbers row = row_of(query, query ? p - offset_ : p);
      for (size_t c = 0; c < row.size(); ++c) mean[c] += row[c];
      count += 1;
    }
    for (double& x : mean) x /= std::max(count, 1.0);
    return {mean, count};
  }

  void make_map() {
    std::vector<std::pair<Numbers, double>> keys;
    for (int64_t c = 0; pool_ * c < lengths_.s_kv; ++c) keys.push_back(pool(false, c));
    map.assign(grid.n_q, Numbers(grid.n_kv, 0.0));
    Numbers tokens(grid.n_q, 0.0);
    for (int64_t a = offset_ / pool_; pool_ * a < lengths_.s_kv; ++a) {
      const auto [q, count] = pool(true, a);
      Numbers p, weights;
      for (int64_t c = 0; c <= a; ++c) {
        const double size =
            dot_of_sizes(q.data(), keys[c].first.data(), static_cast<int64_t>(q.size()));
        largest_logit = std::max(largest_logit, std::abs(scale_) * size);
        p.push_back(logit(q, keys[c].first));
        weights.push_back(keys[c].second);
      }
      softmax(p, weights);
      const int64_t r = pool_ * a / block_ - grid.first_q_block;
      for (int64_t c = 0; c <= a; ++c) map[r][pool_ * c / block_] += count * p[c];
      tokens[r] += count;
    }
    for (int64_t r = 0; r < grid.n_q; ++r) {
      for (double& x : map[r]) x /= tokens[r];
    }
  }

  // What is always kept, then the best until they hold `share` of x.
  static void cover(const Numbers& x, const std::vector<bool>& always, double share, double off,
                    std::vector<bool>& must, std::vector<bool>& may) {
    std::vector<size_t> order;
    double total = 0, sum = 0;
    for (size_t j = 0; j < x.size(); ++j) {
      total += x[j];
      if (always[j]) sum += x[j];
      if (!always[j]) order.push_back(j);
    }
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return x[a] > x[b]; });
    // The smallest value that may be kept, and the largest that may be left out.
    double least = std::numeric_limits<double>::infinity(), left = -1;
    for (const size_t j : order) {
      if (sum < (share + off) * total && share > 0) least = x[j];
      if (sum >= (share - off) * total && left < 0) left = x[j];
      sum += x[j];
    }
    for (size_t j = 0; j < x.size(); ++j) {
      must[j] = always[j] || share >= 1 || x[j] * (1 - off) > left * (1 + off);
      may[j] = always[j] || share >= 1 || x[j] * (1 + off) >= least * (1 - off);
    }
  }

  const CaseData& data_;
  int64_t s_;
  int32_t h_;
  int32_t kv_ = 0;
  SequenceLengths lengths_;
  int64_t block_ = 0, pool_ = 0, offset_ = 0;
  double scale_ = 1;
};

}  // namespace flexprefill::testing

#endif  // FLEXPREFILL_TESTS_BLOCK_COVER_ORACLE_H_

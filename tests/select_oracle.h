// An oracle for select, independent of src/: double precision, plain sorts. For every block it
// says whether an implementation whose scores are off by a relative error of `slack` must keep it,
// may keep it, or must not. So a difference is accepted at a threshold and nowhere else.
#ifndef FLEXPREFILL_TESTS_SELECT_ORACLE_H_
#define FLEXPREFILL_TESTS_SELECT_ORACLE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "case_table.h"

namespace flexprefill::testing {

using Numbers = std::vector<double>;
using Flags = std::vector<std::vector<bool>>;  // [n_q][n_kv]

struct Range {
  int64_t low = 0, high = 0;
  bool holds(int64_t x) const { return low <= x && x <= high; }
};

// One query head of one sequence.
class Oracle {
 public:
  Oracle(const CaseData& data, int64_t sequence, int32_t head)
      : data_(data), sequence_(sequence), head_(head) {
    const Case& c = data.c;
    kv_ = c.gqa_interleave ? head % c.h_kv : head / (c.h_q / c.h_kv);
    lengths = data.lengths[sequence];
    grid = block_grid(lengths, c.block_size);
    block = c.block_size;
    for (int64_t j = 0; j < lengths.s_kv; ++j) keys_.push_back(data.k_row(sequence, j, kv_));
    scale_ = data.input.softmax_scale.value_or(1 / std::sqrt(static_cast<float>(c.d_qk)));
    probe();
  }

  SequenceLengths lengths;
  BlockGrid grid;
  int64_t block = 0;
  // Relative error of scores that rounding to fp32 on the way may cause.
  double slack = 2e-6;
  Numbers vertical, slash;         // [s_kv]
  std::vector<Numbers> attention;  // [P][s_kv]
  int64_t first_position = 0;      // of the probe
  double jsd = 0;                  // its square root

  Numbers block_sums(const Numbers& x) const {
    Numbers sums(grid.n_kv, 0.0);
    for (size_t e = 0; e < x.size(); ++e) sums[e / block] += x[e];
    return sums;
  }

  // What FlexPrefill may decide.
  struct Decision {
    bool may_be_vertical_slash = false, may_be_query_aware = false;
    Range vertical_blocks, slash_blocks;  // where it is vertical-slash
    Flags must, may;
  };

  Decision flex_prefill(const FlexPrefill& pattern) {
    compute_jsd();
    Decision out;
    // The root magnifies errors near 0.
    const double jsd_slack = 1e-5 + slack / std::max(jsd, std::sqrt(slack));
    out.may_be_query_aware = jsd < pattern.tau + jsd_slack && pattern.tau > 0;
    out.may_be_vertical_slash = jsd >= pattern.tau - jsd_slack || pattern.tau == 0;
    const int64_t low = std::clamp<int64_t>((pattern.min_budget + block - 1) / block, 1, grid.n_kv);
    const int64_t high =
        pattern.max_budget
            ? std::clamp<int64_t>((*pattern.max_budget + block - 1) / block, 1, grid.n_kv)
            : grid.n_kv;
    const auto blocks = [&](const Numbers& x, double gamma) {
      return std::clamp(cover(x, gamma) / block + 1, low, high);
    };
    const double off = pattern.gamma < 1 ? slack : 0;
    const double gamma = pattern.gamma < 1 ? pattern.gamma : 2.0;  // all of it, without rounding
    out.vertical_blocks = {blocks(vertical, gamma - off), blocks(vertical, gamma + off)};
    out.slash_blocks = {blocks(slash, gamma - off), blocks(slash, gamma + off)};
    std::vector<std::pair<Flags, Flags>> options;
    if (out.may_be_vertical_slash) {
      options.push_back(vertical_slash(out.vertical_blocks, out.slash_blocks));
    }
    if (out.may_be_query_aware) {
      options.push_back(vertical_slash({low, low}, {low, low}));
      add_map(gamma, options.back());
    }
    std::tie(out.must, out.may) = options[0];
    for (size_t o = 1; o < options.size(); ++o) {
      for (size_t i = 0; i < out.must.size(); ++i) {
        for (size_t j = 0; j < out.must[i].size(); ++j) {
          out.must[i][j] = out.must[i][j] && options[o].first[i][j];
          out.may[i][j] = out.may[i][j] || options[o].second[i][j];
        }
      }
    }
    return out;
  }

  // must and may of the best blocks and distances.
  std::pair<Flags, Flags> vertical_slash(Range n_v, Range n_s) const {
    const auto [must_v, may_v] = best(block_sums(vertical), n_v);
    const auto [must_s, may_s] = best(block_sums(slash), n_s);
    Flags must(grid.n_q, std::vector<bool>(grid.n_kv)), may = must;
    for (int64_t r = 0; r < grid.n_q; ++r) {
      const int64_t i = grid.first_q_block + r;
      for (int64_t j = 0; j <= i; ++j) {
        must[r][j] = must_v[j] || must_s[i - j];
        may[r][j] = may_v[j] || may_s[i - j];
      }
    }
    return {must, may};
  }

  // Share of the probe's mass on keys that sees(position, key).
  template <typename Sees>
  double mass(const Sees& sees) const {
    double kept = 0;
    for (size_t i = 0; i < attention.size(); ++i) {
      for (int64_t j = 0; j < lengths.s_kv; ++j) {
        if (sees(first_position + static_cast<int64_t>(i), j)) kept += attention[i][j];
      }
    }
    return kept / static_cast<double>(attention.size());
  }

  // Share of the probe's mass in blocks that keeps(row of blocks, key block).
  template <typename Keeps>
  double mass_of_blocks(const Keeps& keeps) const {
    double kept = 0;
    for (size_t i = 0; i < attention.size(); ++i) {
      const int64_t r = (first_position + static_cast<int64_t>(i)) / block - grid.first_q_block;
      const Numbers sums = block_sums(attention[i]);
      for (int64_t j = 0; j < grid.n_kv; ++j) kept += keeps(r, j) ? sums[j] : 0;
    }
    return kept / static_cast<double>(attention.size());
  }

  // #{m : x_1 + ... + x_m <= gamma} + 1, x in descending order.
  static int64_t cover(Numbers x, double gamma) {
    std::sort(x.begin(), x.end(), std::greater<>());
    int64_t count = 0;
    double sum = 0;
    for (const double value : x) count += (sum += value) <= gamma;
    return count + 1;
  }

 private:
  Numbers q(int64_t i) const { return data_.q_row(sequence_, i, head_); }
  double logit(const Numbers& a, const Numbers& b) {
    const auto n = static_cast<int64_t>(a.size());
    // An error of the logit is a relative error of its exponential.
    slack = std::max(slack, 4e-7 * scale_ * dot_of_sizes(a.data(), b.data(), n));
    return scale_ * dot(a.data(), b.data(), n);
  }
  static void softmax(Numbers& x, const Numbers& weight) {
    const double max = *std::max_element(x.begin(), x.end());
    for (size_t e = 0; e < x.size(); ++e) x[e] = weight[e] * std::exp(x[e] - max);
    const double sum = std::accumulate(x.begin(), x.end(), 0.0);
    for (double& value : x) value /= sum;
  }
  static Numbers mean(const std::vector<Numbers>& rows) {
    Numbers out(rows[0].size(), 0.0);
    for (const Numbers& row : rows) {
      for (size_t c = 0; c < out.size(); ++c) out[c] += row[c] / static_cast<double>(rows.size());
    }
    return out;
  }

  void probe() {
    const int64_t rows = std::min<int64_t>(block, lengths.s_q);
    first_position = lengths.s_kv - rows;
    vertical.assign(lengths.s_kv, 0.0);
    slash.assign(lengths.s_kv, 0.0);
    for (int64_t i = 0; i < rows; ++i) {
      const Numbers row = q(lengths.s_q - rows + i);
      Numbers a;
      for (int64_t j = 0; j <= first_position + i; ++j) a.push_back(logit(row, keys_[j]));
      softmax(a, Numbers(a.size(), 1.0));
      a.resize(lengths.s_kv, 0.0);
      for (int64_t j = 0; j <= first_position + i; ++j) {
        vertical[j] += a[j] / static_cast<double>(rows);
        slash[first_position + i - j] += a[j] / static_cast<double>(rows);
      }
      attention.push_back(a);
    }
  }

  Numbers pooled(const Numbers& q_mean, int64_t n) {
    Numbers row, share;
    for (int64_t b = 0; b < n; ++b) {
      const int64_t first = b * block, last = std::min((b + 1) * block, lengths.s_kv);
      if (b == static_cast<int64_t>(key_means_.size())) {
        key_means_.push_back(mean({keys_.begin() + first, keys_.begin() + last}));
      }
      row.push_back(logit(q_mean, key_means_[b]));
      share.push_back(static_cast<double>(last - first) / static_cast<double>(block));
    }
    softmax(row, share);
    return row;
  }
  Numbers q_mean(int64_t begin, int64_t end) const {
    std::vector<Numbers> rows;
    for (int64_t i = begin; i < end; ++i) rows.push_back(q(i));
    return mean(rows);
  }

  void compute_jsd() {
    const Numbers a =
        pooled(q_mean(lengths.s_q - std::min<int64_t>(block, lengths.s_q), lengths.s_q), grid.n_kv);
    const Numbers b = block_sums(vertical);
    double sum = 0;
    for (int64_t j = 0; j < grid.n_kv; ++j) {
      const double m = (a[j] + b[j]) / 2;
      if (a[j] > 0) sum += a[j] * std::log(a[j] / m) / 2;
      if (b[j] > 0) sum += b[j] * std::log(b[j] / m) / 2;
    }
    jsd = std::sqrt(std::max(sum, 0.0));
  }

  // Which entries must and may be among the best n, entry 0 always.
  std::pair<std::vector<bool>, std::vector<bool>> best(Numbers scores, Range n) const {
    const auto size = static_cast<int64_t>(scores.size());
    scores[0] = std::numeric_limits<double>::infinity();
    Numbers sorted = scores;
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    std::vector<bool> must(size), may(size);
    for (int64_t e = 0; e < size; ++e) {
      must[e] = n.low >= size || scores[e] * (1 - slack) > sorted[n.low] * (1 + slack);
      may[e] = scores[e] * (1 + slack) >= sorted[n.high - 1] * (1 - slack);
    }
    must[0] = true;
    return {must, may};
  }

  void add_map(double gamma, std::pair<Flags, Flags>& flags) {
    struct Entry {
      double p;
      int64_t r, j;
    };
    std::vector<Entry> entries;
    for (int64_t r = 0; r < grid.n_q; ++r) {
      const int64_t i = grid.first_q_block + r;
      const int64_t offset = lengths.s_kv - lengths.s_q;
      const Numbers row = pooled(q_mean(std::max<int64_t>(i * block - offset, 0),
                                        std::min((i + 1) * block - offset, lengths.s_q)),
                                 i + 1);
      for (int64_t j = 0; j <= i; ++j) entries.push_back({row[j], r, j});
    }
    std::sort(entries.begin(), entries.end(),
              [](const Entry& a, const Entry& b) { return a.p > b.p; });
    const double rows = static_cast<double>(grid.n_q);
    // The smallest value that is taken for sure, and the largest that is surely left.
    double sum = 0, taken = 2, left = -1;
    for (const Entry& e : entries) {
      sum += e.p;
      if (sum <= (gamma + slack) * rows) taken = e.p;
      if (sum > (gamma - slack) * rows && left < 0) left = e.p;
    }
    for (const Entry& e : entries) {
      if (e.p * (1 - slack) > left * (1 + slack)) flags.first[e.r][e.j] = true;
      if (e.p * (1 + slack) >= taken * (1 - slack)) flags.second[e.r][e.j] = true;
    }
  }

  const CaseData& data_;
  int64_t sequence_;
  int32_t head_;
  int32_t kv_ = 0;
  std::vector<Numbers> keys_, key_means_;
  double scale_ = 1;
};

}  // namespace flexprefill::testing

#endif  // FLEXPREFILL_TESTS_SELECT_ORACLE_H_

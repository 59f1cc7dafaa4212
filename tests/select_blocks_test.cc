// The patterns that score blocks one by one (XAttention, FlashPrefill, MInference): every
// backend and CPU target against plain loops in double precision.
//
// As in select_oracle.h, an implementation whose scores are off by what fp32 rounding can do may
// decide differently at a threshold and nowhere else: for every block the oracle says whether it
// must be kept, and whether it may.
#include <gtest/gtest.h>
#include <oneapi/tbb/global_control.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "case_table.h"
#include "math.h"
#include "select_oracle.h"
#include "selection.h"
#include "staged_call.h"
#include "test_executions.h"

namespace flexprefill::testing {
namespace {

using Kind = MInferenceHead::Kind;

// Scores of the blocks of a row, and which of them a rule must and may keep.
class BlockOracle {
 public:
  BlockOracle(const CaseData& data, int64_t s, int32_t h) : data_(data) {
    const Case& c = data.c;
    const int32_t kv = c.gqa_interleave ? h % c.h_kv : h / (c.h_q / c.h_kv);
    lengths_ = data.lengths[s];
    grid = block_grid(lengths_, c.block_size);
    block_ = c.block_size;
    offset_ = lengths_.s_kv - lengths_.s_q;
    scale_ = data.input.softmax_scale.value_or(1 / std::sqrt(static_cast<float>(c.d_qk)));
    for (int64_t i = 0; i < lengths_.s_q; ++i) queries_.push_back(data.q_row(s, i, h));
    for (int64_t j = 0; j < lengths_.s_kv; ++j) keys_.push_back(data.k_row(s, j, kv));
    begin();
  }

  BlockGrid grid;
  Flags must, may;
  double slack = 0;  // relative error of a score
  // FlashPrefill's means are rounded to the element type, as the CUDA backends do.
  bool rounded_means = false;

  // For every pair of a query and a key on an antidiagonal of their groups: no strided views.
  void x_attention(const XAttention& pattern) {
    begin();
    const int64_t stride = pattern.stride;
    const auto& [logits, largest] = group_logits(stride);
    slack = std::max(slack, 6e-7 * std::abs(scale_) * largest / static_cast<double>(stride));
    for (int64_t r = 0; r < grid.n_q; ++r) {
      const int64_t i = grid.first_q_block + r;
      const int64_t first = std::max(i * block_, offset_) / stride;
      const int64_t last = (std::min((i + 1) * block_, lengths_.s_kv) - 1) / stride;
      Numbers row(i + 1, 0.0);
      for (int64_t g = first; g <= last; ++g) {
        Numbers x(logits[g].begin(), logits[g].begin() + g + 1);
        for (double& value : x) value *= scale_ / static_cast<double>(stride);
        softmax(x);
        for (int64_t e = 0; e <= g; ++e) row[e * stride / block_] += x[e];
      }
      keep_share(r, row, pattern.threshold);
    }
  }

  void flash_prefill(const FlashPrefill& pattern) {
    begin();
    const auto blocks = [&](int64_t tokens) { return (tokens + block_ - 1) / block_; };
    mean_slack();
    if (rounded_means) rounding_slack();
    for (int64_t r = 0; r < grid.n_q; ++r) {
      const int64_t i = grid.first_q_block + r;
      const bool full =
          std::min((i + 1) * block_, lengths_.s_kv) > lengths_.s_kv - pattern.last_queries &&
          pattern.last_queries > 0;
      // sum over queries of exp(logit), unnormalised but for the greatest logit of the row.
      std::vector<std::vector<double>> logits(i + 1);
      double greatest = -std::numeric_limits<double>::infinity();
      for (int64_t p = std::max(i * block_, offset_); p < (i + 1) * block_ && p < lengths_.s_kv;
           ++p) {
        for (int64_t j = 0; j <= i && std::min((j + 1) * block_, lengths_.s_kv) <= p + 1; ++j) {
          logits[j].push_back(scale_ * dot(q(p - offset_), k_mean(j)));
          greatest = std::max(greatest, logits[j].back());
        }
      }
      Numbers scores(i + 1, 0.0);
      for (int64_t j = 0; j <= i; ++j) {
        for (const double x : logits[j]) scores[j] += std::exp(x - greatest);
      }
      const double top = *std::max_element(scores.begin(), scores.end());
      for (int64_t j = 0; j <= i; ++j) {
        const bool always =
            full || j < blocks(pattern.global_window) || i - j < blocks(pattern.local_window);
        const double least = static_cast<double>(pattern.alpha) * top;
        must[r][j] = always || scores[j] * (1 - slack) >= least * (1 + slack);
        may[r][j] = always || scores[j] * (1 + slack) >= least * (1 - slack);
      }
    }
  }

  void block_sparse(int64_t tokens) {
    begin();
    const int64_t count = (tokens + block_ - 1) / block_;
    mean_slack();
    for (int64_t r = 0; r < grid.n_q; ++r) {
      const int64_t i = grid.first_q_block + r;
      Numbers mean(data_.c.d_qk, 0.0);
      const int64_t begin = std::max(i * block_, offset_);
      const int64_t end = std::min((i + 1) * block_, lengths_.s_kv);
      for (int64_t p = begin; p < end; ++p) {
        const Numbers& row = q(p - offset_);
        for (size_t c = 0; c < mean.size(); ++c) {
          mean[c] += row[c] / static_cast<double>(end - begin);
        }
      }
      Numbers logits;  // of the blocks before i
      for (int64_t j = 0; j < i; ++j) logits.push_back(scale_ * dot(mean, k_mean(j)));
      Numbers sorted = logits;
      std::sort(sorted.begin(), sorted.end(), std::greater<>());
      for (int64_t j = 0; j < i; ++j) {
        // Far below the best, exponentials underflow to 0 and tie.
        const bool zero = logits[j] < sorted[0] - 85;
        must[r][j] =
            count > i || (count > 1 && !zero && logits[j] - slack > sorted[count - 1] + slack);
        may[r][j] =
            count > i || (count > 1 && (zero || logits[j] + slack >= sorted[count - 2] - slack));
      }
      must[r][i] = may[r][i] = true;
    }
  }

  void window(int64_t global, int64_t local) {
    begin();
    for (int64_t p = offset_; p < lengths_.s_kv; ++p) {
      for (int64_t j = 0; j <= p; ++j) {
        if (j < global || p - j < local) {
          must[p / block_ - grid.first_q_block][j / block_] = true;
        }
      }
    }
    may = must;
  }

 private:
  struct GroupLogits {
    std::vector<Numbers> logits;  // [groups of queries][groups of keys], sums over antidiagonals
    double largest = 0;           // of such sums, products by their sizes
  };

  void begin() {
    must = may = Flags(grid.n_q, std::vector<bool>(grid.n_kv));
    slack = 4e-6;
  }
  // Those that some query sees, once for each stride.
  const GroupLogits& group_logits(int64_t stride) {
    const auto [found, is_new] = group_logits_.try_emplace(stride);
    GroupLogits& out = found->second;
    if (!is_new) return out;
    const int64_t groups = (lengths_.s_kv + stride - 1) / stride;
    out.logits.assign(groups, Numbers(groups, 0.0));
    std::vector<Numbers> sizes = out.logits;
    for (int64_t p = offset_; p < lengths_.s_kv; ++p) {
      const int64_t group = p / stride, end = std::min((group + 1) * stride, lengths_.s_kv);
      for (int64_t j = stride - 1 - p % stride; j < end; j += stride) {
        add_logit(p, j, out.logits[group][j / stride], sizes[group][j / stride]);
        out.largest = std::max(out.largest, sizes[group][j / stride]);
      }
    }
    return out;
  }
  const Numbers& q(int64_t i) const { return queries_[i]; }
  const Numbers& k_mean(int64_t j) {
    if (k_means_.empty()) k_means_.resize(grid.n_kv);
    Numbers& mean = k_means_[j];
    if (!mean.empty()) return mean;
    const int64_t end = std::min((j + 1) * block_, lengths_.s_kv);
    mean.assign(data_.c.d_qk, 0.0);
    for (int64_t key = j * block_; key < end; ++key) {
      for (int32_t c = 0; c < data_.c.d_qk; ++c) {
        mean[c] += keys_[key][c] / static_cast<double>(end - j * block_);
      }
    }
    return mean;
  }
  static double dot(const Numbers& a, const Numbers& b) {
    return testing::dot(a.data(), b.data(), static_cast<int64_t>(a.size()));
  }
  void add_logit(int64_t p, int64_t j, double& logit, double& size) const {
    const double* query = queries_[p - offset_].data();
    const double* key = keys_[j].data();
    logit += testing::dot(query, key, data_.c.d_qk);
    size += dot_of_sizes(query, key, data_.c.d_qk);
  }
  static void softmax(Numbers& x) {
    const double max = *std::max_element(x.begin(), x.end());
    double sum = 0;
    for (double& value : x) sum += value = std::exp(value - max);
    for (double& value : x) value /= sum;
  }
  // An error of a logit is a relative error of its exponential.
  void mean_slack() {
    double q_size = 0, k_size = 0;
    for (int64_t i = 0; i < lengths_.s_q; ++i) {
      const Numbers row = q(i);
      q_size = std::max(q_size, std::sqrt(dot(row, row)));
    }
    for (const Numbers& key : keys_) k_size = std::max(k_size, std::sqrt(dot(key, key)));
    slack = std::max(slack, 4e-7 * std::abs(scale_) * q_size * k_size);
  }
  void rounding_slack() {
    const double unit = data_.c.dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
    double q_size = 0, mean_size = 0;
    for (int64_t i = 0; i < lengths_.s_q; ++i) {
      const Numbers row = q(i);
      q_size = std::max(q_size, std::sqrt(dot(row, row)));
    }
    for (int64_t j = 0; j < grid.n_kv; ++j) {
      mean_size = std::max(mean_size, std::sqrt(dot(k_mean(j), k_mean(j))));
    }
    slack += unit / 2 * std::abs(scale_) * q_size * mean_size;
  }
  // Blocks 0 and i, then the best until they reach the share.
  void keep_share(int64_t r, const Numbers& row, double threshold) {
    const auto i = static_cast<int64_t>(row.size()) - 1;
    std::vector<int64_t> order;
    for (int64_t j = 1; j < i; ++j) order.push_back(j);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return row[a] > row[b]; });
    double total = 0;
    for (const double x : row) total += x;
    const double forced = row[0] + (i > 0 ? row[i] : 0);
    // The smallest value that may be kept, and the largest that may be left out.
    double least = std::numeric_limits<double>::infinity(), left = -1, sum = forced;
    for (const int64_t j : order) {
      if (sum < (threshold + slack) * total) least = row[j];
      if (sum >= (threshold - slack) * total && left < 0) left = row[j];
      sum += row[j];
    }
    const bool all = threshold >= 1;
    for (int64_t j = 0; j <= i; ++j) {
      const bool always = all || j == 0 || j == i;
      must[r][j] = always || row[j] * (1 - slack) > left * (1 + slack);
      may[r][j] = always || row[j] * (1 + slack) >= least * (1 - slack);
    }
  }

  const CaseData& data_;
  SequenceLengths lengths_;
  int64_t block_ = 0, offset_ = 0;
  double scale_ = 1;
  std::vector<Numbers> queries_, keys_, k_means_;
  std::map<int64_t, GroupLogits> group_logits_;  // by stride
};

bool stays_short(SequenceLengths lengths, const Case& c) {
  return lengths.s_q <= c.block_size || lengths.s_kv <= 2 * c.block_size;
}

// Those that take the case's element type.
std::vector<Execution> executions_for(const CaseData& data) {
  std::vector<Execution> all = executions(Stage::kSelect);
  std::erase_if(all, [&](const Execution& e) { return !takes(e, data.c.dtype); });
  return all;
}

// Several tasks, several panels, chunks inside blocks and groups, pages.
std::vector<Case> block_cases() {
  std::vector<Case> cases = all_cases();
  cases.push_back({.name = "longer",
                   .lengths = {{1500, 1733}},
                   .d_qk = 32,
                   .d_v = 16,
                   .block_size = 128,
                   .fill = Fill::kStructured,
                   .seed = 91});
  // More than a tile of groups, of means and of query blocks, rows on 2 bytes.
  cases.push_back({.name = "many_tiles",
                   .lengths = {{2900, 4500}},
                   .h_q = 2,
                   .h_kv = 1,
                   .d_qk = 72,
                   .d_v = 16,
                   .dtype = DType::kBFloat16,
                   .block_size = 32,
                   .layout = Layout::kOdd,
                   .fill = Fill::kStructured,
                   .seed = 94});
  cases.push_back({.name = "many_sequences",
                   .lengths = {{1000, 1000}, {129, 1500}, {10, 900}, {700, 2300}},
                   .h_q = 6,
                   .h_kv = 2,
                   .d_qk = 16,
                   .d_v = 16,
                   .dtype = DType::kFloat16,
                   .block_size = 128,
                   .gqa_interleave = true,
                   .layout = Layout::kPacked,
                   .seed = 95});
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
  return cases;
}

// What is asked of one head, for all patterns of a test.
struct HeadOracles {
  HeadOracles(const CaseData& data, int64_t s, int32_t h)
      : blocks(data, s, h), on_device(data, s, h), probe(data, s, h) {
    on_device.rounded_means = true;
  }
  BlockOracle blocks, on_device;
  Oracle probe;
};

class SelectBlocksCase : public ::testing::TestWithParam<Case> {
 protected:
  const CaseData data{GetParam()};
  // One pattern on every backend; decide(oracle, the probe's, head) decides.
  template <typename Decide>
  void check(const Pattern& pattern, const Decide& decide) {
    const std::vector<Execution> all = executions_for(data);
    std::vector<Selection> selections;
    for (const Execution& execution : all) selections.push_back(run(data, pattern, execution));
    const bool has_device =
        std::any_of(all.begin(), all.end(), [](const Execution& e) { return is_cuda(e.backend); });
    int64_t blocks = 0, undecided = 0;
    for (int64_t s = 0; s < static_cast<int64_t>(data.lengths.size()); ++s) {
      for (int32_t h = 0; h < data.c.h_q; ++h) {
        auto& [want, want_on_device, mass] = oracles(s, h);
        const bool is_short = stays_short(data.lengths[s], data.c);
        HeadPattern expected = HeadPattern::kDense;
        if (!is_short) {
          expected = decide(want, mass, h);
          if (has_device) decide(want_on_device, mass, h);
        }
        for (size_t e = 0; e < selections.size(); ++e) {
          SCOPED_TRACE(execution_name(all[e]) + " sequence " + std::to_string(s) + " head " +
                       std::to_string(h));
          const BlockOracle& by = is_cuda(all[e].backend) ? want_on_device : want;
          const Selection& got = selections[e];
          EXPECT_EQ(got.head(s, h).pattern, expected);
          if (is_short) {
            EXPECT_TRUE(got.is_dense(s, h));
          } else {
            check_head(got, mass, s, h, by.must, by.may);
          }
        }
        for (size_t r = 0; r < want.must.size(); ++r) {
          for (size_t j = 0; j < want.must[r].size(); ++j) {
            ++blocks;
            undecided += want.may[r][j] && !want.must[r][j];
          }
        }
      }
    }
    // The oracle is worth something, but where scores tie by design.
    if (data.c.fill != Fill::kEqual && data.c.fill != Fill::kZeroMass) {
      EXPECT_LE(undecided, 2 + blocks / 20);
    }
  }

 private:
  HeadOracles& oracles(int64_t s, int32_t h) {
    return oracles_.try_emplace({s, h}, data, s, h).first->second;
  }
  std::map<std::pair<int64_t, int32_t>, HeadOracles> oracles_;
};

TEST_P(SelectBlocksCase, XAttention) {
  for (const XAttention& pattern :
       {XAttention{}, XAttention{8, 0.7f}, XAttention{16, 0.05f}, XAttention{8, 1.0f}}) {
    check(pattern, [&](BlockOracle& oracle, const Oracle&, int32_t) {
      oracle.x_attention(pattern);
      return HeadPattern::kBlockSparse;
    });
  }
}

TEST_P(SelectBlocksCase, FlashPrefill) {
  const int64_t block = data.c.block_size;
  for (const FlashPrefill& pattern :
       {FlashPrefill{.alpha = 0.1f, .global_window = 0, .local_window = 1, .last_queries = 0},
        FlashPrefill{.alpha = 0.9f,
                     .global_window = block,
                     .local_window = 2 * block,
                     .last_queries = block + 1},
        FlashPrefill{.alpha = 0, .last_queries = 0}, FlashPrefill{}}) {
    check(pattern, [&](BlockOracle& oracle, const Oracle&, int32_t) {
      oracle.flash_prefill(pattern);
      return HeadPattern::kBlockSparse;
    });
  }
}

TEST_P(SelectBlocksCase, MInference) {
  const int64_t block = data.c.block_size;
  // Every kind on every head in turn.
  const std::vector<MInferenceHead> kinds{{Kind::kAShape, 3, block + 5},
                                          {Kind::kBlockSparse, 2 * block + 1, 0},
                                          {Kind::kVerticalSlash, 2 * block, block},
                                          {Kind::kBlockSparse, 0, 0}};
  for (size_t shift = 0; shift < kinds.size(); ++shift) {
    std::vector<MInferenceHead> heads;
    for (int32_t h = 0; h < data.c.h_q; ++h) heads.push_back(kinds[(h + shift) % kinds.size()]);
    check(MInference{heads}, [&](BlockOracle& oracle, const Oracle& probe, int32_t h) {
      const MInferenceHead& head = heads[h];
      if (head.kind == Kind::kAShape) {
        oracle.window(head.vertical_size, head.slash_size);
        return HeadPattern::kStreaming;
      }
      if (head.kind == Kind::kBlockSparse) {
        oracle.block_sparse(head.vertical_size);
        return HeadPattern::kBlockSparse;
      }
      const auto blocks = [&](int64_t tokens) {
        const int64_t n = std::clamp<int64_t>((tokens + block - 1) / block, 1, oracle.grid.n_kv);
        return Range{n, n};
      };
      std::tie(oracle.must, oracle.may) =
          probe.vertical_slash(blocks(head.vertical_size), blocks(head.slash_size));
      return HeadPattern::kVerticalSlash;
    });
  }
}

INSTANTIATE_TEST_SUITE_P(CaseTable, SelectBlocksCase, ::testing::ValuesIn(block_cases()),
                         [](const auto& param_info) { return param_info.param.name; });

class SelectBlocksOn : public ::testing::TestWithParam<Execution> {};

Case medium_case(const Execution& execution) {
  return {.name = "medium",
          .lengths = {{700, 1200}, {700, 1200}},
          .h_q = 4,
          .h_kv = 2,
          .d_qk = 32,
          .d_v = 32,
          .dtype = widest_dtype(execution),
          .block_size = 64,
          .fill = Fill::kStructured,
          .seed = 5};
}

const std::vector<MInferenceHead> kMixedHeads{{Kind::kBlockSparse, 200, 0},
                                              {Kind::kAShape, 64, 128},
                                              {Kind::kVerticalSlash, 128, 128},
                                              {Kind::kBlockSparse, 64, 0}};
std::vector<Pattern> medium_patterns() {
  return {XAttention{}, XAttention{8, 0.5f},
          FlashPrefill{.alpha = 0.5f, .global_window = 64, .local_window = 64, .last_queries = 0},
          MInference{kMixedHeads}};
}

TEST_P(SelectBlocksOn, SameBitsForAnyNumberOfThreads) {
  if (GetParam().backend != Backend::kCpu) GTEST_SKIP() << "no threads of the CPU's";
  namespace tbb = oneapi::tbb;
  const tbb::global_control allow(tbb::global_control::max_allowed_parallelism, 8);
  const CaseData data(medium_case(GetParam()));
  for (const Pattern& pattern : medium_patterns()) {
    Execution execution = GetParam();
    execution.num_threads = 1;
    const Selection one = run(data, pattern, execution);
    for (const int32_t threads : {2, 8}) {
      execution.num_threads = threads;
      expect_equal(one, run(data, pattern, execution));
    }
  }
}

TEST_P(SelectBlocksOn, TheAuditChangesNothing) {
  const CaseData data(medium_case(GetParam()));
  for (const Pattern& pattern : medium_patterns()) {
    const Selection audited = run(data, pattern, GetParam());
    StagedCall call(data.input, {}, {}, GetParam());
    BlockIndex index;
    select(call.input, pattern, GetParam(),
           call.workspace(select_workspace_size(call.input, pattern, GetParam())), index);
    call.finish();
    EXPECT_EQ(index.indptr, audited.index.indptr);
    EXPECT_EQ(index.indices, audited.index.indices);
  }
}

TEST_P(SelectBlocksOn, ANaNKeepsItsHeadsDenseAndNoOther) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (const Pattern& pattern : medium_patterns()) {
      CaseData key(medium_case(GetParam()));
      const Selection clean = run(key, pattern, GetParam());
      key.set_k(0, 333, 1, 0, bad);
      const Selection got = run(key, pattern, GetParam());
      for (const int32_t h : {0, 1}) EXPECT_EQ(got.kept(0, h), clean.kept(0, h));
      for (const int32_t h : {2, 3}) {
        EXPECT_TRUE(got.is_dense(0, h)) << "head " << h;
        EXPECT_EQ(got.head(0, h).pattern, HeadPattern::kDense);
      }
      for (const int32_t h : {0, 1, 2, 3}) EXPECT_EQ(got.kept(1, h), clean.kept(1, h));
      CaseData query(medium_case(GetParam()));
      query.set_q(0, 100, 0, 0, bad);  // head 0 is scored by blocks in every pattern
      const Selection map = run(query, pattern, GetParam());
      EXPECT_TRUE(map.is_dense(0, 0));
      for (const int32_t h : {1, 2, 3}) EXPECT_EQ(map.kept(0, h), clean.kept(0, h));
    }
  }
}

// From key block 128 on scores are e^200 times those before: sums of FlashPrefill that go by the
// first strip of means would overflow. Of a row, the blocks of the greatest scores stay, and its
// own.
TEST_P(SelectBlocksOn, FlashPrefillScoresFarAboveTheFirstMeans) {
  CaseData data({.name = "steps",
                 .lengths = {{300, 4500}},
                 .h_q = 2,
                 .h_kv = 1,
                 .d_qk = 64,
                 .d_v = 16,
                 .dtype = widest_dtype(GetParam()),
                 .block_size = 32});
  constexpr int64_t kFirst = 128;
  for (int32_t c = 0; c < data.c.d_qk; ++c) {
    for (int64_t i = 0; i < 300; ++i) {
      for (const int32_t h : {0, 1}) data.set_q(0, i, h, c, c == 0 ? 8.0f : 0.0f);
    }
    for (int64_t j = 0; j < 4500; ++j) {
      data.set_k(0, j, 0, c, c == 0 && j >= kFirst * 32 ? 200.0f : 0.0f);
    }
  }
  const FlashPrefill pattern{
      .alpha = 0.5f, .global_window = 0, .local_window = 32, .last_queries = 0};
  const Selection got = run(data, pattern, GetParam());
  const BlockGrid grid = block_grid({300, 4500}, 32);
  for (const int32_t h : {0, 1}) {
    EXPECT_EQ(got.head(0, h).pattern, HeadPattern::kBlockSparse);
    for (int64_t r = 0; r < grid.n_q; ++r) {
      const int64_t i = grid.first_q_block + r;
      for (int64_t j = 0; j <= i; ++j) {
        EXPECT_EQ(got.keeps(0, h, r, j), j >= kFirst) << "row " << i << " block " << j;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, SelectBlocksOn, ::testing::ValuesIn(executions(Stage::kSelect)),
                         [](const auto& param_info) { return execution_name(param_info.param); });

}  // namespace
}  // namespace flexprefill::testing

// attend with the mean correction: the reference and every CPU target against plain loops in double
// precision; and compare_with_dense against whole outputs.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <string>
#include <vector>

#include "case_table.h"
#include "math.h"
#include "selection.h"
#include "staged_call.h"
#include "test_executions.h"

namespace flexprefill::testing {
namespace {

Case medium_case(DType dtype = DType::kFloat32) {
  return {.name = "medium",
          .lengths = {{700, 1200}, {700, 1200}},
          .h_q = 4,
          .h_kv = 2,
          .d_qk = 32,
          .d_v = 32,
          .dtype = dtype,
          .block_size = 64,
          .fill = Fill::kStructured,
          .seed = 5};
}

using Rows = std::vector<std::vector<double>>;

// Means of the whole blocks of x, rounded to the element type.
Rows rounded_means(const Rows& x, const Case& c) {
  const auto whole = static_cast<int64_t>(x.size()) / c.block_size;
  Rows means(whole, std::vector<double>(x[0].size(), 0.0));
  for (int64_t i = 0; i < whole * c.block_size; ++i) {
    for (size_t col = 0; col < x[i].size(); ++col) means[i / c.block_size][col] += x[i][col];
  }
  for (std::vector<double>& mean : means) {
    for (double& element : mean) {
      std::byte bytes[4];
      store_float(bytes, c.dtype, static_cast<float>(element / c.block_size));
      element = static_cast<double>(load_float(bytes, c.dtype));
    }
  }
  return means;
}

// K and V of a head as numbers, and their means.
struct Head {
  Head(const CaseData& data, int64_t s, int32_t h) {
    const Case& c = data.c;
    const int32_t kv = c.gqa_interleave ? h % c.h_kv : h / (c.h_q / c.h_kv);
    for (int64_t j = 0; j < data.lengths[s].s_kv; ++j) {
      k.push_back(data.k_row(s, j, kv));
      v.push_back(data.v_row(s, j, kv));
    }
    k_means = rounded_means(k, c);
    v_means = rounded_means(v, c);
  }
  Rows k, v, k_means, v_means;
};

// Exact attention over the kept blocks, and block_size keys at the means for each dropped one.
std::vector<double> corrected_row(const CaseData& data, const Head& head, const BlockIndex& index,
                                  int64_t s, int32_t h, int64_t i, double& lse) {
  const Case& c = data.c;
  const int64_t block = c.block_size, position = data.lengths[s].s_kv - data.lengths[s].s_q + i;
  int64_t row = 0;
  for (int64_t t = 0; t < s; ++t) row += c.h_q * block_grid(data.lengths[t], c.block_size).n_q;
  const BlockGrid grid = block_grid(data.lengths[s], c.block_size);
  row += h * grid.n_q + position / block - grid.first_q_block;
  const std::vector<double> q = data.q_row(s, i, h);
  std::vector<double> out(c.d_v, 0.0);
  double sum = 0;
  const auto add = [&](const std::vector<double>& key, const std::vector<double>& value,
                       double weight) {
    const double logit = dot(q.data(), key.data(), c.d_qk);
    const double p = weight * std::exp(logit / std::sqrt(static_cast<double>(c.d_qk)));
    sum += p;
    add_scaled(out.data(), p, value.data(), c.d_v);
  };
  for (int64_t j = 0; j <= position / block; ++j) {
    const bool kept =
        std::binary_search(index.indices.begin() + index.indptr[row],
                           index.indices.begin() + index.indptr[row + 1], static_cast<int32_t>(j));
    const int64_t begin = j * block, end = std::min((j + 1) * block, position + 1);
    if (kept) {
      for (int64_t key = begin; key < end; ++key) add(head.k[key], head.v[key], 1);
    } else if (j < position / block) {
      add(head.k_means[j], head.v_means[j], static_cast<double>(block));
    }
  }
  lse = std::log(sum);
  for (double& x : out) x = sum > 0 ? x / sum : 0;
  return out;
}

void check_corrected(const Case& c, bool empty_rows) {
  CaseData data(c);
  BlockIndex index = random_index(data, 0.4, c.seed, empty_rows);
  index.mean_correction = true;
  constexpr int64_t kEvery = 7;
  struct Want {
    std::vector<double> out;
    double lse = 0;
  };
  std::vector<Want> wanted;
  for (int64_t s = 0; s < static_cast<int64_t>(data.lengths.size()); ++s) {
    for (int32_t h = 0; h < c.h_q; ++h) {
      const Head head(data, s, h);
      for (int64_t i = 0; i < data.lengths[s].s_q; i += kEvery) {
        Want& want = wanted.emplace_back();
        want.out = corrected_row(data, head, index, s, h, i, want.lse);
      }
    }
  }
  for (Execution execution : executions(Stage::kAttend)) {
    if (!takes(execution, c.dtype)) continue;
    SCOPED_TRACE(execution_name(execution));
    execution.num_threads = 1;  // so that heads of a group share a task
    data.poison();
    StagedCall call(data, execution);
    const Workspace workspace = call.workspace(attend_workspace_size(call.input, execution));
    attend(call.input, &index, execution, workspace, call.out, call.lse);
    call.finish();
    const double ulp = c.dtype == DType::kFloat32   ? 2e-6
                       : c.dtype == DType::kFloat16 ? 0x1p-9
                                                    : 0x1p-6;
    auto next = wanted.begin();
    for (int64_t s = 0; s < static_cast<int64_t>(data.lengths.size()); ++s) {
      for (int32_t h = 0; h < c.h_q; ++h) {
        for (int64_t i = 0; i < data.lengths[s].s_q; i += kEvery) {
          const auto& [want, lse] = *next++;
          if (std::isinf(lse)) {
            ASSERT_EQ(data.lse_at(s, h, i), lse);
          } else {
            ASSERT_NEAR(data.lse_at(s, h, i), lse, c.dtype == DType::kFloat32 ? 2e-5 : 2e-3)
                << "row " << i << " head " << h;
          }
          for (int32_t col = 0; col < c.d_v; ++col) {
            ASSERT_NEAR(data.out_at(s, i, h, col), want[col], 4 * ulp)
                << "sequence " << s << " row " << i << " head " << h << " column " << col;
          }
        }
      }
    }
  }
}

TEST(MeanCorrection, MatchesPlainLoops) {
  for (const Case& c : all_cases()) {
    if (c.fill == Fill::kHuge || c.fill == Fill::kZeroMass) continue;  // exp overflows unshifted
    SCOPED_TRACE(c.name);
    check_corrected(c, false);
  }
}

TEST(MeanCorrection, RowsWithoutBlocksAreMeansAlone) {
  check_corrected({.name = "empty", .lengths = {{300, 333}}, .block_size = 32, .seed = 7}, true);
}

// A mean that is not finite reaches the rows that count it, and no row that keeps its block.
TEST(MeanCorrection, NaNAndInfinityStayWithTheRowsThatCountThem) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const int32_t block : {32, 64, 128}) {
    Case c{.name = "not_finite",
           .lengths = {{700, 720}, {40, 500}, {300, 300}},
           .h_q = 2,
           .h_kv = 2,
           .d_qk = 40,
           .d_v = 64,
           .dtype = DType::kBFloat16,
           .block_size = block,
           .layout = Layout::kPacked,
           .seed = 17};
    const auto make_data = [&] {
      CaseData data(c);
      data.set_v(0, 70, 0, 3, kNaN);
      data.set_v(0, 300, 0, 5, kInfinity);
      data.set_v(1, 499, 0, 7, -kInfinity);
      data.set_v(2, 64, 1, 60, kNaN);
      data.set_k(0, 450, 1, 0, kNaN);
      return data;
    };
    CaseData want = make_data();
    BlockIndex index = random_index(want, 0.5, 11, true);
    index.mean_correction = true;
    const auto compute = [&](CaseData& data, const Execution& execution) {
      StagedCall call(data, execution);
      attend(call.input, &index, execution,
             call.workspace(attend_workspace_size(call.input, execution)), call.out, call.lse);
      call.finish();
    };
    compute(want, {.backend = Backend::kReference});
    int64_t finite = 0, not_finite = 0;
    for (const Execution& execution : executions(Stage::kAttend)) {
      CaseData got = make_data();
      compute(got, execution);
      for (int64_t s = 0; s < 3; ++s) {
        for (int64_t i = 0; i < c.lengths[s].s_q; ++i) {
          for (int32_t h = 0; h < 2; ++h) {
            for (int32_t col = 0; col < c.d_v; ++col) {
              const float a = got.out_at(s, i, h, col), b = want.out_at(s, i, h, col);
              const std::string where = execution_name(execution) + " block " +
                                        std::to_string(block) + " sequence " + std::to_string(s) +
                                        " row " + std::to_string(i) + " head " + std::to_string(h) +
                                        " column " + std::to_string(col);
              if (std::isfinite(b)) {
                ASSERT_NEAR(a, b, 0.05) << where;
              } else {
                ASSERT_TRUE(a == b || (std::isnan(a) && std::isnan(b))) << a << " " << b << where;
              }
              ++(std::isfinite(b) ? finite : not_finite);
            }
          }
        }
      }
    }
    EXPECT_GT(not_finite, 500);
    EXPECT_GT(finite, 20 * 500);
  }
}

TEST(MeanCorrection, PrefillIsSelectAndAttend) {
  const Pattern pattern =
      FlashPrefill{.alpha = 0.5f, .global_window = 64, .local_window = 64, .last_queries = 64};
  for (const Execution& execution : executions()) {
    SCOPED_TRACE(execution_name(execution));
    CaseData data(medium_case(widest_dtype(execution)));
    StagedCall whole(data, execution);
    prefill(whole.input, pattern, execution,
            whole.workspace(prefill_workspace_size(whole.input, pattern, execution)), whole.out);
    whole.finish();
    CaseData apart(medium_case(widest_dtype(execution)));
    const Selection selection = run(apart, pattern, execution);
    EXPECT_TRUE(selection.index.mean_correction);
    EXPECT_LT(selection.index.density(), 0.9);
    StagedCall call(apart, execution);
    attend(call.input, &selection.index, execution,
           call.workspace(attend_workspace_size(call.input, execution)), call.out);
    call.finish();
    for (int64_t i = 0; i < 700; ++i) {
      for (int32_t col = 0; col < 32; ++col) {
        ASSERT_EQ(data.out_at(1, i, 2, col), apart.out_at(1, i, 2, col));
      }
    }
  }
}

TEST(MeanCorrection, IsStored) {
  const CaseData data(medium_case());
  BlockIndex index = random_index(data, 0.4, 3);
  EXPECT_FALSE(BlockIndex::deserialize(index.serialize()).mean_correction);
  index.mean_correction = true;
  const std::string stored = index.serialize();
  const BlockIndex read = BlockIndex::deserialize(stored);
  EXPECT_TRUE(read.mean_correction);
  EXPECT_EQ(read.indices, index.indices);
  index.local_window = 5;
  EXPECT_THROW(index.check(), Error);
}

// ---- compare_with_dense ---------------------------------------------------------------------

// Kept mass and error from whole matrices.
void check_comparison(const Case& c, const Pattern& pattern) {
  CaseData data(c), dense(c);
  const Execution execution{};
  WorkspaceBuffer buffer;
  const Selection selection = run(data, pattern, execution);
  const auto compute = [&](CaseData& to, const BlockIndex* index) {
    attend(to.input, index, execution, buffer.reserve(attend_workspace_size(to.input, execution)),
           to.out);
  };
  compute(data, &selection.index);
  compute(dense, nullptr);
  std::vector<DenseComparison> heads(data.lengths.size() * c.h_q);
  compare_with_dense(data.input, selection.index, data.out, 1 << 20, execution, heads);
  for (int64_t s = 0; s < static_cast<int64_t>(data.lengths.size()); ++s) {
    for (int32_t h = 0; h < c.h_q; ++h) {
      const DenseComparison& got = heads[s * c.h_q + h];
      EXPECT_EQ(got.rows, data.lengths[s].s_q);
      double difference = 0, size = 0;
      for (int64_t i = 0; i < data.lengths[s].s_q; ++i) {
        for (int32_t col = 0; col < c.d_v; ++col) {
          const double exact = dense.out_at(s, i, h, col);
          difference += std::pow(data.out_at(s, i, h, col) - exact, 2);
          size += exact * exact;
        }
      }
      EXPECT_NEAR(got.error, std::sqrt(difference / size), 1e-4);
      EXPECT_LE(got.least_kept_mass, got.kept_mass + 1e-6);
      if (selection.is_dense(s, h) && selection.index.local_window == 0) {
        EXPECT_NEAR(got.least_kept_mass, 1, 1e-6);
      }
    }
  }
}

TEST(CompareWithDense, GivesTheErrorAndTheMass) {
  Case batch = medium_case();
  batch.lengths = {{300, 600}, {300, 600}};
  check_comparison(batch, VerticalSlash{128, 128});
  check_comparison(batch, StreamingLlm{10, 70});
  check_comparison(batch, FlashPrefill{.alpha = 0.9f, .local_window = 64, .last_queries = 0});
  Case packed{.name = "packed", .lengths = {{300, 300}, {70, 333}}, .block_size = 32};
  packed.layout = Layout::kPacked;
  check_comparison(packed, VerticalSlash{32, 32});
  packed.layout = Layout::kPaged;
  check_comparison(packed, XAttention{8, 0.5f});
}

TEST(CompareWithDense, TheProbesRowsHaveTheAuditsMass) {
  // All rows but one are the probe.
  const Case c{.name = "probe", .lengths = {{65, 900}}, .block_size = 64, .seed = 3};
  CaseData data(c);
  const Selection selection = run(data, VerticalSlash{128, 128}, {});
  WorkspaceBuffer buffer;
  attend(data.input, &selection.index, {}, buffer.reserve(attend_workspace_size(data.input, {})),
         data.out);
  std::vector<DenseComparison> all(2), last(2);
  compare_with_dense(data.input, selection.index, data.out, 65, {}, all);
  compare_with_dense(data.input, selection.index, data.out, 1, {}, last);
  for (int32_t h = 0; h < 2; ++h) {
    EXPECT_NEAR(all[h].kept_mass, selection.head(0, h).kept_mass, 0.02);
    EXPECT_EQ(last[h].rows, 1);
    EXPECT_EQ(last[h].kept_mass, last[h].least_kept_mass);
    EXPECT_GT(last[h].error, 0);
  }
  EXPECT_THROW(compare_with_dense(data.input, selection.index, data.out, 0, {}, all), Error);
  EXPECT_THROW(compare_with_dense(data.input, selection.index, data.out, 5,
                                  {.backend = Backend::kSm80}, all),
               Error);
  all.resize(1);
  EXPECT_THROW(compare_with_dense(data.input, selection.index, data.out, 5, {}, all), Error);
}

}  // namespace
}  // namespace flexprefill::testing

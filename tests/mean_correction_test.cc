// attend with the mean correction: the reference and every CPU target against plain loops in double
// precision.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "case_table.h"
#include "math.h"
#include "selection.h"
#include "test_executions.h"

namespace flexprefill::testing {
namespace {

Case medium_case() {
  return {.name = "medium",
          .lengths = {{700, 1200}, {700, 1200}},
          .h_q = 4,
          .h_kv = 2,
          .d_qk = 32,
          .d_v = 32,
          .block_size = 64,
          .fill = Fill::kStructured,
          .seed = 5};
}

// Exact attention over the kept blocks, and block_size keys at the means for each dropped one.
std::vector<double> corrected_row(const CaseData& data, const BlockIndex& index, int64_t s,
                                  int32_t h, int64_t i, double& lse) {
  const Case& c = data.c;
  const int32_t kv = c.gqa_interleave ? h % c.h_kv : h / (c.h_q / c.h_kv);
  const int64_t block = c.block_size, position = data.lengths[s].s_kv - data.lengths[s].s_q + i;
  int64_t row = 0;
  for (int64_t t = 0; t < s; ++t) row += c.h_q * block_grid(data.lengths[t], c.block_size).n_q;
  const BlockGrid grid = block_grid(data.lengths[s], c.block_size);
  row += h * grid.n_q + position / block - grid.first_q_block;
  const auto rounded = [&](double x) {
    std::byte bytes[4];
    store_float(bytes, c.dtype, static_cast<float>(x));
    return static_cast<double>(load_float(bytes, c.dtype));
  };
  std::vector<double> out(c.d_v, 0.0);
  double sum = 0;
  const auto add = [&](auto&& key, auto&& value, double weight) {
    double logit = 0;
    for (int32_t col = 0; col < c.d_qk; ++col) {
      logit += static_cast<double>(data.q(s, i, h, col)) * key(col);
    }
    const double p = weight * std::exp(logit / std::sqrt(static_cast<double>(c.d_qk)));
    sum += p;
    for (int32_t col = 0; col < c.d_v; ++col) out[col] += p * value(col);
  };
  for (int64_t j = 0; j <= position / block; ++j) {
    const bool kept =
        std::binary_search(index.indices.begin() + index.indptr[row],
                           index.indices.begin() + index.indptr[row + 1], static_cast<int32_t>(j));
    const int64_t begin = j * block, end = std::min((j + 1) * block, position + 1);
    if (kept) {
      for (int64_t key = begin; key < end; ++key) {
        add([&](int32_t col) { return static_cast<double>(data.k(s, key, kv, col)); },
            [&](int32_t col) { return static_cast<double>(data.v(s, key, kv, col)); }, 1);
      }
    } else if (j < position / block) {
      const auto mean = [&](auto&& element) {
        double total = 0;
        for (int64_t key = begin; key < end; ++key) total += static_cast<double>(element(key));
        return rounded(total / static_cast<double>(block));
      };
      add([&](int32_t col) { return mean([&](int64_t key) { return data.k(s, key, kv, col); }); },
          [&](int32_t col) { return mean([&](int64_t key) { return data.v(s, key, kv, col); }); },
          static_cast<double>(block));
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
  for (const Execution& execution : host_executions()) {
    SCOPED_TRACE(execution_name(execution));
    WorkspaceBuffer buffer;
    const Workspace workspace = buffer.reserve(attend_workspace_size(data.input, execution));
    std::memset(workspace.data, 0xff, workspace.bytes);
    data.poison();
    attend(data.input, &index, execution, workspace, data.out, data.lse);
    const double ulp = c.dtype == DType::kFloat32   ? 2e-6
                       : c.dtype == DType::kFloat16 ? 0x1p-9
                                                    : 0x1p-6;
    for (int64_t s = 0; s < static_cast<int64_t>(data.lengths.size()); ++s) {
      for (int64_t i = 0; i < data.lengths[s].s_q; i += 7) {
        for (int32_t h = 0; h < c.h_q; ++h) {
          double lse = 0;
          const std::vector<double> want = corrected_row(data, index, s, h, i, lse);
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

TEST(MeanCorrection, PrefillIsSelectAndAttend) {
  CaseData data(medium_case());
  const Pattern pattern =
      FlashPrefill{.alpha = 0.5f, .global_window = 64, .local_window = 64, .last_queries = 64};
  for (const Execution& execution : host_executions()) {
    WorkspaceBuffer buffer;
    prefill(data.input, pattern, execution,
            buffer.reserve(prefill_workspace_size(data.input, pattern, execution)), data.out);
    CaseData apart(medium_case());
    const Selection selection = run(apart, pattern, execution);
    EXPECT_TRUE(selection.index.mean_correction);
    EXPECT_LT(selection.index.density(), 0.9);
    attend(apart.input, &selection.index, execution,
           buffer.reserve(attend_workspace_size(apart.input, execution)), apart.out);
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

}  // namespace
}  // namespace flexprefill::testing

// A call whose elements lie beyond 2^31: 1M tokens and 4 heads within rows of 4096 elements. Needs
// 40 GB of device memory and is skipped where there is less.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "device_memory.h"
#include "flexprefill/flexprefill.h"
#include "math.h"
#include "test_executions.h"

namespace flexprefill::testing {
namespace {

constexpr int64_t kTokens = 1 << 20;
constexpr int32_t kHeadsQ = 4, kHeadsKv = 2, kDim = 128;
constexpr int64_t kWideRow = 4096;  // elements; kTokens of them reach 2^32

// bf16 of random sign, from 0.5 to 2.
std::vector<uint16_t> random_rows(int32_t heads, uint64_t seed) {
  std::vector<uint16_t> rows(kTokens * heads * kDim);
  uint64_t state = seed;
  for (size_t e = 0; e < rows.size(); e += 4) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    for (size_t i = 0; i < 4; ++i) {
      const auto bits = static_cast<uint16_t>(state >> (16 * i));
      rows[e + i] = static_cast<uint16_t>((bits & 0x80ff) | 0x3f00);
    }
  }
  return rows;
}

// Device memory of kTokens rows, `row` elements apart; what lies between them is NaN.
class Rows {
 public:
  Rows(int32_t heads, int64_t row)
      : heads_(heads), row_(row), memory_(((kTokens - 1) * row + heads * kDim) * 2) {}
  void write(const std::vector<uint16_t>& from) const {
    copy(memory_.data(), row_, from.data(), heads_ * kDim, cudaMemcpyHostToDevice);
  }
  std::vector<uint16_t> read() const {
    std::vector<uint16_t> to(kTokens * heads_ * kDim);
    copy(to.data(), heads_ * kDim, memory_.data(), row_, cudaMemcpyDeviceToHost);
    return to;
  }
  TensorView view() const {
    const std::array<int64_t, 4> shape{1, kTokens, heads_, kDim};
    TensorView view = contiguous_view(memory_.data(), DType::kBFloat16, shape);
    view.strides = {kTokens * row_, row_, kDim, 1};
    return view;
  }

 private:
  void copy(void* to, int64_t to_row, const void* from, int64_t from_row,
            cudaMemcpyKind kind) const {
    expect_cuda(cudaMemcpy2D(to, to_row * 2, from, from_row * 2, heads_ * kDim * 2, kTokens, kind),
                "copy of rows");
  }

  int32_t heads_;
  int64_t row_;
  DeviceMemory memory_;
};

struct Inputs {
  std::vector<uint16_t> q = random_rows(kHeadsQ, 1), k = random_rows(kHeadsKv, 2),
                        v = random_rows(kHeadsKv, 3);

  static double at(const std::vector<uint16_t>& rows, int32_t heads, int64_t i, int32_t h,
                   int32_t col) {
    return bf16_to_float(rows[(i * heads + h) * kDim + col]);
  }
  // One row of the output over the blocks of an index.
  std::vector<double> row(const BlockIndex& index, int64_t i, int32_t h) const {
    const int64_t r = h * (kTokens / index.block_size) + i / index.block_size;
    std::vector<double> logits;
    std::vector<int64_t> keys;
    for (int64_t e = index.indptr[r]; e < index.indptr[r + 1]; ++e) {
      const int64_t first = int64_t{index.indices[e]} * index.block_size;
      for (int64_t j = first; j < first + index.block_size && j <= i; ++j) {
        double dot = 0;
        for (int32_t col = 0; col < kDim; ++col) {
          dot += at(q, kHeadsQ, i, h, col) * at(k, kHeadsKv, j, h / 2, col);
        }
        keys.push_back(j);
        logits.push_back(dot / std::sqrt(static_cast<double>(kDim)));
      }
    }
    const double max = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (double& logit : logits) sum += logit = std::exp(logit - max);
    std::vector<double> out(kDim, 0.0);
    for (size_t e = 0; e < keys.size(); ++e) {
      for (int32_t col = 0; col < kDim; ++col) {
        out[col] += logits[e] / sum * at(v, kHeadsKv, keys[e], h / 2, col);
      }
    }
    return out;
  }
};

class CudaLarge : public ::testing::TestWithParam<Execution> {};

TEST_P(CudaLarge, OffsetsBeyond2To31Elements) {
  size_t free = 0, total = 0;
  ASSERT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
  if (free < size_t{40} << 30) GTEST_SKIP() << "less than 40 GB of device memory are free";
  const Inputs inputs;
  const Pattern pattern = VerticalSlash{1024, 1024};
  BlockIndex index;
  std::vector<uint16_t> compact_out;
  for (const int64_t row : {int64_t{0}, kWideRow}) {
    const bool wide = row != 0;
    const Rows q(kHeadsQ, wide ? row : kHeadsQ * kDim), out(kHeadsQ, wide ? row : kHeadsQ * kDim);
    const Rows k(kHeadsKv, wide ? row : kHeadsKv * kDim), v(kHeadsKv, wide ? row : kHeadsKv * kDim);
    q.write(inputs.q);
    k.write(inputs.k);
    v.write(inputs.v);
    AttentionInput input;
    input.q = q.view();
    input.k = k.view();
    input.v = v.view();
    const DeviceMemory workspace(std::max(prefill_workspace_size(input, pattern, GetParam()),
                                          select_workspace_size(input, pattern, GetParam())));
    const Workspace scratch{workspace.data(), workspace.size()};
    prefill(input, pattern, GetParam(), scratch, out.view());
    const std::vector<uint16_t> got = out.read();
    workspace.check_guards("workspace");
    if (wide) {
      EXPECT_EQ(std::memcmp(got.data(), compact_out.data(), got.size() * 2), 0);
      continue;
    }
    compact_out = got;
    select(input, pattern, GetParam(), scratch, index);
    index.check();
    for (const int64_t i : {int64_t{0}, int64_t{77777}, kTokens / 2 + 1, kTokens - 1}) {
      for (int32_t h = 0; h < kHeadsQ; ++h) {
        const std::vector<double> want = inputs.row(index, i, h);
        for (int32_t col = 0; col < kDim; ++col) {
          ASSERT_NEAR(Inputs::at(got, kHeadsQ, i, h, col), want[col],
                      0.01 * std::abs(want[col]) + 0.01)
              << "row " << i << " head " << h << " column " << col;
        }
      }
    }
  }
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(CudaLarge);
INSTANTIATE_TEST_SUITE_P(Targets, CudaLarge, ::testing::ValuesIn(cuda_executions(Stage::kPrefill)),
                         [](const auto& param_info) { return execution_name(param_info.param); });

}  // namespace
}  // namespace flexprefill::testing

// The blocks and outputs of the method's published code (tests/data/golden/README.md), kept exactly
// by every backend and CPU target.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "flexprefill/flexprefill.h"
#include "math.h"
#include "npz.h"
#include "staged_call.h"
#include "test_executions.h"

namespace flexprefill::testing {
namespace {

struct Golden {
  std::vector<int64_t> q_shape, kv_shape;
  std::vector<float> q, k, v;           // fp32
  std::vector<uint16_t> q16, k16, v16;  // the same numbers as bf16
  std::vector<uint8_t> active;          // [h_q, n, ceil(n / 8)]
  std::vector<uint16_t> out;            // fp16, [ceil(s / 16), h_q, d]
  std::vector<float> jsd_sqrt;          // [h_q]
  FlexPrefill pattern;
  int32_t block_size = 0;
  bool gqa_interleave = false;

  AttentionInput input(DType dtype) {
    const auto view = [&](std::vector<float>& wide, std::vector<uint16_t>& narrow,
                          const std::vector<int64_t>& shape) {
      void* data = dtype == DType::kFloat32 ? static_cast<void*>(wide.data()) : narrow.data();
      return contiguous_view(data, dtype, shape);
    };
    AttentionInput in;
    in.q = view(q, q16, q_shape);
    in.k = view(k, k16, kv_shape);
    in.v = view(v, v16, kv_shape);
    in.block_size = block_size;
    in.gqa_interleave = gqa_interleave;
    return in;
  }
};

Golden load(const std::string& name) {
  const auto arrays = read_npz(std::string(FLEXPREFILL_TEST_DATA) + "/golden/" + name + ".npz");
  const auto integer = [&](const char* key) { return arrays.at(key).values<int64_t>("<i8").at(0); };
  const auto real = [&](const char* key) {
    return static_cast<float>(arrays.at(key).values<double>("<f8").at(0));
  };
  Golden g;
  g.q_shape = arrays.at("q").shape;
  g.kv_shape = arrays.at("k").shape;
  g.q16 = arrays.at("q").values<uint16_t>("<i2");
  g.k16 = arrays.at("k").values<uint16_t>("<i2");
  g.v16 = arrays.at("v").values<uint16_t>("<i2");
  const auto widen = [](const std::vector<uint16_t>& narrow) {
    std::vector<float> wide;
    for (const uint16_t bits : narrow) wide.push_back(bf16_to_float(bits));
    return wide;
  };
  g.q = widen(g.q16);
  g.k = widen(g.k16);
  g.v = widen(g.v16);
  g.active = arrays.at("active").bytes;
  g.out = arrays.at("out").values<uint16_t>("<f2");
  g.jsd_sqrt = arrays.at("js").values<float>("<f4");
  g.pattern.gamma = real("gamma");
  g.pattern.tau = real("tau");
  g.pattern.min_budget = integer("min_budget");
  if (integer("max_budget") >= 0) g.pattern.max_budget = integer("max_budget");
  g.block_size = static_cast<int32_t>(integer("block_size"));
  g.gqa_interleave = arrays.at("gqa_interleave").bytes.at(0) != 0;
  return g;
}

class GoldenFile : public ::testing::TestWithParam<const char*> {};

TEST_P(GoldenFile, KeepsExactlyThePublishedBlocks) {
  Golden golden = load(GetParam());
  const int64_t h_q = golden.q_shape[2];
  const int64_t n = golden.q_shape[1] / golden.block_size;
  for (const Execution& execution : executions(Stage::kSelect)) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      if (!takes(execution, dtype)) continue;
      SCOPED_TRACE(execution_name(execution) + (dtype == DType::kFloat32 ? " fp32" : " bf16"));
      StagedCall call(golden.input(dtype), {}, {}, execution);
      const size_t bytes = select_workspace_size(call.input, golden.pattern, execution);
      BlockIndex index;
      std::vector<HeadAudit> audit(h_q);
      select(call.input, golden.pattern, execution, call.workspace(bytes), index, audit);
      call.finish();
      index.check();
      for (int64_t h = 0; h < h_q; ++h) {
        EXPECT_NEAR(audit[h].jsd_sqrt, golden.jsd_sqrt[h], 1e-4) << "head " << h;
        EXPECT_EQ(audit[h].pattern == HeadPattern::kQueryAware,
                  golden.jsd_sqrt[h] < golden.pattern.tau);
        for (int64_t i = 0; i < n; ++i) {
          std::vector<int32_t> want;
          const uint8_t* row = golden.active.data() + (h * n + i) * ((n + 7) / 8);
          for (int32_t j = 0; j < n; ++j) {
            if (row[j / 8] >> (j % 8) & 1) want.push_back(j);
          }
          const std::vector<int32_t> got(index.indices.begin() + index.indptr[h * n + i],
                                         index.indices.begin() + index.indptr[h * n + i + 1]);
          EXPECT_EQ(got, want) << "head " << h << " query block " << i;
        }
      }
    }
  }
}

TEST_P(GoldenFile, GivesTheOutputOverThePublishedBlocks) {
  Golden golden = load(GetParam());
  const int64_t s = golden.q_shape[1], h_q = golden.q_shape[2], d = golden.q_shape[3];
  for (const Execution& execution : executions()) {
    SCOPED_TRACE(execution_name(execution));
    const DType dtype = widest_dtype(execution);
    const auto size = static_cast<int64_t>(element_size(dtype));
    std::vector<std::byte> memory(s * h_q * d * size);
    const TensorView out = contiguous_view(memory.data(), dtype, golden.q_shape);
    StagedCall call(golden.input(dtype), out, {}, execution);
    const size_t bytes = prefill_workspace_size(call.input, golden.pattern, execution);
    prefill(call.input, golden.pattern, execution, call.workspace(bytes), call.out);
    call.finish();
    // The file's rounding to fp16 and fp32's own error; or bf16's rounding, of probabilities too.
    const double relative = dtype == DType::kFloat32 ? 6e-4 : 1.0 / 128;
    const double absolute = dtype == DType::kFloat32 ? 2e-5 : 1.0 / 64;
    for (int64_t i = 0; i < s; i += 16) {
      for (int64_t e = 0; e < h_q * d; ++e) {
        const double want = fp16_to_float(golden.out[i / 16 * h_q * d + e]);
        ASSERT_NEAR(load_float(memory.data() + (i * h_q * d + e) * size, dtype), want,
                    relative * std::abs(want) + absolute)
            << "row " << i << " element " << e;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Published, GoldenFile,
                         ::testing::Values("mixed_4k_d64_g95", "random_1k_d64_tau1",
                                           "random_2k_d64", "structured_1k_d128_tau0",
                                           "structured_2k_d16", "structured_2k_d32",
                                           "structured_2k_d64", "structured_4k_d32_budget",
                                           "topics_2k_d64_interleave", "topics_4k_d32"),
                         [](const auto& param_info) { return std::string(param_info.param); });

}  // namespace
}  // namespace flexprefill::testing

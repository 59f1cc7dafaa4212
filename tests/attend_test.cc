// attend: every backend and CPU target against the double-precision reference.
//
// Tolerance: the error against the reference (run on the inputs upcast to fp32, so that its result
// is not rounded) is at most twice that of the same computation done naively in the input's type,
// plus a few units in the last place.
#include <gtest/gtest.h>
#include <oneapi/tbb/global_control.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "case_table.h"
#include "math.h"
#include "problem.h"
#include "staged_call.h"
#include "test_executions.h"

namespace flexprefill::testing {
namespace {

float round_to(float value, DType dtype) {
  std::byte bytes[4];
  store_float(bytes, dtype, value);
  return load_float(bytes, dtype);
}

float ulp(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return std::ldexp(1.0f, -23);
    case DType::kFloat16:
      return std::ldexp(1.0f, -10);
    case DType::kBFloat16:
      return std::ldexp(1.0f, -7);
  }
  return 0;
}

// Keys that a row sees, ascending; index nullptr: all up to its own.
std::vector<int64_t> seen_keys(const CaseData& data, const BlockIndex* index, int64_t s, int32_t h,
                               int64_t position) {
  const int64_t block = data.c.block_size;
  std::vector<int64_t> keys;
  if (index == nullptr) {
    for (int64_t j = 0; j <= position; ++j) keys.push_back(j);
    return keys;
  }
  int64_t row = 0;
  for (int64_t t = 0; t < s; ++t) row += data.c.h_q * block_grid(data.lengths[t], block).n_q;
  const BlockGrid grid = block_grid(data.lengths[s], block);
  row += h * grid.n_q + position / block - grid.first_q_block;
  const bool window = index->global_window > 0 || index->local_window > 0;
  for (int64_t e = index->indptr[row]; e < index->indptr[row + 1]; ++e) {
    const int64_t first = index->indices[e] * block;
    for (int64_t j = first; j < first + block && j <= position; ++j) {
      if (!window || j < index->global_window || position - j < index->local_window) {
        keys.push_back(j);
      }
    }
  }
  return keys;
}

// K and V of a head as numbers, row by row.
struct KeysAndValues {
  KeysAndValues(const CaseData& data, int64_t s, int32_t h) {
    const int32_t kv = data.c.gqa_interleave ? h % data.c.h_kv : h / (data.c.h_q / data.c.h_kv);
    for (int64_t j = 0; j < data.lengths[s].s_kv; ++j) {
      const std::vector<double> key = data.k_row(s, j, kv), value = data.v_row(s, j, kv);
      k.emplace_back(key.begin(), key.end());
      v.emplace_back(value.begin(), value.end());
    }
  }
  std::vector<std::vector<float>> k, v;
};

// One row as a framework without a fused kernel would: fp32 logits, probabilities rounded to the
// element type, fp32 sums, the result rounded.
std::vector<float> naive_row(const CaseData& data, const KeysAndValues& head,
                             const BlockIndex* index, int64_t s, int32_t h, int64_t i) {
  const Case& c = data.c;
  const std::vector<double> row = data.q_row(s, i, h);
  const std::vector<float> q(row.begin(), row.end());
  const int64_t position = data.lengths[s].s_kv - data.lengths[s].s_q + i;
  const float scale =
      data.input.softmax_scale.value_or(1.0f / std::sqrt(static_cast<float>(c.d_qk)));
  const std::vector<int64_t> keys = seen_keys(data, index, s, h, position);
  std::vector<float> logits;
  float max = -std::numeric_limits<float>::infinity();
  for (const int64_t j : keys) {
    logits.push_back(dot(q.data(), head.k[j].data(), c.d_qk) * scale);
    max = std::max(max, logits.back());
  }
  float sum = 0;
  for (float& logit : logits) sum += logit = std::exp(logit - max);
  std::vector<float> out(c.d_v, 0.0f);
  for (size_t e = 0; e < keys.size(); ++e) {
    const float p = round_to(logits[e] / sum, c.dtype);
    add_scaled(out.data(), p, head.v[keys[e]].data(), c.d_v);
  }
  for (float& element : out) element = round_to(element, c.dtype);
  return out;
}

void run(CaseData& data, const BlockIndex* index, const Execution& execution) {
  data.poison();
  StagedCall call(data, execution);
  const Workspace workspace = call.workspace(attend_workspace_size(call.input, execution));
  attend(call.input, index, execution, workspace, call.out, call.lse);
  call.finish();
}

// What a case must give: the exact result and how far the naive one is from it.
struct Expected {
  CaseData exact;
  double tolerance = 0;
};

Expected expect(const CaseData& data, const BlockIndex* index) {
  Expected expected{data.as_float32()};
  CaseData& exact = expected.exact;
  run(exact, index, {.backend = Backend::kReference});
  double naive_error = 0, largest = 0;
  for (int64_t s = 0; s < static_cast<int64_t>(data.lengths.size()); ++s) {
    for (int32_t h = 0; h < data.c.h_q; ++h) {
      const KeysAndValues head(data, s, h);
      for (int64_t i = 0; i < data.lengths[s].s_q; ++i) {
        const std::vector<float> naive = naive_row(data, head, index, s, h, i);
        for (int32_t col = 0; col < data.c.d_v; ++col) {
          const double want = exact.out_at(s, i, h, col);
          naive_error = std::max(naive_error, std::abs(naive[col] - want));
          largest = std::max(largest, std::abs(want));
        }
      }
    }
  }
  // The reference itself must agree with the naive rows; logits of several hundred cost the naive
  // ones eight bits.
  EXPECT_LE(naive_error, 256 * ulp(data.c.dtype) * largest);
  expected.tolerance = 2 * naive_error + 4 * ulp(data.c.dtype) * largest;
  return expected;
}

void check(CaseData& data, const BlockIndex* index, const Execution& execution,
           const Expected& expected) {
  run(data, index, execution);
  for (int64_t s = 0; s < static_cast<int64_t>(data.lengths.size()); ++s) {
    for (int64_t i = 0; i < data.lengths[s].s_q; ++i) {
      for (int32_t h = 0; h < data.c.h_q; ++h) {
        const float lse = data.lse_at(s, h, i), exact_lse = expected.exact.lse_at(s, h, i);
        if (std::isinf(exact_lse)) {
          ASSERT_EQ(lse, exact_lse);
        } else {
          ASSERT_NEAR(lse, exact_lse, 2e-5 + 3e-6 * std::abs(exact_lse))
              << "lse of sequence " << s << " head " << h << " row " << i;
        }
        for (int32_t col = 0; col < data.c.d_v; ++col) {
          ASSERT_NEAR(data.out_at(s, i, h, col), expected.exact.out_at(s, i, h, col),
                      expected.tolerance)
              << "sequence " << s << " row " << i << " head " << h << " column " << col;
        }
      }
    }
  }
}

// One case on every backend and target.
void check_everywhere(const Case& c, const BlockIndex* index) {
  CaseData data(c);
  const Expected expected = expect(data, index);
  for (const Execution& execution : executions(Stage::kAttend)) {
    if (!takes(execution, c.dtype)) continue;
    SCOPED_TRACE(execution_name(execution));
    check(data, index, execution, expected);
  }
}

class AttendCase : public ::testing::TestWithParam<Case> {};

TEST_P(AttendCase, DenseMatchesReference) { check_everywhere(GetParam(), nullptr); }

TEST_P(AttendCase, RandomIndexMatchesReference) {
  const BlockIndex index = random_index(CaseData(GetParam()), 0.3, GetParam().seed);
  check_everywhere(GetParam(), &index);
}

INSTANTIATE_TEST_SUITE_P(CaseTable, AttendCase, ::testing::ValuesIn(all_cases()),
                         [](const auto& param_info) { return param_info.param.name; });

class AttendOn : public ::testing::TestWithParam<Execution> {};

Case small_case(DType dtype) {
  return {.name = "small", .lengths = {{300, 333}}, .dtype = dtype, .block_size = 64, .seed = 7};
}

TEST_P(AttendOn, RowsWithoutBlocksGiveZeroAndMinusInfinity) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    if (!takes(GetParam(), dtype)) continue;
    CaseData data(small_case(dtype));
    const BlockIndex index = random_index(data, 0.4, 3, true);
    check(data, &index, GetParam(), expect(data, &index));
  }
}

TEST_P(AttendOn, TokenWindowIsExact) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  using Windows = std::pair<int64_t, int64_t>;  // global, local
  for (const auto& [global, local] :
       {Windows{10, 70}, {0, 1}, {64, 128}, {1, 299}, {3, kMost}, {kMost, kMost}}) {
    CaseData data(small_case(DType::kBFloat16));
    BlockIndex index = dense_block_index(data.lengths, data.c.h_q, data.c.block_size);
    index.global_window = global;
    index.local_window = local;
    check(data, &index, GetParam(), expect(data, &index));
  }
}

TEST_P(AttendOn, SoftmaxScaleIsUsed) {
  for (const float scale : {0.37f, 0.0f, -0.2f}) {
    CaseData data(small_case(widest_dtype(GetParam())));
    data.input.softmax_scale = scale;
    check(data, nullptr, GetParam(), expect(data, nullptr));
  }
}

// Where exact attention has a NaN or an infinity, and nowhere else.
TEST_P(AttendOn, NonFiniteValuesStayWhereTheyBelong) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  using Kind = std::pair<DType, int32_t>;  // and block size
  for (const auto& [dtype, block_size] : {Kind{DType::kFloat32, 64}, Kind{DType::kBFloat16, 64},
                                          Kind{DType::kFloat16, 64}, Kind{DType::kBFloat16, 128}}) {
    if (!takes(GetParam(), dtype)) continue;
    for (const float bad : {nan, inf, -inf}) {
      for (const char tensor : {'q', 'k', 'v'}) {
        Case c = small_case(dtype);
        c.block_size = block_size;
        CaseData data(c);
        if (tensor == 'q') data.set_q(0, 100, 0, 5, bad);
        if (tensor == 'k') data.set_k(0, 150, 0, 5, bad);
        if (tensor == 'v') data.set_v(0, 150, 0, 5, bad);
        run(data, nullptr, GetParam());
        CaseData exact(data.as_float32());
        run(exact, nullptr, {.backend = Backend::kReference});
        for (int64_t i = 0; i < 300; ++i) {
          for (int32_t h = 0; h < 2; ++h) {
            for (int32_t col = 0; col < 64; ++col) {
              const float got = data.out_at(0, i, h, col), want = exact.out_at(0, i, h, col);
              ASSERT_EQ(std::isfinite(got), std::isfinite(want))
                  << tensor << " " << bad << " row " << i << " head " << h << " col " << col
                  << " got " << got << " want " << want;
              if (std::isinf(want)) {
                ASSERT_EQ(got, want);
              }
            }
          }
        }
      }
    }
  }
}

// On one thread heads of a group share what is loaded: four and three of seven, whose rows of the
// index differ and of which some are empty.
TEST_P(AttendOn, HeadsOfAGroupKeepBlocksOfTheirOwn) {
  if (GetParam().backend != Backend::kCpu) GTEST_SKIP() << "no threads of ours";
  Execution execution = GetParam();
  execution.num_threads = 1;
  for (const bool interleave : {false, true}) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      CaseData data({.name = "group_of_seven",
                     .lengths = {{600, 650}, {70, 70}},
                     .h_q = 14,
                     .h_kv = 2,
                     .dtype = dtype,
                     .gqa_interleave = interleave,
                     .layout = Layout::kPacked});
      const BlockIndex index = random_index(data, 0.3, 5, true);
      check(data, &index, execution, expect(data, &index));
    }
  }
}

// At 32k tokens two workers have room for four heads a task, twelve for one or two. The least that
// sixteen need, one head a task, is with AMX 1 % more than a twentieth.
TEST_P(AttendOn, WorkersTakeATwentiethOfTheInputsAtMost) {
  if (GetParam().backend != Backend::kCpu) GTEST_SKIP() << "no threads of ours";
  namespace tbb = oneapi::tbb;
  const tbb::global_control allow(tbb::global_control::max_allowed_parallelism, 16);
  constexpr int64_t kTokens = 32768, kQ = 8, kKv = 2, kD = 128;
  AttentionInput input;
  const DType dtype = DType::kBFloat16;
  input.q = contiguous_view(nullptr, dtype, std::vector<int64_t>{1, kTokens, kQ, kD});
  input.k = contiguous_view(nullptr, dtype, std::vector<int64_t>{1, kTokens, kKv, kD});
  input.v = input.k;
  const size_t inputs = kTokens * (kQ + 2 * kKv) * kD * element_size(dtype);
  Execution execution = GetParam();
  execution.num_threads = 2;
  const size_t two = attend_workspace_size(input, execution);
  EXPECT_LE(two, inputs / 20);
  execution.num_threads = 12;
  const size_t twelve = attend_workspace_size(input, execution);
  EXPECT_LE(twelve, inputs / 20);
  EXPECT_LT(twelve, 4 * two);  // with as many heads a task it would be 6
  execution.num_threads = 16;
  const size_t sixteen = attend_workspace_size(input, execution);
  EXPECT_LT(sixteen, inputs / 19);
  EXPECT_LT(sixteen, 6 * two);  // and here 8
}

TEST_P(AttendOn, SameResultForAnyNumberOfThreads) {
  if (GetParam().backend == Backend::kReference) GTEST_SKIP() << "one thread";
  CaseData one(small_case(DType::kBFloat16)), many(small_case(DType::kBFloat16));
  Execution execution = GetParam();
  execution.num_threads = 1;
  run(one, nullptr, execution);
  execution.num_threads = 3;
  run(many, nullptr, execution);
  for (int64_t i = 0; i < 300; ++i) {
    for (int32_t col = 0; col < 64; ++col) {
      ASSERT_EQ(one.out_at(0, i, 1, col), many.out_at(0, i, 1, col));
    }
  }
}

// A tensor [b, s, h, d] in memory of its own: rows run backwards, and they, heads and the first
// element lie at odd numbers of elements.
struct OddlyLaid {
  std::vector<std::byte> memory;
  TensorView view;

  explicit OddlyLaid(const TensorView& from) : view(from) {
    const int64_t s = from.shape[1], h = from.shape[2], d = from.shape[3];
    const int64_t head = d | 1, row = (h * head) | 1, sequence = s * row + 2;
    const auto size = static_cast<int64_t>(element_size(from.dtype));
    memory.resize((from.shape[0] * sequence + 1) * size);
    view.strides = {sequence, -row, head, 1};
    view.data = memory.data() + ((s - 1) * row + 1) * size;
    for_each_row(from, [&](std::byte* theirs, std::byte* ours) {
      std::memcpy(ours, theirs, static_cast<size_t>(d * size));
    });
  }
  template <typename Visit>
  void for_each_row(const TensorView& other, const Visit& visit) const {
    const auto at = [&](const TensorView& t, int64_t s, int64_t i, int64_t h) {
      const int64_t offset = s * t.strides[0] + i * t.strides[1] + h * t.strides[2];
      return static_cast<std::byte*>(t.data) + offset * static_cast<int64_t>(element_size(t.dtype));
    };
    for (int64_t s = 0; s < view.shape[0]; ++s) {
      for (int64_t i = 0; i < view.shape[1]; ++i) {
        for (int64_t h = 0; h < view.shape[2]; ++h) visit(at(other, s, i, h), at(view, s, i, h));
      }
    }
  }
};

TEST_P(AttendOn, StridesAndAlignmentChangeNoBit) {
  Execution aligned = GetParam();  // by the kernel that takes the others
  if (aligned.backend == Backend::kSm90) aligned.backend = Backend::kSm80;
  for (const int32_t d : {64, 72}) {
    Case c = small_case(DType::kBFloat16);
    c.lengths = {{130, 163}, {130, 163}};
    c.d_qk = c.d_v = d;
    c.h_q = 4;
    c.h_kv = 2;
    CaseData data(c);
    run(data, nullptr, aligned);

    const OddlyLaid q(data.input.q), k(data.input.k), v(data.input.v), out(data.out);
    AttentionInput input = data.input;
    input.q = q.view;
    input.k = k.view;
    input.v = v.view;
    StagedCall call(input, out.view, {}, GetParam());
    attend(call.input, nullptr, GetParam(),
           call.workspace(attend_workspace_size(input, GetParam())), call.out);
    call.finish();
    out.for_each_row(data.out, [&](const std::byte* want, const std::byte* got) {
      ASSERT_EQ(std::memcmp(want, got, d * element_size(c.dtype)), 0);
    });
  }
}

TEST_P(AttendOn, EmptyBatchDoesNothing) {
  AttentionInput input;
  const std::array<int64_t, 4> shape{0, 5, 2, 64}, kv_shape{0, 9, 1, 64};
  const DType dtype = widest_dtype(GetParam());
  input.q = contiguous_view(nullptr, dtype, shape);
  input.k = input.v = contiguous_view(nullptr, dtype, kv_shape);
  StagedCall call(input, input.q, {}, GetParam());
  attend(call.input, nullptr, GetParam(), call.workspace(attend_workspace_size(input, GetParam())),
         call.out);
  call.finish();
}

INSTANTIATE_TEST_SUITE_P(Targets, AttendOn, ::testing::ValuesIn(executions(Stage::kAttend)),
                         [](const auto& param_info) { return execution_name(param_info.param); });

}  // namespace
}  // namespace flexprefill::testing

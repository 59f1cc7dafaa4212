// Bad input through the C API: a status, a message that names what was expected and came, and
// nothing written. validate_test.cc has more of it, of the C++ API.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "c_api_call.h"
#include "flexprefill/c_api.h"

namespace flexprefill::testing {
namespace {

struct BadCall {
  const char* name;
  void (*spoil)(Call&);
  const char* expected;  // part of the message
  flexprefill_status status = FLEXPREFILL_INVALID_ARGUMENT;
};

template <int32_t kKind>
flexprefill_pattern& pattern_of(Call& call) {
  return call.pattern = flexprefill_pattern_default(kKind);
}
constexpr auto flex_prefill = pattern_of<FLEXPREFILL_PATTERN_FLEX_PREFILL>;
constexpr auto streaming_llm = pattern_of<FLEXPREFILL_PATTERN_STREAMING_LLM>;
constexpr auto xattention = pattern_of<FLEXPREFILL_PATTERN_XATTENTION>;
constexpr auto flash_prefill = pattern_of<FLEXPREFILL_PATTERN_FLASH_PREFILL>;
constexpr auto minference = pattern_of<FLEXPREFILL_PATTERN_MINFERENCE>;
constexpr auto block_cover = pattern_of<FLEXPREFILL_PATTERN_BLOCK_COVER>;

const flexprefill_minference_head kBadHeads[] = {{0, 0, 64, 0}, {5, 0, 64, 64}};
const int32_t kStarts[] = {0, 200, 399};
const int32_t kPages[] = {0, 1, 2, 9};
const int32_t kKeys[] = {100, 100};

// k and v as 4 pages of 64 rows, two a sequence.
void make_paged(Call& call) {
  for (flexprefill_tensor* tensor : {&call.input.k, &call.input.v}) {
    *tensor = Call::tensor(tensor == &call.input.k ? call.k : call.v, {4, 64, 1, Call::kD});
  }
  call.input.q.shape[1] = call.out_tensor.shape[1] = 100;
  call.input.page_table = kPages;
  call.input.max_pages = call.input.page_table_stride = 2;
  call.input.seqlens_kv = kKeys;
  call.input.seqlens_kv_count = 2;
}

const BadCall kBadCalls[] = {
    // Shapes, types, strides, lengths.
    {"q_dtype", [](Call& c) { c.input.q.dtype = 9; },
     "q: expected element type float32, float16 or bfloat16, got number 9"},
    {"v_dtype", [](Call& c) { c.input.v.dtype = FLEXPREFILL_FLOAT16; },
     "v: expected the element type of q (float32), got float16"},
    {"k_rank", [](Call& c) { c.input.k.rank = 5; }, "k: expected rank 4"},
    {"v_shape", [](Call& c) { c.input.v.shape[1] = 3; }, "v: expected shape as k [2, 260, 1, 16]"},
    {"head_dim", [](Call& c) { c.input.q.shape[3] = c.input.k.shape[3] = 12; },
     "q: expected a head dim from 16 to 256 in steps of 8, got 12"},
    {"stride", [](Call& c) { c.input.k.strides[3] = 2; },
     "k: expected a contiguous last dimension (stride 1), got stride 2"},
    {"no_data", [](Call& c) { c.input.q.data = nullptr; }, "q: expected data, got nullptr"},
    {"h_q", [](Call& c) { c.input.k.shape[2] = c.input.v.shape[2] = 3; },
     "q: expected a number of heads h_q that is a multiple of h_kv = 3, got h_q = 2"},
    {"more_queries", [](Call& c) { c.input.k.shape[1] = c.input.v.shape[1] = 199; },
     "sequence 0: expected 1 <= s_q <= s_kv, got s_q = 200, s_kv = 199"},
    {"block_size", [](Call& c) { c.input.block_size = 48; },
     "block_size: expected 32, 64 or 128, got 48"},
    {"scale",
     [](Call& c) {
       c.input.has_softmax_scale = 1;
       c.input.softmax_scale = std::numeric_limits<float>::infinity();
     },
     "softmax_scale: expected a finite number, got inf"},
    {"starts_of_a_batch",
     [](Call& c) {
       c.input.cu_seqlens_q = kStarts;
       c.input.cu_seqlens_q_count = 3;
     },
     "cu_seqlens_q: expected packed q"},
    {"starts_end",
     [](Call& c) {
       c.input.q.rank = c.input.k.rank = c.input.v.rank = 3;
       for (flexprefill_tensor* x : {&c.input.q, &c.input.k, &c.input.v}) {
         const int64_t shape[] = {400, x == &c.input.q ? 2 : 1, Call::kD};
         *x = flexprefill_tensor_contiguous(x->data, FLEXPREFILL_FLOAT32, 3, shape);
       }
       c.input.cu_seqlens_q = c.input.cu_seqlens_kv = kStarts;
       c.input.cu_seqlens_q_count = c.input.cu_seqlens_kv_count = 3;
     },
     "cu_seqlens_q: expected to end with the number of rows 400, got 399"},
    {"starts_null", [](Call& c) { c.input.cu_seqlens_q_count = 3; },
     "cu_seqlens_q: expected 3 entries, got NULL"},
    {"lengths_count", [](Call& c) { c.input.seqlens_kv_count = -1; },
     "seqlens_kv: expected a count of at least 0, got -1"},
    {"page", make_paged, "page_table: expected pages from 0 to 3, got 9 at [1, 1]"},
    // Outputs, workspace, audit.
    {"out_shape", [](Call& c) { c.out_tensor.shape[1] = 199; }, "out: expected shape"},
    {"out_dtype", [](Call& c) { c.out_tensor.dtype = FLEXPREFILL_BFLOAT16; },
     "out: expected element type float32, got bfloat16"},
    {"out_stride", [](Call& c) { c.out_tensor.strides[1] = 0; },
     "out: expected strides that give every element its own place"},
    {"out_aliases_q", [](Call& c) { c.input.q.data = c.out.data(); },
     "out: expected memory of its own, got memory that overlaps q"},
    {"out_aliases_k", [](Call& c) { c.input.k.data = c.out.data() + 64; }, "overlaps k"},
    {"workspace", [](Call& c) { c.workspace.resize(1); }, "workspace: expected at least ",
     FLEXPREFILL_WORKSPACE_TOO_SMALL},
    // Patterns.
    {"kind", [](Call& c) { c.pattern.kind = 17; }, "pattern.kind: expected 0 to 7, got 17"},
    {"gamma_nan", [](Call& c) { flex_prefill(c).gamma = std::nanf(""); },
     "gamma: expected a number in (0, 1], got nan"},
    {"gamma_0", [](Call& c) { flex_prefill(c).gamma = 0; }, "gamma: expected a number in (0, 1]"},
    {"gamma_large", [](Call& c) { flex_prefill(c).gamma = 1.5f; }, "got 1.5"},
    {"tau_nan", [](Call& c) { flex_prefill(c).tau = std::nanf(""); },
     "tau: expected a number in [0, 1], got nan"},
    {"tau", [](Call& c) { flex_prefill(c).tau = -0.5f; }, "tau: expected a number in [0, 1]"},
    {"min_budget", [](Call& c) { flex_prefill(c).min_budget = -1; },
     "min_budget: expected at least 0 tokens, got -1"},
    {"max_budget", [](Call& c) { flex_prefill(c).max_budget = -2; },
     "max_budget: expected at least 0 tokens, got -2"},
    {"budgets", [](Call& c) { flex_prefill(c).max_budget = 512; },
     "max_budget: expected at least min_budget = 1024, got 512"},
    {"vertical_size", [](Call& c) { c.pattern.vertical_size = -1; },
     "vertical_size: expected at least 0 tokens, got -1"},
    {"slash_size", [](Call& c) { c.pattern.slash_size = -7; }, "slash_size: expected at least 0"},
    {"global_window", [](Call& c) { streaming_llm(c).global_window = -1; },
     "global_window: expected at least 0 tokens, got -1"},
    {"local_window", [](Call& c) { streaming_llm(c).local_window = 0; },
     "local_window: expected at least 1 tokens, got 0"},
    {"stride_of_groups", [](Call& c) { xattention(c).stride = 12; },
     "stride: expected 8 or 16 tokens, got 12"},
    {"threshold", [](Call& c) { xattention(c).threshold = 0; }, "threshold: expected a number in"},
    {"alpha", [](Call& c) { flash_prefill(c).alpha = 1.5f; }, "alpha: expected a number in [0, 1]"},
    {"no_heads", [](Call& c) { minference(c); },
     "heads: expected one for each of h_q = 2 query heads, got 0"},
    {"heads",
     [](Call& c) {
       minference(c).heads = kBadHeads;
       c.pattern.heads_count = 2;
     },
     "heads[0].slash_size: expected at least 1 tokens, got 0"},
    {"cover_gamma", [](Call& c) { block_cover(c).gamma = 1.5f; },
     "gamma: expected a number in (0, 1], got 1.5"},
    {"cover_max_budget", [](Call& c) { block_cover(c).max_budget = -2; },
     "max_budget: expected at least 0 tokens, got -2"},
    {"column_share", [](Call& c) { block_cover(c).column_share = -0.5f; },
     "column_share: expected a number in [0, 1], got -0.5"},
    // Execution.
    {"num_threads", [](Call& c) { c.execution.num_threads = -1; },
     "num_threads: expected at least 0, got -1"},
    {"cpu_target", [](Call& c) { c.execution.cpu_target = 99; },
     "execution.cpu_target: expected 0 to 6, got 99"},
    {"backend", [](Call& c) { c.execution.backend = 99; },
     "backend: expected auto, reference, cpu, cuda, sm80 or sm90, got number 99",
     FLEXPREFILL_UNSUPPORTED},
    {"device", [](Call& c) { c.execution.backend = FLEXPREFILL_BACKEND_CUDA; }, "CUDA",
     FLEXPREFILL_UNSUPPORTED},
};

class CApiRefuses : public ::testing::TestWithParam<BadCall> {};

TEST_P(CApiRefuses, BadInput) {
  Call call;
  ASSERT_EQ(call.prefill(), FLEXPREFILL_OK) << last_error();
  std::fill(call.out.begin(), call.out.end(), 7.0f);
  GetParam().spoil(call);
  call.expect_refused(GetParam().status, GetParam().expected);
}

INSTANTIATE_TEST_SUITE_P(Inputs, CApiRefuses, ::testing::ValuesIn(kBadCalls),
                         [](const auto& param_info) { return param_info.param.name; });

TEST(CApi, RefusesAnAuditOfTheWrongSize) {
  Call call;
  std::vector<flexprefill_head_audit> audit(3, flexprefill_head_audit{.pattern = 77});
  const auto prefill = [&](int64_t count) {
    return flexprefill_prefill(&call.input, &call.pattern, &call.execution, call.workspace.data(),
                               call.workspace.size(), &call.out_tensor, nullptr, audit.data(),
                               count);
  };
  EXPECT_EQ(prefill(3), FLEXPREFILL_INVALID_ARGUMENT);
  EXPECT_EQ(last_error(), "audit: expected [b * h_q] = [4] entries, got 3");
  EXPECT_EQ(prefill(-1), FLEXPREFILL_INVALID_ARGUMENT);
  EXPECT_EQ(last_error(), "audit: expected a count of at least 0, got -1");
  EXPECT_EQ(audit[0].pattern, 77);
  EXPECT_EQ(call.out[0], 7);
}

TEST(CApi, RefusesABadAuditOfACall) {
  Call call;
  std::vector<flexprefill_head_audit> heads(4, flexprefill_head_audit{.pattern = 77});
  const auto expect = [&](flexprefill_prefill_audit* audit, const std::string& word) {
    EXPECT_EQ(flexprefill_prefill_audited(&call.input, &call.pattern, &call.execution,
                                          call.workspace.data(), call.workspace.size(),
                                          &call.out_tensor, nullptr, audit),
              FLEXPREFILL_INVALID_ARGUMENT);
    EXPECT_NE(last_error().find(word), std::string::npos) << last_error();
    EXPECT_EQ(heads[0].pattern, 77);
    EXPECT_EQ(call.out[0], 7);
  };
  expect(nullptr, "audit: expected a pointer, got NULL");
  flexprefill_prefill_audit audit = flexprefill_prefill_audit_default();
  audit.struct_size = 0;
  expect(&audit, "audit.struct_size: expected at least");
  audit = flexprefill_prefill_audit_default();
  audit.heads = heads.data();
  audit.heads_count = 4;
  audit.has_min_kept_mass = 1;
  audit.min_kept_mass = 2;
  expect(&audit, "min_kept_mass: expected a number in [0, 1], got 2");
  audit.min_kept_mass = 0;
  audit.compared_rows = 3;
  expect(&audit, "comparison: expected 4 entries for 3 compared rows, got 0");
  audit.comparison_count = 4;
  expect(&audit, "comparison: expected 4 entries, got NULL");
}

TEST(CApi, RefusesNullPointers) {
  Call call;
  size_t bytes = 0;
  EXPECT_EQ(flexprefill_prefill_workspace_size(nullptr, nullptr, nullptr, &bytes),
            FLEXPREFILL_INVALID_ARGUMENT);
  EXPECT_NE(last_error().find("input"), std::string::npos);
  EXPECT_EQ(flexprefill_attend_workspace_size(&call.input, nullptr, nullptr),
            FLEXPREFILL_INVALID_ARGUMENT);
  EXPECT_EQ(flexprefill_attend(&call.input, nullptr, nullptr, call.workspace.data(),
                               call.workspace.size(), nullptr, nullptr),
            FLEXPREFILL_INVALID_ARGUMENT);
  EXPECT_NE(last_error().find("out"), std::string::npos);
  EXPECT_EQ(flexprefill_select(&call.input, nullptr, nullptr, call.workspace.data(),
                               call.workspace.size(), nullptr, nullptr, 0),
            FLEXPREFILL_INVALID_ARGUMENT);
  EXPECT_EQ(flexprefill_block_index_create(nullptr), FLEXPREFILL_INVALID_ARGUMENT);
  EXPECT_EQ(flexprefill_block_index_check(nullptr), FLEXPREFILL_INVALID_ARGUMENT);
  EXPECT_EQ(flexprefill_workspace_create(nullptr), FLEXPREFILL_INVALID_ARGUMENT);
  flexprefill_block_index_destroy(nullptr);
  flexprefill_workspace_destroy(nullptr);
}

TEST(CApiIndex, RefusesAnIndexOfAnotherCall) {
  Call call;
  const auto expect_refused = [&](int64_t s_q, int32_t h_q, int32_t block_size, const char* words) {
    const int64_t lengths[] = {s_q, Call::kSkv, s_q, Call::kSkv};
    flexprefill_block_index* index = nullptr;
    ASSERT_EQ(flexprefill_block_index_dense(lengths, 2, h_q, block_size, &index), FLEXPREFILL_OK);
    const IndexPointer owner(index);
    EXPECT_EQ(flexprefill_attend(&call.input, index, &call.execution, call.workspace.data(),
                                 call.workspace.size(), &call.out_tensor, nullptr),
              FLEXPREFILL_INVALID_ARGUMENT);
    EXPECT_NE(last_error().find(words), std::string::npos) << last_error();
    EXPECT_EQ(call.out, std::vector<float>(call.out.size(), 7.0f));
  };
  expect_refused(Call::kSq, Call::kHq, 64, "index: expected block_size 32, got 64");
  expect_refused(Call::kSq, 4, 32, "index: expected h_q = 2, got 4");
  expect_refused(150, Call::kHq, 32,
                 "index: sequence 0: expected (s_q, s_kv) = (200, 260), got (150, 260)");
}

TEST(CApiIndex, RefusesAnIndexThatIsNotOne) {
  // One sequence of two blocks, one head: rows {0}, {0, 1}.
  const int64_t lengths[2] = {64, 64};
  int64_t indptr[3] = {0, 1, 3};
  int32_t indices[3] = {0, 0, 1};
  flexprefill_block_index_view view = flexprefill_block_index_view_default();
  view.block_size = 32;
  view.h_q = 1;
  view.sequence_lengths = lengths;
  view.sequence_count = 1;
  view.indptr = indptr;
  view.indptr_count = 3;
  view.indices = indices;
  view.indices_count = 3;
  const auto expect_refused = [&](const std::string& word) {
    flexprefill_block_index* index = nullptr;
    EXPECT_EQ(flexprefill_block_index_from_view(&view, &index), FLEXPREFILL_INVALID_ARGUMENT);
    EXPECT_EQ(index, nullptr);
    EXPECT_NE(last_error().find(word), std::string::npos) << last_error();
  };
  flexprefill_block_index* index = nullptr;
  ASSERT_EQ(flexprefill_block_index_from_view(&view, &index), FLEXPREFILL_OK) << last_error();
  flexprefill_block_index_destroy(index);

  indices[2] = 2;
  expect_refused("row 1");
  indices[2] = 0;
  expect_refused("row 1");
  indices[2] = 1;
  indices[0] = -1;
  expect_refused("row 0");
  indices[0] = 0;
  indptr[1] = 4;
  expect_refused("indptr");
  indptr[1] = 1;
  view.indptr_count = 2;
  expect_refused("indptr");
  view.indptr_count = 3;
  view.h_q = 0;
  expect_refused("h_q");
  view.h_q = 1;
  view.sequence_lengths = nullptr;
  expect_refused("sequence_lengths");
}

TEST(CApiIndex, RefusesHostileDenseIndex) {
  const int64_t lengths[2] = {64, 64};
  flexprefill_block_index* index = nullptr;
  EXPECT_EQ(flexprefill_block_index_dense(lengths, 1, 1, 0, &index), FLEXPREFILL_INVALID_ARGUMENT);
  EXPECT_EQ(flexprefill_block_index_dense(lengths, 1, -1, 32, &index),
            FLEXPREFILL_INVALID_ARGUMENT);
  const int64_t upside_down[2] = {64, 32};
  EXPECT_EQ(flexprefill_block_index_dense(upside_down, 1, 1, 32, &index),
            FLEXPREFILL_INVALID_ARGUMENT);
  EXPECT_EQ(index, nullptr);
}

}  // namespace
}  // namespace flexprefill::testing

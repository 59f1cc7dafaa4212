// Bad input: refused before anything is written, by an error that names what was expected and came.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "case_table.h"
#include "flexprefill/flexprefill.h"

namespace flexprefill::testing {
namespace {

Case base_case(Layout layout = Layout::kBatch) {
  return {
      .name = "base", .lengths = {{300, 333}, {300, 333}}, .h_q = 4, .h_kv = 2, .layout = layout};
}

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument) << error.what();
    return error.what();
  }
  return "no error";
}

void prefill_case(CaseData& data, const Pattern& pattern, const Execution& execution = {}) {
  WorkspaceBuffer buffer;
  const Workspace workspace =
      buffer.reserve(prefill_workspace_size(data.input, pattern, execution));
  prefill(data.input, pattern, execution, workspace, data.out, data.lse);
}

void expect_nothing_written(const CaseData& data) {
  for (int32_t col = 0; col < data.c.d_v; ++col) {
    ASSERT_TRUE(std::isnan(data.out_at(0, 0, 0, col)));
    ASSERT_TRUE(std::isnan(data.out_at(1, 299, 3, col)));
  }
  ASSERT_TRUE(std::isnan(data.lse_at(0, 0, 0)));
}

struct BadInput {
  const char* name;
  std::function<void(CaseData&)> spoil;
  const char* expected;  // part of the message
  Layout layout = Layout::kBatch;
};

std::vector<BadInput> bad_inputs() {
  return {
      {"q_rank", [](CaseData& d) { d.input.q.rank = 2; }, "q: expected rank 4"},
      {"k_rank", [](CaseData& d) { d.input.k.rank = 3; }, "k: expected rank 4"},
      {"negative_size", [](CaseData& d) { d.input.q.shape[1] = -1; }, "q: expected sizes"},
      {"no_data", [](CaseData& d) { d.input.v.data = nullptr; }, "v: expected data"},
      {"q_dtype", [](CaseData& d) { d.input.q.dtype = static_cast<DType>(9); },
       "q: expected element type"},
      {"k_dtype", [](CaseData& d) { d.input.k.dtype = DType::kFloat16; },
       "k: expected the element type of q (float32), got float16"},
      {"last_stride", [](CaseData& d) { d.input.q.strides[3] = 2; },
       "q: expected a contiguous last dimension"},
      {"alignment", [](CaseData& d) { d.input.k.data = static_cast<char*>(d.input.k.data) + 1; },
       "k: expected data aligned"},
      {"heads", [](CaseData& d) { d.input.q.shape[2] = 3; },
       "q: expected a number of heads h_q that is a multiple of h_kv = 2, got h_q = 3"},
      {"no_kv_heads", [](CaseData& d) { d.input.k.shape[2] = d.input.v.shape[2] = 0; },
       "multiple of h_kv = 0"},
      {"head_dim_step", [](CaseData& d) { d.input.q.shape[3] = d.input.k.shape[3] = 20; },
       "q: expected a head dim from 16 to 256 in steps of 8, got 20"},
      {"head_dim_large", [](CaseData& d) { d.input.v.shape[3] = 264; }, "v: expected a head dim"},
      {"k_head_dim", [](CaseData& d) { d.input.k.shape[3] = 32; }, "k: expected shape"},
      {"v_rows", [](CaseData& d) { d.input.v.shape[1] = 100; }, "v: expected shape"},
      {"batch", [](CaseData& d) { d.input.k.shape[0] = d.input.v.shape[0] = 1; },
       "k: expected shape [b = 2"},
      {"too_many_queries", [](CaseData& d) { d.input.k.shape[1] = d.input.v.shape[1] = 200; },
       "sequence 0: expected 1 <= s_q <= s_kv, got s_q = 300, s_kv = 200"},
      {"no_queries", [](CaseData& d) { d.input.q.shape[1] = 0; }, "got s_q = 0"},
      {"far_strides",
       [](CaseData& d) { d.input.q.strides[0] = std::numeric_limits<int64_t>::max() - 5; }, "q: s"},
      {"block_size", [](CaseData& d) { d.input.block_size = 16; },
       "block_size: expected 32, 64 or 128, got 16"},
      {"scale_nan", [](CaseData& d) { d.input.softmax_scale = std::nanf(""); },
       "softmax_scale: expected a finite number"},
      {"out_shape", [](CaseData& d) { d.out.shape[1] = 299; }, "out: expected shape"},
      {"out_dtype", [](CaseData& d) { d.out.dtype = DType::kBFloat16; },
       "out: expected element type float32, got bfloat16"},
      {"out_overlaps_itself", [](CaseData& d) { d.out.strides[1] = 0; },
       "out: expected strides that give every element its own place"},
      {"lse_dtype", [](CaseData& d) { d.lse.dtype = DType::kFloat16; },
       "lse: expected element type float32"},
      {"lse_shape", [](CaseData& d) { d.lse.shape[1] = 3; }, "lse: expected shape"},
      {"out_aliases_q", [](CaseData& d) { d.out.data = d.input.q.data; },
       "out: expected memory of its own, got memory that overlaps q"},
      {"out_aliases_v",
       [](CaseData& d) { d.out.data = static_cast<float*>(d.input.v.data) + d.c.d_v * 300; },
       "out: expected memory of its own"},
      {"lse_aliases_out", [](CaseData& d) { d.lse.data = d.out.data; }, "overlaps out"},
      {"cu_without_packed",
       [](CaseData& d) {
         static const int32_t cu[] = {0, 300, 600};
         d.input.cu_seqlens_q = cu;
       },
       "cu_seqlens_q: expected packed q"},
      {"cu_missing", [](CaseData& d) { d.input.cu_seqlens_q = {}; },
       "cu_seqlens_q: expected [b + 1] starts", Layout::kPacked},
      {"cu_start",
       [](CaseData& d) {
         static const int32_t cu[] = {1, 300, 600};
         d.input.cu_seqlens_q = cu;
       },
       "cu_seqlens_q: expected to begin with 0, got 1", Layout::kPacked},
      {"cu_order",
       [](CaseData& d) {
         static const int32_t cu[] = {0, 700, 666};
         d.input.cu_seqlens_kv = cu;
       },
       "cu_seqlens_kv: expected ascending", Layout::kPacked},
      {"cu_end",
       [](CaseData& d) {
         static const int32_t cu[] = {0, 300, 599};
         d.input.cu_seqlens_q = cu;
       },
       "cu_seqlens_q: expected to end with the number of rows 600, got 599", Layout::kPacked},
      {"page_out_of_range",
       [](CaseData& d) {
         static const std::vector<int32_t> pages(100, 1000);
         d.input.page_table = pages.data();
       },
       "page_table: expected pages from 0 to", Layout::kPaged},
      {"page_table_short", [](CaseData& d) { d.input.max_pages = 2; },
       "seqlens_kv: expected at most max_pages * page_size", Layout::kPaged},
      {"page_table_negative",
       [](CaseData& d) {
         d.input.max_pages = d.input.page_table_stride = std::numeric_limits<int64_t>::min() / 2;
       },
       "max_pages: expected at least 1, got -", Layout::kPaged},
      {"page_table_stride",
       [](CaseData& d) { d.input.page_table_stride = std::numeric_limits<int64_t>::max(); },
       "page_table: expected a row stride of at least max_pages", Layout::kPaged},
      {"page_size_huge",
       [](CaseData& d) {
         d.input.k.shape[1] = d.input.v.shape[1] = std::numeric_limits<int64_t>::max() - 15;
         d.input.k.strides[1] = d.input.v.strides[1] = 0;
         d.input.seqlens_kv = {};
       },
       "seqlens_kv: expected [b] = [2] lengths, got 0", Layout::kPaged},
      {"page_lengths", [](CaseData& d) { d.input.seqlens_kv = {}; },
       "seqlens_kv: expected [b] = [2] lengths, got 0", Layout::kPaged},
      {"page_size", [](CaseData& d) { d.input.k.shape[1] = d.input.v.shape[1] = 40; },
       "k: expected pages of a multiple of 16 rows, got 40", Layout::kPaged},
  };
}

class Refuses : public ::testing::TestWithParam<BadInput> {};

TEST_P(Refuses, BadInput) {
  for (const Backend backend : {Backend::kReference, Backend::kCpu}) {
    CaseData data(base_case(GetParam().layout));
    const Execution execution{.backend = backend};
    WorkspaceBuffer buffer;
    const Workspace workspace =
        buffer.reserve(prefill_workspace_size(data.input, FlexPrefill{}, execution));
    const TensorView out = data.out, lse = data.lse;
    GetParam().spoil(data);
    const std::string message = error_of(
        [&] { prefill(data.input, FlexPrefill{}, execution, workspace, data.out, data.lse); });
    EXPECT_NE(message.find(GetParam().expected), std::string::npos) << message;
    data.out = out;
    data.lse = lse;
    expect_nothing_written(data);
  }
}

INSTANTIATE_TEST_SUITE_P(Inputs, Refuses, ::testing::ValuesIn(bad_inputs()),
                         [](const auto& param_info) { return param_info.param.name; });

TEST(Refuses, BadPattern) {
  const float nan = std::nanf("");
  const std::vector<std::pair<Pattern, const char*>> patterns{
      {FlexPrefill{.gamma = nan}, "gamma: expected a number in (0, 1]"},
      {FlexPrefill{.gamma = 0}, "gamma"},
      {FlexPrefill{.gamma = 1.01f}, "gamma"},
      {FlexPrefill{.tau = -0.1f}, "tau: expected a number in [0, 1]"},
      {FlexPrefill{.tau = nan}, "tau"},
      {FlexPrefill{.tau = 1.01f}, "tau"},
      {FlexPrefill{.min_budget = -1}, "min_budget: expected at least 0 tokens, got -1"},
      {FlexPrefill{.min_budget = 0, .max_budget = -1}, "max_budget: expected at least 0 tokens"},
      {FlexPrefill{.min_budget = 512, .max_budget = 256},
       "max_budget: expected at least min_budget = 512, got 256"},
      {VerticalSlash{.vertical_size = -1}, "vertical_size"},
      {VerticalSlash{.slash_size = -5}, "slash_size"},
      {StreamingLlm{.global_window = -1}, "global_window"},
      {StreamingLlm{.local_window = 0}, "local_window: expected at least 1"},
      {BlockCover{.gamma = 0}, "gamma: expected a number in (0, 1]"},
      {BlockCover{.gamma = nan}, "gamma"},
      {BlockCover{.column_share = 1.1f}, "column_share: expected a number in [0, 1]"},
      {BlockCover{.column_share = nan}, "column_share"},
      {BlockCover{.max_budget = -1}, "max_budget: expected at least 0 tokens"},
  };
  for (const auto& [bad, expected] : patterns) {
    const Pattern& pattern = bad;  // clang 14 lets no lambda capture a structured binding
    CaseData data(base_case());
    const std::string message = error_of([&] { prefill_case(data, pattern); });
    EXPECT_NE(message.find(expected), std::string::npos) << message;
    expect_nothing_written(data);
  }
}

TEST(Refuses, BadExecution) {
  CaseData data(base_case());
  EXPECT_NE(error_of([&] {
              prefill_case(data, Dense{}, {.num_threads = -1});
            }).find("num_threads: expected at least 0, got -1"),
            std::string::npos);
  try {
    prefill_case(data, Dense{}, {.backend = static_cast<Backend>(77)});
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
  }
  expect_nothing_written(data);
}

TEST(Refuses, BackendWithoutAMachine) {
  for (const Backend backend : {Backend::kCuda, Backend::kSm80, Backend::kSm90}) {
    CaseData data(base_case());
    std::vector<std::byte> workspace(1 << 20);
    try {
      prefill(data.input, Dense{}, {.backend = backend}, {workspace.data(), workspace.size()},
              data.out, data.lse);
      FAIL() << "no error";
    } catch (const Error& error) {
      // No such backend, no such device, or none of its element types.
      EXPECT_EQ(error.code(), ErrorCode::kUnsupported) << error.what();
      EXPECT_NE(std::string(error.what()).find("CUDA"), std::string::npos) << error.what();
    }
    expect_nothing_written(data);
  }
}

// One that is large enough for select and not for attend, too.
TEST(Refuses, SmallWorkspace) {
  const Pattern patterns[] = {Dense{}, FlexPrefill{.min_budget = 64}, VerticalSlash{64, 64},
                              FlashPrefill{.alpha = 0.9f}};
  for (const Pattern& pattern : patterns) {
    CaseData data(base_case());
    data.input.block_size = 32;
    const size_t bytes = prefill_workspace_size(data.input, pattern, {});
    std::vector<std::byte> memory(bytes);
    std::vector<HeadAudit> audit(8, HeadAudit{.density = -1});
    for (const size_t less : {bytes, bytes / 2, bytes / 4, bytes / 8, size_t{1}}) {
      try {
        prefill(data.input, pattern, {}, {memory.data(), bytes - less}, data.out, data.lse, audit);
        FAIL() << "no error";
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::kWorkspaceTooSmall) << error.what();
        const std::string expected = "workspace: expected at least " + std::to_string(bytes) +
                                     " bytes, got " + std::to_string(bytes - less);
        EXPECT_NE(std::string(error.what()).find(expected), std::string::npos) << error.what();
      }
      expect_nothing_written(data);
      for (const HeadAudit& head : audit) EXPECT_EQ(head.density, -1);
    }
    // Any alignment will do.
    std::vector<std::byte> odd(bytes + 1);
    prefill(data.input, pattern, {}, {odd.data() + 1, bytes}, data.out);
    EXPECT_FALSE(std::isnan(data.out_at(0, 0, 0, 0)));
  }
}

TEST(Refuses, SmallWorkspaceOfAStage) {
  CaseData data(base_case());
  const Pattern pattern = FlexPrefill{.min_budget = 64};
  const auto expect_refused = [](const std::string& words, const std::function<void()>& call) {
    try {
      call();
      FAIL() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kWorkspaceTooSmall) << error.what();
      EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
    }
  };
  std::vector<std::byte> memory(1 << 24);
  const size_t for_select = select_workspace_size(data.input, pattern, {});
  BlockIndex index = dense_block_index(std::vector<SequenceLengths>{{1, 1}}, 1, 32);
  std::vector<HeadAudit> audit(8, HeadAudit{.density = -1});
  expect_refused("expected at least " + std::to_string(for_select), [&] {
    select(data.input, pattern, {}, {memory.data(), for_select - 1}, index, audit);
  });
  EXPECT_EQ(index.h_q, 1);
  EXPECT_EQ(audit[0].density, -1);
  const size_t for_attend = attend_workspace_size(data.input, {});
  expect_refused("got " + std::to_string(for_attend / 2), [&] {
    attend(data.input, nullptr, {}, {memory.data(), for_attend / 2}, data.out, data.lse);
  });
  expect_nothing_written(data);
}

TEST(Refuses, IndexOfAnotherCallOrNone) {
  const std::vector<SequenceLengths> lengths{{300, 333}, {300, 333}};
  const BlockIndex good = dense_block_index(lengths, 4, 64);
  const std::vector<std::pair<std::function<void(BlockIndex&)>, const char*>> spoils{
      {[](BlockIndex& x) { x.block_size = 128; }, "index: expected block_size 64, got 128"},
      {[](BlockIndex& x) { x.h_q = 2; }, "index: expected h_q = 4, got 2"},
      {[](BlockIndex& x) { x.sequences.pop_back(); }, "index: expected 2 sequences, got 1"},
      {[](BlockIndex& x) { x.sequences[1].s_q = 299; },
       "index: sequence 1: expected (s_q, s_kv) = (300, 333), got (299, 333)"},
      {[](BlockIndex& x) { x.indices[2] = 7; }, "row 1: expected blocks up to the diagonal"},
      {[](BlockIndex& x) { x.indices[0] = -1; }, "row 0: expected ascending blocks from 0, got -1"},
      {[](BlockIndex& x) { std::swap(x.indices[3], x.indices[4]); },
       "row 2: expected ascending blocks"},
      {[](BlockIndex& x) { x.indptr[1] = 1 << 20; }, "expected indptr to ascend"},
  };
  for (const Backend backend : {Backend::kReference, Backend::kCpu}) {
    CaseData data(base_case());
    std::vector<std::byte> memory(1 << 24);
    const auto run = [&](const BlockIndex& index) {
      attend(data.input, &index, {.backend = backend}, {memory.data(), memory.size()}, data.out,
             data.lse);
    };
    for (const auto& [spoil, expected] : spoils) {
      BlockIndex index = good;
      spoil(index);
      const std::string message = error_of([&] { run(index); });
      EXPECT_NE(message.find(expected), std::string::npos) << message;
      expect_nothing_written(data);
    }
    run(good);
    EXPECT_FALSE(std::isnan(data.out_at(0, 0, 0, 0)));
  }
}

TEST(Refuses, WrongAuditSize) {
  CaseData data(base_case());
  std::vector<HeadAudit> audit(3);
  WorkspaceBuffer buffer;
  EXPECT_NE(error_of([&] {
              prefill(data.input, Dense{}, {}, buffer.reserve(1 << 24), data.out, {}, audit);
            }).find("audit: expected [b * h_q] = [8] entries, got 3"),
            std::string::npos);
}

TEST(SizeQueries, NeedNoData) {
  CaseData data(base_case());
  const size_t bytes = prefill_workspace_size(data.input, FlexPrefill{}, {});
  data.input.q.data = data.input.k.data = data.input.v.data = nullptr;
  EXPECT_EQ(prefill_workspace_size(data.input, FlexPrefill{}, {}), bytes);
}

// Offsets beyond 2^31 elements are computed in 64 bits: checked on the layout, nothing allocated.
TEST(SizeQueries, LargeOffsets) {
  AttentionInput input;
  const std::array<int64_t, 4> q{3, 1 << 20, 64, 128}, kv{3, 1 << 20, 8, 128};
  input.q = contiguous_view(nullptr, DType::kBFloat16, q);
  input.k = input.v = contiguous_view(nullptr, DType::kBFloat16, kv);
  const size_t qkv = (3ull << 20) * 80 * 128 * 2;
  EXPECT_LT(prefill_workspace_size(input, FlexPrefill{}, {.num_threads = 2}), qkv / 10);
}

}  // namespace
}  // namespace flexprefill::testing

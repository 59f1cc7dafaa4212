// The C API: statuses and messages, struct versions, and the index through every form.
#include "flexprefill/c_api.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "c_api_call.h"
#include "flexprefill/flexprefill.h"

namespace flexprefill::testing {
namespace {

TEST(CApi, GivesWhatTheCppApiGives) {
  Call call;
  std::vector<flexprefill_head_audit> audit(Call::kB * Call::kHq);
  ASSERT_EQ(flexprefill_prefill(&call.input, &call.pattern, &call.execution, call.workspace.data(),
                                call.workspace.size(), &call.out_tensor, nullptr, audit.data(),
                                static_cast<int64_t>(audit.size())),
            FLEXPREFILL_OK)
      << last_error();

  const auto view = [](std::vector<float>& data, std::array<int64_t, 4> shape) {
    return contiguous_view(data.data(), DType::kFloat32, shape);
  };
  AttentionInput input;
  input.q = view(call.q, {Call::kB, Call::kSq, Call::kHq, Call::kD});
  input.k = view(call.k, {Call::kB, Call::kSkv, Call::kHkv, Call::kD});
  input.v = view(call.v, {Call::kB, Call::kSkv, Call::kHkv, Call::kD});
  input.block_size = 32;
  std::vector<float> out(call.out.size());
  std::vector<HeadAudit> cpp_audit(audit.size());
  const Pattern pattern = VerticalSlash{64, 64};
  WorkspaceBuffer buffer;
  prefill(input, pattern, {}, buffer.reserve(prefill_workspace_size(input, pattern, {})),
          view(out, {Call::kB, Call::kSq, Call::kHq, Call::kD}), {}, cpp_audit);
  EXPECT_EQ(call.out, out);
  for (size_t h = 0; h < audit.size(); ++h) {
    EXPECT_EQ(audit[h].pattern, static_cast<int32_t>(cpp_audit[h].pattern));
    EXPECT_EQ(audit[h].vertical_blocks, cpp_audit[h].vertical_blocks);
    EXPECT_EQ(audit[h].slash_blocks, cpp_audit[h].slash_blocks);
    EXPECT_EQ(audit[h].kept_mass, cpp_audit[h].kept_mass);
    EXPECT_EQ(audit[h].density, cpp_audit[h].density);
    EXPECT_LT(audit[h].density, 1);
  }
}

TEST(CApi, EveryPatternGivesWhatTheCppApiGives) {
  const std::vector<flexprefill_minference_head> heads{
      {FLEXPREFILL_MINFERENCE_BLOCK_SPARSE, 0, 64, 0}, {FLEXPREFILL_MINFERENCE_A_SHAPE, 0, 32, 64}};
  const std::vector<MInferenceHead> cpp_heads{{MInferenceHead::Kind::kBlockSparse, 64, 0},
                                              {MInferenceHead::Kind::kAShape, 32, 64}};
  const std::vector<Pattern> patterns{Dense{},
                                      FlexPrefill{.min_budget = 32},
                                      VerticalSlash{64, 64},
                                      StreamingLlm{16, 40},
                                      XAttention{8, 0.6f},
                                      FlashPrefill{.alpha = 0.9f, .last_queries = 0},
                                      MInference{cpp_heads},
                                      BlockCover{0.5f, 0.3f, 96}};
  for (int32_t kind = 0; kind < 8; ++kind) {
    Call call;
    call.pattern = flexprefill_pattern_default(kind);
    call.pattern.min_budget = 32;
    call.pattern.vertical_size = call.pattern.slash_size = 64;
    if (kind == FLEXPREFILL_PATTERN_STREAMING_LLM) {
      call.pattern.global_window = 16;
      call.pattern.local_window = 40;
    }
    call.pattern.stride = 8;
    call.pattern.threshold = 0.6f;
    call.pattern.alpha = 0.9f;
    call.pattern.last_queries = 0;
    call.pattern.heads = heads.data();
    call.pattern.heads_count = 2;
    if (kind == FLEXPREFILL_PATTERN_BLOCK_COVER) {
      call.pattern.gamma = 0.5f;
      call.pattern.column_share = 0.3f;
      call.pattern.max_budget = 96;
    }
    EXPECT_EQ(call.prefill(), FLEXPREFILL_OK) << last_error();

    const auto view = [](std::vector<float>& data, std::array<int64_t, 4> shape) {
      return contiguous_view(data.data(), DType::kFloat32, shape);
    };
    AttentionInput input;
    input.q = view(call.q, {Call::kB, Call::kSq, Call::kHq, Call::kD});
    input.k = view(call.k, {Call::kB, Call::kSkv, Call::kHkv, Call::kD});
    input.v = view(call.v, {Call::kB, Call::kSkv, Call::kHkv, Call::kD});
    input.block_size = 32;
    std::vector<float> out(call.out.size());
    WorkspaceBuffer buffer;
    const size_t bytes = prefill_workspace_size(input, patterns[kind], {});
    prefill(input, patterns[kind], {}, buffer.reserve(bytes),
            view(out, {Call::kB, Call::kSq, Call::kHq, Call::kD}));
    EXPECT_EQ(call.out, out) << "kind " << kind;
    const IndexPointer index = call.select();
    flexprefill_block_index_view got = flexprefill_block_index_view_default();
    ASSERT_EQ(flexprefill_block_index_get_view(index.get(), &got), FLEXPREFILL_OK);
    EXPECT_EQ(got.mean_correction, kind == FLEXPREFILL_PATTERN_FLASH_PREFILL);
  }
}

TEST(CApi, TheAuditSaysWhereABudgetLeavesLessThanGamma) {
  using namespace flexprefill;
  Call call;
  call.pattern = flexprefill_pattern_default(FLEXPREFILL_PATTERN_BLOCK_COVER);
  call.pattern.gamma = 0.95f;
  std::vector<flexprefill_head_audit> audit(Call::kB * Call::kHq);
  const auto prefill = [&] {
    return flexprefill_prefill(&call.input, &call.pattern, &call.execution, call.workspace.data(),
                               call.workspace.size(), &call.out_tensor, nullptr, audit.data(),
                               static_cast<int64_t>(audit.size()));
  };
  ASSERT_EQ(prefill(), FLEXPREFILL_OK) << last_error();
  for (const flexprefill_head_audit& head : audit) {
    EXPECT_EQ(head.pattern, FLEXPREFILL_HEAD_BLOCK_COVER);
    EXPECT_GE(head.least_row_mass, 0.95f);
    EXPECT_EQ(head.rows_below_gamma, 0);
  }
  call.pattern.max_budget = 0;
  ASSERT_EQ(prefill(), FLEXPREFILL_OK) << last_error();
  for (const flexprefill_head_audit& head : audit) {
    EXPECT_LT(head.least_row_mass, 0.95f);
    EXPECT_GT(head.rows_below_gamma, 0);
  }
}

TEST(CApi, AnAuditedCallHasAFloorAndAComparison) {
  using namespace flexprefill;
  Call call, dense;
  std::vector<flexprefill_head_audit> heads(Call::kB * Call::kHq);
  std::vector<flexprefill_dense_comparison> comparison(heads.size());
  flexprefill_prefill_audit audit = flexprefill_prefill_audit_default();
  const auto prefill = [&] {
    return flexprefill_prefill_audited(&call.input, &call.pattern, &call.execution,
                                       call.workspace.data(), call.workspace.size(),
                                       &call.out_tensor, nullptr, &audit);
  };
  audit.guard = 77;  // written
  ASSERT_EQ(prefill(), FLEXPREFILL_OK) << last_error();
  EXPECT_EQ(audit.guard, FLEXPREFILL_GUARD_NONE);

  audit.heads = heads.data();
  audit.heads_count = static_cast<int64_t>(heads.size());
  audit.compared_rows = 10;
  audit.comparison = comparison.data();
  audit.comparison_count = static_cast<int64_t>(comparison.size());
  ASSERT_EQ(prefill(), FLEXPREFILL_OK) << last_error();
  EXPECT_LT(heads[0].density, 1);
  EXPECT_EQ(comparison[0].rows, 10);
  EXPECT_GT(comparison[0].error, 0.001f);

  audit.has_min_kept_mass = 1;
  audit.min_kept_mass = 1;
  ASSERT_EQ(prefill(), FLEXPREFILL_OK) << last_error();
  EXPECT_EQ(audit.guard, FLEXPREFILL_GUARD_DENSE);
  EXPECT_EQ(heads[0].pattern, FLEXPREFILL_HEAD_DENSE);
  EXPECT_LT(comparison[0].error, 0.001f);
  dense.pattern = flexprefill_pattern_default(FLEXPREFILL_PATTERN_DENSE);
  ASSERT_EQ(dense.prefill(), FLEXPREFILL_OK);
  EXPECT_EQ(call.out, dense.out);

  call.pattern = flexprefill_pattern_default(FLEXPREFILL_PATTERN_BLOCK_COVER);
  call.pattern.gamma = 0.2f;
  call.pattern.column_share = 0;
  audit.min_kept_mass = 0;
  ASSERT_EQ(prefill(), FLEXPREFILL_OK) << last_error();
  EXPECT_EQ(audit.guard, FLEXPREFILL_GUARD_NONE);
  float least = 1;
  for (const flexprefill_head_audit& head : heads) least = std::fmin(least, head.kept_mass);
  audit.min_kept_mass = least + 0.001f;
  ASSERT_EQ(prefill(), FLEXPREFILL_OK) << last_error();
  EXPECT_EQ(audit.guard, FLEXPREFILL_GUARD_RAISED_GAMMA);
  EXPECT_GT(audit.gamma, 0.2f);
}

TEST(CApi, PatternOfTheFirstVersionIsTaken) {
  Call call;
  call.pattern.struct_size = offsetof(flexprefill_pattern, stride);
  call.pattern.stride = 5;  // beyond the caller's struct
  EXPECT_EQ(call.prefill(), FLEXPREFILL_OK) << last_error();
  call.pattern.kind = FLEXPREFILL_PATTERN_XATTENTION;  // with the defaults
  EXPECT_EQ(call.prefill(), FLEXPREFILL_OK) << last_error();
}

TEST(CApi, SizeQueriesAreEnough) {
  Call call;
  size_t bytes = 0;
  ASSERT_EQ(flexprefill_prefill_workspace_size(&call.input, &call.pattern, &call.execution, &bytes),
            FLEXPREFILL_OK);
  ASSERT_LT(bytes, call.workspace.size());
  ASSERT_GT(bytes, 0u);
  // From an odd address, too.
  EXPECT_EQ(
      flexprefill_prefill(&call.input, &call.pattern, &call.execution, call.workspace.data() + 1,
                          bytes, &call.out_tensor, nullptr, nullptr, 0),
      FLEXPREFILL_OK)
      << last_error();
}

TEST(CApi, StructsOfOtherVersions) {
  // One without a size, as from a caller that set every field by hand.
  Call call;
  call.input.struct_size = 0;
  call.expect_refused(FLEXPREFILL_INVALID_ARGUMENT, "struct_size");

  // One from a later header: taken while the part that is unknown here is 0.
  struct Later {
    flexprefill_execution known = flexprefill_execution_default();
    int64_t unknown = 0;
  } later;
  later.known.struct_size = sizeof(later);
  call = Call();
  const auto prefill = [&] {
    return flexprefill_prefill(&call.input, &call.pattern, &later.known, call.workspace.data(),
                               call.workspace.size(), &call.out_tensor, nullptr, nullptr, 0);
  };
  later.unknown = 1;
  EXPECT_EQ(prefill(), FLEXPREFILL_UNSUPPORTED);
  EXPECT_NE(last_error().find("execution"), std::string::npos);
  later.unknown = 0;
  EXPECT_EQ(prefill(), FLEXPREFILL_OK) << last_error();
}

TEST(CApi, ExecutionOfTheFirstVersionHasNoStream) {
  Call call;
  call.execution.struct_size = offsetof(flexprefill_execution, stream);
  call.execution.stream = &call;  // beyond what the caller says it has
  EXPECT_EQ(flexprefill_prefill(&call.input, &call.pattern, &call.execution, call.workspace.data(),
                                call.workspace.size(), &call.out_tensor, nullptr, nullptr, 0),
            FLEXPREFILL_OK)
      << last_error();
}

TEST(CApi, IndexOnTheDeviceNeedsACudaBackend) {
  Call call;
  call.input.q.dtype = call.input.k.dtype = call.input.v.dtype = FLEXPREFILL_BFLOAT16;
  int64_t rows = 0, capacity = 0;
  ASSERT_EQ(flexprefill_device_block_index_size(&call.input, &rows, &capacity), FLEXPREFILL_OK)
      << last_error();
  EXPECT_GT(rows, 0);
  EXPECT_GE(capacity, rows);
  size_t bytes = 0;
  EXPECT_EQ(flexprefill_select_on_device_workspace_size(&call.input, nullptr, nullptr, &bytes),
            FLEXPREFILL_UNSUPPORTED);
  EXPECT_NE(last_error().find("expected a CUDA backend"), std::string::npos) << last_error();
  flexprefill_device_block_index index = flexprefill_device_block_index_default();
  EXPECT_EQ(flexprefill_attend_on_device(&call.input, &index, nullptr, call.workspace.data(),
                                         call.workspace.size(), &call.out_tensor, nullptr),
            FLEXPREFILL_UNSUPPORTED);
  EXPECT_EQ(flexprefill_select_on_device(&call.input, nullptr, nullptr, call.workspace.data(),
                                         call.workspace.size(), nullptr),
            FLEXPREFILL_INVALID_ARGUMENT);
}

TEST(CApi, MessagesBelongToTheirThread) {
  EXPECT_EQ(flexprefill_block_index_check(nullptr), FLEXPREFILL_INVALID_ARGUMENT);
  const std::string before = last_error();
  std::string at_first, after;
  std::thread([&] {
    at_first = last_error();
    flexprefill_workspace_reserve(nullptr, 1, nullptr);
    after = last_error();
  }).join();
  EXPECT_EQ(at_first, "");
  EXPECT_NE(after, "");
  EXPECT_NE(after, before);
  EXPECT_EQ(last_error(), before);
}

TEST(CApi, OutOfMemoryIsAStatus) {
#ifdef FLEXPREFILL_SANITIZED
  GTEST_SKIP() << "the sanitizer ends the program when memory runs out";
#endif
  flexprefill_workspace* workspace = nullptr;
  ASSERT_EQ(flexprefill_workspace_create(&workspace), FLEXPREFILL_OK);
  void* data = nullptr;
  EXPECT_EQ(flexprefill_workspace_reserve(workspace, std::numeric_limits<size_t>::max() / 4, &data),
            FLEXPREFILL_OUT_OF_MEMORY);
  EXPECT_EQ(data, nullptr);
  EXPECT_EQ(flexprefill_workspace_reserve(workspace, 64, &data), FLEXPREFILL_OK);
  EXPECT_NE(data, nullptr);
  flexprefill_workspace_destroy(workspace);
}

TEST(CApiIndex, ViewSerializeDeserializeCopy) {
  Call call;
  const IndexPointer index = call.select();
  flexprefill_block_index_view view = flexprefill_block_index_view_default();
  ASSERT_EQ(flexprefill_block_index_get_view(index.get(), &view), FLEXPREFILL_OK);
  EXPECT_EQ(view.block_size, 32);
  EXPECT_EQ(view.h_q, Call::kHq);
  ASSERT_EQ(view.sequence_count, Call::kB);
  EXPECT_EQ(view.sequence_lengths[0], Call::kSq);
  EXPECT_EQ(view.sequence_lengths[1], Call::kSkv);
  int64_t first_q_block = 0, n_q = 0, n_kv = 0;
  ASSERT_EQ(flexprefill_block_grid(Call::kSq, Call::kSkv, 32, &first_q_block, &n_q, &n_kv),
            FLEXPREFILL_OK);
  EXPECT_EQ(first_q_block, 1);  // query row 0 stands at position 60
  EXPECT_EQ(n_kv, 9);
  EXPECT_EQ(n_q, 8);
  ASSERT_EQ(view.indptr_count, Call::kB * Call::kHq * n_q + 1);
  EXPECT_EQ(view.indptr[view.indptr_count - 1], view.indices_count);

  size_t size = 0;
  ASSERT_EQ(flexprefill_block_index_serialize(index.get(), nullptr, 0, &size), FLEXPREFILL_OK);
  std::vector<char> bytes(size);
  EXPECT_EQ(flexprefill_block_index_serialize(index.get(), bytes.data(), size - 1, &size),
            FLEXPREFILL_INVALID_ARGUMENT);
  ASSERT_EQ(flexprefill_block_index_serialize(index.get(), bytes.data(), size, &size),
            FLEXPREFILL_OK);
  flexprefill_block_index *loaded = nullptr, *copied = nullptr;
  ASSERT_EQ(flexprefill_block_index_deserialize(bytes.data(), size, &loaded), FLEXPREFILL_OK);
  const IndexPointer loaded_owner(loaded);
  ASSERT_EQ(flexprefill_block_index_from_view(&view, &copied), FLEXPREFILL_OK) << last_error();
  const IndexPointer copied_owner(copied);
  for (const flexprefill_block_index* other : {loaded, copied}) {
    flexprefill_block_index_view got = flexprefill_block_index_view_default();
    ASSERT_EQ(flexprefill_block_index_get_view(other, &got), FLEXPREFILL_OK);
    ASSERT_EQ(got.indptr_count, view.indptr_count);
    ASSERT_EQ(got.indices_count, view.indices_count);
    EXPECT_EQ(0, std::memcmp(got.indptr, view.indptr, sizeof(int64_t) * view.indptr_count));
    EXPECT_EQ(0, std::memcmp(got.indices, view.indices, sizeof(int32_t) * view.indices_count));
  }
  bytes[0] = 'X';
  EXPECT_EQ(flexprefill_block_index_deserialize(bytes.data(), size, &loaded),
            FLEXPREFILL_INVALID_ARGUMENT);
}

TEST(CApiIndex, DenseIndexGivesDenseAttention) {
  Call call;
  const int64_t lengths[2 * Call::kB] = {Call::kSq, Call::kSkv, Call::kSq, Call::kSkv};
  flexprefill_block_index* index = nullptr;
  ASSERT_EQ(flexprefill_block_index_dense(lengths, Call::kB, Call::kHq, 32, &index),
            FLEXPREFILL_OK);
  const IndexPointer owner(index);
  double density = 0;
  ASSERT_EQ(flexprefill_block_index_density(index, &density), FLEXPREFILL_OK);
  EXPECT_EQ(density, 1);
  const auto attend = [&](const flexprefill_block_index* kept) {
    EXPECT_EQ(flexprefill_attend(&call.input, kept, &call.execution, call.workspace.data(),
                                 call.workspace.size(), &call.out_tensor, nullptr),
              FLEXPREFILL_OK)
        << last_error();
    return call.out;
  };
  EXPECT_EQ(attend(index), attend(nullptr));
}

TEST(CApi, NamesAndVersions) {
  EXPECT_EQ(flexprefill_version(), flexprefill::version());
  EXPECT_EQ(flexprefill_c_api_version(), FLEXPREFILL_C_API_VERSION);
  EXPECT_EQ(flexprefill_cpu_target_name(-1), nullptr);
  EXPECT_EQ(flexprefill_cpu_target_name(7), nullptr);
  const int32_t n = flexprefill_cpu_targets(nullptr, 0);
  ASSERT_GE(n, 1);
  std::vector<int32_t> targets(n, -1);
  EXPECT_EQ(flexprefill_cpu_targets(targets.data(), n), n);
  for (const int32_t target : targets) EXPECT_NE(flexprefill_cpu_target_name(target), nullptr);
  targets.assign(n, -1);
  EXPECT_EQ(flexprefill_cpu_targets(targets.data(), 0), n);
  EXPECT_EQ(targets[0], -1);
}

}  // namespace
}  // namespace flexprefill::testing

// What only the CUDA backends have: the index on the device, streams and graphs, errors of their
// own. Without a card the tests that need one are skipped.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "case_table.h"
#include "cuda/cuda_check.h"
#include "cuda/device_index.h"
#include "device_memory.h"
#include "flexprefill/c_api.h"
#include "index/block_row.h"
#include "math.h"
#include "staged_call.h"
#include "test_executions.h"

namespace flexprefill::testing {
namespace {

bool has_device() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  static_cast<void>(cudaGetLastError());
  return error == cudaSuccess && count > 0;
}

Case medium_case(Layout layout = Layout::kBatch) {
  return {.name = "medium",
          .lengths = {{100, 170}, {100, 170}},
          .h_q = 4,
          .h_kv = 2,
          .d_qk = 32,
          .d_v = 32,
          .dtype = DType::kBFloat16,
          .block_size = 64,
          .layout = layout,
          .fill = Fill::kStructured,
          .seed = 5};
}

std::string message_of(const std::function<void()>& call, ErrorCode code) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    return error.what();
  }
  return "no error";
}

void expect_says(const std::string& message, const std::string& part) {
  EXPECT_NE(message.find(part), std::string::npos) << message;
}

// An index's arrays in device memory, with room for every causal block.
struct DeviceArrays {
  explicit DeviceArrays(const AttentionInput& input)
      : rows(device_block_index_rows(input)),
        capacity(device_block_index_capacity(input)),
        indptr((rows + 1) * sizeof(int64_t)),
        indices(capacity * sizeof(int32_t)) {}
  explicit DeviceArrays(const BlockIndex& from)
      : rows(from.row_count()),
        capacity(static_cast<int64_t>(from.indices.size())),
        indptr((rows + 1) * sizeof(int64_t)),
        indices(capacity * sizeof(int32_t)) {
    indptr.write(from.indptr.data());
    indices.write(from.indices.data());
  }
  DeviceBlockIndex view() const {
    return {.indptr = reinterpret_cast<int64_t*>(indptr.data()),
            .indices = reinterpret_cast<int32_t*>(indices.data()),
            .capacity = capacity};
  }
  // After the stream has come to it.
  void read(BlockIndex& to) const {
    to.indptr.resize(rows + 1);
    indptr.read(to.indptr.data());
    std::vector<int32_t> all(capacity);
    indices.read(all.data());
    to.indices.assign(all.begin(), all.begin() + to.indptr.back());
    indptr.check_guards("indptr");
    indices.check_guards("indices");
  }

  int64_t rows, capacity;
  DeviceMemory indptr, indices;
};

// ---- The index on the device

Case index_case(const std::string& name, std::vector<SequenceLengths> lengths, int32_t block_size) {
  return {.name = name,
          .lengths = std::move(lengths),
          .h_q = 3,
          .h_kv = 1,
          .d_qk = 16,
          .d_v = 16,
          .dtype = DType::kBFloat16,
          .block_size = block_size,
          .layout = Layout::kPacked};
}

std::vector<Case> index_cases() {
  std::vector<Case> cases{
      index_case("one_row", {{1, 1}}, 64),
      index_case("chunk", {{100, 900}}, 64),
      // More words in a row than a warp has lanes; more rows than a group.
      index_case("long", {{900, 70000}}, 32),
      index_case("many_words", {{9000, 70000}}, 32),
      index_case("long_and_short", {{2000, 9000}, {40, 40}, {700, 5000}}, 32),
  };
  std::vector<SequenceLengths> many;  // more sequences than one launch describes
  for (int64_t s = 0; s < 150; ++s) many.push_back({1 + s % 70, 1 + s});
  for (SequenceLengths& lengths : many) lengths.s_q = std::min(lengths.s_q, lengths.s_kv);
  cases.push_back(index_case("many_sequences", many, 32));
  return cases;
}

class DeviceIndex : public ::testing::TestWithParam<Case> {};

TEST_P(DeviceIndex, CsrAndBitsAreTheSameBlocks) {
  if (!has_device()) GTEST_SKIP() << "no CUDA device";
  const CaseData data(GetParam());
  const Problem problem = make_problem(data.input, Purpose::kSelectSize, Backend::kCuda);
  Arena count;
  make_device_problem(problem, count, nullptr);
  int64_t* sums = lay_out_csr_sums(problem.first_row.back(), count);
  const DeviceMemory workspace(count.bytes());
  Arena arena({workspace.data(), workspace.size()});
  const DeviceProblem device = make_device_problem(problem, arena, nullptr);
  sums = lay_out_csr_sums(problem.first_row.back(), arena);

  const BlockIndex want = random_index(data, 0.4, 3, true);
  const DeviceArrays from(want), to(data.input);
  const DeviceMemory bits(BlockBits::layout(problem).word_count() * sizeof(uint64_t));
  auto* words = reinterpret_cast<uint64_t*>(bits.data());
  csr_to_bits(device, from.view(), words, nullptr);
  bits_to_csr(device, words, BlockBits::layout(problem).word_count(), sums, to.view(), nullptr);
  expect_cuda(cudaDeviceSynchronize(), "index");

  BlockBits got = BlockBits::layout(problem);
  std::vector<uint64_t> host(got.word_count());
  bits.read(host.data());
  bits.check_guards("bits");
  workspace.check_guards("workspace");
  got.words = host.data();
  EXPECT_EQ(to_block_index(problem, got, {}).indices, want.indices);
  BlockIndex back = want;
  to.read(back);
  EXPECT_EQ(back.indptr, want.indptr);
  EXPECT_EQ(back.indices, want.indices);
}

INSTANTIATE_TEST_SUITE_P(Cases, DeviceIndex, ::testing::ValuesIn(index_cases()),
                         [](const auto& param_info) { return param_info.param.name; });

TEST(DeviceIndexOf, AnythingWritesNoBlockThatIsNone) {
  if (!has_device()) GTEST_SKIP() << "no CUDA device";
  const CaseData data(index_case("hostile", {{100, 300}}, 32));
  const Problem problem = make_problem(data.input, Purpose::kSelectSize, Backend::kCuda);
  Arena count;
  make_device_problem(problem, count, nullptr);
  const DeviceMemory workspace(count.bytes());
  Arena arena({workspace.data(), workspace.size()});
  const DeviceProblem device = make_device_problem(problem, arena, nullptr);

  BlockIndex index = dense_block_index(data.lengths, data.c.h_q, 32);
  index.indices[0] = -7;
  index.indices[1] = 1 << 30;
  index.indices[2] = 9;  // after the diagonal of row 0
  index.indptr[0] = -1000000;
  index.indptr[2] = int64_t{1} << 60;
  index.indptr.back() = int64_t{1} << 40;
  const DeviceArrays arrays(index);
  const DeviceMemory bits(BlockBits::layout(problem).word_count() * sizeof(uint64_t));
  csr_to_bits(device, arrays.view(), reinterpret_cast<uint64_t*>(bits.data()), nullptr);
  expect_cuda(cudaDeviceSynchronize(), "index");
  bits.check_guards("bits");
  std::vector<uint64_t> words(bits.size() / sizeof(uint64_t));
  bits.read(words.data());
  const BlockGrid& grid = problem.grids[0];
  for (size_t r = 0; r < words.size(); ++r) {  // one word a row
    const int64_t last = grid.first_q_block + static_cast<int64_t>(r) % grid.n_q;
    EXPECT_EQ(words[r] >> (last + 1), 0) << "row " << r;
  }
}

// ---- Calls

class CudaCall : public ::testing::TestWithParam<Execution> {
 protected:
  const Execution& execution() const { return GetParam(); }
};

std::vector<float> outputs(const CaseData& data) {
  std::vector<float> all;
  for (int64_t s = 0; s < static_cast<int64_t>(data.lengths.size()); ++s) {
    for (int64_t i = 0; i < data.lengths[s].s_q; ++i) {
      for (int32_t h = 0; h < data.c.h_q; ++h) {
        all.push_back(data.lse_at(s, h, i));
        for (int32_t col = 0; col < data.c.d_v; ++col) all.push_back(data.out_at(s, i, h, col));
      }
    }
  }
  return all;
}

void expect_same_outputs(const CaseData& a, const CaseData& b) {
  const std::vector<float> left = outputs(a), right = outputs(b);
  ASSERT_EQ(left.size(), right.size());
  for (size_t e = 0; e < left.size(); ++e) ASSERT_EQ(left[e], right[e]) << "element " << e;
}

const std::vector<MInferenceHead> kHeads{{MInferenceHead::Kind::kBlockSparse, 64, 0},
                                         {MInferenceHead::Kind::kAShape, 1, 64},
                                         {MInferenceHead::Kind::kVerticalSlash, 64, 64},
                                         {MInferenceHead::Kind::kBlockSparse, 100, 0}};
const FlashPrefill kFlash{.alpha = 0.9f, .global_window = 0, .local_window = 1, .last_queries = 0};
std::vector<Pattern> patterns() {
  FlashPrefill uncorrected = kFlash;
  uncorrected.mean_correction = false;
  return {Dense{},
          FlexPrefill{.min_budget = 32},
          FlexPrefill{.tau = 1, .min_budget = 32},
          VerticalSlash{64, 64},
          StreamingLlm{30, 50},
          XAttention{8, 0.5f},
          kFlash,
          uncorrected,
          MInference{kHeads},
          BlockCover{.gamma = 0.5f},
          BlockCover{.gamma = 0.9f, .column_share = 0.5f, .max_budget = 96}};
}

TEST_P(CudaCall, PrefillIsSelectAndAttendWithAnIndexOnHostOrDevice) {
  for (const Layout layout : {Layout::kPacked, Layout::kPaged}) {
    for (const Pattern& pattern : patterns()) {
      SCOPED_TRACE(static_cast<int>(layout) * 10 + static_cast<int>(pattern.index()));
      CaseData whole(medium_case(layout)), host(medium_case(layout)), device(medium_case(layout));
      std::vector<HeadAudit> audit(8), device_audit(8);
      {
        StagedCall call(whole, execution());
        const size_t bytes = prefill_workspace_size(call.input, pattern, execution());
        prefill(call.input, pattern, execution(), call.workspace(bytes), call.out, call.lse, audit);
        call.finish();
      }
      BlockIndex index;
      {
        StagedCall call(host, execution());
        size_t bytes = select_workspace_size(call.input, pattern, execution());
        select(call.input, pattern, execution(), call.workspace(bytes), index);
        index.check();
        bytes = attend_workspace_size(call.input, execution());
        attend(call.input, &index, execution(), call.workspace(bytes), call.out, call.lse);
        call.finish();
      }
      expect_same_outputs(whole, host);
      {
        StagedCall call(device, execution());
        const DeviceArrays arrays(call.input);
        const DeviceMemory heads(device_audit.size() * sizeof(HeadAudit));
        DeviceBlockIndex on_device = arrays.view();
        size_t bytes = select_on_device_workspace_size(call.input, pattern, execution());
        select_on_device(call.input, pattern, execution(), call.workspace(bytes), on_device,
                         reinterpret_cast<HeadAudit*>(heads.data()));
        call.finish();
        heads.read(device_audit.data());
        BlockIndex back = index;
        arrays.read(back);
        EXPECT_EQ(back.indptr, index.indptr);
        EXPECT_EQ(back.indices, index.indices);
        EXPECT_EQ(on_device.global_window, index.global_window);
        EXPECT_EQ(on_device.local_window, index.local_window);
        EXPECT_EQ(on_device.mean_correction, index.mean_correction);
        bytes = attend_on_device_workspace_size(call.input, execution());
        attend_on_device(call.input, on_device, execution(), call.workspace(bytes), call.out,
                         call.lse);
        call.finish();
      }
      expect_same_outputs(whole, device);
      for (size_t h = 0; h < audit.size(); ++h) {
        EXPECT_EQ(std::memcmp(&audit[h], &device_audit[h], sizeof(HeadAudit)), 0) << "head " << h;
      }
    }
  }
}

TEST_P(CudaCall, CudaTakesTheKernelsOfTheCard) {
  CaseData one(medium_case()), other(medium_case());
  for (CaseData* data : {&one, &other}) {
    Execution by = execution();
    if (data == &other) by.backend = Backend::kCuda;
    StagedCall call(*data, by);
    const size_t bytes = prefill_workspace_size(call.input, Dense{}, by);
    prefill(call.input, Dense{}, by, call.workspace(bytes), call.out, call.lse);
    call.finish();
  }
  const bool has_sm90 = cuda_executions(Stage::kPrefill).size() == 2;
  if (has_sm90 == (execution().backend == Backend::kSm90)) expect_same_outputs(one, other);
}

// ---- Graphs

class Stream {
 public:
  Stream() { expect_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream"); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(stream_); }
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

// Captures what `enqueue` does on the stream.
class Graph {
 public:
  Graph(const Stream& stream, const std::function<void()>& enqueue) {
    expect_cuda(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal), "capture");
    enqueue();
    expect_cuda(cudaStreamEndCapture(stream.get(), &graph_), "end of the capture");
    expect_cuda(cudaGraphInstantiate(&executable_, graph_, 0), "graph");
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() {
    cudaGraphExecDestroy(executable_);
    cudaGraphDestroy(graph_);
  }
  void launch(const Stream& stream) const {
    expect_cuda(cudaGraphLaunch(executable_, stream.get()), "launch of the graph");
    expect_cuda(cudaStreamSynchronize(stream.get()), "the graph");
  }

 private:
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

TEST_P(CudaCall, AGraphReplaysPrefillOnNewInputs) {
  for (const Pattern& pattern : patterns()) {
    SCOPED_TRACE(pattern.index());
    const Stream stream;
    Execution on_stream = execution();
    on_stream.stream = stream.get();
    Case c = medium_case(Layout::kPacked);
    CaseData first(c);
    StagedCall call(first, on_stream);
    const size_t bytes = prefill_workspace_size(call.input, pattern, on_stream);
    const Workspace workspace = call.workspace(bytes);
    const Graph graph(
        stream, [&] { prefill(call.input, pattern, on_stream, workspace, call.out, call.lse); });
    for (const uint32_t seed : {11u, 12u}) {
      c.seed = seed;
      CaseData fresh(c), direct(c);
      call.rewrite(fresh);
      graph.launch(stream);
      call.finish_into(fresh);
      StagedCall again(direct, execution());
      prefill(again.input, pattern, execution(), again.workspace(bytes), again.out, again.lse);
      again.finish();
      expect_same_outputs(fresh, direct);
    }
  }
}

// A graph of select_on_device and attend_on_device against prefill.
void check_two_stages(const Execution& execution, const Pattern& pattern) {
  SCOPED_TRACE(pattern.index());
  const Stream stream;
  Execution on_stream = execution;
  on_stream.stream = stream.get();
  Case c = medium_case(Layout::kPaged);
  CaseData first(c);
  StagedCall call(first, on_stream);
  const DeviceArrays arrays(call.input);
  DeviceBlockIndex index = arrays.view();
  const size_t bytes = std::max(select_on_device_workspace_size(call.input, pattern, on_stream),
                                attend_on_device_workspace_size(call.input, on_stream));
  const Workspace workspace = call.workspace(bytes);
  const Graph graph(stream, [&] {
    select_on_device(call.input, pattern, on_stream, workspace, index);
    attend_on_device(call.input, index, on_stream, workspace, call.out, call.lse);
  });
  c.seed = 13;
  CaseData fresh(c), direct(c);
  call.rewrite(fresh);
  graph.launch(stream);
  call.finish_into(fresh);
  StagedCall again(direct, execution);
  prefill(again.input, pattern, execution,
          again.workspace(prefill_workspace_size(again.input, pattern, execution)), again.out,
          again.lse);
  again.finish();
  expect_same_outputs(fresh, direct);
}

flexprefill_tensor to_c(const TensorView& view) {
  flexprefill_tensor tensor = flexprefill_tensor_contiguous(
      view.data, static_cast<int32_t>(view.dtype), view.rank, view.shape.data());
  std::copy(view.strides.begin(), view.strides.end(), tensor.strides);
  return tensor;
}

TEST_P(CudaCall, AGraphReplaysSelectAndAttendOnTheDevice) {
  for (const Pattern& pattern : patterns()) check_two_stages(execution(), pattern);
}

TEST_P(CudaCall, TheCApiSelectsAndAttendsOnTheDevice) {
  CaseData whole(medium_case()), apart(medium_case());
  StagedCall prefilled(whole, execution()), call(apart, execution());
  prefill(prefilled.input, kFlash, execution(),
          prefilled.workspace(prefill_workspace_size(prefilled.input, kFlash, execution())),
          prefilled.out, prefilled.lse);
  prefilled.finish();

  flexprefill_input input = flexprefill_input_default();
  input.q = to_c(call.input.q);
  input.k = to_c(call.input.k);
  input.v = to_c(call.input.v);
  input.block_size = call.input.block_size;
  flexprefill_execution by = flexprefill_execution_default();
  by.backend = static_cast<int32_t>(execution().backend);
  flexprefill_pattern pattern = flexprefill_pattern_default(FLEXPREFILL_PATTERN_FLASH_PREFILL);
  pattern.alpha = kFlash.alpha;
  pattern.global_window = kFlash.global_window;
  pattern.local_window = kFlash.local_window;
  pattern.last_queries = kFlash.last_queries;
  const DeviceArrays arrays(call.input);
  flexprefill_device_block_index index = flexprefill_device_block_index_default();
  index.indptr = arrays.view().indptr;
  index.indices = arrays.view().indices;
  index.capacity = arrays.view().capacity;
  size_t select_bytes = 0, attend_bytes = 0;
  ASSERT_EQ(flexprefill_select_on_device_workspace_size(&input, &pattern, &by, &select_bytes),
            FLEXPREFILL_OK);
  ASSERT_EQ(flexprefill_attend_on_device_workspace_size(&input, &by, &attend_bytes),
            FLEXPREFILL_OK);
  const Workspace workspace = call.workspace(std::max(select_bytes, attend_bytes));
  // A struct of version 2 has no room for the flag.
  index.struct_size = offsetof(flexprefill_device_block_index, mean_correction);
  EXPECT_EQ(
      flexprefill_select_on_device(&input, &pattern, &by, workspace.data, workspace.bytes, &index),
      FLEXPREFILL_INVALID_ARGUMENT);
  expect_says(flexprefill_last_error(), "index.struct_size: expected that of version 4");
  index.struct_size = sizeof(index);
  ASSERT_EQ(
      flexprefill_select_on_device(&input, &pattern, &by, workspace.data, workspace.bytes, &index),
      FLEXPREFILL_OK)
      << flexprefill_last_error();
  EXPECT_EQ(index.mean_correction, 1);
  const flexprefill_tensor out = to_c(call.out), lse = to_c(call.lse);
  ASSERT_EQ(flexprefill_attend_on_device(&input, &index, &by, workspace.data, workspace.bytes, &out,
                                         &lse),
            FLEXPREFILL_OK)
      << flexprefill_last_error();
  call.finish();
  expect_same_outputs(whole, apart);
  index.local_window = 5;
  EXPECT_EQ(flexprefill_attend_on_device(&input, &index, &by, workspace.data, workspace.bytes, &out,
                                         &lse),
            FLEXPREFILL_INVALID_ARGUMENT);
  expect_says(flexprefill_last_error(), "expected no window together with mean_correction");
}

TEST_P(CudaCall, WhatWaitsIsRefusedWhileTheStreamIsCaptured) {
  const Stream stream;
  Execution on_stream = execution();
  on_stream.stream = stream.get();
  CaseData data(medium_case());
  StagedCall call(data, on_stream);
  const Workspace workspace =
      call.workspace(std::max(prefill_workspace_size(call.input, FlexPrefill{}, on_stream),
                              attend_workspace_size(call.input, on_stream)));
  BlockIndex index = dense_block_index(data.lengths, data.c.h_q, data.c.block_size);
  std::vector<HeadAudit> audit(8);
  const Graph graph(stream, [&] {
    expect_says(message_of([&] { select(call.input, FlexPrefill{}, on_stream, workspace, index); },
                           ErrorCode::kUnsupported),
                "select into a BlockIndex waits for the stream");
    expect_says(
        message_of([&] { attend(call.input, &index, on_stream, workspace, call.out, call.lse); },
                   ErrorCode::kUnsupported),
        "attend with a BlockIndex waits");
    expect_says(message_of(
                    [&] {
                      prefill(call.input, FlexPrefill{}, on_stream, workspace, call.out, call.lse,
                              audit);
                    },
                    ErrorCode::kUnsupported),
                "prefill with an audit waits");
    PrefillAudit floor{.min_kept_mass = 0.5f};
    expect_says(message_of(
                    [&] {
                      prefill(call.input, FlexPrefill{}, on_stream, workspace, call.out, call.lse,
                              floor);
                    },
                    ErrorCode::kUnsupported),
                "prefill with min_kept_mass waits for the stream");
  });
}

// ---- Errors

TEST_P(CudaCall, Float32IsRefused) {
  Case c = medium_case();
  c.dtype = DType::kFloat32;
  CaseData data(c);
  expect_says(message_of([&] { prefill_workspace_size(data.input, FlexPrefill{}, execution()); },
                         ErrorCode::kUnsupported),
              "q: the CUDA backends take element type float16 or bfloat16, got float32");
}

TEST_P(CudaCall, HostMemoryIsRefused) {
  CaseData data(medium_case());
  StagedCall call(data, execution());
  const size_t bytes = prefill_workspace_size(call.input, FlexPrefill{}, execution());
  const Workspace workspace = call.workspace(bytes);
  std::vector<std::byte> host(bytes);
  const auto error = [&](const AttentionInput& input, const TensorView& out, Workspace scratch) {
    return message_of([&] { prefill(input, FlexPrefill{}, execution(), scratch, out, call.lse); },
                      ErrorCode::kInvalidArgument);
  };
  AttentionInput input = call.input;
  input.k.data = data.input.k.data;
  expect_says(error(input, call.out, workspace), "k: expected device memory");
  expect_says(error(call.input, data.out, workspace), "out: expected device memory");
  expect_says(error(call.input, call.out, {host.data(), bytes}), "workspace: expected device");
}

TEST_P(CudaCall, BadInputIsRefusedBeforeAnything) {
  CaseData data(medium_case(Layout::kPacked));
  StagedCall call(data, execution());
  const size_t bytes = prefill_workspace_size(call.input, FlexPrefill{}, execution());
  const Workspace workspace = call.workspace(bytes);
  AttentionInput input = call.input;
  input.block_size = 100;
  expect_says(
      message_of([&] { prefill(input, FlexPrefill{}, execution(), workspace, call.out, call.lse); },
                 ErrorCode::kInvalidArgument),
      "block_size: expected 32, 64 or 128, got 100");
  expect_says(message_of(
                  [&] {
                    prefill(call.input, FlexPrefill{}, execution(), {workspace.data, 100}, call.out,
                            call.lse);
                  },
                  ErrorCode::kWorkspaceTooSmall),
              "workspace: expected at least");
  const DeviceArrays arrays(call.input);
  DeviceBlockIndex index = arrays.view();
  --index.capacity;
  expect_says(
      message_of(
          [&] { select_on_device(call.input, FlexPrefill{}, execution(), workspace, index); },
          ErrorCode::kInvalidArgument),
      "index: expected a capacity of at least device_block_index_capacity");
  call.finish();
  for (const float value : outputs(data)) ASSERT_TRUE(std::isnan(value));
}

TEST_P(CudaCall, AnErrorOfEarlierWorkIsTheCallersAndStays) {
  CaseData data(medium_case());
  StagedCall call(data, execution());
  const Workspace workspace =
      call.workspace(prefill_workspace_size(call.input, Dense{}, execution()));
  ASSERT_NE(cudaSetDevice(100000), cudaSuccess);
  const std::string message =
      message_of([&] { prefill(call.input, Dense{}, execution(), workspace, call.out, call.lse); },
                 ErrorCode::kInternal);
  expect_says(message, "CUDA reported an error of earlier work: CUDA error cudaErrorInvalidDevice");
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidDevice);
  prefill(call.input, Dense{}, execution(), workspace, call.out, call.lse);
  call.finish();
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(CudaCall);
INSTANTIATE_TEST_SUITE_P(Targets, CudaCall, ::testing::ValuesIn(cuda_executions(Stage::kPrefill)),
                         [](const auto& param_info) { return execution_name(param_info.param); });

TEST(CudaBackends, WithoutADeviceAreRefusedByName) {
  if (has_device()) GTEST_SKIP() << "there is a device";
  const CaseData data(medium_case());
  for (const Backend backend : {Backend::kCuda, Backend::kSm80, Backend::kSm90}) {
    expect_says(message_of([&] { prefill_workspace_size(data.input, Dense{}, {backend}); },
                           ErrorCode::kUnsupported),
                "backend: no ");
  }
}

}  // namespace
}  // namespace flexprefill::testing

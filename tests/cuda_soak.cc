// Calls of random shapes on two streams at once, each against the CPU backend.
//   cuda_soak [calls = 100] [seed = 1] [seconds = 0]
// seconds: ends after them with the calls made until then; 0: no limit. Most of the time is the CPU
// backend's, so several processes of other seeds on a few cores each make more calls.
// Ends with 0 and a line that sums up, 1 at the first mismatch, which it describes, 77 without a
// device. The kept blocks may differ from the CPU's where scores lie within rounding of a
// threshold: in less than one head of a hundred. Outputs are compared over the blocks that the
// device kept.
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "case_table.h"
#include "device_memory.h"
#include "staged_call.h"
#include "test_executions.h"

namespace flexprefill::testing {
namespace {

struct Mismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A random call.
struct Call {
  Case c;
  Pattern pattern;
  // What an MInference borrows.
  std::shared_ptr<std::vector<MInferenceHead>> heads =
      std::make_shared<std::vector<MInferenceHead>>();
  Execution execution;
  bool whole = false;  // prefill; otherwise select_on_device and attend_on_device

  std::string text() const {
    std::string out = execution_name(execution) + (whole ? " prefill" : " select, attend") +
                      " pattern " + std::to_string(pattern.index()) + " layout " +
                      std::to_string(static_cast<int>(c.layout)) + " fill " +
                      std::to_string(static_cast<int>(c.fill)) + " " + dtype_name(c.dtype) + " h " +
                      std::to_string(c.h_q) + "/" + std::to_string(c.h_kv) + " d " +
                      std::to_string(c.d_qk) + "/" + std::to_string(c.d_v) + " block " +
                      std::to_string(c.block_size) + " seed " + std::to_string(c.seed) + " lengths";
    for (const SequenceLengths& l : c.lengths) {
      out += " " + std::to_string(l.s_q) + "/" + std::to_string(l.s_kv);
    }
    return out;
  }
};

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine_);
  }
  template <typename T, size_t kSize>
  T one_of(const std::array<T, kSize>& values) {
    return values[between(0, kSize - 1)];
  }

 private:
  std::mt19937 engine_;
};

Call random_call(Random& random, const std::vector<Execution>& executions, uint32_t seed) {
  Call call;
  Case& c = call.c;
  c.layout = random.one_of(
      std::array{Layout::kBatch, Layout::kPacked, Layout::kPaged, Layout::kStrided, Layout::kOdd});
  const bool alike = c.layout != Layout::kPacked && c.layout != Layout::kPaged;
  for (int64_t s = random.between(1, 3); s > 0; --s) {
    const int64_t s_kv = random.between(1, 400);
    const int64_t s_q = random.between(0, 1) != 0 ? s_kv : random.between(1, s_kv);
    c.lengths.push_back(alike && !c.lengths.empty() ? c.lengths[0] : SequenceLengths{s_q, s_kv});
  }
  c.h_kv = static_cast<int32_t>(random.between(1, 2));
  c.h_q = c.h_kv * static_cast<int32_t>(random.between(1, 3));
  constexpr std::array<int32_t, 8> kDims{16, 40, 64, 64, 128, 128, 192, 256};
  c.d_qk = random.one_of(kDims);
  c.d_v = random.between(0, 3) != 0 ? c.d_qk : random.one_of(kDims);
  c.dtype = random.one_of(std::array{DType::kFloat16, DType::kBFloat16});
  c.block_size = random.one_of(std::array{32, 64, 128});
  c.gqa_interleave = random.between(0, 1) != 0;
  c.fill = random.one_of(std::array{Fill::kRandom, Fill::kStructured});
  c.seed = seed;
  const int64_t block = c.block_size;
  switch (random.between(0, 10)) {
    case 0:
      call.pattern = Dense{};
      break;
    case 1:
      call.pattern = VerticalSlash{random.between(0, 3 * block), random.between(0, 3 * block)};
      break;
    case 2:
      call.pattern = StreamingLlm{random.between(0, 100), random.between(1, 200)};
      break;
    case 3:
      call.pattern = XAttention{random.one_of(std::array{8, 16}),
                                static_cast<float>(random.between(1, 10)) / 10.0f};
      break;
    case 4:
      call.pattern = FlashPrefill{.alpha = static_cast<float>(random.between(0, 10)) / 10.0f,
                                  .global_window = random.between(0, 100),
                                  .local_window = random.between(1, 2 * block),
                                  .last_queries = random.between(0, 2 * block),
                                  .mean_correction = random.between(0, 1) != 0};
      break;
    case 5:
      for (int32_t h = 0; h < c.h_q; ++h) {
        call.heads->push_back({static_cast<MInferenceHead::Kind>(random.between(0, 2)),
                               random.between(0, 3 * block), random.between(1, 3 * block)});
      }
      call.pattern = MInference{*call.heads};
      break;
    case 6:
    case 7:
      call.pattern = BlockCover{.gamma = static_cast<float>(random.between(2, 10)) / 10.0f,
                                .column_share = static_cast<float>(random.between(0, 10)) / 10.0f};
      if (random.between(0, 3) == 0) {
        std::get<BlockCover>(call.pattern).max_budget = random.between(0, 8 * block);
      }
      break;
    default:
      call.pattern = FlexPrefill{.gamma = static_cast<float>(random.between(5, 10)) / 10.0f,
                                 .tau = random.one_of(std::array{0.0f, 0.1f, 1.0f}),
                                 .min_budget = random.between(0, 2 * block)};
  }
  call.execution = executions[random.between(0, static_cast<int64_t>(executions.size()) - 1)];
  // The automatic choice may be dense mode, whatever select_on_device keeps.
  call.whole = random.between(0, 1) != 0 && call.execution.backend != Backend::kCuda;
  return call;
}

// A call under way on a stream of its own.
class Slot {
 public:
  Slot() { expect_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream"); }
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;
  ~Slot() { cudaStreamDestroy(stream_); }

  void stage(const Call& call) {
    call_ = call;
    call_.execution.stream = stream_;
    data_.emplace(call.c);
    staged_ = std::make_unique<StagedCall>(*data_, call_.execution);
    const Execution& execution = call_.execution;
    const AttentionInput& input = staged_->input;
    const size_t select_bytes = select_on_device_workspace_size(input, call_.pattern, execution);
    const size_t attend_bytes = attend_on_device_workspace_size(input, execution);
    const size_t whole_bytes = prefill_workspace_size(input, call_.pattern, execution);
    workspace_ = staged_->workspace(std::max({select_bytes, attend_bytes, whole_bytes}));
    rows_ = device_block_index_rows(input);
    capacity_ = device_block_index_capacity(input);
    indptr_ = DeviceMemory((rows_ + 1) * sizeof(int64_t));
    indices_ = DeviceMemory(capacity_ * sizeof(int32_t));
  }

  // Enqueues and does not wait.
  void start() {
    const Execution& execution = call_.execution;
    const AttentionInput& input = staged_->input;
    const Workspace& workspace = workspace_;
    DeviceBlockIndex index{reinterpret_cast<int64_t*>(indptr_.data()),
                           reinterpret_cast<int32_t*>(indices_.data()), capacity_};
    select_on_device(input, call_.pattern, execution, workspace, index);
    if (call_.whole) {
      prefill(input, call_.pattern, execution, workspace, staged_->out, staged_->lse);
    } else {
      attend_on_device(input, index, execution, workspace, staged_->out, staged_->lse);
    }
    windows_ = {index.global_window, index.local_window};
    mean_correction_ = index.mean_correction;
  }

  // Heads whose kept blocks differ from the CPU's.
  int64_t finish() {
    expect_cuda(cudaStreamSynchronize(stream_), "the call");
    staged_->finish();
    BlockIndex index = read_index();
    index.check();
    check_outputs(index);
    return is_rounded() ? 0 : differing_heads(index);
  }
  // Heads that finish compares: not those of patterns whose means are rounded on the device.
  int64_t heads() const {
    return is_rounded() ? 0 : static_cast<int64_t>(data_->lengths.size()) * data_->c.h_q;
  }
  const Call& call() const { return call_; }

 private:
  bool is_rounded() const {
    return std::holds_alternative<FlashPrefill>(call_.pattern) ||
           std::holds_alternative<BlockCover>(call_.pattern);
  }

  BlockIndex read_index() const {
    BlockIndex index;
    index.block_size = call_.c.block_size;
    index.h_q = call_.c.h_q;
    index.global_window = windows_[0];
    index.local_window = windows_[1];
    index.mean_correction = mean_correction_;
    index.sequences = data_->lengths;
    index.indptr.resize(rows_ + 1);
    indptr_.read(index.indptr.data());
    std::vector<int32_t> all(capacity_);
    indices_.read(all.data());
    if (index.indptr.back() < 0 || index.indptr.back() > capacity_) {
      throw Mismatch("indptr ends with " + std::to_string(index.indptr.back()));
    }
    index.indices.assign(all.begin(), all.begin() + index.indptr.back());
    return index;
  }

  void check_outputs(const BlockIndex& index) const {
    CaseData want(call_.c);
    WorkspaceBuffer buffer;
    const Execution cpu{.backend = Backend::kCpu};
    attend(want.input, &index, cpu, buffer.reserve(attend_workspace_size(want.input, cpu)),
           want.out, want.lse);
    const double unit = call_.c.dtype == DType::kFloat16 ? 1.0 / 1024 : 1.0 / 128;
    for (int64_t s = 0; s < static_cast<int64_t>(want.lengths.size()); ++s) {
      for (int64_t i = 0; i < want.lengths[s].s_q; ++i) {
        for (int32_t h = 0; h < call_.c.h_q; ++h) check_row(want, s, i, h, unit);
      }
    }
  }

  void check_row(const CaseData& want, int64_t s, int64_t i, int32_t h, double unit) const {
    const std::string where = "sequence " + std::to_string(s) + " row " + std::to_string(i) +
                              " head " + std::to_string(h);
    const float lse = data_->lse_at(s, h, i), want_lse = want.lse_at(s, h, i);
    if (!(lse == want_lse || std::abs(lse - want_lse) <= 1e-3 + 1e-5 * std::abs(want_lse))) {
      throw Mismatch(where + ": lse " + std::to_string(lse) + ", the CPU's " +
                     std::to_string(want_lse));
    }
    double largest = 0;
    for (int32_t col = 0; col < call_.c.d_v; ++col) {
      largest = std::max(largest, std::abs(static_cast<double>(want.out_at(s, i, h, col))));
    }
    for (int32_t col = 0; col < call_.c.d_v; ++col) {
      const double got = data_->out_at(s, i, h, col), wanted = want.out_at(s, i, h, col);
      if (!(std::abs(got - wanted) <= 2 * unit * (std::abs(wanted) + largest))) {
        throw Mismatch(where + " column " + std::to_string(col) + ": " + std::to_string(got) +
                       ", the CPU's " + std::to_string(wanted));
      }
    }
  }

  int64_t differing_heads(const BlockIndex& got) const {
    BlockIndex want;
    WorkspaceBuffer buffer;
    const Execution cpu{.backend = Backend::kCpu};
    select(data_->input, call_.pattern, cpu,
           buffer.reserve(select_workspace_size(data_->input, call_.pattern, cpu)), want);
    int64_t differing = 0, row = 0;
    for (const SequenceLengths& lengths : want.sequences) {
      const int64_t n_q = block_grid(lengths, want.block_size).n_q;
      for (int32_t h = 0; h < want.h_q; ++h, row += n_q) {
        const auto blocks = [&](const BlockIndex& index) {
          std::vector<int32_t> all;
          for (int64_t r = row; r < row + n_q; ++r) {
            all.push_back(-1);  // the row's start
            all.insert(all.end(), index.indices.begin() + index.indptr[r],
                       index.indices.begin() + index.indptr[r + 1]);
          }
          return all;
        };
        differing += blocks(got) != blocks(want);
      }
    }
    return differing;
  }

  cudaStream_t stream_ = nullptr;
  Call call_;
  std::optional<CaseData> data_;
  std::unique_ptr<StagedCall> staged_;
  Workspace workspace_;
  int64_t rows_ = 0, capacity_ = 0;
  DeviceMemory indptr_, indices_;
  std::array<int64_t, 2> windows_{};
  bool mean_correction_ = false;
};

int soak(int64_t calls, uint32_t seed, int64_t seconds) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<Execution> executions = cuda_executions(Stage::kPrefill);
  if (executions.empty()) {
    std::printf("cuda_soak: no CUDA device\n");
    return 77;
  }
  executions.push_back({.backend = Backend::kCuda});
  Random random(seed);
  std::array<Slot, 2> slots;
  int64_t heads = 0, differing = 0;
  int64_t n = 0;
  for (; n < calls; n += 2) {
    if (seconds > 0 && std::chrono::steady_clock::now() - start > std::chrono::seconds(seconds)) {
      break;
    }
    for (Slot& slot : slots) {
      slot.stage(
          random_call(random, executions, static_cast<uint32_t>(random.between(1, 1 << 30))));
    }
    expect_cuda(cudaDeviceSynchronize(), "staging");
    for (Slot& slot : slots) slot.start();
    for (size_t s = 0; s < slots.size(); ++s) {
      try {
        differing += slots[s].finish();
        heads += slots[s].heads();
      } catch (const std::exception& error) {
        std::printf("cuda_soak: call %lld, %s:\n  %s\n", static_cast<long long>(n + s),
                    slots[s].call().text().c_str(), error.what());
        return 1;
      }
    }
  }
  std::printf(
      "cuda_soak: %lld calls on two streams, outputs as the CPU's; kept blocks as the "
      "CPU's in %lld of %lld heads\n",
      static_cast<long long>(n), static_cast<long long>(heads - differing),
      static_cast<long long>(heads));
  return differing * 100 <= heads ? 0 : 1;
}

}  // namespace
}  // namespace flexprefill::testing

int main(int argc, char** argv) {
  const int64_t calls = argc > 1 ? std::atoll(argv[1]) : 100;
  const auto seed = static_cast<uint32_t>(argc > 2 ? std::atoll(argv[2]) : 1);
  const int64_t seconds = argc > 3 ? std::atoll(argv[3]) : 0;
  return flexprefill::testing::soak(calls, seed, seconds);
}

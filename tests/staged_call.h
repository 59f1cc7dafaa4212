// A call's tensors where its backend wants them: in place for those that compute on host memory,
// guarded copies in device memory for the CUDA ones. The workspace is exactly as large as asked
// for, and poisoned.
#ifndef FLEXPREFILL_TESTS_STAGED_CALL_H_
#define FLEXPREFILL_TESTS_STAGED_CALL_H_

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "case_table.h"
#include "device_memory.h"
#include "flexprefill/flexprefill.h"
#include "problem.h"

namespace flexprefill::testing {

// Where a view's elements lie, in bytes from its data.
struct ViewSpan {
  int64_t first = 0, last = 0;  // one past

  explicit ViewSpan(const TensorView& view) {
    const auto size = static_cast<int64_t>(element_size(view.dtype));
    last = size;
    for (int32_t i = 0; i < view.rank; ++i) {
      if (view.shape[i] == 0) {
        first = last = 0;
        return;
      }
      const int64_t reach = (view.shape[i] - 1) * view.strides[i] * size;
      (reach < 0 ? first : last) += reach;
    }
  }
  size_t bytes() const { return static_cast<size_t>(last - first); }
};

class StagedCall {
 public:
  StagedCall(const AttentionInput& from, const TensorView& out_to, const TensorView& lse_to,
             const Execution& execution)
      : input(from), out(out_to), lse(lse_to), on_device_(is_cuda(execution.backend)) {
#if defined(FLEXPREFILL_WITH_CUDA)
    if (!on_device_) return;
    for (TensorView* view : {&input.q, &input.k, &input.v, &out, &lse}) stage(*view);
    if (input.page_table != nullptr) {
      const auto b = static_cast<int64_t>(input.seqlens_kv.size());
      memory_.emplace_back(((b - 1) * input.page_table_stride + input.max_pages) * sizeof(int32_t));
      memory_.back().write(input.page_table);
      input.page_table = reinterpret_cast<const int32_t*>(memory_.back().data());
    }
    host_out_ = out_to;
    host_lse_ = lse_to;
#endif
  }
  StagedCall(CaseData& data, const Execution& execution)
      : StagedCall(data.input, data.out, data.lse, execution) {}

  Workspace workspace(size_t bytes) {
#if defined(FLEXPREFILL_WITH_CUDA)
    if (on_device_) {
      workspace_ = DeviceMemory(bytes, 1);  // as badly aligned as may be
      return {workspace_.data(), bytes};
    }
#endif
    const Workspace workspace = buffer_.reserve(bytes);
    if (bytes > 0) std::memset(workspace.data, 0xff, bytes);
    return {workspace.data, bytes};
  }

  // Waits for the device; results and guards are looked at.
  void finish() {
#if defined(FLEXPREFILL_WITH_CUDA)
    if (!on_device_) return;
    expect_cuda(cudaDeviceSynchronize(), "the call");
    read_back(out, host_out_);
    read_back(lse, host_lse_);
    for (const DeviceMemory& memory : memory_) memory.check_guards("a tensor");
    workspace_.check_guards("workspace");
#endif
  }

#if defined(FLEXPREFILL_WITH_CUDA)
  // New numbers for the same call on the device: q, k and v of a case of the same shapes.
  void rewrite(const CaseData& data) {
    const TensorView* from[] = {&data.input.q, &data.input.k, &data.input.v};
    for (size_t i = 0; i < 3; ++i) {
      memory_[i].write(static_cast<std::byte*>(from[i]->data) + ViewSpan(*from[i]).first);
    }
  }
  // finish, with the results in another case of the same shapes.
  void finish_into(CaseData& data) {
    host_out_ = data.out;
    host_lse_ = data.lse;
    finish();
  }
#endif

  AttentionInput input;
  TensorView out, lse;

 private:
#if defined(FLEXPREFILL_WITH_CUDA)
  void stage(TensorView& view) {
    if (view.data == nullptr) return;
    const ViewSpan span(view);
    const auto* first = static_cast<std::byte*>(view.data) + span.first;
    memory_.emplace_back(span.bytes(), reinterpret_cast<uintptr_t>(first) % 16);
    memory_.back().write(first);
    view.data = memory_.back().data() - span.first;
  }
  static void read_back(const TensorView& from, const TensorView& to) {
    const ViewSpan span(to);
    if (to.data == nullptr || span.bytes() == 0) return;
    expect_cuda(cudaMemcpy(static_cast<std::byte*>(to.data) + span.first,
                           static_cast<std::byte*>(from.data) + span.first, span.bytes(),
                           cudaMemcpyDeviceToHost),
                "copy of a result");
  }

  std::vector<DeviceMemory> memory_;
  DeviceMemory workspace_;
  TensorView host_out_, host_lse_;
#endif
  WorkspaceBuffer buffer_;
  bool on_device_;
};

}  // namespace flexprefill::testing

#endif  // FLEXPREFILL_TESTS_STAGED_CALL_H_

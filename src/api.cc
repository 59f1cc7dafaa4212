// The C++ API: validate, lay the workspace out, hand over to a backend.
#include <algorithm>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "attend/compare_rows.h"
#include "attend/dense_rule.h"
#include "backend.h"
#include "flexprefill/flexprefill.h"

namespace flexprefill {
namespace {

void check_execution(const Execution& execution) {
  if (execution.num_threads < 0) {
    throw Error(ErrorCode::kInvalidArgument,
                "num_threads: expected at least 0, got " + std::to_string(execution.num_threads));
  }
}

TokenWindow token_window(const Pattern& pattern) {
  if (const auto* streaming = std::get_if<StreamingLlm>(&pattern)) {
    return TokenWindow::of(streaming->global_window, streaming->local_window);
  }
  return {};
}

bool mean_correction(const Pattern& pattern) {
  const auto* flash = std::get_if<FlashPrefill>(&pattern);
  return flash != nullptr && flash->mean_correction;
}

// Each stage as one function for both the size query (a counting arena) and the call.
BlockBits lay_out_bits(const Problem& problem, Arena& arena) {
  BlockBits bits = BlockBits::layout(problem);
  bits.words = arena.take<uint64_t>(bits.word_count());
  return bits;
}

BlockBits run_select(const Problem& problem, const Pattern& pattern, const Execution& execution,
                     Arena& arena, std::span<HeadAudit> audit) {
  validate_pattern_heads(problem, pattern);
  const BackendApi& backend = backend_api(execution.backend);
  const BlockBits bits = lay_out_bits(problem, arena);
  backend.select(problem, pattern, execution, arena, bits, audit);
  return bits;
}

// What a run of prefill is asked and what it says; `audit` serves an active guard too.
struct Asked {
  KeptMassGuard guard;
  std::span<HeadAudit> audit;
  int64_t compared_rows = 0;
  std::span<DenseComparison> comparison;
};

void attend_and_compare(const Problem& problem, const BlockRows& rows, const Execution& execution,
                        Arena& arena, const Asked& asked) {
  backend_api(execution.backend).attend(problem, rows, execution, arena);
  if (arena.counting() || asked.compared_rows == 0) return;
  compare_rows(problem, rows, asked.compared_rows, execution, asked.comparison);
}

void run_prefill(const Problem& problem, const Execution& execution, Arena& arena, Asked& asked) {
  const Pattern& pattern = asked.guard.pattern();
  const std::span<HeadAudit> audit = asked.audit;
  validate_pattern_heads(problem, pattern);
  const BackendApi& backend = backend_api(execution.backend);
  const bool dense = backend.on_device != nullptr
                         ? std::holds_alternative<Dense>(pattern)
                         : prefill_is_dense(dense_rule(execution.backend), problem, pattern);
  if (dense) {
    if (!arena.counting()) std::fill(audit.begin(), audit.end(), HeadAudit{});
    attend_and_compare(problem, BlockRows{}, execution, arena, asked);
    return;
  }
  const BlockBits bits = lay_out_bits(problem, arena);
  const BlockRows rows{.csr = nullptr,
                       .bits = &bits,
                       .window = token_window(pattern),
                       .mean_correction = mean_correction(pattern)};
  if (backend.on_device != nullptr) {
    backend.on_device->prefill(problem, asked.guard, rows, execution, arena, audit);
    return;
  }
  const Arena before = arena;
  const bool sparse = asked.guard.select(audit, [&](const Pattern& chosen) {
    arena = before;
    backend.select(problem, chosen, execution, arena, bits, audit);
  });
  attend_and_compare(problem, sparse ? rows : BlockRows{}, execution, arena, asked);
}

// Refuses a workspace that is too small before any stage has written anything, its audit included.
// `run(arena)` is the call's own code. CUDA backends take their memory before the caller's outputs
// and audit are written.
template <typename Run>
void check_workspace(Workspace workspace, const Execution& execution, Run&& run) {
  if (is_cuda(execution.backend)) return;
  Arena needed;
  run(needed);
  if (workspace.bytes < needed.bytes()) Arena::refuse(needed.bytes(), workspace.bytes);
}

const BackendApi::OnDevice& device_api(const Execution& execution, const char* function) {
  if (!is_cuda(execution.backend)) {
    throw Error(ErrorCode::kUnsupported,
                std::string(function) + ": expected a CUDA backend (cuda, sm80 or sm90)");
  }
  return *backend_api(execution.backend).on_device;
}

int64_t most_indices(const Problem& problem) {
  int64_t most = 0;
  for (const BlockGrid& grid : problem.grids) most += problem.h_q * causal_blocks(grid);
  return most;
}

void check_device_index(const Problem& problem, const DeviceBlockIndex& index) {
  const int64_t most = most_indices(problem);
  if (index.indptr == nullptr || (index.indices == nullptr && most > 0)) {
    throw Error(ErrorCode::kInvalidArgument,
                "index: expected indptr and indices in device memory, got nullptr");
  }
  if (index.capacity < 0) {
    throw Error(ErrorCode::kInvalidArgument,
                "index: expected a capacity of at least 0, got " + std::to_string(index.capacity));
  }
}

}  // namespace

void select(const AttentionInput& input, const Pattern& pattern, const Execution& execution,
            Workspace workspace, BlockIndex& index, std::span<HeadAudit> audit) {
  check_execution(execution);
  validate_pattern(pattern);
  const Problem problem = make_problem(input, Purpose::kSelect, execution.backend);
  validate_audit(problem, audit);
  check_workspace(workspace, execution,
                  [&](Arena& needed) { run_select(problem, pattern, execution, needed, {}); });
  Arena arena(workspace);
  BlockBits bits = run_select(problem, pattern, execution, arena, audit);
  std::vector<uint64_t> words;
  if (const auto* on_device = backend_api(execution.backend).on_device) {
    words = on_device->read_bits(bits, execution);
    bits.words = words.data();
  }
  index = to_block_index(problem, bits, token_window(pattern), mean_correction(pattern));
}

size_t select_workspace_size(const AttentionInput& input, const Pattern& pattern,
                             const Execution& execution) {
  check_execution(execution);
  validate_pattern(pattern);
  Arena arena;
  run_select(make_problem(input, Purpose::kSelectSize, execution.backend), pattern, execution,
             arena, {});
  return arena.bytes();
}

void attend(const AttentionInput& input, const BlockIndex* index, const Execution& execution,
            Workspace workspace, const TensorView& out, const TensorView& lse) {
  check_execution(execution);
  const Problem problem = make_problem(input, Purpose::kAttend, execution.backend, &out, &lse);
  BlockRows rows;
  if (index != nullptr) {
    validate_index(problem, *index);
    rows.csr = index;
    rows.window = TokenWindow::of(index->global_window, index->local_window);
    rows.mean_correction = index->mean_correction;
  }
  const BackendApi& backend = backend_api(execution.backend);
  check_workspace(workspace, execution,
                  [&](Arena& needed) { backend.attend(problem, rows, execution, needed); });
  Arena arena(workspace);
  backend.attend(problem, rows, execution, arena);
}

size_t attend_workspace_size(const AttentionInput& input, const Execution& execution) {
  check_execution(execution);
  Arena arena;
  const BlockIndex any;
  const BlockRows most{.csr = &any, .mean_correction = true};
  backend_api(execution.backend)
      .attend(make_problem(input, Purpose::kAttendSize, execution.backend), most, execution, arena);
  return arena.bytes();
}

void prefill(const AttentionInput& input, const Pattern& pattern, const Execution& execution,
             Workspace workspace, const TensorView& out, const TensorView& lse,
             std::span<HeadAudit> audit) {
  PrefillAudit heads{.heads = audit};
  prefill(input, pattern, execution, workspace, out, lse, heads);
}

void prefill(const AttentionInput& input, const Pattern& pattern, const Execution& execution,
             Workspace workspace, const TensorView& out, const TensorView& lse,
             PrefillAudit& audit) {
  check_execution(execution);
  validate_pattern(pattern);
  const Problem problem = make_problem(input, Purpose::kAttend, execution.backend, &out, &lse);
  validate_audit(problem, audit, execution.backend);
  check_workspace(workspace, execution, [&](Arena& needed) {
    Asked nothing{.guard = {pattern, {}}};
    run_prefill(problem, execution, needed, nothing);
  });
  std::vector<HeadAudit> own;
  if (audit.min_kept_mass && audit.heads.empty()) own.resize(problem.b() * problem.h_q);
  Asked asked{.guard = {pattern, audit.min_kept_mass},
              .audit = own.empty() ? audit.heads : std::span<HeadAudit>(own),
              .compared_rows = audit.compared_rows,
              .comparison = audit.comparison};
  Arena arena(workspace);
  run_prefill(problem, execution, arena, asked);
  audit.guard = asked.guard.done();
  audit.gamma = asked.guard.raised_gamma();
}

size_t prefill_workspace_size(const AttentionInput& input, const Pattern& pattern,
                              const Execution& execution) {
  check_execution(execution);
  validate_pattern(pattern);
  Arena arena;
  Asked nothing{.guard = {pattern, {}}};
  run_prefill(make_problem(input, Purpose::kAttendSize, execution.backend), execution, arena,
              nothing);
  return arena.bytes();
}

int64_t device_block_index_rows(const AttentionInput& input) {
  return make_problem(input, Purpose::kSelectSize, Backend::kCuda).first_row.back();
}

int64_t device_block_index_capacity(const AttentionInput& input) {
  return most_indices(make_problem(input, Purpose::kSelectSize, Backend::kCuda));
}

void select_on_device(const AttentionInput& input, const Pattern& pattern,
                      const Execution& execution, Workspace workspace, DeviceBlockIndex& index,
                      HeadAudit* audit) {
  const BackendApi::OnDevice& backend = device_api(execution, "select_on_device");
  validate_pattern(pattern);
  const Problem problem = make_problem(input, Purpose::kSelect, execution.backend);
  validate_pattern_heads(problem, pattern);
  check_device_index(problem, index);
  if (const int64_t most = most_indices(problem); index.capacity < most) {
    throw Error(ErrorCode::kInvalidArgument,
                "index: expected a capacity of at least device_block_index_capacity = " +
                    std::to_string(most) + " indices, got " + std::to_string(index.capacity));
  }
  Arena arena(workspace);
  backend.select_on_device(problem, pattern, execution, arena, index, audit);
  const TokenWindow window = token_window(pattern);
  index.global_window = window.global_window;
  index.local_window = window.local_window;
  index.mean_correction = mean_correction(pattern);
}

size_t select_on_device_workspace_size(const AttentionInput& input, const Pattern& pattern,
                                       const Execution& execution) {
  const BackendApi::OnDevice& backend = device_api(execution, "select_on_device");
  validate_pattern(pattern);
  const Problem problem = make_problem(input, Purpose::kSelectSize, execution.backend);
  validate_pattern_heads(problem, pattern);
  Arena arena;
  backend.select_on_device(problem, pattern, execution, arena, {}, nullptr);
  return arena.bytes();
}

void attend_on_device(const AttentionInput& input, const DeviceBlockIndex& index,
                      const Execution& execution, Workspace workspace, const TensorView& out,
                      const TensorView& lse) {
  const BackendApi::OnDevice& backend = device_api(execution, "attend_on_device");
  const Problem problem = make_problem(input, Purpose::kAttend, execution.backend, &out, &lse);
  check_device_index(problem, index);
  if (index.global_window < 0 || index.local_window < 0) {
    throw Error(ErrorCode::kInvalidArgument, "index: expected windows of at least 0 tokens");
  }
  if (index.mean_correction && (index.global_window > 0 || index.local_window > 0)) {
    throw Error(ErrorCode::kInvalidArgument,
                "index: expected no window together with mean_correction");
  }
  Arena arena(workspace);
  backend.attend_on_device(problem, index, execution, arena);
}

size_t attend_on_device_workspace_size(const AttentionInput& input, const Execution& execution) {
  const BackendApi::OnDevice& backend = device_api(execution, "attend_on_device");
  Arena arena;
  const DeviceBlockIndex most{.mean_correction = true};
  backend.attend_on_device(make_problem(input, Purpose::kAttendSize, execution.backend), most,
                           execution, arena);
  return arena.bytes();
}

Workspace WorkspaceBuffer::reserve(size_t bytes) {
  if (bytes > bytes_) {
    data_ = std::make_unique_for_overwrite<std::byte[]>(bytes);
    bytes_ = bytes;
  }
  return {data_.get(), bytes_};
}

std::string version() { return FLEXPREFILL_VERSION; }

}  // namespace flexprefill

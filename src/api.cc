// The C++ API: validate, lay the workspace out, hand over to a backend.
#include <algorithm>
#include <memory>
#include <string>
#include <variant>

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

// Each stage as one function for both the size query (a counting arena) and the call.
BlockBits run_select(const Problem& problem, const Pattern& pattern, const Execution& execution,
                     Arena& arena, std::span<HeadAudit> audit) {
  BlockBits bits = BlockBits::layout(problem);
  bits.words = arena.take<uint64_t>(bits.word_count());
  backend_api(execution.backend).select(problem, pattern, execution, arena, bits, audit);
  return bits;
}

void run_prefill(const Problem& problem, const Pattern& pattern, const Execution& execution,
                 Arena& arena, std::span<HeadAudit> audit) {
  const BackendApi& backend = backend_api(execution.backend);
  if (std::holds_alternative<Dense>(pattern)) {
    if (!arena.counting()) std::fill(audit.begin(), audit.end(), HeadAudit{});
    backend.attend(problem, BlockRows{}, execution, arena);
    return;
  }
  const BlockBits bits = run_select(problem, pattern, execution, arena, audit);
  const BlockRows rows{.csr = nullptr, .bits = &bits, .window = token_window(pattern)};
  backend.attend(problem, rows, execution, arena);
}

}  // namespace

void select(const AttentionInput& input, const Pattern& pattern, const Execution& execution,
            Workspace workspace, BlockIndex& index, std::span<HeadAudit> audit) {
  check_execution(execution);
  validate_pattern(pattern);
  const Problem problem = make_problem(input, Purpose::kSelect);
  validate_audit(problem, audit);
  Arena arena(workspace);
  const BlockBits bits = run_select(problem, pattern, execution, arena, audit);
  index = to_block_index(problem, bits, token_window(pattern));
}

size_t select_workspace_size(const AttentionInput& input, const Pattern& pattern,
                             const Execution& execution) {
  check_execution(execution);
  validate_pattern(pattern);
  Arena arena;
  run_select(make_problem(input, Purpose::kSelectSize), pattern, execution, arena, {});
  return arena.bytes();
}

void attend(const AttentionInput& input, const BlockIndex* index, const Execution& execution,
            Workspace workspace, const TensorView& out, const TensorView& lse) {
  check_execution(execution);
  const Problem problem = make_problem(input, Purpose::kAttend, &out, &lse);
  BlockRows rows;
  if (index != nullptr) {
    validate_index(problem, *index);
    rows.csr = index;
    rows.window = TokenWindow::of(index->global_window, index->local_window);
  }
  Arena arena(workspace);
  backend_api(execution.backend).attend(problem, rows, execution, arena);
}

size_t attend_workspace_size(const AttentionInput& input, const Execution& execution) {
  check_execution(execution);
  Arena arena;
  backend_api(execution.backend)
      .attend(make_problem(input, Purpose::kAttendSize), BlockRows{}, execution, arena);
  return arena.bytes();
}

void prefill(const AttentionInput& input, const Pattern& pattern, const Execution& execution,
             Workspace workspace, const TensorView& out, const TensorView& lse,
             std::span<HeadAudit> audit) {
  check_execution(execution);
  validate_pattern(pattern);
  const Problem problem = make_problem(input, Purpose::kAttend, &out, &lse);
  validate_audit(problem, audit);
  Arena arena(workspace);
  run_prefill(problem, pattern, execution, arena, audit);
}

size_t prefill_workspace_size(const AttentionInput& input, const Pattern& pattern,
                              const Execution& execution) {
  check_execution(execution);
  validate_pattern(pattern);
  Arena arena;
  run_prefill(make_problem(input, Purpose::kAttendSize), pattern, execution, arena, {});
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

// select: decides, per head and per input, which blocks matter.
#ifndef FLEXPREFILL_SELECT_H_
#define FLEXPREFILL_SELECT_H_

#include <cstdint>
#include <optional>
#include <span>
#include <variant>

#include "flexprefill/block_index.h"
#include "flexprefill/types.h"

namespace flexprefill {

// Every causal block: exact attention.
struct Dense {};

// FlexPrefill, arXiv 2502.20766, algorithms 1 to 4; docs/design.md has the steps exactly.
struct FlexPrefill {
  float gamma = 0.9f;         // share of the attention mass to cover, in (0, 1]
  float tau = 0.1f;           // heads with jsd_sqrt below it are query-aware, in [0, 1]
  int64_t min_budget = 1024;  // tokens
  std::optional<int64_t> max_budget = std::nullopt;  // tokens; none: no limit
};

// The vertical-slash pattern with fixed sizes (MInference, arXiv 2407.02490, section 3.2), chosen
// by the probe's block scores: the best vertical_size / B key blocks, slash_size / B distances.
struct VerticalSlash {
  int64_t vertical_size = 8192;  // tokens
  int64_t slash_size = 8192;     // tokens
};

// StreamingLLM's window (arXiv 2309.17453): the first global_window keys and the last local_window
// keys of each query, exact at the token.
struct StreamingLlm {
  int64_t global_window = 1024;  // tokens
  int64_t local_window = 8192;   // tokens, at least 1
};

using Pattern = std::variant<Dense, FlexPrefill, VerticalSlash, StreamingLlm>;

enum class HeadPattern : int32_t {
  kDense = 0,
  kVerticalSlash = 1,
  kQueryAware = 2,
  kStreaming = 3,
};

// What was decided for one query head of one sequence.
struct HeadAudit {
  HeadPattern pattern = HeadPattern::kDense;
  float jsd_sqrt = 0;           // distance between the two block estimates; 0 where not computed
  int32_t vertical_blocks = 0;  // n_v, after clamping
  int32_t slash_blocks = 0;     // n_s, after clamping
  float kept_mass = 1;          // share of the probe's attention mass in kept blocks
  float density = 1;            // kept causal blocks / causal blocks
};

// Fills `index`; `audit` is empty or [b * h_q], sequence-major.
// Patterns with a probe leave two things dense: a sequence with s_q <= B, or with
// s_kv <= max(2B, ceil(min_budget / B) * B); and a head whose probe meets a NaN (its output then
// has NaN where dense attention has it). input.v is not looked at. Throws Error before anything is
// written. Allocates only `index`; on a CUDA backend also host memory for a bit per block, and it
// waits for the stream: it cannot be captured in a CUDA graph.
FLEXPREFILL_API void select(const AttentionInput& input, const Pattern& pattern,
                            const Execution& execution, Workspace workspace, BlockIndex& index,
                            std::span<HeadAudit> audit = {});
FLEXPREFILL_API size_t select_workspace_size(const AttentionInput& input, const Pattern& pattern,
                                             const Execution& execution);

// The same on a CUDA backend with an index that stays on the device: enqueues everything on the
// stream, waits for nothing, allocates nothing, and can be captured in a CUDA graph. Writes
// index.indptr, index.indices and the windows; the arrays are there once the stream has come to
// them. `audit` is nullptr or device memory [b * h_q].
FLEXPREFILL_API void select_on_device(const AttentionInput& input, const Pattern& pattern,
                                      const Execution& execution, Workspace workspace,
                                      DeviceBlockIndex& index, HeadAudit* audit = nullptr);
FLEXPREFILL_API size_t select_on_device_workspace_size(const AttentionInput& input,
                                                       const Pattern& pattern,
                                                       const Execution& execution);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SELECT_H_

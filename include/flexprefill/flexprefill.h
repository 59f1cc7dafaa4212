// flexprefill: sparse prefill attention. Include this one header.
//
//   q, k, v --> select --> BlockIndex --> attend --> out (, lse)
//
// `prefill` is both stages without an index of the caller's.
#ifndef FLEXPREFILL_FLEXPREFILL_H_
#define FLEXPREFILL_FLEXPREFILL_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "flexprefill/attend.h"
#include "flexprefill/block_index.h"
#include "flexprefill/compare.h"
#include "flexprefill/select.h"
#include "flexprefill/types.h"

namespace flexprefill {

// select and attend in one call; the index stays in the workspace as one bit a block.
// out, lse, audit: as in attend and select. On a CUDA backend it waits for nothing and can be
// captured in a CUDA graph, unless an audit is asked for: then it waits for the stream.
// Where selecting cannot pay (every sequence is one that select leaves dense), nothing is selected.
FLEXPREFILL_API void prefill(const AttentionInput& input, const Pattern& pattern,
                             const Execution& execution, Workspace workspace, const TensorView& out,
                             const TensorView& lse = {}, std::span<HeadAudit> audit = {});
FLEXPREFILL_API size_t prefill_workspace_size(const AttentionInput& input, const Pattern& pattern,
                                              const Execution& execution);

// What PrefillAudit::min_kept_mass made of a call.
enum class Guard : int32_t { kNone = 0, kRaisedGamma = 1, kDense = 2 };

// What a call of prefill is asked about itself, and its answers.
struct PrefillAudit {
  std::span<HeadAudit> heads;  // to write: empty or [b * h_q], sequence-major
  // A floor for the kept_mass of every head, in [0, 1]. Where one keeps less, the call is selected
  // anew, with gamma raised half way to 1 up to three times (FlexPrefill, BlockCover), and is dense
  // where that does not do or the pattern has no gamma. `heads` has the figures of what was done.
  std::optional<float> min_kept_mass = std::nullopt;
  // compare_with_dense of this call; on a CUDA backend, refused.
  int64_t compared_rows = 0;              // of each head; 0: no comparison
  std::span<DenseComparison> comparison;  // to write: [b * h_q], or empty with 0 rows
  // Written.
  Guard guard = Guard::kNone;
  float gamma = 0;  // with Guard::kRaisedGamma the gamma that was kept
};

// prefill, audited. The same workspace; a floor without `heads` and a comparison allocate scratch
// on the host. On a CUDA backend the host must see the figures of a selection to judge it: a floor
// makes the call wait for the stream once for each selection, one to four times, and it cannot be
// captured in a CUDA graph.
FLEXPREFILL_API void prefill(const AttentionInput& input, const Pattern& pattern,
                             const Execution& execution, Workspace workspace, const TensorView& out,
                             const TensorView& lse, PrefillAudit& audit);

// Owns scratch memory for callers who do not want to: grows when asked for more, never shrinks.
// Not for use by two threads at once.
class FLEXPREFILL_API WorkspaceBuffer {
 public:
  Workspace reserve(size_t bytes);

 private:
  std::unique_ptr<std::byte[]> data_;
  size_t bytes_ = 0;
};

FLEXPREFILL_API std::string version();
// Targets of the CPU backend that this build has and this processor runs, best first.
FLEXPREFILL_API std::span<const CpuTarget> supported_cpu_targets();
FLEXPREFILL_API const char* cpu_target_name(CpuTarget target);

}  // namespace flexprefill

#endif  // FLEXPREFILL_FLEXPREFILL_H_

// flexprefill: sparse prefill attention. Include this one header.
//
//   q, k, v --> select --> BlockIndex --> attend --> out (, lse)
//
// `prefill` is both stages without an index of the caller's.
#ifndef FLEXPREFILL_FLEXPREFILL_H_
#define FLEXPREFILL_FLEXPREFILL_H_

#include <memory>
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

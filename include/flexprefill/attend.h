// attend: causal attention over the blocks of an index.
#ifndef FLEXPREFILL_ATTEND_H_
#define FLEXPREFILL_ATTEND_H_

#include "flexprefill/block_index.h"
#include "flexprefill/types.h"

namespace flexprefill {

// out = softmax(scale * q k^T over the kept, causal keys) v.
//   out  [b, s_q, h_q, d_v] or packed [t_q, h_q, d_v], the inputs' element type; may be strided,
//        must not overlap q, k or v
//   lse  optional (data == nullptr: none), [b, h_q, s_q] or packed [h_q, t_q], fp32, natural log of
//        the sum of exp(scale * q k^T) over the kept keys; contiguous last dimension
//   index  nullptr: every causal block
// `index` is checked against the input's lengths, heads and block size. Softmax and accumulation
// are fp32. Throws Error before anything is written. On a CUDA backend without an index it waits
// for nothing; with one, it waits for the stream until the index has been copied to the device.
FLEXPREFILL_API void attend(const AttentionInput& input, const BlockIndex* index,
                            const Execution& execution, Workspace workspace, const TensorView& out,
                            const TensorView& lse = {});
FLEXPREFILL_API size_t attend_workspace_size(const AttentionInput& input,
                                             const Execution& execution);

// The same on a CUDA backend with an index on the device: waits for nothing, allocates nothing, can
// be captured in a CUDA graph. The host does not see the index's arrays, so they are not checked:
// blocks after a row's diagonal and entries beyond `capacity` are left out.
FLEXPREFILL_API void attend_on_device(const AttentionInput& input, const DeviceBlockIndex& index,
                                      const Execution& execution, Workspace workspace,
                                      const TensorView& out, const TensorView& lse = {});
FLEXPREFILL_API size_t attend_on_device_workspace_size(const AttentionInput& input,
                                                       const Execution& execution);

}  // namespace flexprefill

#endif  // FLEXPREFILL_ATTEND_H_

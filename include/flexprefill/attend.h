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
// are fp32. Throws Error before anything is written.
FLEXPREFILL_API void attend(const AttentionInput& input, const BlockIndex* index,
                            const Execution& execution, Workspace workspace, const TensorView& out,
                            const TensorView& lse = {});
FLEXPREFILL_API size_t attend_workspace_size(const AttentionInput& input,
                                             const Execution& execution);

}  // namespace flexprefill

#endif  // FLEXPREFILL_ATTEND_H_

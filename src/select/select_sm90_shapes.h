// The choice of select's kernels for cards of compute capability 9.0.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_SM90_SHAPES_H_
#define FLEXPREFILL_SRC_SELECT_SELECT_SM90_SHAPES_H_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "problem.h"

namespace flexprefill {

// Calls f.operator()<Element, kDim>() with the call's element type and its head dim as padded.
template <typename F>
void dispatch_sm90(const Problem& problem, F&& f) {
  const auto with_type = [&]<typename Element> {
    if (problem.d_qk <= 64) {
      f.template operator()<Element, 64>();
    } else if (problem.d_qk <= 128) {
      f.template operator()<Element, 128>();
    } else if (problem.d_qk <= 192) {
      f.template operator()<Element, 192>();
    } else {
      f.template operator()<Element, 256>();
    }
  };
  if (problem.dtype == DType::kBFloat16) {
    with_type.template operator()<__nv_bfloat16>();
  } else {
    with_type.template operator()<__half>();
  }
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_SM90_SHAPES_H_

// CUDA's error codes as Error.
#ifndef FLEXPREFILL_SRC_CUDA_CUDA_CHECK_H_
#define FLEXPREFILL_SRC_CUDA_CUDA_CHECK_H_

#include <cuda_runtime_api.h>

#include <string>

#include "flexprefill/types.h"

namespace flexprefill {

inline std::string cuda_error_text(cudaError_t error) {
  return std::string("CUDA error ") + cudaGetErrorName(error) + ": " + cudaGetErrorString(error);
}

// Throws Error(kInternal) that says what failed. The error is handed over, so it does not stay
// CUDA's last error, where it would look like one of the caller's.
inline void cuda_check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());
  throw Error(ErrorCode::kInternal, std::string(what) + ": " + cuda_error_text(error));
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_CUDA_CUDA_CHECK_H_

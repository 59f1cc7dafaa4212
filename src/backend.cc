#include "backend.h"

#include <string>

namespace flexprefill {

const BackendApi& backend_api(Backend backend) {
  static constexpr BackendApi kReferenceApi{select_reference, attend_reference};
  static constexpr BackendApi kCpuApi{select_cpu, attend_cpu};
  switch (backend) {
    case Backend::kReference:
      return kReferenceApi;
    case Backend::kAuto:
    case Backend::kCpu:
      return kCpuApi;
    case Backend::kCuda:
    case Backend::kSm80:
    case Backend::kSm90:
#if defined(FLEXPREFILL_WITH_CUDA)
      return cuda_backend_api();
#else
      throw Error(ErrorCode::kUnsupported,
                  "backend: this build has no CUDA backend; build with FLEXPREFILL_CUDA=ON");
#endif
  }
  throw Error(ErrorCode::kUnsupported,
              "backend: expected auto, reference, cpu, cuda, sm80 or sm90, got number " +
                  std::to_string(static_cast<int32_t>(backend)));
}

}  // namespace flexprefill

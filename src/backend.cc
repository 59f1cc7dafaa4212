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
      throw Error(ErrorCode::kUnsupported, "backend: this build has no CUDA backend");
  }
  throw Error(ErrorCode::kUnsupported, "backend: expected auto, reference or cpu, got number " +
                                           std::to_string(static_cast<int32_t>(backend)));
}

}  // namespace flexprefill

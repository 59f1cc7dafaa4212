// Everything that can run a call on this machine: the reference, each CPU target and, where there
// is a card, the CUDA backends.
#ifndef FLEXPREFILL_TESTS_TEST_EXECUTIONS_H_
#define FLEXPREFILL_TESTS_TEST_EXECUTIONS_H_

#include <array>
#include <string>
#include <vector>

#include "flexprefill/flexprefill.h"
#include "problem.h"

namespace flexprefill::testing {

inline std::vector<Execution> cpu_executions() {
  std::vector<Execution> all;
  for (const CpuTarget target : supported_cpu_targets()) {
    all.push_back({.backend = Backend::kCpu, .cpu_target = target});
  }
  return all;
}

// The backends that have every pattern.
inline std::vector<Execution> host_executions() {
  std::vector<Execution> all = cpu_executions();
  all.insert(all.begin(), Execution{.backend = Backend::kReference});
  return all;
}

// Those whose size query, which asks for the card, `works` for.
template <typename Works>
std::vector<Execution> cuda_executions(const Works& works) {
  const std::array<int64_t, 4> shape{1, 300, 1, 64};
  AttentionInput input;
  input.q = input.k = input.v = contiguous_view(nullptr, DType::kBFloat16, shape);
  std::vector<Execution> all;
  for (const Backend backend : {Backend::kSm80, Backend::kSm90}) {
    try {
      works(input, Execution{.backend = backend});
      all.push_back({.backend = backend});
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kUnsupported) throw;
    }
  }
  return all;
}

enum class Stage { kSelect, kAttend, kPrefill };

inline std::vector<Execution> cuda_executions(Stage stage) {
  return cuda_executions([stage](const AttentionInput& input, const Execution& execution) {
    const FlexPrefill pattern{.min_budget = 0};
    if (stage != Stage::kAttend) select_workspace_size(input, pattern, execution);
    if (stage != Stage::kSelect) attend_workspace_size(input, execution);
  });
}

inline std::vector<Execution> executions(Stage stage = Stage::kPrefill) {
  std::vector<Execution> all = host_executions();
  const std::vector<Execution> cuda = cuda_executions(stage);
  all.insert(all.end(), cuda.begin(), cuda.end());
  return all;
}

// What is to give the same bits as one thread; on a device threads do nothing, and once more is
// enough.
inline std::vector<int32_t> thread_counts(const Execution& execution) {
  if (is_cuda(execution.backend)) return {8};
  return {2, 3, 8};
}

inline bool takes(const Execution& execution, DType dtype) {
  return dtype != DType::kFloat32 || !is_cuda(execution.backend);
}
// float32 where the backend takes it.
inline DType widest_dtype(const Execution& execution) {
  return takes(execution, DType::kFloat32) ? DType::kFloat32 : DType::kBFloat16;
}

inline std::string execution_name(const Execution& execution) {
  switch (execution.backend) {
    case Backend::kReference:
      return "reference";
    case Backend::kCuda:
      return "cuda";
    case Backend::kSm80:
      return "sm80";
    case Backend::kSm90:
      return "sm90";
    default:
      return cpu_target_name(execution.cpu_target);
  }
}

}  // namespace flexprefill::testing

#endif  // FLEXPREFILL_TESTS_TEST_EXECUTIONS_H_

// Everything that can run a call on this machine: the reference and each CPU target.
#ifndef FLEXPREFILL_TESTS_TEST_EXECUTIONS_H_
#define FLEXPREFILL_TESTS_TEST_EXECUTIONS_H_

#include <string>
#include <vector>

#include "flexprefill/flexprefill.h"

namespace flexprefill::testing {

inline std::vector<Execution> cpu_executions() {
  std::vector<Execution> all;
  for (const CpuTarget target : supported_cpu_targets()) {
    all.push_back({.backend = Backend::kCpu, .cpu_target = target});
  }
  return all;
}

inline std::vector<Execution> executions() {
  std::vector<Execution> all = cpu_executions();
  all.insert(all.begin(), Execution{.backend = Backend::kReference});
  return all;
}

inline std::string execution_name(const Execution& execution) {
  if (execution.backend == Backend::kReference) return "reference";
  return cpu_target_name(execution.cpu_target);
}

}  // namespace flexprefill::testing

#endif  // FLEXPREFILL_TESTS_TEST_EXECUTIONS_H_

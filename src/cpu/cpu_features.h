// What the processor and the operating system allow.
#ifndef FLEXPREFILL_SRC_CPU_CPU_FEATURES_H_
#define FLEXPREFILL_SRC_CPU_CPU_FEATURES_H_

#include "flexprefill/types.h"

namespace flexprefill {

// Whether this machine runs code of `target` (kAuto: no).
bool machine_runs(CpuTarget target);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_CPU_CPU_FEATURES_H_

// The CUDA backends' entry points, free of CUDA headers. Data, workspace and page table of a CUDA
// call are device memory of the current device; everything runs on Execution::stream.
#ifndef FLEXPREFILL_SRC_CUDA_BACKEND_CUDA_H_
#define FLEXPREFILL_SRC_CUDA_BACKEND_CUDA_H_

#include <cstdint>
#include <span>

#include "arena.h"
#include "backend.h"
#include "cuda/device_problem.h"

namespace flexprefill {

struct DeviceInfo {
  int32_t major = 0, minor = 0;
  int32_t multiprocessors = 0;
  int64_t shared_bytes = 0;  // a CTA may opt in to
  int64_t l2_bytes = 0;
};
// Of the current device; asked once a device. Throws Error(kUnsupported) naming card and driver
// where they are too old, or no device is there.
const DeviceInfo& device_info();
bool overlaps_kernels();  // launch.cuh

// src/select/select_cuda.cu: for both backends. `bits` and `audit` are device memory; `audit` is
// nullptr or [b * h_q]. Pattern decisions as in pattern.h.
void select_cuda(const DeviceProblem&, const Problem&, const Pattern&, const Execution&, Arena&,
                 uint64_t* bits, HeadAudit* audit);

// src/attend/attend_sm80.cu, attend_sm90.cu. Both take their memory from the arena first; when it
// counts they stop there.
void attend_sm80(const DeviceProblem&, const Problem&, const DeviceRows&, const Execution&, Arena&);
void attend_sm90(const DeviceProblem&, const Problem&, const DeviceRows&, const Execution&, Arena&);
// Whether attend_sm90 can take the call (TMA needs 16-byte aligned rows, a block size of 64 or
// 128); attend_sm80 can take any. Depends on shapes and strides alone, and on data pointers only
// through their alignment: a size query without data must count enough for both.
bool attend_sm90_takes(const Problem&);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_CUDA_BACKEND_CUDA_H_

// The probe of select on cards of compute capability 9.0, as select_cuda.cu calls it.
#ifndef FLEXPREFILL_SRC_SELECT_PROBE_SM90_H_
#define FLEXPREFILL_SRC_SELECT_PROBE_SM90_H_

#include <cstdint>
#include <vector>

#include "problem.h"

namespace flexprefill {

struct SelectProblem;

// Chunks of a row of keys: more cost more in putting a probe row's sums together.
constexpr int64_t kMostProbeChunks = 128;

// Whether it can take the call: TMA needs rows on 16 bytes. Depends on shapes and strides, and on
// data pointers only through their alignment.
bool probe_sm90_takes(const Problem& problem);

// What a call's probe looks at.
struct ProbeWork {
  std::vector<bool> sequences;
  std::vector<int32_t> heads;  // of each K/V head so many query heads
};

// Keys of a chunk.
int64_t probe_sm90_chunk(const Problem& problem, const ProbeWork& work);

// Both passes, block means and the probe's logits of them.
void probe_sm90(const SelectProblem& select, const Problem& problem, const ProbeWork& work,
                void* stream);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_PROBE_SM90_H_

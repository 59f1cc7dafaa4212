// What a backend offers to api.cc. Every stage first takes all its memory from the arena; when it
// only counts they stop there.
#ifndef FLEXPREFILL_SRC_BACKEND_H_
#define FLEXPREFILL_SRC_BACKEND_H_

#include <cstdint>
#include <span>
#include <vector>

#include "arena.h"
#include "index/block_row.h"
#include "problem.h"
#include "select/kept_mass_guard.h"

namespace flexprefill {

struct BackendApi {
  // Sets exactly the kept blocks in `bits` (words are uninitialised on entry) for every row of
  // every head, and `audit` if it is not empty. When `arena` counts, bits.words is nullptr.
  void (*select)(const Problem& problem, const Pattern& pattern, const Execution& execution,
                 Arena& arena, const BlockBits& bits, std::span<HeadAudit> audit);
  // When `arena` counts, rows.csr only says whether there is an index.
  void (*attend)(const Problem& problem, const BlockRows& rows, const Execution& execution,
                 Arena& arena);
  // The others are nullptr where the stages work on host memory.
  struct OnDevice {
    // Both stages. rows.bits: memory for the index; no waiting but for an audit, which an active
    // guard needs.
    void (*prefill)(const Problem& problem, KeptMassGuard& guard, const BlockRows& rows,
                    const Execution& execution, Arena& arena, std::span<HeadAudit> audit);
    // The words of `bits` on the host, once the stream has come to them.
    std::vector<uint64_t> (*read_bits)(const BlockBits& bits, const Execution& execution);
    // `index` and `audit` (or nullptr) are device memory; no waiting.
    void (*select_on_device)(const Problem& problem, const Pattern& pattern,
                             const Execution& execution, Arena& arena,
                             const DeviceBlockIndex& index, HeadAudit* audit);
    void (*attend_on_device)(const Problem& problem, const DeviceBlockIndex& index,
                             const Execution& execution, Arena& arena);
  };
  const OnDevice* on_device = nullptr;
};

// src/attend/attend_ref.cc, src/select/select_ref.cc
void select_reference(const Problem&, const Pattern&, const Execution&, Arena&, const BlockBits&,
                      std::span<HeadAudit>);
void attend_reference(const Problem&, const BlockRows&, const Execution&, Arena&);
// src/attend/attend_cpu.cc, src/select/select_cpu.cc
void select_cpu(const Problem&, const Pattern&, const Execution&, Arena&, const BlockBits&,
                std::span<HeadAudit>);
void attend_cpu(const Problem&, const BlockRows&, const Execution&, Arena&);

// src/cuda/backend_cuda.cc, where the build has it. The table of kCuda, kSm80 and kSm90.
const BackendApi& cuda_backend_api();

// The table of a backend; throws Error(kUnsupported) for one that this build lacks.
const BackendApi& backend_api(Backend backend);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_BACKEND_H_

// What a backend offers to api.cc. Both stages first take all their memory from the arena; when it
// only counts they stop there.
#ifndef FLEXPREFILL_SRC_BACKEND_H_
#define FLEXPREFILL_SRC_BACKEND_H_

#include <span>

#include "arena.h"
#include "index/block_row.h"
#include "problem.h"

namespace flexprefill {

struct BackendApi {
  // Sets exactly the kept blocks in `bits` (words are uninitialised on entry) for every row of
  // every head, and `audit` if it is not empty. When `arena` counts, bits.words is nullptr.
  void (*select)(const Problem& problem, const Pattern& pattern, const Execution& execution,
                 Arena& arena, const BlockBits& bits, std::span<HeadAudit> audit);
  void (*attend)(const Problem& problem, const BlockRows& rows, const Execution& execution,
                 Arena& arena);
};

// src/attend/attend_ref.cc, src/select/select_ref.cc
void select_reference(const Problem&, const Pattern&, const Execution&, Arena&, const BlockBits&,
                      std::span<HeadAudit>);
void attend_reference(const Problem&, const BlockRows&, const Execution&, Arena&);
// src/attend/attend_cpu.cc, src/select/select_cpu.cc
void select_cpu(const Problem&, const Pattern&, const Execution&, Arena&, const BlockBits&,
                std::span<HeadAudit>);
void attend_cpu(const Problem&, const BlockRows&, const Execution&, Arena&);

// The table of a backend; throws Error(kUnsupported) for one that this build lacks.
const BackendApi& backend_api(Backend backend);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_BACKEND_H_

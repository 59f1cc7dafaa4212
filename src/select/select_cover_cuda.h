// BlockCover on the device: what select_cuda.cu needs of it.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_COVER_CUDA_H_
#define FLEXPREFILL_SRC_SELECT_SELECT_COVER_CUDA_H_

#include <cstddef>
#include <cstdint>

#include "arena.h"
#include "cuda/device_problem.h"
#include "flexprefill/select.h"

namespace flexprefill {

struct SelectProblem;

// What a call has in the workspace, and how it is cut. heads: of all sequences.
struct CoverMemory {
  std::byte* k_means = nullptr;  // [key_means, d]
  std::byte* q_means = nullptr;  // [query_means, d]
  int64_t key_means = 0, query_means = 0;
  float* masses = nullptr;          // [heads, n_kv, kCoverAskingRows]
  float2* chunk_stats = nullptr;    // [heads, chunks, kCoverAskingRows]
  float* most_asked = nullptr;      // [heads, n_kv]
  float* group_mass = nullptr;      // [heads, asking query blocks, n_kv]; audits only
  uint64_t* columns = nullptr;      // [heads, words]
  uint32_t* least_share = nullptr;  // [heads]
  int32_t* rows_below = nullptr;    // [heads]
  std::byte* scratch = nullptr;     // [ctas, scratch_bytes], in the place of masses
  int64_t scratch_bytes = 0, ctas = 0;
  int32_t pitch = 0;        // of a row of the map: the most key blocks, in whole tiles
  int32_t chunk_tiles = 0;  // of 128 keys, of a CTA
  int32_t max_chunks = 0;
};

// Takes the memory from the arena, also that of select.not_finite and select.tickets. blocks: of
// all heads, sum of n_kv; words: of a row of each head. When the arena counts, fields of `select`
// become nullptr.
CoverMemory lay_out_cover(const Problem& problem, const BlockCover& pattern, int64_t blocks,
                          int64_t words, Arena& arena, SelectProblem& select);

// On the stream: the rows of every head that is not dense, select.not_finite, and select.audit if
// it is asked for (then also of dense heads). sm90: by the kernels for Hopper, which TMA serves.
void select_cover(const Problem& problem, const BlockCover& pattern, const SelectProblem& select,
                  const CoverMemory& memory, bool sm90, void* stream);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_COVER_CUDA_H_

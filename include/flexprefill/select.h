// select: decides, per head and per input, which blocks matter.
#ifndef FLEXPREFILL_SELECT_H_
#define FLEXPREFILL_SELECT_H_

#include <cstdint>
#include <optional>
#include <span>
#include <variant>

#include "flexprefill/block_index.h"
#include "flexprefill/types.h"

namespace flexprefill {

// Every causal block: exact attention.
struct Dense {};

// FlexPrefill, arXiv 2502.20766, algorithms 1 to 4; docs/design.md has the steps exactly.
struct FlexPrefill {
  float gamma = 0.9f;         // share of the attention mass to cover, in (0, 1]
  float tau = 0.1f;           // heads with jsd_sqrt below it are query-aware, in [0, 1]
  int64_t min_budget = 1024;  // tokens
  std::optional<int64_t> max_budget = std::nullopt;  // tokens; none: no limit
};

// The vertical-slash pattern with fixed sizes (MInference, arXiv 2407.02490, section 3.2), chosen
// by the probe's block scores: the best vertical_size / B key blocks, slash_size / B distances.
struct VerticalSlash {
  int64_t vertical_size = 8192;  // tokens
  int64_t slash_size = 8192;     // tokens
};

// StreamingLLM's window (arXiv 2309.17453): the first global_window keys and the last local_window
// keys of each query, exact at the token.
struct StreamingLlm {
  int64_t global_window = 1024;  // tokens
  int64_t local_window = 8192;   // tokens, at least 1
};

// XAttention (arXiv 2503.16428): a block counts as the sum of its antidiagonals. Queries and keys
// are taken in groups of `stride`, from token 0; a pair of groups scores scale / stride times the
// sum of q[stride - 1 - t] . k[t], softmax over the groups up to the query's own, and a block the
// sum over its pairs. Each query block keeps its own block, block 0, and then the best until they
// reach the share `threshold` of its sum.
struct XAttention {
  int64_t stride = 16;     // tokens, 8 or 16
  float threshold = 0.9f;  // in (0, 1]
};

// FlashPrefill (arXiv 2603.06199; the correction: arXiv 2608.19758): each query scores the mean of
// each key block whose last key it sees, a query block sums exp(score - its greatest), and the
// blocks are kept whose sum is at least `alpha` times the greatest sum. Beside them, in whole
// blocks, the first global_window keys, the last local_window keys of each query block, and all
// keys of the last `last_queries` queries.
struct FlashPrefill {
  float alpha = 0.1f;           // in [0, 1]; 0 keeps everything
  int64_t global_window = 256;  // tokens
  int64_t local_window = 512;   // tokens, at least 1
  int64_t last_queries = 1024;  // tokens
  bool mean_correction = true;  // BlockIndex::mean_correction
};

// What one query head keeps under MInference; sizes are tokens and are spent on whole blocks.
struct MInferenceHead {
  enum class Kind : int32_t {
    kAShape = 0,         // the first `vertical_size` keys, and the last `slash_size` of each query
    kVerticalSlash = 1,  // as VerticalSlash
    kBlockSparse = 2,    // of each query block the best `vertical_size` keys, by block means
  };
  Kind kind = Kind::kVerticalSlash;
  int64_t vertical_size = 1024;
  int64_t slash_size = 1024;  // a-shape: at least 1; block-sparse: unused
};

// MInference (arXiv 2407.02490): a pattern for each query head, found beforehand for each layer of
// a model. A block-sparse query block scores scale * mean(q) . mean(k) and always keeps its own
// block.
struct MInference {
  std::span<const MInferenceHead> heads;  // [h_q], borrowed for the call
};

// A cover of blocks for each query block, from a map of the whole head, and columns for the last
// queries; docs/block_cover.md derives it. The map estimates the mass of every causal pair of
// blocks from the means of 32 queries and of 32 keys (of 16 where blocks have at most 64 tokens and
// the sequence at most 16384 keys). A query block keeps block 0, itself and the blocks that hold
// the 128 tokens before it, then its best blocks until they hold `gamma` of its map. The last
// queries ask for more: of 128 of the last 512 rows the exact attention is known, a key block
// counts as the largest mass that one of them has there, and the best blocks that hold
// `column_share` of all such masses are kept for the query blocks from the first of these rows on.
struct BlockCover {
  float gamma = 0.9f;         // in (0, 1]; 1: dense, whatever max_budget says
  float column_share = 0.8f;  // in [0, 1]; 0: no columns, 1: all blocks
  // Tokens that a query block keeps at most, in whole blocks; at least what it always keeps, which
  // is 128 tokens and two blocks. Then gamma may be missed, which HeadAudit says. None: no limit.
  std::optional<int64_t> max_budget = std::nullopt;
};

using Pattern = std::variant<Dense, FlexPrefill, VerticalSlash, StreamingLlm, XAttention,
                             FlashPrefill, MInference, BlockCover>;

enum class HeadPattern : int32_t {
  kDense = 0,
  kVerticalSlash = 1,
  kQueryAware = 2,
  kStreaming = 3,
  kBlockSparse = 4,  // by a score for each block: XAttention, FlashPrefill, MInference
  kBlockCover = 5,
};

// What was decided for one query head of one sequence.
struct HeadAudit {
  HeadPattern pattern = HeadPattern::kDense;
  float jsd_sqrt = 0;           // distance between the two block estimates; 0 where not computed
  int32_t vertical_blocks = 0;  // n_v, after clamping; BlockCover: columns of the last queries
  int32_t slash_blocks = 0;     // n_s, after clamping
  float kept_mass = 1;          // share in kept blocks of the attention mass of the probe, or of
                                // BlockCover's asking rows
  float density = 1;            // kept causal blocks / causal blocks
  // BlockCover: the least share of its map that a query block keeps, and the query blocks that keep
  // less than gamma of it because of max_budget.
  float least_row_mass = 1;
  int32_t rows_below_gamma = 0;
};

// Fills `index`; `audit` is empty or [b * h_q], sequence-major.
// Patterns with a probe leave two things dense: a sequence with s_q <= B, or with
// s_kv <= max(2B, ceil(min_budget / B) * B); and a head whose scores meet a NaN (its output then
// has NaN where dense attention has it). input.v is not looked at. Throws Error before anything is
// written. Allocates only `index`; on a CUDA backend also host memory for a bit per block, and it
// waits for the stream: it cannot be captured in a CUDA graph.
FLEXPREFILL_API void select(const AttentionInput& input, const Pattern& pattern,
                            const Execution& execution, Workspace workspace, BlockIndex& index,
                            std::span<HeadAudit> audit = {});
FLEXPREFILL_API size_t select_workspace_size(const AttentionInput& input, const Pattern& pattern,
                                             const Execution& execution);

// The same on a CUDA backend with an index that stays on the device: enqueues everything on the
// stream, waits for nothing, allocates nothing, and can be captured in a CUDA graph. Writes
// index.indptr, index.indices, the windows and mean_correction; the arrays are there once the
// stream has come to them. `audit` is nullptr or device memory [b * h_q].
FLEXPREFILL_API void select_on_device(const AttentionInput& input, const Pattern& pattern,
                                      const Execution& execution, Workspace workspace,
                                      DeviceBlockIndex& index, HeadAudit* audit = nullptr);
FLEXPREFILL_API size_t select_on_device_workspace_size(const AttentionInput& input,
                                                       const Pattern& pattern,
                                                       const Execution& execution);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SELECT_H_

// select on the device for heads whose blocks are scored one by one: XAttention, FlashPrefill and
// the block-sparse heads of MInference. A CTA scores a few query blocks of one head, all of their
// key blocks, and decides by them at once: no map of a head is in memory, but the rows in work, in
// a scratch of each CTA.
//
//   block_means           FlashPrefill, MInference: means of the key blocks   block_means_cuda.cu
//   antidiagonal_kernel   XAttention                          select_blocks_cuda_antidiagonal.cuh
//   mean_scores_kernel    FlashPrefill                               select_blocks_cuda_means.cuh
//                         by wgmma                                   select_blocks_sm90_means.cuh
//   query_means_kernel    MInference: means of the query blocks     select_blocks_cuda_pooled.cuh
//   pooled_scores_kernel  MInference
//
// Workspace at 128k tokens, 32 / 8 heads of 128, blocks of 128, on 132 multiprocessors: XAttention
// 71 MB (4.4 % of q, k and v), FlashPrefill 4 MB (2 by wgmma) and 2 MB of means, MInference 35 MB
// and 21 MB.
#include "select/select_blocks_cuda.h"

#include <algorithm>
#include <variant>

#include "cuda/backend_cuda.h"
#include "cuda/launch.cuh"
#include "math.h"
#include "select/block_means_cuda.h"
#include "select/block_rules.h"
#include "select/select_blocks_cuda_antidiagonal.cuh"
#include "select/select_blocks_cuda_means.cuh"
#include "select/select_blocks_cuda_pooled.cuh"
#include "select/select_blocks_sm90.h"
#include "select/select_rows.h"

namespace flexprefill {
namespace {

// Rules that one launch carries as parameters.
struct HeadRules {
  static constexpr int kEntries = 128;
  HeadRule entries[kEntries];
  int32_t first, n;
};
static_assert(sizeof(HeadRules) <= 4000);

__global__ void write_rules_kernel(const __grid_constant__ HeadRules from, HeadRule* to) {
  await_previous_kernel();
  start_next_kernel();
  const auto thread = static_cast<int32_t>(threadIdx.x);
  if (thread < from.n) to[from.first + thread] = from.entries[thread];
}

HeadRule head_rule(const MInferenceHead& head, int64_t block_size) {
  const auto blocks = [&](int64_t tokens) { return whole_blocks(tokens, block_size); };
  switch (head.kind) {
    case MInferenceHead::Kind::kAShape: {
      const TokenWindow window = TokenWindow::of(head.vertical_size, head.slash_size);
      return {window.global_window, window.local_window, HeadRule::Kind::kWindow};
    }
    case MInferenceHead::Kind::kVerticalSlash:
      return {blocks(head.vertical_size), blocks(head.slash_size), HeadRule::Kind::kProbe};
    default:
      return {blocks(head.vertical_size), 0, HeadRule::Kind::kBlocks};
  }
}

// Query blocks of a task.
int32_t tile_blocks(const Problem& problem, const Pattern& pattern, bool sm90) {
  if (const auto* antidiagonal = std::get_if<XAttention>(&pattern)) {
    return AntidiagonalTile::kRows * antidiagonal->stride / problem.block_size;
  }
  if (std::holds_alternative<FlashPrefill>(pattern)) {
    return (sm90 ? mean_scores_sm90_rows(problem) : MeansTile::kRows) / problem.block_size;
  }
  return kPooledRows;
}

// CTAs that a multiprocessor runs at once.
int64_t ctas_per_multiprocessor(const Pattern& pattern, bool sm90) {
  return std::holds_alternative<XAttention>(pattern) || sm90 ? 1 : 2;
}

int64_t task_count(const Problem& problem, const Pattern& pattern, bool sm90) {
  int64_t most = 0;
  for (const BlockGrid& grid : problem.grids) most = std::max(most, grid.n_q);
  return ceil_div(most, tile_blocks(problem, pattern, sm90)) * problem.b() * problem.h_q;
}

template <typename Element>
void launch_scores(const Pattern& pattern, const SelectProblem& select, BlockScores scores,
                   int64_t ctas, void* stream) {
  const int32_t d = select.problem.d_qk;
  const dim3 grid(static_cast<uint32_t>(std::min<int64_t>(ctas, scores.tasks)));
  const int64_t resident = ctas_per_multiprocessor(pattern, false);
  if (std::holds_alternative<XAttention>(pattern)) {
    constexpr size_t kBeside = sizeof(AntidiagonalShared);
    scores.stages = ring_stages<AntidiagonalTile>(d, kBeside, resident);
    launch_overlapped(antidiagonal_kernel<Element>, grid, dim3(AntidiagonalTile::kThreads),
                      AntidiagonalTile::shared_bytes(d, scores.stages) + kBeside, stream, select,
                      scores);
  } else if (std::holds_alternative<FlashPrefill>(pattern)) {
    scores.stages = ring_stages<MeansTile>(d, 0, resident);
    launch_overlapped(mean_scores_kernel<Element>, grid, dim3(MeansTile::kThreads),
                      MeansTile::shared_bytes(d, scores.stages), stream, select, scores);
  } else {
    const DeviceProblem& problem = select.problem;
    const int64_t rows = int64_t{problem.b} * problem.h_q * problem.max_n_q;
    launch_overlapped(query_means_kernel<Element>, dim3(grid_of(rows)), dim3(kQueryMeansThreads),
                      kQueryMeansThreads * 8 * sizeof(float), stream, select,
                      const_cast<float*>(scores.q_means));
    launch_overlapped(pooled_scores_kernel, grid, dim3(kPooledThreads), sizeof(PooledShared),
                      stream, select, scores);
  }
}

}  // namespace

HeadKinds::HeadKinds(const Problem& problem, const Pattern& pattern)
    : differ(std::holds_alternative<MInference>(pattern)) {
  for (int32_t h = 0; h < problem.h_q; ++h) {
    probe |= by_probe(pattern, h);
    blocks |= by_block_scores(pattern, h);
  }
}

BlockScoreMemory lay_out_block_scores(const Problem& problem, const Pattern& pattern, bool hopper,
                                      Arena& arena, SelectProblem& select) {
  BlockScoreMemory memory;
  const HeadKinds kinds(problem, pattern);
  if (kinds.differ) select.rules = arena.take<HeadRule>(problem.h_q);
  if (!kinds.blocks) return memory;
  select.kind = HeadRule::Kind::kBlocks;
  select.not_finite = arena.take<uint8_t>(problem.b() * problem.h_q);
  int64_t n_kv = 0, s_kv = 0, mean_rows = 0;
  for (int64_t s = 0; s < problem.b(); ++s) {
    n_kv = std::max(n_kv, problem.grids[s].n_kv);
    s_kv = std::max(s_kv, problem.lengths[s].s_kv);
    mean_rows += problem.h_kv * problem.grids[s].n_kv;
  }
  const bool elements = std::holds_alternative<FlashPrefill>(pattern);
  memory.sm90 = hopper && elements && mean_scores_sm90_takes(problem);
  memory.pitch = memory.sm90 ? mean_scores_sm90_pitch(n_kv) : static_cast<int32_t>(n_kv);
  memory.ctas =
      std::min(task_count(problem, pattern, memory.sm90),
               ctas_per_multiprocessor(pattern, memory.sm90) * device_info().multiprocessors);
  if (const auto* antidiagonal = std::get_if<XAttention>(&pattern)) {
    memory.scratch_floats = antidiagonal_scratch(n_kv, s_kv, antidiagonal->stride);
  } else {
    memory.scratch_floats = memory.sm90 ? mean_scores_sm90_scratch(problem, memory.pitch)
                            : elements  ? means_scratch(memory.pitch)
                                        : pooled_scratch(n_kv);
    memory.k_means = arena.take<std::byte>(mean_rows * problem.d_qk *
                                           (elements ? sizeof(uint16_t) : sizeof(float)));
    if (!elements) memory.q_means = arena.take<float>(problem.first_row.back() * problem.d_qk);
  }
  memory.scratch = arena.take<float>(memory.ctas * memory.scratch_floats);
  return memory;
}

void write_head_rules(const Problem& problem, const Pattern& pattern, const SelectProblem& select,
                      void* stream) {
  const auto* heads = std::get_if<MInference>(&pattern);
  if (heads == nullptr) return;
  for (int32_t first = 0; first < problem.h_q; first += HeadRules::kEntries) {
    HeadRules from{};
    from.first = first;
    from.n = std::min(HeadRules::kEntries, problem.h_q - first);
    for (int32_t h = 0; h < from.n; ++h) {
      from.entries[h] = head_rule(heads->heads[first + h], problem.block_size);
    }
    launch_overlapped(write_rules_kernel, dim3(1), dim3(HeadRules::kEntries), 0, stream, from,
                      const_cast<HeadRule*>(select.rules));
  }
}

void select_by_blocks(const Problem& problem, const Pattern& pattern, const SelectProblem& select,
                      const BlockScoreMemory& memory, void* stream) {
  const int64_t tasks = task_count(problem, pattern, memory.sm90);
  grid_of(tasks);  // numbers that fit
  BlockScores scores{.k_means = memory.k_means,
                     .q_means = memory.q_means,
                     .scratch = memory.scratch,
                     .scratch_floats = memory.scratch_floats,
                     .tile_blocks = tile_blocks(problem, pattern, memory.sm90),
                     .tasks = static_cast<int32_t>(tasks),
                     .stages = 0,
                     .pitch = memory.pitch,
                     .antidiagonal = {},
                     .means = {}};
  if (const auto* antidiagonal = std::get_if<XAttention>(&pattern)) {
    scores.antidiagonal = *antidiagonal;
  } else {
    const auto* means = std::get_if<FlashPrefill>(&pattern);
    if (means != nullptr) scores.means = *means;
    block_means(select.problem, select.problem.k, problem.d_qk,
                means != nullptr ? MeanType::kElement : MeanType::kFloat, memory.k_means, stream);
  }
  if (memory.sm90) {
    mean_scores_sm90(problem, select, scores, memory.ctas, stream);
  } else if (problem.dtype == DType::kBFloat16) {
    launch_scores<__nv_bfloat16>(pattern, select, scores, memory.ctas, stream);
  } else {
    launch_scores<__half>(pattern, select, scores, memory.ctas, stream);
  }
}

}  // namespace flexprefill

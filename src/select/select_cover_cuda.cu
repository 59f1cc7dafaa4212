// BlockCover on the device.
//
//   pool_means_kernel  means of keys and of queries              select_cover_cuda_means.cuh
//   asks_kernel        the asking rows by all keys               select_cover_cuda_asks.cuh
//   columns_kernel     the columns
//   cover_map_kernel   the map and the decisions, row by row     select_cover_cuda_map.cuh
//                      On Hopper it makes the means of its queries, too, if it has many tasks.
//   cover_audit_kernel if asked
//
// Workspace at 128k tokens, 32 / 8 heads of 128, blocks of 128, on 132 multiprocessors: 34 MB of
// means of queries and 8 MB of keys, 17 MB of the asking rows' masses and in their place the rows
// of the map in work: 4.0 % of q, k and v with the index.
#include "select/select_cover_cuda.h"

#include <algorithm>

#include "cuda/backend_cuda.h"
#include "cuda/launch.cuh"
#include "math.h"
#include "select/select_cover_cuda_asks.cuh"
#include "select/select_cover_cuda_map.cuh"
#include "select/select_cover_cuda_means.cuh"
#include "select/select_cover_sm90.h"
#include "select/select_rows.h"

namespace flexprefill {
namespace {

constexpr int64_t kResident = 2;  // CTAs of the large kernels on a multiprocessor

// ---- The audit ----------------------------------------------------------------------------------

constexpr int kCoverAuditThreads = 256;

__global__ void __launch_bounds__(kCoverAuditThreads)
    cover_audit_kernel(const __grid_constant__ SelectProblem select,
                       const __grid_constant__ CoverParams p) {
  await_previous_kernel();
  start_next_kernel();
  const DeviceProblem& problem = select.problem;
  const HeadView view = HeadView::of(select, static_cast<int32_t>(blockIdx.x));
  const DeviceSequence& sequence = problem.sequences[view.sequence];
  const auto thread = static_cast<int32_t>(threadIdx.x);
  if (select.sequences[view.sequence].probed == 0 || select.not_finite[view.number] != 0) {
    if (thread == 0) select.audit[view.number] = HeadAudit{};
    return;
  }
  auto* scratch = reinterpret_cast<double*>(shared_memory());
  const CoverHead head(select, view);
  const AskingRows asking(sequence.s_q);
  const int64_t head_words = static_cast<int64_t>(sequence.n_q) * sequence.words_per_row;
  const uint64_t* bits = select.bits + sequence.first_word + view.head * head_words;
  double kept = 0, columns = 0, mass = 0;  // blocks: exact, far below 2^53
  for (int64_t w = thread; w < head_words; w += kCoverAuditThreads) kept += __popcll(bits[w]);
  for (int32_t w = thread; w < sequence.words_per_row; w += kCoverAuditThreads) {
    columns += __popcll(p.memory.columns[head.first_word + w]);
  }
  const int32_t groups = CoverParams::groups(problem.block_size);
  const auto first =
      static_cast<int32_t>((sequence.first_position() + asking.row(0)) / problem.block_size);
  const float* masses = p.memory.group_mass + head.first_block * groups;
  for (int32_t g = 0; first + g < sequence.n_kv; ++g) {
    const uint64_t* row =
        bits + int64_t{first + g - sequence.first_q_block} * sequence.words_per_row;
    for (int32_t j = thread; j <= first + g; j += kCoverAuditThreads) {
      if (has_bit(row, j)) mass += static_cast<double>(masses[int64_t{g} * sequence.n_kv + j]);
    }
  }
  kept = sum_cta<kCoverAuditThreads>(kept, scratch);
  columns = sum_cta<kCoverAuditThreads>(columns, scratch);
  mass = sum_cta<kCoverAuditThreads>(mass, scratch);
  if (thread != 0) return;
  select.audit[view.number] = {
      .pattern = HeadPattern::kBlockCover,
      .vertical_blocks = static_cast<int32_t>(columns),
      .kept_mass = static_cast<float>(mass / static_cast<double>(asking.count)),
      .density = static_cast<float>(kept / static_cast<double>(causal_blocks_of(sequence))),
      .least_row_mass = std::bit_cast<float>(p.memory.least_share[view.number]),
      .rows_below_gamma = p.memory.rows_below[view.number]};
}

// ---- The host's half ----------------------------------------------------------------------------

// Means of a block of a sequence.
int64_t means_of_block(const Problem& problem, int64_t s) {
  return problem.block_size / cover_pool(problem.block_size, problem.lengths[s].s_kv);
}
int64_t most_means_of_block(const Problem& problem) {
  int64_t most = 1;
  for (int64_t s = 0; s < problem.b(); ++s) most = std::max(most, means_of_block(problem, s));
  return most;
}
// Query blocks of a task of the map.
int64_t tile_blocks(const Problem& problem, int64_t s) {
  return CoverTile::kRows / means_of_block(problem, s);
}
int64_t most_tile_blocks(const Problem& problem) {
  int64_t most = 1;
  for (int64_t s = 0; s < problem.b(); ++s) most = std::max(most, tile_blocks(problem, s));
  return most;
}

int64_t map_tasks(const Problem& problem) {
  int64_t most = 0;  // of a head
  for (int64_t s = 0; s < problem.b(); ++s) {
    most = std::max(most, ceil_div(problem.grids[s].n_q, tile_blocks(problem, s)));
  }
  return most * problem.b() * problem.h_q;
}

// On Hopper the map makes the means of its queries itself, because `asks` runs at half its speed
// beside a kernel that does; but not where its tasks are so few that too few multiprocessors would
// read queries.
bool map_pools_queries(const Problem& problem, bool sm90) {
  return sm90 && 2 * map_tasks(problem) >= device_info().multiprocessors;
}

// Tiles of keys of a CTA of asks_kernel. Its rows, its launch and its end are taken to cost as much
// as a tile and a half, and the last wave to wait for an eighth of a CTA. A wave is kResident a
// multiprocessor, on Hopper one: beside a CTA that makes means there is no room for two.
int32_t chunk_tiles(const Problem& problem, const Pattern& pattern) {
  int64_t most = 1;
  for (int64_t s = 0; s < problem.b(); ++s) {
    if (stays_dense(problem.lengths[s], problem.block_size, pattern)) continue;
    most = std::max(most, ceil_div(problem.lengths[s].s_kv, CoverTile::kColumns));
  }
  const int64_t wave = (overlaps_kernels() ? 1 : kResident) * device_info().multiprocessors;
  const auto cost = [&](int64_t tiles) {  // in eighths of a tile
    int64_t ctas = 0;
    for (int64_t s = 0; s < problem.b(); ++s) {
      if (stays_dense(problem.lengths[s], problem.block_size, pattern)) continue;
      ctas += problem.h_q * ceil_div(problem.lengths[s].s_kv, tiles * CoverTile::kColumns);
    }
    return ceil_div(ctas, wave) * (8 * tiles + 12) + tiles;
  };
  constexpr int64_t kMostChunks = 128;  // more make a row's sum long
  int64_t best = most;
  for (int64_t chunks = 2; chunks <= kMostChunks; ++chunks) {
    const int64_t tiles = ceil_div(most, chunks);
    if (cost(tiles) < cost(best)) best = tiles;
  }
  return static_cast<int32_t>(best);
}

template <typename Element>
void launch_all(const Problem& problem, const SelectProblem& select, CoverParams p, bool sm90,
                void* stream) {
  const auto heads = static_cast<int64_t>(select.problem.b) * problem.h_q;
  launch_pool_means<Element>(select, p, sm90, stream);

  const auto with_ring = [&](size_t beside) {
    p.stages = ring_stages<CoverTile>(problem.d_qk, static_cast<int64_t>(beside), kResident);
    const size_t ring = CoverTile::shared_bytes(problem.d_qk, p.stages);
    p.ring_bytes = static_cast<int32_t>(ring);
    return ring + beside;
  };
  if (sm90) {
    cover_asks_sm90(problem, select, p, stream);
  } else {
    const size_t bytes = with_ring(sizeof(AsksShared));
    launch_overlapped(asks_kernel<Element>, dim3(grid_of(heads * p.memory.max_chunks)),
                      dim3(CoverTile::kThreads), bytes, stream, select, p);
  }
  launch_overlapped(columns_kernel, dim3(grid_of(heads * p.slices)), dim3(kColumnsThreads),
                    sizeof(ColumnsShared), stream, select, p);
  if (sm90) {
    cover_map_sm90(problem, select, p, stream);
  } else {
    const size_t bytes = with_ring(sizeof(MapShared));
    launch_overlapped(cover_map_kernel<Element>,
                      dim3(grid_of(std::min<int64_t>(p.memory.ctas, p.tasks))),
                      dim3(CoverTile::kThreads), bytes, stream, select, p);
  }
  if (select.audit == nullptr) return;
  launch_overlapped(cover_audit_kernel, dim3(grid_of(heads)), dim3(kCoverAuditThreads),
                    (kCoverAuditThreads / 32 + 1) * sizeof(double), stream, select, p);
}

}  // namespace

CoverMemory lay_out_cover(const Problem& problem, const BlockCover& pattern, int64_t blocks,
                          int64_t words, Arena& arena, SelectProblem& select) {
  const int64_t heads = problem.b() * problem.h_q;
  const int64_t row_bytes = int64_t{problem.d_qk} * 2;
  int64_t key_blocks = 0;
  CoverMemory memory;
  for (int64_t s = 0; s < problem.b(); ++s) {
    key_blocks += problem.h_kv * problem.grids[s].n_kv;
    memory.pitch = std::max(memory.pitch, static_cast<int32_t>(problem.grids[s].n_kv));
    memory.max_chunks = std::max(memory.max_chunks, static_cast<int32_t>(problem.lengths[s].s_kv));
  }
  // Whole tiles, so that nobody asks whether an entry exists before it is written.
  const int64_t most_blocks = most_tile_blocks(problem);
  memory.pitch = static_cast<int32_t>(ceil_div(memory.pitch, most_blocks) * most_blocks);
  memory.chunk_tiles = chunk_tiles(problem, pattern);
  memory.max_chunks =
      static_cast<int32_t>(ceil_div(memory.max_chunks, memory.chunk_tiles * CoverTile::kColumns));
  memory.ctas = std::min(map_tasks(problem), kResident * device_info().multiprocessors);
  memory.scratch_bytes = cover_scratch_bytes(most_blocks, memory.pitch);

  select.kind = HeadRule::Kind::kBlocks;
  select.not_finite = arena.take<uint8_t>(heads);
  select.tickets = arena.take<uint32_t>(2 * heads);
  const auto with_groups = [&](int64_t blocks, int64_t all_heads) {
    return blocks * most_means_of_block(problem) + all_heads * kMeansTogether;
  };
  memory.key_means = with_groups(key_blocks, problem.b() * problem.h_kv);
  memory.query_means = with_groups(problem.first_row.back(), heads);
  memory.k_means = arena.take<std::byte>(memory.key_means * row_bytes);
  memory.q_means = arena.take<std::byte>(memory.query_means * row_bytes);
  memory.chunk_stats = arena.take<float2>(heads * memory.max_chunks * CoverTile::kRows);
  memory.most_asked = arena.take<float>(blocks);
  memory.group_mass = arena.take<float>(blocks * CoverParams::groups(problem.block_size));
  memory.columns = arena.take<uint64_t>(words);
  memory.least_share = arena.take<uint32_t>(heads);
  memory.rows_below = arena.take<int32_t>(heads);
  const int64_t masses = blocks * CoverTile::kRows * static_cast<int64_t>(sizeof(float));
  memory.scratch = arena.take<std::byte>(std::max(masses, memory.ctas * memory.scratch_bytes));
  memory.masses = reinterpret_cast<float*>(memory.scratch);
  return memory;
}

void select_cover(const Problem& problem, const BlockCover& pattern, const SelectProblem& select,
                  const CoverMemory& memory, bool sm90, void* stream) {
  CoverParams p{};
  p.memory = memory;
  if (select.audit == nullptr) p.memory.group_mass = nullptr;
  p.rule = block_cover_rule(pattern, problem.block_size);
  p.block_size = problem.block_size;
  p.most_per_block = static_cast<int32_t>(most_means_of_block(problem));
  grid_of(map_tasks(problem));  // numbers that fit
  p.tasks = static_cast<int32_t>(map_tasks(problem));
  p.map_pools = map_pools_queries(problem, sm90);
  p.drawn = select.tickets + 1;  // the columns' kernel takes every second one
  p.slices = static_cast<int32_t>(ceil_div(memory.pitch, kColumnsSlice));
  if (problem.dtype == DType::kBFloat16) {
    launch_all<__nv_bfloat16>(problem, select, p, sm90, stream);
  } else {
    launch_all<__half>(problem, select, p, sm90, stream);
  }
}

}  // namespace flexprefill

// select on the device, for every card of compute capability 8.0 and up: all of it on the caller's
// stream, no synchronisation and no allocation.
//
//   prepare          the table of sequences
//   probe_stats      pass 1 of the probe, means of the key blocks              probe_cuda.cuh
//   probe_scores     pass 2: vertical and slash scores
//   pool             the probe's logits by block means
//   patterns         of heads                                                  choose_cuda.cuh
//   slices           of long sequences: scores by slices
//   choose           covers and choices, head by head
//   map_rows         maps of query-aware heads, beside choose if small         map_cuda.cuh
//   map_level x 2    of large maps
//   map_keep         of maps that take turns
//   select_by_blocks heads that score blocks one by one                 select_blocks_cuda.cu
//   select_cover     BlockCover, its audit too                           select_cover_cuda.cu
//   rows             writes the bits of every other row, and of maps that do not take turns
//                                                                              rows_cuda.cuh
//   audit            if asked
//
// A pattern runs what it needs: a window without audit and dense rows the first kernel and rows,
// VerticalSlash no map, FlexPrefill with tau = 0 none either, heads that score blocks one by one no
// probe without an audit. Each kernel is launched while the one before it ends (launch_overlapped).
//
// Workspace for n = s_kv / B key blocks, per query head: 8 bytes a key (vertical and slash scores),
// 28 n bytes of block scores, 1.5 KB a chunk of keys (at most 128 chunks), 8 KB a slice of 8192
// keys where there are several; per K/V head 4 n d bytes of block means. Maps have 2 n^2 bytes a
// head of their own, or where that is more than 10 bytes a key take the place of the scores, as
// many as fit at a time but one at least. No P x s_kv: with 32 / 8 heads of 128 at 128k tokens
// 45 MB and 4 MB of bits, 3.1 % of q, k and v; at 64k, with maps beside, some 5 %.
#include <algorithm>
#include <numbers>
#include <numeric>
#include <variant>

#include "cuda/backend_cuda.h"
#include "cuda/launch.cuh"
#include "math.h"
#include "select/block_rules.h"
#include "select/choose_cuda.cuh"
#include "select/map_cuda.cuh"
#include "select/pool_cuda.cuh"
#include "select/probe_cuda.cuh"
#include "select/probe_sm90.h"
#include "select/rows_cuda.cuh"
#include "select/select_blocks_cuda.h"
#include "select/select_cover_cuda.h"
#include "select/select_rows.h"

namespace flexprefill {
namespace {

// Keys of a CTA of the probe by mma.sync. Fewer than kLeastChunk cost more in loading the probe
// than they gain; kTasks fill a card four times.
constexpr int64_t kLeastChunk = 512;
constexpr int64_t kTasks = 1024;

int64_t probe_chunk(const Problem& problem, const ProbeWork& work) {
  const int64_t heads = std::accumulate(work.heads.begin(), work.heads.end(), int64_t{0});
  int64_t keys = 0, longest = 0;
  for (int64_t s = 0; s < problem.b(); ++s) {
    if (!work.sequences[s]) continue;
    keys += problem.lengths[s].s_kv * heads;
    longest = std::max(longest, problem.lengths[s].s_kv);
  }
  const int64_t least =
      std::max({kLeastChunk, ceil_div(keys, kTasks), ceil_div(longest, kMostProbeChunks)});
  return ceil_div(least, kProbeKeys) * kProbeKeys;
}

// The lengths of the arrays, and the table that leads into them.
struct Plan {
  Plan(const Problem& problem, const Pattern& pattern, bool audited, bool sm90) {
    const auto* window = std::get_if<StreamingLlm>(&pattern);
    for (int64_t s = 0; s < problem.b(); ++s) {
      probe.sequences.push_back(
          window != nullptr ? audited
                            : !stays_dense(problem.lengths[s], problem.block_size, pattern));
    }
    probe.heads.resize(problem.h_kv);
    for (int32_t h = 0; h < problem.h_q; ++h) {  // as SelectProblem::asks_probe
      if (audited || by_probe(pattern, h)) ++probe.heads[problem.kv_head(h)];
    }
    const HeadKinds kinds(problem, pattern);
    chooses = kinds.probe;
    chunk = (sm90 ? probe_sm90_chunk : probe_chunk)(problem, probe);
    for (int64_t s = 0; s < problem.b(); ++s) {
      const SequenceLengths lengths = problem.lengths[s];
      const BlockGrid& grid = problem.grids[s];
      const Probe rows(lengths, problem.block_size);
      SelectSequence entry{.first_key = keys,
                           .first_block = blocks,
                           .first_kv_block = kv_blocks,
                           .first_chunk = chunks,
                           .first_word = words,
                           .first_part = parts,
                           .map = {},
                           .chunks = static_cast<int32_t>(ceil_div(lengths.s_kv, chunk)),
                           .slices = static_cast<int32_t>(ceil_div(lengths.s_kv, kSliceEntries)),
                           .probe_rows = static_cast<int32_t>(rows.rows),
                           .probe_first_row = static_cast<int32_t>(rows.first_row),
                           .probe_position = static_cast<int32_t>(rows.position),
                           .probe_first_block = static_cast<int32_t>(rows.first_block),
                           .probe_split = static_cast<int32_t>(rows.split),
                           .vertical_low = 1,
                           .vertical_high = 1,
                           .slash_low = 1,
                           .slash_high = 1,
                           .probed = probe.sequences[s] ? 1 : 0};
      if (const auto* flex = std::get_if<FlexPrefill>(&pattern)) {
        const FlexPrefillRule rule = flex_prefill_rule(*flex, problem.block_size, grid.n_kv);
        entry.vertical_low = entry.slash_low = static_cast<int32_t>(rule.min_blocks);
        entry.vertical_high = entry.slash_high = static_cast<int32_t>(rule.max_blocks);
      } else if (const auto* fixed = std::get_if<VerticalSlash>(&pattern)) {
        const auto clamped = [&](int64_t size) {
          return static_cast<int32_t>(
              clamp_blocks(whole_blocks(size, problem.block_size), 1, grid.n_kv));
        };
        entry.vertical_low = entry.vertical_high = clamped(fixed->vertical_size);
        entry.slash_low = entry.slash_high = clamped(fixed->slash_size);
      }
      entries.push_back(entry);
      if (!probe.sequences[s]) continue;
      any_probed = true;
      any_probe = window != nullptr || kinds.probe ||
                  (audited && !std::holds_alternative<BlockCover>(pattern));
      max_chunks = std::max<int64_t>(max_chunks, entry.chunks);
      max_n_q = std::max(max_n_q, grid.n_q);
      max_n_kv = std::max(max_n_kv, grid.n_kv);
      max_map = std::max(max_map, causal_blocks(grid));
      maps += problem.h_q * causal_blocks(grid);
      max_slices = std::max<int64_t>(max_slices, entry.slices);
      keys += problem.h_q * lengths.s_kv;
      blocks += problem.h_q * grid.n_kv;
      kv_blocks += problem.h_kv * grid.n_kv;
      chunks += static_cast<int64_t>(problem.h_q) * entry.chunks;
      words += problem.h_q * BlockBits::words_per_row(grid);
      parts += int64_t{2} * problem.h_q * entry.slices;
    }
  }

  // Gives every head's map its place in a room of `room` entries, at least max_map.
  void place_maps(const Problem& problem, int64_t room) {
    MapPlace next{};
    for (int64_t s = 0; s < problem.b(); ++s) {
      if (entries[s].probed == 0) continue;
      const int64_t size = causal_blocks(problem.grids[s]);
      entries[s].map = next;
      next = next.after(problem.h_q - 1, size, room);
      next.first += size;
    }
    turns = next.turn + 1;
  }

  std::vector<SelectSequence> entries;
  ProbeWork probe;
  bool any_probed = false;  // a sequence is neither dense nor windowed alone
  bool any_probe = false;   // a head is looked at through the probe
  bool chooses = false;     // and chosen by it
  int64_t chunk = 0, max_chunks = 0, max_slices = 0, max_n_q = 0, max_n_kv = 0, max_map = 0;
  int64_t keys = 0, blocks = 0, kv_blocks = 0, chunks = 0, words = 0, parts = 0;  // of all heads
  int64_t maps = 0;          // entries of all heads' maps
  int32_t turns = 0;         // of maps
  bool maps_beside = false;  // maps have a place of their own and are made beside choose
};

// All arrays of a call, laid out alike by the size query and by the call.
SelectProblem lay_out(const DeviceProblem& device, const Problem& problem, const Pattern& pattern,
                      Plan& plan, Arena& arena) {
  SelectProblem select{};
  select.problem = device;
  select.chunk_keys = static_cast<int32_t>(plan.chunk);
  select.max_chunks = static_cast<int32_t>(plan.max_chunks);
  select.scale_log2 = problem.scale * std::numbers::log2e_v<float>;
  select.sequences = arena.take<SelectSequence>(problem.b());
  if (const auto* window = std::get_if<StreamingLlm>(&pattern)) {
    const TokenWindow cut = TokenWindow::of(window->global_window, window->local_window);
    select.global_window = cut.global_window;
    select.local_window = cut.local_window;
  }
  if (!plan.any_probed) return select;
  const int64_t heads = problem.b() * problem.h_q;
  if (plan.any_probe) {
    select.chunk_stats = arena.take<float2>(plan.chunks * kProbeRows);
    select.dead = arena.take<uint8_t>(heads);
    select.block_mass = arena.take<float>(2 * plan.blocks);
  }
  if (select.local_window > 0 || !plan.chooses) return select;

  select.slash_tails = arena.take<float>(plan.chunks * kTailEntries);
  select.vertical_block = arena.take<float>(plan.blocks);
  select.slash_block = arena.take<float>(plan.blocks);
  select.choices = arena.take<HeadChoice>(heads);
  select.vertical_bits = arena.take<uint64_t>(plan.words);
  select.slash_bits = arena.take<uint64_t>(plan.words);
  const auto* flex = std::get_if<FlexPrefill>(&pattern);
  // No distance lies below 0.
  const bool maps = flex != nullptr && flex->tau > 0;
  if (flex != nullptr) {
    select.by_blocks = true;
    select.gamma = flex->gamma;
    select.tau = flex->tau;
    select.pooled = arena.take<float>(plan.blocks);
    select.k_means = arena.take<float>(plan.kv_blocks * problem.d_qk);
    if (plan.max_slices > 1) select.parts = arena.take<CoverPart>(plan.parts);
  }
  if (maps) {
    select.map_heads = arena.take<int32_t>(heads);
    select.map_count = arena.take<int32_t>(1);
    select.map_states = arena.take<MapState>(heads);
    select.map_sums = arena.take<MapSums>(heads);
    // Small maps, of up to 10 bytes a key, have a place of their own: they are made while blocks
    // are chosen.
    plan.maps_beside = 2 * plan.maps <= 5 * plan.keys;
    select.map_room = plan.maps_beside ? plan.maps : std::max(2 * plan.keys, plan.max_map);
    plan.place_maps(problem, select.map_room);
    select.maps_in_rows = plan.turns == 1;
    if (plan.maps_beside) select.maps = arena.take<float>(plan.maps);
  }
  // The scores, and in their place large maps.
  const bool shared = maps && !plan.maps_beside;
  auto* scores = arena.take<float>(std::max(2 * plan.keys, shared ? select.map_room : 0));
  if (arena.counting()) return select;
  select.vertical = scores;
  select.slash = scores + plan.keys;
  if (shared) select.maps = scores;
  return select;
}

CoverMemory lay_out_cover(const Problem& problem, const Pattern& pattern, const Plan& plan,
                          Arena& arena, SelectProblem& select) {
  const auto* cover = std::get_if<BlockCover>(&pattern);
  if (cover == nullptr || !plan.any_probed) return {};
  return lay_out_cover(problem, *cover, plan.blocks, plan.words, arena, select);
}

// The launches of one call.
struct Launches {
  const SelectProblem& select;
  const Problem& problem;
  const Pattern& pattern;
  const Plan& plan;
  const BlockScoreMemory& blocks;
  const CoverMemory& cover;
  const bool sm90;  // the probe, or what BlockCover has of it, by wgmma
  void* stream;

  int64_t heads() const { return problem.b() * problem.h_q; }

  void prepare() const {
    for (size_t first = 0; first < plan.entries.size(); first += SequenceEntries::kEntries) {
      SequenceEntries from{};
      from.first = static_cast<int32_t>(first);
      from.n = static_cast<int32_t>(
          std::min<size_t>(SequenceEntries::kEntries, plan.entries.size() - first));
      std::copy_n(plan.entries.begin() + static_cast<int64_t>(first), from.n, from.entries);
      launch_overlapped(prepare_kernel, dim3(1), dim3(kPrepareThreads), 0, stream, from,
                        const_cast<SelectSequence*>(select.sequences), select.map_count,
                        select.tickets, select.not_finite, heads());
    }
  }

  template <typename Element>
  void probe() const {
    if (sm90) return probe_sm90(select, problem, plan.probe, stream);
    const dim3 grid(grid_of(heads() * plan.max_chunks));
    const auto available = static_cast<size_t>(device_info().shared_bytes);
    const int32_t stages = probe_shared_bytes(problem.d_qk, 2) <= available ? 2 : 1;
    const size_t shared = probe_shared_bytes(problem.d_qk, stages);
    launch_overlapped(probe_stats_kernel<Element>, grid, dim3(kProbeThreads), shared, stream,
                      select, stages);
    const auto scores = select.audit != nullptr ? probe_scores_kernel<Element, true>
                                                : probe_scores_kernel<Element, false>;
    launch_overlapped(scores, grid, dim3(kProbeThreads), shared, stream, select, stages);
    if (!select.by_blocks) return;
    const int64_t pieces = ceil_div(plan.max_n_kv, kPoolBlocks);
    launch_overlapped(pool_kernel<Element>, dim3(grid_of(heads() * pieces)), dim3(kPoolThreads),
                      sizeof(PoolShared), stream, select, static_cast<int32_t>(pieces));
  }

  void choose() const {
    if (select.by_blocks) {
      launch_overlapped(patterns_kernel, dim3(grid_of(heads())), dim3(kChooseThreads),
                        sizeof(ChooseShared), stream, select);
    }
    const dim3 arrays(grid_of(2 * heads()));
    if (plan.max_slices > 1) {
      launch_overlapped(slices_kernel, dim3(grid_of(2 * heads() * plan.max_slices)),
                        dim3(kChooseThreads), sizeof(ChooseShared), stream, select,
                        static_cast<int32_t>(plan.max_slices));
    }
    launch_overlapped(plan.max_slices > 1 ? choose_kernel<true> : choose_kernel<false>, arrays,
                      dim3(kChooseThreads), sizeof(ChooseShared), stream, select);
  }

  // A grid for up to `items` of each head that walks over what there is.
  dim3 map_grid(int64_t items) const {
    return dim3(grid_of(std::min<int64_t>(heads() * items, 2 * device_info().multiprocessors)));
  }
  template <typename Element>
  void decide_maps() const {
    const auto strips = static_cast<int32_t>(ceil_div(plan.max_n_q, kMapRows));
    const auto pieces = static_cast<int32_t>(ceil_div(plan.max_map, kMapPiece));
    const auto tiles = static_cast<int32_t>(ceil_div(plan.max_n_q, kMapKeepRows));
    const bool small = plan.max_n_kv <= kSmallMap;
    for (int32_t turn = 0; turn < plan.turns; ++turn) {
      launch_overlapped(map_rows_kernel<Element>, map_grid(strips), dim3(kMapThreads),
                        sizeof(MapShared), stream, select, turn, strips, small, plan.maps_beside);
      for (int32_t level = 1; level < Histogram::kLevels && !small; ++level) {
        launch_overlapped(map_level_kernel, map_grid(pieces), dim3(kMapThreads), sizeof(MapShared),
                          stream, select, turn, level, pieces);
      }
      if (select.maps_in_rows) continue;
      launch_overlapped(map_keep_kernel, map_grid(tiles), dim3(kKeepThreads), sizeof(KeepShared),
                        stream, select, turn, tiles);
    }
  }

  void rows() const {
    int64_t n_q = 0;
    for (const BlockGrid& grid : problem.grids) n_q = std::max(n_q, grid.n_q);
    const int64_t tiles = ceil_div(n_q, kRowsTile);
    launch_overlapped(rows_kernel, dim3(grid_of(heads() * tiles)), dim3(kRowsThreads),
                      sizeof(KeepShared), stream, select, static_cast<int32_t>(tiles));
  }

  template <typename Element>
  void run() const {
    prepare();
    write_head_rules(problem, pattern, select, stream);
    if (plan.any_probe) probe<Element>();
    if (select.choices != nullptr) choose();
    if (select.map_heads != nullptr) decide_maps<Element>();
    const auto* covers = std::get_if<BlockCover>(&pattern);
    if (plan.any_probed && covers != nullptr) {
      select_cover(problem, *covers, select, cover, sm90, stream);
    } else if (plan.any_probed && select.not_finite != nullptr) {
      select_by_blocks(problem, pattern, select, blocks, stream);
    }
    rows();
    if (select.audit != nullptr && !(plan.any_probed && covers != nullptr)) {
      launch_overlapped(audit_kernel, dim3(grid_of(heads())), dim3(kAuditThreads),
                        (kAuditThreads / 32) * sizeof(double), stream, select);
    }
  }
};

}  // namespace

void select_cuda(const DeviceProblem& device, const Problem& problem, const Pattern& pattern,
                 const Execution& execution, Arena& arena, uint64_t* bits, HeadAudit* audit) {
  const bool hopper = overlaps_kernels() && execution.backend != Backend::kSm80;
  // A size query does not know whether an audit will be asked for, nor, without data, how aligned
  // it will be: enough for both.
  if (arena.counting()) {
    const Arena before = arena;
    for (const int variant : {0, 1, 2, 3}) {
      const bool audited = variant / 2 != 0, sm90 = variant % 2 != 0 && hopper;
      Arena counter = before;
      Plan plan(problem, pattern, audited, sm90);
      SelectProblem select = lay_out(device, problem, pattern, plan, counter);
      lay_out_block_scores(problem, pattern, sm90, counter, select);
      lay_out_cover(problem, pattern, plan, counter, select);
      if (counter.bytes() > arena.bytes()) arena = counter;
    }
    return;
  }
  if (problem.b() == 0) return;
  const bool sm90 = hopper && probe_sm90_takes(problem);
  Plan plan(problem, pattern, audit != nullptr, sm90);
  SelectProblem select = lay_out(device, problem, pattern, plan, arena);
  const BlockScoreMemory blocks = lay_out_block_scores(problem, pattern, hopper, arena, select);
  const CoverMemory cover = lay_out_cover(problem, pattern, plan, arena, select);
  select.q_aligned = rows_on_16_bytes(device.q);
  select.k_aligned = rows_on_16_bytes(device.k);
  select.bits = bits;
  select.audit = audit;
  const Launches launches{select, problem, pattern, plan, blocks, cover, sm90, execution.stream};
  if (problem.dtype == DType::kBFloat16) {
    launches.run<__nv_bfloat16>();
  } else {
    launches.run<__half>();
  }
}

}  // namespace flexprefill

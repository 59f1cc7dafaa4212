// Around the decisions of select on the device: the plan's table, the rows of the index, the audit.
#ifndef FLEXPREFILL_SRC_SELECT_ROWS_CUDA_CUH_
#define FLEXPREFILL_SRC_SELECT_ROWS_CUDA_CUH_

#include "cuda/launch.cuh"
#include "select/map_cuda.cuh"
#include "select/select_device.cuh"

namespace flexprefill {

// Entries of the table that one launch carries: as kernel parameters they need no host memory when
// a CUDA graph replays.
struct SequenceEntries {
  static constexpr int kEntries = 24;
  SelectSequence entries[kEntries];
  int32_t first, n;
};
static_assert(sizeof(SequenceEntries) <= 4000);

constexpr int kPrepareThreads = 256;

// `tickets` [heads, 2], `not_finite` [heads] and *map_count become 0; each may be nullptr. Beside
// write_sequences, which this kernel needs nothing of: it awaits that at its end. What used this
// memory before has ended: write_sequences awaited it before it let this kernel start.
static __global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const __grid_constant__ SequenceEntries from, SelectSequence* to,
                   int32_t* map_count, uint32_t* tickets, uint8_t* not_finite, int64_t heads) {
  start_next_kernel();
  const auto thread = static_cast<int32_t>(threadIdx.x);
  if (thread < from.n) to[from.first + thread] = from.entries[thread];
  if (thread == 0 && map_count != nullptr) *map_count = 0;
  for (int64_t i = thread; tickets != nullptr && i < 2 * heads; i += kPrepareThreads) {
    tickets[i] = 0;
  }
  for (int64_t i = thread; not_finite != nullptr && i < heads; i += kPrepareThreads) {
    not_finite[i] = 0;
  }
  await_previous_kernel();
}

// What was decided for a head, whoever did.
__device__ inline HeadChoice choice_of(const SelectProblem& select, const HeadView& head) {
  HeadChoice choice{};
  if (select.local_window > 0) {
    choice.pattern = HeadPattern::kStreaming;
  } else if (select.sequences[head.sequence].probed != 0) {
    const HeadRule::Kind kind = select.kind_of(head.head);
    if (kind == HeadRule::Kind::kProbe) return select.choices[head.number];
    choice.pattern = kind == HeadRule::Kind::kWindow       ? HeadPattern::kStreaming
                     : select.not_finite[head.number] == 0 ? HeadPattern::kBlockSparse
                                                           : HeadPattern::kDense;
  }
  return choice;
}

// ---- Rows ---------------------------------------------------------------------------------------

constexpr int kRowsThreads = kKeepThreads;
constexpr int kRowsTile = kMapKeepRows;  // rows of a CTA

static __global__ void __launch_bounds__(kRowsThreads)
    rows_kernel(const SelectProblem select, int32_t tiles) {
  await_previous_kernel();
  start_next_kernel();
  const DeviceProblem& problem = select.problem;
  const auto x = static_cast<int32_t>(blockIdx.x);
  const HeadView head = HeadView::of(select, x / tiles);
  const DeviceSequence& sequence = problem.sequences[head.sequence];
  const SelectSequence& plan = select.sequences[head.sequence];
  const int32_t first = x % tiles * kRowsTile;
  if (first >= sequence.n_q) return;
  const int32_t rows = sequence.n_q - first < kRowsTile ? sequence.n_q - first : kRowsTile;
  const int32_t words = sequence.words_per_row;
  const HeadPattern pattern = choice_of(select, head).pattern;
  if (pattern == HeadPattern::kBlockSparse) return;  // written together with its scores
  const bool windowed = pattern == HeadPattern::kStreaming;
  const bool query_aware = pattern == HeadPattern::kQueryAware;
  const HeadRule* rule = select.rules == nullptr ? nullptr : select.rules + head.head;
  const int64_t global_window = rule == nullptr ? select.global_window : rule->vertical;
  const int64_t local_window = rule == nullptr ? select.local_window : rule->slash;
  const int64_t choice = plan.first_word + static_cast<int64_t>(head.head) * words;
  const uint64_t* slash_bits = select.slash_bits + choice;
  uint64_t* to = select.bits + sequence.first_word +
                 (static_cast<int64_t>(head.head) * sequence.n_q + first) * words;
  if (query_aware && select.maps_in_rows) {
    auto& shared = *reinterpret_cast<KeepShared*>(shared_memory());
    keep_map_rows(HeadMap(select, head.number), select.map_states[head.number].taken, first,
                  first + rows, shared, [&](int32_t r, int32_t w, uint64_t kept) {
                    to[(r - first) * words + w] =
                        kept | row_word(select.vertical_bits + choice, slash_bits, sequence.n_kv,
                                        sequence.first_q_block + r, w);
                  });
    return;
  }
  for (int32_t e = static_cast<int32_t>(threadIdx.x); e < rows * words; e += kRowsThreads) {
    const int32_t w = e % words;
    const int64_t i = sequence.first_q_block + first + e / words;
    if (windowed) {
      const int64_t begin = i * problem.block_size;
      const int64_t position =
          begin > sequence.first_position() ? begin : sequence.first_position();
      to[e] = window_word(global_window, local_window, position, problem.block_size, i, w);
    } else if (pattern == HeadPattern::kDense) {
      to[e] = range_word(0, i + 1, w);
    } else {
      // What the map keeps is there already (map_keep).
      const uint64_t kept = query_aware ? to[e] : 0;
      to[e] = kept | row_word(select.vertical_bits + choice, slash_bits, sequence.n_kv, i, w);
    }
  }
}

// ---- The audit ----------------------------------------------------------------------------------

constexpr int kAuditThreads = 256;

static __global__ void __launch_bounds__(kAuditThreads) audit_kernel(const SelectProblem select) {
  await_previous_kernel();
  start_next_kernel();
  const DeviceProblem& problem = select.problem;
  const HeadView head = HeadView::of(select, static_cast<int32_t>(blockIdx.x));
  const DeviceSequence& sequence = problem.sequences[head.sequence];
  const SelectSequence& plan = select.sequences[head.sequence];
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const HeadChoice choice = choice_of(select, head);
  if (choice.pattern == HeadPattern::kDense) {
    if (thread == 0) select.audit[head.number] = HeadAudit{};
    return;
  }
  auto* scratch = reinterpret_cast<double*>(shared_memory());
  const int64_t head_words = static_cast<int64_t>(sequence.n_q) * sequence.words_per_row;
  const uint64_t* bits = select.bits + sequence.first_word + head.head * head_words;
  double kept = 0;  // blocks: exact, far below 2^53
  for (int64_t w = thread; w < head_words; w += kAuditThreads) {
    kept += __popcll(bits[w]);
  }
  kept = sum_cta<kAuditThreads>(kept, scratch);
  double mass = 0;
  const float* masses =
      select.block_mass + 2 * (plan.first_block + static_cast<int64_t>(head.head) * sequence.n_kv);
  for (int32_t half = 0; half < (plan.probe_split < plan.probe_rows ? 2 : 1); ++half) {
    const uint64_t* row =
        bits + static_cast<int64_t>(plan.probe_first_block + half - sequence.first_q_block) *
                   sequence.words_per_row;
    for (int32_t j = thread; j < sequence.n_kv; j += kAuditThreads) {
      if (has_bit(row, j)) {
        mass += static_cast<double>(masses[half * static_cast<int64_t>(sequence.n_kv) + j]);
      }
    }
  }
  mass = sum_cta<kAuditThreads>(mass, scratch);
  if (thread != 0) return;
  if (select.dead[head.number] != 0) mass = std::numeric_limits<double>::quiet_NaN();
  select.audit[head.number] = {
      .pattern = choice.pattern,
      .jsd_sqrt = choice.jsd_sqrt,
      .vertical_blocks = static_cast<int32_t>(choice.vertical_blocks),
      .slash_blocks = static_cast<int32_t>(choice.slash_blocks),
      .kept_mass = static_cast<float>(mass),
      .density = static_cast<float>(kept / static_cast<double>(causal_blocks_of(sequence)))};
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_ROWS_CUDA_CUH_

// The decisions of select on the device, as pattern.h makes them: bit-equal given equal scores;
// only the sum of jsd_sqrt is in another order.
//
// A thread block takes a slice of a head's scores, of keys or of distances: it finishes them (slash
// scores across chunks), adds up blocks, and makes level 0 of the cover. The last of a head's and
// array's goes on alone with the cover, the distance and the pattern (keys), and the best blocks.
// Which pattern the head has is not known where distances are chosen, so these are chosen for both.
#ifndef FLEXPREFILL_SRC_SELECT_CHOOSE_CUDA_CUH_
#define FLEXPREFILL_SRC_SELECT_CHOOSE_CUDA_CUH_

#include "cuda/launch.cuh"
#include "select/select_device.cuh"
#include "select/take_cuda.cuh"

namespace flexprefill {

constexpr int kChooseThreads = 512;
// Scores of a slice: in registers, as long as a row has one slice alone; a multiple of every block
// size. With more of them the atomics of level 0 take a thread block longer than what follows.
constexpr int kSliceEntries = 8192;
constexpr int kSliceEach = kSliceEntries / kChooseThreads;
// Block scores that are kept in shared memory while the best are looked for.
constexpr int kStagedBlocks = 8192;

struct ChooseShared {
  union {
    TakeShared<kChooseThreads> take;
    float staged[kStagedBlocks];
  };
  double sums[kChooseThreads / 32];
  float maxima[kChooseThreads / 32];
  uint32_t ties[kChooseThreads / 32];
  uint32_t last;
};

// A head's scores of keys or of distances.
struct HeadScores {
  HeadView head;
  bool of_slash;
  float *entries, *blocks;  // [s_kv], [n]
  int32_t s_kv, n;

  __device__ HeadScores(const SelectProblem& select, int32_t head_number, bool of_slash)
      : head(HeadView::of(select, head_number)), of_slash(of_slash) {
    const SelectSequence& plan = select.sequences[head.sequence];
    const DeviceSequence& sequence = select.problem.sequences[head.sequence];
    s_kv = sequence.s_kv;
    n = sequence.n_kv;
    entries = (of_slash ? select.slash : select.vertical) + plan.first_key +
              static_cast<int64_t>(head.head) * s_kv;
    blocks = (of_slash ? select.slash_block : select.vertical_block) + plan.first_block +
             static_cast<int64_t>(head.head) * n;
  }
  // Of the array among all heads' two.
  __device__ int64_t number() const { return int64_t{2} * head.number + (of_slash ? 1 : 0); }
};

// ---- A slice
// -------------------------------------------------------------------------------------

// Scores in registers: of warp w entries [w * 32 * kSliceEach, ..) of the slice, 32 at a time; 0
// beyond the last.
struct HeldEntries {
  float x[kSliceEach];

  __device__ static int32_t place(int i) {
    const auto thread = static_cast<int32_t>(threadIdx.x);
    return thread / 32 * 32 * kSliceEach + i * 32 + thread % 32;
  }
  template <typename F>
  __device__ void visit(int64_t, int64_t, const F& f) const {
#pragma unroll
    for (int i = 0; i < kSliceEach; ++i) f(x[i]);
  }
};

// The slice's scores from `first` on. Slash scores get what the chunk after theirs has of their
// diagonal, here and in memory.
__device__ inline void load_slice(const SelectProblem& select, const HeadScores& scores,
                                  int32_t first, HeldEntries& held) {
  const SelectSequence& plan = select.sequences[scores.head.sequence];
  const int32_t left = min(scores.s_kv - first, kSliceEntries);
  float* entries = scores.entries + first;
#pragma unroll
  for (int i = 0; i < kSliceEach; ++i) {
    const int32_t e = HeldEntries::place(i);
    held.x[i] = e < left ? entries[e] : 0.0f;
  }
  if (!scores.of_slash || plan.chunks == 1) return;
  const float* tails =
      select.slash_tails +
      (plan.first_chunk + static_cast<int64_t>(scores.head.head) * plan.chunks) * kTailEntries;
  const auto chunk = static_cast<uint32_t>(select.chunk_keys);
#pragma unroll
  for (int i = 0; i < kSliceEach; ++i) {
    const int32_t e = HeldEntries::place(i);
    // Diagonal u = key - probe row lies in the chunk of key u; the last 127 diagonals of a chunk
    // go on in the next one.
    const int32_t u = plan.probe_position - first - e;
    if (e >= left || u < 0) continue;
    const uint32_t next = static_cast<uint32_t>(u) / chunk + 1;
    const int32_t entry = u - static_cast<int32_t>(next * chunk) + kTailEntries - 1;
    if (entry < 0 || next >= static_cast<uint32_t>(plan.chunks)) continue;
    held.x[i] += tails[static_cast<int64_t>(next) * kTailEntries + entry];
    entries[e] = held.x[i];
  }
}

// Sums of the slice's blocks, by a warp each, as warp_order_sum of pattern.h.
__device__ inline void sum_slice_blocks(const HeadScores& scores, int32_t first, int32_t block_size,
                                        const HeldEntries& held) {
  const int lane = static_cast<int>(threadIdx.x) % 32, steps = block_size / 32;
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kSliceEach; ++i) {
    sum += static_cast<double>(held.x[i]);
    if ((i + 1) % steps != 0) continue;
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    const int32_t e = first + HeldEntries::place(i + 1 - steps) - lane;
    if (lane == 0 && e < scores.s_kv) scores.blocks[e / block_size] = static_cast<float>(sum);
    sum = 0;
  }
}

// Level 0 of the slice, in shared.buckets.
__device__ inline void sum_slice_masses(const HeldEntries& held,
                                        TakeShared<kChooseThreads>& shared) {
  shared.level0.clear();
  __syncthreads();
  held.visit(0, kSliceEntries, [&](float x) { shared.level0.own().add(x); });
  __syncthreads();
  shared.for_own_buckets([&](int i, BucketSum& sum) { sum = shared.level0.sum(i); });
}

// Level 0 of all slices of an array, in shared.buckets of its last thread block; true there.
__device__ inline bool gather_slices(const SelectProblem& select, const HeadScores& scores,
                                     int32_t slice, ChooseShared& shared) {
  const SelectSequence& plan = select.sequences[scores.head.sequence];
  CoverPart* parts = select.parts + plan.first_part +
                     (int64_t{2} * scores.head.head + (scores.of_slash ? 1 : 0)) * plan.slices;
  if (select.by_blocks) {
    shared.take.for_own_buckets([&](int i, BucketSum& sum) {
      parts[slice].weight[i] = sum.weight;
      parts[slice].count[i] = static_cast<uint32_t>(sum.count);
    });
  }
  if (!is_last_cta(&select.tickets[scores.number()], static_cast<uint32_t>(plan.slices),
                   shared.last)) {
    return false;
  }
  if (select.by_blocks) {
    shared.take.for_own_buckets([&](int i, BucketSum& sum) {
      sum = {};
#pragma unroll 4
      for (int32_t s = 0; s < plan.slices; ++s) {
        sum.weight += __ldcg(&parts[s].weight[i]);
        sum.count += __ldcg(&parts[s].count[i]);
      }
    });
  }
  return true;
}

// ---- The choice
// ------------------------------------------------------------------------------------

// jsd_sqrt of pattern.h, the sum in another order; q may come from other thread blocks.
template <int kThreads>
__device__ float jsd_sqrt_cta(const float* p, const float* q, int32_t n, double* scratch) {
  double sum = 0;
  for (int32_t j = static_cast<int32_t>(threadIdx.x); j < n; j += kThreads)
    sum += jsd_term(p[j], __ldcg(q + j));
  return jsd_sqrt_of_sum(sum_cta<kThreads>(sum, scratch));
}

// Step 4's estimate from the logits of block means: pooled[j] = share * exp2(logit) / sum. False
// where it is NaN.
__device__ inline bool pooled_softmax(const HeadScores& scores, int32_t block_size, float* pooled,
                                      ChooseShared& shared) {
  float highest = -INFINITY;
  for (int32_t j = static_cast<int32_t>(threadIdx.x); j < scores.n; j += kChooseThreads) {
    highest = fmaxf(highest, pooled[j]);
  }
  highest = combine_cta<kChooseThreads>(highest, shared.maxima,
                                        [](float a, float b) { return fmaxf(a, b); });
  double sum = 0;
  for (int32_t j = static_cast<int32_t>(threadIdx.x); j < scores.n; j += kChooseThreads) {
    const int32_t left = scores.s_kv - j * block_size;
    const float share =
        left < block_size ? static_cast<float>(left) / static_cast<float>(block_size) : 1.0f;
    const float a = share * exp2_approx(pooled[j] - highest);
    pooled[j] = a;
    sum += static_cast<double>(a);
  }
  sum = sum_cta<kChooseThreads>(sum, shared.sums);
  const auto inverse = static_cast<float>(1 / sum);
  for (int32_t j = static_cast<int32_t>(threadIdx.x); j < scores.n; j += kChooseThreads)
    pooled[j] *= inverse;
  __syncthreads();
  return sum > 0;
}

// Step 2: how many blocks hold gamma of the mass. After level 0 in shared.buckets; entries: all of
// the array. Every thread gets the result.
template <typename Entries>
__device__ int64_t cover_blocks_cta(const SelectProblem& select, const HeadScores& scores,
                                    int64_t low, int64_t high, const Entries& entries,
                                    ChooseShared& shared) {
  int64_t count = scores.s_kv;
  if (descend_level0(mass_limit(select.gamma, 1), shared.take)) {
    count = finish_take_cta<kChooseThreads>(entries, scores.s_kv, shared.take).count;
  }
  return cover_blocks(count + 1, select.problem.block_size,
                      {.gamma = select.gamma, .tau = 0, .min_blocks = low, .max_blocks = high});
}

// Brings the block scores to shared memory, entry 0 above all others, where there is room. Ends
// with a barrier.
__device__ inline void stage_blocks(const HeadScores& scores, ChooseShared& shared) {
  __syncthreads();  // what was there may be in use
  if (scores.n > kStagedBlocks) return;
  for (int32_t e = static_cast<int32_t>(threadIdx.x); e < scores.n; e += kChooseThreads) {
    shared.staged[e] = e == 0 ? INFINITY : __ldcg(scores.blocks + e);
  }
  __syncthreads();
}

// Step 5: bits of the best `count` blocks, block 0 always among them; distance s as bit n - 1 - s.
// After stage_blocks.
__device__ inline void choose_blocks(const HeadScores& scores, int64_t count, uint64_t* bits,
                                     ChooseShared& shared) {
  const bool staged = scores.n <= kStagedBlocks;
  const auto value = [&](int32_t e) {
    return staged ? shared.staged[e] : e == 0 ? INFINITY : __ldcg(scores.blocks + e);
  };
  const Taken taken = take_count_cta<kChooseThreads>(scores.n, static_cast<uint64_t>(count), value);
  write_taken_bits<kChooseThreads>(scores.n, taken, scores.of_slash, value, shared.ties, bits);
}

// How many blocks of keys or of distances the head keeps at least; exactly so many where its sizes
// are fixed.
__device__ inline int64_t fewest_blocks(const SelectProblem& select, const HeadScores& scores) {
  if (select.rules != nullptr) {
    const HeadRule& rule = select.rules[scores.head.head];
    return clamp_blocks(scores.of_slash ? rule.slash : rule.vertical, 1, scores.n);
  }
  const SelectSequence& plan = select.sequences[scores.head.sequence];
  return scores.of_slash ? plan.slash_low : plan.vertical_low;
}

// What keys decide of a head: its pattern too.
template <typename Entries>
__device__ void choose_keys(const SelectProblem& select, const HeadScores& scores,
                            const Entries& entries, ChooseShared& shared) {
  const HeadView& head = scores.head;
  const SelectSequence& plan = select.sequences[head.sequence];
  const DeviceSequence& sequence = select.problem.sequences[head.sequence];
  HeadChoice choice{};
  choice.pattern = HeadPattern::kVerticalSlash;
  choice.vertical_blocks = fewest_blocks(select, scores);
  if (select.by_blocks) {
    choice.vertical_blocks =
        cover_blocks_cta(select, scores, plan.vertical_low, plan.vertical_high, entries, shared);
    float* pooled = select.pooled + plan.first_block + static_cast<int64_t>(head.head) * scores.n;
    if (!pooled_softmax(scores, select.problem.block_size, pooled, shared)) {
      if (threadIdx.x == 0) select.choices[head.number].pattern = HeadPattern::kDense;
      return;
    }
    choice.jsd_sqrt = jsd_sqrt_cta<kChooseThreads>(pooled, scores.blocks, scores.n, shared.sums);
    if (choice.jsd_sqrt < select.tau) {
      choice.pattern = HeadPattern::kQueryAware;
      choice.vertical_blocks = plan.vertical_low;
    }
  }
  const int64_t word = plan.first_word + static_cast<int64_t>(head.head) * sequence.words_per_row;
  stage_blocks(scores, shared);
  choose_blocks(scores, choice.vertical_blocks, select.vertical_bits + word, shared);
  if (choice.pattern == HeadPattern::kQueryAware) {
    MapSums& sums = select.map_sums[head.number];
    for (int i = static_cast<int>(threadIdx.x); i < MapSums::kBuckets; i += kChooseThreads) {
      sums.weight[i] = sums.count[i] = 0;
    }
  }
  if (threadIdx.x != 0) return;
  HeadChoice& to = select.choices[head.number];
  to.pattern = choice.pattern;
  to.jsd_sqrt = choice.jsd_sqrt;
  to.vertical_blocks = choice.vertical_blocks;
  if (choice.pattern != HeadPattern::kQueryAware) return;
  select.map_states[head.number] = MapState{};
  select.map_heads[atomicAdd(select.map_count, 1)] = head.number;
}

template <typename Entries>
__device__ void choose_distances(const SelectProblem& select, const HeadScores& scores,
                                 const Entries& entries, ChooseShared& shared) {
  const HeadView& head = scores.head;
  const SelectSequence& plan = select.sequences[head.sequence];
  const DeviceSequence& sequence = select.problem.sequences[head.sequence];
  int64_t count = fewest_blocks(select, scores);
  if (select.by_blocks) {
    count = cover_blocks_cta(select, scores, plan.slash_low, plan.slash_high, entries, shared);
  }
  const int64_t word = plan.first_word + static_cast<int64_t>(head.head) * sequence.words_per_row;
  uint64_t* bits = select.slash_bits + 2 * word;
  if (threadIdx.x == 0) select.choices[head.number].slash_blocks = count;
  stage_blocks(scores, shared);
  choose_blocks(scores, count, bits, shared);
  if (select.map_heads == nullptr) return;  // no head is query-aware
  choose_blocks(scores, plan.slash_low, bits + sequence.words_per_row, shared);
}

// Thread blocks: head, keys or distances, slice. kSliced: some sequence has more than one slice.
template <bool kSliced>
__global__ void __launch_bounds__(kChooseThreads, kSliced ? 2 : 1)
    choose_kernel(const SelectProblem select, int32_t max_slices) {
  await_previous_kernel();
  start_next_kernel();
  auto x = static_cast<int32_t>(blockIdx.x);
  const int32_t slice = x % max_slices;
  x /= max_slices;
  const HeadScores scores(select, x / 2, x % 2 != 0);
  const SelectSequence& plan = select.sequences[scores.head.sequence];
  if (plan.probed == 0 || slice >= plan.slices) return;
  if (select.kind_of(scores.head.head) != HeadRule::Kind::kProbe) return;
  if (select.dead[scores.head.number] != 0) {
    if (slice == 0 && !scores.of_slash && threadIdx.x == 0) {
      select.choices[scores.head.number].pattern = HeadPattern::kDense;
    }
    return;
  }
  auto& shared = *reinterpret_cast<ChooseShared*>(shared_memory());
  const int32_t first = slice * kSliceEntries;
  HeldEntries held;
  load_slice(select, scores, first, held);
  sum_slice_blocks(scores, first, select.problem.block_size, held);
  if (select.by_blocks) sum_slice_masses(held, shared.take);
  if (kSliced && plan.slices > 1 && !gather_slices(select, scores, slice, shared)) return;
  __syncthreads();  // block sums
  const auto choose = [&](const auto& entries) {
    if (scores.of_slash) {
      choose_distances(select, scores, entries, shared);
    } else {
      choose_keys(select, scores, entries, shared);
    }
  };
  if constexpr (kSliced) {
    choose(SpanEntries<kChooseThreads>{scores.entries, scores.s_kv});
  } else {
    choose(held);
  }
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_CHOOSE_CUDA_CUH_

// The decisions of select on the device, as pattern.h makes them: bit-equal given equal scores;
// only the sum of jsd_sqrt is in another order.
//
//   patterns  a CTA takes a head's keys: sums of blocks, the distance and the pattern
//   slices    a CTA takes a slice of a head's scores, of keys or of distances: it finishes
//             them (slash scores across chunks), adds up blocks, and makes level 0 of the cover
//   choose    a CTA takes a head's keys or distances: the cover and the best blocks
// Only FlexPrefill has patterns to decide. Where no sequence has more than one slice, `choose` does
// what slices would. The pattern comes first, since the maps of query-aware heads wait for nothing
// else.
#ifndef FLEXPREFILL_SRC_SELECT_CHOOSE_CUDA_CUH_
#define FLEXPREFILL_SRC_SELECT_CHOOSE_CUDA_CUH_

#include "cuda/launch.cuh"
#include "select/select_device.cuh"
#include "select/take_cuda.cuh"

namespace flexprefill {

constexpr int kChooseThreads = 512;
// Scores of a slice: in registers, as long as a row has one slice alone; a multiple of every block
// size. With more of them the atomics of level 0 take a CTA longer than what follows.
constexpr int kSliceEntries = 8192;
constexpr int kSliceEach = kSliceEntries / kChooseThreads;
// Block scores that are kept in shared memory while the best are looked for.
constexpr int kStagedBlocks = 8192;
// Up to so many blocks each thread counts how many go before its own: no chain of steps, and one
// order serves every number of blocks to keep.
constexpr int kRankedBlocks = 256;

struct ChooseShared {
  union {
    TakeShared<kChooseThreads> take;
    alignas(16) int32_t staged[kStagedBlocks];  // bits of floats, in the order of the floats
  };
  double sums[kChooseThreads / 32];
  float maxima[kChooseThreads / 32];
  uint32_t ties[kChooseThreads / 32];
  int32_t before[kChooseThreads];  // of each block, blocks that go before it; in parts
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
  __device__ CoverPart* parts(const SelectProblem& select) const {  // [slices]
    const SelectSequence& plan = select.sequences[head.sequence];
    return select.parts + plan.first_part +
           (int64_t{2} * head.head + (of_slash ? 1 : 0)) * plan.slices;
  }
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
  // Diagonal u = key - probe row lies in the chunk of key u; the last 127 diagonals of a chunk go
  // on in the next one.
  const float* tails =
      select.slash_tails +
      (plan.first_chunk + static_cast<int64_t>(scores.head.head) * plan.chunks) * kTailEntries;
  const int32_t chunk = select.chunk_keys;  // longer than the 32 by which u goes down
  const int32_t first_u = plan.probe_position - first - HeldEntries::place(0);
  int32_t next = first_u / chunk + 1;
  constexpr int kAtOnce = 8;  // loads under way; more of them spill
#pragma unroll
  for (int begin = 0; begin < kSliceEach; begin += kAtOnce) {
    float more[kAtOnce];
    uint32_t has = 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t e = HeldEntries::place(begin + i), u = plan.probe_position - first - e;
      if (u < (next - 1) * chunk) --next;
      const int32_t entry = u - next * chunk + kTailEntries - 1;
      const bool there = e < left && u >= 0 && entry >= 0 && next < plan.chunks;
      more[i] = there ? tails[next * kTailEntries + entry] : 0.0f;
      has |= there ? 1u << i : 0u;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if ((has >> i & 1) == 0) continue;
      held.x[begin + i] += more[i];
      entries[HeldEntries::place(begin + i)] = held.x[begin + i];
    }
  }
}

// Sums of the slice's blocks of 32 kSteps entries, by a warp each, as warp_order_sum of pattern.h;
// of four blocks at a time, so that their shuffles overlap.
template <int kSteps>
__device__ inline void sum_blocks_of(const HeadScores& scores, int32_t first,
                                     const HeldEntries& held) {
  constexpr int kBlocks = 4;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int begin = 0; begin < kSliceEach; begin += kBlocks * kSteps) {
    double sums[kBlocks] = {};
#pragma unroll
    for (int i = 0; i < kBlocks * kSteps; ++i) {
      sums[i / kSteps] += static_cast<double>(held.x[begin + i]);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
#pragma unroll
      for (double& sum : sums) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    }
    const int32_t e = first + HeldEntries::place(begin) - lane;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const int32_t block = e / (32 * kSteps) + i;
      if (lane == 0 && block < scores.n) scores.blocks[block] = static_cast<float>(sums[i]);
    }
  }
}
__device__ inline void sum_slice_blocks(const HeadScores& scores, int32_t first, int32_t block_size,
                                        const HeldEntries& held) {
  if (block_size == 128) return sum_blocks_of<4>(scores, first, held);
  if (block_size == 64) return sum_blocks_of<2>(scores, first, held);
  sum_blocks_of<1>(scores, first, held);
}

// Whether patterns_kernel adds up these blocks, and not who goes through the slices.
__device__ inline bool summed_for_pattern(const SelectProblem& select, const HeadScores& scores) {
  return select.by_blocks && !scores.of_slash;
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

// Level 0 of all slices of an array, in shared.buckets.
__device__ inline void gather_slices(const SelectProblem& select, const HeadScores& scores,
                                     TakeShared<kChooseThreads>& shared) {
  const int32_t slices = select.sequences[scores.head.sequence].slices;
  const CoverPart* parts = scores.parts(select);
  shared.for_own_buckets([&](int i, BucketSum& sum) {
    sum = {};
#pragma unroll 8
    for (int32_t s = 0; s < slices; ++s) {
      sum.weight += parts[s].weight[i];
      sum.count += parts[s].count[i];
    }
  });
}

// ---- The choice
// ------------------------------------------------------------------------------------

// jsd_sqrt of pattern.h, the sum in another order; q may come from other CTAs.
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
  const auto blocks = [&](uint64_t count) {
    return cover_blocks(static_cast<int64_t>(count) + 1, select.problem.block_size,
                        {.gamma = select.gamma, .tau = 0, .min_blocks = low, .max_blocks = high});
  };
  const DescendShared<kChooseThreads>& at = shared.take.descend;
  if (!descend_level0(mass_limit(select.gamma, 1), shared.take)) {
    return blocks(static_cast<uint64_t>(scores.s_kv));
  }
#pragma unroll 1
  for (int level = 1; level < Histogram::kLevels; ++level) {
    // What is left open is how much of one bucket is taken, not all of it; seldom is that another
    // number of blocks after level 1.
    const int64_t least = blocks(at.walk.count);
    if (least == blocks(at.walk.count + at.inside - 1)) return least;
    descend_entries<kChooseThreads>(entries, scores.s_kv, level, shared.take);
  }
  return blocks(static_cast<uint64_t>(at.walk.taken(Weight::kMass).count));
}

// Threads of a CTA that rank n <= kRankedBlocks blocks side by side.
__device__ inline int32_t rank_width(int32_t n) { return n <= 64 ? 64 : n <= 128 ? 128 : 256; }

// Brings the block scores to shared memory, entry 0 above all others, where there is room; and
// counts for each how many go before it, if there are few. Ends with a barrier.
__device__ inline void stage_blocks(const HeadScores& scores, ChooseShared& shared) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  __syncthreads();  // what was there may be in use
  if (scores.n > kStagedBlocks) return;
  for (int32_t e = thread; e < scores.n; e += kChooseThreads) {
    shared.staged[e] = std::bit_cast<int32_t>(e == 0 ? INFINITY : __ldcg(scores.blocks + e));
  }
  const bool ranked = scores.n <= kRankedBlocks;
  const int32_t width = rank_width(scores.n);
  if (ranked && thread >= scores.n && thread < width) shared.staged[thread] = -1;
  __syncthreads();
  if (!ranked) return;
  // Thread e + p * width: entry e among part p of the others.
  const int32_t each = width * width / kChooseThreads, e = thread % width;
  const int32_t first = thread / width * each;
  const int32_t own = shared.staged[e];
  int32_t before = 0;
#pragma unroll 2
  for (int32_t i = first; i < first + each; i += 4) {
    const int4 x = *reinterpret_cast<const int4*>(shared.staged + i);
    // Of equal ones the lower entry goes before.
    before += (x.x > own - (i < e) ? 1 : 0) + (x.y > own - (i + 1 < e) ? 1 : 0) +
              (x.z > own - (i + 2 < e) ? 1 : 0) + (x.w > own - (i + 3 < e) ? 1 : 0);
  }
  shared.before[thread] = before;
  __syncthreads();
}

// Step 5: bits of the best `count` blocks, block 0 always among them; distance s as bit n - 1 - s.
// After stage_blocks.
__device__ inline void choose_blocks(const HeadScores& scores, int64_t count, uint64_t* bits,
                                     ChooseShared& shared) {
  if (scores.n <= kRankedBlocks) {
    const auto place = static_cast<int32_t>(threadIdx.x);
    const int32_t width = rank_width(scores.n);
    if (place >= width) return;
    const bool there = place < scores.n;
    const int32_t e = there && scores.of_slash ? scores.n - 1 - place : place;
    int32_t before = 0;
    for (int32_t i = e; i < kChooseThreads; i += width) before += shared.before[i];
    const uint32_t word = __ballot_sync(0xffffffffu, there && before < count ? 1 : 0);
    if (place % 32 == 0 && place < (scores.n + 63) / 64 * 64) {
      reinterpret_cast<uint32_t*>(bits)[place / 32] = word;
    }
    return;
  }
  const bool staged = scores.n <= kStagedBlocks;
  const auto value = [&](int32_t e) {
    return staged   ? std::bit_cast<float>(shared.staged[e])
           : e == 0 ? INFINITY
                    : __ldcg(scores.blocks + e);
  };
  const Taken taken =
      take_count_cta<kChooseThreads>(scores.n, static_cast<uint64_t>(count), value, shared.ties);
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

// All decisions of a head's keys or distances but its pattern, once its block scores and level 0
// are there. One code for both: it runs once, and a CTA waits longer for code than for anything in
// it.
template <typename Entries>
__device__ void decide(const SelectProblem& select, const HeadScores& scores,
                       const Entries& entries, ChooseShared& shared) {
  const HeadView& head = scores.head;
  const SelectSequence& plan = select.sequences[head.sequence];
  const int32_t words = select.problem.sequences[head.sequence].words_per_row;
  const int64_t word = plan.first_word + static_cast<int64_t>(head.head) * words;
  HeadChoice& to = select.choices[head.number];
  // Asked of all threads at once: a map without a softmax makes the head dense meanwhile.
  const bool query_aware =
      select.by_blocks && __syncthreads_or(to.pattern == HeadPattern::kQueryAware ? 1 : 0) != 0;
  const int64_t fewest = fewest_blocks(select, scores);
  int64_t count = fewest;
  if (select.by_blocks && !query_aware) {
    const int32_t most = scores.of_slash ? plan.slash_high : plan.vertical_high;
    count = cover_blocks_cta(select, scores, fewest, most, entries, shared);
  }
  if (threadIdx.x == 0) (scores.of_slash ? to.slash_blocks : to.vertical_blocks) = count;
  stage_blocks(scores, shared);
  choose_blocks(scores, count, (scores.of_slash ? select.slash_bits : select.vertical_bits) + word,
                shared);
}

// ---- Kernels
// -----------------------------------------------------------------------------------------

// Whether the probe chooses the head's blocks.
__device__ inline bool is_chosen(const SelectProblem& select, const HeadView& head) {
  return select.sequences[head.sequence].probed != 0 &&
         select.kind_of(head.head) == HeadRule::Kind::kProbe;
}

// CTAs: heads. Steps 4 and 5 of FlexPrefill: how far the two estimates lie apart, and the pattern.
// Lists the query-aware heads and clears what their maps add to.
static __global__ void __launch_bounds__(kChooseThreads, 1)
    patterns_kernel(const SelectProblem select) {
  await_previous_kernel();
  start_next_kernel();
  const HeadScores scores(select, static_cast<int32_t>(blockIdx.x), false);
  const HeadView& head = scores.head;
  if (!is_chosen(select, head)) return;
  const SelectSequence& plan = select.sequences[head.sequence];
  auto& shared = *reinterpret_cast<ChooseShared*>(shared_memory());
  HeadChoice choice{};  // dense
  if (select.dead[head.number] == 0) {
#pragma unroll 1
    for (int32_t first = 0; first < scores.s_kv; first += kSliceEntries) {
      HeldEntries held;
      load_slice(select, scores, first, held);
      sum_slice_blocks(scores, first, select.problem.block_size, held);
    }
    __syncthreads();  // block sums
    float* pooled = select.pooled + plan.first_block + static_cast<int64_t>(head.head) * scores.n;
    if (pooled_softmax(scores, select.problem.block_size, pooled, shared)) {
      choice.jsd_sqrt = jsd_sqrt_cta<kChooseThreads>(pooled, scores.blocks, scores.n, shared.sums);
      choice.pattern =
          choice.jsd_sqrt < select.tau ? HeadPattern::kQueryAware : HeadPattern::kVerticalSlash;
    }
  }
  if (choice.pattern == HeadPattern::kQueryAware) {
    MapSums& sums = select.map_sums[head.number];
    for (int i = static_cast<int>(threadIdx.x); i < MapSums::kBuckets; i += kChooseThreads) {
      sums.weight[i] = sums.count[i] = 0;
    }
  }
  if (threadIdx.x != 0) return;
  select.choices[head.number] = choice;
  if (choice.pattern != HeadPattern::kQueryAware) return;
  select.map_states[head.number] = MapState{};
  select.map_heads[atomicAdd(select.map_count, 1)] = head.number;
}

// One slice of a head's keys or distances.
__device__ inline void finish_slice(const SelectProblem& select, const HeadScores& scores,
                                    int32_t slice) {
  if (slice >= select.sequences[scores.head.sequence].slices) return;
  if (!is_chosen(select, scores.head) || select.dead[scores.head.number] != 0) return;
  auto& shared = *reinterpret_cast<ChooseShared*>(shared_memory());
  const int32_t first = slice * kSliceEntries;
  HeldEntries held;
  load_slice(select, scores, first, held);
  if (!summed_for_pattern(select, scores)) {
    sum_slice_blocks(scores, first, select.problem.block_size, held);
  }
  if (!select.by_blocks) return;
  sum_slice_masses(held, shared.take);
  CoverPart& part = scores.parts(select)[slice];
  shared.take.for_own_buckets([&](int i, BucketSum& sum) {
    part.weight[i] = sum.weight;
    part.count[i] = static_cast<uint32_t>(sum.count);
  });
}

// CTAs: head, keys or distances, slice. Of calls with more than one slice somewhere. Beside
// patterns_kernel, if that was launched.
static __global__ void __launch_bounds__(kChooseThreads, 2)
    slices_kernel(const SelectProblem select, int32_t max_slices) {
  const bool beside = select.by_blocks;
  if (!beside) await_previous_kernel();
  start_next_kernel();
  const auto x = static_cast<int32_t>(blockIdx.x);
  const HeadScores scores(select, x / max_slices / 2, x / max_slices % 2 != 0);
  finish_slice(select, scores, x % max_slices);
  if (beside) await_kernel_beside();
}

// CTAs: head, keys or distances. kSliced: after slices_kernel.
template <bool kSliced>
__global__ void __launch_bounds__(kChooseThreads, 1) choose_kernel(const SelectProblem select) {
  await_previous_kernel();
  start_next_kernel();
  const auto x = static_cast<int32_t>(blockIdx.x);
  const HeadScores scores(select, x / 2, x % 2 != 0);
  if (!is_chosen(select, scores.head)) return;
  const bool dead = select.dead[scores.head.number] != 0;
  if (!select.by_blocks && !scores.of_slash && threadIdx.x == 0) {
    HeadChoice& choice = select.choices[scores.head.number];
    choice.pattern = dead ? HeadPattern::kDense : HeadPattern::kVerticalSlash;
    choice.jsd_sqrt = 0;
  }
  if (dead) return;
  auto& shared = *reinterpret_cast<ChooseShared*>(shared_memory());
  if constexpr (kSliced) {
    if (select.by_blocks) gather_slices(select, scores, shared.take);
    decide(select, scores, SpanEntries<kChooseThreads>{scores.entries, scores.s_kv}, shared);
  } else {
    HeldEntries held;
    load_slice(select, scores, 0, held);
    if (!summed_for_pattern(select, scores)) {
      sum_slice_blocks(scores, 0, select.problem.block_size, held);
    }
    if (select.by_blocks) sum_slice_masses(held, shared.take);
    __syncthreads();  // block sums
    decide(select, scores, held, shared);
  }
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_CHOOSE_CUDA_CUH_

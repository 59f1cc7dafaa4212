// The decisions of select on the device, as pattern.h makes them: bit-equal given equal scores.
// Block sums are made by one thread a block in order, masses are integers, ties are counted in
// order of index; only the sum of jsd_sqrt is in another order.
//   finish_scores  slash scores and their chunks' tails, block sums          CTA: head, 8192
//   entries choose         covers, distance, pattern, best blocks and distances      CTA: head
#ifndef FLEXPREFILL_SRC_SELECT_CHOOSE_CUDA_CUH_
#define FLEXPREFILL_SRC_SELECT_CHOOSE_CUDA_CUH_

#include "cuda/launch.cuh"
#include "select/select_device.cuh"

namespace flexprefill {

// ---- The largest entries, by a CTA --------------------------------------------------------------

// A histogram in shared memory. Masses go to two 32-bit sums, which have atomics, and from there to
// 64 bits before either can overflow: after kRound entries of a total mass below 2^11.
struct SharedHistogram {
  static constexpr int kLowBits = 19;
  static constexpr int kRound = 8192;
  uint64_t weight[Histogram::kBuckets];
  uint32_t low[Histogram::kBuckets], high[Histogram::kBuckets];
  uint32_t count[Histogram::kBuckets];

  __device__ void clear(int thread, int threads) {
    for (int i = thread; i < Histogram::kBuckets; i += threads) {
      weight[i] = 0;
      low[i] = high[i] = count[i] = 0;
    }
  }
  // Entries without mass never lie above a chosen bucket: whoever weighs by mass leaves them out.
  __device__ void add_mass(int bucket, uint64_t mass) {
    const auto upper = static_cast<uint32_t>(mass >> kLowBits);
    atomicAdd(&low[bucket], static_cast<uint32_t>(mass) & ((1u << kLowBits) - 1));
    if (upper != 0) atomicAdd(&high[bucket], upper);
    atomicAdd(&count[bucket], 1u);
  }
  // After a barrier; a bucket belongs to one thread.
  __device__ void collect(int i) {
    weight[i] += low[i] + (static_cast<uint64_t>(high[i]) << kLowBits);
    low[i] = high[i] = 0;
  }
};

template <int kThreads>
struct DescendShared {
  HistogramWalk walk;
  uint64_t weight[kThreads / 32], count[kThreads / 32];
  bool found;
};

// HistogramWalk::descend by a CTA: shared.walk goes down one level. weight(i), count(i) are those
// of bucket i. Begins and ends with a barrier.
template <int kThreads, typename WeightOf, typename CountOf>
__device__ bool descend_cta(int level, DescendShared<kThreads>& shared, const WeightOf& weight,
                            const CountOf& count) {
  const auto thread = static_cast<int>(threadIdx.x);
  const int each = HistogramWalk::buckets(level) / kThreads;
  const int top = HistogramWalk::buckets(level) - 1 - thread * each;  // of this thread's buckets
  __syncthreads();
  uint64_t own_weight = 0, own_count = 0;
  for (int i = top; i > top - each; --i) {
    own_weight += weight(i);
    own_count += count(i);
  }
  uint64_t up_weight = own_weight, up_count = own_count;  // of the warp's buckets down to its own
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const uint64_t w = __shfl_up_sync(0xffffffffu, up_weight, lanes);
    const uint64_t c = __shfl_up_sync(0xffffffffu, up_count, lanes);
    if (thread % 32 >= lanes) {
      up_weight += w;
      up_count += c;
    }
  }
  if (thread % 32 == 31) {
    shared.weight[thread / 32] = up_weight;
    shared.count[thread / 32] = up_count;
  }
  if (thread == 0) shared.found = false;
  const uint64_t left = shared.walk.limit - shared.walk.weight;
  __syncthreads();
  uint64_t above_weight = up_weight - own_weight, above_count = up_count - own_count;
  for (int warp = 0; warp < thread / 32; ++warp) {
    above_weight += shared.weight[warp];
    above_count += shared.count[warp];
  }
  // The one thread in whose buckets the running weight crosses the limit.
  if (above_weight <= left && own_weight > left - above_weight) {
    int i = top;
    while (weight(i) <= left - above_weight) {
      above_weight += weight(i);
      above_count += count(i);
      --i;
    }
    shared.walk.weight += above_weight;
    shared.walk.count += above_count;
    shared.walk.prefix |= static_cast<uint32_t>(i) << HistogramWalk::shift(level);
    shared.found = true;
  }
  __syncthreads();
  return shared.found;
}

template <int kThreads>
struct TakeShared {
  SharedHistogram histogram;
  DescendShared<kThreads> descend;
};

// take_largest of pattern.h; every thread gets the result.
template <int kThreads>
__device__ Taken take_largest_cta(const float* x, int64_t size, Weight weight, uint64_t limit,
                                  TakeShared<kThreads>& shared) {
  const auto thread = static_cast<int>(threadIdx.x);
  SharedHistogram& histogram = shared.histogram;
  __syncthreads();  // what was there may be in use
  if (thread == 0) shared.descend.walk = HistogramWalk{.limit = limit};
  for (int level = 0; level < Histogram::kLevels; ++level) {
    histogram.clear(thread, kThreads);
    __syncthreads();
    const HistogramWalk walk = shared.descend.walk;
    for (int64_t begin = 0; begin < size; begin += SharedHistogram::kRound) {
      const int64_t end =
          begin + SharedHistogram::kRound < size ? begin + SharedHistogram::kRound : size;
#pragma unroll 4
      for (int64_t e = begin + thread; e < end; e += kThreads) {
        const float value = x[e];
        const auto bits = std::bit_cast<uint32_t>(value);
        if (!walk.inside(bits, level)) continue;
        const int bucket = HistogramWalk::bucket(bits, level);
        if (weight == Weight::kCount) {
          atomicAdd(&histogram.count[bucket], 1u);
        } else if (const uint64_t mass = fixed_mass(value); mass != 0) {
          histogram.add_mass(bucket, mass);
        }
      }
      if (weight == Weight::kCount) continue;
      __syncthreads();
      for (int i = thread; i < HistogramWalk::buckets(level); i += kThreads) histogram.collect(i);
      __syncthreads();
    }
    const bool found = descend_cta<kThreads>(
        level, shared.descend,
        [&](int i) {
          return weight == Weight::kCount ? static_cast<uint64_t>(histogram.count[i])
                                          : histogram.weight[i];
        },
        [&](int i) { return static_cast<uint64_t>(histogram.count[i]); });
    if (!found) return {.count = size, .threshold = 0, .ties = size};
  }
  return shared.descend.walk.taken(weight);
}

// set(e) for the entries 1 .. n - 1 of x that are taken, by one warp: 32 entries at a time, ties in
// order of index. taken: of the entries from 1 on.
template <typename Set>
__device__ void for_each_taken_warp(const float* x, int64_t n, const Taken& taken, const Set& set) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int64_t ties = 0;
  for (int64_t first = 1; first < n; first += 32) {
    const int64_t e = first + lane;
    const uint32_t bits = e < n ? std::bit_cast<uint32_t>(x[e]) : 0;
    const uint32_t equal = __ballot_sync(0xffffffffu, e < n && bits == taken.threshold);
    const bool is_equal = (equal >> lane & 1) != 0;
    const int before = __popc(equal & ((1u << lane) - 1));
    if (e < n && (is_equal ? ties + before < taken.ties : bits > taken.threshold)) set(e);
    ties += __popc(equal);
  }
}

// ---- Scores of whole blocks ---------------------------------------------------------------------

constexpr int kFinishThreads = 256;
constexpr int kFinishEntries = 8192;  // of a CTA, a multiple of every block size
// A gap after each block, so that neighbours' sums meet no bank twice.
constexpr size_t kFinishSharedBytes = (kFinishEntries + kFinishEntries / 32) * sizeof(float);

static __global__ void __launch_bounds__(kFinishThreads)
    finish_scores_kernel(const SelectProblem select, int32_t pieces) {
  const DeviceProblem& problem = select.problem;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  auto x = static_cast<int32_t>(blockIdx.x);
  const int64_t first = static_cast<int64_t>(x % pieces) * kFinishEntries;
  x /= pieces;
  const bool of_slash = x % 2 != 0;
  const HeadView head = HeadView::of(select, x / 2);
  const SelectSequence& plan = select.sequences[head.sequence];
  const DeviceSequence& sequence = problem.sequences[head.sequence];
  if (plan.probed == 0 || first >= sequence.s_kv || select.dead[head.number] != 0) return;
  const int64_t left = sequence.s_kv - first;
  const auto n = static_cast<int32_t>(left < kFinishEntries ? left : kFinishEntries);
  const int32_t block_size = problem.block_size;
  auto* values = reinterpret_cast<float*>(shared_memory());

  float* scores = (of_slash ? select.slash : select.vertical) + plan.first_key +
                  static_cast<int64_t>(head.head) * sequence.s_kv + first;
  const float* tails =
      select.slash_tails + (plan.first_chunk + static_cast<int64_t>(head.head) * plan.chunks) * 128;
  for (int32_t e = thread; e < n; e += kFinishThreads) {
    float value = scores[e];
    if (of_slash) {
      // Diagonal u = key - probe row lies in the chunk of key u; the last 127 diagonals of a chunk
      // go on in the next one.
      const int64_t u = plan.probe_position - (first + e);
      if (u >= 0) {
        const auto next = static_cast<int32_t>(u / select.chunk_keys) + 1;
        const int64_t entry = u - static_cast<int64_t>(next) * select.chunk_keys + 127;
        if (entry >= 0 && next < plan.chunks) {
          value += tails[static_cast<int64_t>(next) * 128 + entry];
          scores[e] = value;
        }
      }
    }
    values[e + e / block_size] = value;
  }
  __syncthreads();
  float* sums = (of_slash ? select.slash_block : select.vertical_block) + plan.first_block +
                static_cast<int64_t>(head.head) * sequence.n_kv + first / block_size;
  for (int32_t b = thread; b * block_size < n; b += kFinishThreads) {
    const int32_t end = (b + 1) * block_size < n ? (b + 1) * block_size : n;
    block_sums(values + b * (block_size + 1), end - b * block_size, block_size, sums + b);
  }
}

// ---- The choice ---------------------------------------------------------------------------------

constexpr int kChooseThreads = 1024;

struct ChooseShared {
  TakeShared<kChooseThreads> take;
  double sums[kChooseThreads / 32];
  float maxima[kChooseThreads / 32];
  float mean[256];
};
static_assert(sizeof(ChooseShared::take) >= kChooseThreads * 8 * sizeof(float),
              "partial means borrow the histogram");

// Scores of one head, as choose_flex_prefill takes them: of keys or of distances.
struct HeadScores {
  const float *entries, *blocks;  // [s_kv], [n]
  int64_t s_kv, n;
};

// jsd_sqrt of pattern.h, the sum in another order.
template <int kThreads>
__device__ float jsd_sqrt_cta(const float* p, const float* q, int64_t n, double* scratch) {
  double sum = 0;
  for (int64_t j = threadIdx.x; j < n; j += kThreads) sum += jsd_term(p[j], q[j]);
  return jsd_sqrt_of_sum(sum_cta<kThreads>(sum, scratch));
}

// Step 2: how many blocks hold gamma of the entries' mass. Every thread gets the result.
__device__ inline int64_t cover_blocks_cta(const HeadScores& scores, float gamma,
                                           int64_t block_size, int64_t low, int64_t high,
                                           ChooseShared& shared) {
  const Taken taken = take_largest_cta<kChooseThreads>(scores.entries, scores.s_kv, Weight::kMass,
                                                       mass_limit(gamma, 1), shared.take);
  return cover_blocks(taken.count + 1, block_size,
                      {.gamma = gamma, .tau = 0, .min_blocks = low, .max_blocks = high});
}

// Step 5: the best `count` blocks, block 0 always among them; bits [words] in global memory,
// distance s as bit n - 1 - s.
__device__ inline void choose_blocks_cta(const HeadScores& scores, int64_t count, bool of_slash,
                                         uint64_t* bits, ChooseShared& shared) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int64_t n = scores.n;
  const auto place = [&](int64_t e) { return of_slash ? n - 1 - e : e; };
  const Taken taken = take_largest_cta<kChooseThreads>(
      scores.blocks + 1, n - 1, Weight::kCount, static_cast<uint64_t>(count - 1), shared.take);
  for (int64_t w = thread; w < (n + 63) / 64; w += kChooseThreads) {
    bits[w] = w == place(0) / 64 ? uint64_t{1} << place(0) % 64 : 0;
  }
  __syncthreads();
  if (thread >= 32) return;
  for_each_taken_warp(scores.blocks, n, taken, [&](int64_t e) {
    atomicOr(reinterpret_cast<unsigned long long*>(bits + place(e) / 64), 1ull << place(e) % 64);
  });
}

// Step 4's estimate from block means: pooled[j] = share * exp2(scale * q_mean . k_mean_j) / sum.
// False where it is NaN.
template <typename Element>
__device__ bool pool_probe(const SelectProblem& select, const HeadView& head, float* pooled,
                           ChooseShared& shared) {
  const DeviceProblem& problem = select.problem;
  const SelectSequence& plan = select.sequences[head.sequence];
  const DeviceSequence& sequence = problem.sequences[head.sequence];
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t d = problem.d_qk, lane = thread % 32;
  const std::byte* q = problem.q_row(problem.q, head.sequence, head.head, plan.probe_first_row);
  mean_rows_cta<Element, kChooseThreads>(
      plan.probe_rows, d, select.q_aligned, reinterpret_cast<float*>(&shared.take), shared.mean,
      [&](int32_t i) { return q + i * problem.q.row_stride * 2; });
  __syncthreads();
  const float* means =
      select.k_means +
      (plan.first_kv_block + static_cast<int64_t>(problem.kv_head(head.head)) * sequence.n_kv) * d;
  float highest = -INFINITY;
  for (int64_t j = thread / 32; j < sequence.n_kv; j += kChooseThreads / 32) {
    float dot = 0;
    for (int32_t c = lane; c < d; c += 32) dot = fmaf(shared.mean[c], means[j * d + c], dot);
    for (int lanes = 16; lanes > 0; lanes /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, lanes);
    const float logit = dot * select.scale_log2;
    if (lane == 0) pooled[j] = logit;
    highest = fmaxf(highest, logit);
  }
  highest = combine_cta<kChooseThreads>(highest, shared.maxima,
                                        [](float a, float b) { return fmaxf(a, b); });
  double sum = 0;
  for (int64_t j = thread; j < sequence.n_kv; j += kChooseThreads) {
    const int64_t left = sequence.s_kv - j * problem.block_size;
    const float share = left < problem.block_size
                            ? static_cast<float>(left) / static_cast<float>(problem.block_size)
                            : 1.0f;
    const float a = share * exp2_approx(pooled[j] - highest);
    pooled[j] = a;
    sum += static_cast<double>(a);
  }
  sum = sum_cta<kChooseThreads>(sum, shared.sums);
  const auto inverse = static_cast<float>(1 / sum);
  for (int64_t j = thread; j < sequence.n_kv; j += kChooseThreads) pooled[j] *= inverse;
  __syncthreads();
  return sum > 0;
}

// Two CTAs a head, one for keys and one for distances; which pattern the head has both find out.
template <typename Element>
__global__ void __launch_bounds__(kChooseThreads) choose_kernel(const SelectProblem select) {
  const HeadView head = HeadView::of(select, static_cast<int32_t>(blockIdx.x / 2));
  const bool of_slash = blockIdx.x % 2 != 0;
  const SelectSequence& plan = select.sequences[head.sequence];
  const DeviceSequence& sequence = select.problem.sequences[head.sequence];
  auto& shared = *reinterpret_cast<ChooseShared*>(shared_memory());
  const int64_t block = plan.first_block + static_cast<int64_t>(head.head) * sequence.n_kv;
  const int64_t word = plan.first_word + static_cast<int64_t>(head.head) * sequence.words_per_row;
  const int64_t key = plan.first_key + static_cast<int64_t>(head.head) * sequence.s_kv;
  float* pooled = select.pooled + 2 * block + (of_slash ? sequence.n_kv : 0);
  HeadChoice choice{};
  if (plan.probed != 0 && select.dead[head.number] == 0 &&
      (!select.by_blocks || pool_probe<Element>(select, head, pooled, shared))) {
    const HeadScores scores{
        .entries = (of_slash ? select.slash : select.vertical) + key,
        .blocks = (of_slash ? select.slash_block : select.vertical_block) + block,
        .s_kv = sequence.s_kv,
        .n = sequence.n_kv};
    const int64_t low = of_slash ? plan.slash_low : plan.vertical_low;
    const int64_t high = of_slash ? plan.slash_high : plan.vertical_high;
    int64_t count = low;
    choice.pattern = HeadPattern::kVerticalSlash;
    if (select.by_blocks) {
      choice.jsd_sqrt = jsd_sqrt_cta<kChooseThreads>(pooled, select.vertical_block + block,
                                                     sequence.n_kv, shared.sums);
      if (choice.jsd_sqrt < select.tau) {
        choice.pattern = HeadPattern::kQueryAware;
      } else {
        count =
            cover_blocks_cta(scores, select.gamma, select.problem.block_size, low, high, shared);
      }
    }
    (of_slash ? choice.slash_blocks : choice.vertical_blocks) = count;
    choose_blocks_cta(scores, count, of_slash,
                      (of_slash ? select.slash_bits : select.vertical_bits) + word, shared);
  }
  if (threadIdx.x != 0) return;
  HeadChoice& to = select.choices[head.number];
  if (of_slash) {
    to.slash_blocks = choice.slash_blocks;
    return;
  }
  to.pattern = choice.pattern;
  to.jsd_sqrt = choice.jsd_sqrt;
  to.vertical_blocks = choice.vertical_blocks;
  if (choice.pattern != HeadPattern::kQueryAware) return;
  select.map_states[head.number] = {.walk = {.limit = mass_limit(select.gamma, sequence.n_q)},
                                    .taken = {},
                                    .tickets = 0,
                                    .done = 0};
  select.map_heads[atomicAdd(select.map_count, 1)] = head.number;
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_CHOOSE_CUDA_CUH_

// What the kernels of select share: a call's plan in device memory, and sums over a CTA.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_DEVICE_CUH_
#define FLEXPREFILL_SRC_SELECT_SELECT_DEVICE_CUH_

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>

#include "cuda/device_problem.h"
#include "cuda/sm80.cuh"
#include "flexprefill/select.h"
#include "select/pattern.h"
#include "select/take_cuda.cuh"

namespace flexprefill {

constexpr int kTailEntries = 128;  // of the diagonals that a chunk of keys leaves to the one before

// Where a query-aware head's map lies. There is room for some maps at a time: the heads take turns,
// and in each turn every head of the call has its place, whether it is query-aware or not.
struct MapPlace {
  int64_t first;  // entry
  int32_t turn;

  // That of the next map but `maps`, each of `size` entries, in a room of `room` >= size entries.
  FLEXPREFILL_HOST_DEVICE MapPlace after(int64_t maps, int64_t size, int64_t room) const {
    const int64_t here = (room - first) / size;
    if (maps < here) return {first + maps * size, turn};
    const int64_t each = room / size;
    return {(maps - here) % each * size, static_cast<int32_t>(turn + 1 + (maps - here) / each)};
  }
};

// What select adds to a DeviceSequence: where its scores lie, its probe (select_rows.h) and how
// many blocks a head may keep.
struct SelectSequence {
  int64_t first_key;       // of arrays with an entry a key: head h's begin h * s_kv later
  int64_t first_block;     // of arrays with an entry a key block: head h's begin h * n_kv later
  int64_t first_kv_block;  // likewise, K/V heads
  int64_t first_chunk;     // of arrays with an entry a chunk of keys: head h's, h * chunks later
  int64_t first_word;      // of a choice's bits: head h's begin h * words_per_row later
  int64_t first_part;      // of parts of covers: head h's begin h * 2 * slices later
  MapPlace map;            // of head 0's map
  int32_t chunks, slices;
  int32_t probe_rows, probe_first_row, probe_position, probe_first_block, probe_split;
  int32_t vertical_low, vertical_high;  // blocks; FlexPrefill: the rule's budgets,
  int32_t slash_low, slash_high;        // VerticalSlash: low = high = its sizes
  int32_t probed;                       // 0: the sequence stays dense or has a window alone
};

// The block map of one query-aware head, as far as it has come (map_cuda.cuh).
struct MapState {
  HistogramWalk walk;
  Taken taken;
  uint32_t tickets;  // CTAs that are done in this kernel
  uint32_t dead;     // some row has no softmax
  uint32_t done;     // taken is known
};

// Sums of the buckets of a map's level 0, then of level 1, then of level 2.
struct MapSums {
  static constexpr int kBuckets = LevelSums::kBuckets;
  unsigned long long weight[kBuckets], count[kBuckets];
};
static_assert(MassLevel0::kBuckets <= MapSums::kBuckets);

// Level 0 of one slice of a head's scores, of keys or of distances (choose_cuda.cuh).
struct CoverPart {
  uint64_t weight[MassLevel0::kBuckets];
  uint32_t count[MassLevel0::kBuckets];
};

// What chooses a head's blocks where that is not the pattern of the whole call.
struct HeadRule {
  enum class Kind : int32_t {
    kProbe,   // the probe's scores; vertical, slash: blocks, not clamped yet
    kWindow,  // vertical: the first keys, slash: the last of each query, in tokens
    kBlocks,  // scores of single blocks; vertical: how many a row keeps (MInference)
  };
  int64_t vertical, slash;
  Kind kind;
};

// A call as the kernels of select see it. Heads are numbered sequence * h_q + query head.
struct SelectProblem {
  DeviceProblem problem;
  const SelectSequence* sequences;  // [b]
  int32_t chunk_keys;               // keys of a CTA of the probe
  int32_t max_chunks;
  float scale_log2;           // softmax scale in units of log2
  bool q_aligned, k_aligned;  // rows begin on 16 bytes
  bool by_blocks;             // FlexPrefill: needs block means
  float gamma, tau;
  int64_t global_window, local_window;  // StreamingLlm: local_window >= 1; otherwise 0
  HeadRule::Kind kind;                  // of all heads, if there are no rules
  const HeadRule* rules;                // [h_q] or nullptr
  uint8_t* not_finite;  // [heads] of Kind::kBlocks: scores met a NaN, the head stays dense

  float2* chunk_stats;      // [heads, chunks, 128]: max (units of log2) and sum of each probe row
  float* slash_tails;       // [heads, chunks, kTailEntries]: for the chunk before
  uint8_t* dead;            // [heads]: the probe met a NaN
  float *vertical, *slash;  // [heads, s_kv]
  float *vertical_block, *slash_block;  // [heads, n_kv]
  float* pooled;        // [heads, n_kv]: logits (units of log2), then the estimate from block means
  float* block_mass;    // [heads, 2, n_kv], of the probe's two query blocks; nullptr: not asked
  float* k_means;       // [K/V heads, n_kv, d]
  CoverPart* parts;     // [heads, keys or distances, slices]; nullptr: one slice everywhere
  uint32_t* tickets;    // [heads, 2]: of BlockCover; CTAs that are done
  HeadChoice* choices;  // [heads]
  uint64_t *vertical_bits, *slash_bits;  // [heads, words]

  // Query-aware heads.
  int32_t* map_heads;    // [heads]: their numbers, in no order
  int32_t* map_count;    // [1]
  MapState* map_states;  // [heads]
  MapSums* map_sums;     // [heads]
  float* maps;           // [map_room]: pattern.h has a map's layout
  int64_t map_room;
  bool maps_in_rows;  // all have room at once: rows_kernel reads what they keep

  uint64_t* bits;
  HeadAudit* audit;  // [heads] or nullptr

  __device__ HeadRule::Kind kind_of(int32_t head) const {
    return rules == nullptr ? kind : rules[head].kind;
  }
  // Whether the probe looks at the head: an audit looks at all of them.
  __device__ bool asks_probe(int32_t head) const {
    return audit != nullptr || kind_of(head) == HeadRule::Kind::kProbe;
  }
  __device__ void set_not_finite(int64_t number) const { store_relaxed(not_finite + number, 1); }
};

// Whether every row begins on 16 bytes.
inline bool rows_on_16_bytes(const DeviceTensor& tensor) {
  const auto even = [](int64_t stride) { return stride % 8 == 0; };  // elements
  return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && even(tensor.sequence_stride) &&
         even(tensor.row_stride) && even(tensor.head_stride);
}

inline uint32_t grid_of(int64_t ctas) {
  if (ctas > std::numeric_limits<int32_t>::max()) {
    throw Error(ErrorCode::kUnsupported,
                "select: expected at most 2^31 - 1 CTAs, got " + std::to_string(ctas));
  }
  return static_cast<uint32_t>(ctas);
}

// Where a head's entries begin.
struct HeadView {
  int32_t sequence, head, number;

  __device__ static HeadView of(const SelectProblem& select, int32_t number) {
    return {number / select.problem.h_q, number % select.problem.h_q, number};
  }
};

// Causal blocks of one head.
FLEXPREFILL_HOST_DEVICE_INLINE int64_t causal_blocks_of(const DeviceSequence& sequence) {
  const int64_t n_q = sequence.n_q;
  return n_q * sequence.first_q_block + n_q * (n_q + 1) / 2;
}

template <typename T>
struct Operand;
template <>
struct Operand<__nv_bfloat16> {
  __device__ static float low(uint32_t pair) { return std::bit_cast<float>(pair << 16); }
  __device__ static float high(uint32_t pair) { return std::bit_cast<float>(pair & 0xffff0000u); }
};
template <>
struct Operand<__half> {
  __device__ static float low(uint32_t pair) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(pair)));
  }
  __device__ static float high(uint32_t pair) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(pair >> 16)));
  }
};

// Eight 16-bit elements; `aligned`: to 16 bytes.
__device__ inline uint4 load_eight(const std::byte* from, bool aligned) {
  if (aligned) return *reinterpret_cast<const uint4*>(from);
  const auto* elements = reinterpret_cast<const uint16_t*>(from);
  const auto pair = [&](int i) {
    return static_cast<uint32_t>(elements[i]) | static_cast<uint32_t>(elements[i + 1]) << 16;
  };
  return {pair(0), pair(2), pair(4), pair(6)};
}

template <typename Element>
__device__ inline void add_eight(const uint4& elements, float (&sums)[8]) {
  const uint32_t pairs[4] = {elements.x, elements.y, elements.z, elements.w};
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    sums[2 * e] += Operand<Element>::low(pairs[e]);
    sums[2 * e + 1] += Operand<Element>::high(pairs[e]);
  }
}

// Adds the eight elements at row(i) for i = first, first + step, ... below n. kAtOnce loads are
// under way; a branch on alignment in the loop would keep them apart.
template <typename Element, int kAtOnce, typename Row>
__device__ inline void sum_eights(int32_t first, int32_t n, int32_t step, bool aligned,
                                  const Row& row, float (&sums)[8]) {
  if (!aligned) {
#pragma unroll 1
    for (int32_t i = first; i < n; i += step) add_eight<Element>(load_eight(row(i), false), sums);
    return;
  }
#pragma unroll 1
  for (int32_t i = first; i < n; i += kAtOnce * step) {
    uint4 some[kAtOnce];
#pragma unroll
    for (int l = 0; l < kAtOnce; ++l) {
      const int32_t r = i + l * step;
      some[l] = r < n ? *reinterpret_cast<const uint4*>(row(r)) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (const uint4& eight : some) add_eight<Element>(eight, sums);  // a 0 more changes no sum
  }
}

// Counts this CTA as done with its part of a common work; true in the last of `ctas`,
// which sees what the others wrote, by loads past L1. `flag` in shared memory. Nobody waits.
__device__ inline bool is_last_cta(uint32_t* tickets, uint32_t ctas, uint32_t& flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    flag = atomicAdd(tickets, 1u) == ctas - 1 ? 1 : 0;
    if (flag != 0) *tickets = 0;
  }
  __syncthreads();
  __threadfence();
  return flag != 0;
}

// A sum in a fixed order over a CTA of kThreads; `scratch` [kThreads / 32 + 1], every thread gets
// the result. T is float, double or an integer.
template <int kThreads, typename T, typename Combine>
__device__ T combine_cta(T value, T* scratch, const Combine& combine) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  }
  __syncthreads();  // scratch may be in use
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  T result = scratch[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) result = combine(result, scratch[warp]);
  return result;
}
template <int kThreads, typename T>
__device__ T sum_cta(T value, T* scratch) {
  return combine_cta<kThreads>(value, scratch, [](T a, T b) { return a + b; });
}

// mean[c] of the rows row(0) .. row(n - 1) of d elements, over a CTA of kThreads (>= 64); partial
// [kThreads * 8] in shared memory. kAtOnce: as in sum_eights. Ends without a barrier after writing
// `mean`.
template <typename Element, int kThreads, int kAtOnce = 8, typename Row>
__device__ void mean_rows_cta(int32_t n, int32_t d, bool aligned, float* partial, float* mean,
                              const Row& row) {
  const int32_t pieces = d / 8;  // of eight elements, at most 32
  const int32_t groups = kThreads / pieces < 64 ? kThreads / pieces : 64;
  const int32_t piece = static_cast<int32_t>(threadIdx.x) % pieces;
  const int32_t group = static_cast<int32_t>(threadIdx.x) / pieces;
  float sums[8] = {};
  if (group < groups) {
    sum_eights<Element, kAtOnce>(
        group, n, groups, aligned, [&](int32_t i) { return row(i) + piece * 16; }, sums);
#pragma unroll
    for (int e = 0; e < 8; ++e) partial[group * d + piece * 8 + e] = sums[e];
  }
  __syncthreads();
  const float inverse = 1.0f / static_cast<float>(n);
  for (int32_t c = static_cast<int32_t>(threadIdx.x); c < d; c += kThreads) {
    float sum = 0;
    for (int32_t g = 0; g < groups; ++g) sum += partial[g * d + c];
    mean[c] = sum * inverse;
  }
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_DEVICE_CUH_

// Step 6 of FlexPrefill on the device: the block map of each query-aware head, and the smallest set
// of its blocks that covers gamma. Which heads these are is known on the device alone: choose lists
// them, and every kernel here is a fixed grid that walks over the list.
//   map_rows    rows of a map from block means, their softmax, level 0 of the cover; the last
//               CTA of a head descends, and where maps are small to the end
//   map_level   levels 1 and 2 of large maps                               items: 16384 entries
//   map_keep    the kept blocks as bits of the index, where maps take turns
// "Last" is who takes the last ticket: nobody waits. Small maps have a place of their own and are
// made beside choose. Large ones take the place of the scores, which are not read any more, as many
// at a time as there is room for (MapPlace). Where there is room for all, `rows` (rows_cuda.cuh)
// reads what they keep.
#ifndef FLEXPREFILL_SRC_SELECT_MAP_CUDA_CUH_
#define FLEXPREFILL_SRC_SELECT_MAP_CUDA_CUH_

#include <cfloat>

#include "cuda/launch.cuh"
#include "select/select_device.cuh"
#include "select/take_cuda.cuh"

namespace flexprefill {

constexpr int kMapThreads = 512;
constexpr int kMapRows = 8;  // of an item of map_rows, two warps each
constexpr int kRowThreads = kMapThreads / kMapRows;
constexpr int kMapKeys = 64;   // means of key blocks in shared memory at a time
constexpr int kMapDepth = 64;  // columns of them
constexpr int kMapPitch = kMapDepth + 4;
// Up to so many key blocks one CTA finds a head's threshold: its sweeps cost less than the
// launches of more kernels.
constexpr int kSmallMap = 256;
constexpr int kMapPiece = 16384;  // entries of an item of map_level
constexpr int kKeepThreads = 256;
constexpr int kMapKeepRows = 16;  // rows of a CTA that says what is kept

struct MapShared {
  float q[kMapRows][256];
  float k[kMapKeys * kMapPitch];  // the means' partial sums borrow it
  TakeShared<kMapThreads> take;
  float max[kMapThreads / 32], sum[kMapThreads / 32];
  uint32_t last;
};
static_assert(kMapKeys * kMapPitch >= kMapThreads * 8);

// The map of one head.
struct HeadMap {
  HeadView head;
  int32_t n_q, n_kv, first_q_block, words;
  int64_t size;
  float* map;
  int32_t turn;
  uint64_t* bits;  // of row 0 of the index

  __device__ HeadMap(const SelectProblem& select, int32_t number)
      : head(HeadView::of(select, number)) {
    const DeviceSequence& sequence = select.problem.sequences[head.sequence];
    n_q = sequence.n_q;
    n_kv = sequence.n_kv;
    first_q_block = sequence.first_q_block;
    words = sequence.words_per_row;
    size = causal_blocks_of(sequence);
    const MapPlace place =
        select.sequences[head.sequence].map.after(head.head, size, select.map_room);
    map = select.maps + place.first;
    turn = place.turn;
    bits = select.bits + sequence.first_word + static_cast<int64_t>(head.head) * n_q * words;
  }
  __device__ int32_t row_keys(int32_t r) const { return first_q_block + r + 1; }
  // The first entry of row r.
  __device__ int64_t row_start(int64_t r) const {
    return r * (first_q_block + 1) + r * (r - 1) / 2;
  }
};

// ---- Rows of a map
// ---------------------------------------------------------------------------------

// The mean of query block r, if there is one, by the row's kRowThreads, in q [d]. partial
// [kRowThreads * 8]. All threads of the block together.
template <typename Element>
__device__ void mean_of_block(const SelectProblem& select, const HeadMap& map, int32_t r,
                              float* partial, float* q) {
  const DeviceProblem& problem = select.problem;
  const DeviceSequence& sequence = problem.sequences[map.head.sequence];
  const int32_t d = problem.d_qk;
  const int32_t thread = static_cast<int32_t>(threadIdx.x) % kRowThreads;
  const int64_t position =
      static_cast<int64_t>(map.first_q_block + r) * problem.block_size - sequence.first_position();
  const auto begin = static_cast<int32_t>(position > 0 ? position : 0);
  const auto end = static_cast<int32_t>(
      position + problem.block_size < sequence.s_q ? position + problem.block_size : sequence.s_q);
  const int32_t pieces = d / 8,
                groups = kRowThreads / pieces;  // pieces of eight elements, at most 32
  const int32_t piece = thread % pieces, group = thread / pieces;
  const std::byte* row =
      problem.q_row(problem.q, map.head.sequence, map.head.head, begin) + piece * 16;
  const int64_t stride = problem.q.row_stride * 2;
  float sums[8] = {};
  const int32_t rows = r < map.n_q && group < groups ? end - begin : 0;
  sum_eights<Element, 16>(  // queries come from memory
      group, rows, groups, select.q_aligned, [&](int32_t i) { return row + i * stride; }, sums);
#pragma unroll
  for (int e = 0; e < 8; ++e) partial[thread * 8 + e] = sums[e];
  __syncthreads();
  const float inverse = 1.0f / static_cast<float>(end - begin);
  for (int32_t c = thread; c < d && r < map.n_q; c += kRowThreads) {
    float sum = 0;
    for (int32_t g = 0; g < groups; ++g) sum += partial[g * d + c];
    q[c] = sum * inverse;
  }
}

// Running max (units of log2) and sum of exp2(x - max).
struct RunningSoftmax {
  float max = -FLT_MAX, sum = 0;

  __device__ void add(float x, float share) {
    const float highest = fmaxf(max, x);
    sum = sum * exp2_approx(max - highest) + share * exp2_approx(x - highest);
    max = highest;
  }
  // Over the warp.
  __device__ void combine() {
    float highest = max;
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, lanes));
    }
    sum *= exp2_approx(max - highest);
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    }
    max = highest;
  }
};

// Means of 64 key blocks by 64 columns on their way to shared memory.
struct MapTile {
  static constexpr int kEach = kMapKeys * kMapDepth / 4 / kMapThreads;
  float4 x[kEach];

  // Blocks [first, ..) and columns [column, ..); 0 beyond n blocks or d columns.
  __device__ void load(const float* k_means, int32_t first, int32_t n, int32_t column, int32_t d) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int32_t e = static_cast<int32_t>(threadIdx.x) + i * kMapThreads;
      const int32_t key = first + e / (kMapDepth / 4), c = column + e % (kMapDepth / 4) * 4;
      x[i] = key < n && c < d
                 ? *reinterpret_cast<const float4*>(k_means + static_cast<int64_t>(key) * d + c)
                 : float4{0, 0, 0, 0};
    }
  }
  __device__ void store(float* to) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int32_t e = static_cast<int32_t>(threadIdx.x) + i * kMapThreads;
      *reinterpret_cast<float4*>(&to[e / (kMapDepth / 4) * kMapPitch + e % (kMapDepth / 4) * 4]) =
          x[i];
    }
  }
};

// scores of the row of `keys` key blocks of these two warps: scale * q_mean . k_mean in units of
// log2, to row[0 ..], a lane every 64th. All threads of the block together, for the most_keys of
// the longest row; the next tile of means is under way while one is multiplied.
__device__ inline RunningSoftmax score_row(const SelectProblem& select, const HeadMap& map,
                                           const float* k_means, int32_t most_keys, int32_t keys,
                                           float share_of_last, MapShared& shared, float* row) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t d = select.problem.d_qk;
  const float* q = shared.q[thread / kRowThreads];
  RunningSoftmax softmax;
  MapTile tile;
  tile.load(k_means, 0, map.n_kv, 0, d);
  float dot = 0;
  for (int32_t first = 0, column = 0; first < most_keys;) {
    __syncthreads();
    tile.store(shared.k);
    __syncthreads();
    const int32_t columns = min(d - column, kMapDepth), at = column;
    const int32_t key = first + thread % kRowThreads;
    column += kMapDepth;
    const bool last = column >= d;  // of these keys
    if (last) {
      column = 0;
      first += kMapKeys;
    }
    if (first < most_keys) tile.load(k_means, first, map.n_kv, column, d);
#pragma unroll 4
    for (int32_t c = 0; c < columns; c += 4) {
      const float4 a = *reinterpret_cast<const float4*>(&q[at + c]);
      const float4 b =
          *reinterpret_cast<const float4*>(&shared.k[thread % kRowThreads * kMapPitch + c]);
      dot = fmaf(a.x, b.x, dot);
      dot = fmaf(a.y, b.y, dot);
      dot = fmaf(a.z, b.z, dot);
      dot = fmaf(a.w, b.w, dot);
    }
    if (!last) continue;
    if (key < keys) {
      const float score = dot * select.scale_log2;
      row[key] = score;
      softmax.add(score, key == map.n_kv - 1 ? share_of_last : 1.0f);
    }
    dot = 0;
  }
  softmax.combine();
  // The row's two warps.
  if (thread % 32 == 0) {
    shared.max[thread / 32] = softmax.max;
    shared.sum[thread / 32] = softmax.sum;
  }
  __syncthreads();
  const int32_t other = thread / 32 ^ 1;
  const float highest = fmaxf(softmax.max, shared.max[other]);
  softmax.sum = softmax.sum * exp2_approx(softmax.max - highest) +
                shared.sum[other] * exp2_approx(shared.max[other] - highest);
  softmax.max = highest;
  return softmax;
}

// The share of a whole block that the last key block is.
__device__ inline float last_share(const SelectProblem& select, const HeadMap& map) {
  const int32_t block_size = select.problem.block_size;
  const int32_t s_kv = select.problem.sequences[map.head.sequence].s_kv;
  return static_cast<float>(s_kv - (map.n_kv - 1) * block_size) / static_cast<float>(block_size);
}

// kMapRows rows of the map from row `first` on, and what they add to level 0.
template <typename Element>
__device__ void make_map_rows(const SelectProblem& select, const HeadMap& map, int32_t first,
                              MapShared& shared) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t lane = thread % kRowThreads, r = first + thread / kRowThreads;
  const int32_t keys = r < map.n_q ? map.row_keys(r) : 0;
  const int32_t most_keys = map.row_keys(min(first + kMapRows, map.n_q) - 1);
  const float share_of_last = last_share(select, map);
  const float* k_means =
      select.k_means + (select.sequences[map.head.sequence].first_kv_block +
                        static_cast<int64_t>(select.problem.kv_head(map.head.head)) * map.n_kv) *
                           select.problem.d_qk;
  float* row = map.map + map.row_start(r);
  __syncthreads();  // of the item before
  mean_of_block<Element>(select, map, r, shared.k + thread / kRowThreads * kRowThreads * 8,
                         shared.q[thread / kRowThreads]);
  const RunningSoftmax softmax =
      score_row(select, map, k_means, most_keys, keys, share_of_last, shared, row);
  const bool dead = keys > 0 && !(softmax.sum > 0);
  const float offset = softmax.max + log2f(softmax.sum);
  MapState& state = select.map_states[map.head.number];
  if (dead && lane == 0) state.dead = 1;
  MapSums& sums = select.map_sums[map.head.number];
  for (int32_t begin = 0; begin < most_keys; begin += MassLevel0::kRound * kRowThreads) {
    shared.take.level0.clear();
    __syncthreads();
    const int32_t end = dead ? 0 : min(begin + MassLevel0::kRound * kRowThreads, keys);
    // Each lane meets the scores that it wrote.
    constexpr int kAtOnce = 8;
    for (int32_t key = begin + lane; key < end; key += kAtOnce * kRowThreads) {
      float some[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        some[i] = key + kRowThreads * i < end ? row[key + kRowThreads * i] : 0;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (key + kRowThreads * i >= end) continue;
        const float p = exp2_approx(some[i] - offset);
        const float mass = key + kRowThreads * i == map.n_kv - 1 ? share_of_last * p : p;
        row[key + kRowThreads * i] = mass;
        shared.take.level0.own().add(mass);
      }
    }
    __syncthreads();
    shared.take.for_own_buckets([&](int i, BucketSum&) {
      const BucketSum sum = shared.take.level0.sum(i);
      if (sum.count == 0) return;
      atomicAdd(&sums.weight[i], static_cast<unsigned long long>(sum.weight));
      atomicAdd(&sums.count[i], static_cast<unsigned long long>(sum.count));
    });
    __syncthreads();
  }
}

// ---- What is kept
// ------------------------------------------------------------------------------------

struct KeepShared {
  int64_t sums[kKeepThreads / 32];
  int32_t row_ties[kMapKeepRows];
};

// Ties in rows [first, end), at most kMapKeepRows, to shared.row_ties; returns those before.
__device__ inline int64_t count_map_ties(const HeadMap& map, const Taken& taken, int32_t first,
                                         int32_t end, KeepShared& shared) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const auto equal = [&](float x) { return std::bit_cast<uint32_t>(x) == taken.threshold ? 1 : 0; };
  const int64_t entries = map.row_start(first);
  int64_t before = 0;
  SpanEntries<kKeepThreads>{map.map, entries}.visit(0, entries,
                                                    [&](float x) { before += equal(x); });
  before = sum_cta<kKeepThreads>(before, shared.sums);
  for (int32_t r = first + thread / 32; r < end; r += kKeepThreads / 32) {
    const float* row = map.map + map.row_start(r);
    int32_t ties = 0;
    for (int32_t j = thread % 32; j < map.row_keys(r); j += 32) ties += equal(__ldcg(row + j));
    ties = __reduce_add_sync(0xffffffffu, ties);
    if (thread % 32 == 0) shared.row_ties[r - first] = ties;
  }
  __syncthreads();
  return before;
}

// Rows [first, end) where only some of the entries that equal the threshold are kept, which is
// rare: a warp a row, from word to word.
template <typename Store>
__device__ void keep_tied_rows(const HeadMap& map, const Taken& taken, int32_t first, int32_t end,
                               KeepShared& shared, const Store& store) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t lane = thread % 32;
  const int64_t before = count_map_ties(map, taken, first, end, shared);
  for (int32_t r = first + thread / 32; r < end; r += kKeepThreads / 32) {
    const float* row = map.map + map.row_start(r);
    const int32_t keys = map.row_keys(r);
    int64_t rank = before;  // of the next entry that equals the threshold
    for (int32_t i = 0; i < r - first; ++i) rank += shared.row_ties[i];
    for (int32_t w = 0; w < map.words; ++w) {
      uint32_t halves[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t j = w * 64 + half * 32 + lane;
        const uint32_t x = j < keys ? std::bit_cast<uint32_t>(__ldcg(row + j)) : 0;
        const bool equal = j < keys && x == taken.threshold;
        const uint32_t all = __ballot_sync(0xffffffffu, equal ? 1 : 0);
        const bool kept = (j < keys && x > taken.threshold) ||
                          (equal && rank + __popc(all & ((1u << lane) - 1)) < taken.ties);
        rank += __popc(all);
        halves[half] = __ballot_sync(0xffffffffu, kept ? 1 : 0);
      }
      if (lane == 0) store(r, w, halves[0] | static_cast<uint64_t>(halves[1]) << 32);
    }
  }
}

// What the map keeps of rows [first, end), at most kMapKeepRows of them, by kKeepThreads:
// store(r, w, word w of row r). A warp has the loads of kAtOnce words under way: with one after the
// other, rows were a chain of waits for L2 (18 us at 16k tokens, 100 at 32k).
template <typename Store>
__device__ void keep_map_rows(const HeadMap& map, const Taken& taken, int32_t first, int32_t end,
                              KeepShared& shared, const Store& store) {
  constexpr int kAtOnce = 4, kWarps = kKeepThreads / 32;
  const bool all = taken.count == map.size;
  if (taken.ties > 0 && !all) {
    return keep_tied_rows(map, taken, first, end, shared, store);
  }
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t lane = thread % 32, items = (end - first) * map.words;
  for (int32_t begin = thread / 32; begin < items; begin += kAtOnce * kWarps) {
    float x[kAtOnce][2];
    int32_t left[kAtOnce];  // keys from this lane's first on
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t item = begin + i * kWarps, r = first + item / map.words;
      const int32_t j = item % map.words * 64 + lane;
      left[i] = item < items ? map.row_keys(r) - j : 0;
      const float* from = map.map + map.row_start(r) + j;
      x[i][0] = left[i] > 0 ? __ldcg(from) : 0.0f;
      x[i][1] = left[i] > 32 ? __ldcg(from + 32) : 0.0f;
    }
    uint64_t own = 0;  // lane i's is word i
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const auto kept = [&](int half) {
        const bool more = all || std::bit_cast<uint32_t>(x[i][half]) > taken.threshold;
        return __ballot_sync(0xffffffffu, left[i] > 32 * half && more ? 1 : 0);
      };
      const uint64_t word = kept(0) | static_cast<uint64_t>(kept(1)) << 32;
      if (lane == i) own = word;
    }
    const int32_t item = begin + lane * kWarps;
    if (lane < kAtOnce && item < items) store(first + item / map.words, item % map.words, own);
  }
}

// What is taken after `level`, as far as it is known: the one bucket that does not fit may hold a
// single entry, which then stays out.
template <int kThreads>
__device__ bool lone_entry_left(const DescendShared<kThreads>& at, int level, Taken& taken) {
  if (at.inside != 1) return false;
  const uint32_t below = (1u << HistogramWalk::shift(level)) - 1;
  taken = {
      .count = static_cast<int64_t>(at.walk.count), .threshold = at.walk.prefix | below, .ties = 0};
  return true;
}

// The last CTA of a head, after level 0: what is taken where maps are small, or the walk.
__device__ inline void finish_map_level0(const SelectProblem& select, const HeadMap& map,
                                         bool small, MapShared& shared) {
  MapState& state = select.map_states[map.head.number];
  MapSums& sums = select.map_sums[map.head.number];
  if (__ldcg(&state.dead) != 0) {  // a row has no softmax: the head stays dense
    if (threadIdx.x == 0) select.choices[map.head.number].pattern = HeadPattern::kDense;
    return;
  }
  shared.take.for_own_buckets([&](int i, BucketSum& sum) {
    sum = {__ldcg(&sums.weight[i]), __ldcg(&sums.count[i])};
    sums.weight[i] = sums.count[i] = 0;
  });
  const DescendShared<kMapThreads>& at = shared.take.descend;
  Taken taken{.count = map.size, .threshold = 0, .ties = map.size};  // all fit
  bool done = !descend_level0(mass_limit(select.gamma, map.n_q), shared.take) ||
              lone_entry_left(at, 0, taken);
  const SpanEntries<kMapThreads> entries{map.map, map.size};
#pragma unroll 1
  for (int level = 1; small && !done && level < Histogram::kLevels; ++level) {
    descend_entries<kMapThreads>(entries, map.size, level, shared.take);
    done = lone_entry_left(at, level, taken);
  }
  if (small && !done) taken = at.walk.taken(Weight::kMass);
  if (threadIdx.x != 0) return;
  state.walk = at.walk;
  state.taken = taken;
  state.done = done ? 1 : 0;
}

// ---- Kernels
// -----------------------------------------------------------------------------------------
//
// Each for the maps of one turn.

// `beside`: beside choose_kernel, where maps have a place of their own.
template <typename Element>
__global__ void __launch_bounds__(kMapThreads, 1)
    map_rows_kernel(const SelectProblem select, int32_t turn, int32_t max_strips, bool small,
                    bool beside) {
  if (!beside) await_previous_kernel();
  start_next_kernel();
  auto& shared = *reinterpret_cast<MapShared*>(shared_memory());
  const int64_t heads = *select.map_count;
  for (int64_t item = blockIdx.x; item < heads * max_strips; item += gridDim.x) {
    // Long rows first.
    const auto strip = static_cast<int32_t>(max_strips - 1 - item / heads);
    const HeadMap map(select, select.map_heads[item % heads]);
    const int32_t strips = (map.n_q + kMapRows - 1) / kMapRows;
    if (map.turn != turn || strip >= strips) continue;
    make_map_rows<Element>(select, map, strip * kMapRows, shared);
    if (is_last_cta(&select.map_states[map.head.number].tickets, static_cast<uint32_t>(strips),
                    shared.last)) {
      finish_map_level0(select, map, small, shared);
    }
  }
  if (beside) await_kernel_beside();
}

// Whether a listed head of this turn is still to be worked on.
__device__ inline bool is_open(const SelectProblem& select, const HeadMap& map, int32_t turn) {
  return map.turn == turn && select.choices[map.head.number].pattern == HeadPattern::kQueryAware;
}

static __global__ void __launch_bounds__(kMapThreads)
    map_level_kernel(const SelectProblem select, int32_t turn, int32_t level, int32_t max_pieces) {
  await_previous_kernel();
  start_next_kernel();
  auto& shared = *reinterpret_cast<MapShared*>(shared_memory());
  LevelSums& level_sums = shared.take.level;
  const int64_t heads = *select.map_count;
  for (int64_t item = blockIdx.x; item < heads * max_pieces; item += gridDim.x) {
    const HeadMap map(select, select.map_heads[item % heads]);
    MapState& state = select.map_states[map.head.number];
    const int64_t first = item / heads * kMapPiece;
    if (!is_open(select, map, turn) || state.done != 0 || first >= map.size) continue;
    const HistogramWalk walk = state.walk;
    MapSums& sums = select.map_sums[map.head.number];
    const int64_t entries = map.size - first < kMapPiece ? map.size - first : kMapPiece;
    __syncthreads();  // of the item before
    sum_level<kMapThreads>(SpanEntries<kMapThreads>{map.map + first, entries}, entries, level, walk,
                           level_sums);
    for (int i = static_cast<int>(threadIdx.x); i < LevelSums::kBuckets; i += kMapThreads) {
      const BucketSum sum = level_sums.sum(i, walk);
      if (sum.count == 0) continue;
      atomicAdd(&sums.weight[i], static_cast<unsigned long long>(sum.weight));
      atomicAdd(&sums.count[i], static_cast<unsigned long long>(sum.count));
    }
    const auto pieces = static_cast<uint32_t>((map.size + kMapPiece - 1) / kMapPiece);
    if (!is_last_cta(&state.tickets, pieces, shared.last)) continue;
    if (threadIdx.x == 0) shared.take.descend.walk = walk;
    descend_cta<kMapThreads, LevelSums::kBuckets>(level, 0, shared.take.descend, [&](int i) {
      const BucketSum sum{__ldcg(&sums.weight[i]), __ldcg(&sums.count[i])};
      sums.weight[i] = sums.count[i] = 0;
      return sum;
    });
    if (threadIdx.x != 0) continue;
    const DescendShared<kMapThreads>& at = shared.take.descend;
    Taken taken;
    const bool lone = lone_entry_left(at, level, taken);
    if (!lone && level == Histogram::kLevels - 1) taken = at.walk.taken(Weight::kMass);
    state.walk = at.walk;
    state.taken = taken;
    state.done = lone ? 1 : 0;
  }
}

static __global__ void __launch_bounds__(kKeepThreads)
    map_keep_kernel(const SelectProblem select, int32_t turn, int32_t max_tiles) {
  await_previous_kernel();
  start_next_kernel();
  auto& shared = *reinterpret_cast<KeepShared*>(shared_memory());
  const int64_t heads = *select.map_count;
  for (int64_t item = blockIdx.x; item < heads * max_tiles; item += gridDim.x) {
    const HeadMap map(select, select.map_heads[item % heads]);
    const auto first = static_cast<int32_t>(item / heads * kMapKeepRows);
    if (!is_open(select, map, turn) || first >= map.n_q) continue;
    keep_map_rows(map, select.map_states[map.head.number].taken, first,
                  min(first + kMapKeepRows, map.n_q), shared,
                  [&](int32_t r, int32_t w, uint64_t word) {
                    map.bits[static_cast<int64_t>(r) * map.words + w] = word;
                  });
    __syncthreads();  // shared is free for the next item
  }
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_MAP_CUDA_CUH_

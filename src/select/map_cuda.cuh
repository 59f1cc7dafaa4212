// Step 6 of FlexPrefill on the device: the block map of each query-aware head, and the smallest set
// of its blocks that covers gamma. Which heads these are is known on the device alone: choose lists
// them, and every kernel here is a fixed grid that walks over the list's tiles of 64 query blocks
// by 64 key blocks. No map is in memory: each sweep computes the scores anew, by the same
// instructions of one kernel, so that all sweeps see the same bits.
//   map_means    means of the query blocks, an empty histogram                CTA: query block
//   map_sweep    kStats          row max and sum of each tile; the last tile of a head makes the
//                                rows' softmax from them
//                kLevel0 .. 2    histogram of the masses; the last tile of a head descends
//                kTies           scores that equal the threshold in each row of a tile
//                kKeep           adds the kept blocks to the rows, which have to be written
// "Last" is who takes the last ticket: nobody waits.
#ifndef FLEXPREFILL_SRC_SELECT_MAP_CUDA_CUH_
#define FLEXPREFILL_SRC_SELECT_MAP_CUDA_CUH_

#include <cfloat>

#include "select/choose_cuda.cuh"
#include "select/select_device.cuh"

namespace flexprefill {

constexpr int kMapThreads = 256;
constexpr int kMapTile = 64;   // query blocks and key blocks: a tile's row is a word of the bits
constexpr int kMapDepth = 32;  // columns in shared memory at a time
constexpr int kMapPitch = kMapDepth + 4;

enum class MapSweep : int32_t { kStats, kLevel0, kLevel1, kLevel2, kTies, kKeep };

struct MapShared {
  union {
    struct {
      float q[kMapTile * kMapPitch], k[kMapTile * kMapPitch];
    } operands;
    SharedHistogram histogram;
    struct {
      uint32_t above[2 * kMapTile],
          equal[2 * kMapTile];   // halves of words: bits of the tile's rows
      int64_t before[kMapTile];  // ties before the tile, by row
      int32_t of_row[kMapTile];  // ties of the row
    } keep;
  };
  DescendShared<kMapThreads> descend;
  int64_t sums[kMapThreads / 32];
  uint32_t last;
};

struct MapTile {
  HeadView head;
  int32_t q_block;  // first, counted from the sequence's first query block
  int32_t k_word;   // 64 key blocks
  int32_t row_tiles, words;
  bool any;       // within the head's map
  bool diagonal;  // not wholly after the diagonal

  __device__ MapTile(const SelectProblem& select, int64_t item, int32_t max_row_tiles,
                     int32_t max_words) {
    const int64_t tiles = static_cast<int64_t>(max_row_tiles) * max_words;
    head = HeadView::of(select, select.map_heads[item / tiles]);
    const auto tile = static_cast<int32_t>(item % tiles);
    const DeviceSequence& sequence = select.problem.sequences[head.sequence];
    q_block = tile / max_words * kMapTile;
    k_word = tile % max_words;
    row_tiles = (sequence.n_q + kMapTile - 1) / kMapTile;
    words = sequence.words_per_row;
    any = q_block < sequence.n_q && k_word < words;
    const int32_t last = q_block + kMapTile < sequence.n_q ? q_block + kMapTile : sequence.n_q;
    diagonal = k_word * kMapTile < sequence.first_q_block + last;
  }
  // Of the head's row r of the index, and of its word w in the bits.
  __device__ int64_t index_row(const DeviceSequence& sequence, int32_t r) const {
    return sequence.first_row + static_cast<int64_t>(head.head) * sequence.n_q + r;
  }
  __device__ int64_t word(const DeviceSequence& sequence, int32_t r, int32_t w) const {
    return sequence.first_word +
           (static_cast<int64_t>(head.head) * sequence.n_q + r) * sequence.words_per_row + w;
  }
};

template <typename Element>
__global__ void __launch_bounds__(kMapThreads) map_means_kernel(const SelectProblem select) {
  const DeviceProblem& problem = select.problem;
  auto* partial = reinterpret_cast<float*>(shared_memory());
  const int64_t items = static_cast<int64_t>(*select.map_count) * problem.max_n_q;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const HeadView head = HeadView::of(select, select.map_heads[item / problem.max_n_q]);
    const DeviceSequence& sequence = problem.sequences[head.sequence];
    const auto r = static_cast<int32_t>(item % problem.max_n_q);
    if (r >= sequence.n_q) continue;
    const int64_t position = static_cast<int64_t>(sequence.first_q_block + r) * problem.block_size -
                             sequence.first_position();
    const int64_t begin = position > 0 ? position : 0;
    const int64_t end =
        position + problem.block_size < sequence.s_q ? position + problem.block_size : sequence.s_q;
    if (r == 0) {
      Histogram& histogram = select.histograms[head.number];
      for (int i = static_cast<int>(threadIdx.x); i < Histogram::kBuckets; i += kMapThreads) {
        histogram.weight[i] = histogram.count[i] = 0;
      }
    }
    const std::byte* q = problem.q_row(problem.q, head.sequence, head.head, begin);
    const int64_t row = sequence.first_row + static_cast<int64_t>(head.head) * sequence.n_q + r;
    mean_rows_cta<Element, kMapThreads>(
        static_cast<int32_t>(end - begin), problem.d_qk, select.q_aligned, partial,
        select.q_means + row * problem.d_qk,
        [&](int32_t i) { return q + i * problem.q.row_stride * 2; });
    __syncthreads();
  }
}

// scores[a][b]: query block thread / 16 + 16 a, key block thread % 16 + 16 b of the tile:
// scale * q_mean . k_mean in units of log2. What lies outside the map is not to be used.
__device__ inline void map_scores(const SelectProblem& select, const MapTile& tile,
                                  const DeviceSequence& sequence, MapShared& shared,
                                  float (&scores)[4][4]) {
  const DeviceProblem& problem = select.problem;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t d = problem.d_qk;
  const float* q = select.q_means + tile.index_row(sequence, tile.q_block) * d;
  const float* k =
      select.k_means + (select.sequences[tile.head.sequence].first_kv_block +
                        static_cast<int64_t>(problem.kv_head(tile.head.head)) * sequence.n_kv +
                        static_cast<int64_t>(tile.k_word) * kMapTile) *
                           d;
  const int32_t q_rows = sequence.n_q - tile.q_block;
  const int32_t k_rows = sequence.n_kv - tile.k_word * kMapTile;
  for (int32_t first = 0; first < d; first += kMapDepth) {
    __syncthreads();
    for (int32_t e = thread; e < kMapTile * kMapDepth / 4; e += kMapThreads) {
      const int32_t row = e / (kMapDepth / 4), c = first + e % (kMapDepth / 4) * 4;
      const int32_t at = row * kMapPitch + c - first;
      const float4 zero = {0, 0, 0, 0};
      *reinterpret_cast<float4*>(&shared.operands.q[at]) =
          row < q_rows && c < d
              ? *reinterpret_cast<const float4*>(q + static_cast<int64_t>(row) * d + c)
              : zero;
      *reinterpret_cast<float4*>(&shared.operands.k[at]) =
          row < k_rows && c < d
              ? *reinterpret_cast<const float4*>(k + static_cast<int64_t>(row) * d + c)
              : zero;
    }
    __syncthreads();
#pragma unroll 1  // 64 fused products a turn; more cost registers
    for (int32_t c = 0; c < kMapDepth; c += 4) {
      float4 a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = *reinterpret_cast<const float4*>(
            &shared.operands.q[(thread / 16 + 16 * i) * kMapPitch + c]);
        b[i] = *reinterpret_cast<const float4*>(
            &shared.operands.k[(thread % 16 + 16 * i) * kMapPitch + c]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float& score = scores[i][j];
          score = fmaf(a[i].x, b[j].x, score);
          score = fmaf(a[i].y, b[j].y, score);
          score = fmaf(a[i].z, b[j].z, score);
          score = fmaf(a[i].w, b[j].w, score);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) scores[i][j] *= select.scale_log2;
  }
  __syncthreads();
}

// The share of a whole block that the last key block is.
__device__ inline float last_share(const SelectProblem& select, const DeviceSequence& sequence) {
  const int32_t block_size = select.problem.block_size;
  return static_cast<float>(sequence.s_kv - (sequence.n_kv - 1) * block_size) /
         static_cast<float>(block_size);
}

// From scores to p, once the rows' softmax is known.
__device__ inline void map_masses(const SelectProblem& select, const MapTile& tile,
                                  const DeviceSequence& sequence, float share_of_last,
                                  float (&scores)[4][4]) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
#pragma unroll
  for (int a = 0; a < 4; ++a) {
    const int32_t r = tile.q_block + thread / 16 + 16 * a;
    const float offset = r < sequence.n_q ? select.row_offsets[tile.index_row(sequence, r)] : 0.0f;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int32_t j = tile.k_word * kMapTile + thread % 16 + 16 * b;
      const float p = exp2_approx(scores[a][b] - offset);
      scores[a][b] = j == sequence.n_kv - 1 ? share_of_last * p : p;
    }
  }
}

// Counts this tile as done; true in the CTA that is the last of the head's in this sweep, which
// sees what the others wrote.
__device__ inline bool last_of_head(const MapTile& tile, MapState& state, MapShared& shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const auto tiles = static_cast<uint32_t>(tile.row_tiles * tile.words);
    shared.last = atomicAdd(&state.tickets, 1u) == tiles - 1 ? 1 : 0;
    if (shared.last != 0) state.tickets = 0;
  }
  __syncthreads();
  __threadfence();
  return shared.last != 0;
}

// What another CTA of this launch wrote: past L1, which may hold older bytes.
template <typename T>
__device__ inline T load_fresh(const T* from) {
  return *static_cast<const volatile T*>(from);
}

// kStats of one tile: partial max and sum of each row.
__device__ inline void map_tile_stats(const SelectProblem& select, const MapTile& tile,
                                      const DeviceSequence& sequence, const float (&scores)[4][4],
                                      float share_of_last) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
#pragma unroll
  for (int a = 0; a < 4; ++a) {
    const int32_t r = tile.q_block + thread / 16 + 16 * a;
    const int32_t diagonal = sequence.first_q_block + r;
    float max = -FLT_MAX, sum = 0;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int32_t j = tile.k_word * kMapTile + thread % 16 + 16 * b;
      if (j <= diagonal) max = fmaxf(max, scores[a][b]);
    }
    for (int lanes = 8; lanes > 0; lanes /= 2) {
      max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, lanes));
    }
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int32_t j = tile.k_word * kMapTile + thread % 16 + 16 * b;
      const float share = j == sequence.n_kv - 1 ? share_of_last : 1.0f;
      if (j <= diagonal) sum += share * exp2_approx(scores[a][b] - max);
    }
    for (int lanes = 8; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (thread % 16 == 0 && r < sequence.n_q) {
      select.tile_stats[tile.word(sequence, r, tile.k_word)] = {max, sum};
    }
  }
}

// The softmax of all rows of a head. A row that has none makes the head dense.
__device__ inline void finish_map_softmax(const SelectProblem& select, const MapTile& tile,
                                          const DeviceSequence& sequence) {
  bool dead = false;
  for (int32_t r = static_cast<int32_t>(threadIdx.x); r < sequence.n_q; r += kMapThreads) {
    const int32_t words = (sequence.first_q_block + r) / kMapTile + 1;
    const float2* stats = select.tile_stats + tile.word(sequence, r, 0);
    float max = -FLT_MAX, sum = 0;
    for (int32_t w = 0; w < words; ++w) {
      const float tile_max = load_fresh(&stats[w].x), tile_sum = load_fresh(&stats[w].y);
      const float highest = fmaxf(max, tile_max);
      sum = sum * exp2_approx(max - highest) + tile_sum * exp2_approx(tile_max - highest);
      max = highest;
    }
    dead = dead || !(sum > 0);
    select.row_offsets[tile.index_row(sequence, r)] = max + log2f(sum);
  }
  if (dead) select.choices[tile.head.number] = HeadChoice{};
}

// kLevel0 .. 2 of one tile: its masses into the head's histogram.
__device__ inline void map_tile_histogram(const HistogramWalk& walk, int level, const MapTile& tile,
                                          const DeviceSequence& sequence, const float (&p)[4][4],
                                          Histogram& histogram, MapShared& shared) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  shared.histogram.clear(thread, kMapThreads);
  __syncthreads();
#pragma unroll
  for (int a = 0; a < 4; ++a) {
    const int32_t r = tile.q_block + thread / 16 + 16 * a;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int32_t j = tile.k_word * kMapTile + thread % 16 + 16 * b;
      const auto bits = std::bit_cast<uint32_t>(p[a][b]);
      if (r >= sequence.n_q || j > sequence.first_q_block + r || !walk.inside(bits, level)) {
        continue;
      }
      const uint64_t mass = fixed_mass(p[a][b]);
      if (mass != 0) shared.histogram.add_mass(HistogramWalk::bucket(bits, level), mass);
    }
  }
  __syncthreads();
  for (int i = thread; i < HistogramWalk::buckets(level); i += kMapThreads) {
    if (shared.histogram.count[i] == 0) continue;
    shared.histogram.collect(i);
    atomicAdd(reinterpret_cast<unsigned long long*>(&histogram.weight[i]),
              static_cast<unsigned long long>(shared.histogram.weight[i]));
    atomicAdd(reinterpret_cast<unsigned long long*>(&histogram.count[i]),
              static_cast<unsigned long long>(shared.histogram.count[i]));
  }
}

__device__ inline void descend_map(int level, MapState& state, Histogram& histogram,
                                   const DeviceSequence& sequence, MapShared& shared) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  if (thread == 0) shared.descend.walk = state.walk;
  const bool found = descend_cta<kMapThreads>(
      level, shared.descend, [&](int i) { return load_fresh(&histogram.weight[i]); },
      [&](int i) { return load_fresh(&histogram.count[i]); });
  if (thread == 0) {
    state.walk = shared.descend.walk;
    if (!found) {  // everything fits
      state.taken = {.count = causal_blocks_of(sequence), .threshold = 0, .ties = INT64_MAX};
      state.done = 1;
    } else if (level == Histogram::kLevels - 1) {
      state.taken = state.walk.taken(Weight::kMass);
      state.done = 1;
    }
  }
  __syncthreads();
  for (int i = thread; i < Histogram::kBuckets; i += kMapThreads) {
    histogram.weight[i] = histogram.count[i] = 0;
  }
}

// The tile's entries above and at the threshold, as bits.
__device__ inline void map_tile_bits(const Taken& taken, const MapTile& tile,
                                     const DeviceSequence& sequence, const float (&p)[4][4],
                                     MapShared& shared) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  if (thread < 2 * kMapTile) shared.keep.above[thread] = shared.keep.equal[thread] = 0;
  __syncthreads();
#pragma unroll
  for (int a = 0; a < 4; ++a) {
    const int32_t row = thread / 16 + 16 * a;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int32_t key = thread % 16 + 16 * b;
      if (tile.k_word * kMapTile + key > sequence.first_q_block + tile.q_block + row) continue;
      const auto bits = std::bit_cast<uint32_t>(p[a][b]);
      uint32_t* words = bits == taken.threshold  ? shared.keep.equal
                        : bits > taken.threshold ? shared.keep.above
                                                 : nullptr;
      if (words != nullptr) atomicOr(&words[2 * row + key / 32], 1u << key % 32);
    }
  }
  __syncthreads();
}

// before[row]: entries equal to the threshold that come before the tile's row.
__device__ inline void count_ties(const SelectProblem& select, const MapTile& tile,
                                  const DeviceSequence& sequence, MapShared& shared) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const uint8_t* ties = select.tile_ties + tile.word(sequence, 0, 0);
  const int64_t rows_before = static_cast<int64_t>(tile.q_block) * tile.words;
  int64_t sum = 0;
  for (int64_t e = thread; e < rows_before; e += kMapThreads) sum += ties[e];
  sum = sum_cta<kMapThreads>(sum, shared.sums);
  if (thread < kMapTile) {
    int32_t all = 0, before = 0;
    if (tile.q_block + thread < sequence.n_q) {
      const uint8_t* of_row = ties + rows_before + static_cast<int64_t>(thread) * tile.words;
      for (int32_t w = 0; w < tile.words; ++w) {
        if (w < tile.k_word) before += of_row[w];
        all += of_row[w];
      }
    }
    shared.keep.of_row[thread] = all;
    shared.keep.before[thread] = before;
  }
  __syncthreads();
  if (thread == 0) {
    for (int32_t row = 0; row < kMapTile; ++row) {
      shared.keep.before[row] += sum;
      sum += shared.keep.of_row[row];
    }
  }
  __syncthreads();
}

// kKeep of one tile, after map_tile_bits.
__device__ inline void keep_map_tile(const SelectProblem& select, const Taken& taken,
                                     const MapTile& tile, const DeviceSequence& sequence,
                                     MapShared& shared) {
  const auto row = static_cast<int32_t>(threadIdx.x);
  if (row >= kMapTile || tile.q_block + row >= sequence.n_q) return;
  const auto word = [&](const uint32_t* halves) {
    return halves[2 * row] | static_cast<uint64_t>(halves[2 * row + 1]) << 32;
  };
  uint64_t kept = word(shared.keep.above);
  if (taken.ties > 0) {
    int64_t left = taken.ties - shared.keep.before[row];
    for (uint64_t equal = word(shared.keep.equal); equal != 0 && left > 0; --left) {
      kept |= equal & (~equal + 1);
      equal &= equal - 1;
    }
  }
  if (kept != 0) select.bits[tile.word(sequence, tile.q_block + row, tile.k_word)] |= kept;
}

static __global__ void __launch_bounds__(kMapThreads)
    map_sweep_kernel(const SelectProblem select, MapSweep sweep, int32_t max_row_tiles,
                     int32_t max_words) {
  auto& shared = *reinterpret_cast<MapShared*>(shared_memory());
  const DeviceProblem& problem = select.problem;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int64_t items = static_cast<int64_t>(*select.map_count) * max_row_tiles * max_words;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const MapTile tile(select, item, max_row_tiles, max_words);
    if (!tile.any) continue;
    // What a sweep changes here is read by the next one alone.
    MapState& state = select.map_states[tile.head.number];
    const bool level = sweep >= MapSweep::kLevel0 && sweep <= MapSweep::kLevel2;
    if (sweep != MapSweep::kStats) {
      if (select.choices[tile.head.number].pattern != HeadPattern::kQueryAware) continue;
      if (level && state.done != 0) continue;
      if (sweep == MapSweep::kTies && state.taken.ties == 0) continue;
    }
    const DeviceSequence& sequence = problem.sequences[tile.head.sequence];
    const float share_of_last = last_share(select, sequence);
    float scores[4][4] = {};
    if (tile.diagonal) map_scores(select, tile, sequence, shared, scores);
    if (sweep == MapSweep::kStats) {
      if (tile.diagonal) map_tile_stats(select, tile, sequence, scores, share_of_last);
      if (last_of_head(tile, state, shared)) finish_map_softmax(select, tile, sequence);
      continue;
    }
    map_masses(select, tile, sequence, share_of_last, scores);
    if (level) {
      const int number = static_cast<int>(sweep) - static_cast<int>(MapSweep::kLevel0);
      Histogram& histogram = select.histograms[tile.head.number];
      if (tile.diagonal) {
        map_tile_histogram(state.walk, number, tile, sequence, scores, histogram, shared);
      }
      if (last_of_head(tile, state, shared))
        descend_map(number, state, histogram, sequence, shared);
      continue;
    }
    if (tile.diagonal) map_tile_bits(state.taken, tile, sequence, scores, shared);
    if (sweep == MapSweep::kTies) {
      if (thread < kMapTile && tile.q_block + thread < sequence.n_q) {
        select.tile_ties[tile.word(sequence, tile.q_block + thread, tile.k_word)] =
            tile.diagonal ? static_cast<uint8_t>(__popc(shared.keep.equal[2 * thread]) +
                                                 __popc(shared.keep.equal[2 * thread + 1]))
                          : 0;
      }
    } else if (tile.diagonal) {
      if (state.taken.ties > 0) count_ties(select, tile, sequence, shared);
      keep_map_tile(select, state.taken, tile, sequence, shared);
    }
  }
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_MAP_CUDA_CUH_

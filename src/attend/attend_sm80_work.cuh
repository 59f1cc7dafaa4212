// What a CTA of attend_sm80 works on: its row of the index and the walk over the row's
// kept keys, in shared memory, where it takes no registers.
#ifndef FLEXPREFILL_SRC_ATTEND_ATTEND_SM80_WORK_CUH_
#define FLEXPREFILL_SRC_ATTEND_ATTEND_SM80_WORK_CUH_

#include <cstddef>
#include <cstdint>
#include <limits>

#include "attend/mask.cuh"
#include "attend/mean_rows.cuh"
#include "attend/tile_config.h"
#include "attend/tile_scheduler.cuh"
#include "cuda/device_problem.h"
#include "cuda/launch.cuh"
#include "cuda/sm80.cuh"

namespace flexprefill {
namespace sm80 {

constexpr int32_t kTileKv = kSm80TileKv;
constexpr int32_t kHalfTile = kTileKv / 2;  // keys of the smallest block
constexpr int32_t kNoKeys = std::numeric_limits<int32_t>::max() - kTileKv;
// A word of 64, and what a tile may need, with room to spare.
constexpr int32_t kBlocksAhead = 128;
constexpr int32_t kTilesAhead = 4;
constexpr int64_t kElementBytes = 2;
constexpr uint32_t kAllLanes = 0xffffffff;

struct Parameters {
  DeviceProblem problem;
  DeviceRows rows;
  TokenMask mask;
  MeanRows means;
  WorkOrder order;
  int32_t tile_rows, slots;
  int32_t log2_block_size;
  bool q_aligned, k_aligned, v_aligned, out_aligned;  // every row, to 16 bytes
  // Scores are scaled by the first before their maximum is taken (it may be 0 or less), by the
  // second, which is above 0, in the exponent; together softmax scale * log2(e).
  float scores_scale, weigh_scale;
  float mean_bias;  // log2(block size), over weigh_scale
};

// Where the halves of a tile of keys start: two blocks of 32, or both of one block. kNoKeys: no
// second half; first < 0: no tile.
struct KeyTile {
  int32_t first, second;
  bool masked;  // some row of the CTA does not see all of its keys
  // Not 0: a tile of means; those of these blocks of the row's word `first`.
  uint64_t dropped;

  __device__ bool is_means() const { return dropped != 0; }
};

// What all threads of a CTA know of its work, in shared memory, where it takes no
// registers.
struct Work {
  int32_t sequence, head;
  int32_t first, last;     // positions of the CTA's first and last query
  int32_t first_position;  // of the sequence
  int32_t s_kv;
  const std::byte *k_rows, *v_rows;  // of the head: row 0, of page 0 if paged
  int64_t first_mean;                // of the head, in rows
  const uint64_t* words;             // bits of the kept blocks; nullptr: all
  // Tile t in tiles[t % kTilesAhead]; at the time of tile t those to t + 2 are known to all.
  KeyTile tiles[kTilesAhead];
  // Warp 0's: kept block i in blocks[i % kBlocksAhead], ascending, `known` of them, from the words
  // before next_word; means are tiles already from the words before next_means.
  int32_t blocks[kBlocksAhead];
  int32_t known, next_word, next_means;
  uint32_t nonfinite[2];  // bit per key of a tile: its row of V holds an inf or a NaN
};
static_assert(sizeof(Work) <= kSm80SharedWork);

__device__ inline Work& work() { return *reinterpret_cast<Work*>(shared_memory()); }
__device__ inline int32_t warp() { return fresh_thread() / 32; }
__device__ inline int32_t lane() { return fresh_thread() % 32; }

// Word of kept blocks, without those after the last query's own.
__device__ inline uint64_t kept_word(const Parameters& p, int32_t word) {
  const int32_t last = work().last >> p.log2_block_size;
  const uint64_t all = word < last / 64 ? ~uint64_t{0} : ~uint64_t{0} >> (63 - last % 64);
  return work().words == nullptr ? all : work().words[word] & all;
}
__device__ inline int32_t last_word(const Parameters& p) {
  return work().last >> p.log2_block_size >> 6;
}

// The blocks of word n that count through their means.
__device__ inline uint64_t dropped_word(const Parameters& p, int32_t n) {
  const int32_t diagonal = work().last >> p.log2_block_size;
  return dropped_blocks_of(work().words == nullptr ? ~uint64_t{0} : work().words[n], n, diagonal);
}

// Warp 0: the kept blocks that tile t needs. Returns how many are known.
__device__ inline int32_t walk_blocks(const Parameters& p, int32_t t) {
  Work& w = work();
  const int32_t needed = ((t + 1) * kTileKv + p.problem.block_size - 1) >> p.log2_block_size;
  int32_t n = w.known, word = w.next_word;
  __syncwarp();
  while (n < needed && word <= last_word(p)) {
    const uint64_t kept = kept_word(p, word);
    for (int32_t bit = lane(); bit < 64; bit += 32) {
      if ((kept >> bit & 1) == 0) continue;
      const int32_t before = __popcll(kept & ((uint64_t{1} << bit) - 1));
      w.blocks[(n + before) % kBlocksAhead] = word * 64 + bit;
    }
    n += __popcll(kept);
    ++word;
  }
  if (lane() == 0) {
    w.known = n;
    w.next_word = word;
  }
  __syncwarp();
  return n;
}

// Warp 0: tile t of the row's kept keys, if it has one.
__device__ inline KeyTile key_tile(const Parameters& p, int32_t t) {
  const KeyTile none{.first = -1, .second = kNoKeys, .masked = false, .dropped = 0};
  const int32_t known = walk_blocks(p, t);
  const int32_t shift = p.log2_block_size;
  const int32_t i = t * kTileKv >> shift;
  if (i >= known) return none;
  const int32_t first =
      (work().blocks[i % kBlocksAhead] << shift) + (t * kTileKv & ((1 << shift) - 1));
  if (first > work().last) return none;
  int32_t second = first + kHalfTile;
  if (shift == 5) {
    second = i + 1 < known ? work().blocks[(i + 1) % kBlocksAhead] << shift : kNoKeys;
  }
  if (second > work().last) second = kNoKeys;
  const int32_t first_query = max(work().first, work().first_position);
  const bool masked = !p.mask.all_seen(first_query, work().last, first, second + (kHalfTile - 1));
  return {.first = first, .second = second, .masked = masked, .dropped = 0};
}

// Warp 0: the next tile of means, if there is one.
__device__ inline KeyTile mean_tile(const Parameters& p) {
  KeyTile tile{.first = -1, .second = kNoKeys, .masked = false, .dropped = 0};
  if (p.means.k == nullptr) return tile;
  int32_t word = work().next_means;
  __syncwarp();
  for (; tile.dropped == 0 && word <= last_word(p); ++word) {
    tile.dropped = dropped_word(p, word);
    tile.first = tile.dropped == 0 ? -1 : word;
  }
  if (lane() == 0) work().next_means = word;
  return tile;
}

// Warp 0, at the time of tile t - 3: tile t for the time of tile t - 2.
__device__ inline void look_ahead(const Parameters& p, int32_t t) {
  KeyTile tile = key_tile(p, t);
  if (tile.first < 0) tile = mean_tile(p);
  if (lane() == 0) work().tiles[t % kTilesAhead] = tile;
  __syncwarp();
}

// Warp 0 fills in the work.
__device__ inline void begin_work(const Parameters& p, const WorkItem& item, int32_t first) {
  const DeviceProblem& problem = p.problem;
  const DeviceSequence& sequence = problem.sequences[item.sequence];
  const auto head_rows = [&](const DeviceTensor& t) -> const std::byte* {
    const int64_t before = problem.page_table != nullptr ? 0
                                                         : item.sequence * t.sequence_stride +
                                                               sequence.kv_start * t.row_stride;
    return t.data + (before + problem.kv_head(item.head) * t.head_stride) * kElementBytes;
  };
  if (lane() == 0) {
    Work& w = work();
    w.sequence = item.sequence;
    w.head = item.head;
    w.first = first;
    w.last = min(first + p.tile_rows, sequence.s_kv) - 1;
    w.first_position = sequence.first_position();
    w.s_kv = sequence.s_kv;
    w.k_rows = head_rows(problem.k);
    w.v_rows = head_rows(problem.v);
    w.first_mean = sequence.first_mean + int64_t{problem.kv_head(item.head)} * sequence.n_kv;
    w.words = p.rows.bits == nullptr ? nullptr : p.rows.row(sequence, item.head, item.q_row);
    w.known = w.next_word = w.next_means = 0;
  }
  __syncwarp();
  for (int32_t t = 0; t < kTilesAhead - 1; ++t) look_ahead(p, t);
}

// Row n of K's or V's means.
__device__ inline const std::byte* mean_row(const Parameters& p, bool values, int32_t n) {
  const int32_t d = values ? p.problem.d_v : p.problem.d_qk;
  return (values ? p.means.v : p.means.k) + (work().first_mean + n) * d * kElementBytes;
}

// Row `key` of K or V.
__device__ inline const std::byte* kv_row(const Parameters& p, bool values, int32_t key) {
  const DeviceProblem& problem = p.problem;
  const std::byte* rows = values ? work().v_rows : work().k_rows;
  const int64_t stride = values ? problem.v.row_stride : problem.k.row_stride;
  if (problem.page_table == nullptr) return rows + key * stride * kElementBytes;
  const int64_t page =
      problem.page_table[work().sequence * problem.page_table_stride + key / problem.page_size];
  const int64_t page_stride = values ? problem.v.sequence_stride : problem.k.sequence_stride;
  return rows + (page * page_stride + key % problem.page_size * stride) * kElementBytes;
}

__device__ inline bool sees_any_key(const Parameters& p, int32_t position) {
  for (int32_t word = 0; word <= last_word(p); ++word) {
    if (p.means.k != nullptr && dropped_word(p, word) != 0) return true;
    for (uint64_t left = kept_word(p, word); left != 0; left &= left - 1) {
      const int32_t block = word * 64 + __ffsll(static_cast<int64_t>(left)) - 1;
      const int32_t first = block << p.log2_block_size;
      const int32_t last = min(first + p.problem.block_size, work().s_kv) - 1;
      if (p.mask.sees_any(position, first, last)) return true;
    }
  }
  return false;
}

}  // namespace sm80
}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_ATTEND_ATTEND_SM80_WORK_CUH_

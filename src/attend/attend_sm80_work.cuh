// What a thread block of attend_sm80 works on: its row of the index and the walk over the row's
// kept keys, in shared memory, where it takes no registers.
#ifndef FLEXPREFILL_SRC_ATTEND_ATTEND_SM80_WORK_CUH_
#define FLEXPREFILL_SRC_ATTEND_ATTEND_SM80_WORK_CUH_

#include <cstddef>
#include <cstdint>
#include <limits>

#include "attend/mask.cuh"
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
// A word of 64, and what tile t to t + 3 may need, with room to spare.
constexpr int32_t kBlocksAhead = 128;
constexpr int64_t kElementBytes = 2;
constexpr uint32_t kAllLanes = 0xffffffff;

struct Parameters {
  DeviceProblem problem;
  DeviceRows rows;
  TokenMask mask;
  WorkOrder order;
  int32_t tile_rows, slots;
  int32_t log2_block_size;
  bool q_aligned, k_aligned, v_aligned, out_aligned;  // every row, to 16 bytes
  // Scores are scaled by the first before their maximum is taken (it may be 0 or less), by the
  // second, which is above 0, in the exponent; together softmax scale * log2(e).
  float scores_scale, weigh_scale;
};

// Where the halves of a tile of keys start: two blocks of 32, or both of one block. kNoKeys: no
// second half; first < 0: no tile.
struct KeyTile {
  int32_t first, second;
};

// What all threads of a thread block know of its work, in shared memory, where it takes no
// registers.
struct Work {
  int32_t sequence, head;
  int32_t first, last;     // positions of the thread block's first and last query
  int32_t first_position;  // of the sequence
  int32_t s_kv;
  const std::byte *k_rows, *v_rows;  // of the head: row 0, of page 0 if paged
  const uint64_t* words;             // bits of the kept blocks; nullptr: all
  // Kept block i in blocks[i % kBlocksAhead], ascending; known[t % 2] of them at the time of tile
  // t, which is those of tile t + 2 at least, from the words before next_word.
  int32_t blocks[kBlocksAhead];
  int32_t known[2];
  int32_t next_word;
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

// Warp 0, at the time of tile t: the blocks of tile t + 3 for the time of tile t + 1.
__device__ inline void look_ahead(const Parameters& p, int32_t t) {
  Work& w = work();
  const int32_t needed = ((t + 4) * kTileKv + p.problem.block_size - 1) >> p.log2_block_size;
  int32_t n = w.known[t & 1], word = w.next_word;
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
  __syncwarp();
  if (lane() == 0) {
    w.known[(t + 1) & 1] = n;
    w.next_word = word;
  }
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
    w.words = p.rows.bits == nullptr ? nullptr : p.rows.row(sequence, item.head, item.q_row);
    w.known[1] = 0;
    w.next_word = 0;
  }
  __syncwarp();
  look_ahead(p, -1);
}

// Tile t of the row, of whose blocks so many are known.
__device__ inline KeyTile key_tile(const Parameters& p, int32_t t, int32_t known) {
  const int32_t shift = p.log2_block_size;
  const int32_t i = t * kTileKv >> shift;
  if (i >= known) return {-1, -1};
  const int32_t first =
      (work().blocks[i % kBlocksAhead] << shift) + (t * kTileKv & ((1 << shift) - 1));
  if (first > work().last) return {-1, -1};
  int32_t second = first + kHalfTile;
  if (shift == 5) {
    second = i + 1 < known ? work().blocks[(i + 1) % kBlocksAhead] << shift : kNoKeys;
  }
  return {first, second <= work().last ? second : kNoKeys};
}

// Whether all rows of the thread block see all keys of the tile.
__device__ inline bool all_seen(const Parameters& p, const KeyTile& tile) {
  return p.mask.all_seen(max(work().first, work().first_position), work().last, tile.first,
                         tile.second + (kHalfTile - 1));
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

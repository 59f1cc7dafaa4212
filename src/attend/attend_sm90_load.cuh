// attend on Hopper: the warps that bring tiles to shared memory, and those that check V.
#ifndef FLEXPREFILL_SRC_ATTEND_ATTEND_SM90_LOAD_CUH_
#define FLEXPREFILL_SRC_ATTEND_ATTEND_SM90_LOAD_CUH_

#include <cstdint>

#include "attend/attend_sm90_plan.cuh"
#include "attend/softmax.cuh"

namespace flexprefill {

// Kept key blocks of a row, ascending.
class BlockWalk {
 public:
  // words == nullptr: every block.
  __device__ explicit BlockWalk(const uint64_t* words) : words_(words) {}

  // Only while there are more.
  __device__ int32_t next() {
    if (words_ == nullptr) return ++at_;
    while (left_ == 0) left_ = __ldg(reinterpret_cast<const unsigned long long*>(words_) + ++at_);
    const int32_t bit = __ffsll(static_cast<long long>(left_)) - 1;
    left_ &= left_ - 1;
    return at_ * 64 + bit;
  }

 private:
  const uint64_t* words_;
  int32_t at_ = -1;              // the word, or the block if there are no words
  unsigned long long left_ = 0;  // of the word
};

// One warp: draws rows of work and keeps the ring of K and V tiles full.
template <typename Shape>
class Loader {
 public:
  __device__ Loader(const AttendSm90Params& params, StreamShared<Shape>& shared)
      : params_(params), shared_(shared), lane_(static_cast<int32_t>(threadIdx.x) % 32) {}

  __device__ void run(uint32_t stream) {
    uint32_t t = blockIdx.x * Shape::kStreams + stream;
    while (t < params_.order.count) {
      WorkItem item;
      if (work_item(params_.problem, params_.order, t, item)) load_row(item);
      // Its latency hides behind the tiles that wait in the ring.
      if (lane_ == 0) t = gridDim.x * Shape::kStreams + atomicAdd(params_.order.counter, 1u);
      t = __shfl_sync(0xffffffff, t, 0);
    }
    finish();
  }

 private:
  __device__ void load_row(const WorkItem& item) {
    const DeviceSequence& sequence = params_.problem.sequences[item.sequence];
    first_position_ = (sequence.first_q_block + item.q_row) * Shape::kBlock;
    sequence_ = item.sequence;
    kv_head_ = params_.problem.kv_head(item.head);
    const uint64_t* words =
        params_.rows.bits == nullptr ? nullptr : params_.rows.row(sequence, item.head, item.q_row);
    if (lane_ == 0) shared_.words = words;
    __syncwarp();
    const int32_t key_tiles = item.blocks * Shape::kTilesPerBlock;
    const int32_t tiles = key_tiles + (params_.rows.mean_correction ? count_mean_tiles() : 0);
    if (lane_ == 0) describe(item, sequence, key_tiles, tiles);
    BlockWalk walk(words);
    // K tiles that are asked for before Q. Its place is free soon after the row before began if Q
    // is kept in registers, and it comes from further away; else its place is in use until the row
    // before ends: as many as fit besides those that it still uses.
    const int32_t before_q = Shape::kQInRegisters ? 0 : min(Shape::kStages - 1, tiles);
    if (before_q == 0) load_q();
    int32_t first_key = 0;
#pragma unroll 1
    for (int32_t i = 1; i <= tiles; ++i) {
      const bool means = i > key_tiles;
      if (means) {
        first_key = next_means(i == key_tiles + 1 ? 0 : first_key + Shape::kTileKv);
      } else {
        first_key = (i - 1) % Shape::kTilesPerBlock == 0 ? walk.next() * Shape::kBlock
                                                         : first_key + Shape::kTileKv;
      }
      load_kv(first_key, means, i == before_q);
    }
  }

  // ---- Tiles of means

  // The blocks from `first` on, a multiple of 64, that the row has dropped.
  __device__ uint64_t dropped_word(int32_t first) const {
    const int32_t diagonal = first_position_ / Shape::kBlock;
    const uint64_t* words = shared_.words;
    if (words == nullptr || first >= diagonal) return 0;
    return dropped_blocks_of(words[first / 64], first / 64, diagonal);
  }
  __device__ bool has_dropped(int32_t first) const {
    uint64_t dropped = 0;
#pragma unroll
    for (int w = 0; w < Shape::kMeanWords; ++w) dropped |= dropped_word(first + 64 * w);
    return dropped != 0;
  }
  __device__ int32_t count_mean_tiles() const {
    int32_t tiles = 0;
#pragma unroll 1
    for (int32_t first = 0; first < first_position_ / Shape::kBlock; first += 32 * Shape::kTileKv) {
      tiles += __popc(__ballot_sync(0xffffffff, has_dropped(first + lane_ * Shape::kTileKv)));
    }
    return tiles;
  }
  // Where the next tile of means begins; only while there are more.
  __device__ int32_t next_means(int32_t first) const {
    while (!has_dropped(first)) first += Shape::kTileKv;
    return first;
  }

  // Of the row that comes next.
  __device__ void describe(const WorkItem& item, const DeviceSequence& sequence, int32_t key_tiles,
                           int32_t tiles) {
    const DeviceProblem& problem = params_.problem;
    WorkTile& work = shared_.work[rows_ % WorkTile::kSlots];
    const int32_t row = first_position_ - sequence.first_position();  // negative: inside a block
    work.out = problem.q_row(problem.out, item.sequence, item.head, row);
    work.lse = problem.lse == nullptr ? nullptr : problem.lse_row(item.sequence, item.head) + row;
    work.sequence = item.sequence;
    work.head = item.head;
    work.q_row = item.q_row;
    work.tiles = tiles;
    // The block on the diagonal is masked, and whatever a window cuts.
    const bool plain = params_.scores_scale == 1 && !params_.mask.windowed();
    work.plain_tiles = plain ? max(key_tiles - Shape::kTilesPerBlock, 0) : 0;
    work.first_position = first_position_;
    work.s_kv = sequence.s_kv;
    work.row_begin = max(-row, 0);
    work.row_end = min(sequence.s_q - row, Shape::kTileQ);
    work.q_map_row = static_cast<int32_t>(sequence.q_start) + row;
    work.q_map_sequence = params_.q_packed != 0 ? 0 : item.sequence;
  }

  __device__ void load_q() {
#pragma unroll 1
    for (int w = 0; w < Shape::kWarpgroups; ++w) {
      sm90::barrier_wait(&shared_.q_empty[w], (rows_ & 1) ^ 1);
      if (lane_ == 0) load_q_of(w, shared_.work[rows_ % WorkTile::kSlots]);
    }
    __syncwarp();
    ++rows_;
  }

  __device__ void load_q_of(int warpgroup, const WorkTile& work) {
    if (work.tiles == 0) {
      sm90::barrier_arrive(&shared_.q_full[warpgroup]);
      return;
    }
    sm90::barrier_arrive_expect(&shared_.q_full[warpgroup], Shape::kQBytes / Shape::kWarpgroups);
    const int row = warpgroup * Shape::kQBoxRows;
#pragma unroll 1
    for (int c = 0; c < Shape::kDimQk / sm90::kChunkColumns; ++c) {
      sm90::tma_load(&params_.q_map, &shared_.q_full[warpgroup],
                     shared_.q + (c * Shape::kTileQ + row) * sm90::kChunkColumns,
                     c * sm90::kChunkColumns, work.q_map_row + row, work.head, work.q_map_sequence);
    }
  }

  // With the row's Q between K and V, if asked for. `means`: of the blocks from first_key on.
  __device__ void load_kv(int32_t first_key, bool means, bool with_q) {
    // Read again for each tile: registers are few here.
    const DeviceSequence& sequence = params_.problem.sequences[sequence_];
    const int32_t keys = max(min(sequence.s_kv - first_key, Shape::kTileKv), 0);
    const bool masked = is_masked<Shape>(params_.mask, first_position_, first_key);
    const TileKind kind = means ? TileKind::kMeans : masked ? TileKind::kMasked : TileKind::kPlain;
    // Lane l brings box l. Pages past the last key are not looked up; what their keys' places hold
    // is masked (K) and zeroed (V).
    const int32_t box_rows = means ? Shape::kTileKv : params_.kv_box_rows;
    int32_t boxes = 1, row = static_cast<int32_t>(sequence.kv_start) + first_key;
    int32_t head = kv_head_, page = params_.kv_packed != 0 ? 0 : sequence_;
    if (means) {
      row = static_cast<int32_t>(sequence.first_mean) + kv_head_ * sequence.n_kv + first_key;
      head = page = 0;
    } else if (params_.problem.page_table != nullptr) {
      boxes = (keys + box_rows - 1) / box_rows;
      const uint32_t key = first_key + lane_ * box_rows, page_size = params_.problem.page_size;
      const uint32_t nth = key / page_size;
      row = static_cast<int32_t>(key - nth * page_size);
      if (lane_ < boxes) {
        page = params_.problem.page_table[sequence_ * params_.problem.page_table_stride + nth];
      }
    }
    const uint32_t box_bytes = box_rows * sm90::kChunkRowBytes;
    const auto load = [&](const sm90::TensorMap* map, sm90::Barrier* full, uint16_t* tile,
                          int chunks) {
      if (lane_ == 0) sm90::barrier_arrive_expect(full, boxes * chunks * box_bytes);
      __syncwarp();
      if (lane_ < boxes) {
#pragma unroll 1
        for (int c = 0; c < chunks; ++c) {
          sm90::tma_load(map, full,
                         tile + (c * Shape::kTileKv + lane_ * box_rows) * sm90::kChunkColumns,
                         c * sm90::kChunkColumns, row, head, page);
        }
      }
    };
    const uint32_t stage = ring_.stage;
    sm90::barrier_wait(&shared_.k_empty[stage], ring_.parity ^ 1);
    if (lane_ == 0) describe_keys(stage, first_key, kind);
    load(means ? &params_.k_mean_map : &params_.k_map, &shared_.k_full[stage], shared_.k[stage],
         Shape::kDimQk / sm90::kChunkColumns);
    if (with_q) load_q();
    sm90::barrier_wait(&shared_.v_empty[stage], ring_.parity ^ 1);
    if (lane_ == 0) describe_values(stage, keys);
    load(means ? &params_.v_mean_map : &params_.v_map, &shared_.v_full[stage], shared_.v[stage],
         Shape::kDimV / sm90::kChunkColumns);
    ring_.advance();
  }

  // Each write names its field: tests/gpu/racecheck_report.py looks for that.
  __device__ void describe_keys(uint32_t stage, int32_t first_key, TileKind kind) {
    shared_.key_tile[stage].first_key = first_key;
    shared_.key_tile[stage].kind = kind;
    if (kind != TileKind::kMeans) return;
#pragma unroll 1
    for (int w = 0; w < Shape::kMeanWords; ++w) {
      shared_.key_tile[stage].dropped[w] = dropped_word(first_key + 64 * w);
    }
  }
  __device__ void describe_values(uint32_t stage, int32_t keys) {
    const KeyTile& tile = shared_.key_tile[stage];
    shared_.value_tile[stage].keys = keys;
    shared_.value_tile[stage].kind = tile.kind;
    if (tile.kind != TileKind::kMeans) return;
#pragma unroll 1
    for (int w = 0; w < Shape::kMeanWords; ++w) {
      shared_.value_tile[stage].dropped[w] = tile.dropped[w];
    }
  }

  // Tells the others that there is no more.
  __device__ void finish() {
    for (sm90::Barrier& empty : shared_.q_empty) sm90::barrier_wait(&empty, (rows_ & 1) ^ 1);
    sm90::barrier_wait(&shared_.v_empty[ring_.stage], ring_.parity ^ 1);
    if (lane_ == 0) {
      shared_.work[rows_ % WorkTile::kSlots].tiles = WorkTile::kNoWork;
      for (sm90::Barrier& full : shared_.q_full) sm90::barrier_arrive(&full);
      shared_.value_tile[ring_.stage].keys = ValueTile::kNoMore;
      sm90::barrier_arrive(&shared_.v_full[ring_.stage]);
    }
  }

  const AttendSm90Params& params_;
  StreamShared<Shape>& shared_;
  const int32_t lane_;
  RingPlace<Shape::kStages> ring_;
  uint32_t rows_ = 0;  // of work, so far
  // Of the row in work.
  int32_t first_position_, sequence_, kv_head_;
};

// One of a stream's checking warps, which looks at its share of the rows of every masked tile of V.
// A weight of 0 does not keep a NaN or an infinity out of a row that does not see its key. So here
// what lies past the last key becomes zero, and so do elements that are not finite; the warpgroups
// add those in the end to the rows that see them (attend_sm90_not_finite.cuh).
template <typename Shape>
class Checker {
 public:
  static constexpr int kRows = Shape::kTileKv / Shape::kCheckers;
  static constexpr int kChunks = Shape::kDimV / sm90::kChunkColumns;

  __device__ Checker(StreamShared<Shape>& shared, int warp)
      : shared_(shared),
        warp_(warp),
        first_(warp * kRows),
        lane_(static_cast<int32_t>(threadIdx.x) % 32) {}

  __device__ void run() {
    for (RingPlace<Shape::kStages> ring;; ring.advance()) {
      sm90::barrier_wait(&shared_.v_full[ring.stage], ring.parity);
      const ValueTile& tile = shared_.value_tile[ring.stage];
      if (tile.keys == ValueTile::kNoMore) return;
      if (tile.kind != TileKind::kPlain) {
        if (tile.kind == TileKind::kMasked) {
          check(ring.stage, tile.keys);
        } else {
          clear_kept(ring.stage);
        }
        sm90::fence_proxy_async();
      }
      warp_arrive(&shared_.v_checked[ring.stage]);
      // Of a plain tile nobody else waits for this phase; compute-sanitizer wants each waited for.
      sm90::barrier_wait(&shared_.v_checked[ring.stage], ring.parity);
      warp_arrive(&shared_.v_empty[ring.stage]);
    }
  }

 private:
  __device__ uint4* row(uint32_t stage, int chunk, int key) const {
    return reinterpret_cast<uint4*>(shared_.v[stage] +
                                    (chunk * Shape::kTileKv + key) * sm90::kChunkColumns);
  }

  // Eight lanes a row of a chunk; where a column lies within it does not matter. Computing warps
  // wait for the diagonal's tile in every row of work, so: many loads under way, no branch for a
  // unit.
  __device__ void check(uint32_t stage, int keys) {
    const int end = min(first_ + kRows, keys);
    uint32_t bits = 0;
    for (int first = first_; first < end; first += 16) {
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        const int key = min(first + i + lane_ / 8, end - 1);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) bits |= unit_bits(row(stage, c, key)[lane_ % 8]);
      }
    }
    for (int key = max(first_, end) + lane_ / 8; key < first_ + kRows; key += 4) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) row(stage, c, key)[lane_ % 8] = {0, 0, 0, 0};
    }
    const bool any = __any_sync(0xffffffff, (bits & kNotFinite) != 0) != 0;
    if (lane_ == 0) shared_.not_finite[stage][warp_] = any;
    if (any) clear_not_finite(stage, end);
  }

  // Of a tile of means: those that do not count become zero, whatever they are. The others stay:
  // all rows of the tile see them.
  __device__ void clear_kept(uint32_t stage) {
    const uint64_t* dropped = shared_.value_tile[stage].dropped;
    for (int mean = first_ + lane_ / 8; mean < first_ + kRows; mean += 4) {
      if ((dropped[mean / 64] >> (mean % 64) & 1) != 0) continue;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) row(stage, c, mean)[lane_ % 8] = {0, 0, 0, 0};
    }
    if (lane_ == 0) shared_.not_finite[stage][warp_] = false;
  }

  __device__ static uint32_t unit_bits(const uint4& unit) {
    using Element = typename Shape::Element;
    return not_finite_bits<Element>(unit.x) | not_finite_bits<Element>(unit.y) |
           not_finite_bits<Element>(unit.z) | not_finite_bits<Element>(unit.w);
  }

  __device__ void clear_not_finite(uint32_t stage, int end) {
    __syncwarp();
#pragma unroll 1
    for (int key = first_; key < end; ++key) {
#pragma unroll 1
      for (int column = lane_; column < Shape::kDimV; column += 32) {
        auto* element = reinterpret_cast<uint16_t*>(row(stage, column / sm90::kChunkColumns, key)) +
                        column % sm90::kChunkColumns;
        if (any_not_finite<typename Shape::Element>(*element)) *element = 0;
      }
    }
  }

  StreamShared<Shape>& shared_;
  const int warp_, first_;
  const int32_t lane_;
};

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_ATTEND_ATTEND_SM90_LOAD_CUH_

// attend on Hopper: what the host, the loading warps and the warpgroups that compute agree on.
#ifndef FLEXPREFILL_SRC_ATTEND_ATTEND_SM90_PLAN_CUH_
#define FLEXPREFILL_SRC_ATTEND_ATTEND_SM90_PLAN_CUH_

#include <cstdint>

#include "attend/mask.cuh"
#include "attend/mean_rows.cuh"
#include "attend/tile_scheduler.cuh"
#include "cuda/device_problem.h"
#include "cuda/sm90.cuh"

namespace flexprefill {

// A kernel: element type, head dims as padded, block size (64 or 128). Head dims up to these run
// through it; the copy engine fills up with zeros.
//
// A CTA has two warpgroups of 64 query rows each. With blocks of 128 rows they share one stream of
// key tiles. With blocks of 64 each has its own stream: its own rows of the index, its own ring.
template <typename Element_, int kDimQk_, int kDimV_, int kBlock_>
struct AttendShape {
  using Element = Element_;
  static constexpr int kDimQk = kDimQk_, kDimV = kDimV_, kBlock = kBlock_;
  static constexpr int kStreams = 128 / kBlock;
  static constexpr int kWarpgroups = kBlock / 64;  // of a stream
  static constexpr int kCheckers = 2 / kStreams;   // warps that check V, of a stream
  static constexpr int kTileQ = kBlock;
  // A tile of 128 keys and 256 columns would leave no room for a second stage, nor registers.
  static constexpr int kTileKv = kBlock == 64 || kDimV == 256 ? 64 : 128;
  static constexpr int kTilesPerBlock = kBlock / kTileKv;
  static constexpr int kMeanWords = kTileKv / 64;  // words of a row's bits that a tile of means has
  // A warpgroup keeps its rows of Q in registers where there are enough of them. That spares shared
  // memory a third of the reads of S = Q K^T, and frees Q's place for the next row at once.
  static constexpr bool kQInRegisters = kDimQk <= 128;
  static constexpr int kBarrierBytes = 1024;  // more than all that is not q, k or v
  static constexpr int kStreamBytes = 232448 / kStreams / 1024 * 1024 - kBarrierBytes;
  static constexpr int kQBytes = kTileQ * kDimQk * 2;
  static constexpr int kQBoxRows = 64;    // of a warpgroup
  static constexpr int kOutBoxRows = 16;  // of a warp
  static constexpr int kStageBytes = kTileKv * (kDimQk + kDimV) * 2;
  static constexpr int kMostStages = (kStreamBytes - kQBytes) / kStageBytes;
  static constexpr int kStages = kMostStages < 4 ? kMostStages : 4;
  static_assert(kStages >= 1);
};

constexpr int kAttendThreads = 384;  // two warpgroups that compute, one that loads

// What the warpgroups need to know of a row of work.
struct WorkTile {
  std::byte* out;  // of row 0 of the tile, which may lie before the sequence
  float* lse;      // likewise; nullptr: not asked for
  int32_t sequence, head, q_row;
  int32_t tiles;           // of keys; kNoWork: the end
  int32_t plain_tiles;     // of them, the first ones that need nothing but the softmax's scale
  int32_t first_position;  // of row 0
  int32_t s_kv;
  int32_t row_begin, row_end;         // rows of the tile that exist
  int32_t q_map_row, q_map_sequence;  // where Q lies

  static constexpr int32_t kNoWork = -1;
  // Written while the row before is computed and the one before that is stored.
  static constexpr uint32_t kSlots = 4;
};

// kMasked: some row does not see all of the tile's keys. kMeans: means of blocks, of which those
// count whose bits are set in `dropped`.
enum class TileKind : int32_t { kPlain, kMasked, kMeans };

struct KeyTile {
  int32_t first_key;
  TileKind kind;
  uint64_t dropped[2];
};

// What the checking warps need to know of a tile of V.
struct ValueTile {
  int32_t keys;  // that exist; kNoMore: the end
  TileKind kind;
  uint64_t dropped[2];

  static constexpr int32_t kNoMore = -1;
};

// Shared memory of one stream. Tiles are in chunks of 64 columns (sm90.cuh).
template <typename Shape>
struct StreamShared {
  alignas(1024) uint16_t q[Shape::kTileQ * Shape::kDimQk];
  alignas(1024) uint16_t k[Shape::kStages][Shape::kTileKv * Shape::kDimQk];
  alignas(1024) uint16_t v[Shape::kStages][Shape::kTileKv * Shape::kDimV];
  alignas(16) WorkTile work[WorkTile::kSlots];  // in turn, published by q_full
  // Of each warpgroup's 64 rows: the one that is ahead gets its next rows earlier.
  sm90::Barrier q_full[Shape::kWarpgroups], q_empty[Shape::kWarpgroups];
  sm90::Barrier k_full[Shape::kStages], k_empty[Shape::kStages];
  sm90::Barrier v_full[Shape::kStages], v_empty[Shape::kStages];
  sm90::Barrier v_checked[Shape::kStages];  // where it is masked
  KeyTile key_tile[Shape::kStages];         // published by k_full
  ValueTile value_tile[Shape::kStages];     // published by v_full
  // Whether elements of a masked tile of V are not finite; they are zero in v. Published by
  // v_checked.
  bool not_finite[Shape::kStages][Shape::kCheckers];
  const uint64_t* words;  // of the row that is loaded; here they take no registers

  __device__ void init() {
    constexpr uint32_t kWarps = Shape::kWarpgroups * 4;
    for (int warpgroup = 0; warpgroup < Shape::kWarpgroups; ++warpgroup) {
      sm90::barrier_init(&q_full[warpgroup], 1);
      sm90::barrier_init(&q_empty[warpgroup], 4);
    }
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      sm90::barrier_init(&k_full[stage], 1);
      sm90::barrier_init(&k_empty[stage], kWarps);
      sm90::barrier_init(&v_full[stage], 1);
      sm90::barrier_init(&v_empty[stage], kWarps + Shape::kCheckers);
      sm90::barrier_init(&v_checked[stage], Shape::kCheckers);
    }
  }
};

template <typename Shape>
struct SharedPlan {
  StreamShared<Shape> streams[Shape::kStreams];
};

// A place in a ring of stages; the parity is that of the phase in which the stage gets full.
template <int kStages>
struct RingPlace {
  uint32_t stage = 0, parity = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct AttendSm90Params {
  sm90::TensorMap q_map, k_map, v_map, out_map;
  sm90::TensorMap k_mean_map, v_mean_map;  // with a mean correction
  DeviceProblem problem;
  DeviceRows rows;
  WorkOrder order;
  TokenMask mask;
  // Scores are multiplied by scores_scale where it is not 1 (a softmax scale that is not
  // positive), then weights are 2^(scale_log2 * score).
  float scores_scale, scale_log2;
  float mean_bias;              // log2(block size), over scale_log2
  int32_t kv_box_rows;          // keys that one load brings
  int32_t q_packed, kv_packed;  // no dimension of sequences
};

// Whether some row of a tile of queries does not see all of a tile's keys.
template <typename Shape>
__device__ inline bool is_masked(const TokenMask& mask, int32_t first_position, int32_t first_key) {
  return !mask.all_seen(first_position, first_position + Shape::kTileQ - 1, first_key,
                        first_key + Shape::kTileKv - 1);
}

// One arrival for the warp, after what all its lanes did.
__device__ inline void warp_arrive(sm90::Barrier* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) sm90::barrier_arrive(barrier);
}

// attend_sm90_kernel.cuh, instantiated in attend_sm90_*.cu.
template <typename Shape>
void launch_attend_sm90(const AttendSm90Params& params, int32_t multiprocessors, void* stream);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_ATTEND_ATTEND_SM90_PLAN_CUH_

// The probe of select on Hopper: what the host, the loading warps and the warpgroups that compute
// agree on.
#ifndef FLEXPREFILL_SRC_SELECT_PROBE_SM90_PLAN_CUH_
#define FLEXPREFILL_SRC_SELECT_PROBE_SM90_PLAN_CUH_

#include <cstdint>

#include "cuda/sm90.cuh"
#include "select/select_device.cuh"

namespace flexprefill {

// Kernels: element type and head dim as padded. Head dims up to it run through it; the copy engine
// fills up with zeros.
//
// A CTA has the probes of kHeads query heads of one K/V head in shared memory, so that a tile of
// keys is loaded once for all of them; where that does not divide the heads that the probe looks
// at, the last CTA computes one twice. Each of its kStreams warpgroups, in pass 1 pairs of them,
// walks over a chunk of keys of its own, in tiles of 128; the tiles of all streams go through one
// ring, in turns.
template <typename Element_, int kDim_, int kHeads_>
struct ProbeShape {
  using Element = Element_;
  static constexpr int kDim = kDim_, kHeads = kHeads_;
  static constexpr int kChunks = kDim / sm90::kChunkColumns;
  // Affects speed only: what fits. With one stream pass 2 has nobody to compute while it waits.
  static constexpr int kStreams = kDim <= 128 ? 2 : 1;
  static constexpr int kMostStages = 6;
  static constexpr int kThreads = (kStreams + 1) * sm90::kWarpgroupThreads;
  static constexpr int kStatsThreads = (2 * kStreams + 1) * sm90::kWarpgroupThreads;  // of pass 1
  static constexpr int kTileBytes = 128 * kDim * 2;  // of a probe, or of 128 keys
};

// Who is who in the first warpgroup: warp 0 loads, the others see to block means.
constexpr int kProbePoolWarps = 3;

// Partial diagonals of a stream's 128 probe rows by 128 keys. Warp w holds those of its 32 keys,
// one row for each key number modulo 8: entry t of row x, which belongs to key - row = 32 w + x + t
// - 127, lies at w * kWarp + row_start(x) + t; 32 threads that write together meet 32 banks. Before
// and behind the 152 entries of a row lie zeros: whoever adds up a diagonal reads all 8 rows.
struct ProbeDiagonals {
  static constexpr int kEntries = 152, kRow = 168, kWarp = 8 * kRow + 8;
  static constexpr int kBefore = 7;
  __device__ static int row_start(int x) { return x * kRow + x / 4 + kBefore; }
  float floats[4 * kWarp];
};

// Probes and tiles of keys, in chunks of 64 columns (sm90.cuh).
template <typename Shape, int kStages_>
struct ProbeTiles {
  static constexpr int kStages = kStages_;
  alignas(1024) uint16_t q[Shape::kHeads][128 * Shape::kDim];
  alignas(1024) uint16_t k[kStages][128 * Shape::kDim];
  sm90::Barrier q_full;
  sm90::Barrier k_full[kStages], k_empty[kStages];

  // `readers`: warps that read a tile.
  __device__ void init(uint32_t readers) {
    sm90::barrier_init(&q_full, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      sm90::barrier_init(&k_full[stage], 1);
      sm90::barrier_init(&k_empty[stage], readers);
    }
  }
};

// What pass 2 has beside them.
template <typename Shape>
struct ProbeScoresExtra {
  ProbeDiagonals diagonals[Shape::kStreams];
  float column_sums[Shape::kStreams][2][128];  // [probe's query block]; audits only
  float negative_offset[Shape::kHeads][128];   // log2 of the probabilities of a score of 0
  float mean[Shape::kHeads][256];              // of the probe
  uint32_t dead[Shape::kHeads][4];             // by warp
};

template <typename Shape>
constexpr int probe_stages(size_t other_bytes) {
  constexpr size_t kMostBytes = 232448, kBarrierBytes = 1024;
  const size_t fit = (kMostBytes - kBarrierBytes - other_bytes) / Shape::kTileBytes - Shape::kHeads;
  return static_cast<int>(fit < Shape::kMostStages ? fit : Shape::kMostStages);
}

template <typename Shape>
struct ProbeStatsShared {
  ProbeTiles<Shape, probe_stages<Shape>(0)> tiles;
};
template <typename Shape>
struct ProbeScoresShared {
  ProbeTiles<Shape, probe_stages<Shape>(sizeof(ProbeScoresExtra<Shape>))> tiles;
  ProbeScoresExtra<Shape> extra;
};

struct ProbeSm90Params {
  sm90::TensorMap q_map, k_map;
  SelectProblem select;
  // Scores are multiplied by scores_scale where it is not 1 (a softmax scale that is not positive);
  // then they count scale_log2 units of log2 each.
  float scores_scale, scale_log2;
  int32_t box_rows;             // keys that one load brings
  int32_t q_packed, kv_packed;  // no dimension of sequences
  int32_t slices;               // CTAs with the query heads of a K/V head
};

// What one CTA does.
template <typename Shape>
struct ProbeSm90Task {
  int32_t sequence, kv, slice;  // of the group
  int32_t first_chunk;
  int32_t heads;  // of kHeads; after them comes the last one again
  int32_t own[Shape::kHeads];
  bool any;

  __device__ explicit ProbeSm90Task(const ProbeSm90Params& params) {
    const SelectProblem& select = params.select;
    const DeviceProblem& problem = select.problem;
    const int32_t sets = (select.max_chunks + Shape::kStreams - 1) / Shape::kStreams;
    auto x = static_cast<int32_t>(blockIdx.x);
    slice = x % params.slices;  // neighbours read the same keys
    x /= params.slices;
    first_chunk = x % sets * Shape::kStreams;
    x /= sets;
    kv = x % problem.h_kv;
    sequence = x / problem.h_kv;
    const SelectSequence& plan = select.sequences[sequence];
    heads = -slice * Shape::kHeads;
#pragma unroll 1  // unrolled it spills
    for (int32_t g = 0; g < problem.group() && heads < Shape::kHeads; ++g) {
      const int32_t head = problem.q_head(kv, g);
      if (!select.asks_probe(head)) continue;
#pragma unroll
      for (int32_t h = 0; h < Shape::kHeads; ++h) own[h] = h >= heads ? head : own[h];
      ++heads;
    }
    any = plan.probed != 0 && first_chunk < plan.chunks && heads > 0;
  }
  __device__ int32_t head(int32_t h) const {
    int32_t found = own[0];
#pragma unroll
    for (int32_t i = 1; i < Shape::kHeads; ++i) found = h == i ? own[i] : found;
    return found;
  }
};

// A stream's chunk of keys.
struct ProbeChunk {
  int32_t begin, end, tiles;  // keys

  __device__ ProbeChunk(const SelectProblem& select, int32_t sequence, int32_t chunk) {
    const int64_t s_kv = select.problem.sequences[sequence].s_kv;
    const int64_t first = static_cast<int64_t>(chunk) * select.chunk_keys;
    const int64_t last = first + select.chunk_keys < s_kv ? first + select.chunk_keys : s_kv;
    begin = static_cast<int32_t>(first < s_kv ? first : s_kv);
    end = static_cast<int32_t>(last);
    tiles = (max(end - begin, 0) + 127) / 128;
  }
};

// The order in which the streams' tiles go through the ring: in turns, as long as a stream has
// some.
template <typename Shape, int kStages>
struct ProbeRing {
  int32_t tiles[Shape::kStreams];

  __device__ ProbeRing(const SelectProblem& select, const ProbeSm90Task<Shape>& task) {
#pragma unroll
    for (int s = 0; s < Shape::kStreams; ++s) {
      tiles[s] = ProbeChunk(select, task.sequence, task.first_chunk + s).tiles;
    }
  }
  // Of tile i of a stream.
  __device__ uint32_t place(int32_t stream, int32_t i) const {
    int32_t before = 0;
#pragma unroll
    for (int s = 0; s < Shape::kStreams; ++s) before += min(i + (s < stream ? 1 : 0), tiles[s]);
    return static_cast<uint32_t>(before);
  }
  __device__ static uint32_t stage(uint32_t place) { return place % kStages; }
  // The parity of the phase in which the stage gets full.
  __device__ static uint32_t parity(uint32_t place) { return place / kStages & 1; }

  // f(stream, tile of the stream, place) in the ring's order.
  template <typename F>
  __device__ void for_each(const F& f) const {
    int32_t most = 0;
#pragma unroll
    for (int s = 0; s < Shape::kStreams; ++s) most = max(most, tiles[s]);
    uint32_t place = 0;
#pragma unroll 1
    for (int32_t i = 0; i < most; ++i) {
#pragma unroll 1
      for (int32_t s = 0; s < Shape::kStreams; ++s) {
        if (i < (s == 0 ? tiles[0] : tiles[Shape::kStreams - 1])) f(s, i, place++);
      }
    }
  }
};

// One arrival for the warp, after what all its lanes did.
__device__ inline void probe_arrive(sm90::Barrier* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) sm90::barrier_arrive(barrier);
}

// probe_sm90_kernel.cuh, instantiated in probe_sm90_*.cu.
template <typename Shape>
void launch_probe_sm90(const ProbeSm90Params& params, uint32_t ctas, void* stream);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_PROBE_SM90_PLAN_CUH_

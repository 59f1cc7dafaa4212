// attend on Hopper, the kernel: a persistent CTA of two warpgroups that compute and one that loads.
//
//   warp 0 (and 1: a second stream)   draws rows of work, loads Q, and K and V tiles through a ring
//   warps 2 and 3                     check masked tiles of V
//   two warpgroups, 64 rows each      S = Q K^T, P = weights of S, O += P V
//
// S of the next tile is started before O of this one and both run while nothing waits for them; the
// softmax of S overlaps O's product, and, as the warpgroups of a stream take turns in starting
// their products, the products of the other warpgroup.
#ifndef FLEXPREFILL_SRC_ATTEND_ATTEND_SM90_KERNEL_CUH_
#define FLEXPREFILL_SRC_ATTEND_ATTEND_SM90_KERNEL_CUH_

#include <algorithm>
#include <cstdint>

#include "attend/attend_sm90_load.cuh"
#include "attend/attend_sm90_not_finite.cuh"
#include "attend/attend_sm90_plan.cuh"
#include "attend/softmax.cuh"

namespace flexprefill {

// One warpgroup's 64 rows of each row of work of its stream. Fragments are laid out as sm90.cuh
// says: a thread has rows row_ and row_ + 8.
template <typename Shape>
class Computer {
 public:
  using Element = typename Shape::Element;

  __device__ Computer(const AttendSm90Params& params, StreamShared<Shape>& shared, int warpgroup)
      : params_(params),
        shared_(shared),
        warpgroup_(warpgroup),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        row_(warpgroup * 64 + static_cast<int32_t>(threadIdx.x) % 128 / 32 * 16 + lane_ / 4),
        q_(sm90::wgmma_descriptor(shared.q + warpgroup * 64 * sm90::kChunkColumns, 16, kRows8)),
        k_(sm90::wgmma_descriptor(shared.k, 16, kRows8)),
        v_(sm90::wgmma_descriptor(shared.v, Shape::kTileKv * sm90::kChunkRowBytes, kRows8)) {}

  __device__ void run() {
    if (kTurns && warpgroup_ == 1) sm90::named_barrier_arrive(kTurnOf0, kTurnThreads);
    for (uint32_t n = 0;; ++n) {
      sm90::barrier_wait(&shared_.q_full[warpgroup_], n & 1);
      const WorkTile& work = shared_.work[n % WorkTile::kSlots];
      const int32_t tiles = work.tiles;
      if (tiles == WorkTile::kNoWork) break;
      softmax_.reset();
      not_finite_ = false;
#pragma unroll
      for (float& element : o_) element = 0;
      if (tiles == 0) {
        warp_arrive(&shared_.q_empty[warpgroup_]);
      } else {
        attend_row(work, tiles);
      }
      store(work);
      if (not_finite_) RareRow<Shape>(params_, work).add_not_finite(row_ - lane_ / 4);
    }
    // The other warpgroup's last arrival.
    if (kTurns && warpgroup_ == 0) sm90::named_barrier_sync(kTurnOf0, kTurnThreads);
  }

 private:
  static constexpr bool kTurns = Shape::kWarpgroups == 2;
  static constexpr int kTurnOf0 = 1, kTurnThreads = 256;
  static constexpr uint32_t kRows8 = 8 * sm90::kChunkRowBytes;  // bytes of 8 rows of a chunk

  __device__ void attend_row(const WorkTile& work, int32_t tiles) {
    float s[Shape::kTileKv / 2];
    uint32_t p[Shape::kTileKv / 4];
    float rescale[2];

    sm90::barrier_wait(&shared_.k_full[ring_.stage], ring_.parity);
    KeyTile tile = shared_.key_tile[ring_.stage];
    start_scores(s, ring_.stage);
    sm90::wgmma_wait<0>();
    sm90::wgmma_pin(s);
    warp_arrive(&shared_.k_empty[ring_.stage]);
    if (tiles == 1) warp_arrive(&shared_.q_empty[warpgroup_]);
    weigh(s, work, tile, rescale);
    pack(s, p);

#pragma unroll 1
    for (int32_t i = 1; i < tiles; ++i) {
      const RingPlace<Shape::kStages> values = ring_;
      ring_.advance();
      if (tile.masked) await_checked(values.stage);
      sm90::barrier_wait(&shared_.k_full[ring_.stage], ring_.parity);
      tile = shared_.key_tile[ring_.stage];
      if (kTurns) sm90::named_barrier_sync(kTurnOf0 + warpgroup_, kTurnThreads);
      start_scores(s, ring_.stage);
      sm90::barrier_wait(&shared_.v_full[values.stage], values.parity);
      start_output(p, values.stage);
      if (kTurns) sm90::named_barrier_arrive(kTurnOf0 + (warpgroup_ ^ 1), kTurnThreads);
      sm90::wgmma_wait<1>();
      sm90::wgmma_pin(s);
      warp_arrive(&shared_.k_empty[ring_.stage]);
      if (i + 1 == tiles) warp_arrive(&shared_.q_empty[warpgroup_]);
      const bool moved = weigh(s, work, tile, rescale);
      sm90::wgmma_pin(s);
      // That phase is over; but unless a branch needs the sums, which are never negative, ptxas
      // moves the exponentials behind the wait for the product that they should overlap.
      const uint32_t negative = softmax_.sum[0] + softmax_.sum[1] < 0 ? 1 : 0;
      sm90::barrier_wait(&shared_.v_full[values.stage], values.parity ^ negative);
      sm90::wgmma_wait<0>();
      sm90::wgmma_pin(o_);
      warp_arrive(&shared_.v_empty[values.stage]);
      if (moved) {
#pragma unroll
        for (int e = 0; e < Shape::kDimV / 2; ++e) o_[e] *= rescale[e / 2 % 2];
      }
      pack(s, p);
    }

    if (tile.masked) await_checked(ring_.stage);
    sm90::barrier_wait(&shared_.v_full[ring_.stage], ring_.parity);
    start_output(p, ring_.stage);
    sm90::wgmma_wait<0>();
    sm90::wgmma_pin(o_);
    warp_arrive(&shared_.v_empty[ring_.stage]);
    ring_.advance();
  }

  // s [64, kTileKv] = q [64, kDimQk] k^T
  __device__ void start_scores(float (&s)[Shape::kTileKv / 2], uint32_t stage) {
    const uint64_t k = sm90::wgmma_descriptor_at(k_, stage * (Shape::kTileKv * Shape::kDimQk * 2));
    uint64_t q[1] = {q_};
    sm90::wgmma_pin(q);
    sm90::wgmma_pin(s);
    sm90::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Shape::kDimQk / 16; ++step) {
      const int chunk = step / 4, bytes = step % 4 * 32;
      sm90::wgmma_ss<Element, Shape::kTileKv>(
          s, sm90::wgmma_descriptor_at(q[0], chunk * Shape::kTileQ * sm90::kChunkRowBytes + bytes),
          sm90::wgmma_descriptor_at(k, chunk * Shape::kTileKv * sm90::kChunkRowBytes + bytes),
          step > 0);
    }
    sm90::wgmma_commit();
    sm90::wgmma_pin(s);
  }

  // o [64, kDimV] += p [64, kTileKv] v
  __device__ void start_output(uint32_t (&p)[Shape::kTileKv / 4], uint32_t stage) {
    const uint64_t v = sm90::wgmma_descriptor_at(v_, stage * (Shape::kTileKv * Shape::kDimV * 2));
    sm90::wgmma_pin(o_);
    sm90::wgmma_pin(p);
    sm90::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Shape::kTileKv / 16; ++step) {
      sm90::wgmma_rs<Element, Shape::kDimV>(o_, p + 4 * step,
                                            sm90::wgmma_descriptor_at(v, step * 2 * kRows8), true);
    }
    sm90::wgmma_commit();
    sm90::wgmma_pin(o_);
  }

  __device__ bool weigh(float (&s)[Shape::kTileKv / 2], const WorkTile& work, const KeyTile& tile,
                        float (&rescale)[2]) {
    if (params_.scores_scale != 1) {
#pragma unroll
      for (float& score : s) score *= params_.scores_scale;
    }
    if (tile.masked) mask(s, work, tile.first_key);
    return softmax_.weigh(s, params_.scale_log2, rescale);
  }

  // Scores of keys that a row does not see become -inf. Key x, counted from this thread's first
  // column, is seen if x <= last and (x < global or x >= local).
  __device__ void mask(float (&s)[Shape::kTileKv / 2], const WorkTile& work, int32_t first_key) {
    const int32_t first_column = first_key + 2 * (lane_ % 4);
    const int32_t global = params_.mask.global_window - first_column;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t query = work.first_position + row_ + 8 * r;
      const int32_t last = min(query, work.s_kv - 1) - first_column;
      const int32_t local = query - params_.mask.local_window + 1 - first_column;
#pragma unroll
      for (int x = 0; x < Shape::kTileKv; x += 8) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = s[x / 2 + 2 * r + e];
          const bool seen = x + e <= last && (x + e < global || x + e >= local);
          score = seen ? score : -INFINITY;
        }
      }
    }
  }

  // The layout of s is that of the left operand of the next product.
  __device__ static void pack(const float (&s)[Shape::kTileKv / 2],
                              uint32_t (&p)[Shape::kTileKv / 4]) {
#pragma unroll
    for (int i = 0; i < Shape::kTileKv / 4; ++i) {
      p[i] = pack_pair<Element>(s[2 * i], s[2 * i + 1]);
    }
  }

  // Until a masked tile of V was checked.
  __device__ void await_checked(uint32_t stage) {
    sm90::barrier_wait(&shared_.v_checked[stage], checked_ >> stage & 1);
    checked_ ^= 1u << stage;
#pragma unroll
    for (int warp = 0; warp < Shape::kCheckers; ++warp) {
      not_finite_ |= shared_.not_finite[stage][warp];
    }
  }

  // o / sum and lse to the rows that exist.
  __device__ void store(const WorkTile& work) {
    softmax_.finish();
    const DeviceProblem& problem = params_.problem;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t row = row_ + 8 * r;
      const bool exists = row >= work.row_begin && row < work.row_end;
      float inverse = 1 / softmax_.sum[r];
      float lse = softmax_.lse(r, params_.scale_log2);
      // No weight at all: a query that sees no key gives 0, one whose scores are all -inf NaN.
      if (exists && softmax_.sum[r] == 0) {
        const bool nothing = !RareRow<Shape>(params_, work).sees_any_key(work.first_position + row);
        inverse = nothing ? 0.0f : NAN;
        lse = nothing ? -INFINITY : NAN;
      }
      if (exists && work.lse != nullptr && lane_ % 4 == 0) work.lse[row] = lse;
      auto* out = reinterpret_cast<uint16_t*>(work.out) + row * problem.out.row_stride;
#pragma unroll
      for (int g = 0; g < Shape::kDimV / 8; g += 4) {
        // The quad's four lanes hold two columns each of four groups of eight; each gets a group.
        uint32_t part[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          part[i] = pack_pair<Element>(o_[4 * (g + i) + 2 * r] * inverse,
                                       o_[4 * (g + i) + 2 * r + 1] * inverse);
        }
        transpose_quad(part);
        const int32_t column = 8 * (g + lane_ % 4);
        if (exists && column < problem.d_v) {
          *reinterpret_cast<uint4*>(out + column) = {part[0], part[1], part[2], part[3]};
        }
      }
    }
  }

  // Lane l of the quad gets part[l] of lanes 0 to 3.
  __device__ void transpose_quad(uint32_t (&part)[4]) const {
#pragma unroll
    for (int step = 1; step <= 2; step *= 2) {
      const bool upper = (lane_ & step) != 0;
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const int low = step == 1 ? 2 * pair : pair, high = low + step;
        const uint32_t received = __shfl_xor_sync(0xffffffff, upper ? part[low] : part[high], step);
        (upper ? part[low] : part[high]) = received;
      }
    }
  }

  const AttendSm90Params& params_;
  StreamShared<Shape>& shared_;
  const int warpgroup_;  // of the stream
  const int32_t lane_, row_;
  const uint64_t q_, k_, v_;  // descriptors: this warpgroup's Q, stage 0 of K and V
  RingPlace<Shape::kStages> ring_;
  uint32_t checked_ = 0;     // parities of v_checked by stage
  bool not_finite_ = false;  // the row of work has something to add in the end
  OnlineSoftmax softmax_;
  float o_[Shape::kDimV / 2];
};

template <typename Shape>
__global__ void __launch_bounds__(kAttendThreads, 1)
    attend_sm90_kernel(const __grid_constant__ AttendSm90Params params) {
  auto& shared = *reinterpret_cast<SharedPlan<Shape>*>(shared_memory());
  const int warp = static_cast<int>(threadIdx.x) / 32, warpgroup = warp / 4;
  if (threadIdx.x == 0) {
    for (StreamShared<Shape>& stream : shared.streams) stream.init();
    sm90::barrier_init_fence();
    sm90::tma_prefetch_map(&params.q_map);
    sm90::tma_prefetch_map(&params.k_map);
    sm90::tma_prefetch_map(&params.v_map);
  }
  __syncthreads();
  // 24 + 2 * 240 registers are what the CTA starts with.
  if (warpgroup == 0) {
    sm90::registers_shrink<56>();
    if (warp < Shape::kStreams) {
      Loader<Shape>(params, shared.streams[warp]).run(warp);
    } else if (warp >= 2) {
      const int checker = warp - 2;
      Checker<Shape>(shared.streams[checker / Shape::kCheckers], checker % Shape::kCheckers).run();
    }
  } else {
    sm90::registers_grow<224>();
    const int computer = warpgroup - 1;
    Computer<Shape>(params, shared.streams[computer / Shape::kWarpgroups],
                    computer % Shape::kWarpgroups)
        .run();
  }
}

template <typename Shape>
void launch_attend_sm90(const AttendSm90Params& params, int32_t multiprocessors, void* stream) {
  static_assert(sizeof(SharedPlan<Shape>) <= 232448);
  const uint32_t ctas = std::min<uint32_t>(
      multiprocessors, (params.order.count + Shape::kStreams - 1) / Shape::kStreams);
  launch(attend_sm90_kernel<Shape>, dim3(ctas), dim3(kAttendThreads), sizeof(SharedPlan<Shape>),
         stream, params);
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_ATTEND_ATTEND_SM90_KERNEL_CUH_

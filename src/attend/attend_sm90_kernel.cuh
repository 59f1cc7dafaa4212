// attend on Hopper, the kernel: a persistent CTA of two warpgroups that compute and one that loads.
//
//   warp 0 (and 1: a second stream)   draws rows of work, loads Q, and K and V tiles through a ring
//   warps 2 and 3                     check masked tiles of V
//   two warpgroups, 64 rows each      S = Q K^T, P = weights of S, O += P V
//
// S of the next tile is started before O of this one and both run while nothing waits for them; the
// softmax of S overlaps O's product, and, as the warpgroups of a stream take turns in starting
// their products, the products of the other warpgroup. The tensor cores are busy all the time if
// the other warpgroup's products take as long as everything between two turns of this one, so that
// is kept short: most tiles need no mask, no maximum over a row and no rescaling. Where Q is in
// registers, the next row's first S is started with the last O of a row as well, and the output
// leaves by TMA from where Q was.
#ifndef FLEXPREFILL_SRC_ATTEND_ATTEND_SM90_KERNEL_CUH_
#define FLEXPREFILL_SRC_ATTEND_ATTEND_SM90_KERNEL_CUH_

#include <algorithm>
#include <cstdint>

#include "attend/attend_sm90_load.cuh"
#include "attend/attend_sm90_not_finite.cuh"
#include "attend/attend_sm90_plan.cuh"
#include "attend/softmax.cuh"
#include "cuda/sm80.cuh"

namespace flexprefill {

// One warpgroup's 64 rows of each row of work of its stream. Fragments are laid out as sm90.cuh
// says: lane l of a warp has its rows l / 4 and l / 4 + 8.
template <typename Shape>
class Computer {
 public:
  using Element = typename Shape::Element;

  __device__ Computer(const AttendSm90Params& params, StreamShared<Shape>& shared, int warpgroup)
      : params_(params),
        shared_(shared),
        q_(sm90::wgmma_descriptor(shared.q + warpgroup * 64 * sm90::kChunkColumns, 16, kRows8)),
        k_(sm90::wgmma_descriptor(shared.k, 16, kRows8)),
        v_(sm90::wgmma_descriptor(shared.v, Shape::kTileKv * sm90::kChunkRowBytes, kRows8)) {}

  __device__ void run() {
    float s[Shape::kTileKv / 2];
    uint32_t p[Shape::kTileKv / 4];
    if (kTurns && warpgroup() == 1) sm90::named_barrier_arrive(kTurnOf0, kTurnThreads);
    for (Row row = take_row(); row != Row::kNone;) {
      softmax_.reset();
      not_finite_ = false;
#pragma unroll
      for (float& element : o_) element = 0;
      if (row == Row::kEmpty) {  // its queries see nothing
        release_queries();
        store_rare(taken());
        row = take_row();
        continue;
      }
      if (row == Row::kTaken) first_scores(s);
      attend_tiles(s, p);
      row = finish_row(s, p);
    }
    sm90::tma_store_wait_read();
    // The other warpgroup's last arrival.
    if (kTurns && warpgroup() == 0) sm90::named_barrier_sync(kTurnOf0, kTurnThreads);
  }

 private:
  static constexpr bool kTurns = Shape::kWarpgroups == 2;
  static constexpr int kTurnOf0 = 1, kTurnThreads = 256;
  static constexpr uint32_t kRows8 = 8 * sm90::kChunkRowBytes;  // bytes of 8 rows of a chunk

  // What a row is when it is begun: kEmpty has no tiles, kStarted has its first scores already.
  enum class Row { kNone, kEmpty, kTaken, kStarted };

  // x, which all threads of a warp have alike, so that the compiler knows. What follows from it
  // (loops, descriptors) then needs no register of each thread.
  template <typename T>
  __device__ static T uniform(T x) {
    return __shfl_sync(0xffffffff, x, 0);
  }

  // Found anew each time: registers are few.
  __device__ static int32_t lane() { return fresh_thread() % 32; }
  // Of the stream. The first warpgroup of the CTA computes nothing.
  __device__ static int32_t warpgroup() {
    return Shape::kWarpgroups == 1 ? 0 : fresh_thread() / sm90::kWarpgroupThreads - 1;
  }
  // Of the warp's 16 rows, in the tile.
  __device__ static int32_t first_row() {
    return warpgroup() * 64 + fresh_thread() % sm90::kWarpgroupThreads / 32 * 16;
  }

  __device__ void take_turn() const {
    if (kTurns) sm90::named_barrier_sync(kTurnOf0 + warpgroup(), kTurnThreads);
  }
  __device__ void pass_turn() const {
    if (kTurns) sm90::named_barrier_arrive(kTurnOf0 + (warpgroup() ^ 1), kTurnThreads);
  }

  // The row that was taken last.
  __device__ const WorkTile& taken() const { return shared_.work[(rows_ - 1) % WorkTile::kSlots]; }
  // The next row, its Q in registers or in shared memory.
  __device__ Row take_row() {
    sm90::barrier_wait(&shared_.q_full[warpgroup()], rows_ & 1);
    ++rows_;
    const int32_t tiles = uniform(taken().tiles);
    if (tiles == WorkTile::kNoWork) return Row::kNone;
    if constexpr (Shape::kQInRegisters) {
      if (tiles > 0) load_queries();
    }
    return tiles == 0 ? Row::kEmpty : Row::kTaken;
  }
  // The taken row needs Q's place no more, and the output of the row before has left it.
  __device__ void release_queries() {
    sm90::tma_store_wait_read();
    warp_arrive(&shared_.q_empty[warpgroup()]);
  }

  // Where matrices of the warp's rows in Q's place are, for ldmatrix and stmatrix. Units of 16
  // bytes are swizzled: unit u of a row lies at u ^ (row % 8).
  __device__ uint32_t first_unit() const {
    const uint32_t row = first_row() + lane() % 16;
    return sm90::shared_address(shared_.q) + row * sm90::kChunkRowBytes +
           (lane() / 16 ^ row % 8) * 16;
  }
  __device__ static uint32_t unit_of_step(uint32_t first, uint32_t step) {  // of 16 columns
    return (first ^ step % 4 * 32) + step / 4 * (Shape::kTileQ * sm90::kChunkRowBytes);
  }

  // Fragments of the left operand: step i has columns 16 i to 16 i + 15 of this warp's rows.
  __device__ void load_queries() {
    const uint32_t first = first_unit();
#pragma unroll
    for (uint32_t step = 0; step < Shape::kDimQk / 16; ++step) {
      uint32_t fragment[4];
      ldmatrix_x4(fragment, unit_of_step(first, step));
#pragma unroll
      for (int i = 0; i < 4; ++i) queries_[4 * step + i] = fragment[i];
    }
  }

  __device__ void await_keys() { sm90::barrier_wait(&shared_.k_full[ring_.stage], ring_.parity); }

  // A row's first scores, with nothing to start together with them.
  __device__ void first_scores(float (&s)[Shape::kTileKv / 2]) {
    await_keys();
    take_turn();
    start_scores(s, ring_.stage);
    pass_turn();
    sm90::wgmma_wait<0>();
    sm90::wgmma_pin(s);
  }
  __device__ void release_keys(bool last_of_row) {
    warp_arrive(&shared_.k_empty[ring_.stage]);
    if (!Shape::kQInRegisters && last_of_row) warp_arrive(&shared_.q_empty[warpgroup()]);
  }

  // The row from its first scores on: all products but the last with V.
  __device__ void attend_tiles(float (&s)[Shape::kTileKv / 2], uint32_t (&p)[Shape::kTileKv / 4]) {
    const WorkTile& work = taken();
    const int32_t tiles = uniform(work.tiles), plain_tiles = uniform(work.plain_tiles);
    if (plain_tiles == 0) change_scores(s, work);
    release_keys(tiles == 1);
    float rescale[2];
    softmax_.follow(s, params_.scale_log2, rescale);
    softmax_.weigh(s, params_.scale_log2);
    pack(s, p);
    if (Shape::kQInRegisters) release_queries();
    int32_t i = 1;
#pragma unroll 1
    for (; i < plain_tiles; ++i) next_tile<true>(s, p, work, false);
#pragma unroll 1
    for (; i < tiles; ++i) next_tile<false>(s, p, work, i + 1 == tiles);
  }

  // From the weights of one tile to those of the next.
  template <bool kPlain>
  __device__ void next_tile(float (&s)[Shape::kTileKv / 2], uint32_t (&p)[Shape::kTileKv / 4],
                            const WorkTile& work, bool last) {
    const RingPlace<Shape::kStages> values = ring_;
    ring_.advance();
    const uint32_t keys_stage = uniform(ring_.stage), values_stage = uniform(values.stage);
    await_keys();
    if (!kPlain) await_checked(values);
    take_turn();
    start_scores(s, keys_stage);
    if (kPlain) sm90::barrier_wait(&shared_.v_full[values.stage], values.parity);
    start_output(p, values_stage);
    pass_turn();
    sm90::wgmma_wait<1>();
    sm90::wgmma_pin(s);
    if (!kPlain) change_scores(s, work);
    release_keys(last);
    float rescale[2];
    const bool moved = softmax_.follow(s, params_.scale_log2, rescale);
    // Here and not in the branch: the warps of a warpgroup wait together or not at all, and each
    // decides for itself whether its offset moved. Not after the exponentials: packing then
    // overlaps with them, which is worth the wait.
    sm90::wgmma_wait<0>();
    sm90::wgmma_pin(o_);
    warp_arrive(&shared_.v_empty[values.stage]);
    if (moved) {
#pragma unroll
      for (int e = 0; e < Shape::kDimV / 2; ++e) o_[e] *= rescale[e / 2 % 2];
    }
    softmax_.weigh(s, params_.scale_log2);
    pack(s, p);
  }

  // The last product of the taken row, and its output. Takes the next row and returns it.
  __device__ Row finish_row(float (&s)[Shape::kTileKv / 2], uint32_t (&p)[Shape::kTileKv / 4]) {
    const WorkTile& work = taken();
    const RingPlace<Shape::kStages> values = ring_;
    ring_.advance();
    Row next = Row::kNone;
    if (Shape::kQInRegisters) next = take_row();
    if (next == Row::kTaken) {
      await_keys();
      await_checked(values);
      take_turn();
      start_scores(s, ring_.stage);
      last_output(p, values);
      sm90::wgmma_pin(s);
      next = Row::kStarted;
    } else {
      await_checked(values);
      take_turn();
      last_output(p, values);
    }
    store(work);
    return Shape::kQInRegisters ? next : take_row();
  }

  // Waits for the product as well.
  __device__ void last_output(uint32_t (&p)[Shape::kTileKv / 4],
                              const RingPlace<Shape::kStages>& values) {
    start_output(p, values.stage);
    pass_turn();
    sm90::wgmma_wait<0>();
    sm90::wgmma_pin(o_);
    warp_arrive(&shared_.v_empty[values.stage]);
  }

  // s [64, kTileKv] = q [64, kDimQk] k^T
  __device__ void start_scores(float (&s)[Shape::kTileKv / 2], uint32_t stage) {
    const uint64_t k = sm90::wgmma_descriptor_at(k_, stage * (Shape::kTileKv * Shape::kDimQk * 2));
    uint64_t q[1] = {q_};
    if constexpr (Shape::kQInRegisters) {
      sm90::wgmma_pin(queries_);
    } else {
      sm90::wgmma_pin(q);
    }
    sm90::wgmma_pin(s);
    sm90::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Shape::kDimQk / 16; ++step) {
      const int chunk = step / 4, bytes = step % 4 * 32;
      const uint64_t keys =
          sm90::wgmma_descriptor_at(k, chunk * Shape::kTileKv * sm90::kChunkRowBytes + bytes);
      if constexpr (Shape::kQInRegisters) {
        sm90::wgmma_rs<Element, Shape::kTileKv>(s, queries_ + 4 * step, keys, step > 0);
      } else {
        const uint64_t rows =
            sm90::wgmma_descriptor_at(q[0], chunk * Shape::kTileQ * sm90::kChunkRowBytes + bytes);
        sm90::wgmma_ss<Element, Shape::kTileKv>(s, rows, keys, step > 0);
      }
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
      sm90::wgmma_rs_mn<Element, Shape::kDimV>(
          o_, p + 4 * step, sm90::wgmma_descriptor_at(v, step * 2 * kRows8), true);
    }
    sm90::wgmma_commit();
    sm90::wgmma_pin(o_);
  }

  __device__ void change_scores(float (&s)[Shape::kTileKv / 2], const WorkTile& work) const {
    if (params_.scores_scale != 1) {
#pragma unroll
      for (float& score : s) score *= params_.scores_scale;
    }
    const KeyTile& tile = shared_.key_tile[ring_.stage];
    if (tile.kind == TileKind::kPlain) return;
    if (tile.kind == TileKind::kMasked) {
      mask(s, work, tile.first_key);
    } else {
      weigh_means(s, tile);
    }
  }

  // Scores of keys that a row does not see become -inf.
  __device__ void mask(float (&s)[Shape::kTileKv / 2], const WorkTile& work,
                       int32_t first_key) const {
    if (params_.mask.windowed()) {
      mask_by<true>(s, work, first_key);
    } else {
      mask_by<false>(s, work, first_key);
    }
  }
  // Key x, counted from this thread's first column, is seen if x <= last and (x < global or
  // x >= local).
  template <bool kWindowed>
  __device__ void mask_by(float (&s)[Shape::kTileKv / 2], const WorkTile& work,
                          int32_t first_key) const {
    const int32_t own_row = first_row() + lane() / 4;
    const int32_t first_column = first_key + 2 * (lane() % 4);
    const int32_t global = params_.mask.global_window - first_column;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t query = work.first_position + own_row + 8 * r;
      const int32_t last = min(query, work.s_kv - 1) - first_column;
      const int32_t local = query - params_.mask.local_window + 1 - first_column;
#pragma unroll
      for (int x = 0; x < Shape::kTileKv; x += 8) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = s[x / 2 + 2 * r + e];
          const bool seen = x + e <= last && (!kWindowed || x + e < global || x + e >= local);
          score = seen ? score : -INFINITY;
        }
      }
    }
  }

  // A block that was dropped counts as many times as it has keys.
  __device__ void weigh_means(float (&s)[Shape::kTileKv / 2], const KeyTile& tile) const {
    const auto* words = reinterpret_cast<const uint32_t*>(tile.dropped);
    const int32_t column = 2 * (lane() % 4);
#pragma unroll
    for (int x = 0; x < Shape::kTileKv; x += 8) {
      const uint32_t dropped = words[x / 32] >> column;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool counts = (dropped >> (x % 32 + e) & 1) != 0;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float& score = s[x / 2 + 2 * r + e];
          score = counts ? score + params_.mean_bias : -INFINITY;
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

  // Until a tile of V is there, and was checked if it is masked.
  __device__ void await_checked(const RingPlace<Shape::kStages>& values) {
    sm90::barrier_wait(&shared_.v_full[values.stage], values.parity);
    if (shared_.value_tile[values.stage].kind == TileKind::kPlain) return;
    sm90::barrier_wait(&shared_.v_checked[values.stage], values.parity);
#pragma unroll
    for (int warp = 0; warp < Shape::kCheckers; ++warp) {
      not_finite_ |= shared_.not_finite[values.stage][warp];
    }
  }

  // o / sum and lse to the rows that exist. What is seldom comes after o_ is out of its registers.
  __device__ void store(const WorkTile& work) {
    softmax_.finish();
    if (work.lse != nullptr && lane() % 4 == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int32_t row = first_row() + lane() / 4 + 8 * r;
        if (row < work.row_begin || row >= work.row_end) continue;
        work.lse[row] = softmax_.lse(r, params_.scale_log2);
      }
    }
    if constexpr (Shape::kQInRegisters) {
      store_through_shared(work);
    } else {
      store_by_quads(work);
    }
    __syncwarp();
    store_rare(work);
  }
  __device__ void store_rare(const WorkTile& work) const {
    if (weightless(0) || weightless(1)) {
      const RareRow<Shape> rare(params_, work);
#pragma unroll 1
      for (int r = 0; r < 2; ++r) {
        const bool without = r == 0 ? weightless(0) : weightless(1);
        if (without) rare.store_weightless(first_row() + lane() / 4 + 8 * r);
      }
    }
    if (not_finite_) RareRow<Shape>(params_, work).add_not_finite(first_row());
  }

  // After softmax_.finish().
  __device__ bool weightless(int r) const { return softmax_.sum[r] == 0; }

  // Elements 4 g + 2 r and the next of o / sum.
  __device__ uint32_t output_pair(int g, int r, float inverse) const {
    return pack_pair<Element>(o_[4 * g + 2 * r] * inverse, o_[4 * g + 2 * r + 1] * inverse);
  }

  // A warp's 16 rows go to where its own rows of Q were, in the same layout, and TMA brings them to
  // memory while the warp goes on: stores by threads wait for their way out. Those remain where
  // some rows do not exist, or what is seldom will change what was stored.
  __device__ void store_through_shared(const WorkTile& work) const {
    static_assert(Shape::kDimV <= Shape::kDimQk);
    const float inverse[2] = {1 / softmax_.sum[0], 1 / softmax_.sum[1]};
    const uint32_t first = first_unit();
#pragma unroll
    for (int step = 0; step < Shape::kDimV / 16; ++step) {
      uint32_t fragment[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        fragment[i] = output_pair(2 * step + i / 2, i % 2, inverse[i % 2]);
      }
      sm90::stmatrix_x4(fragment, unit_of_step(first, step));
    }
    sm90::fence_proxy_async();
    __syncwarp();
    const int32_t lane = this->lane(), first_row = this->first_row();
    uint16_t* const rows = shared_.q + first_row * sm90::kChunkColumns;
    constexpr int kChunk = Shape::kTileQ * sm90::kChunkColumns;
    const bool some = first_row < work.row_begin || first_row + 16 > work.row_end;
    const bool changes = not_finite_ || weightless(0) || weightless(1);
    if (__any_sync(0xffffffff, some || changes ? 1 : 0) == 0) {
      if (lane != 0) return;
#pragma unroll 1
      for (int c = 0; c < Shape::kDimV / sm90::kChunkColumns; ++c) {
        sm90::tma_store(&params_.out_map, rows + c * kChunk, c * sm90::kChunkColumns,
                        work.q_map_row + first_row, work.head, work.q_map_sequence);
      }
      sm90::tma_store_commit();
      return;
    }
    constexpr int32_t kUnits = Shape::kDimV / 8;  // of 16 bytes, of a row
    const int32_t unit = lane % kUnits;
#pragma unroll 1
    for (int32_t row = lane / kUnits; row < 16; row += 32 / kUnits) {
      const int32_t of_tile = first_row + row;
      if (of_tile < work.row_begin || of_tile >= work.row_end) continue;
      if (unit * 8 >= params_.problem.d_v) continue;
      const uint16_t* from =
          rows + unit / 8 * kChunk + row * sm90::kChunkColumns + (unit % 8 ^ row % 8) * 8;
      auto* out = reinterpret_cast<uint16_t*>(work.out) + of_tile * params_.problem.out.row_stride;
      reinterpret_cast<uint4*>(out)[unit] = *reinterpret_cast<const uint4*>(from);
    }
  }

  // Where Q's place is not free. A lane holds two columns of each group of eight; neighbours
  // exchange: one gets four columns of this group and the other four of the next, so that a quad
  // writes 32 bytes in a row. All lanes go the whole way: shuffles of a quad alone would let a
  // warp's quads take turns.
  __device__ void store_by_quads(const WorkTile& work) const {
    const DeviceProblem& problem = params_.problem;
    const int32_t lane = this->lane(), own_row = first_row() + lane / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t row = own_row + 8 * r;
      const bool exists = row >= work.row_begin && row < work.row_end;
      const float inverse = 1 / softmax_.sum[r];
      auto* out = reinterpret_cast<uint16_t*>(work.out) + row * problem.out.row_stride;
#pragma unroll
      for (int g = 0; g < Shape::kDimV / 8; g += 2) {
        const uint32_t own = output_pair(g, r, inverse), next = output_pair(g + 1, r, inverse);
        const bool odd = lane % 2 != 0;
        const uint32_t received = __shfl_xor_sync(0xffffffff, odd ? own : next, 1);
        const int32_t column = 8 * (g + lane % 2) + 2 * (lane & 2);
        if (exists && column < problem.d_v) {
          *reinterpret_cast<uint2*>(out + column) =
              odd ? uint2{received, next} : uint2{own, received};
        }
      }
    }
  }

  const AttendSm90Params& params_;
  StreamShared<Shape>& shared_;
  const uint64_t q_, k_, v_;        // descriptors: this warpgroup's Q, stage 0 of K and V
  RingPlace<Shape::kStages> ring_;  // of the tile whose scores were started last
  uint32_t rows_ = 0;               // taken so far
  bool not_finite_ = false;         // the row has something to add in the end
  OnlineSoftmax softmax_;
  uint32_t queries_[Shape::kQInRegisters ? Shape::kDimQk / 4 : 1];
  float o_[Shape::kDimV / 2];
};

template <typename Shape>
__global__ void __launch_bounds__(kAttendThreads, 1)
    attend_sm90_kernel(const __grid_constant__ AttendSm90Params params) {
  auto& shared = *reinterpret_cast<SharedPlan<Shape>*>(shared_memory());
  // Shuffled so that the compiler knows that a warp's threads stay together (Computer::uniform).
  const int warp = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / 32, 0);
  const int warpgroup = warp / 4;
  if (threadIdx.x == 0) {
    for (StreamShared<Shape>& stream : shared.streams) stream.init();
    sm90::barrier_init_fence();
    sm90::tma_prefetch_map(&params.q_map);
    sm90::tma_prefetch_map(&params.k_map);
    sm90::tma_prefetch_map(&params.v_map);
  }
  __syncthreads();
  await_previous_kernel();
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
  launch_overlapped(attend_sm90_kernel<Shape>, dim3(ctas), dim3(kAttendThreads),
                    sizeof(SharedPlan<Shape>), stream, params);
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_ATTEND_ATTEND_SM90_KERNEL_CUH_

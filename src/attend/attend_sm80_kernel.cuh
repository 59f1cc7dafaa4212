// The kernel of attend_sm80.cu: one CTA computes one row of the index (a query block of a
// head) or a part of it, warps of 16 or 32 query rows side by side.
//
//   shared   Work, Q [rows, d_qk], slots of 64 keys [64, d_qk or d_v]: K, V, K, V, ... of the kept
//            blocks, then, with a mean correction, means of the others: 64 blocks, a word of the
//            row
//   step     wait for the next slot, start the copy into the one that all warps have left, then
//              K: s = q k^T [rows, 64], mask, online softmax, weights w in registers
//              V: o += w v  [rows, d_v]
//
// Rows of a tile in shared memory are kPitch elements apart; their chunks of 16 bytes are swizzled
// (chunk c of row r lies at c ^ (r % 8) of its 128 bytes), so that 8 rows of one chunk meet no bank
// twice.
//
// Tiles that some row does not see whole are masked. There a key that a row does not see may hold a
// NaN in V, which a weight of 0 would not keep out of the row: rows of V that are not finite are
// set to 0 in shared memory and added query by query from global memory.
#ifndef FLEXPREFILL_SRC_ATTEND_ATTEND_SM80_KERNEL_CUH_
#define FLEXPREFILL_SRC_ATTEND_ATTEND_SM80_KERNEL_CUH_

#include <cstddef>
#include <cstdint>
#include <limits>

#include "attend/attend_sm80_work.cuh"
#include "attend/softmax.cuh"
#include "attend/tile_scheduler.cuh"
#include "cuda/device_problem.h"
#include "cuda/launch.cuh"
#include "cuda/sm80.cuh"

namespace flexprefill {
namespace sm80 {

// 16-bit elements as they are. Rows may be aligned to no more than 2 bytes.
__device__ inline uint32_t load_pair(const std::byte* pair) {
  const auto* elements = reinterpret_cast<const uint16_t*>(pair);
  return elements[0] | static_cast<uint32_t>(elements[1]) << 16;
}

// The elements e of an m16n8 tile, of a row of such tiles: values[4 n + e].
template <int kN>
__device__ float (&tile_of(float (&values)[kN], int n))[4] {
  return reinterpret_cast<float (&)[4]>(values[4 * n]);
}

template <typename T, int kDimQk, int kDimV, int kTilesM>
class AttendTile {
  static_assert(kDimQk >= kDimV && kDimV % 64 == 0 && kDimQk % 64 == 0);
  static constexpr int kPitchBytes = 2 * kDimQk;
  static constexpr int kSlotBytes = kTileKv * kPitchBytes;
  static constexpr int kWarpRows = 16 * kTilesM;
  static constexpr int kTilesN = kTileKv / 8;  // of the scores
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

  using Scores = float[kTilesM][kTilesN * 4];
  using Weights = uint32_t[kTilesM][kTileKv / 16][4];

 public:
  __device__ explicit AttendTile(const Parameters& p) : p_(p) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) softmax_[m].reset();
  }

  // Computes the part of `item`'s query block that begins at position `first`.
  __device__ void run(const WorkItem& item, int32_t first) {
    if (warp() == 0) begin_work(p_, item, first);
    __syncthreads();
    copy_q();
    for (int32_t i = 0; i < p_.slots - 1; ++i) start_copy(i, i);
    for (int32_t t = 0, slot = 0;; ++t) {
      wait_for_slot();
      const KeyTile& tile = work().tiles[t % kTilesAhead];
      if (tile.first < 0) break;
      if (warp() == 0) look_ahead(p_, t + 3);
      start_copy(2 * t + p_.slots - 1, slot_before(slot));
      // The number of a word is less than any position in its blocks.
      const bool seen = tile.first <= last_query_of_warp();
      Weights w;
      if (seen) {
        weigh(slots() + slot * kSlotBytes, tile, w);
      } else {
        clear(w);  // else the registers hold what they held in the step before: they cost twice
      }

      wait_for_slot();
      start_copy(2 * t + p_.slots, slot);
      slot = slot_after(slot);
      std::byte* values = slots() + slot * kSlotBytes;
      const uint64_t aside = tile.masked ? set_aside(values) : 0;
      if (seen) {
        accumulate(values, w);
        if (aside != 0) add_aside(aside, tile, w);
      }
      slot = slot_after(slot);
    }
    store();
  }

 private:
  static __device__ int32_t warps() { return static_cast<int32_t>(blockDim.x) / 32; }
  __device__ int32_t slot_after(int32_t slot) const { return slot + 1 == p_.slots ? 0 : slot + 1; }
  __device__ int32_t slot_before(int32_t slot) const { return (slot == 0 ? p_.slots : slot) - 1; }

  static __device__ std::byte* q_tile() { return shared_memory() + kSm80SharedWork; }
  __device__ std::byte* slots() const { return q_tile() + p_.tile_rows * kPitchBytes; }

  // -1: none of its rows is a query.
  __device__ int32_t last_query_of_warp() const {
    const int32_t first = work().first + warp() * kWarpRows;
    const int32_t last = min(first + kWarpRows - 1, work().last);
    return last < max(first, work().first_position) ? -1 : last;
  }

  // Bits begin .. end - 1 of 8.
  static __device__ uint32_t rows_between(int32_t begin, int32_t end) {
    return (0xffu >> (8 - min(max(end, 0), 8))) & (0xffu << min(max(begin, 0), 8));
  }
  // One warp copies those of the 8 rows from `row` on whose bit is set in `rows`, `stride` bytes
  // apart, d elements each, and zeros in place of the other rows and of columns d to padded_d.
  // `any`: some row of the tensor.
  __device__ static void copy_8_rows(std::byte* to, const std::byte* row, int64_t stride,
                                     uint32_t rows, int32_t d, int32_t padded_d, bool aligned,
                                     const std::byte* any) {
    const int32_t r = lane() / 8, c = lane() % 8;
    row += r * stride;
    if (aligned) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t at = r + 4 * half;
        const uint32_t line = shared_address(to) + at * kPitchBytes + (c ^ at) * 16;
#pragma unroll
        for (int column = 0; column < kDimQk; column += 64) {
          if (column >= padded_d) break;
          const bool inside = (rows >> at & 1) != 0 && column + c * 8 < d;
          const std::byte* from = row + half * 4 * stride + (column + c * 8) * kElementBytes;
          cp_async<16>(line + column * kElementBytes, inside ? from : any, inside ? 16 : 0);
        }
      }
      return;
    }
#pragma unroll 1
    for (int32_t i = 0; i < padded_d / 32; ++i) {
      const int32_t at = r + i % 2 * 4, column = i / 2 * 64 + c * 8;
      uint4 elements{0, 0, 0, 0};
      if ((rows >> at & 1) != 0 && column < d) {
        const std::byte* from = row + i % 2 * 4 * stride + column * kElementBytes;
        elements = {load_pair(from), load_pair(from + 4), load_pair(from + 8),
                    load_pair(from + 12)};
      }
      *reinterpret_cast<uint4*>(to + at * kPitchBytes + i / 2 * 128 + (c ^ at) * 16) = elements;
    }
  }

  // Rows before the sequence's first or after its last are zeros.
  __device__ void copy_q() const {
    const DeviceTensor& q = p_.problem.q;
    const std::byte* rows = p_.problem.q_row(q, work().sequence, work().head, 0);
    const int64_t stride = q.row_stride * kElementBytes;
#pragma unroll 1
    for (int32_t row = 8 * warp(); row < p_.tile_rows; row += 8 * warps()) {
      const int32_t position = work().first + row;
      const int32_t i = position - work().first_position;
      copy_8_rows(q_tile() + row * kPitchBytes, rows + i * stride, stride,
                  rows_between(-i, work().last + 1 - position), p_.problem.d_qk, kDimQk,
                  p_.q_aligned, q.data);
    }
  }

  // Starts the copy of an item, 2 t: K of tile t, 2 t + 1: its V, and closes its group; an empty
  // group where there are no more keys.
  __device__ void start_copy(int32_t item, int32_t slot) const {
    const KeyTile& tile = work().tiles[item / 2 % kTilesAhead];
    if (tile.first >= 0) {
      const bool values = item % 2 != 0;
      const DeviceProblem& problem = p_.problem;
      const int32_t d = values ? problem.d_v : problem.d_qk;
      const bool means = tile.is_means();
      const int64_t stride =
          means ? d * kElementBytes
                : (values ? problem.v.row_stride : problem.k.row_stride) * kElementBytes;
      const std::byte* any = means ? p_.means.k : values ? problem.v.data : problem.k.data;
      std::byte* to = slots() + slot * kSlotBytes;
#pragma unroll 1
      for (int32_t row = 8 * warp(); row < kTileKv; row += 8 * warps()) {
        const std::byte* from;
        uint32_t rows;
        if (means) {
          from = mean_row(p_, values, tile.first * 64 + row);
          rows = static_cast<uint32_t>(tile.dropped >> row);
        } else {
          const int32_t key = row < kHalfTile ? tile.first + row : tile.second + row - kHalfTile;
          const int32_t n = work().s_kv - key;
          // Pages hold a multiple of 16 rows, so the 8 lie in one.
          from = n > 0 ? kv_row(p_, values, key) : any;
          rows = rows_between(0, n);
        }
        copy_8_rows(to + row * kPitchBytes, from, stride, rows, d, values ? kDimV : kDimQk,
                    means || (values ? p_.v_aligned : p_.k_aligned), any);
      }
    }
    cp_async_commit();
  }

  // After it the next slot holds its tile, and all warps have left the slot before.
  __device__ void wait_for_slot() {
    if (p_.slots == 2) {
      cp_async_wait<0>();
    } else if (p_.slots == 3) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<2>();
    }
    __syncthreads();
  }

  // What lane gives ldmatrix for 16 columns of `row` of a tile: `high` is 0 for the first 8 of
  // them, 1 for the others. `at_columns` moves on to the 16 columns from 16 * step.
  static __device__ uint32_t fragment_row(const std::byte* tile, int32_t row, int32_t high) {
    return shared_address(tile) + row * kPitchBytes + (high ^ (row % 8)) * 16;
  }
  static __device__ uint32_t at_columns(uint32_t row, int32_t step) {
    return (row ^ step % 4 * 32) + step / 4 * 128;
  }

  // Position of the lane's rows: row lane / 4 of `half` (8 rows) of tile m.
  __device__ int32_t position(int m, int half) const {
    return work().first + warp() * kWarpRows + m * 16 + half * 8 + lane() / 4;
  }
  // w = exp2(s - the new maximum), s = q k^T; o, sums and maxima follow.
  __device__ void weigh(const std::byte* keys, const KeyTile& tile, Weights& w) {
    Scores s{};
    const uint32_t q_row = fragment_row(q_tile(), warp() * kWarpRows + lane() % 16, lane() / 16);
    const uint32_t k_row = fragment_row(keys, lane() / 16 * 8 + lane() % 8, lane() / 8 % 2);
    // With all of d 192 in line the compiler spills.
#pragma unroll(kDimQk == 192 ? 1 : kDimQk / 64)
    for (int line = 0; line < kDimQk / 64; ++line) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        uint32_t a[kTilesM][4];
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          ldmatrix_x4(a[m], at_columns(q_row, step) + line * 128 + m * 16 * kPitchBytes);
        }
#pragma unroll
        for (int n = 0; n < kTilesN; n += 2) {
          uint32_t b[4];
          ldmatrix_x4(b, at_columns(k_row, step) + line * 128 + n * 8 * kPitchBytes);
#pragma unroll
          for (int m = 0; m < kTilesM; ++m) {
            mma_m16n8k16<T>(tile_of(s[m], n), a[m], b[0], b[1]);
            mma_m16n8k16<T>(tile_of(s[m], n + 1), a[m], b[2], b[3]);
          }
        }
      }
    }
    if (p_.scores_scale != 1.0f) {
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
        for (float& score : s[m]) score *= p_.scores_scale;
      }
    }
    if (tile.is_means()) {
      weigh_means(tile, s);
    } else if (tile.masked) {
      mask(tile, s);
    }
    softmax(s, w);
  }

  // A block counts as many times as it has keys; those that the row keeps are zeros here.
  __device__ void weigh_means(const KeyTile& tile, Scores& s) const {
    const int32_t column = lane() % 4 * 2;
    const auto* words = reinterpret_cast<const uint32_t*>(&tile.dropped);
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
      const uint32_t dropped = words[n / 4] >> column;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool is_dropped = (dropped >> (n % 4 * 8 + e) & 1) != 0;
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& score = s[m][4 * n + 2 * half + e];
            score = is_dropped ? score + p_.mean_bias : -kInfinity;
          }
        }
      }
    }
  }

  __device__ void mask(const KeyTile& tile, Scores& s) const {
    const int32_t column = lane() % 4 * 2;
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // 8 rows by 32 keys
        const int half = i / 2, first_n = i % 2 * (kTilesN / 2);
        const SeenOffsets seen(p_.mask, position(m, half),
                               (i % 2 == 0 ? tile.first : tile.second) + column);
#pragma unroll
        for (int n = 0; n < kTilesN / 2; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& score = s[m][4 * (first_n + n) + 2 * half + e];
            score = seen.sees(n * 8 + e) ? score : -kInfinity;
          }
        }
      }
    }
  }

  __device__ void softmax(Scores& s, Weights& w) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      float factor[2];
      if (softmax_[m].follow(s[m], p_.weigh_scale, factor)) {
#pragma unroll
        for (int i = 0; i < kDimV / 2; ++i) o_[m][i] *= factor[i / 2 % 2];
      }
      softmax_[m].weigh(s[m], p_.weigh_scale);
#pragma unroll
      for (int i = 0; i < kTilesN * 2; ++i) {
        w[m][i / 4][i % 4] = pack<T>(s[m][2 * i], s[m][2 * i + 1]);
      }
    }
  }

  static __device__ void clear(Weights& w) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int i = 0; i < kTileKv / 4; ++i) w[m][i / 4][i % 4] = 0;
    }
  }

  // o += w v.
  __device__ void accumulate(const std::byte* values, const Weights& w) {
    const uint32_t v_row = fragment_row(values, lane() % 16, lane() / 16);
#pragma unroll
    for (int step = 0; step < kTileKv / 16; ++step) {
#pragma unroll
      for (int n = 0; n < kDimV / 8; n += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, at_columns(v_row, n / 2) + step * 16 * kPitchBytes);
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          mma_m16n8k16<T>(tile_of(o_[m], n), w[m][step], b[0], b[1]);
          mma_m16n8k16<T>(tile_of(o_[m], n + 1), w[m][step], b[2], b[3]);
        }
      }
    }
  }

  // Sets to 0 the rows of a tile of V that are not finite; returns which. For all warps together.
  __device__ uint64_t set_aside(std::byte* values) {
#pragma unroll 1
    for (int32_t row = fresh_thread(); row < kTileKv; row += 32 * warps()) {
      const std::byte* line = values + row * kPitchBytes;
      bool found = false;
#pragma unroll 4
      for (int chunk = 0; chunk < kDimV / 8; ++chunk) {
        const uint4 e = *reinterpret_cast<const uint4*>(line + (chunk ^ row % 8) * 16);
        found |= any_not_finite<T>(e.x) | any_not_finite<T>(e.y) | any_not_finite<T>(e.z) |
                 any_not_finite<T>(e.w);
      }
      const uint32_t rows = __ballot_sync(kAllLanes, found);
      if (lane() == 0) work().nonfinite[row / 32] = rows;
    }
    __syncthreads();
    const uint64_t aside = work().nonfinite[0] | static_cast<uint64_t>(work().nonfinite[1]) << 32;
    if (aside == 0) return 0;
#pragma unroll 1
    for (int32_t i = fresh_thread(); i < kTileKv * kDimV / 8; i += 32 * warps()) {
      const int32_t row = i / (kDimV / 8), chunk = i % (kDimV / 8);
      if ((aside >> row & 1) == 0) continue;
      *reinterpret_cast<uint4*>(values + row * kPitchBytes + chunk * 16) = {0, 0, 0, 0};
    }
    __syncthreads();
    return aside;
  }

  // o += w v of single keys, for the rows that see them.
  __device__ void add_aside(uint64_t keys, const KeyTile& tile, const Weights& w) {
    for (; keys != 0; keys &= keys - 1) {
      const int32_t in_tile = __ffsll(static_cast<int64_t>(keys)) - 1;
      const int32_t key =
          in_tile < kHalfTile ? tile.first + in_tile : tile.second + in_tile - kHalfTile;
      const std::byte* row = kv_row(p_, true, key);
      float weight[kTilesM][2];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t pair = 0;
#pragma unroll
          for (int i = 0; i < kTilesN; ++i) {
            pair |= w[m][i / 2][i % 2 * 2 + half] & (in_tile / 8 == i ? 0xffffffff : 0);
          }
          pair = __shfl_sync(kAllLanes, pair, lane() / 4 * 4 + in_tile % 8 / 2);
          weight[m][half] = unpack<T>(pair, in_tile % 2);
        }
      }
#pragma unroll
      for (int n = 0; n < kDimV / 8; ++n) {
        const int32_t column = n * 8 + lane() % 4 * 2;
        if (column >= p_.problem.d_v) break;
        const uint32_t pair = load_pair(row + column * kElementBytes);
        const float low = unpack<T>(pair, 0), high = unpack<T>(pair, 1);
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (!p_.mask.sees(position(m, half), key)) continue;
            o_[m][4 * n + 2 * half] += weight[m][half] * low;
            o_[m][4 * n + 2 * half + 1] += weight[m][half] * high;
          }
        }
      }
    }
  }

  // out = o / sum, lse. The warp's rows go through its rows of Q.
  __device__ void store() {
    const DeviceProblem& problem = p_.problem;
    bool no_weight = false;
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      softmax_[m].finish();
      no_weight |= softmax_[m].sum[0] == 0.0f || softmax_[m].sum[1] == 0.0f;
    }
    // No weight at all: a row that sees no key gives 0, one whose scores are all -inf 0 / 0.
    uint32_t sees_none = 0;  // a bit for each of the lane's rows
    if (no_weight) {
#pragma unroll 1
      for (int i = 0; i < 2 * kTilesM; ++i) {
        if (!sees_any_key(p_, position(i / 2, i % 2))) sees_none |= 1u << i;
      }
    }
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = softmax_[m].sum[half];
        const bool none = (sees_none >> (2 * m + half) & 1) != 0;
        const float inverse = none ? 0.0f : sum == 0.0f ? kNaN : 1.0f / sum;
        const int32_t at = position(m, half);
        if (problem.lse != nullptr && lane() % 4 == 0 && at >= work().first_position &&
            at <= work().last) {
          const float lse = softmax_[m].lse(half, p_.weigh_scale);
          problem.lse_row(work().sequence, work().head)[at - work().first_position] =
              sum == 0.0f && !none ? kNaN : lse;
        }
        const int32_t row = warp() * kWarpRows + m * 16 + half * 8 + lane() / 4;
#pragma unroll
        for (int n = 0; n < kDimV / 8; ++n) {
          const uint32_t pair =
              pack<T>(o_[m][4 * n + 2 * half] * inverse, o_[m][4 * n + 2 * half + 1] * inverse);
          *reinterpret_cast<uint32_t*>(q_tile() + row * kPitchBytes + (n ^ row % 8) * 16 +
                                       lane() % 4 * 4) = pair;
        }
      }
    }
    __syncwarp();
    std::byte* rows = problem.q_row(problem.out, work().sequence, work().head, 0);
    for (int32_t r = lane() / 8; r < kWarpRows; r += 4) {
      const int32_t row = warp() * kWarpRows + r, at = work().first + row;
      if (at < work().first_position || at > work().last) continue;
      std::byte* to = rows + (at - work().first_position) * problem.out.row_stride * kElementBytes;
      for (int32_t chunk = lane() % 8; chunk < problem.d_v / 8; chunk += 8) {
        const std::byte* from = q_tile() + row * kPitchBytes + (chunk ^ row % 8) * 16;
        if (p_.out_aligned) {
          *reinterpret_cast<uint4*>(to + chunk * 16) = *reinterpret_cast<const uint4*>(from);
        } else {
          for (int e = 0; e < 8; ++e) {
            reinterpret_cast<uint16_t*>(to)[chunk * 8 + e] =
                reinterpret_cast<const uint16_t*>(from)[e];
          }
        }
      }
    }
  }

  const Parameters& p_;
  OnlineSoftmax softmax_[kTilesM];
  float o_[kTilesM][kDimV / 2]{};
};

// CTAs: items of the order, each times the parts of a block.
template <typename T, int kDimQk, int kDimV, int kTilesM, int kMinCtas>
__global__ void __launch_bounds__(256 / kTilesM, kMinCtas) attend_kernel(const Parameters p) {
  const DeviceProblem& problem = p.problem;
  const uint32_t parts = problem.block_size / p.tile_rows;
  WorkItem item;
  if (!work_item(problem, p.order, blockIdx.x / parts, item)) return;
  const DeviceSequence& sequence = problem.sequences[item.sequence];
  const auto part = static_cast<int32_t>(parts - 1 - blockIdx.x % parts);
  const int32_t first =
      (sequence.first_q_block + item.q_row) * problem.block_size + part * p.tile_rows;
  if (first >= sequence.s_kv || first + p.tile_rows <= sequence.first_position()) return;
  AttendTile<T, kDimQk, kDimV, kTilesM>(p).run(item, first);
}

}  // namespace sm80
}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_ATTEND_ATTEND_SM80_KERNEL_CUH_

// attend on Hopper: what happens seldom and needs exactness rather than speed. NaN and infinities
// in V at keys that only some rows of a tile see, and rows without any weight.
#ifndef FLEXPREFILL_SRC_ATTEND_ATTEND_SM90_NOT_FINITE_CUH_
#define FLEXPREFILL_SRC_ATTEND_ATTEND_SM90_NOT_FINITE_CUH_

#include <cstdint>

#include "attend/attend_sm90_plan.cuh"
#include "attend/softmax.cuh"

namespace flexprefill {

// The row of work again from its bits. Where the warpgroups took a shortcut, this decides.
template <typename Shape>
class RareRow {
 public:
  using Element = typename Shape::Element;

  __device__ RareRow(const AttendSm90Params& params, const WorkTile& work)
      : params_(params),
        work_(work),
        sequence_(params.problem.sequences[work.sequence]),
        words_(params.rows.bits == nullptr ? nullptr
                                           : params.rows.row(sequence_, work.head, work.q_row)) {}

  // A row of the tile without any weight, by one quad after the stores of its warp: a query that
  // sees no key gives 0, one whose scores are all -inf NaN.
  __device__ void store_weightless(int32_t row) const {
    if (row < work_.row_begin || row >= work_.row_end) return;
    const bool nothing = !sees_any_key(work_.first_position + row);
    const int32_t lane = static_cast<int32_t>(threadIdx.x) % 4;
    if (work_.lse != nullptr && lane == 0) work_.lse[row] = nothing ? -INFINITY : NAN;
    if (!nothing) return;  // 0 / 0 is right
    auto* out = reinterpret_cast<uint16_t*>(work_.out) + row * params_.problem.out.row_stride;
#pragma unroll 1
    for (int32_t column = 8 * lane; column < params_.problem.d_v; column += 32) {
      *reinterpret_cast<uint4*>(out + column) = {0, 0, 0, 0};
    }
  }

  // Adds to the stored output of the tile's rows [first_row, first_row + 16) the elements of V that
  // are not finite and that a Checker took out. One warp, after its stores.
  __device__ void add_not_finite(int32_t first_row) const {
    __syncwarp();
#pragma unroll 1
    for (int32_t block = 0; block <= work_.first_position / Shape::kBlock; ++block) {
      if (!is_kept(block)) continue;
      const int32_t end = min((block + 1) * Shape::kBlock, work_.s_kv);
#pragma unroll 1
      for (int32_t key = block * Shape::kBlock; key < end; ++key) {
        const int32_t first_key = key / Shape::kTileKv * Shape::kTileKv;
        if (!is_masked<Shape>(params_.mask, work_.first_position, first_key)) continue;
        add_key(first_row, key);
      }
    }
  }

 private:
  // Whether a query sees any key of the kept blocks.
  __device__ bool sees_any_key(int32_t query) const {
#pragma unroll 1
    for (int32_t block = 0; block <= query / Shape::kBlock; ++block) {
      const int32_t first = block * Shape::kBlock;
      const bool before = first < work_.first_position;
      if (params_.rows.mean_correction && before && !is_kept(block)) return true;  // its mean
      if (is_kept(block) &&
          params_.mask.sees_any(query, first, min(first + Shape::kBlock, work_.s_kv) - 1)) {
        return true;
      }
    }
    return false;
  }

  __device__ bool is_kept(int32_t block) const {
    return words_ == nullptr || (words_[block / 64] >> (block % 64) & 1) != 0;
  }

  __device__ void add_key(int32_t first_row, int32_t key) const {
    const DeviceProblem& problem = params_.problem;
    const auto* values = reinterpret_cast<const uint32_t*>(
        problem.kv_row(problem.v, work_.sequence, problem.kv_head(work_.head), key));
    const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
#pragma unroll 1
    for (int32_t first = 0; first < problem.d_v / 2; first += 32) {
      const int32_t at = first + lane;
      const uint32_t pair = at < problem.d_v / 2 ? values[at] : 0;
      if (__any_sync(0xffffffff, any_not_finite<Element>(pair)) == 0) continue;
#pragma unroll 1
      for (int32_t row = max(first_row, work_.row_begin); row < min(first_row + 16, work_.row_end);
           ++row) {
        if (!params_.mask.sees(work_.first_position + row, key)) continue;
        const bool weight = has_weight(row, key);
        if (any_not_finite<Element>(pair)) add_pair(row, at, pair, weight);
      }
    }
  }

  // A weight is 0 only where the score is -inf.
  __device__ bool has_weight(int32_t row, int32_t key) const {
    const DeviceProblem& problem = params_.problem;
    const auto* queries = reinterpret_cast<const uint32_t*>(
        problem.q_row(problem.q, work_.sequence, work_.head,
                      work_.first_position + row - sequence_.first_position()));
    const auto* keys = reinterpret_cast<const uint32_t*>(
        problem.kv_row(problem.k, work_.sequence, problem.kv_head(work_.head), key));
    float score = 0;
#pragma unroll 1
    for (int32_t at = static_cast<int32_t>(threadIdx.x) % 32; at < problem.d_qk / 2; at += 32) {
      const uint32_t q = queries[at], k = keys[at];
      score += unpack<Element>(q, 0) * unpack<Element>(k, 0);
      score += unpack<Element>(q, 1) * unpack<Element>(k, 1);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) score += __shfl_xor_sync(0xffffffff, score, step);
    return score * params_.scores_scale != -INFINITY;
  }

  __device__ void add_pair(int32_t row, int32_t at, uint32_t pair, bool weight) const {
    auto* out = reinterpret_cast<uint32_t*>(reinterpret_cast<uint16_t*>(work_.out) +
                                            row * params_.problem.out.row_stride) +
                at;
    float sums[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float value = unpack<Element>(pair, e);
      sums[e] = unpack<Element>(*out, e);
      if (!isfinite(value)) sums[e] += weight ? value : NAN;
    }
    *out = pack_pair<Element>(sums[0], sums[1]);
  }

  const AttendSm90Params& params_;
  const WorkTile& work_;
  const DeviceSequence& sequence_;
  const uint64_t* words_;
};

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_ATTEND_ATTEND_SM90_NOT_FINITE_CUH_

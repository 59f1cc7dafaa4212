// The rules of block_rules.h by one warp a row: bit-equal given equal scores.
//
// scores [i + 1] as there, in global or shared memory; row [words]: all of it is written. The whole
// warp calls these functions together.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CUDA_ROWS_CUH_
#define FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CUDA_ROWS_CUH_

#include <bit>
#include <cstdint>

#include "cuda/launch.cuh"
#include "select/block_rules.h"

namespace flexprefill {

constexpr uint32_t kWholeWarp = 0xffffffffu;

// The thread's lane, worked out where it is asked for: what depends on it would else be kept in
// registers all through the kernel.
__device__ inline int32_t lane_here() {
  auto lane = static_cast<int32_t>(threadIdx.x % 32);
  asm volatile("" : "+r"(lane));
  return lane;
}

// Of a number that all threads of a warp read: the compiler knows then that they stay together.
__device__ inline int32_t same_in_warp(int32_t x) { return __shfl_sync(kWholeWarp, x, 0); }

template <typename T, typename Combine>
__device__ T combine_warp(T value, const Combine& combine) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    value = combine(value, __shfl_xor_sync(kWholeWarp, value, lanes));
  }
  return value;
}
template <typename T>
__device__ T sum_warp(T value) {
  return combine_warp(value, [](T a, T b) { return a + b; });
}
// As three sums of 22 bits by the instruction for that, in the place of ten shuffles.
__device__ inline uint64_t sum_warp_u64(uint64_t value) {
  constexpr uint32_t kPart = (1u << 22) - 1;
  const uint64_t low = __reduce_add_sync(kWholeWarp, static_cast<uint32_t>(value) & kPart);
  const uint64_t mid = __reduce_add_sync(kWholeWarp, static_cast<uint32_t>(value >> 22) & kPart);
  const uint64_t high = __reduce_add_sync(kWholeWarp, static_cast<uint32_t>(value >> 44));
  return low + (mid << 22) + (high << 44);
}
template <typename T>
__device__ T max_warp(T value) {
  return combine_warp(value, [](T a, T b) { return a < b ? b : a; });
}

// values[2 k] and values[2 k + 1] of this lane and of the one `bit` away: the lane without the bit
// gets the sums of the even ones, the other those of the odd ones.
template <int kSize>
__device__ inline void exchange_halves(float* values, int bit) {
  const bool odd = (threadIdx.x & bit) != 0;
#pragma unroll
  for (int k = 0; k < kSize / 2; ++k) {
    const float keep = odd ? values[2 * k + 1] : values[2 * k];
    const float give = odd ? values[2 * k] : values[2 * k + 1];
    values[k] = keep + __shfl_xor_sync(kWholeWarp, give, bit);
  }
}

// fixed_mass of x < 2^24 by whole numbers: cards have few units for double precision.
__device__ inline uint64_t fixed_mass_of(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const auto exponent = static_cast<int>(bits >> 23);
  const uint64_t mantissa = (bits & 0x7fffffu) | (exponent > 0 ? 0x800000u : 0);
  const int left = (exponent > 0 ? exponent : 1) - 110;  // x = mantissa * 2^(left - 40)
  if (left >= 0) return mantissa << left;
  return left < -25 ? 0 : (mantissa + (uint64_t{1} << (-left - 1))) >> -left;
}

// take_largest of pattern.h over the entries that entry(e), e < size, gives (those below 0 are
// none), without its count. In the place of histograms a walk down the bits: the entries whose next
// bit is 1 are taken if they fit, and those with a 0 go on; if they do not fit, they go on. It ends
// where one entry is left.
template <typename Entry>
__device__ Taken take_largest_warp(const Entry& entry, int64_t size, Weight weight,
                                   uint64_t limit) {
  const int64_t lane = lane_here();
  const auto weight_of = [&](float value) {
    return weight == Weight::kMass ? fixed_mass_of(value) : uint64_t{1};
  };
  uint64_t all = 0;
  uint32_t highest = 0, left = 0;
#pragma unroll 1
  for (int64_t e = lane; e < size; e += 32) {
    const float x = entry(e);
    if (x < 0) continue;
    const auto bits = std::bit_cast<uint32_t>(x);
    all += weight_of(x);
    highest = bits > highest ? bits : highest;
    ++left;
  }
  if (sum_warp_u64(all) <= limit) return {.count = size, .threshold = 0, .ties = size};
  highest = __reduce_max_sync(kWholeWarp, highest);
  left = __reduce_add_sync(kWholeWarp, left);
  HistogramWalk walk{.limit = limit, .prefix = left == 1 ? highest : 0};
  for (int bit = 31 - __clz(static_cast<int>(highest | 1)); bit >= 0 && left > 1; --bit) {
    const uint32_t upper = (walk.prefix >> bit) | 1;
    uint64_t own = 0;
    uint32_t count = 0;
#pragma unroll 1
    for (int64_t e = lane; e < size; e += 32) {
      const float x = entry(e);
      if (std::bit_cast<uint32_t>(x) >> bit != upper) continue;
      own += weight_of(x);
      ++count;
    }
    own = sum_warp_u64(own);
    count = __reduce_add_sync(kWholeWarp, count);
    if (own > limit - walk.weight) {
      walk.prefix |= 1u << bit;
      left = count;
    } else {
      walk.weight += own;
      left -= count;
    }
    if (left != 1) continue;
    uint32_t last = 0;
#pragma unroll 1
    for (int64_t e = lane; e < size; e += 32) {
      const auto bits = std::bit_cast<uint32_t>(entry(e));
      if ((bits ^ walk.prefix) >> bit == 0) last = bits;
    }
    walk.prefix = __reduce_max_sync(kWholeWarp, last);
  }
  return walk.taken(weight);
}

// Likewise of the entries x >= 0 of all lanes, the `limit` largest, of which there are more;
// highest: the largest. The threshold is found bit by bit: how many entries are at least as large?
template <int kEntries>
__device__ Taken take_most(const float (&x)[kEntries], float highest, uint32_t limit) {
  const auto at_least = [&](uint32_t bits) {
    uint32_t own = 0;
#pragma unroll
    for (const float entry : x) own += std::bit_cast<uint32_t>(entry) >= bits ? 1 : 0;
    return __reduce_add_sync(kWholeWarp, own);
  };
  uint32_t threshold = 0;  // more than `limit` are at least as large
#pragma unroll 1
  for (int bit = 31 - __clz(static_cast<int>(std::bit_cast<uint32_t>(highest) | 1)); bit >= 0;
       --bit) {
    const uint32_t next = threshold | 1u << bit;
    const uint32_t count = at_least(next);
    if (count == limit) return {.count = limit, .threshold = next - 1, .ties = 0};
    if (count > limit) threshold = next;
  }
  const int64_t ties = static_cast<int64_t>(limit) - at_least(threshold + 1);
  return {.count = limit, .threshold = threshold, .ties = ties};
}

// Writes row: keep(j, score) for blocks j = 0 .. i. It is asked by all lanes for 32 blocks at a
// time in ascending order.
template <typename Keep>
__device__ void write_row_warp(const float* scores, int64_t i, int64_t n, uint64_t* row,
                               const Keep& keep) {
  const auto lane = static_cast<int64_t>(threadIdx.x % 32);
  for (int64_t w = 0; w < (n + 63) / 64; ++w) {
    uint64_t word = 0;
    for (int half = 0; half < 2; ++half) {
      const int64_t j = 64 * w + 32 * half + lane;
      const bool kept = keep(j, j <= i ? scores[j] : 0.0f) && j <= i;
      word |= static_cast<uint64_t>(__ballot_sync(kWholeWarp, kept)) << (32 * half);
    }
    if (lane == 0) row[w] = word;
  }
}

__device__ inline void write_dense_row_warp(int64_t i, int64_t n, uint64_t* row) {
  for (int64_t w = threadIdx.x % 32; w < (n + 63) / 64; w += 32) row[w] = range_word(0, i + 1, w);
}

// Taken, asked for 32 entries at a time.
struct TakenWarp {
  Taken taken;
  int64_t ties = 0;  // so far

  // `eligible`: x is one of the entries that taken was made of.
  __device__ bool takes(float x, bool eligible) {
    const auto bits = std::bit_cast<uint32_t>(x);
    const uint32_t equal = __ballot_sync(kWholeWarp, eligible && bits == taken.threshold);
    const int32_t lane = lane_here();
    const int before = __popc(equal & ((1u << lane) - 1));
    const bool takes =
        bits == taken.threshold ? ties + before < taken.ties : bits > taken.threshold;
    ties += __popc(equal);
    return takes && eligible;
  }
};

__device__ inline void keep_reaching_warp(const float* scores, int64_t i, int64_t n,
                                          float threshold, uint64_t* row) {
  if (threshold >= 1.0f) return write_dense_row_warp(i, n, row);
  uint64_t total = 0;
  for (int64_t j = threadIdx.x % 32; j <= i; j += 32) total += fixed_mass_of(scores[j]);
  const uint64_t wanted = mass_to_reach(threshold, sum_warp_u64(total));
  const uint64_t have = fixed_mass_of(scores[0]) + (i > 0 ? fixed_mass_of(scores[i]) : 0);
  const bool more = have < wanted;
  TakenWarp taken{};
  if (more) {
    taken.taken = take_largest_warp([&](int64_t e) { return scores[e + 1]; }, i - 1, Weight::kMass,
                                    wanted - have - 1);
    ++taken.taken.ties;
  }
  write_row_warp(scores, i, n, row, [&](int64_t j, float score) {
    const bool takes = more && taken.takes(score, j > 0 && j < i);
    return takes || j == 0 || j == i;
  });
}

__device__ inline void keep_above_warp(const float* scores, int64_t i, int64_t n,
                                       const FlashPrefillRule& rule, uint64_t* row) {
  if (i >= rule.first_full) return write_dense_row_warp(i, n, row);
  float greatest = 0;
  for (int64_t j = threadIdx.x % 32; j <= i; j += 32) {
    greatest = scores[j] > greatest ? scores[j] : greatest;
  }
  const float least = rule.alpha * max_warp(greatest);
  write_row_warp(scores, i, n, row,
                 [&](int64_t j, float score) { return score >= least || rule.always_keeps(i, j); });
}

__device__ inline void keep_best_warp(const float* scores, int64_t i, int64_t n, int64_t count,
                                      uint64_t* row) {
  if (count > i) return write_dense_row_warp(i, n, row);
  TakenWarp taken{};
  if (count > 1) {
    taken.taken = take_largest_warp([&](int64_t e) { return scores[e]; }, i, Weight::kCount,
                                    static_cast<uint64_t>(count - 1));
  }
  write_row_warp(scores, i, n, row, [&](int64_t j, float score) {
    const bool takes = count > 1 && taken.takes(score, j < i);
    return takes || j == i;
  });
}

// keep_best_warp of scores in registers: entry e of a lane is that of block lane + 32 e, those
// after i are 0; i < 32 kEntries.
template <int kEntries>
__device__ void keep_best_entries(float (&x)[kEntries], int32_t i, int32_t n, int64_t count,
                                  uint64_t* row) {
  if (count > i) return write_dense_row_warp(i, n, row);
  const int32_t lane = lane_here();
  float highest = 0;
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    if (lane + 32 * e == i) x[e] = 0;  // is kept without being asked
    highest = fmaxf(highest, x[e]);
  }
  const auto limit = static_cast<uint32_t>(count > 1 ? count - 1 : 0);
  TakenWarp taken{.taken = take_most(x, max_warp(highest), limit)};
  uint64_t own = 0;  // word number `lane`
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    const int32_t j = lane + 32 * e;
    const bool kept = taken.takes(x[e], j < i) || j == i;
    const uint64_t half = __ballot_sync(kWholeWarp, kept);
    own |= lane == e / 2 ? half << (e % 2 * 32) : 0;
  }
  for (int32_t w = lane; w < (n + 63) / 64; w += 32) row[w] = w == lane ? own : 0;
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_BLOCKS_CUDA_ROWS_CUH_

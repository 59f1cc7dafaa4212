// BlockCover's decisions of block_rules.h by one warp a row: bit-equal given equal scores. The
// whole warp calls these functions together.
#ifndef FLEXPREFILL_SRC_SELECT_SELECT_COVER_CUDA_ROWS_CUH_
#define FLEXPREFILL_SRC_SELECT_SELECT_COVER_CUDA_ROWS_CUH_

#include <cuda_fp16.h>

#include "select/select_blocks_cuda_rows.cuh"

namespace flexprefill {

// A row of the map in memory: halves on 16 bytes, entries, which are at most 1, times this. So even
// the 2^-40 that decisions count in is not far from what a half holds, and every entry is a whole
// number of them. `bits`: of a half >= 0; they order like the entries.
constexpr float kMapUnits = 32768;
__device__ inline float map_entry(const __half* row, int32_t j) {
  return __half2float(row[j]) * (1 / kMapUnits);
}

// fixed_mass of an entry is map_digits(bits) << map_places(bits / 2^10).
__device__ inline uint32_t map_digits(uint32_t bits) {
  return (bits & 0x3ffu) | (bits >= 0x400u ? 0x400u : 0u);
}
__device__ inline uint32_t map_places(uint32_t exponent) { return exponent > 1 ? exponent : 1; }
__device__ inline uint64_t map_mass(uint32_t bits) {
  return static_cast<uint64_t>(map_digits(bits)) << map_places(bits >> 10);
}

// Eight entries of a row.
struct MapUnit {
  uint4 halves;
  __device__ uint32_t bits(int e) const {
    const uint32_t pair = e < 2 ? halves.x : e < 4 ? halves.y : e < 6 ? halves.z : halves.w;
    return e % 2 == 0 ? pair & 0xffffu : pair >> 16;
  }
};

// Bits begin .. end - 1 of those that stand for blocks first .. first + 7.
__device__ inline uint32_t unit_mask(int32_t first, int32_t begin, int32_t end) {
  const int32_t low = begin - first > 0 ? begin - first : 0;
  const int32_t high = end - first < 8 ? end - first : 8;
  return high > low && low < 8 ? (0xffu >> (8 - high)) & (0xffu << low) : 0u;
}

// f(bits) for the entries 1 .. end - 1 of a row, eight at a time to each lane, and f(0) for some
// that are none: the warp stays together.
template <typename F>
__device__ inline void for_map_entries(const __half* row, int32_t end, const F& f) {
  const int32_t lane = lane_here();
#pragma unroll 2
  for (int32_t from = 0; from < end; from += 256) {
    const int32_t first = from + 8 * lane;
    MapUnit unit{};
    if (first < end) unit.halves = *reinterpret_cast<const uint4*>(row + first);
    const uint32_t mask = unit_mask(first, 1, end);
#pragma unroll
    for (int e = 0; e < 8; ++e) f((mask >> e & 1) != 0 ? unit.bits(e) : 0);
  }
}

// A warp's shared memory: a histogram, four times over so that equal entries meet less often.
struct alignas(16) CoverSharedWarp {
  uint32_t bins[8][32][4];  // [low bits of the bin][lane that adds them up]
};

// Which entries cover what is wanted: those above `bits`, and the first `ties` that equal it.
struct MapTaken {
  uint32_t bits = 0xffff;
  uint32_t ties = 0;
};

__device__ inline bool always_keeps(const BlockCoverRule& rule, int32_t i, int32_t j) {
  return j == 0 || j >= i - rule.near;
}

// Writes the words of row i: keep(j), asked by all lanes for 32 blocks at a time in ascending
// order, at most `i` of them. It may read what the row was, of block j.
template <typename Keep>
__device__ inline void write_cover_row(int32_t i, int32_t n, uint64_t* row, const Keep& keep) {
  const int32_t lane = lane_here();
#pragma unroll 1
  for (int32_t w = 0; w < (n + 63) / 64; ++w) {
    uint64_t word = 0;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int32_t j = 64 * w + 32 * half + lane;
      const bool kept = keep(j, j <= i) && j <= i;
      const uint32_t bits = __ballot_sync(kWholeWarp, kept ? 1 : 0);
      word |= static_cast<uint64_t>(bits) << (32 * half);
    }
    __syncwarp();
    if (lane == 0) row[w] = word;
  }
  __syncwarp();
}

// limit_row, for a row that has too many blocks.
template <typename Score>
__device__ inline void limit_row_warp(const Score& score, int32_t i, int32_t n,
                                      const BlockCoverRule& rule, const uint64_t* columns,
                                      const float* most_asked, uint64_t* row) {
  const int32_t lane = lane_here();
  const auto is_column = [&](int32_t j) {
    return columns != nullptr && has_bit(columns, j) && !always_keeps(rule, i, j);
  };
  uint32_t own = 0;
#pragma unroll 1
  for (int32_t j = lane; j <= i; j += 32) own += is_column(j) ? 1 : 0;
  const auto asked = static_cast<int32_t>(__reduce_add_sync(kWholeWarp, own));
  const int32_t left = static_cast<int32_t>(rule.most_blocks) - min(i + 1, rule.near + 2);
  const bool columns_alone = asked > left;
  // Which blocks compete for the places that are left, and by what.
  const auto competes = [&](int32_t j) {
    return columns_alone ? is_column(j)
                         : has_bit(row, j) && !is_column(j) && !always_keeps(rule, i, j);
  };
  const auto value = [&](int32_t j) { return columns_alone ? most_asked[j] : score(j); };
  TakenWarp taken{};
  taken.taken =
      take_largest_warp([&](int32_t j) { return competes(j) ? value(j) : -1.0f; }, i + 1,
                        Weight::kCount, static_cast<uint64_t>(columns_alone ? left : left - asked));
  write_cover_row(i, n, row, [&](int32_t j, bool there) {
    const bool eligible = there && competes(j);
    const bool takes = taken.takes(eligible ? value(j) : -1.0f, eligible);
    return takes || (there && (always_keeps(rule, i, j) || (!columns_alone && is_column(j))));
  });
}

// The sums of the values of this lane and those after it.
template <typename T>
__device__ inline T sum_from_lane(T value) {
  const int32_t lane = lane_here();
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const T more = __shfl_down_sync(kWholeWarp, value, lanes);
    value += lane + lanes < 32 ? more : T{0};
  }
  return value;
}

// Adds up the kBins bins of each lane, to sums, and clears them.
template <int kBins>
__device__ inline void collect_bins(CoverSharedWarp& shared, uint32_t (&sums)[kBins]) {
  const int32_t lane = lane_here();
  __syncwarp();
#pragma unroll
  for (int k = 0; k < kBins; ++k) {
    auto& bins = *reinterpret_cast<uint4*>(shared.bins[k][lane]);
    const uint4 x = bins;
    sums[k] = x.x + x.y + x.z + x.w;
    bins = {0, 0, 0, 0};
  }
  __syncwarp();
}

// The bin in which the running sum from the top exceeds `left`, of kBins in each of 32 lanes, as
// lane * kBins + k; from then on left counts what is left in it. above: the sum of the lanes after
// this one; sums: bins of a lane weigh sums[k] << places(lane).
template <int kBins, typename Places>
__device__ inline uint32_t find_bin(const uint32_t (&sums)[kBins], uint64_t above, uint64_t& left,
                                    const Places& places) {
  const auto lane = static_cast<uint32_t>(lane_here());
  uint64_t own = 0;
#pragma unroll
  for (int k = 0; k < kBins; ++k) own += sums[k];
  own <<= places(lane);
  const bool crosses = above <= left && own > left - above;
  const int source = __ffs(static_cast<int>(__ballot_sync(kWholeWarp, crosses ? 1 : 0))) - 1;
  const uint32_t shift = places(static_cast<uint32_t>(source));
  uint64_t rest = (left - __shfl_sync(kWholeWarp, above, source)) >> shift;
  uint32_t bin = 0;
  bool found = false;
#pragma unroll
  for (int k = kBins - 1; k >= 0; --k) {
    const uint32_t sum = __shfl_sync(kWholeWarp, sums[k], source);
    found = found || sum > rest;
    if (!found) rest -= sum;
    bin += found ? 1 : 0;
  }
  left = rest;
  return static_cast<uint32_t>(source) * kBins + bin - 1;
}

// The largest of entries 1 .. end - 1 that together with `have` reach what is wanted, if they must
// (take_largest, and the entry at which it stops). mass: gets total and wanted.
//
// Two histograms of sums of digits, first by the exponent and three more bits, then by the other
// seven: a lane adds up the bins of one exponent, and later four values. A walk down the bits, one
// sweep over the row for each, took three quarters of the instructions of the map's kernel.
__device__ inline MapTaken cover_row_warp(const __half* row, int32_t end, float gamma,
                                          uint64_t have, CoverSharedWarp& shared, RowMass& mass) {
  const auto lane = static_cast<uint32_t>(lane_here());
  for_map_entries(row, end, [&](uint32_t bits) {
    uint32_t* bin = &shared.bins[bits >> 7 & 7][bits >> 10][lane % 4];
    if (const uint32_t digits = map_digits(bits); digits != 0) atomicAdd(bin, digits);
  });
  uint32_t sums[8];
  collect_bins(shared, sums);
  uint64_t own = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) own += sums[k];
  own <<= map_places(lane);
  const uint64_t from = sum_from_lane(own);
  mass.total = have + __shfl_sync(kWholeWarp, from, 0);
  mass.wanted = mass_to_reach(gamma, mass.total);
  if (have >= mass.wanted) return {};
  uint64_t left = mass.wanted - have - 1;
  const uint32_t top = find_bin(sums, from - own, left, map_places);

  for_map_entries(row, end, [&](uint32_t bits) {
    uint32_t* bin = &shared.bins[bits & 3][bits >> 2 & 31][lane % 4];
    if (bits >> 7 == top) atomicAdd(bin, map_digits(bits));
  });
  uint32_t values[4];
  collect_bins(shared, values);
  const uint32_t own_digits = values[0] + values[1] + values[2] + values[3];
  const uint32_t above = sum_from_lane(own_digits) - own_digits;
  const uint32_t low = find_bin(values, above, left, [](uint32_t) { return 0u; });
  MapTaken taken;
  taken.bits = top << 7 | low;
  // What is left is less than all that equal it weigh.
  taken.ties = static_cast<uint32_t>(left) / map_digits(taken.bits) + 1;
  return taken;
}

// keep_cover. columns: nullptr where the row takes none; shared: zeros, and zeros again afterwards;
// weighs: whether mass.kept is asked for.
__device__ inline RowMass keep_cover_warp(const __half* map_row, int32_t i, int32_t n,
                                          const BlockCoverRule& rule, const uint64_t* columns,
                                          const float* most_asked, bool weighs,
                                          CoverSharedWarp& shared, uint64_t* row) {
  const int32_t lane = lane_here();
  const auto mass_at = [&](int32_t j) { return map_mass(__half_as_ushort(map_row[j])); };
  RowMass mass;
  const int32_t far = i - rule.near;  // from here on all are kept
  uint64_t have = mass_at(0);
  for (int32_t j = max(far, 1); j <= i; ++j) have += mass_at(j);
  const MapTaken taken = cover_row_warp(map_row, far, rule.gamma, have, shared, mass);

  // A lane has a byte of every 32 of the row.
  auto* bytes = reinterpret_cast<uint8_t*>(row);
  const auto* column_bytes = reinterpret_cast<const uint8_t*>(columns);
  const int32_t size = (n + 63) / 64 * 8;
  uint32_t ties = 0;  // so far
  int32_t count = 0;
#pragma unroll 1
  for (int32_t from = 0; from < size; from += 32) {
    const int32_t byte = from + lane, first = 8 * byte;
    const uint32_t there = unit_mask(first, 0, i + 1), eligible = unit_mask(first, 1, far);
    MapUnit unit{};
    if (there != 0) unit.halves = *reinterpret_cast<const uint4*>(map_row + first);
    uint32_t above = 0, equal = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      above |= unit.bits(e) > taken.bits ? 1u << e : 0u;
      equal |= unit.bits(e) == taken.bits ? 1u << e : 0u;
    }
    above &= eligible;
    equal &= eligible;
    if (__any_sync(kWholeWarp, equal != 0 ? 1 : 0) != 0) {
      const auto own = static_cast<uint32_t>(__popc(equal));
      const uint32_t from_here = sum_from_lane(own);
      const uint32_t all = __shfl_sync(kWholeWarp, from_here, 0);
      const uint32_t before = ties + all - from_here;
      ties += all;
      // Takes the lower ones of its equal entries.
      for (uint32_t left = before < taken.ties ? taken.ties - before : 0; left > 0 && equal != 0;
           --left) {
        above |= equal & (0u - equal);
        equal &= equal - 1;
      }
    }
    uint32_t kept = above | (there & ~eligible);
    if (column_bytes != nullptr && byte < size) kept |= column_bytes[byte] & there;
    if (byte < size) bytes[byte] = static_cast<uint8_t>(kept);
    count += __popc(kept);
    if (!weighs) continue;
#pragma unroll
    for (int e = 0; e < 8; ++e) mass.kept += (kept >> e & 1) != 0 ? map_mass(unit.bits(e)) : 0;
  }
  count = __reduce_add_sync(kWholeWarp, count);
  if (count > rule.most_blocks) {
    __syncwarp();
    limit_row_warp([&](int32_t j) { return map_entry(map_row, j); }, i, n, rule, columns,
                   most_asked, row);
    mass.kept = 0;
#pragma unroll 1
    for (int32_t j = lane; weighs && j <= i; j += 32) {
      if (has_bit(row, j)) mass.kept += mass_at(j);
    }
  }
  mass.kept = sum_warp_u64(mass.kept);
  return mass;
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_SELECT_COVER_CUDA_ROWS_CUH_

// take_largest of pattern.h by a CTA, bit-equal: masses are integers, ties are counted in
// order of index.
//   by mass    three levels of histograms as HistogramWalk has them; level 0 by warp, so that it
//   can
//              be made of parts by several CTAs
//   by count   the threshold bit by bit
#ifndef FLEXPREFILL_SRC_SELECT_TAKE_CUDA_CUH_
#define FLEXPREFILL_SRC_SELECT_TAKE_CUDA_CUH_

#include <cstdint>

#include "select/pattern.h"

namespace flexprefill {

// ---- Which entries
// -------------------------------------------------------------------------------
//
// Entries are what visit(begin, end, f) calls f(x) for: those of this thread among [begin, end) of
// all, at most 2^31.

// In global memory, perhaps written by other CTAs of this launch: past L1. kAtOnce
// loads are under way before the first f: what f does keeps the compiler from moving a later load
// above it, and then a thread waits for L2 once an entry.
template <int kThreads>
struct SpanEntries {
  static constexpr int kAtOnce = 16;
  const float* x;
  int64_t size;

  template <typename F>
  __device__ void visit(int64_t begin, int64_t end, const F& f) const {
    const auto thread = static_cast<int32_t>(threadIdx.x);
    const float* from = x + begin + thread;
    auto left = static_cast<int32_t>((end < size ? end : size) - begin) - thread;
    for (; left > 0; left -= kAtOnce * kThreads, from += kAtOnce * kThreads) {
      float some[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        some[i] = left > i * kThreads ? __ldcg(from + i * kThreads) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (left > i * kThreads) f(some[i]);
      }
    }
  }
};

// ---- Level 0 of masses
// -----------------------------------------------------------------------------
//
// A bucket is an eighth of an octave. The lowest is that of 2^-41, below which an entry has no mass
// in the units of fixed_mass; entries must be below 4, as all are that are averages of softmaxes or
// sums over such a one. All entries of a bucket have the same mass_places: their digits can be
// added.

struct MassLevel0 {
  static constexpr int kFirst = 86 * 8;  // bits >> 20 of the first
  static constexpr int kBuckets = 43 * 8;
  // Entries that a thread may add before its warp's sums have to be collected: 4095 a warp.
  static constexpr int kRound = 127;
};

// Sums of one warp: digits in 16 low bits and 8 high ones, the latter above 12 bits of count. Two
// atomics of 32 bits an entry, as shared memory has none of 64.
struct WarpMasses {
  uint32_t low[MassLevel0::kBuckets], rest[MassLevel0::kBuckets];

  __device__ void add(float x) {
    const auto bits = std::bit_cast<uint32_t>(x);
    const int i = static_cast<int>(bits >> HistogramWalk::shift(0)) - MassLevel0::kFirst;
    if (i < 0) return;
    const uint32_t digits = mass_digits(bits);
    atomicAdd(&low[i], digits & 0xffffu);
    atomicAdd(&rest[i], 1u | digits >> 16 << 12);
  }
};

struct BucketSum {
  uint64_t weight = 0, count = 0;

  __device__ BucketSum& operator+=(const BucketSum& more) {
    weight += more.weight;
    count += more.count;
    return *this;
  }
};

template <int kThreads>
struct alignas(16) CtaMasses {
  WarpMasses warps[kThreads / 32];

  __device__ WarpMasses& own() { return warps[threadIdx.x / 32]; }
  // Before the first add; a barrier must follow.
  __device__ void clear() {
    auto* all = reinterpret_cast<uint4*>(this);
    for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(sizeof(*this) / 16);
         i += kThreads) {
      all[i] = uint4{0, 0, 0, 0};
    }
  }
  // The sum of bucket i over the warps; after a barrier.
  __device__ BucketSum sum(int i) const {
    uint64_t digits = 0, count = 0;
#pragma unroll 8
    for (int w = 0; w < kThreads / 32; ++w) {
      const uint32_t rest = warps[w].rest[i];
      digits += warps[w].low[i] + (static_cast<uint64_t>(rest >> 12) << 16);
      count += rest & 0xfffu;
    }
    return {digits << mass_places(static_cast<uint32_t>(i + MassLevel0::kFirst) >> 3), count};
  }
};

// ---- The walk
// ------------------------------------------------------------------------------------

template <int kThreads>
struct DescendShared {
  HistogramWalk walk;
  uint64_t inside;  // entries of the bucket that does not fit
  uint64_t weight[kThreads / 32], count[kThreads / 32];
  bool found;
};

// HistogramWalk::descend by a CTA: shared.walk goes down one level. sum(i): that of bucket
// first + i of kBuckets; the others are empty. Begins and ends with a barrier.
template <int kThreads, int kBuckets, typename Sum>
__device__ bool descend_cta(int level, int first, DescendShared<kThreads>& shared, const Sum& sum) {
  constexpr int kEach = (kBuckets + kThreads - 1) / kThreads;
  const auto thread = static_cast<int>(threadIdx.x);
  const int top = kBuckets - 1 - thread * kEach;  // of this thread's buckets
  __syncthreads();
  BucketSum buckets[kEach], own;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (top - i >= 0) buckets[i] = sum(top - i);
    own += buckets[i];
  }
  BucketSum up = own;  // of the warp's buckets down to its own
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const uint64_t w = __shfl_up_sync(0xffffffffu, up.weight, lanes);
    const uint64_t c = __shfl_up_sync(0xffffffffu, up.count, lanes);
    if (thread % 32 >= lanes) {
      up.weight += w;
      up.count += c;
    }
  }
  if (thread % 32 == 31) {
    shared.weight[thread / 32] = up.weight;
    shared.count[thread / 32] = up.count;
  }
  if (thread == 0) shared.found = false;
  const uint64_t left = shared.walk.limit - shared.walk.weight;
  __syncthreads();
  BucketSum above{up.weight - own.weight, up.count - own.count};
#pragma unroll  // all loads at once
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    const uint64_t weight = shared.weight[warp], count = shared.count[warp];
    if (warp >= thread / 32) continue;
    above.weight += weight;
    above.count += count;
  }
  // The one thread in whose buckets the running weight crosses the limit.
  if (above.weight <= left && own.weight > left - above.weight) {
    int at = -1;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (at >= 0) continue;
      if (buckets[i].weight > left - above.weight) {
        at = top - i;
        shared.inside = buckets[i].count;
      } else {
        above += buckets[i];
      }
    }
    shared.walk.weight += above.weight;
    shared.walk.count += above.count;
    shared.walk.prefix |= static_cast<uint32_t>(first + at) << HistogramWalk::shift(level);
    shared.found = true;
  }
  __syncthreads();
  return shared.found;
}

// ---- Levels 1 and 2 of masses
// ----------------------------------------------------------------------
//
// Entries inside the bucket above have one exponent, so their digits can be added here too.

struct LevelSums {
  static constexpr int kBuckets = 1024;
  static constexpr int64_t kRound = 65536;  // entries before the sums have to be collected
  uint64_t digits[kBuckets];
  uint32_t low[kBuckets], high[kBuckets], count[kBuckets];

  __device__ void clear(int threads) {
    for (int i = static_cast<int>(threadIdx.x); i < kBuckets; i += threads) {
      digits[i] = 0;
      low[i] = high[i] = count[i] = 0;
    }
  }
  __device__ void add(float x, const HistogramWalk& walk, int level) {
    const auto bits = std::bit_cast<uint32_t>(x);
    if (!walk.inside(bits, level)) return;
    const int i = HistogramWalk::bucket(bits, level);
    const uint32_t mass = mass_digits(bits);
    atomicAdd(&low[i], mass & 0xffffu);
    atomicAdd(&high[i], mass >> 16);
    atomicAdd(&count[i], 1u);
  }
  // Between barriers.
  __device__ void collect(int threads) {
    for (int i = static_cast<int>(threadIdx.x); i < kBuckets; i += threads) {
      digits[i] += low[i] + (static_cast<uint64_t>(high[i]) << 16);
      low[i] = high[i] = 0;
    }
  }
  // After collect() and a barrier.
  __device__ BucketSum sum(int i, const HistogramWalk& walk) const {
    return {digits[i] << mass_places(walk.prefix >> 23), count[i]};
  }
};

// The sums of one level over entries [0, size); ends with a barrier.
template <int kThreads, typename Entries>
__device__ void sum_level(const Entries& entries, int64_t size, int level,
                          const HistogramWalk& walk, LevelSums& sums) {
  sums.clear(kThreads);
  __syncthreads();
  for (int64_t begin = 0; begin < size; begin += LevelSums::kRound) {
    entries.visit(begin, begin + LevelSums::kRound, [&](float x) { sums.add(x, walk, level); });
    __syncthreads();
    sums.collect(kThreads);
    __syncthreads();
  }
}

template <int kThreads>
struct TakeShared {
  union {
    CtaMasses<kThreads> level0;
    LevelSums level;
  };
  BucketSum buckets[MassLevel0::kBuckets];  // of level 0, collected
  DescendShared<kThreads> descend;

  // Of a thread's own share of the buckets, the same in every call.
  template <typename F>
  __device__ void for_own_buckets(const F& f) {
    for (int i = static_cast<int>(threadIdx.x); i < MassLevel0::kBuckets; i += kThreads) {
      f(i, buckets[i]);
    }
  }
};

// Level 0, from shared.buckets. False if all entries fit.
template <int kThreads>
__device__ bool descend_level0(uint64_t limit, TakeShared<kThreads>& shared) {
  __syncthreads();
  if (threadIdx.x == 0) shared.descend.walk = HistogramWalk{.limit = limit};
  return descend_cta<kThreads, MassLevel0::kBuckets>(0, MassLevel0::kFirst, shared.descend,
                                                     [&](int i) { return shared.buckets[i]; });
}

// One level more of shared.descend, after level 0.
template <int kThreads, typename Entries>
__device__ void descend_entries(const Entries& entries, int64_t size, int level,
                                TakeShared<kThreads>& shared) {
  const HistogramWalk walk = shared.descend.walk;
  sum_level<kThreads>(entries, size, level, walk, shared.level);
  descend_cta<kThreads, LevelSums::kBuckets>(level, 0, shared.descend,
                                             [&](int i) { return shared.level.sum(i, walk); });
}

// What is taken, from shared.descend.walk after level 0.
template <int kThreads, typename Entries>
__device__ Taken finish_take_cta(const Entries& entries, int64_t size,
                                 TakeShared<kThreads>& shared) {
#pragma unroll 1
  for (int level = 1; level < Histogram::kLevels; ++level) {
    descend_entries<kThreads>(entries, size, level, shared);
  }
  return shared.descend.walk.taken(Weight::kMass);
}

// The largest entries while their running mass stays <= limit; every thread gets the result.
template <int kThreads, typename Entries>
__device__ Taken take_mass_cta(const Entries& entries, int64_t size, uint64_t limit,
                               TakeShared<kThreads>& shared) {
  constexpr int64_t kRound = int64_t{MassLevel0::kRound} * kThreads;
  __syncthreads();  // what was there may be in use
  shared.for_own_buckets([](int, BucketSum& sum) { sum = {}; });
  for (int64_t begin = 0; begin < size; begin += kRound) {
    shared.level0.clear();
    __syncthreads();
    entries.visit(begin, begin + kRound, [&](float x) { shared.level0.own().add(x); });
    __syncthreads();
    shared.for_own_buckets([&](int i, BucketSum& sum) { sum += shared.level0.sum(i); });
    __syncthreads();
  }
  if (!descend_level0<kThreads>(limit, shared))
    return {.count = size, .threshold = 0, .ties = size};
  return finish_take_cta<kThreads>(entries, size, shared);
}

// ---- By count
// --------------------------------------------------------------------------------------
//
// value(e): entry e of n, asked for often: best in shared memory.

// The `limit` largest; every thread gets the result. scratch [kThreads / 32] in shared memory, of
// an unsigned type. All threads of the block together.
template <int kThreads, typename Value, typename Scratch>
__device__ Taken take_count_cta(int32_t n, uint64_t limit, const Value& value, Scratch* scratch) {
  if (static_cast<uint64_t>(n) <= limit) return {.count = n, .threshold = 0, .ties = n};
  const auto most = static_cast<int32_t>(limit);
  // How many entries are at least `bits`.
  const auto count = [&](uint32_t bits) {
    int32_t sum = 0;
    for (int32_t begin = 0; begin < n; begin += kThreads) {
      const int32_t e = begin + static_cast<int32_t>(threadIdx.x);
      sum += __syncthreads_count(e < n && std::bit_cast<uint32_t>(value(e)) >= bits ? 1 : 0);
    }
    return sum;
  };
  uint32_t threshold = 0;  // the largest value that more than `limit` entries reach
#pragma unroll 1           // a CTA goes through it once: the less code, the better
  for (int bit = 30; bit >= 0; --bit) {
    const uint32_t higher = threshold | 1u << bit;
    const int32_t reach = count(higher);
    if (reach > most) threshold = higher;
    if (reach != most) continue;
    // Mostly long before the last bit: they are the ones to take, and the threshold is the highest
    // of the others.
    uint32_t best = 0;
    for (int32_t e = static_cast<int32_t>(threadIdx.x); e < n; e += kThreads) {
      const auto x = std::bit_cast<uint32_t>(value(e));
      if (x < higher && x > best) best = x;
    }
    best = __reduce_max_sync(0xffffffffu, best);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = best;
    __syncthreads();
    for (int warp = 0; warp < kThreads / 32; ++warp) {
      if (scratch[warp] > best) best = static_cast<uint32_t>(scratch[warp]);
    }
    return {.count = most, .threshold = best, .ties = 0};
  }
  return {.count = most, .threshold = threshold, .ties = most - count(threshold + 1)};
}

// ---- Which entries are taken
// -----------------------------------------------------------------------

// Writes ceil(n / 64) words of bits: bit e says whether entry e is taken, or if `reversed` bit
// n - 1 - e does. scratch [kThreads / 32] in shared memory. All threads of the block together.
template <int kThreads, typename Value>
__device__ void write_taken_bits(int32_t n, const Taken& taken, bool reversed, const Value& value,
                                 uint32_t* scratch, uint64_t* bits) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  auto* halves = reinterpret_cast<uint32_t*>(bits);
  const auto bits_at = [&](int32_t place) {
    return std::bit_cast<uint32_t>(value(reversed ? n - 1 - place : place));
  };
  // Ties go to the lower entry, which is the higher place if reversed.
  int32_t after = 0;
  if (reversed) {
    for (int32_t begin = 0; begin < n; begin += kThreads) {
      const int32_t place = begin + thread;
      after += __syncthreads_count(place < n && bits_at(place) == taken.threshold ? 1 : 0);
    }
  }
  int32_t before = 0;  // equal to the threshold, in earlier rounds
  for (int32_t begin = 0; begin < n; begin += kThreads) {
    const int32_t place = begin + thread;
    const uint32_t x = place < n ? bits_at(place) : 0;
    const bool equal = place < n && x == taken.threshold;
    const uint32_t warp_equal = __ballot_sync(0xffffffffu, equal ? 1 : 0);
    __syncthreads();  // scratch may be in use
    if (thread % 32 == 0) scratch[thread / 32] = __popc(warp_equal);
    __syncthreads();
    int32_t rank = before + __popc(warp_equal & ((1u << thread % 32) - 1));
#pragma unroll 4
    for (int32_t warp = 0; warp < kThreads / 32; ++warp) {
      const auto ties = static_cast<int32_t>(scratch[warp]);
      if (warp < thread / 32) rank += ties;
      before += ties;
    }
    if (reversed) rank = after - 1 - rank;
    const bool kept = equal ? rank < taken.ties : place < n && x > taken.threshold;
    const uint32_t word = __ballot_sync(0xffffffffu, kept ? 1 : 0);
    if (thread % 32 == 0 && place < (n + 63) / 64 * 64) halves[place / 32] = word;
  }
}

// ---- All of it
// ---------------------------------------------------------------------------------------

// take_largest of pattern.h over x in global memory.
template <int kThreads>
__device__ Taken take_largest_cta(const float* x, int64_t size, Weight weight, uint64_t limit,
                                  TakeShared<kThreads>& shared) {
  if (weight == Weight::kCount) {
    return take_count_cta<kThreads>(
        static_cast<int32_t>(size), limit, [&](int32_t e) { return x[e]; }, shared.descend.count);
  }
  return take_mass_cta<kThreads>(SpanEntries<kThreads>{x, size}, size, limit, shared);
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_TAKE_CUDA_CUH_

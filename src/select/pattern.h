// The decisions of select, given scores. Every backend calls these functions, so backends may
// differ in scores by rounding but never in what they decide from equal scores. Plain code over
// pointers, for the host and for a device: no containers, no allocation, no error paths.
//
// Scores are floats >= 0 without NaN. n: key blocks of the sequence; B: block_size;
// words: ceil(n / 64). Ties always go to the lower index.
#ifndef FLEXPREFILL_SRC_SELECT_PATTERN_H_
#define FLEXPREFILL_SRC_SELECT_PATTERN_H_

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "flexprefill/select.h"

#if defined(__CUDACC__)
#define FLEXPREFILL_HOST_DEVICE __host__ __device__
#else
#define FLEXPREFILL_HOST_DEVICE
#endif

namespace flexprefill {

// ---- The largest entries whose weight fits under a limit, without a sort ----------------------
//
// Floats >= 0 order like their bits. A histogram over the top 11 bits finds the bucket in which
// the running weight crosses the limit, one over the next 10 bits narrows it, one over the last 10
// leaves a single value. Where the bucket of the first has few entries, they are sorted instead.

enum class Weight {
  kMass,   // an entry weighs its value: which entries cover a share of the mass
  kCount,  // an entry weighs 1: which entries are the best k
};

// Mass is summed in multiples of 2^-40: integer sums are the same in any order and on any machine.
// Room for a total mass of 2^23.
constexpr double kMassUnits = 1099511627776.0;  // 2^40

// x in these units, rounded: mass_digits(bits of x) << mass_places(exponent of x). Whoever adds up
// entries of one exponent can add their digits, which are below 2^24.
FLEXPREFILL_HOST_DEVICE inline int mass_places(uint32_t exponent) {
  return exponent > 110 ? static_cast<int>(exponent) - 110 : 0;
}
FLEXPREFILL_HOST_DEVICE inline uint32_t mass_digits(uint32_t bits) {
  const uint32_t exponent = bits >> 23;
  const uint32_t mantissa = (bits & 0x7fffffu) | 0x800000u;
  if (exponent >= 110) return mantissa;
  const uint32_t below = 110 - exponent;  // binary places below the unit
  return below > 24 ? 0 : (mantissa + (1u << (below - 1))) >> below;
}
FLEXPREFILL_HOST_DEVICE inline uint64_t fixed_mass(float x) {
#if defined(__CUDA_ARCH__)
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint64_t>(mass_digits(bits)) << mass_places(bits >> 23);
#else  // the same: the product is exact, and so is the sum where it is not a whole number before
  constexpr double kHalf = 0.5;
  return static_cast<uint64_t>(static_cast<int64_t>(static_cast<double>(x) * kMassUnits + kHalf));
#endif
}

// What an entry with these bits weighs.
FLEXPREFILL_HOST_DEVICE inline uint64_t weight_of(uint32_t bits, Weight kind) {
  return kind == Weight::kMass ? fixed_mass(std::bit_cast<float>(bits)) : 1;
}

// The limit that stands for the share gamma of a total mass `total`. All of it has no limit: what
// rounding leaves of the smallest entries must not decide.
FLEXPREFILL_HOST_DEVICE inline uint64_t mass_limit(float gamma, int64_t total) {
  if (gamma >= 1.0f) return std::numeric_limits<uint64_t>::max();
  return static_cast<uint64_t>(static_cast<double>(gamma) * static_cast<double>(total) *
                               kMassUnits);
}

// Entries above `threshold` (a float's bits) are taken, and the first `ties` that equal it.
struct Taken {
  int64_t count = 0;
  uint32_t threshold = 0;
  int64_t ties = 0;
  uint64_t weight = 0;  // of all that take_largest takes

  // Whether x is taken; to be asked in ascending order of index.
  FLEXPREFILL_HOST_DEVICE bool takes(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    return bits == threshold ? ties-- > 0 : bits > threshold;
  }
};

struct Histogram {
  static constexpr int kLevels = 3;
  static constexpr int kBuckets = 2048;
  uint64_t weight[kBuckets];
  uint64_t count[kBuckets];
};

// The walk down the histograms: what was taken so far, and the bits of x that are decided.
struct HistogramWalk {
  uint64_t limit = 0;
  uint64_t weight = 0;
  uint64_t count = 0;
  uint32_t prefix = 0;

  // Bits of x below the ones that level 0, 1, 2 decides.
  FLEXPREFILL_HOST_DEVICE static int shift(int level) { return 20 - 10 * level; }
  FLEXPREFILL_HOST_DEVICE static int buckets(int level) { return level == 0 ? 2048 : 1024; }
  FLEXPREFILL_HOST_DEVICE static int bucket(uint32_t bits, int level) {
    return static_cast<int>(bits >> shift(level)) & (buckets(level) - 1);
  }
  // Whether an entry lies in the bucket that the levels above have chosen.
  FLEXPREFILL_HOST_DEVICE bool inside(uint32_t bits, int level) const {
    return level == 0 || (bits ^ prefix) >> shift(level - 1) == 0;
  }
  // What was taken in the end: one value is left, which does not fit as often as it is there; so it
  // weighs more than 0.
  FLEXPREFILL_HOST_DEVICE Taken taken(Weight kind) const {
    const uint64_t each = weight_of(prefix, kind);
    const int64_t ties = static_cast<int64_t>((limit - weight) / each);
    return {.count = static_cast<int64_t>(count) + ties, .threshold = prefix, .ties = ties};
  }
  // Takes whole buckets from `top` down to `bottom` while they fit, and chooses the first that does
  // not. False if all fit, which only level 0 can find.
  FLEXPREFILL_HOST_DEVICE bool descend(const Histogram& histogram, int level, int bottom, int top) {
    for (int i = top; i >= bottom; --i) {
      if (histogram.weight[i] > limit - weight) {
        prefix |= static_cast<uint32_t>(i) << shift(level);
        return true;
      }
      weight += histogram.weight[i];
      count += histogram.count[i];
    }
    return false;
  }
};

// The walk's end where the bucket that level 0 has chosen has few entries.
constexpr int kFewEntries = 48;
FLEXPREFILL_HOST_DEVICE inline void walk_few(const float* x, int64_t size, Weight weight,
                                             HistogramWalk& walk) {
  uint32_t sorted[kFewEntries];  // bits, the largest first
  int inside = 0;
  for (int64_t e = 0; e < size; ++e) {
    const uint32_t bits = std::bit_cast<uint32_t>(x[e]);
    if (!walk.inside(bits, 1)) continue;
    int at = inside++;
    for (; at > 0 && sorted[at - 1] < bits; --at) sorted[at] = sorted[at - 1];
    sorted[at] = bits;
  }
  for (int begin = 0, end = 0; begin < inside; begin = end) {
    while (end < inside && sorted[end] == sorted[begin]) ++end;
    walk.prefix = sorted[begin];
    const auto count = static_cast<uint64_t>(end - begin);
    const uint64_t each = weight_of(walk.prefix, weight);
    if (count * each > walk.limit - walk.weight) return;
    walk.weight += count * each;
    walk.count += count;
  }
}

// The largest entries of x [size], one after the other while their running weight stays <= limit.
FLEXPREFILL_HOST_DEVICE inline Taken take_largest(const float* x, int64_t size, Weight weight,
                                                  uint64_t limit, Histogram* histogram) {
  HistogramWalk walk{.limit = limit};
  uint32_t least = std::numeric_limits<uint32_t>::max(), greatest = 0;
  for (int64_t e = 0; e < size; ++e) {
    const uint32_t bits = std::bit_cast<uint32_t>(x[e]);
    least = bits < least ? bits : least;
    greatest = bits > greatest ? bits : greatest;
  }
  for (int level = 0; level < Histogram::kLevels; ++level) {
    const int bottom = level == 0 ? HistogramWalk::bucket(least, 0) : 0;
    const int top = level == 0 ? HistogramWalk::bucket(greatest, 0) : walk.buckets(level) - 1;
    for (int i = bottom; i <= top; ++i) histogram->weight[i] = histogram->count[i] = 0;
    for (int64_t e = 0; e < size; ++e) {
      const uint32_t bits = std::bit_cast<uint32_t>(x[e]);
      if (!walk.inside(bits, level)) continue;
      const int bucket = HistogramWalk::bucket(bits, level);
      histogram->weight[bucket] += weight_of(bits, weight);
      histogram->count[bucket] += 1;
    }
    if (!walk.descend(*histogram, level, bottom, top)) {
      return {.count = size, .threshold = 0, .ties = size, .weight = walk.weight};
    }
    if (level == 0 && histogram->count[HistogramWalk::bucket(walk.prefix, 0)] <= kFewEntries) {
      walk_few(x, size, weight, walk);
      break;
    }
  }
  Taken taken = walk.taken(weight);
  taken.weight =
      walk.weight + static_cast<uint64_t>(taken.ties) * weight_of(taken.threshold, weight);
  return taken;
}

// ---- How many blocks ------------------------------------------------------------------------

// Blocks that hold `tokens`; any int64.
FLEXPREFILL_HOST_DEVICE inline int64_t whole_blocks(int64_t tokens, int64_t block_size) {
  return tokens / block_size + (tokens % block_size != 0);
}

FLEXPREFILL_HOST_DEVICE inline int64_t clamp_blocks(int64_t blocks, int64_t low, int64_t high) {
  return blocks < low ? low : blocks > high ? high : blocks;
}

// FlexPrefill's options in blocks, clamped to the n blocks that there are.
struct FlexPrefillRule {
  float gamma = 0;
  float tau = 0;
  int64_t min_blocks = 1;
  int64_t max_blocks = 1;
};

inline FlexPrefillRule flex_prefill_rule(const FlexPrefill& pattern, int64_t block_size,
                                         int64_t n) {
  const auto blocks = [&](int64_t tokens) {
    return clamp_blocks(whole_blocks(tokens, block_size), 1, n);
  };
  FlexPrefillRule rule{pattern.gamma, pattern.tau, blocks(pattern.min_budget), n};
  if (pattern.max_budget) rule.max_blocks = blocks(*pattern.max_budget);
  return rule;
}

// #{m : x_1 + ... + x_m <= gamma} + 1 for x in descending order; x sums to 1.
FLEXPREFILL_HOST_DEVICE inline int64_t cover(const float* x, int64_t size, float gamma,
                                             Histogram* histogram) {
  return take_largest(x, size, Weight::kMass, mass_limit(gamma, 1), histogram).count + 1;
}

FLEXPREFILL_HOST_DEVICE inline int64_t cover_blocks(int64_t cover_count, int64_t block_size,
                                                    const FlexPrefillRule& rule) {
  return clamp_blocks(cover_count / block_size + 1, rule.min_blocks, rule.max_blocks);
}

// ---- Which pattern --------------------------------------------------------------------------

// x[0] + ... + x[size - 1] in double precision, in the order in which a warp adds: lane l takes
// entries l, l + 32, ..., then lanes 16, 8, 4, 2 and 1 apart are added.
FLEXPREFILL_HOST_DEVICE inline double warp_order_sum(const float* x, int64_t size) {
  double lanes[32] = {};
  for (int64_t e = 0; e < size; ++e) lanes[e % 32] += static_cast<double>(x[e]);
  for (int width = 16; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

// sums[s] = x[sB] + ... + x[min((s + 1) B, size) - 1]
FLEXPREFILL_HOST_DEVICE inline void block_sums(const float* x, int64_t size, int64_t block_size,
                                               float* sums) {
  for (int64_t begin = 0; begin < size; begin += block_size) {
    const int64_t end = begin + block_size < size ? begin + block_size : size;
    sums[begin / block_size] = static_cast<float>(warp_order_sum(x + begin, end - begin));
  }
}

// One entry's part of the sum over a log(a / mean) + b log(b / mean); 0 log 0 = 0.
FLEXPREFILL_HOST_DEVICE inline double jsd_term(float p, float q) {
  const double a = static_cast<double>(p);
  const double b = static_cast<double>(q);
  const double mean = (a + b) / 2;
  return (a > 0 ? a * std::log(a / mean) : 0) + (b > 0 ? b * std::log(b / mean) : 0);
}
FLEXPREFILL_HOST_DEVICE inline float jsd_sqrt_of_sum(double sum) {
  return static_cast<float>(std::sqrt(sum > 0 ? sum / 2 : 0));
}

// Square root of the Jensen-Shannon divergence, natural logarithm.
FLEXPREFILL_HOST_DEVICE inline float jsd_sqrt(const float* p, const float* q, int64_t n) {
  double sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += jsd_term(p[j], q[j]);
  return jsd_sqrt_of_sum(sum);
}

// ---- Which blocks ---------------------------------------------------------------------------

FLEXPREFILL_HOST_DEVICE inline void set_bit(uint64_t* bits, int64_t i) {
  bits[i / 64] |= uint64_t{1} << (i % 64);
}

FLEXPREFILL_HOST_DEVICE inline bool has_bit(const uint64_t* bits, int64_t i) {
  return (bits[i / 64] >> (i % 64) & 1) != 0;
}

// Working memory and result of the choice for one head.
struct BlockChoice {
  float* vertical_block = nullptr;    // [n]
  float* slash_block = nullptr;       // [n]
  uint64_t* vertical_bits = nullptr;  // [words], bit j: key block j
  uint64_t* slash_bits = nullptr;     // [words], bit n - 1 - s: block distance s
};

// What was decided, as HeadAudit reports it.
struct HeadChoice {
  HeadPattern pattern = HeadPattern::kDense;
  float jsd_sqrt = 0;
  int64_t vertical_blocks = 0;
  int64_t slash_blocks = 0;
};

// The best `count` blocks or distances, entry 0 always among them.
FLEXPREFILL_HOST_DEVICE inline void choose_vertical_slash(int64_t n, int64_t vertical_blocks,
                                                          int64_t slash_blocks,
                                                          const BlockChoice& choice,
                                                          Histogram* histogram) {
  for (int64_t w = 0; w < (n + 63) / 64; ++w) choice.vertical_bits[w] = choice.slash_bits[w] = 0;
  set_bit(choice.vertical_bits, 0);
  set_bit(choice.slash_bits, n - 1);
  Taken vertical = take_largest(choice.vertical_block + 1, n - 1, Weight::kCount,
                                static_cast<uint64_t>(vertical_blocks - 1), histogram);
  Taken slash = take_largest(choice.slash_block + 1, n - 1, Weight::kCount,
                             static_cast<uint64_t>(slash_blocks - 1), histogram);
  for (int64_t e = 1; e < n; ++e) {
    if (vertical.takes(choice.vertical_block[e])) set_bit(choice.vertical_bits, e);
    if (slash.takes(choice.slash_block[e])) set_bit(choice.slash_bits, n - 1 - e);
  }
}

// Steps 2 to 5 of FlexPrefill for one head.
//   vertical, slash  [s_kv], per key and per distance, each sums to 1
//   pooled           [n], the estimate from block means, sums to 1
FLEXPREFILL_HOST_DEVICE inline HeadChoice choose_flex_prefill(
    const float* vertical, const float* slash, const float* pooled, int64_t s_kv,
    int64_t block_size, const FlexPrefillRule& rule, const BlockChoice& choice,
    Histogram* histogram) {
  const int64_t n = whole_blocks(s_kv, block_size);
  block_sums(vertical, s_kv, block_size, choice.vertical_block);
  block_sums(slash, s_kv, block_size, choice.slash_block);
  HeadChoice head;
  head.jsd_sqrt = jsd_sqrt(pooled, choice.vertical_block, n);
  if (head.jsd_sqrt < rule.tau) {
    head.pattern = HeadPattern::kQueryAware;
    head.vertical_blocks = head.slash_blocks = rule.min_blocks;
  } else {
    head.pattern = HeadPattern::kVerticalSlash;
    head.vertical_blocks =
        cover_blocks(cover(vertical, s_kv, rule.gamma, histogram), block_size, rule);
    head.slash_blocks = cover_blocks(cover(slash, s_kv, rule.gamma, histogram), block_size, rule);
  }
  choose_vertical_slash(n, head.vertical_blocks, head.slash_blocks, choice, histogram);
  return head;
}

// The vertical-slash pattern with fixed sizes: the same choice by the same block scores.
FLEXPREFILL_HOST_DEVICE inline HeadChoice choose_fixed_sizes(
    const float* vertical, const float* slash, int64_t s_kv, int64_t block_size,
    const VerticalSlash& pattern, const BlockChoice& choice, Histogram* histogram) {
  const int64_t n = whole_blocks(s_kv, block_size);
  const int64_t vertical_blocks = whole_blocks(pattern.vertical_size, block_size);
  const int64_t slash_blocks = whole_blocks(pattern.slash_size, block_size);
  block_sums(vertical, s_kv, block_size, choice.vertical_block);
  block_sums(slash, s_kv, block_size, choice.slash_block);
  const HeadChoice head{.pattern = HeadPattern::kVerticalSlash,
                        .jsd_sqrt = 0,
                        .vertical_blocks = clamp_blocks(vertical_blocks, 1, n),
                        .slash_blocks = clamp_blocks(slash_blocks, 1, n)};
  choose_vertical_slash(n, head.vertical_blocks, head.slash_blocks, choice, histogram);
  return head;
}

// Word w of a row with bits begin .. end - 1 set; begin, end >= 0.
FLEXPREFILL_HOST_DEVICE inline uint64_t range_word(int64_t begin, int64_t end, int64_t w) {
  const auto below = [&](int64_t bit) {  // bits of the word below `bit`
    return bit <= 64 * w        ? uint64_t{0}
           : bit >= 64 * w + 64 ? ~uint64_t{0}
                                : ~(~uint64_t{0} << (bit - 64 * w));
  };
  return below(end) & ~below(begin);
}

// Word w of the row of query block i (absolute): key block j <= i is kept if it is a chosen block,
// or i - j a chosen distance.
FLEXPREFILL_HOST_DEVICE inline uint64_t row_word(const uint64_t* vertical_bits,
                                                 const uint64_t* slash_bits, int64_t n, int64_t i,
                                                 int64_t w) {
  const int64_t words = (n + 63) / 64;
  const int64_t shift = n - 1 - i;  // slash_bits >> shift: bit j is distance i - j
  const int64_t from = w + shift / 64;
  const int bits = static_cast<int>(shift % 64);
  uint64_t slash = from < words ? slash_bits[from] >> bits : 0;
  if (bits != 0 && from + 1 < words) slash |= slash_bits[from + 1] << (64 - bits);
  return (vertical_bits[w] & range_word(0, i + 1, w)) | slash;
}

FLEXPREFILL_HOST_DEVICE inline void write_row(const BlockChoice& choice, int64_t n, int64_t i,
                                              uint64_t* row) {
  for (int64_t w = 0; w < (n + 63) / 64; ++w) {
    row[w] = row_word(choice.vertical_bits, choice.slash_bits, n, i, w);
  }
}

// Step 6. The map [sum over the rows of (i + 1)] holds p_ij, row after row, each row j = 0 .. i.
FLEXPREFILL_HOST_DEVICE inline Taken cover_map(const float* map, int64_t size, int64_t rows,
                                               float gamma, Histogram* histogram) {
  return take_largest(map, size, Weight::kMass, mass_limit(gamma, rows), histogram);
}

// Adds the kept entries of map row i to its bits; rows ascending.
FLEXPREFILL_HOST_DEVICE inline void keep_map_row(const float* map_row, int64_t i, Taken& taken,
                                                 uint64_t* row) {
  for (int64_t j = 0; j <= i; ++j) {
    if (taken.takes(map_row[j])) set_bit(row, j);
  }
}

// Word w of the row of query block i whose first query stands at `position`: the blocks that a
// window of the first global_window keys and each query's last local_window (>= 1) keys touches.
FLEXPREFILL_HOST_DEVICE inline uint64_t window_word(int64_t global_window, int64_t local_window,
                                                    int64_t position, int64_t block_size, int64_t i,
                                                    int64_t w) {
  const int64_t first_key = position - local_window + 1;
  const int64_t local = first_key > 0 ? first_key / block_size : 0;
  return (range_word(0, whole_blocks(global_window, block_size), w) & range_word(0, i + 1, w)) |
         range_word(local, i + 1, w);
}

FLEXPREFILL_HOST_DEVICE inline void write_window_row(const StreamingLlm& window, int64_t position,
                                                     int64_t block_size, int64_t n, int64_t i,
                                                     uint64_t* row) {
  for (int64_t w = 0; w < (n + 63) / 64; ++w) {
    row[w] = window_word(window.global_window, window.local_window, position, block_size, i, w);
  }
}

FLEXPREFILL_HOST_DEVICE inline void write_dense_row(int64_t n, int64_t i, uint64_t* row) {
  for (int64_t w = 0; w < (n + 63) / 64; ++w) row[w] = range_word(0, i + 1, w);
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_PATTERN_H_

// SelectOps through Highway, one table per instruction set.
#include <limits>

#include "cpu/tile_ops.h"
#include "cpu/vector_targets.h"
#include "select/select_ops.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "select/select_ops_highway.cc"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "cpu/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace flexprefill {
namespace HWY_NAMESPACE {
namespace {

// Lanes of a panel: panels are whole vectors.
using F32 = hn::ScalableTag<float>;
using Vec = hn::Vec<F32>;
constexpr int kLanes = HWY_LANES(float);
static_assert(kLanes <= SelectOps::kMaxLanes);

// The logits of one key, lanes v .. v + kLanes - 1; -inf where a lane does not see the key.
template <bool kMasked>
HWY_INLINE Vec logits(const ScoreTile& tile, int key, int v) {
  const F32 d;
  const Vec x = hn::Mul(hn::Load(d, tile.s + key * tile.panel + v), hn::Set(d, tile.scale));
  if constexpr (!kMasked) return x;
  const auto seen = hn::Lt(hn::Set(d, static_cast<float>(key)), hn::LoadU(d, tile.visible + v));
  return hn::IfThenElse(seen, x, hn::Set(d, -std::numeric_limits<float>::infinity()));
}

template <bool kMasked>
void row_stats_as(const ScoreTile& tile, float* max, float* sum) {
  const F32 d;
  for (int v = 0; v < tile.panel; v += kLanes) {
    const Vec old_max = hn::LoadU(d, max + v);
    Vec top = old_max;
    for (int key = 0; key < tile.n; ++key) top = hn::Max(top, logits<kMasked>(tile, key, v));
    Vec total = hn::Mul(hn::LoadU(d, sum + v), exp2(d, hn::Sub(old_max, top)));
    for (int key = 0; key < tile.n; ++key) {
      total = hn::Add(total, exp2(d, hn::Sub(logits<kMasked>(tile, key, v), top)));
    }
    hn::StoreU(top, d, max + v);
    hn::StoreU(total, d, sum + v);
  }
}

void row_stats(const ScoreTile& tile, float* max, float* sum) {
  tile.visible == nullptr ? row_stats_as<false>(tile, max, sum)
                          : row_stats_as<true>(tile, max, sum);
}

template <bool kMasked, bool kSplit>
void masses_as(const ScoreTile& tile, const float* max, const float* inverse, int split,
               float* HWY_RESTRICT slash, float* HWY_RESTRICT below, float* HWY_RESTRICT above) {
  const F32 d;
  constexpr int kStride = SelectOps::kMaxLanes;
  float* const side = split > 0 ? below : above;
  for (int key = 0; key < tile.n; ++key) {
    Vec low = hn::Zero(d), high = hn::Zero(d);
    for (int v = 0; v < tile.panel; v += kLanes) {
      const Vec x = hn::Sub(logits<kMasked>(tile, key, v), hn::LoadU(d, max + v));
      const Vec mass = hn::Mul(exp2(d, x), hn::LoadU(d, inverse + v));
      float* const distance = slash + (v - key);
      hn::StoreU(hn::Add(hn::LoadU(d, distance), mass), d, distance);
      if constexpr (kSplit) {
        const auto is_low =
            hn::Lt(hn::Iota(d, static_cast<float>(v)), hn::Set(d, static_cast<float>(split)));
        low = hn::Add(low, hn::IfThenElseZero(is_low, mass));
        high = hn::Add(high, hn::IfThenZeroElse(is_low, mass));
      } else {
        low = hn::Add(low, mass);
      }
    }
    float* const sums = (kSplit ? below : side) + key * kStride;
    hn::StoreU(hn::Add(hn::LoadU(d, sums), low), d, sums);
    if constexpr (kSplit) {
      float* const others = above + key * kStride;
      hn::StoreU(hn::Add(hn::LoadU(d, others), high), d, others);
    }
  }
}

void masses(const ScoreTile& tile, const float* max, const float* inverse, int split, float* slash,
            float* below, float* above) {
  const bool masked = tile.visible != nullptr;
  const bool splits = split > 0 && split < tile.panel;
  const auto run = masked ? (splits ? masses_as<true, true> : masses_as<true, false>)
                          : (splits ? masses_as<false, true> : masses_as<false, false>);
  run(tile, max, inverse, split, slash, below, above);
}

void sum_lanes(const float* partial, int n, float* sums) {
  const F32 d;
  for (int key = 0; key < n; ++key) {
    const Vec lanes = hn::LoadU(d, partial + key * SelectOps::kMaxLanes);
    sums[key] = hn::GetLane(hn::SumOfLanes(d, lanes));
  }
}

// Sums of exponentials up to it are as exact as others.
constexpr float kMostSum = 0x1p100f;

// Of one vector of lanes. True if no sum is too great.
template <bool kMasked, bool kWeighted>
HWY_INLINE bool block_sums(const ScoreTile& tile, int per_block, float last_weight, int v,
                           int64_t stride, Vec reference, float* max, float* sum) {
  const F32 d;
  // exp2 goes that far; a NaN stays (see there).
  const Vec most = hn::Set(d, 120.0f);
  auto good = hn::Eq(most, most);
  for (int begin = 0; begin < tile.n; begin += per_block) {
    const int end = begin + per_block < tile.n ? begin + per_block : tile.n;
    Vec total = hn::Zero(d);
    for (int key = begin; key < end; ++key) {
      Vec x;
      if constexpr (kMasked) {
        x = hn::Sub(logits<true>(tile, key, v), reference);
      } else {
        x = hn::MulSub(hn::Load(d, tile.s + key * tile.panel + v), hn::Set(d, tile.scale),
                       reference);
      }
      Vec p = exp2(d, HWY_ARCH_X86 ? hn::Min(most, x) : hn::IfThenElse(hn::Gt(x, most), most, x));
      if constexpr (kWeighted) {
        if (key == tile.n - 1) p = hn::Mul(p, hn::Set(d, last_weight));
      }
      total = hn::Add(total, p);
    }
    const int64_t at = begin / per_block * stride + v;
    hn::StoreU(reference, d, max + at);
    hn::StoreU(total, d, sum + at);
    good = hn::And(good, hn::Lt(total, hn::Set(d, kMostSum)));
  }
  return hn::AllTrue(d, good);
}

template <bool kMasked, bool kWeighted>
void block_stats_as(const ScoreTile& tile, int per_block, float last_weight, int64_t stride,
                    float* reference, float* max, float* sum) {
  const F32 d;
  const auto sums = block_sums<kMasked, kWeighted>;
  for (int v = 0; v < tile.panel; v += kLanes) {
    Vec top = hn::LoadU(d, reference + v);
    const bool known = hn::AllTrue(d, hn::Lt(hn::Set(d, TileOps::kNoMax), top));
    if (known && sums(tile, per_block, last_weight, v, stride, top, max, sum)) continue;
    for (int key = 0; key < tile.n; ++key) top = hn::Max(top, logits<kMasked>(tile, key, v));
    sums(tile, per_block, last_weight, v, stride, top, max, sum);
    hn::StoreU(top, d, reference + v);
  }
}

void block_stats(const ScoreTile& tile, int per_block, float last_weight, int64_t stride,
                 float* reference, float* max, float* sum) {
  const bool masked = tile.visible != nullptr, weighted = last_weight != 1.0f;
  const auto run = masked ? (weighted ? block_stats_as<true, true> : block_stats_as<true, false>)
                          : (weighted ? block_stats_as<false, true> : block_stats_as<false, false>);
  run(tile, per_block, last_weight, stride, reference, max, sum);
}

void block_shares(const float* max, int64_t n, int lanes, const float* weight, float* sum,
                  float* total, float* most) {
  const F32 d;
  alignas(64) float top[SelectOps::kMaxShareLanes], factor[SelectOps::kMaxShareLanes];
  for (int v = 0; v < lanes; v += kLanes) {
    hn::Store(hn::Set(d, TileOps::kNoMax), d, top + v);
    hn::StoreU(hn::Zero(d), d, total + v);
  }
  for (int64_t j = 0; j < n; ++j) {
    for (int v = 0; v < lanes; v += kLanes) {
      hn::Store(hn::Max(hn::Load(d, top + v), hn::LoadU(d, max + j * lanes + v)), d, top + v);
    }
  }
  for (int64_t j = 0; j < n; ++j) {
    for (int v = 0; v < lanes; v += kLanes) {
      const int64_t at = j * lanes + v;
      const Vec own = hn::LoadU(d, max + at), all = hn::Load(d, top + v);
      Vec x = hn::LoadU(d, sum + at);
      // Mostly they are the same.
      if (!hn::AllTrue(d, hn::Eq(own, all))) x = hn::Mul(x, exp2(d, hn::Sub(own, all)));
      hn::StoreU(x, d, sum + at);
      hn::StoreU(hn::Add(hn::LoadU(d, total + v), x), d, total + v);
    }
  }
  for (int v = 0; v < lanes; v += kLanes) {
    const Vec all = hn::LoadU(d, total + v);
    const Vec share = hn::Div(hn::LoadU(d, weight + v), all);
    hn::Store(hn::IfThenElseZero(hn::Gt(all, hn::Zero(d)), share), d, factor + v);
  }
  for (int64_t j = 0; j < n; ++j) {
    Vec largest = hn::Zero(d);
    for (int v = 0; v < lanes; v += kLanes) {
      const Vec x = hn::Mul(hn::LoadU(d, sum + j * lanes + v), hn::Load(d, factor + v));
      hn::StoreU(x, d, sum + j * lanes + v);
      largest = hn::Max(largest, x);
    }
    if (most != nullptr) most[j] = hn::GetLane(hn::MaxOfLanes(d, largest));
  }
}

constexpr int64_t kRowsAhead = 16;  // of the row that is added, for prefetches

// Columns [first, first + kParts * kPart), whose sums stay in registers: what is left to wait for
// is the rows, and many of them are under way at once.
template <DType kType, int kParts>
void add_columns(const std::byte* rows, int64_t stride, int64_t n, int first, float* sums) {
  const Part part;
  hn::Vec<Part> sum[kParts];
  for (int p = 0; p < kParts; ++p) sum[p] = hn::LoadU(part, sums + first + p * kPart);
  for (int64_t i = 0; i < n; ++i) {
    const std::byte* row = rows + i * stride + first * kElementSize<kType>;
    // Rows of a head lie apart: the processor does not see which ones come next.
    for (int p = 0; p < kParts * kPart * kElementSize<kType>; p += 64) {
      hwy::Prefetch(row + kRowsAhead * stride + p);
    }
    for (int p = 0; p < kParts; ++p) {
      sum[p] = hn::Add(sum[p], load_part<kType>(row + p * kPart * kElementSize<kType>));
    }
  }
  for (int p = 0; p < kParts; ++p) hn::StoreU(sum[p], part, sums + first + p * kPart);
}

template <DType kType>
void add_rows_as(const std::byte* rows, int64_t stride, int64_t n, int d, float* sums) {
  // What registers hold: there are 16 of them below AVX-512.
  constexpr int kParts = HWY_ARCH_X86 && HWY_TARGET > HWY_AVX3 ? 8 : 16;
  int c = 0;
  for (; c + kParts * kPart <= d; c += kParts * kPart) {
    add_columns<kType, kParts>(rows, stride, n, c, sums);
  }
  for (; c < d; c += kPart) add_columns<kType, 1>(rows, stride, n, c, sums);
}

void add_rows(const std::byte* rows, int64_t stride, int64_t n, int d, DType dtype, float* sums) {
  switch (dtype) {
    case DType::kFloat32:
      return add_rows_as<DType::kFloat32>(rows, stride, n, d, sums);
    case DType::kFloat16:
      return add_rows_as<DType::kFloat16>(rows, stride, n, d, sums);
    case DType::kBFloat16:
      return add_rows_as<DType::kBFloat16>(rows, stride, n, d, sums);
  }
}

void softmax_dots(const float* a, const float* b, int64_t n, int d, float scale, float last_share,
                  float* row) {
  const Part part;
  float max = TileOps::kNoMax;
  for (int64_t j = 0; j < n; ++j) {
    auto dot = hn::Zero(part);
    for (int c = 0; c < d; c += kPart) {
      dot = hn::MulAdd(hn::LoadU(part, a + c), hn::LoadU(part, b + j * d + c), dot);
    }
    row[j] = scale * hn::GetLane(hn::SumOfLanes(part, dot));
    if (row[j] > max) max = row[j];
  }
  int64_t j = 0;
  for (; j + kPart <= n; j += kPart) {
    const auto x = hn::Sub(hn::LoadU(part, row + j), hn::Set(part, max));
    hn::StoreU(exp2(part, x), part, row + j);
  }
  const hn::CappedTag<float, 1> one;
  for (; j < n; ++j) {
    hn::StoreU(exp2(one, hn::Sub(hn::LoadU(one, row + j), hn::Set(one, max))), one, row + j);
  }
  row[n - 1] *= last_share;
  double sum = 0;
  for (int64_t e = 0; e < n; ++e) sum += static_cast<double>(row[e]);
  const double inverse = 1 / sum;
  for (int64_t e = 0; e < n; ++e) row[e] = static_cast<float>(row[e] * inverse);
}

}  // namespace

SelectOps select_ops_table() {
  return {.row_stats = row_stats,
          .masses = masses,
          .sum_lanes = sum_lanes,
          .block_stats = block_stats,
          .block_shares = block_shares,
          .add_rows = add_rows,
          .softmax_dots = softmax_dots};
}

}  // namespace HWY_NAMESPACE
}  // namespace flexprefill
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flexprefill {
namespace {

template <auto kTable>
const SelectOps& kept() {
  static const SelectOps table = kTable();
  return table;
}

}  // namespace

const SelectOps& select_ops(CpuTarget target) {
  switch (target) {
#if HWY_TARGETS & HWY_AVX2
    case CpuTarget::kAvx2:
      return kept<N_AVX2::select_ops_table>();
#endif
#if HWY_TARGETS & HWY_AVX3
    case CpuTarget::kAvx512:
    case CpuTarget::kAvx512Bf16:
    case CpuTarget::kAmxBf16:
      return kept<N_AVX3::select_ops_table>();
#endif
    default:
      return kept<HWY_STATIC_DISPATCH(select_ops_table)>();
  }
}

}  // namespace flexprefill
#endif  // HWY_ONCE

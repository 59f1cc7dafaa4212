// The tile operations through Highway, one table per instruction set and element type.
//
// Both products are one register tile: C[row][lane] += A(row, k) * B[k][lane], with kVectors
// vectors of lanes and kRows rows of accumulators. B comes packed (a panel of queries, or of
// weights); the elements of A are broadcast from where they lie:
//   scores      S^T = K Q^T    row = key       A steps over k by 1, over rows by the row stride
//   accumulate  O^T += V^T P^T row = column c  A steps over k by the row stride, over rows by 1
// K and V stand in fp32 with rows of an odd number of cache lines: with strides of a power of two
// the 128 rows of a block would share a few sets of the L1 cache.
#include <cstring>

#include "cpu/tile_ops_tables.h"
#include "cpu/vector_targets.h"
#include "math.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/tile_ops_highway.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "cpu/vector-inl.h"

// Of the steps over k, 1.5 to 6 % on Zen 3. (A loop of four inside is not unrolled by g++ 12.)
#undef FLEXPREFILL_UNROLL_BY_4
#if HWY_COMPILER_CLANG
#define FLEXPREFILL_UNROLL_BY_4 _Pragma("clang loop unroll_count(4)")
#else
#define FLEXPREFILL_UNROLL_BY_4 _Pragma("GCC unroll 4")
#endif

HWY_BEFORE_NAMESPACE();
namespace flexprefill {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::ScalableTag<float>;
using Vec = hn::Vec<F32>;

// Register tiles; they affect speed only. 16 vector registers hold 2 x 6 accumulators, 32 hold
// 2 x 12 or 4 x 6; 4 more rows are the rest of any multiple of 4 rows.
#if HWY_TARGET == HWY_AVX3
constexpr int kVectors = 2, kRows = 12;
#elif HWY_TARGET == HWY_NEON
constexpr int kVectors = 4, kRows = 6;
#else
constexpr int kVectors = 2, kRows = 6;
#endif
constexpr int kRestRows = 4;
constexpr int kLanes = HWY_LANES(float);
constexpr int kPanel = kVectors * kLanes;

// Floats between the rows of K and V.
constexpr int row_stride(int d) { return ((d + 15) / 16 | 1) * 16; }

// ---- Conversion ---------------------------------------------------------------------------------

// Rounds to nearest even; a NaN stays a NaN.
template <DType kType>
HWY_INLINE void store_part(hn::Vec<Part> v, std::byte* p) {
  const Part d;
  if constexpr (kType == DType::kFloat32) {
    hn::StoreU(v, d, reinterpret_cast<float*>(p));
  } else if constexpr (kType == DType::kFloat16 && !kConvertsFloat16) {
    for (int i = 0; i < kPart; ++i) {
      store_float(p + 2 * i, kType, hn::GetLane(v));
      v = hn::Shuffle0321(v);
    }
  } else if constexpr (kType == DType::kFloat16) {
    const hn::Rebind<hwy::float16_t, Part> d16;
    hn::StoreU(hn::DemoteTo(d16, v), d16, reinterpret_cast<hwy::float16_t*>(p));
  } else {
    const hn::Rebind<uint16_t, Part> d16;
    const hn::RebindToUnsigned<Part> d32;
    const hn::RebindToSigned<Part> i32;
    const auto bits = hn::BitCast(d32, v);
    const auto top = hn::ShiftRight<16>(bits);
    const auto odd = hn::And(top, hn::Set(d32, 1));
    const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(d32, 0x7fff))));
    const auto is_nan = hn::RebindMask(d32, hn::IsNaN(v));
    const auto result = hn::IfThenElse(is_nan, hn::Or(top, hn::Set(d32, 0x40)), rounded);
    hn::StoreU(hn::DemoteTo(d16, hn::BitCast(i32, result)), d16, reinterpret_cast<uint16_t*>(p));
  }
}

template <DType kType>
HWY_INLINE void load_row(const std::byte* row, int d, float* to) {
  for (int c = 0; c < d; c += kPart) {
    hn::StoreU(load_part<kType>(row + c * kElementSize<kType>), Part(), to + c);
  }
}

// ---- Operands -----------------------------------------------------------------------------------

size_t packed_q_bytes(int d) { return sizeof(float) * d * kPanel; }

// Both turn parts of eight columns at a time: [lane][8] <-> [8][lane].
template <DType kType>
void pack_q(const std::byte* rows, int64_t stride, int n, int d, void* packed) {
  HWY_ALIGN float part[kPanel][8] = {};
  float* to = static_cast<float*>(packed);
  for (int k = 0; k < d; k += 8) {
    for (int lane = 0; lane < n; ++lane) {
      load_row<kType>(rows + lane * stride + k * kElementSize<kType>, 8, part[lane]);
    }
    for (int i = 0; i < 8; ++i) {
      for (int lane = 0; lane < kPanel; ++lane) to[(k + i) * kPanel + lane] = part[lane][i];
    }
  }
}

template <DType kType>
void store(const float* o, const float* sum, int n, int d_v, std::byte* out, int64_t stride) {
  HWY_ALIGN float part[kPanel][8];
  const Part d;
  for (int c = 0; c < d_v; c += 8) {
    for (int i = 0; i < 8; ++i) {
      for (int lane = 0; lane < kPanel; ++lane) part[lane][i] = o[(c + i) * kPanel + lane];
    }
    for (int lane = 0; lane < n; ++lane) {
      std::byte* to = out + lane * stride + c * kElementSize<kType>;
      for (int i = 0; i < 8; i += kPart) {
        const auto quotient = hn::Div(hn::Load(d, part[lane] + i), hn::Set(d, sum[lane]));
        store_part<kType>(quotient, to + i * kElementSize<kType>);
      }
    }
  }
}

size_t row_bytes(int d) { return sizeof(float) * TileOps::kMaxKeys * row_stride(d); }

template <DType kType>
void load_rows(const std::byte* rows, int64_t stride, int n, int at, int d, void* operand) {
  float* to = static_cast<float*>(operand) + static_cast<ptrdiff_t>(at) * row_stride(d);
  for (int i = 0; i < n; ++i) load_row<kType>(rows + i * stride, d, to + i * row_stride(d));
}

// ---- Products -----------------------------------------------------------------------------------

// c[row * kPanel + lane] (+)= sum over k of a[row * row_step + k * k_step] * b[k * kPanel + lane].
template <int kTileRows, bool kAdd>
HWY_INLINE void tile(const float* HWY_RESTRICT a, ptrdiff_t row_step, ptrdiff_t k_step,
                     const float* HWY_RESTRICT b, int n_k, float* HWY_RESTRICT c) {
  const F32 d;
  Vec sum[kTileRows][kVectors];
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = kAdd ? hn::Load(d, c + r * kPanel + v * kLanes) : hn::Zero(d);
    }
  }
  FLEXPREFILL_UNROLL_BY_4
  for (int k = 0; k < n_k; ++k) {
    Vec lanes[kVectors];
    for (int v = 0; v < kVectors; ++v) lanes[v] = hn::Load(d, b + k * kPanel + v * kLanes);
    for (int r = 0; r < kTileRows; ++r) {
      const Vec element = hn::Set(d, a[r * row_step + k * k_step]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::MulAdd(element, lanes[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kVectors; ++v) hn::Store(sum[r][v], d, c + r * kPanel + v * kLanes);
  }
}

// The product over n_rows rows, a multiple of 4: tiles of kRows and, for the rest, of 4.
template <bool kAdd>
HWY_INLINE void product(const float* a, ptrdiff_t row_step, ptrdiff_t k_step, const float* b,
                        int n_k, int n_rows, float* c) {
  int rest = 0;
  while ((n_rows - rest) % kRows != 0) rest += kRestRows;
  int row = 0;
  for (; row < n_rows - rest; row += kRows) {
    tile<kRows, kAdd>(a + row * row_step, row_step, k_step, b, n_k, c + row * kPanel);
  }
  for (; row < n_rows; row += kRestRows) {
    tile<kRestRows, kAdd>(a + row * row_step, row_step, k_step, b, n_k, c + row * kPanel);
  }
}

void scores(const void* packed_q, const void* keys, int first, int n, int d, float* s) {
  const int stride = row_stride(d);
  product<false>(static_cast<const float*>(keys) + static_cast<ptrdiff_t>(first) * stride, stride,
                 1, static_cast<const float*>(packed_q), d, (n + 3) / 4 * 4, s + first * kPanel);
}

void accumulate(float* p, const void* values, int n, int d_v, float* o) {
  product<true>(static_cast<const float*>(values), 1, row_stride(d_v), p, n, d_v, o);
}

// ---- Softmax ------------------------------------------------------------------------------------

void weigh(float* HWY_RESTRICT s, int n, float scale, int d_v, float* HWY_RESTRICT max,
           float* HWY_RESTRICT sum, float* HWY_RESTRICT o) {
  const F32 d;
  const Vec vscale = hn::Set(d, scale);
  Vec top[kVectors], old_max[kVectors], total[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    top[v] = hn::Load(d, s + v * kLanes);
    old_max[v] = hn::Load(d, max + v * kLanes);
    total[v] = hn::Load(d, sum + v * kLanes);
  }
  for (int key = 1; key < n; ++key) {
    for (int v = 0; v < kVectors; ++v) {
      top[v] = hn::Max(top[v], hn::Load(d, s + key * kPanel + v * kLanes));
    }
  }
  bool grew = false;
  for (int v = 0; v < kVectors; ++v) {
    top[v] = hn::Max(hn::Mul(top[v], vscale), old_max[v]);
    grew |= !hn::AllTrue(d, hn::Eq(top[v], old_max[v]));
    hn::Store(top[v], d, max + v * kLanes);
  }
  if (grew) {
    Vec factor[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      factor[v] = exp2(d, hn::Sub(old_max[v], top[v]));
      total[v] = hn::Mul(total[v], factor[v]);
    }
    for (int c = 0; c < d_v; ++c) {
      for (int v = 0; v < kVectors; ++v) {
        float* element = o + c * kPanel + v * kLanes;
        hn::Store(hn::Mul(hn::Load(d, element), factor[v]), d, element);
      }
    }
  }
  for (int key = 0; key < n; ++key) {
    for (int v = 0; v < kVectors; ++v) {
      float* element = s + key * kPanel + v * kLanes;
      const Vec p = exp2(d, hn::MulSub(hn::Load(d, element), vscale, top[v]));
      total[v] = hn::Add(total[v], p);
      hn::Store(p, d, element);
    }
  }
  for (int v = 0; v < kVectors; ++v) hn::Store(total[v], d, sum + v * kLanes);
}

template <DType kType>
constexpr TileOps make_table(CpuTarget target) {
  return {.target = target,
          .panel = kPanel,
          .key_step = 4,
          .packed_q_bytes = packed_q_bytes,
          .pack_q = pack_q<kType>,
          .key_bytes = row_bytes,
          .load_keys = load_rows<kType>,
          .scores = scores,
          .weigh = weigh,
          .value_bytes = row_bytes,
          .load_values = load_rows<kType>,
          .accumulate = accumulate,
          .attend = nullptr,
          .store = store<kType>};
}

}  // namespace

TileOps table(CpuTarget target, DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return make_table<DType::kFloat16>(target);
    case DType::kBFloat16:
      return make_table<DType::kBFloat16>(target);
    default:
      return make_table<DType::kFloat32>(target);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace flexprefill
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flexprefill {

namespace {

template <CpuTarget kTarget, auto kTable>
const TileOps* kept(DType dtype) {
  static const TileOps tables[] = {kTable(kTarget, DType::kFloat32),
                                   kTable(kTarget, DType::kFloat16),
                                   kTable(kTarget, DType::kBFloat16)};
  return &tables[static_cast<int>(dtype)];
}

}  // namespace

const TileOps* highway_tile_ops(CpuTarget target, DType dtype) {
  switch (target) {
#if HWY_ARCH_X86
    case CpuTarget::kBaseline:
      return kept<CpuTarget::kBaseline, HWY_STATIC_DISPATCH(table)>(dtype);
#endif
#if HWY_TARGETS & HWY_AVX2
    case CpuTarget::kAvx2:
      return kept<CpuTarget::kAvx2, N_AVX2::table>(dtype);
#endif
#if HWY_TARGETS & HWY_AVX3
    case CpuTarget::kAvx512:
      return kept<CpuTarget::kAvx512, N_AVX3::table>(dtype);
#endif
#if HWY_TARGETS & HWY_NEON
    case CpuTarget::kNeon:
      return kept<CpuTarget::kNeon, N_NEON::table>(dtype);
#endif
    default:
      return nullptr;
  }
}

}  // namespace flexprefill
#endif  // HWY_ONCE

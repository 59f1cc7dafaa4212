// The products of bf16 inputs with vdpbf16ps; the rest of the table is kAvx512's. The register
// tile is that of tile_ops_highway.cc with pairs in place of floats:
//   scores      rows = keys, straight from their bf16 rows
//   accumulate  rows = columns of V, whose rows 2j and 2j + 1 are interleaved; weights are rounded
//               to bf16 (their sum is not)
// On a Xeon vdpbf16ps issues every other cycle, where two fp32 products issue in each: kAvx512 is
// faster there (docs/notes.md).
#include <cstring>

#include "cpu/tile_ops_tables.h"
#include "hwy/base.h"

#if HWY_ARCH_X86_64

#if defined(__GNUC__) && !defined(__clang__)
// g++ 12 warns of the undefined vectors in its own header.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "cpu/bf16_pairs.h"

HWY_PUSH_ATTRIBUTES("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
namespace flexprefill {
namespace {

using bf16_pairs::kLanes;

constexpr int kPanel = 32;  // as kAvx512's table
constexpr int kVectors = kPanel / kLanes;
// 24 accumulators of 32 registers; 4 more rows are the rest of any multiple of 4.
constexpr int kRows = 12;
constexpr int kRestRows = 4;

// Dwords between the row pairs of V: an odd number of cache lines.
constexpr int value_stride(int d_v) { return ((d_v + 15) / 16 | 1) * 16; }

// c[row * kPanel + lane] (+)= sum over k of a[row * row_step + k * k_step] . b[k * kPanel + lane],
// where both hold pairs.
template <int kTileRows, bool kAdd>
HWY_INLINE void tile(const uint32_t* HWY_RESTRICT a, ptrdiff_t row_step, ptrdiff_t k_step,
                     const uint32_t* HWY_RESTRICT b, int n_k, float* HWY_RESTRICT c) {
  __m512 sum[kTileRows][kVectors];
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = kAdd ? _mm512_load_ps(c + r * kPanel + v * kLanes) : _mm512_setzero_ps();
    }
  }
  for (int k = 0; k < n_k; ++k) {
    __m512i lanes[kVectors];
    for (int v = 0; v < kVectors; ++v) lanes[v] = _mm512_load_si512(b + k * kPanel + v * kLanes);
    for (int r = 0; r < kTileRows; ++r) {
      const __m512i pair = _mm512_set1_epi32(static_cast<int>(a[r * row_step + k * k_step]));
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)pair, (__m512bh)lanes[v]);
      }
    }
  }
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kVectors; ++v) _mm512_store_ps(c + r * kPanel + v * kLanes, sum[r][v]);
  }
}

template <bool kAdd>
HWY_INLINE void product(const uint32_t* a, ptrdiff_t row_step, ptrdiff_t k_step, const uint32_t* b,
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
  const int stride = bf16_pairs::padded_pairs(d);
  product<false>(static_cast<const uint32_t*>(keys) + static_cast<ptrdiff_t>(first) * stride,
                 stride, 1, static_cast<const uint32_t*>(packed_q), d / 2, (n + 3) / 4 * 4,
                 s + first * kPanel);
}

size_t value_bytes(int d_v) {
  return sizeof(uint32_t) * (TileOps::kMaxKeys / 2) * value_stride(d_v);
}

void load_values(const std::byte* rows, int64_t stride, int n, int at, int d_v, void* values) {
  auto* to = static_cast<uint32_t*>(values);
  for (int i = 0; i < n; ++i) {
    const int key = at + i;
    const std::byte* row = rows + i * stride;
    uint32_t* pair = to + static_cast<ptrdiff_t>(key / 2) * value_stride(d_v);
    if (key % 2 == 0 && i + 1 < n) {
      for (int c = 0; c < d_v; c += 8) {
        const auto low =
            _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 2 * c)));
        const auto high = _mm256_cvtepu16_epi32(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + stride + 2 * c)));
        _mm256_store_si256(reinterpret_cast<__m256i*>(pair + c),
                           _mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
      }
      ++i;
    } else {
      auto* half = reinterpret_cast<std::byte*>(pair) + 2 * (key % 2);
      for (int c = 0; c < d_v; ++c) std::memcpy(half + 4 * c, row + 2 * c, 2);
    }
  }
}

void accumulate(float* p, const void* values, int n, int d_v, float* o) {
  bf16_pairs::round_to_pairs<kPanel>(p, n);
  product<true>(static_cast<const uint32_t*>(values), 1, value_stride(d_v),
                reinterpret_cast<const uint32_t*>(p), n / 2, d_v, o);
}

}  // namespace
}  // namespace flexprefill
HWY_POP_ATTRIBUTES

namespace flexprefill {

const TileOps* avx512bf16_tile_ops(DType dtype) {
  const TileOps* base = highway_tile_ops(CpuTarget::kAvx512, dtype);
  if (dtype != DType::kBFloat16 || base == nullptr) return nullptr;
  static const TileOps table = [base] {
    TileOps ops = *base;
    ops.target = CpuTarget::kAvx512Bf16;
    ops.packed_q_bytes = bf16_pairs::packed_q_bytes<kPanel>;
    ops.pack_q = bf16_pairs::pack_q<kPanel>;
    ops.key_bytes = bf16_pairs::key_bytes;
    ops.load_keys = bf16_pairs::load_keys;
    ops.scores = scores;
    ops.value_bytes = value_bytes;
    ops.load_values = load_values;
    ops.accumulate = accumulate;
    ops.store = bf16_pairs::store<kPanel>;
    return ops;
  }();
  return &table;
}

}  // namespace flexprefill

#else

namespace flexprefill {
const TileOps* avx512bf16_tile_ops(DType) { return nullptr; }
}  // namespace flexprefill

#endif

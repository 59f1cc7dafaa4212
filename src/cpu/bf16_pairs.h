// The operands of the bf16 dot-product instructions, which multiply pairs of neighbours in k and
// add both products to one fp32 lane. A dword holds a pair.
//
//   packed_q  [d / 2, panel]    dword (q[lane][2k], q[lane][2k + 1]), rows up to a multiple of 16
//   keys      [key, d / 2]      rows as they lie, zeros up to a multiple of 32 elements
//   p         [key / 2, panel]  dword (p[2j][lane], p[2j + 1][lane])
#ifndef FLEXPREFILL_SRC_CPU_BF16_PAIRS_H_
#define FLEXPREFILL_SRC_CPU_BF16_PAIRS_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <immintrin.h>

#include "cpu/tile_ops.h"
#include "hwy/base.h"

HWY_PUSH_ATTRIBUTES("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
namespace flexprefill::bf16_pairs {

constexpr int kLanes = 16;  // dwords of a vector

// The first n lanes, or all of them.
HWY_INLINE __mmask16 first_lanes(int n) {
  return static_cast<__mmask16>(n >= kLanes ? 0xffff : (1 << n) - 1);
}

// Transposes a 16 x 16 matrix of dwords.
HWY_INLINE void transpose(__m512i (&m)[kLanes]) {
  __m512i t[kLanes];
  for (int i = 0; i < 8; ++i) {  // rows 2i, 2i + 1
    t[2 * i] = _mm512_unpacklo_epi32(m[2 * i], m[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(m[2 * i], m[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {  // m[4i + k], 128-bit lane l: rows 4i .. 4i + 3 of column 4l + k
    m[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    m[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    m[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    m[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int k = 0; k < 4; ++k) {  // gather the 128-bit lanes of columns k, 4 + k, 8 + k, 12 + k
    const __m512i even_low = _mm512_shuffle_i32x4(m[k], m[4 + k], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(m[k], m[4 + k], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(m[8 + k], m[12 + k], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(m[8 + k], m[12 + k], 0xdd);
    t[k] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    t[4 + k] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    t[8 + k] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    t[12 + k] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
  for (int i = 0; i < kLanes; ++i) m[i] = t[i];
}

// Dwords of a row of d elements, up to the next multiple of a cache line.
constexpr int padded_pairs(int d) { return (d + 31) / 32 * kLanes; }

template <int kPanel>
size_t packed_q_bytes(int d) {
  return sizeof(uint32_t) * padded_pairs(d) * kPanel;
}

template <int kPanel>
void pack_q(const std::byte* rows, int64_t stride, int n, int d, void* packed) {
  auto* to = static_cast<uint32_t*>(packed);
  for (int lane = 0; lane < kPanel; lane += kLanes) {
    for (int k = 0; k < padded_pairs(d); k += kLanes) {
      __m512i m[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        m[i] = lane + i < n ? _mm512_maskz_loadu_epi32(first_lanes(d / 2 - k),
                                                       rows + (lane + i) * stride + 4 * k)
                            : _mm512_setzero_si512();
      }
      transpose(m);
      for (int i = 0; i < kLanes; ++i) _mm512_store_si512(to + (k + i) * kPanel + lane, m[i]);
    }
  }
}

inline size_t key_bytes(int d) { return sizeof(uint32_t) * TileOps::kMaxKeys * padded_pairs(d); }

inline void load_keys(const std::byte* rows, int64_t stride, int n, int at, int d, void* keys) {
  auto* to = static_cast<uint32_t*>(keys) + static_cast<ptrdiff_t>(at) * padded_pairs(d);
  for (int i = 0; i < n; ++i, rows += stride, to += padded_pairs(d)) {
    for (int k = 0; k < padded_pairs(d); k += kLanes) {
      _mm512_store_si512(to + k, _mm512_maskz_loadu_epi32(first_lanes(d / 2 - k), rows + 4 * k));
    }
  }
}

// The pairs of two rows of weights, fp32. To nearest, up where halfway: three instructions, where
// vcvtne2ps2bf16 and a permutation take twice as long.
HWY_INLINE __m512i round_to_pair(__m512i even, __m512i odd) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_add_epi32(even, half), high = _mm512_add_epi32(odd, half);
  // The upper halves of low become the lower halves of high: bytes 0 and 1 of each dword.
  return _mm512_mask_alignr_epi8(high, 0x3333333333333333, low, low, 2);
}

// Rounds n rows of weights (a multiple of 4) to pairs, which take the place of the weights: row j
// of the pairs lies no further than the rows 2j and 2j + 1 that it is made from.
template <int kPanel>
HWY_INLINE void round_to_pairs(float* p, int n) {
  for (int j = 0; j < n / 2; ++j) {
    for (int lane = 0; lane < kPanel; lane += kLanes) {
      const float* from = p + 2 * j * kPanel + lane;
      _mm512_store_si512(p + j * kPanel + lane,
                         round_to_pair(_mm512_load_si512(from), _mm512_load_si512(from + kPanel)));
    }
  }
}

template <int kPanel>
void store(const float* o, const float* sum, int n, int d_v, std::byte* out, int64_t stride) {
  for (int lane = 0; lane < n; lane += kLanes) {
    // Quotients of all elements would take longer than the rest of this; the difference is lost in
    // the rounding to bf16.
    const __m512 factor = _mm512_div_ps(_mm512_set1_ps(1), _mm512_load_ps(sum + lane));
    for (int c = 0; c < d_v; c += kLanes) {
      __m512i m[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const __m512 column = _mm512_load_ps(o + (c + i) * kPanel + lane);
        m[i] = _mm512_castps_si512(_mm512_mul_ps(column, factor));
      }
      transpose(m);
      for (int i = 0; i < std::min(kLanes, n - lane); ++i) {
        const __m512 row = _mm512_castsi512_ps(m[i]);
        _mm256_mask_storeu_epi16(out + (lane + i) * stride + 2 * c, first_lanes(d_v - c),
                                 (__m256i)_mm512_cvtneps_pbh(row));
      }
    }
  }
}

}  // namespace flexprefill::bf16_pairs
HWY_POP_ATTRIBUTES

#endif  // FLEXPREFILL_SRC_CPU_BF16_PAIRS_H_

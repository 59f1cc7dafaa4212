// The operands of the bf16 dot-product instructions, which multiply pairs of neighbours in k and
// add both products to one fp32 lane. A dword holds a pair.
//
//   packed_q  [d / 2, panel]    dword (q[lane][2k], q[lane][2k + 1]), rows up to a multiple of 16
//   keys      [key, d / 2]      rows as they lie, zeros up to a multiple of 32 elements
//   p         [key / 2, panel]  dword (p[2j][lane], p[2j + 1][lane])
#ifndef FLEXPREFILL_SRC_CPU_BF16_PAIRS_H_
#define FLEXPREFILL_SRC_CPU_BF16_PAIRS_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

#include <immintrin.h>

#include "cpu/tile_ops.h"

namespace flexprefill::bf16_pairs {

constexpr int kPanel = 32;  // two vectors of 16 lanes, as kAvx512's table

// Dwords from d elements up to the next multiple of a cache line, and of a key row: an odd number
// of lines, so that the rows of a block spread over the sets of the L1 cache.
constexpr int padded_pairs(int d) { return (d + 31) / 32 * 16; }
constexpr int key_stride(int d) { return ((d + 31) / 32 | 1) * 16; }

inline size_t packed_q_bytes(int d) { return sizeof(uint32_t) * padded_pairs(d) * kPanel; }

inline void pack_q(const std::byte* rows, int64_t stride, int n, int d, void* packed) {
  auto* to = static_cast<uint32_t*>(packed);
  std::memset(to, 0, packed_q_bytes(d));
  for (int lane = 0; lane < n; ++lane) {
    for (int k = 0; k < d / 2; ++k) {
      std::memcpy(to + k * kPanel + lane, rows + lane * stride + 4 * k, 4);
    }
  }
}

inline size_t key_bytes(int d) { return sizeof(uint32_t) * TileOps::kMaxKeys * key_stride(d); }

inline void load_keys(const std::byte* rows, int64_t stride, int n, int at, int d, void* keys) {
  auto* to = static_cast<uint32_t*>(keys) + static_cast<ptrdiff_t>(at) * key_stride(d);
  for (int i = 0; i < n; ++i, to += key_stride(d)) {
    std::memcpy(to, rows + i * stride, sizeof(uint16_t) * d);
    std::memset(to + d / 2, 0, sizeof(uint32_t) * (padded_pairs(d) - d / 2));
  }
}

// Rounds n rows of weights (fp32, a multiple of 4) to pairs, which take the place of the weights:
// row j of the pairs lies no further than the rows 2j and 2j + 1 that it is made from.
__attribute__((target("avx512f,avx512bw,avx512bf16"))) inline void round_to_pairs(float* p, int n) {
  // Words 0, 16, 1, 17, ...: the pairs' halves lie in the two halves of the converted vector.
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i interleave = _mm512_load_si512(kInterleave);
  for (int j = 0; j < n / 2; ++j) {
    for (int lane = 0; lane < kPanel; lane += 16) {
      const float* from = p + 2 * j * kPanel + lane;
      const __m512 low = _mm512_load_ps(from), high = _mm512_load_ps(from + kPanel);
      const auto words = (__m512i)_mm512_cvtne2ps_pbh(high, low);
      _mm512_store_si512(p + j * kPanel + lane, _mm512_permutexvar_epi16(interleave, words));
    }
  }
}

}  // namespace flexprefill::bf16_pairs

#endif  // FLEXPREFILL_SRC_CPU_BF16_PAIRS_H_

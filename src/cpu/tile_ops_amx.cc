// The products of bf16 inputs with the tile registers, tdpbf16ps: C [16, 16] += A [16, 16 pairs] .
// B [16 pairs, 16], fp32. The rest of the table is kAvx512Bf16's. Two by two tiles of C:
//   scores      A = keys from their bf16 rows, B = packed queries, C = S^T [key, lane]
//   accumulate  A = V^T [c, key], B = weights in pairs, C = O^T [c, lane]
// V is transposed once a task and block, 16 keys at a time, by the dwords of its row pairs. (The
// other way round, P V with P transposed, costs the same and would need O in another form.)
// The tiles are configured and released by each operation: a thread may run other users of them
// in between.
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

HWY_PUSH_ATTRIBUTES("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")
namespace flexprefill {
namespace {

using bf16_pairs::kPanel;

constexpr int kTile = 16;                    // rows of a tile; dwords of its rows
constexpr int kTileKeys = 2 * kTile;         // keys of a row of pairs
constexpr int64_t kPanelBytes = 4 * kPanel;  // between the rows of s, p, o and packed_q
static_assert(kPanel == 2 * kTile);

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);
constexpr TileConfig kConfig;

// Keeps plain stores before and after it where they are: the compiler does not know what a tile
// instruction reads.
void fence() { asm volatile("" ::: "memory"); }

// Tiles 0 to 3 are C (0 1 the first row of two, 2 3 the second), 4 and 5 are A, 6 and 7 are B.
// a: byte address of the first row of A, rows a_stride bytes apart, the second tile 16 rows on,
// the next pairs 64 bytes on. b: first row of B in a panel.
template <bool kTwoRows>
HWY_INLINE void multiply(const std::byte* a, int64_t a_stride, const std::byte* b, int n_steps) {
  for (int k = 0; k < n_steps; ++k, a += 64, b += kTile * kPanelBytes) {
    _tile_loadd(6, b, kPanelBytes);
    _tile_loadd(7, b + 64, kPanelBytes);
    _tile_loadd(4, a, a_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwoRows) {
      _tile_loadd(5, a + kTile * a_stride, a_stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

void load_c(const std::byte* c) {
  _tile_loadd(0, c, kPanelBytes);
  _tile_loadd(1, c + 64, kPanelBytes);
  _tile_loadd(2, c + kTile * kPanelBytes, kPanelBytes);
  _tile_loadd(3, c + kTile * kPanelBytes + 64, kPanelBytes);
}

template <bool kTwoRows>
HWY_INLINE void store_c(std::byte* c) {
  _tile_stored(0, c, kPanelBytes);
  _tile_stored(1, c + 64, kPanelBytes);
  if constexpr (kTwoRows) {
    _tile_stored(2, c + kTile * kPanelBytes, kPanelBytes);
    _tile_stored(3, c + kTile * kPanelBytes + 64, kPanelBytes);
  }
}

template <bool kTwoRows>
HWY_INLINE void score_rows(const std::byte* keys, int64_t key_bytes, const std::byte* packed_q,
                           int n_steps, std::byte* s) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  multiply<kTwoRows>(keys, key_bytes, packed_q, n_steps);
  store_c<kTwoRows>(s);
}

void scores(const void* packed_q, const void* keys, int first, int n, int d, float* s) {
  fence();
  _tile_loadconfig(&kConfig);
  const int64_t key_bytes = sizeof(uint32_t) * bf16_pairs::key_stride(d);
  const int n_steps = bf16_pairs::padded_pairs(d) / kTile;
  const auto* q = static_cast<const std::byte*>(packed_q);
  const auto* k = static_cast<const std::byte*>(keys);
  auto* out = reinterpret_cast<std::byte*>(s);
  int key = first;
  for (; key + kTile < first + n; key += 2 * kTile) {
    score_rows<true>(k + key * key_bytes, key_bytes, q, n_steps, out + key * kPanelBytes);
  }
  if (key < first + n) {
    score_rows<false>(k + key * key_bytes, key_bytes, q, n_steps, out + key * kPanelBytes);
  }
  _tile_release();
  fence();
}

// ---- V^T ----------------------------------------------------------------------------------------

// Rows c = 0 .. output_rows(d_v) - 1 of kMaxKeys bf16 and a cache line, an odd number of lines.
constexpr int64_t kValueBytes = 2 * TileOps::kMaxKeys + 64;

size_t value_bytes(int d_v) { return kValueBytes * TileOps::output_rows(d_v); }

// Transposes a 16 x 16 matrix of dwords.
HWY_INLINE void transpose(__m512i (&m)[16]) {
  __m512i t[16];
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
  for (int i = 0; i < 16; ++i) m[i] = t[i];
}

// Sixteen keys, 32 columns from c on (of which `n_columns` exist): the dwords of eight row pairs of
// the first and of the last 16 columns are the rows of one transposition.
HWY_INLINE void transpose_keys(const std::byte* rows, int64_t stride, int c, int n_columns,
                               std::byte* to) {
  const auto mask = static_cast<__mmask32>(n_columns >= 32 ? ~0u : (1u << n_columns) - 1);
  __m512i m[16];
  for (int j = 0; j < 8; ++j) {
    const std::byte* row = rows + 2 * j * stride + 2 * c;
    const __m512i first = _mm512_maskz_loadu_epi16(mask, row);
    const __m512i second = _mm512_maskz_loadu_epi16(mask, row + stride);
    const auto pairs = [&](__m256i low, __m256i high) {
      return _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                             _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
    };
    m[j] = pairs(_mm512_castsi512_si256(first), _mm512_castsi512_si256(second));
    m[8 + j] = pairs(_mm512_extracti64x4_epi64(first, 1), _mm512_extracti64x4_epi64(second, 1));
  }
  transpose(m);
  for (int i = 0; i < 16; ++i) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + (c + i) * kValueBytes),
                       _mm512_castsi512_si256(m[i]));
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + (c + 16 + i) * kValueBytes),
                       _mm512_extracti64x4_epi64(m[i], 1));
  }
}

void load_values(const std::byte* rows, int64_t stride, int n, int at, int d_v, void* values) {
  auto* to = static_cast<std::byte*>(values);
  for (int i = 0; i < n;) {
    const std::byte* row = rows + i * stride;
    std::byte* column = to + 2 * (at + i);
    if ((at + i) % 16 == 0 && i + 16 <= n) {
      for (int c = 0; c < d_v; c += 32) transpose_keys(row, stride, c, d_v - c, column);
      i += 16;
    } else {
      for (int c = 0; c < d_v; ++c) std::memcpy(column + c * kValueBytes, row + 2 * c, 2);
      ++i;
    }
  }
}

void accumulate(float* p, const void* values, int n, int d_v, float* o) {
  bf16_pairs::round_to_pairs(p, n);
  fence();
  _tile_loadconfig(&kConfig);
  const auto* v = static_cast<const std::byte*>(values);
  const auto* pairs = reinterpret_cast<const std::byte*>(p);
  auto* out = reinterpret_cast<std::byte*>(o);
  for (int c = 0; c < d_v; c += 2 * kTile) {
    load_c(out + c * kPanelBytes);
    multiply<true>(v + c * kValueBytes, kValueBytes, pairs, n / kTileKeys);
    store_c<true>(out + c * kPanelBytes);
  }
  _tile_release();
  fence();
}

}  // namespace
}  // namespace flexprefill
HWY_POP_ATTRIBUTES

namespace flexprefill {

const TileOps* amx_tile_ops(DType dtype) {
  const TileOps* base = avx512bf16_tile_ops(dtype);
  if (base == nullptr) return nullptr;
  static const TileOps table = [base] {
    TileOps ops = *base;
    ops.target = CpuTarget::kAmxBf16;
    ops.key_step = kTileKeys;
    ops.scores = scores;
    ops.value_bytes = value_bytes;
    ops.load_values = load_values;
    ops.accumulate = accumulate;
    return ops;
  }();
  return &table;
}

}  // namespace flexprefill

#else

namespace flexprefill {
const TileOps* amx_tile_ops(DType) { return nullptr; }
}  // namespace flexprefill

#endif

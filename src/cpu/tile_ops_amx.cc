// The products of bf16 inputs with the tile registers, tdpbf16ps: C [16, 16] += A [16, 16 pairs] .
// B [16 pairs, 16], fp32. The rest of the table is kAvx512Bf16's. Two by two tiles of C:
//   scores      A = keys from their bf16 rows, B = packed queries, C = S^T [key, lane]
//   accumulate  A = V^T [c, key], B = weights in pairs, C = O^T [c, lane]
// V is transposed once a task and block, 32 keys by 8 columns at a time. (The other way round, P V
// with P transposed, costs the same and would need O in another form.) The softmax takes its
// exponential apart with AVX-512's vreduceps and vscalefps.
// The tiles are configured and released by each operation: a thread may run other users of them
// in between. That takes 0.1 us, hence the wide panel. Figures: docs/notes.md.
#include <algorithm>
#include <cstring>
#include <limits>

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

using bf16_pairs::kLanes;

constexpr int kPanel = 64;
constexpr int kTile = 16;                    // rows of a tile; dwords of its rows
constexpr int kTileKeys = 2 * kTile;         // keys of a row of pairs
constexpr int64_t kTileBytes = 4 * kTile;    // of a row of a tile
constexpr int64_t kPanelBytes = 4 * kPanel;  // between the rows of s, p, o and packed_q
static_assert(kPanel % (2 * kTile) == 0 && kTile == kLanes);

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
  for (int k = 0; k < n_steps; ++k, a += kTileBytes, b += kTile * kPanelBytes) {
    _tile_loadd(6, b, kPanelBytes);
    _tile_loadd(7, b + kTileBytes, kPanelBytes);
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

void zero_c() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

void load_c(const std::byte* c) {
  _tile_loadd(0, c, kPanelBytes);
  _tile_loadd(1, c + kTileBytes, kPanelBytes);
  _tile_loadd(2, c + kTile * kPanelBytes, kPanelBytes);
  _tile_loadd(3, c + kTile * kPanelBytes + kTileBytes, kPanelBytes);
}

template <bool kTwoRows>
HWY_INLINE void store_c(std::byte* c) {
  _tile_stored(0, c, kPanelBytes);
  _tile_stored(1, c + kTileBytes, kPanelBytes);
  if constexpr (kTwoRows) {
    _tile_stored(2, c + kTile * kPanelBytes, kPanelBytes);
    _tile_stored(3, c + kTile * kPanelBytes + kTileBytes, kPanelBytes);
  }
}

template <bool kTwoRows>
HWY_INLINE void score_rows(const std::byte* keys, int64_t key_bytes, const std::byte* packed_q,
                           int n_steps, std::byte* s) {
  zero_c();
  multiply<kTwoRows>(keys, key_bytes, packed_q, n_steps);
  store_c<kTwoRows>(s);
}

void scores(const void* packed_q, const void* keys, int first, int n, int d, float* s) {
  fence();
  _tile_loadconfig(&kConfig);
  const int64_t key_bytes = sizeof(uint32_t) * bf16_pairs::padded_pairs(d);
  const int n_steps = bf16_pairs::padded_pairs(d) / kTile;
  const auto* q = static_cast<const std::byte*>(packed_q);
  const auto* k = static_cast<const std::byte*>(keys);
  auto* out = reinterpret_cast<std::byte*>(s);
  int key = first;
  for (; key + kTile < first + n; key += 2 * kTile) {
    for (int64_t lanes = 0; lanes < kPanelBytes; lanes += 2 * kTileBytes) {
      score_rows<true>(k + key * key_bytes, key_bytes, q + lanes, n_steps,
                       out + key * kPanelBytes + lanes);
    }
  }
  for (int64_t lanes = 0; lanes < kPanelBytes && key < first + n; lanes += 2 * kTileBytes) {
    score_rows<false>(k + key * key_bytes, key_bytes, q + lanes, n_steps,
                      out + key * kPanelBytes + lanes);
  }
  _tile_release();
  fence();
}

// ---- V^T ----------------------------------------------------------------------------------------

constexpr int64_t kValueBytes = 2 * TileOps::kMaxKeys;  // of a row, one column of V

size_t value_bytes(int d_v) { return kValueBytes * TileOps::output_rows(d_v); }

// Eight columns from `column` on of 8 * kParts keys: the 128-bit lanes of vector i hold those of
// the keys i, 8 + i, 16 + i, 24 + i, and are transposed each for itself.
template <int kParts>
HWY_INLINE void transpose_keys(const std::byte* column, int64_t stride, std::byte* to) {
  const auto part = [&](int key) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(column + key * stride));
  };
  __m512i m[8], t[8];
  for (int i = 0; i < 8; ++i) {
    m[i] = _mm512_castsi128_si512(part(i));
    if constexpr (kParts == 4) {
      m[i] = _mm512_mask_broadcast_i32x4(m[i], 0x00f0, part(8 + i));
      m[i] = _mm512_mask_broadcast_i32x4(m[i], 0x0f00, part(16 + i));
      m[i] = _mm512_mask_broadcast_i32x4(m[i], 0xf000, part(24 + i));
    }
  }
  for (int i = 0; i < 4; ++i) {  // t[i]: keys 2i, 2i + 1 of columns 0 to 3; t[4 + i]: of 4 to 7
    t[i] = _mm512_unpacklo_epi16(m[2 * i], m[2 * i + 1]);
    t[4 + i] = _mm512_unpackhi_epi16(m[2 * i], m[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {  // m[2i], m[2i + 1]: columns 2i, 2i + 1 of keys 0 to 3 and 4 to 7
    const __m512i* from = t + i / 2 * 4;
    m[2 * i] = i % 2 == 0 ? _mm512_unpacklo_epi32(from[0], from[1])
                          : _mm512_unpackhi_epi32(from[0], from[1]);
    m[2 * i + 1] = i % 2 == 0 ? _mm512_unpacklo_epi32(from[2], from[3])
                              : _mm512_unpackhi_epi32(from[2], from[3]);
  }
  for (int i = 0; i < 8; ++i) {
    const __m512i keys =
        i % 2 == 0 ? _mm512_unpacklo_epi64(m[i], m[i + 1]) : _mm512_unpackhi_epi64(m[i - 1], m[i]);
    if constexpr (kParts == 4) {
      _mm512_store_si512(to + i * kValueBytes, keys);
    } else {
      _mm_store_si128(reinterpret_cast<__m128i*>(to + i * kValueBytes),
                      _mm512_castsi512_si128(keys));
    }
  }
}

void load_values(const std::byte* rows, int64_t stride, int n, int at, int d_v, void* values) {
  auto* to = static_cast<std::byte*>(values) + 2 * at;
  const int end = at + n;
  while (at < end) {
    int step = 1;
    if (at % 32 == 0 && at + 32 <= end) {
      step = 32;
      for (int c = 0; c < d_v; c += 8) {
        transpose_keys<4>(rows + 2 * c, stride, to + c * kValueBytes);
      }
    } else if (at % 8 == 0 && at + 8 <= end) {
      step = 8;
      for (int c = 0; c < d_v; c += 8) {
        transpose_keys<1>(rows + 2 * c, stride, to + c * kValueBytes);
      }
    } else {
      for (int c = 0; c < d_v; ++c) std::memcpy(to + c * kValueBytes, rows + 2 * c, 2);
    }
    at += step;
    rows += step * stride;
    to += 2 * step;
  }
}

// Adds n keys, from the first of pairs and v on, to o.
void add_values(const float* pairs, const std::byte* v, int n, int d_v, float* o) {
  const auto* b = reinterpret_cast<const std::byte*>(pairs);
  auto* out = reinterpret_cast<std::byte*>(o);
  fence();
  for (int c = 0; c < d_v && n > 0; c += 2 * kTile) {
    for (int64_t lanes = 0; lanes < kPanelBytes; lanes += 2 * kTileBytes) {
      load_c(out + c * kPanelBytes + lanes);
      multiply<true>(v + c * kValueBytes, kValueBytes, b + lanes, n / kTileKeys);
      store_c<true>(out + c * kPanelBytes + lanes);
    }
  }
  fence();
}

void accumulate(float* p, const void* values, int n, int d_v, float* o) {
  bf16_pairs::round_to_pairs<kPanel>(p, n);
  _tile_loadconfig(&kConfig);
  add_values(p, static_cast<const std::byte*>(values), n, d_v, o);
  _tile_release();
  fence();
}

// ---- Softmax ------------------------------------------------------------------------------------

// 2^x for x <= 0 (up to rounding), relative error 1.5e-7; 0 below -126, without the cost of
// subnormal results. A NaN stays a NaN.
HWY_INLINE __m512 exp2(__m512 x) {
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126), _CMP_NLT_UQ);
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
  __m512 poly = _mm512_set1_ps(0.0018671302f);
  poly = _mm512_fmadd_ps(poly, f, _mm512_set1_ps(0.0090170298f));
  poly = _mm512_fmadd_ps(poly, f, _mm512_set1_ps(0.0557999127f));
  poly = _mm512_fmadd_ps(poly, f, _mm512_set1_ps(0.2401644439f));
  poly = _mm512_fmadd_ps(poly, f, _mm512_set1_ps(0.6931512952f));
  poly = _mm512_fmadd_ps(poly, f, _mm512_set1_ps(1));
  return _mm512_maskz_scalef_ps(normal, poly, x);  // poly * 2^floor(x)
}

constexpr int kVectors = kPanel / kLanes;

// Maximum and sum of a panel's online softmax, in registers.
class PanelSoftmax {
 public:
  HWY_INLINE PanelSoftmax(float scale, const float* max, const float* sum)
      : scale_(_mm512_set1_ps(scale)) {
    for (int v = 0; v < kVectors; ++v) {
      top_[v] = _mm512_load_ps(max + v * kLanes);
      total_[v] = _mm512_load_ps(sum + v * kLanes);
    }
  }

  // Takes n keys into the maximum, an even number. Whether it rose, which it does where it would
  // lag by more than kMaxLag in any lane; o is then to be multiplied by factor.
  HWY_INLINE bool rises(const float* s, int n, __m512 (&factor)[kVectors]) {
    __m512 top[kVectors], other[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      top[v] = _mm512_load_ps(s + v * kLanes);
      other[v] = _mm512_load_ps(s + kPanel + v * kLanes);
    }
    for (int key = 2; key < n; key += 2) {
      for (int v = 0; v < kVectors; ++v) {
        const float* element = s + key * kPanel + v * kLanes;
        top[v] = _mm512_max_ps(top[v], _mm512_load_ps(element));
        other[v] = _mm512_max_ps(other[v], _mm512_load_ps(element + kPanel));
      }
    }
    int grew = 0;
    for (int v = 0; v < kVectors; ++v) {
      // The second operand is the result where one is a NaN.
      top[v] = _mm512_max_ps(_mm512_mul_ps(_mm512_max_ps(top[v], other[v]), scale_), top_[v]);
      const __m512 limit = _mm512_add_ps(top_[v], _mm512_set1_ps(TileOps::kMaxLag));
      grew |= _mm512_cmp_ps_mask(top[v], limit, _CMP_GT_OQ);
    }
    if (grew == 0) return false;
    for (int v = 0; v < kVectors; ++v) {
      factor[v] = exp2(_mm512_sub_ps(top_[v], top[v]));
      total_[v] = _mm512_mul_ps(total_[v], factor[v]);
      top_[v] = top[v];
    }
    return true;
  }

  // s becomes the weights of n keys.
  HWY_INLINE void weigh(float* s, int n) {
    for (int key = 0; key < n; ++key) {
      for (int v = 0; v < kVectors; ++v) {
        float* element = s + key * kPanel + v * kLanes;
        const __m512 p = weight(element, v);
        total_[v] = _mm512_add_ps(total_[v], p);
        _mm512_store_ps(element, p);
      }
    }
  }

  // The weights of the pairs [first, end) of keys of s, rounded, to pairs.
  HWY_INLINE void weigh_pairs(const float* s, int first, int end, float* pairs) {
    for (int j = first; j < end; ++j) {
      for (int v = 0; v < kVectors; ++v) {
        const float* element = s + 2 * j * kPanel + v * kLanes;
        const __m512 even = weight(element, v), odd = weight(element + kPanel, v);
        total_[v] = _mm512_add_ps(total_[v], _mm512_add_ps(even, odd));
        _mm512_store_si512(
            pairs + j * kPanel + v * kLanes,
            bf16_pairs::round_to_pair(_mm512_castps_si512(even), _mm512_castps_si512(odd)));
      }
    }
  }

  HWY_INLINE void store(float* max, float* sum) const {
    for (int v = 0; v < kVectors; ++v) {
      _mm512_store_ps(max + v * kLanes, top_[v]);
      _mm512_store_ps(sum + v * kLanes, total_[v]);
    }
  }

 private:
  HWY_INLINE __m512 weight(const float* s, int v) const {
    return exp2(_mm512_fmsub_ps(_mm512_load_ps(s), scale_, top_[v]));
  }

  const __m512 scale_;
  __m512 top_[kVectors], total_[kVectors];
};

void rescale(const __m512 (&factor)[kVectors], int d_v, float* o) {
  for (int c = 0; c < d_v; ++c) {
    for (int v = 0; v < kVectors; ++v) {
      float* element = o + c * kPanel + v * kLanes;
      _mm512_store_ps(element, _mm512_mul_ps(_mm512_load_ps(element), factor[v]));
    }
  }
}

void weigh(float* HWY_RESTRICT s, int n, float scale, int d_v, float* HWY_RESTRICT max,
           float* HWY_RESTRICT sum, float* HWY_RESTRICT o) {
  PanelSoftmax softmax(scale, max, sum);
  __m512 factor[kVectors];
  if (softmax.rises(s, n, factor)) rescale(factor, d_v, o);
  softmax.weigh(s, n);
  softmax.store(max, sum);
}

// ---- All steps of a panel -----------------------------------------------------------------------

// The scores of kTileKeys keys become -inf where lane l does not see them: after last_seen + l.
void hide(float* s, int last_seen) {
  const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int key = std::max(last_seen + 1, 0); key < kTileKeys; ++key) {
    for (int v = 0; v < kVectors; ++v) {
      const int hidden = key - last_seen - v * kLanes;  // lanes of this vector
      if (hidden <= 0) break;
      _mm512_mask_store_ps(s + key * kPanel + v * kLanes, bf16_pairs::first_lanes(hidden), nothing);
    }
  }
}

// Keys go through scores and weights by kTileKeys, so that scores stay in the first-level cache;
// the exponentials of some stand between the products of the next.
void attend(const void* packed_q, const void* keys, const void* values, int n, int last_seen, int d,
            int d_v, float scale, float* s, float* max, float* sum, float* o) {
  const int64_t key_bytes = sizeof(uint32_t) * bf16_pairs::padded_pairs(d);
  const int n_steps = bf16_pairs::padded_pairs(d) / kTile;
  const int pairs_a_step = (kTile + 2 * n_steps - 1) / (2 * n_steps);
  const auto* k = static_cast<const std::byte*>(keys);
  const auto* q = static_cast<const std::byte*>(packed_q);
  const auto* v = static_cast<const std::byte*>(values);
  // s: the weights of all keys in pairs, then the scores of two times kTileKeys keys.
  const auto pairs_of = [&](int key) { return s + key / 2 * kPanel; };
  const auto scores_of = [&](int key) {
    return s + (TileOps::kMaxKeys / 2 + key / kTileKeys % 2 * kTileKeys) * kPanel;
  };

  fence();
  _tile_loadconfig(&kConfig);
  PanelSoftmax softmax(scale, max, sum);
  int added = 0;  // keys that are in o
  for (int key = 0; key < n; key += kTileKeys) {
    const int before = key - kTileKeys;
    int weighed = 0;  // pairs of the keys before
    for (int64_t lanes = 0; lanes < kPanelBytes; lanes += 2 * kTileBytes) {
      zero_c();
      for (int i = 0; i < n_steps; ++i) {
        multiply<true>(k + key * key_bytes + i * kTileBytes, key_bytes,
                       q + lanes + i * kTile * kPanelBytes, 1);
        if (key == 0) continue;
        const int end = std::min(weighed + pairs_a_step, kTile);
        softmax.weigh_pairs(scores_of(before), weighed, end, pairs_of(before));
        weighed = end;
      }
      store_c<true>(reinterpret_cast<std::byte*>(scores_of(key)) + lanes);
    }
    fence();
    if (last_seen < key + kTileKeys - 1) hide(scores_of(key), last_seen - key);
    __m512 factor[kVectors];
    if (softmax.rises(scores_of(key), kTileKeys, factor)) {
      add_values(pairs_of(added), v + 2 * added, key - added, d_v, o);
      added = key;
      rescale(factor, d_v, o);
    }
  }
  softmax.weigh_pairs(scores_of(n - kTileKeys), 0, kTile, pairs_of(n - kTileKeys));
  softmax.store(max, sum);
  add_values(pairs_of(added), v + 2 * added, n - added, d_v, o);
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
    ops.panel = kPanel;
    ops.key_step = kTileKeys;
    ops.packed_q_bytes = bf16_pairs::packed_q_bytes<kPanel>;
    ops.pack_q = bf16_pairs::pack_q<kPanel>;
    ops.scores = scores;
    ops.weigh = weigh;
    ops.value_bytes = value_bytes;
    ops.load_values = load_values;
    ops.accumulate = accumulate;
    ops.attend = attend;
    ops.store = bf16_pairs::store<kPanel>;
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

// Online softmax in registers, for kernels whose warps hold scores in the layout of mma.m16n8 and
// wgmma results: a thread has two rows, s[4 g + e] is an element of row e / 2, and the four threads
// of a quad share their rows.
#ifndef FLEXPREFILL_SRC_ATTEND_SOFTMAX_CUH_
#define FLEXPREFILL_SRC_ATTEND_SOFTMAX_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/launch.cuh"

namespace flexprefill {

// Reduces over the quad; every thread gets the result.
template <typename Reduce>
__device__ inline float quad_reduce(float x, Reduce reduce) {
  x = reduce(x, __shfl_xor_sync(0xffffffff, x, 1));
  return reduce(x, __shfl_xor_sync(0xffffffff, x, 2));
}

// Weights are 2^(scale_log2 * score - offset). The offset follows the largest score only where that
// moved by more than kLag in the exponent: weights up to 2^kLag harm no precision, and most tiles
// then leave the accumulators alone. So a thread looks at its own scores, and the quads find their
// largest ones only where that happened.
struct OnlineSoftmax {
  static constexpr float kLag = 8;

  float max[2];  // the score behind the offset; -inf: none yet
  float sum[2];  // of this thread's weights; of the row after finish()

  __device__ void reset() {
    max[0] = max[1] = -INFINITY;
    sum[0] = sum[1] = 0;
  }

  // Lets the offset follow the scores of a tile, -inf where masked. True: what was accumulated so
  // far must be multiplied by rescale[row], which is not set otherwise; the same for all threads of
  // a warp. scale_log2 > 0. A NaN or +inf score makes its row's sum NaN, as in exact attention.
  template <int kN>
  __device__ bool follow(const float (&s)[kN], float scale_log2, float (&rescale)[2]) {
    float parts[2][2] = {{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}};
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      float& part = parts[i / 2 % 2][i % 2];
      part = fmaxf(part, s[i]);
    }
    const float largest[2] = {fmaxf(parts[0][0], parts[0][1]), fmaxf(parts[1][0], parts[1][1])};
    const bool moved = __any_sync(0xffffffff, grows(0, largest[0], scale_log2) ||
                                                  grows(1, largest[1], scale_log2)) != 0;
    if (!moved) return false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float of_row = quad_reduce(largest[r], [](float a, float b) { return fmaxf(a, b); });
      const bool grew = grows(r, of_row, scale_log2);
      rescale[r] = grew ? exp2_approx((max[r] - of_row) * scale_log2) : 1.0f;
      max[r] = grew ? of_row : max[r];
      sum[r] *= rescale[r];
    }
    return true;
  }

  // Turns the scores that the offset followed into weights.
  template <int kN>
  __device__ void weigh(float (&s)[kN], float scale_log2) {
    const float offset[2] = {this->offset(0, scale_log2), this->offset(1, scale_log2)};
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      s[i] = exp2_approx(fmaf(s[i], scale_log2, -offset[i / 2 % 2]));
      sum[i / 2 % 2] += s[i];
    }
  }

  // Sums over the quads.
  __device__ void finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = quad_reduce(sum[r], [](float a, float b) { return a + b; });
    }
  }

  // Natural log of the sum of exp(scale * score); after finish().
  __device__ float lse(int r, float scale_log2) const {
    constexpr float kLn2 = 0.693147180559945309f;
    return max[r] * scale_log2 * kLn2 + logf(sum[r]);
  }

 private:
  __device__ bool grows(int r, float score, float scale_log2) const {
    return (score - max[r]) * scale_log2 > kLag;
  }
  // Where every score was -inf there is nothing to subtract.
  __device__ float offset(int r, float scale_log2) const {
    return max[r] == -INFINITY ? 0.0f : max[r] * scale_log2;
  }
};

// Two floats rounded to the element type, the first in the low half.
template <typename Element>
__device__ inline uint32_t pack_pair(float low, float high) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// Element `high` (0 or 1) of a pair.
template <typename Element>
__device__ inline float unpack(uint32_t pair, int high) {
  const auto bits = static_cast<uint16_t>(pair >> (16 * high));
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  } else {
    return __half2float(__ushort_as_half(bits));
  }
}

// Bits of kNotFinite are set where an element of the pair is NaN or infinite: all bits of its
// exponent are. To be gathered by |, without a branch.
constexpr uint32_t kNotFinite = 0x80008000;
template <typename Element>
__device__ inline uint32_t not_finite_bits(uint32_t pair) {
  constexpr uint32_t kExponents = std::is_same_v<Element, __nv_bfloat16> ? 0x7f807f80 : 0x7c007c00;
  constexpr uint32_t kLowest = std::is_same_v<Element, __nv_bfloat16> ? 0x00800080 : 0x04000400;
  return (pair & kExponents) + kLowest;
}
template <typename Element>
__device__ inline bool any_not_finite(uint32_t pair) {
  return (not_finite_bits<Element>(pair) & kNotFinite) != 0;
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_ATTEND_SOFTMAX_CUH_

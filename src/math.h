// Scalar conversions between the element types and float.
#ifndef FLEXPREFILL_SRC_MATH_H_
#define FLEXPREFILL_SRC_MATH_H_

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "flexprefill/types.h"

namespace flexprefill {

inline float bf16_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// Round to nearest even; a NaN stays a NaN.
inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// By bits: not every compiler has a half type.
inline float fp16_to_float(uint16_t bits) {
  const uint32_t magnitude = bits & 0x7fff;
  // A product moves the exponent, also of subnormal numbers.
  uint32_t result = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f);
  if (magnitude >= 0x7c00) result |= 0x7f800000;
  return std::bit_cast<float>(result | (bits & 0x8000u) << 16);
}

// Round to nearest even; a NaN stays a NaN.
inline uint16_t float_to_fp16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t result = 0;
  if (magnitude > 0x7f800000) {
    result = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to inf
    result = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: in [.5, 1) the last place is 2^-24
    result = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    result = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  return static_cast<uint16_t>(sign | result);
}

inline float load_float(const std::byte* element, DType dtype) {
  if (dtype == DType::kFloat32) {
    float value;
    std::memcpy(&value, element, sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, element, sizeof(bits));
  return dtype == DType::kBFloat16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

inline void store_float(std::byte* element, DType dtype, float value) {
  if (dtype == DType::kFloat32) {
    std::memcpy(element, &value, sizeof(value));
    return;
  }
  const uint16_t bits = dtype == DType::kBFloat16 ? float_to_bf16(value) : float_to_fp16(value);
  std::memcpy(element, &bits, sizeof(bits));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_MATH_H_

// Vector code that more than one file of the CPU backend needs. Included once for each instruction
// set, after hwy/foreach_target.h.
#if defined(FLEXPREFILL_SRC_CPU_VECTOR_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLEXPREFILL_SRC_CPU_VECTOR_INL_H_
#undef FLEXPREFILL_SRC_CPU_VECTOR_INL_H_
#else
#define FLEXPREFILL_SRC_CPU_VECTOR_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "flexprefill/types.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flexprefill {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

// Highway's conversions lose inf and NaN where they are emulated.
#if HWY_TARGET == HWY_SSSE3 || HWY_TARGET == HWY_SSE4
constexpr bool kConvertsFloat16 = false;
#else
constexpr bool kConvertsFloat16 = true;
#endif

template <DType kType>
constexpr int kElementSize = kType == DType::kFloat32 ? 4 : 2;

// Eight elements of a row at a time: head dims are multiples of 8.
using Part = hn::CappedTag<float, 8>;
constexpr int kPart = HWY_LANES(float) < 8 ? HWY_LANES(float) : 8;

template <DType kType>
HWY_INLINE hn::Vec<Part> load_part(const std::byte* p) {
  const Part d;
  if constexpr (kType == DType::kFloat32) {
    return hn::LoadU(d, reinterpret_cast<const float*>(p));
  } else if constexpr (kType == DType::kFloat16 && !kConvertsFloat16) {
    const hn::Rebind<uint16_t, Part> d16;
    const hn::RebindToUnsigned<Part> d32;
    const auto bits = hn::PromoteTo(d32, hn::LoadU(d16, reinterpret_cast<const uint16_t*>(p)));
    const auto magnitude = hn::And(bits, hn::Set(d32, 0x7fff));
    const auto sign = hn::ShiftLeft<16>(hn::Xor(bits, magnitude));
    // A product moves the exponent, also of subnormal numbers.
    const auto finite = hn::Mul(hn::BitCast(d, hn::ShiftLeft<13>(magnitude)), hn::Set(d, 0x1p112f));
    const auto special =
        hn::IfThenElseZero(hn::Gt(magnitude, hn::Set(d32, 0x7bff)), hn::Set(d32, 0x7f800000));
    return hn::BitCast(d, hn::Or(hn::Or(hn::BitCast(d32, finite), special), sign));
  } else if constexpr (kType == DType::kFloat16) {
    const hn::Rebind<hwy::float16_t, Part> d16;
    return hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(p)));
  } else {
    const hn::Rebind<uint16_t, Part> d16;
    const hn::RebindToUnsigned<Part> d32;
    const auto bits = hn::PromoteTo(d32, hn::LoadU(d16, reinterpret_cast<const uint16_t*>(p)));
    return hn::BitCast(d, hn::ShiftLeft<16>(bits));
  }
}

// 2^x for x <= 127, relative error 9e-8; 0 below -126.5. A NaN stays a NaN: only products and sums
// lead from x to the result.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V exp2(D d, V x) {
  const hn::RebindToUnsigned<D> d32;
  // Beyond -127 the scale below is 0. A NaN stays: x86's maximum returns its second operand then;
  // NEON's would return the number.
  const V least = hn::Set(d, -127.0f);
  const V clamped = HWY_ARCH_X86 ? hn::Max(least, x) : hn::IfThenElse(hn::Lt(x, least), least, x);
  // Adding 1.5 * 2^23 + 127 leaves round(x) + 127, the exponent of 2^round(x), in the low bits.
  const V magic = hn::Set(d, 12582912.0f + 127.0f);
  const V shifted = hn::Add(clamped, magic);
  const V scale = hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(d32, shifted)));
  const V f = hn::Sub(clamped, hn::Sub(shifted, magic));
  V poly = hn::Set(d, 0.0013264727f);
  poly = hn::MulAdd(poly, f, hn::Set(d, 0.0096715126f));
  poly = hn::MulAdd(poly, f, hn::Set(d, 0.0555073374f));
  poly = hn::MulAdd(poly, f, hn::Set(d, 0.2402224209f));
  poly = hn::MulAdd(poly, f, hn::Set(d, 0.6931469776f));
  poly = hn::MulAdd(poly, f, hn::Set(d, 1.0f));
  return hn::Mul(poly, scale);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace flexprefill
HWY_AFTER_NAMESPACE();

#endif  // FLEXPREFILL_SRC_CPU_VECTOR_INL_H_

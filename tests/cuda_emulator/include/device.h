// CUDA C++ for a host compiler: included before everything else where a .cu file is compiled for
// the emulator. Only what our kernels use is here.
#ifndef FLEXPREFILL_TESTS_CUDA_EMULATOR_INCLUDE_DEVICE_H_
#define FLEXPREFILL_TESTS_CUDA_EMULATOR_INCLUDE_DEVICE_H_

#include <cuda_runtime.h>
// After cuda_runtime.h, which looks whether a CUDA compiler reads it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda_emulator/emulator.h"

#define __launch_bounds__(...)
#undef __maxnreg__
#define __maxnreg__(...)
// Nothing would poison such memory, nor count it at the launch.
#undef __shared__
#define __shared__ static_assert(false, "shared memory of our kernels is dynamic");

using cuda_emulator::Where;

inline constexpr int warpSize = 32;
inline const cuda_emulator::Index3& threadIdx = cuda_emulator::thread_index;
inline const cuda_emulator::Index3& blockIdx = cuda_emulator::block_index;
inline const cuda_emulator::Index3& blockDim = cuda_emulator::block_size;
inline const cuda_emulator::Index3& gridDim = cuda_emulator::grid_size;

// ---- Barriers

inline void __syncthreads(Where where = Where::current()) {
  cuda_emulator::barrier(0, 0, true, where);
}

inline void __syncwarp(uint32_t mask = 0xffffffffu, Where where = Where::current()) {
  cuda_emulator::sync_warp(mask, where);
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// __syncthreads_or, _and, _count: how many threads have a predicate that is not 0.
inline int __syncthreads_count(int predicate, Where where = Where::current()) {
  return cuda_emulator::count_at_barrier(predicate != 0, where);
}
inline int __syncthreads_or(int predicate, Where where = Where::current()) {
  return __syncthreads_count(predicate, where) != 0;
}
inline int __syncthreads_and(int predicate, Where where = Where::current()) {
  return __syncthreads_count(predicate == 0, where) == 0;
}

// ---- Warp instructions

namespace cuda_emulator {

// Every lane of the mask gives a value; each gets function(values of all lanes, lane's number).
template <typename Value, typename Function>
auto exchange(uint32_t mask, const char* what, Value value, Function function, Where where) {
  struct Lane {
    Value value;
    decltype(function(std::declval<const Value* const*>(), 0)) result;
  } lane{value, {}};
  at_warp(
      mask, what, lane,
      [&](Lane* const* lanes) {
        const Value* values[32];
        for (int i = 0; i < 32; ++i) {
          values[i] = (mask >> i & 1) != 0 ? &lanes[i]->value : nullptr;
        }
        for (int i = 0; i < 32; ++i) {
          if (values[i] != nullptr) lanes[i]->result = function(values, i);
        }
      },
      where);
  return lane.result;
}

template <typename Value>
struct Shuffle {
  Value value;
  int source;
};

// `source`: the lane to read from, the reader's own where that is outside of its segment.
template <typename Value>
Value shuffle(uint32_t mask, const char* what, Value value, int source, Where where) {
  const Shuffle<Value> mine{value, source};
  bool absent = false;
  const Value result = exchange(
      mask, what, mine,
      [&absent](const Shuffle<Value>* const* lanes, int lane) {
        const Shuffle<Value>* from = lanes[lanes[lane]->source];
        if (from == nullptr) absent = true;
        return from == nullptr ? Value{} : from->value;
      },
      where);
  if (absent) fail(std::string(what) + " reads a lane that is not in its mask", where);
  return result;
}

template <typename Value, typename Function>
Value reduce(uint32_t mask, const char* what, Value value, Function function, Where where) {
  return exchange(
      mask, what, value,
      [&function](const Value* const* values, int) {
        bool first = true;
        Value all{};
        for (int i = 0; i < 32; ++i) {
          if (values[i] == nullptr) continue;
          all = first ? *values[i] : function(all, *values[i]);
          first = false;
        }
        return all;
      },
      where);
}

}  // namespace cuda_emulator

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, Where where = Where::current()) {
  const int start = cuda_emulator::lane_number() & ~(width - 1);
  return cuda_emulator::shuffle(mask, "__shfl_sync", value, start + (source & (width - 1)), where);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32,
                  Where where = Where::current()) {
  const int lane = cuda_emulator::lane_number();
  const int source = lane ^ bits;
  const bool beyond = source >= (lane & ~(width - 1)) + width;
  return cuda_emulator::shuffle(mask, "__shfl_xor_sync", value, beyond ? lane : source, where);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                 Where where = Where::current()) {
  const int lane = cuda_emulator::lane_number();
  const int source = lane - static_cast<int>(delta);
  const bool beyond = source < (lane & ~(width - 1));
  return cuda_emulator::shuffle(mask, "__shfl_up_sync", value, beyond ? lane : source, where);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                   Where where = Where::current()) {
  const int lane = cuda_emulator::lane_number();
  const int source = lane + static_cast<int>(delta);
  const bool beyond = source >= (lane & ~(width - 1)) + width;
  return cuda_emulator::shuffle(mask, "__shfl_down_sync", value, beyond ? lane : source, where);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, Where where = Where::current()) {
  return cuda_emulator::exchange(
      mask, "__ballot_sync", predicate,
      [](const int* const* values, int) {
        uint32_t ballot = 0;
        for (int i = 0; i < 32; ++i) {
          if (values[i] != nullptr && *values[i] != 0) ballot |= 1u << i;
        }
        return ballot;
      },
      where);
}
inline int __any_sync(uint32_t mask, int predicate, Where where = Where::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, Where where = Where::current()) {
  return __ballot_sync(mask, predicate, where) == mask;
}
template <typename T>
uint32_t __match_any_sync(uint32_t mask, T value, Where where = Where::current()) {
  return cuda_emulator::exchange(
      mask, "__match_any_sync", value,
      [](const T* const* values, int lane) {
        uint32_t equal = 0;
        for (int i = 0; i < 32; ++i) {
          if (values[i] != nullptr && *values[i] == *values[lane]) equal |= 1u << i;
        }
        return equal;
      },
      where);
}
template <typename T>
T __reduce_add_sync(uint32_t mask, T value, Where where = Where::current()) {
  const auto add = [](T a, T b) { return static_cast<T>(a + b); };
  return cuda_emulator::reduce(mask, "__reduce_add_sync", value, add, where);
}
template <typename T>
T __reduce_min_sync(uint32_t mask, T value, Where where = Where::current()) {
  const auto lower = [](T a, T b) { return b < a ? b : a; };
  return cuda_emulator::reduce(mask, "__reduce_min_sync", value, lower, where);
}
template <typename T>
T __reduce_max_sync(uint32_t mask, T value, Where where = Where::current()) {
  const auto upper = [](T a, T b) { return a < b ? b : a; };
  return cuda_emulator::reduce(mask, "__reduce_max_sync", value, upper, where);
}
inline uint32_t __reduce_or_sync(uint32_t mask, uint32_t value, Where where = Where::current()) {
  const auto either = [](uint32_t a, uint32_t b) { return a | b; };
  return cuda_emulator::reduce(mask, "__reduce_or_sync", value, either, where);
}
inline uint32_t __reduce_and_sync(uint32_t mask, uint32_t value, Where where = Where::current()) {
  const auto both = [](uint32_t a, uint32_t b) { return a & b; };
  return cuda_emulator::reduce(mask, "__reduce_and_sync", value, both, where);
}

// ---- Atomic operations: one thread runs at a time

template <typename T, typename Function>
T cuda_emulator_atomic(T* address, Function function) {
  T old;
  cuda_emulator::atomic_load(&old, address, sizeof(T));
  const T next = function(old);
  cuda_emulator::atomic_store(address, &next, sizeof(T));
  return old;
}
template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return cuda_emulator_atomic(address, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicSub(T* address, std::type_identity_t<T> value) {
  return cuda_emulator_atomic(address, [=](T old) { return static_cast<T>(old - value); });
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return cuda_emulator_atomic(address, [=](T old) { return std::min(old, value); });
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return cuda_emulator_atomic(address, [=](T old) { return std::max(old, value); });
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return cuda_emulator_atomic(address, [=](T old) { return old | value; });
}
template <typename T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return cuda_emulator_atomic(address, [=](T old) { return old & value; });
}
template <typename T>
T atomicXor(T* address, std::type_identity_t<T> value) {
  return cuda_emulator_atomic(address, [=](T old) { return old ^ value; });
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return cuda_emulator_atomic(address, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return cuda_emulator_atomic(address, [=](T old) { return old == expected ? value : old; });
}

// ---- Loads, bits, arithmetic

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, std::type_identity_t<T> value) {
  *address = value;
}
template <typename T>
void __stcg(T* address, std::type_identity_t<T> value) {
  *address = value;
}

inline int __popc(uint32_t bits) { return std::popcount(bits); }
inline int __popcll(uint64_t bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline int __clz(int bits) { return std::countl_zero(static_cast<uint32_t>(bits)); }
inline int __clzll(long long bits) { return std::countl_zero(static_cast<uint64_t>(bits)); }
inline uint32_t __brev(uint32_t bits) {
  uint32_t reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (bits >> i & 1) << (31 - i);
  return reversed;
}
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0F / x; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float rsqrtf(float x) { return 1.0F / std::sqrt(x); }

using std::isfinite;
using std::isinf;
using std::isnan;

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

[[noreturn]] inline void __trap(Where where = Where::current()) {
  cuda_emulator::fail("__trap", where);
}

#endif  // FLEXPREFILL_TESTS_CUDA_EMULATOR_INCLUDE_DEVICE_H_

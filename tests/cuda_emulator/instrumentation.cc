// What code compiled with -fsanitize=thread calls: before every access to memory, and in place of
// std::atomic's operations, which only the host's code in .cu files has.
#include <cstddef>
#include <cstdint>

#include "cuda_emulator/emulator.h"

using Kind = cuda_emulator::Races::Kind;

#define FLEXPREFILL_ACCESS(NAME, BYTES, KIND) \
  void __tsan_##NAME(void* data) { cuda_emulator::instrumented_access(data, BYTES, Kind::KIND); }
#define FLEXPREFILL_ACCESSES(BYTES)                       \
  FLEXPREFILL_ACCESS(read##BYTES, BYTES, kRead)           \
  FLEXPREFILL_ACCESS(write##BYTES, BYTES, kWrite)         \
  FLEXPREFILL_ACCESS(unaligned_read##BYTES, BYTES, kRead) \
  FLEXPREFILL_ACCESS(unaligned_write##BYTES, BYTES, kWrite)

#define FLEXPREFILL_ATOMICS(BITS, T)                                                               \
  T __tsan_atomic##BITS##_load(const volatile T* a, int) {                                         \
    return __atomic_load_n(a, __ATOMIC_SEQ_CST);                                                   \
  }                                                                                                \
  void __tsan_atomic##BITS##_store(volatile T* a, T v, int) {                                      \
    __atomic_store_n(a, v, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                \
  T __tsan_atomic##BITS##_exchange(volatile T* a, T v, int) {                                      \
    return __atomic_exchange_n(a, v, __ATOMIC_SEQ_CST);                                            \
  }                                                                                                \
  T __tsan_atomic##BITS##_fetch_add(volatile T* a, T v, int) {                                     \
    return __atomic_fetch_add(a, v, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                \
  T __tsan_atomic##BITS##_fetch_sub(volatile T* a, T v, int) {                                     \
    return __atomic_fetch_sub(a, v, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                \
  int __tsan_atomic##BITS##_compare_exchange_strong(volatile T* a, T* expected, T v, int, int) {   \
    return __atomic_compare_exchange_n(a, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }

extern "C" {

FLEXPREFILL_ACCESSES(1)
FLEXPREFILL_ACCESSES(2)
FLEXPREFILL_ACCESSES(4)
FLEXPREFILL_ACCESSES(8)
FLEXPREFILL_ACCESSES(16)

void __tsan_read_range(void* data, size_t bytes) {
  cuda_emulator::instrumented_access(data, bytes, Kind::kRead);
}
void __tsan_write_range(void* data, size_t bytes) {
  cuda_emulator::instrumented_access(data, bytes, Kind::kWrite);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}

FLEXPREFILL_ATOMICS(8, uint8_t)
FLEXPREFILL_ATOMICS(32, uint32_t)
FLEXPREFILL_ATOMICS(64, uint64_t)

}  // extern "C"

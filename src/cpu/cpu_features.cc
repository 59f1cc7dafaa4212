// CPUID for the instructions, XCR0 for the registers that the operating system saves.
#include "cpu/cpu_features.h"

#include <cstdint>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace flexprefill {

#if defined(__x86_64__)
namespace {

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool has(uint32_t bits, std::initializer_list<int> wanted) {
  for (const int bit : wanted) {
    if ((bits >> bit & 1) == 0) return false;
  }
  return true;
}

// XCR0: the register files that the operating system saves and restores.
uint32_t saved_registers() {
  uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// The tile registers are off for a process until it asks for them; threads share the answer.
bool request_tile_registers() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

struct Features {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx_bf16 = false;

  Features() {
    const Registers leaf1 = cpuid(1, 0), leaf7 = cpuid(7, 0), leaf7_1 = cpuid(7, 1);
    constexpr int kOsxsave = 27;
    if (!has(leaf1.ecx, {kOsxsave})) return;
    const uint32_t saved = saved_registers();
    // SSSE3, FMA, SSE4.1, SSE4.2, AES and PCLMUL (which Highway counts in), AVX, F16C; BMI1, AVX2,
    // BMI2.
    avx2 = has(saved, {1, 2}) && has(leaf1.ecx, {1, 9, 12, 19, 20, 25, 28, 29}) &&
           has(leaf7.ebx, {3, 5, 8});
    // AVX-512 F, DQ, CD, BW, VL.
    avx512 = avx2 && has(saved, {5, 6, 7}) && has(leaf7.ebx, {16, 17, 28, 30, 31});
    avx512_bf16 = avx512 && has(leaf7_1.eax, {5});
    // AMX-BF16, AMX-TILE.
    amx_bf16 =
        avx512_bf16 && has(saved, {17, 18}) && has(leaf7.edx, {22, 24}) && request_tile_registers();
  }
};

}  // namespace

bool machine_runs(CpuTarget target) {
  static const Features features;
  switch (target) {
    case CpuTarget::kBaseline:
      return true;
    case CpuTarget::kAvx2:
      return features.avx2;
    case CpuTarget::kAvx512:
      return features.avx512;
    case CpuTarget::kAvx512Bf16:
      return features.avx512_bf16;
    case CpuTarget::kAmxBf16:
      return features.amx_bf16;
    default:
      return false;
  }
}

#else

bool machine_runs(CpuTarget target) {
#if defined(__aarch64__)
  if (target == CpuTarget::kNeon) return true;
#endif
  return target == CpuTarget::kBaseline;
}

#endif

}  // namespace flexprefill

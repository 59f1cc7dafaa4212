// Chooses the table of operations for this machine.
#include "cpu/tile_ops.h"

#include <array>
#include <span>
#include <string>

#include "cpu/cpu_features.h"
#include "cpu/tile_ops_tables.h"
#include "flexprefill/flexprefill.h"

namespace flexprefill {
namespace {

const TileOps* built_table(CpuTarget target, DType dtype) {
  const TileOps* table = nullptr;
  if (target == CpuTarget::kAmxBf16) table = amx_tile_ops(dtype);
  if (target == CpuTarget::kAvx512Bf16) table = avx512bf16_tile_ops(dtype);
  if (table != nullptr) return table;
  // Other types have no such instructions.
  const bool pairs = target == CpuTarget::kAmxBf16 || target == CpuTarget::kAvx512Bf16;
  return highway_tile_ops(pairs ? CpuTarget::kAvx512 : target, dtype);
}

struct Supported {
  std::array<CpuTarget, 6> targets{};
  size_t n = 0;

  Supported() {
    for (const CpuTarget target : {CpuTarget::kAmxBf16, CpuTarget::kAvx512Bf16, CpuTarget::kAvx512,
                                   CpuTarget::kAvx2, CpuTarget::kNeon, CpuTarget::kBaseline}) {
      if (machine_runs(target) && built_table(target, DType::kBFloat16) != nullptr) {
        targets[n++] = target;
      }
    }
  }
};

std::string names(std::span<const CpuTarget> targets) {
  std::string text;
  for (const CpuTarget target : targets) {
    text += (text.empty() ? "" : ", ") + std::string(cpu_target_name(target));
  }
  return text;
}

}  // namespace

std::span<const CpuTarget> supported_cpu_targets() {
  static const Supported supported;
  return {supported.targets.data(), supported.n};
}

const char* cpu_target_name(CpuTarget target) {
  switch (target) {
    case CpuTarget::kAuto:
      return "auto";
    case CpuTarget::kBaseline:
      return "baseline";
    case CpuTarget::kAvx2:
      return "avx2";
    case CpuTarget::kAvx512:
      return "avx512";
    case CpuTarget::kAvx512Bf16:
      return "avx512_bf16";
    case CpuTarget::kAmxBf16:
      return "amx_bf16";
    case CpuTarget::kNeon:
      return "neon";
  }
  return "unknown";
}

const TileOps& tile_ops(CpuTarget target, DType dtype) {
  const std::span<const CpuTarget> supported = supported_cpu_targets();
  for (const CpuTarget candidate : supported) {
    if (target == CpuTarget::kAuto || target == candidate) return *built_table(candidate, dtype);
  }
  throw Error(ErrorCode::kUnsupported,
              "cpu_target: expected one that this machine and this build "
              "have (" +
                  names(supported) + "), got " + cpu_target_name(target));
}

}  // namespace flexprefill

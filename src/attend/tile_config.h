// Tile sizes of attend's kernels: what runs on which card. Affects speed only.
#ifndef FLEXPREFILL_SRC_ATTEND_TILE_CONFIG_H_
#define FLEXPREFILL_SRC_ATTEND_TILE_CONFIG_H_

#include <algorithm>
#include <array>
#include <cstdint>

namespace flexprefill {

// attend_sm80: keys of a tile, and tiles of K and V that a CTA may hold at most.
inline constexpr int32_t kSm80TileKv = 64;
inline constexpr int32_t kSm80MaxSlots = 4;
// Bytes before the tiles (what all warps of a CTA know of its work), a multiple of 128.
inline constexpr int32_t kSm80SharedWork = 768;

// A kernel of attend_sm80. Head dims are padded to d_qk and d_v. A warp has 16 or 32 query rows: 32
// halve the shared memory traffic of K and V a row, which bounds the kernel, but their fp32 output
// takes d_v registers a thread, so they end at d_v 128.
struct Sm80Config {
  int32_t d_qk, d_v;
  int32_t warp_rows;
  int32_t warps_per_sm;  // that the kernel's registers allow
};
inline constexpr std::array<Sm80Config, 4> kSm80Configs{{
    {.d_qk = 64, .d_v = 64, .warp_rows = 32, .warps_per_sm = 8},
    {.d_qk = 128, .d_v = 128, .warp_rows = 32, .warps_per_sm = 8},
    {.d_qk = 192, .d_v = 128, .warp_rows = 32, .warps_per_sm = 8},
    {.d_qk = 256, .d_v = 256, .warp_rows = 16, .warps_per_sm = 8},
}};

// The kernel for head dims of at most 256: the first that holds both.
constexpr const Sm80Config& sm80_config(int32_t d_qk, int32_t d_v) {
  for (const Sm80Config& config : kSm80Configs) {
    if (d_qk <= config.d_qk && d_v <= config.d_v) return config;
  }
  return kSm80Configs.back();
}

// A CTA's share of the work and of the shared memory: Q [rows, d_qk] and a ring of `slots`
// tiles, which K and V take in turns.
struct Sm80Tile {
  int32_t rows;   // the block size, or a part of it
  int32_t slots;  // 2 to kSm80MaxSlots
  int32_t shared_bytes;

  constexpr int32_t threads(const Sm80Config& config) const { return rows / config.warp_rows * 32; }
};

// As many CTAs a multiprocessor as registers allow, then as many slots as fit.
// `device_shared_bytes`: what one CTA may opt in to; a multiprocessor has 1 KB more, and
// every CTA takes 1 KB that it does not see.
//
//   d 128, block 128                                rows  slots  CTAs
//   100 KB (8.6, 8.9)                                128      4              1
//   164 KB (8.0)                                     128      3              2
//   228 KB (9.0)                                     128      4              2
constexpr Sm80Tile sm80_tile(const Sm80Config& config, int32_t block_size,
                             int64_t device_shared_bytes) {
  constexpr int64_t kReserved = 1024;
  const int64_t slot = int64_t{2} * kSm80TileKv * std::max(config.d_qk, config.d_v);
  for (int32_t rows = block_size;; rows /= 2) {
    const int64_t fixed = int64_t{2} * rows * config.d_qk + kSm80SharedWork;
    for (int32_t blocks = std::max(config.warps_per_sm * config.warp_rows / rows, 1); blocks > 0;
         --blocks) {
      const int64_t share = (device_shared_bytes + kReserved) / blocks - kReserved;
      const int64_t slots = std::min<int64_t>((share - fixed) / slot, kSm80MaxSlots);
      if (slots < 2 && (blocks > 1 || rows > config.warp_rows)) continue;
      return {rows, static_cast<int32_t>(slots), static_cast<int32_t>(fixed + slots * slot)};
    }
  }
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_ATTEND_TILE_CONFIG_H_

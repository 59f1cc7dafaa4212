// Which keys a query sees, for kernels: causality and the token window, by absolute position.
#ifndef FLEXPREFILL_SRC_ATTEND_MASK_CUH_
#define FLEXPREFILL_SRC_ATTEND_MASK_CUH_

#include <algorithm>
#include <cstdint>
#include <limits>

#include "index/block_row.h"

namespace flexprefill {

// TokenWindow in 32 bits; without a window every key counts as global.
struct TokenMask {
  int32_t global_window, local_window;

  static TokenMask of(const TokenWindow& window) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    if (!window.active()) return {static_cast<int32_t>(kMost), 0};
    return {static_cast<int32_t>(std::min(window.global_window, kMost)),
            static_cast<int32_t>(std::min(window.local_window, kMost))};
  }

  __host__ __device__ bool windowed() const {
    return global_window != std::numeric_limits<int32_t>::max();
  }
  __host__ __device__ bool sees(int32_t query, int32_t key) const {
    return key <= query && (key < global_window || query - key < local_window);
  }
  // Whether every query of [first_query, last_query] sees every key of [first_key, last_key].
  __host__ __device__ bool all_seen(int32_t first_query, int32_t last_query, int32_t first_key,
                                    int32_t last_key) const {
    return last_key <= first_query &&
           (last_key < global_window || last_query - first_key < local_window);
  }
  // Whether the query sees any key of [first_key, last_key].
  __host__ __device__ bool sees_any(int32_t query, int32_t first_key, int32_t last_key) const {
    return first_key <= query && (first_key < global_window ||
                                  query - (last_key < query ? last_key : query) < local_window);
  }
};

// What one query sees of the keys from some first key on, by their offset: for the loops that ask
// for every score of a tile.
struct SeenOffsets {
  int32_t last, before_local, global;

  __host__ __device__ SeenOffsets(const TokenMask& mask, int32_t query, int32_t first_key)
      : last(query < first_key ? -1 : query - first_key),
        before_local(last - mask.local_window),
        global(mask.global_window - first_key) {}

  // Without branches. offset >= 0.
  __host__ __device__ bool sees(int32_t offset) const {
    const bool in_window = (offset < global) | (offset > before_local);
    return (offset <= last) & in_window;
  }
};

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_ATTEND_MASK_CUH_

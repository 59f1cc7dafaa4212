// The products and the softmax of one tile, per instruction set: what attend_cpu and select_cpu
// share. Queries stand in vector lanes ("a panel of queries"), so the softmax needs no reduction
// across lanes, K and V are read as they lie, and a block needs no transposition.
#ifndef FLEXPREFILL_SRC_CPU_TILE_OPS_H_
#define FLEXPREFILL_SRC_CPU_TILE_OPS_H_

#include <cstddef>
#include <cstdint>

#include "flexprefill/types.h"

namespace flexprefill {

// One table per CpuTarget and element type of the inputs. Sizes:
//   panel    queries in a panel (a multiple of the vector length; at most kMaxPanel)
//   n_keys   1 to 128; operand buffers and s have room for keys rounded up to a multiple of 16
struct TileOps {
  static constexpr int kMaxPanel = 64;
  static constexpr int kMaxKeys = 128;

  CpuTarget target;
  int panel;

  // Queries. packed_q_bytes(d): size of one packed panel. pack_q reads n rows (1 <= n <= panel)
  // that lie `stride` bytes apart, zero-fills the other lanes.
  size_t (*packed_q_bytes)(int d);
  void (*pack_q)(const std::byte* rows, int64_t stride, int n, int d, void* packed);

  // Keys, as the operand of `scores`. key_bytes(d): room for kMaxKeys keys. load_keys appends n
  // rows as keys number `at`, at + 1, ...: called once for each run of rows (a page).
  size_t (*key_bytes)(int d);
  void (*load_keys)(const std::byte* rows, int64_t stride, int n, int at, int d, void* keys);
  // s[key * panel + lane] = dot(k[key], q[lane]), fp32, not scaled; keys first .. first + n - 1.
  void (*scores)(const void* packed_q, const void* keys, int first, int n, int d, float* s);
};

// The table for this element type; `target` must be supported (kAuto: the best one).
const TileOps& tile_ops(CpuTarget target, DType dtype);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_CPU_TILE_OPS_H_

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
//   panel     queries in a panel (a multiple of the vector length; at most kMaxPanel)
//   n         keys, 1 to kMaxKeys; operand buffers, s and p have room for kMaxKeys keys
//   d, d_v    head dims, multiples of 8 from 16 to 256
// Buffers (all but the callers' rows) are aligned to 64 bytes. Everything packed is opaque: its
// form differs between the tables.
struct TileOps {
  static constexpr int kMaxPanel = 64;
  static constexpr int kMaxKeys = 128;
  static constexpr int kMaxHeadDim = 256;

  CpuTarget target;
  int panel;
  int key_step;  // `weigh` and `accumulate` take multiples of key_step keys

  // Queries. packed_q_bytes(d): size of one packed panel. pack_q reads n rows (1 <= n <= panel)
  // that lie `stride` bytes apart, zero-fills the other lanes.
  size_t (*packed_q_bytes)(int d);
  void (*pack_q)(const std::byte* rows, int64_t stride, int n, int d, void* packed);

  // Keys, as the operand of `scores`. key_bytes(d): room for kMaxKeys keys. load_keys appends n
  // rows as keys number `at`, at + 1, ...: called once for each run of rows (a page).
  size_t (*key_bytes)(int d);
  void (*load_keys)(const std::byte* rows, int64_t stride, int n, int at, int d, void* keys);
  // s[key * panel + lane] = dot(k[key], q[lane]), fp32, not scaled; keys first .. first + n - 1,
  // `first` a multiple of 16. Rows of s up to the next multiple of 16 may be overwritten.
  void (*scores)(const void* packed_q, const void* keys, int first, int n, int d, float* s);

  // The online softmax of one panel over n more keys. s becomes p = exp2(scale * s - max), with
  // `scale` above 0 and scale * s in units of log2; a key that a lane does not see has s = -inf.
  // max and sum are [panel], o is [d_v, panel]; where max grows, sum and o are rescaled.
  // They begin as kNoMax, 0 and 0. A NaN, or a score of +inf, makes the lane's sum NaN. A table may
  // leave max up to kMaxLag below the greatest scale * s, which spares most of the rescaling.
  void (*weigh)(float* s, int n, float scale, int d_v, float* max, float* sum, float* o);
  static constexpr float kNoMax = -0x1.fffffep127f;
  static constexpr float kMaxLag = 8;

  // Values, as the operand of `accumulate`; as for keys. Keys n .. up to the next multiple of
  // key_step must be loaded too (as zeros).
  size_t (*value_bytes)(int d_v);
  void (*load_values)(const std::byte* rows, int64_t stride, int n, int at, int d_v, void* values);
  // o[c * panel + lane] += sum over keys of p[key * panel + lane] * v[key][c]; destroys p. o has
  // room for output_rows(d_v) rows.
  void (*accumulate)(float* p, const void* values, int n, int d_v, float* o);
  // `scores`, `weigh` and `accumulate` of one panel and n keys, a multiple of key_step, of which
  // lane l sees those up to last_seen + l; s is scratch. nullptr: the table gains nothing from
  // doing them in one.
  void (*attend)(const void* packed_q, const void* keys, const void* values, int n, int last_seen,
                 int d, int d_v, float scale, float* s, float* max, float* sum, float* o);
  // out[lane][c] = o[c * panel + lane] / sum[lane] in the element type, n rows `stride` bytes
  // apart. A table of a 16-bit type may multiply by the rounded reciprocal.
  void (*store)(const float* o, const float* sum, int n, int d_v, std::byte* out, int64_t stride);

  static constexpr int output_rows(int d_v) { return (d_v + 31) / 32 * 32; }
};

// The table for this element type. kAuto: the best target that the machine has; a target that it
// has not throws Error(kUnsupported).
const TileOps& tile_ops(CpuTarget target, DType dtype);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_CPU_TILE_OPS_H_

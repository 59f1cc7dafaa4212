// The tables that tile_ops.cc chooses from. nullptr: not in this build, or not for this type.
#ifndef FLEXPREFILL_SRC_CPU_TILE_OPS_TABLES_H_
#define FLEXPREFILL_SRC_CPU_TILE_OPS_TABLES_H_

#include "cpu/tile_ops.h"

namespace flexprefill {

// tile_ops_highway.cc: kBaseline, kAvx2, kAvx512, kNeon.
const TileOps* highway_tile_ops(CpuTarget target, DType dtype);
// tile_ops_avx512bf16.cc, tile_ops_amx.cc: bf16 inputs alone; other types run kAvx512's table.
const TileOps* avx512bf16_tile_ops(DType dtype);
const TileOps* amx_tile_ops(DType dtype);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_CPU_TILE_OPS_TABLES_H_

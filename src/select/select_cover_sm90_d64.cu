// BlockCover on Hopper: the kernels for head dims up to 64.
#include "select/select_cover_sm90_asks.cuh"
#include "select/select_cover_sm90_map.cuh"

namespace flexprefill {

template void launch_cover_asks_sm90<CoverShape<__nv_bfloat16, 64>>(const CoverSm90Params&,
                                                                    uint32_t, void*);
template void launch_cover_asks_sm90<CoverShape<__half, 64>>(const CoverSm90Params&, uint32_t,
                                                             void*);
template void launch_cover_map_sm90<CoverShape<__nv_bfloat16, 64>>(const CoverSm90Params&, uint32_t,
                                                                   void*);
template void launch_cover_map_sm90<CoverShape<__half, 64>>(const CoverSm90Params&, uint32_t,
                                                            void*);

}  // namespace flexprefill

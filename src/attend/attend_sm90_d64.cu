// attend on Hopper: the kernels for head dims up to 64 (q, k) and 64 (v).
#include "attend/attend_sm90_kernel.cuh"

namespace flexprefill {

template void launch_attend_sm90<AttendShape<__nv_bfloat16, 64, 64, 128>>(const AttendSm90Params&,
                                                                          int32_t, void*);
template void launch_attend_sm90<AttendShape<__nv_bfloat16, 64, 64, 64>>(const AttendSm90Params&,
                                                                         int32_t, void*);
template void launch_attend_sm90<AttendShape<__half, 64, 64, 128>>(const AttendSm90Params&, int32_t,
                                                                   void*);
template void launch_attend_sm90<AttendShape<__half, 64, 64, 64>>(const AttendSm90Params&, int32_t,
                                                                  void*);

}  // namespace flexprefill

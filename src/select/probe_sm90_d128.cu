// The probe of select on Hopper: the kernels for head dims up to 128.
#include "select/probe_sm90_kernel.cuh"

namespace flexprefill {

template void launch_probe_sm90<ProbeShape<__nv_bfloat16, 128, 1>>(const ProbeSm90Params&, uint32_t,
                                                                   void*);
template void launch_probe_sm90<ProbeShape<__nv_bfloat16, 128, 2>>(const ProbeSm90Params&, uint32_t,
                                                                   void*);
template void launch_probe_sm90<ProbeShape<__half, 128, 1>>(const ProbeSm90Params&, uint32_t,
                                                            void*);
template void launch_probe_sm90<ProbeShape<__half, 128, 2>>(const ProbeSm90Params&, uint32_t,
                                                            void*);

}  // namespace flexprefill

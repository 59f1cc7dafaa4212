// The probe of select on Hopper: the kernels for head dims up to 192.
#include "select/probe_sm90_kernel.cuh"

namespace flexprefill {

template void launch_probe_sm90<ProbeShape<__nv_bfloat16, 192, 1>>(const ProbeSm90Params&, uint32_t,
                                                                   void*);
template void launch_probe_sm90<ProbeShape<__nv_bfloat16, 192, 2>>(const ProbeSm90Params&, uint32_t,
                                                                   void*);
template void launch_probe_sm90<ProbeShape<__half, 192, 1>>(const ProbeSm90Params&, uint32_t,
                                                            void*);
template void launch_probe_sm90<ProbeShape<__half, 192, 2>>(const ProbeSm90Params&, uint32_t,
                                                            void*);

}  // namespace flexprefill

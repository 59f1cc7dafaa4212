// Instruction sets that Highway is not to build. Included before hwy/foreach_target.h.
#ifndef FLEXPREFILL_SRC_CPU_VECTOR_TARGETS_H_
#define FLEXPREFILL_SRC_CPU_VECTOR_TARGETS_H_

// Not worth a table of their own: SVE has no vectors of a known size, AVX3_DL nothing that helps.
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_AVX3_DL)

#endif  // FLEXPREFILL_SRC_CPU_VECTOR_TARGETS_H_

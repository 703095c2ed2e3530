/* Kernels for any processor: vectors of four floats, which SSE2, NEON and others have. */
#define LANES 4
#define TARGET
#define KERNEL(name) portable_##name
#include "linear_lanes.h"

static const Preparation preparation = PREPARATION;

const Kernels portable_kernels = {
    .prepare = &preparation,
    .bf16_as_float = 1,
    .ints_as_float = 1,
    .dot = {portable_bf16_dot, portable_int8_dot, portable_int4_dot},
};

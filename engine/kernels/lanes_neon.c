/* Attention and pointwise kernels for NEON, which every 64-bit Arm has. */
#include "native.h"
#if defined(HAVE_NEON)
#include <arm_neon.h>

#define LANES_NEON
#define LANES 4
#define TARGET
#define KERNEL(name) neon_##name
#define DOT_BFLOATS 0
#define QUERY_ROWS 4
#define SUM_ROWS 4
#define SUM_VECTORS 4
#include "lanes.h"

#include "attention_lanes.h"
#include "pointwise_lanes.h"
#endif

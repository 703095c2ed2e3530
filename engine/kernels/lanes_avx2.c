/* Attention and pointwise kernels for AVX2 with FMA and F16C. */
#include "native.h"
#if defined(HAVE_X86)
#include <immintrin.h>

#define LANES_AVX2
#define LANES 8
#define TARGET TARGET_AVX2
#define KERNEL(name) avx2_##name
#define DOT_BFLOATS 0
#define QUERY_ROWS 1
#define SUM_ROWS 4
#define SUM_VECTORS 2
#include "lanes.h"

#include "attention_lanes.h"
#include "pointwise_lanes.h"
#endif

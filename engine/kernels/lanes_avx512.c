/* Attention and pointwise kernels for AVX-512. */
#include "native.h"
#if defined(HAVE_X86)
#include <immintrin.h>

#define LANES_AVX512
#define LANES 16
#define TARGET TARGET_AVX512
#define KERNEL(name) avx512_##name
#define DOT_BFLOATS 0
#define QUERY_ROWS 1
#define SUM_ROWS 4
#define SUM_VECTORS 4
#include "lanes.h"

#include "attention_lanes.h"
#include "pointwise_lanes.h"
#endif

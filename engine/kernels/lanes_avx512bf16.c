/* Attention kernels for AVX-512 that multiplies bfloat16. */
#include "native.h"
#if defined(HAVE_X86)
#include <immintrin.h>

#define LANES_AVX512
#define LANES 16
#define TARGET TARGET_AVX512_BF16
#define KERNEL(name) avx512bf16_##name
#define DOT_BFLOATS 1
#define QUERY_ROWS 1
#define SUM_ROWS 4
#define SUM_VECTORS 4
#include "lanes.h"

#include "attention_lanes.h"
#endif

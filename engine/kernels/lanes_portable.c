/* Attention and pointwise kernels for any processor: vectors of four floats. */
#define LANES 4
#define TARGET
#define KERNEL(name) portable_##name
#define DOT_BFLOATS 0
#define QUERY_ROWS 2
#define SUM_ROWS 2
#define SUM_VECTORS 2
#include "lanes.h"

#include "attention_lanes.h"
#include "pointwise_lanes.h"

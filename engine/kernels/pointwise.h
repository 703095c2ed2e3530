/* What lies between a layer's matrices: norms, rotary embedding, gated activations.
 *
 * Every function rounds where transformers' models round, operation by operation, so that bfloat16
 * and float16 come out as they do there. Strides are in elements, rows are contiguous within.
 */
#ifndef COMBOIO_POINTWISE_H
#define COMBOIO_POINTWISE_H

#include "native.h"

enum { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };

typedef struct {
    const char *x;
    char *residual; /* NULL, or becomes x + residual, which is then what is normed */
    const char *weight;
    char *out;
    int64_t stride, inner, inner_stride; /* of x: row r is at r / inner and r % inner */
    int64_t rows, size;                  /* of residual and out too, which have nothing between */
    int dtype;
    int round_first; /* round before the weight is applied, as Llama does, not after */
    float epsilon;
    float weight_offset; /* added to every weight: 1 for Gemma */
} Norm;

/* Rotates the first `size` elements of each head in place: element i with i + size / 2. */
typedef struct {
    char *x;
    const char *cosine, *sine; /* (rows, size), of `table_dtype` */
    int64_t row_stride, head_stride, table_stride;
    int64_t rows, heads, size;
    int dtype, table_dtype;
} Rope;

typedef struct {
    const char *gate, *up; /* up NULL: only the activation */
    char *out;
    int64_t gate_stride, up_stride, out_stride;
    int64_t rows, size;
    int dtype, activation;
} Gated;

typedef struct {
    void (*norm)(const Norm *norm, int64_t begin, int64_t end); /* rows */
    void (*rope)(const Rope *rope, int64_t begin, int64_t end);
    void (*gated)(const Gated *gated, int64_t begin, int64_t end);
} PointwiseKernels;

#endif

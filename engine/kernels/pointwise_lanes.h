/* Norms, rotary embedding and gated activations once more for each width of vector; see lanes.h. */
#include "pointwise.h"

/* ---- norms ---- */

/* x, after the residual was added and stored. */
LANE_FUNCTION Floats take(const char *x, char *residual, int64_t at, int64_t count, int dtype) {
    Floats sum = load_up_to(x, at, count, dtype);
    if (!residual) return sum;
    sum = rounded_to(sum + load_up_to(residual, at, count, dtype), dtype);
    store_up_to(residual, at, count, sum, dtype);
    return sum;
}

LANE_FUNCTION void norm_row(const Norm *norm, int64_t row, int dtype) {
    const int64_t size = norm->size;
    const float share = 1.0f / (float)size;
    const char *x = norm->x + (row / norm->inner * norm->stride +
                               row % norm->inner * norm->inner_stride) * dtype_bytes(dtype);
    char *residual = norm->residual ? norm->residual + row * size * dtype_bytes(dtype) : NULL;
    Floats sum[4] = {{0}};
    for (int64_t at = 0; at < size; at += LANES) {
        Floats taken = take(x, residual, at, size - at, dtype);
        sum[at / LANES & 3] += taken * taken;
    }
    if (residual) x = residual;
    const float square = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) * share;
    const float scale = 1.0f / __builtin_sqrtf(square + norm->epsilon);
    char *out = norm->out + row * size * dtype_bytes(dtype);
    for (int64_t at = 0; at < size; at += LANES) {
        int64_t count = size - at;
        Floats y = load_up_to(x, at, count, dtype) * scale;
        if (norm->round_first) y = rounded_to(y, dtype);
        y *= load_up_to(norm->weight, at, count, dtype) + norm->weight_offset;
        store_up_to(out, at, count, y, dtype);
    }
}

/* ---- rotary embedding ---- */

LANE_FUNCTION void rope_row(const Rope *rope, int64_t row, int dtype, int table_dtype) {
    const int64_t half = rope->size / 2;
    const char *cosine = rope->cosine + row * rope->table_stride * dtype_bytes(table_dtype);
    const char *sine = rope->sine + row * rope->table_stride * dtype_bytes(table_dtype);
    char *head = rope->x + row * rope->row_stride * dtype_bytes(dtype);
    /* Products are rounded where both factors have that type; else all is float32 to the end. */
    const int between = dtype == table_dtype ? dtype : F32;
    for (int64_t i = 0; i < rope->heads; i++, head += rope->head_stride * dtype_bytes(dtype)) {
        for (int64_t at = 0; at < half; at += LANES) {
            int64_t count = half - at;
            Floats low = load_up_to(head, at, count, dtype);
            Floats high = load_up_to(head, half + at, count, dtype);
            Floats low_cosine = load_up_to(cosine, at, count, table_dtype);
            Floats high_cosine = load_up_to(cosine, half + at, count, table_dtype);
            Floats low_sine = load_up_to(sine, at, count, table_dtype);
            Floats high_sine = load_up_to(sine, half + at, count, table_dtype);
            Floats new_low =
                rounded_to(low * low_cosine, between) - rounded_to(high * low_sine, between);
            Floats new_high =
                rounded_to(high * high_cosine, between) + rounded_to(low * high_sine, between);
            store_up_to(head, at, count, new_low, dtype);
            store_up_to(head, half + at, count, new_high, dtype);
        }
    }
}

/* ---- gated activations ---- */

LANE_FUNCTION Floats activated(Floats x, const int activation) {
    if (activation == SILU) return x / (1.0f + exponential(-x));
    if (activation == GELU) return 0.5f * x * (1.0f + error_function(x * 0.70710678118654752f));
    if (activation == RELU) return at_least(x, 0.0f);
    Floats inner = 0.79788456080286536f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + hyperbolic_tangent(inner));
}

LANE_FUNCTION void gated_row(const Gated *gated, int64_t row, int dtype, const int activation) {
    const int64_t bytes = dtype_bytes(dtype);
    const char *gate = gated->gate + row * gated->gate_stride * bytes;
    const char *up = gated->up ? gated->up + row * gated->up_stride * bytes : NULL;
    char *out = gated->out + row * gated->out_stride * bytes;
    for (int64_t at = 0; at < gated->size; at += LANES) {
        int64_t count = gated->size - at;
        Floats y = activated(load_up_to(gate, at, count, dtype), activation);
        if (up) y = rounded_to(y, dtype) * load_up_to(up, at, count, dtype);
        store_up_to(out, at, count, y, dtype);
    }
}

/* ---- for each type ---- */

#define FOR_DTYPE(dtype, CALL) \
    switch (dtype) {           \
        case BF16: CALL(BF16)  \
        case F16: CALL(F16)    \
        default: CALL(F32)     \
    }

TARGET static void norm_rows(const Norm *norm, int64_t begin, int64_t end) {
#define CALL(dtype)                                                        \
    for (int64_t row = begin; row < end; row++) norm_row(norm, row, dtype); \
    break;
    FOR_DTYPE(norm->dtype, CALL)
#undef CALL
}

TARGET static void rope_rows(const Rope *rope, int64_t begin, int64_t end) {
#define CALL(dtype)                                                    \
    for (int64_t row = begin; row < end; row++)                        \
        if (rope->table_dtype == dtype) rope_row(rope, row, dtype, dtype); \
        else rope_row(rope, row, dtype, F32);                          \
    break;
    FOR_DTYPE(rope->dtype, CALL)
#undef CALL
}

#define GATED(name, activation)                                                               \
    TARGET static void name(const Gated *gated, int64_t begin, int64_t end) {                 \
        for (int64_t row = begin; row < end; row++) switch (gated->dtype) {                   \
                case BF16: gated_row(gated, row, BF16, activation); break;                    \
                case F16: gated_row(gated, row, F16, activation); break;                      \
                default: gated_row(gated, row, F32, activation);                              \
            }                                                                                 \
    }
GATED(silu_rows, SILU)
GATED(gelu_rows, GELU)
GATED(gelu_tanh_rows, GELU_TANH)
GATED(relu_rows, RELU)

TARGET static void gated_rows(const Gated *gated, int64_t begin, int64_t end) {
    switch (gated->activation) {
        case SILU: silu_rows(gated, begin, end); break;
        case GELU: gelu_rows(gated, begin, end); break;
        case GELU_TANH: gelu_tanh_rows(gated, begin, end); break;
        default: relu_rows(gated, begin, end);
    }
}

const PointwiseKernels KERNEL(pointwise_kernels) = {norm_rows, rope_rows, gated_rows};

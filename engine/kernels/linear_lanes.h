/* The kernels once more for each width of vector: included, not compiled, with
 *
 *   LANES       floats in a vector of the machine (4, 8, 16)
 *   TARGET      attribute of the instruction set
 *   KERNEL(f)   the name of f for it
 *
 * Written in vector types that gcc and clang know, without intrinsics. Whoever includes it picks
 * what it has not written better itself; all is `static`, so the rest costs nothing.
 */
#include "linear.h"

typedef float KERNEL(Floats) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t KERNEL(Words) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t KERNEL(Ints) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
#define Floats KERNEL(Floats)
#define Words KERNEL(Words)
#define Ints KERNEL(Ints)
#define PARTS (STRIP_ROWS / LANES)
/* Tokens that one pass over a strip serves: their sums must fit the registers. */
#define PASS (LANES == 16 ? 8 : 4)
#define UNUSED __attribute__((unused))
#define UNROLL _Pragma("GCC unroll 16")

/* ---- sums ---- */

TARGET INLINE void KERNEL(bf16_pass)(const uint8_t *strip, const Tokens *x, int first, float *out,
                                     const int tokens) {
    Floats sum[PASS][PARTS] = {0};
    const uint8_t *token = x->x + first * x->token_stride;
    for (int64_t chunk = 0; chunk < x->chunks; chunk++, token += x->chunk_stride) {
        for (int pair = 0; pair < 16; pair++, strip += 64) {
            __builtin_prefetch(strip + PREFETCH_BYTES);
            UNROLL for (int part = 0; part < PARTS; part++) {
                Words two = *(const Words *)(strip + part * LANES * 4);
                Floats even = (Floats)(two << 16), odd = (Floats)(two & 0xffff0000u);
                UNROLL for (int t = 0; t < tokens; t++) {
                    const float *value = (const float *)(token + t * x->token_stride) + 2 * pair;
                    sum[t][part] += value[0] * even;
                    sum[t][part] += value[1] * odd;
                }
            }
        }
    }
    memcpy(out + first * STRIP_ROWS, sum, tokens * sizeof *sum);
}

/* Integers as floats: sums of a chunk stay far below 2**24, so they are exact. */
TARGET INLINE void KERNEL(int8_pass)(const uint8_t *strip, const Tokens *x, int first, float *out,
                                     const int tokens) {
    Floats total[PASS][PARTS] = {0};
    const uint8_t *weights = strip + INT8_HEAD_BYTES, *token = x->x + first * x->token_stride;
    for (int64_t chunk = 0; chunk < x->chunks; chunk++, token += x->chunk_stride) {
        Floats sum[PASS][PARTS] = {0};
        for (int quad = 0; quad < 16; quad++, weights += 64) {
            UNROLL for (int part = 0; part < PARTS; part++) {
                Words four = *(const Words *)(weights + part * LANES * 4) ^ 0x80808080u;
                UNROLL for (int i = 0; i < 4; i++) {
                    Floats weight =
                        __builtin_convertvector((Ints)(four << (24 - 8 * i)) >> 24, Floats);
                    UNROLL for (int t = 0; t < tokens; t++) sum[t][part] +=
                        ((const float *)(token + t * x->token_stride))[4 * quad + i] * weight;
                }
            }
        }
        UNROLL for (int t = 0; t < tokens; t++)
            UNROLL for (int part = 0; part < PARTS; part++) total[t][part] +=
            x->scale[chunk * x->tokens + first + t] * sum[t][part];
    }
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int part = 0; part < PARTS; part++) *(Floats *)(out + (first + t) * 16 +
                                                                    part * LANES) =
        total[t][part] * *(const Floats *)(strip + part * LANES * 4);
}

TARGET INLINE void KERNEL(int4_pass)(const uint8_t *strip, const Tokens *x, int first, float *out,
                                     const int tokens) {
    Floats total[PASS][PARTS] = {0};
    const uint8_t *token = x->x + first * x->token_stride;
    for (int64_t chunk = 0; chunk < x->chunks; chunk++, token += x->chunk_stride) {
        const uint8_t *scales = strip, *weights = strip + INT4_HEAD_BYTES;
        for (int half = 0; half < 2; half++) {
            Floats sum[PASS][PARTS] = {0};
            for (int octet = 4 * half; octet < 4 * half + 4; octet++, weights += 64) {
                UNROLL for (int part = 0; part < PARTS; part++) {
                    Words eight = *(const Words *)(weights + part * LANES * 4);
                    UNROLL for (int i = 0; i < 8; i++) {
                        /* columns 0-3 in the low halves of the bytes, 4-7 in the high ones */
                        Words nibble = eight >> (i < 4 ? 8 * i : 8 * (i - 4) + 4) & 15;
                        Floats weight = __builtin_convertvector((Ints)nibble - 8, Floats);
                        UNROLL for (int t = 0; t < tokens; t++) sum[t][part] +=
                            ((const float *)(token + t * x->token_stride))[8 * octet + i] * weight;
                    }
                }
            }
            UNROLL for (int part = 0; part < PARTS; part++) {
                Words pair = *(const Words *)(scales + part * LANES * 4);
                Floats scale = half ? (Floats)(pair & 0xffff0000u) : (Floats)(pair << 16);
                UNROLL for (int t = 0; t < tokens; t++) total[t][part] +=
                    x->scale[chunk * x->tokens + first + t] * sum[t][part] * scale;
            }
        }
        strip += INT4_CHUNK_BYTES;
    }
    memcpy(out + first * STRIP_ROWS, total, tokens * sizeof *total);
}

/* Every number of tokens up to PASS is a loop of its own, unrolled by the compiler. */
#define IN_PASSES(name, pass)                                                              \
    TARGET UNUSED static void KERNEL(name)(const uint8_t *strip, const Tokens *x, float *out) { \
        for (int first = 0; first < x->tokens; first += PASS) {                            \
            switch (x->tokens - first) {                                                   \
            case 1: pass(strip, x, first, out, 1); break;                                  \
            case 2: pass(strip, x, first, out, 2); break;                                  \
            case 3: pass(strip, x, first, out, 3); break;                                  \
            default: pass(strip, x, first, out, 4); break;                                 \
            }                                                                              \
        }                                                                                  \
    }
#undef PASS
#define PASS 4
IN_PASSES(bf16_dot, KERNEL(bf16_pass))
IN_PASSES(int8_dot, KERNEL(int8_pass))
IN_PASSES(int4_dot, KERNEL(int4_pass))

/* ---- tokens ---- */

TARGET INLINE void KERNEL(as_floats)(const void *x, int dtype, int64_t first, int64_t count,
                                     float *to) {
    if (dtype == BF16)
        for (int64_t i = 0; i < count; i++) to[i] = from_bf16(((const uint16_t *)x)[first + i]);
    else if (dtype == F16)
        for (int64_t i = 0; i < count; i++) to[i] = from_f16(((const uint16_t *)x)[first + i]);
    else
        memcpy(to, (const float *)x + first, count * sizeof(float));
}

TARGET UNUSED static void KERNEL(convert_token)(const void *x, int dtype, int64_t cols,
                                                int as_float, uint8_t *to, int64_t chunk_stride) {
    for (int64_t first = 0; first < cols; first += 32, to += chunk_stride) {
        if (dtype == BF16 && !as_float && first + 32 <= cols) {
            memcpy(to, (const uint16_t *)x + first, 64);
            continue;
        }
        float values[32] = {0};
        KERNEL(as_floats)(x, dtype, first, cols - first < 32 ? cols - first : 32, values);
        if (as_float)
            memcpy(to, values, sizeof values);
        else
            for (int i = 0; i < 32; i++) ((uint16_t *)to)[i] = to_bf16(values[i]);
    }
}

/* Symmetric, one scale for 64 columns: the largest becomes 127. The largest is found among the
 * bits of the magnitudes, where infinity and not-a-number count as large and so are not lost. */
TARGET UNUSED static void KERNEL(quantize_token)(const void *x, int dtype, int64_t cols,
                                                 int as_float, uint8_t *to,
                                                 int64_t chunk_stride, float *scale,
                                                 float *shift, int32_t *offset, int tokens) {
    float all = 0.0f;
    for (int64_t first = 0; first < cols; first += 64, to += chunk_stride) {
        float values[64] = {0};
        int32_t largest[16] = {0}, whole[64], most = 0, sums[2] = {0};
        KERNEL(as_floats)(x, dtype, first, cols - first < 64 ? cols - first : 64, values);
        for (int i = 0; i < 64; i += 16)
            for (int lane = 0; lane < 16; lane++) {
                int32_t magnitude = (int32_t)(bits_of(values[i + lane]) & 0x7fffffff);
                largest[lane] = magnitude > largest[lane] ? magnitude : largest[lane];
            }
        for (int lane = 0; lane < 16; lane++) most = largest[lane] > most ? largest[lane] : most;
        float unit = float_of((uint32_t)most) / 127.0f;
        float inverse = unit > 0.0f ? 127.0f / float_of((uint32_t)most) : 0.0f;
        for (int i = 0; i < 64; i++) {
            /* Adding 1.5 * 2**23 leaves the nearest integer in the low bits. */
            int32_t bits = (int32_t)bits_of(values[i] * inverse + 12582912.0f);
            whole[i] = (int32_t)((uint32_t)bits << 24) >> 24;
        }
        for (int i = 0; i < 32; i++) sums[0] += whole[i], sums[1] += whole[32 + i];
        if (as_float)
            for (int i = 0; i < 64; i++) ((float *)to)[i] = (float)whole[i];
        else
            for (int i = 0; i < 64; i++) ((int8_t *)to)[i] = (int8_t)whole[i];
        *scale = unit;
        scale += tokens;
        all += unit * (float)(sums[0] + sums[1]);
        offset[0] = -8 * sums[0];
        offset[tokens] = -8 * sums[1];
        offset += 2 * tokens;
    }
    *shift = -128.0f * all;
}

/* ---- strips ---- */

/* int8: the largest of a row becomes 127. */
TARGET INLINE void KERNEL(int8_strip)(const float *columns, int64_t cols, uint8_t *strip) {
    float largest[16] = {0}, inverse[16];
    for (int64_t k = 0; k < cols; k++)
        for (int row = 0; row < 16; row++) {
            float magnitude = float_of(bits_of(columns[k * 16 + row]) & 0x7fffffff);
            largest[row] = magnitude > largest[row] ? magnitude : largest[row];
        }
    for (int row = 0; row < 16; row++) {
        ((float *)strip)[row] = largest[row] / 127.0f;
        inverse[row] = largest[row] > 0.0f ? 127.0f / largest[row] : 0.0f;
    }
    strip += INT8_HEAD_BYTES;
    for (int64_t k = 0; k < num_chunks(FORMAT_INT8, cols) * 64; k += 4, strip += 64)
        for (int row = 0; row < 16; row++) {
            uint32_t four = 0;
            for (int i = 0; i < 4; i++) {
                float value = k + i < cols ? columns[(k + i) * 16 + row] : 0.0f;
                uint32_t whole = bits_of(value * inverse[row] + 12582912.0f) + 128;
                four |= (whole & 0xff) << (8 * i);
            }
            ((uint32_t *)strip)[row] = four;
        }
}

/* int4: of a few scales the one with the least squared error. The weight of largest magnitude
 * is put at -8 and at the fractions of it below; the best then is fitted by least squares. */
TARGET INLINE void KERNEL(int4_scales)(const float w[32][16], uint32_t best[16]) {
    static const float STEPS[] = {-8.0f, -7.0f, -7.5f, -8.5f, -9.0f, -9.5f, 7.0f, 7.5f, 8.0f};
    float extreme[16] = {0}, least[16], found[16] = {0};
    for (int k = 0; k < 32; k++)
        for (int row = 0; row < 16; row++) {
            float magnitude = float_of(bits_of(w[k][row]) & 0x7fffffff);
            float so_far = float_of(bits_of(extreme[row]) & 0x7fffffff);
            extreme[row] = magnitude > so_far ? w[k][row] : extreme[row];
        }
    for (int row = 0; row < 16; row++) least[row] = 3.0e38f;
    for (size_t step = 0; step < sizeof STEPS / sizeof *STEPS; step++) {
        float inverse[16], fit[16], norm[16] = {0}, product[16] = {0};
        for (int row = 0; row < 16; row++) {
            float safe = extreme[row] == 0.0f ? 1.0f : extreme[row];
            inverse[row] = STEPS[step] / safe;
        }
        for (int k = 0; k < 32; k++)
            for (int row = 0; row < 16; row++) {
                float q = (w[k][row] * inverse[row] + 12582912.0f) - 12582912.0f;
                q = q > 7.0f ? 7.0f : q;
                q = q < -8.0f ? -8.0f : q;
                norm[row] += q * q;
                product[row] += q * w[k][row];
            }
        /* The best scale for these integers is product / norm; its error is what is constant
         * less product**2 / norm. */
        for (int row = 0; row < 16; row++) {
            float safe = norm[row] > 0.0f ? norm[row] : 1.0f;
            fit[row] = product[row] / safe;
            float error = -fit[row] * product[row];
            found[row] = error < least[row] ? fit[row] : found[row];
            least[row] = error < least[row] ? error : least[row];
        }
    }
    for (int row = 0; row < 16; row++) best[row] = to_bf16(found[row]);
}

TARGET INLINE void KERNEL(int4_strip)(const float *columns, int64_t cols, uint8_t *strip) {
    for (int64_t first = 0; first < cols; first += 64, strip += INT4_CHUNK_BYTES) {
        uint32_t *to = (uint32_t *)(strip + INT4_HEAD_BYTES);
        memset(strip, 0, INT4_HEAD_BYTES);
        for (int half = 0; half < 2; half++) {
            float w[32][16] = {{0}}, inverse[16];
            uint32_t scale[16];
            int64_t left = cols - first - 32 * half;
            if (left > 0)
                memcpy(w, columns + (first + 32 * half) * 16,
                       (left < 32 ? left : 32) * sizeof *w);
            KERNEL(int4_scales)((const float(*)[16])w, scale);
            for (int row = 0; row < 16; row++) {
                float value = float_of(scale[row] << 16);
                ((uint32_t *)strip)[row] |= scale[row] << (16 * half);
                inverse[row] = value != 0.0f ? 1.0f / value : 0.0f;
            }
            for (int octet = 0; octet < 4; octet++, to += 16) {
                uint32_t eight[16] = {0};
                for (int i = 0; i < 8; i++)
                    for (int row = 0; row < 16; row++) {
                        float q = (w[8 * octet + i][row] * inverse[row] + 12582912.0f) -
                                  12582912.0f;
                        q = q > 7.0f ? 7.0f : q;
                        q = q < -8.0f ? -8.0f : q;
                        uint32_t nibble = (uint32_t)((int32_t)q + 8) & 15;
                        eight[row] |= nibble << (i < 4 ? 8 * i : 8 * (i - 4) + 4);
                    }
                memcpy(to, eight, sizeof eight);
            }
        }
    }
}

TARGET UNUSED static void KERNEL(quantize_strip)(int format, const float *columns, int64_t cols,
                                                 uint8_t *strip) {
    if (format == FORMAT_INT8)
        KERNEL(int8_strip)(columns, cols, strip);
    else
        KERNEL(int4_strip)(columns, cols, strip);
}

#define PREPARATION \
    {KERNEL(convert_token), KERNEL(quantize_token), KERNEL(quantize_strip), NULL, NULL}

/* Kernels for 64-bit Arm: integers by the dot product of bytes, or by widening products. */
#include "native.h"
#if defined(HAVE_NEON)
#include <arm_neon.h>

#define LANES 4
#define TARGET
#define KERNEL(name) neon_##name
#include "linear_bf12.h"
#include "linear_lanes.h"

/* A vector holds four columns of four rows, a lane each row. Both instruction sets differ in one
 * step alone: sum[row] += the four products of the row. `four` picks the columns of the token. */
INLINE int32x4_t widening(int32x4_t sum, int8x16_t weights, int8x16_t token, const int four) {
    int8x8_t columns = vreinterpret_s8_s32(
        vdup_n_s32(vgetq_lane_s32(vreinterpretq_s32_s8(token), 0)));
    if (four == 1)
        columns = vreinterpret_s8_s32(
            vdup_n_s32(vgetq_lane_s32(vreinterpretq_s32_s8(token), 1)));
    if (four == 2)
        columns = vreinterpret_s8_s32(
            vdup_n_s32(vgetq_lane_s32(vreinterpretq_s32_s8(token), 2)));
    if (four == 3)
        columns = vreinterpret_s8_s32(
            vdup_n_s32(vgetq_lane_s32(vreinterpretq_s32_s8(token), 3)));
    int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(weights), columns));
    int32x4_t high = vpaddlq_s16(vmull_s8(vget_high_s8(weights), columns));
    return vaddq_s32(sum, vpaddq_s32(low, high));
}

TARGET_DOTPROD INLINE int32x4_t dotted(int32x4_t sum, int8x16_t weights, int8x16_t token,
                                       const int four) {
    if (four == 0) return vdotq_laneq_s32(sum, weights, token, 0);
    if (four == 1) return vdotq_laneq_s32(sum, weights, token, 1);
    if (four == 2) return vdotq_laneq_s32(sum, weights, token, 2);
    return vdotq_laneq_s32(sum, weights, token, 3);
}

/* The weights lose their own offset here, so the tokens' is not used. */
#define INT8_PASS(name, target, add)                                                          \
    target INLINE void name(const uint8_t *strip, const Tokens *x, int first, float *out,     \
                            const int tokens) {                                               \
        float32x4_t total[4][4] = {0};                                                        \
        const uint8_t *weights = strip + INT8_HEAD_BYTES;                                     \
        const uint8_t *token = x->x + first * x->token_stride;                                \
        const uint8x16_t zero = vdupq_n_u8(128);                                              \
        for (int64_t chunk = 0; chunk < x->chunks; chunk++, token += x->chunk_stride) {       \
            int32x4_t sum[4][4] = {0};                                                        \
            for (int group = 0; group < 4; group++) {                                         \
                int8x16_t mine[4];                                                            \
                UNROLL for (int t = 0; t < tokens; t++) mine[t] =                             \
                    vld1q_s8((const int8_t *)token + t * x->token_stride + 16 * group);       \
                UNROLL for (int four = 0; four < 4; four++, weights += 64) {                  \
                    __builtin_prefetch(weights + PREFETCH_BYTES);                             \
                    UNROLL for (int part = 0; part < 4; part++) {                             \
                        int8x16_t weight = vreinterpretq_s8_u8(                               \
                            veorq_u8(vld1q_u8(weights + 16 * part), zero));                   \
                        UNROLL for (int t = 0; t < tokens; t++) sum[t][part] =                \
                            add(sum[t][part], weight, mine[t], four);                         \
                    }                                                                         \
                }                                                                             \
            }                                                                                 \
            UNROLL for (int t = 0; t < tokens; t++)                                           \
                UNROLL for (int part = 0; part < 4; part++) total[t][part] = vfmaq_n_f32(     \
                total[t][part], vcvtq_f32_s32(sum[t][part]),                                  \
                x->scale[chunk * x->tokens + first + t]);                                     \
        }                                                                                     \
        UNROLL for (int t = 0; t < tokens; t++)                                               \
            UNROLL for (int part = 0; part < 4; part++) vst1q_f32(                            \
            out + (first + t) * 16 + 4 * part,                                                \
            vmulq_f32(total[t][part], vld1q_f32((const float *)strip + 4 * part)));           \
    }

#define INT4_PASS(name, target, add)                                                          \
    target INLINE void name(const uint8_t *strip, const Tokens *x, int first, float *out,     \
                            const int tokens) {                                               \
        float32x4_t total[4][4] = {0};                                                        \
        const uint8_t *token = x->x + first * x->token_stride;                                \
        const int8x16_t eight = vdupq_n_s8(8);                                                \
        for (int64_t chunk = 0; chunk < x->chunks; chunk++, token += x->chunk_stride) {       \
            const uint8_t *weights = strip + INT4_HEAD_BYTES;                                 \
            for (int half = 0; half < 2; half++) {                                            \
                int32x4_t sum[4][4] = {0};                                                    \
                UNROLL for (int group = 0; group < 2; group++) {                              \
                    int8x16_t mine[4];                                                        \
                    UNROLL for (int t = 0; t < tokens; t++) mine[t] =                         \
                        vld1q_s8((const int8_t *)token + t * x->token_stride + 32 * half +    \
                                 16 * group);                                                 \
                    UNROLL for (int two = 0; two < 2; two++, weights += 64) {                 \
                        __builtin_prefetch(weights + PREFETCH_BYTES);                         \
                        UNROLL for (int part = 0; part < 4; part++) {                         \
                            uint8x16_t both = vld1q_u8(weights + 16 * part);                  \
                            int8x16_t even = vsubq_s8(                                        \
                                vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15))), eight);  \
                            int8x16_t odd =                                                   \
                                vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(both, 4)), eight);    \
                            UNROLL for (int t = 0; t < tokens; t++) {                         \
                                sum[t][part] = add(sum[t][part], even, mine[t], 2 * two);     \
                                sum[t][part] = add(sum[t][part], odd, mine[t], 2 * two + 1);  \
                            }                                                                 \
                        }                                                                     \
                    }                                                                         \
                }                                                                             \
                UNROLL for (int part = 0; part < 4; part++) {                                 \
                    uint32x4_t pair = vld1q_u32((const uint32_t *)strip + 4 * part);          \
                    float32x4_t scale = vreinterpretq_f32_u32(                                \
                        half ? vandq_u32(pair, vdupq_n_u32(0xffff0000u))                      \
                             : vshlq_n_u32(pair, 16));                                        \
                    UNROLL for (int t = 0; t < tokens; t++) total[t][part] = vfmaq_f32(       \
                        total[t][part], vcvtq_f32_s32(sum[t][part]),                          \
                        vmulq_n_f32(scale, x->scale[chunk * x->tokens + first + t]));         \
                }                                                                             \
            }                                                                                 \
            strip += INT4_CHUNK_BYTES;                                                        \
        }                                                                                     \
        UNROLL for (int t = 0; t < tokens; t++)                                               \
            UNROLL for (int part = 0; part < 4; part++)                                       \
                vst1q_f32(out + (first + t) * 16 + 4 * part, total[t][part]);                 \
    }

INT8_PASS(int8_widening_pass, , widening)
INT4_PASS(int4_widening_pass, , widening)
INT8_PASS(int8_dotted_pass, TARGET_DOTPROD, dotted)
INT4_PASS(int4_dotted_pass, TARGET_DOTPROD, dotted)

static void bf16_groups(const uint8_t *from, int64_t groups, const uint8_t *high, uint8_t *lines) {
    const uint8x16_t table = vld1q_u8(high);
    for (; groups; groups--, from += GROUP_BYTES, lines += GROUP_BF16_BYTES)
        for (int two = 0; two < 2; two++)
            for (int granule = 0; granule < 4; granule++) {
                uint8x16_t codes = vld1q_u8(from + 16 * granule);
                codes = two ? vshrq_n_u8(codes, 4) : vandq_u8(codes, vdupq_n_u8(15));
                uint8x16_t said = vqtbl1q_u8(table, codes);
                uint8x16_t low = vld1q_u8(from + 64 + 64 * two + 16 * granule);
                vst1q_u8(lines + 128 * two + 16 * granule, vzip1q_u8(low, said));
                vst1q_u8(lines + 128 * two + 64 + 16 * granule, vzip2q_u8(low, said));
            }
}

static const Preparation preparation = {neon_convert_token, neon_quantize_token,
                                        neon_quantize_strip, NULL, bf16_groups};

#undef KERNEL
#define KERNEL(name) widening_##name
IN_PASSES(int8_dot, int8_widening_pass)
IN_PASSES(int4_dot, int4_widening_pass)
#undef KERNEL
#undef TARGET
#define TARGET TARGET_DOTPROD
#define KERNEL(name) dotted_##name
IN_PASSES(int8_dot, int8_dotted_pass)
IN_PASSES(int4_dot, int4_dotted_pass)

const Kernels neon_kernels = {
    .prepare = &preparation,
    .bf16_as_float = 1,
    .dot = {neon_bf16_dot, widening_int8_dot, widening_int4_dot},
};

const Kernels dotprod_kernels = {
    .prepare = &preparation,
    .bf16_as_float = 1,
    .dot = {neon_bf16_dot, dotted_int8_dot, dotted_int4_dot},
};
#endif

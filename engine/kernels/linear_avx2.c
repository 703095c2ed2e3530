/* Kernels for AVX2 with FMA: integers by the multiply-add of bytes, bf16 as floats. */
#include "native.h"
#if defined(HAVE_X86)
#include <immintrin.h>

#define LANES 8
#define TARGET TARGET_AVX2
#define KERNEL(name) avx2_##name
#include "linear_lanes.h"

TARGET_AVX2 INLINE __m256i four_of(const uint8_t *token, int64_t offset) {
    int32_t four;
    memcpy(&four, token + offset, 4);
    return _mm256_set1_epi32(four);
}

/* Two products of bytes are added in 16 bits, which saturate: the weights are made -127..127 and
 * give their sign to the tokens, so that 2 * 127 * 127 is the most. */
TARGET_AVX2 INLINE void int8_pass(const uint8_t *strip, const Tokens *x, int first, float *out,
                                  const int tokens) {
    const __m256i zero = _mm256_set1_epi8(-128), ones = _mm256_set1_epi16(1);
    __m256 total[4][2];
    UNROLL for (int t = 0; t < tokens; t++) total[t][0] = total[t][1] = _mm256_setzero_ps();
    const uint8_t *weights = strip + INT8_HEAD_BYTES, *token = x->x + first * x->token_stride;
    const float *scale = x->scale + first;
    for (int64_t chunk = 0; chunk < x->chunks; chunk++) {
        __m256i sum[4][2];
        UNROLL for (int t = 0; t < tokens; t++) sum[t][0] = sum[t][1] = _mm256_setzero_si256();
        for (int quad = 0; quad < 16; quad++, weights += 64) {
            _mm_prefetch(weights + PREFETCH_BYTES, _MM_HINT_T0);
            UNROLL for (int part = 0; part < 2; part++) {
                __m256i weight = _mm256_xor_si256(
                    zero, _mm256_loadu_si256((const __m256i *)(weights + 32 * part)));
                __m256i magnitude = _mm256_abs_epi8(weight);
                UNROLL for (int t = 0; t < tokens; t++) {
                    __m256i four = four_of(token + t * x->token_stride, 4 * quad);
                    __m256i pairs =
                        _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(four, weight));
                    sum[t][part] =
                        _mm256_add_epi32(sum[t][part], _mm256_madd_epi16(pairs, ones));
                }
            }
        }
        UNROLL for (int t = 0; t < tokens; t++)
            UNROLL for (int part = 0; part < 2; part++) total[t][part] =
            _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[t][part]), _mm256_set1_ps(scale[t]),
                            total[t][part]);
        token += x->chunk_stride;
        scale += x->tokens;
    }
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int part = 0; part < 2; part++) _mm256_storeu_ps(
        out + (first + t) * 16 + 8 * part,
        _mm256_mul_ps(total[t][part], _mm256_loadu_ps((const float *)strip + 8 * part)));
}

/* Halves of bytes are 0..15: eight products fit 16 bits, 8 * 15 * 127 = 15240. */
TARGET_AVX2 INLINE void int4_pass(const uint8_t *strip, const Tokens *x, int first, float *out,
                                  const int tokens) {
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256 total[4][2];
    UNROLL for (int t = 0; t < tokens; t++) total[t][0] = total[t][1] = _mm256_setzero_ps();
    const uint8_t *token = x->x + first * x->token_stride;
    const float *scale = x->scale + first;
    const int32_t *offset = x->offset + first;
    for (int64_t chunk = 0; chunk < x->chunks; chunk++) {
        _mm_prefetch(strip + PREFETCH_BYTES, _MM_HINT_T0);
        for (int half = 0; half < 2; half++) {
            __m256i sum[4][2];
            UNROLL for (int t = 0; t < tokens; t++) sum[t][0] = sum[t][1] =
                _mm256_set1_epi32(offset[half * x->tokens + t]);
            UNROLL for (int two = 2 * half; two < 2 * half + 2; two++) {
                const uint8_t *weights = strip + INT4_HEAD_BYTES + 128 * two;
                _mm_prefetch(weights + PREFETCH_BYTES, _MM_HINT_T0);
                UNROLL for (int part = 0; part < 2; part++) {
                    __m256i a = _mm256_loadu_si256((const __m256i *)(weights + 32 * part));
                    __m256i b = _mm256_loadu_si256((const __m256i *)(weights + 64 + 32 * part));
                    __m256i a_odd = _mm256_and_si256(_mm256_srli_epi16(a, 4), low);
                    __m256i b_odd = _mm256_and_si256(_mm256_srli_epi16(b, 4), low);
                    if (part) _mm_prefetch(weights + 64 + PREFETCH_BYTES, _MM_HINT_T0);
                    a = _mm256_and_si256(a, low);
                    b = _mm256_and_si256(b, low);
                    UNROLL for (int t = 0; t < tokens; t++) {
                        const uint8_t *mine = token + t * x->token_stride + 16 * two;
                        __m256i pairs = _mm256_add_epi16(
                            _mm256_add_epi16(_mm256_maddubs_epi16(a, four_of(mine, 0)),
                                             _mm256_maddubs_epi16(a_odd, four_of(mine, 4))),
                            _mm256_add_epi16(_mm256_maddubs_epi16(b, four_of(mine, 8)),
                                             _mm256_maddubs_epi16(b_odd, four_of(mine, 12))));
                        sum[t][part] =
                            _mm256_add_epi32(sum[t][part], _mm256_madd_epi16(pairs, ones));
                    }
                    IN_ORDER;
                }
            }
            UNROLL for (int part = 0; part < 2; part++) {
                __m256i scales = _mm256_loadu_si256((const __m256i *)(strip + 32 * part));
                __m256 row_scale = _mm256_castsi256_ps(
                    half ? _mm256_and_si256(scales, _mm256_set1_epi32((int)0xffff0000u))
                         : _mm256_slli_epi32(scales, 16));
                UNROLL for (int t = 0; t < tokens; t++) total[t][part] = _mm256_fmadd_ps(
                    _mm256_cvtepi32_ps(sum[t][part]),
                    _mm256_mul_ps(row_scale, _mm256_set1_ps(scale[t])), total[t][part]);
            }
        }
        strip += INT4_CHUNK_BYTES;
        token += x->chunk_stride;
        scale += x->tokens;
        offset += 2 * x->tokens;
    }
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int part = 0; part < 2; part++)
            _mm256_storeu_ps(out + (first + t) * 16 + 8 * part, total[t][part]);
}

static const Preparation preparation = PREPARATION;

#undef KERNEL
#define KERNEL(name) avx2_vector_##name
IN_PASSES(int8_dot, int8_pass)
IN_PASSES(int4_dot, int4_pass)

const Kernels avx2_kernels = {
    .prepare = &preparation,
    .bf16_as_float = 1,
    .dot = {avx2_bf16_dot, avx2_vector_int8_dot, avx2_vector_int4_dot},
};
#endif

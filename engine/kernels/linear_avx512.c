/* Kernels for AVX-512: integers by VNNI, bf16 by its own instruction or as floats. */
#include "native.h"
#if defined(HAVE_X86)
#include <immintrin.h>

#include "linear_bf12.h"

#define LANES 16
#define TARGET TARGET_AVX512
#define KERNEL(name) avx512_##name
#include "linear_lanes.h"

TARGET_AVX512 INLINE __m512i four_of(const uint8_t *token, int64_t offset) {
    int32_t four;
    memcpy(&four, token + offset, 4);
    return _mm512_set1_epi32(four);
}

TARGET_AVX512 INLINE void int8_pass(const uint8_t *strip, const Tokens *x, int first, float *out,
                                    const int tokens) {
    __m512 total[8], row_scale = _mm512_loadu_ps(strip);
    UNROLL for (int t = 0; t < tokens; t++) total[t] = _mm512_setzero_ps();
    const int64_t stride = x->token_stride, step = x->chunk_stride, chunks = x->chunks;
    const uint8_t *token = x->x + first * stride;
    const float *scale = x->scale + first;
    strip += INT8_HEAD_BYTES;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        __m512i sum[8];
        UNROLL for (int t = 0; t < tokens; t++) sum[t] = _mm512_setzero_si512();
        UNROLL for (int quad = 0; quad < 16; quad++) {
            _mm_prefetch(strip + quad * 64 + PREFETCH_BYTES, _MM_HINT_T0);
            __m512i weights = _mm512_loadu_si512(strip + quad * 64);
            UNROLL for (int t = 0; t < tokens; t++) sum[t] = _mm512_dpbusd_epi32(
                sum[t], weights, four_of(token + t * stride, 4 * quad));
            IN_ORDER;
        }
        UNROLL for (int t = 0; t < tokens; t++) total[t] =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t]), _mm512_set1_ps(scale[t]), total[t]);
        strip += INT8_CHUNK_BYTES;
        token += step;
        scale += x->tokens;
    }
    UNROLL for (int t = 0; t < tokens; t++)
        _mm512_storeu_ps(out + (first + t) * 16,
                         _mm512_mul_ps(_mm512_add_ps(total[t], _mm512_set1_ps(x->shift[first + t])),
                                       row_scale));
}

TARGET_AVX512 INLINE void int4_pass(const uint8_t *strip, const Tokens *x, int first, float *out,
                                    const int tokens) {
    const __m512i low = _mm512_set1_epi8(15), upper = _mm512_set1_epi32((int)0xffff0000u);
    __m512 total[8];
    UNROLL for (int t = 0; t < tokens; t++) total[t] = _mm512_setzero_ps();
    const int64_t stride = x->token_stride, step = x->chunk_stride, chunks = x->chunks;
    const uint8_t *token = x->x + first * stride;
    const float *scale = x->scale + first;
    const int32_t *offset = x->offset + first;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        _mm_prefetch(strip + PREFETCH_BYTES, _MM_HINT_T0);
        __m512i scales = _mm512_loadu_si512(strip);
        UNROLL for (int half = 0; half < 2; half++) {
            __m512i sum[8];
            UNROLL for (int t = 0; t < tokens; t++)
                sum[t] = _mm512_set1_epi32(offset[half * x->tokens + t]);
            UNROLL for (int octet = 4 * half; octet < 4 * half + 4; octet++) {
                const uint8_t *line = strip + INT4_HEAD_BYTES + octet * 64;
                _mm_prefetch(line + PREFETCH_BYTES, _MM_HINT_T0);
                __m512i both = _mm512_loadu_si512(line);
                __m512i even = _mm512_and_si512(both, low);
                __m512i odd = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
                UNROLL for (int t = 0; t < tokens; t++) {
                    const uint8_t *mine = token + t * stride;
                    sum[t] = _mm512_dpbusd_epi32(sum[t], even, four_of(mine, 8 * octet));
                    sum[t] = _mm512_dpbusd_epi32(sum[t], odd, four_of(mine, 8 * octet + 4));
                }
                IN_ORDER;
            }
            __m512 row_scale = _mm512_castsi512_ps(half ? _mm512_and_si512(scales, upper)
                                                        : _mm512_slli_epi32(scales, 16));
            UNROLL for (int t = 0; t < tokens; t++) total[t] = _mm512_fmadd_ps(
                _mm512_cvtepi32_ps(sum[t]), _mm512_mul_ps(row_scale, _mm512_set1_ps(scale[t])),
                total[t]);
        }
        strip += INT4_CHUNK_BYTES;
        token += step;
        scale += x->tokens;
        offset += 2 * x->tokens;
    }
    UNROLL for (int t = 0; t < tokens; t++) _mm512_storeu_ps(out + (first + t) * 16, total[t]);
}

/* One token has several sums a row, or each addition would wait for the one before. */
TARGET_AVX512_BF16 INLINE void bf16_pass(const uint8_t *strip, const Tokens *x, int first,
                                         float *out, const int tokens, const int sums) {
    __m512 sum[8][4];
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int s = 0; s < sums; s++) sum[t][s] = _mm512_setzero_ps();
    const int64_t stride = x->token_stride, step = x->chunk_stride, chunks = x->chunks;
    const uint8_t *token = x->x + first * stride;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        UNROLL for (int pair = 0; pair < 16; pair++) {
            _mm_prefetch(strip + pair * 64 + PREFETCH_BYTES, _MM_HINT_T0);
            __m512bh weights = (__m512bh)_mm512_loadu_si512(strip + pair * 64);
            UNROLL for (int t = 0; t < tokens; t++) sum[t][pair % sums] = _mm512_dpbf16_ps(
                sum[t][pair % sums], weights,
                (__m512bh)four_of(token + t * stride, 4 * pair));
            IN_ORDER;
        }
        strip += BF16_CHUNK_BYTES;
        token += step;
    }
    UNROLL for (int t = 0; t < tokens; t++) {
        UNROLL for (int s = 1; s < sums; s++) sum[t][0] = _mm512_add_ps(sum[t][0], sum[t][s]);
        _mm512_storeu_ps(out + (first + t) * 16, sum[t][0]);
    }
}

TARGET_AVX512_BF16 INLINE void bf12_pass(const uint8_t *strip, const Tokens *x, int first,
                                         float *out, const int tokens, const int sums) {
    const __m512i high = high_bytes(strip);
    const int64_t stride = x->token_stride, step = x->chunk_stride, chunks = x->chunks;
    const uint8_t *token = x->x + first * stride;
    __m512 sum[8][4];
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int s = 0; s < sums; s++) sum[t][s] = _mm512_setzero_ps();
    strip += BF12_HEAD_BYTES;
    for (int64_t chunk = 0; chunk < chunks; chunk++, token += step) {
        UNROLL for (int group = 0; group < GROUPS; group++, strip += GROUP_BYTES) {
            _mm_prefetch(strip + PREFETCH_BYTES / 2, _MM_HINT_T0);
            __m512i codes = _mm512_loadu_si512(strip);
            IN_ORDER;
            UNROLL for (int two = 0; two < 2; two++) {
                _mm_prefetch(strip + 64 + 64 * two + PREFETCH_BYTES / 2, _MM_HINT_T0);
                __m512i low = _mm512_loadu_si512(strip + 64 + 64 * two);
                __m512i lines[2];
                two_lines(low, codes, two, high, lines);
                UNROLL for (int line = 0; line < 2; line++) {
                    const int pair = 4 * group + 2 * two + line;
                    UNROLL for (int t = 0; t < tokens; t++) sum[t][pair % sums] =
                        _mm512_dpbf16_ps(sum[t][pair % sums], (__m512bh)lines[line],
                                         (__m512bh)four_of(token + t * stride, 4 * pair));
                }
                IN_ORDER;
            }
        }
    }
    UNROLL for (int t = 0; t < tokens; t++) {
        UNROLL for (int s = 1; s < sums; s++) sum[t][0] = _mm512_add_ps(sum[t][0], sum[t][s]);
        _mm512_storeu_ps(out + (first + t) * 16, sum[t][0]);
    }
}

TARGET_AVX512 static int64_t bf12_groups(const uint8_t *lines, int64_t groups, HighBytes chosen,
                                         uint8_t *to) {
    const __m512i top = _mm512_set1_epi8((char)chosen.top), low = _mm512_set1_epi16(255);
    const __m512i count = _mm512_set1_epi8((char)chosen.count), seven = _mm512_set1_epi8(7);
    for (int64_t group = 0; group < groups; group++, to += GROUP_BYTES) {
        __m512i codes[2];
        for (int two = 0; two < 2; two++, lines += 128) {
            __m512i a = _mm512_loadu_si512(lines), b = _mm512_loadu_si512(lines + 64);
            __m512i high = _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
            _mm512_storeu_si512(to + 64 + 64 * two,
                                _mm512_packus_epi16(_mm512_and_si512(a, low),
                                                    _mm512_and_si512(b, low)));
            __m512i magnitude = _mm512_and_si512(high, _mm512_set1_epi8(127));
            __m512i below = _mm512_sub_epi8(top, magnitude);
            __mmask64 has_code = _mm512_cmplt_epu8_mask(below, count);
            if (chosen.count == 7) {
                __mmask64 is_zero = _mm512_testn_epi8_mask(magnitude, magnitude);
                below = _mm512_mask_mov_epi8(below, is_zero, seven);
                has_code |= is_zero;
            }
            if (~has_code) return group;
            __m512i sign = _mm512_and_si512(_mm512_srli_epi16(high, 4), _mm512_set1_epi8(8));
            codes[two] = _mm512_or_si512(sign, below);
        }
        _mm512_storeu_si512(to, _mm512_or_si512(codes[0], _mm512_slli_epi16(codes[1], 4)));
    }
    return groups;
}

TARGET_AVX512 static void bf16_groups(const uint8_t *from, int64_t groups, const uint8_t *high,
                                      uint8_t *lines) {
    const __m512i table = high_bytes(high);
    for (; groups; groups--, from += GROUP_BYTES)
        for (int two = 0; two < 2; two++, lines += 128) {
            __m512i both[2];
            two_lines(_mm512_loadu_si512(from + 64 + 64 * two), _mm512_loadu_si512(from), two,
                      table, both);
            _mm512_storeu_si512(lines, both[0]);
            _mm512_storeu_si512(lines + 64, both[1]);
        }
}

TARGET_AVX512 INLINE __m512 sixteen_floats(const void *x, int dtype, int64_t first, int64_t cols) {
    __mmask16 mask = (__mmask16)(cols - first >= 16 ? 0xffff : (1 << (cols - first)) - 1);
    if (first >= cols) return _mm512_setzero_ps();
    if (dtype == F32) return _mm512_maskz_loadu_ps(mask, (const float *)x + first);
    __m256i halves = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)x + first);
    if (dtype == F16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

TARGET_AVX512 INLINE __m512 plus_sixteen(__m512 values, const void *x, int dtype, int64_t first) {
    return _mm512_add_ps(values, sixteen_floats(x, dtype, first, first + 16));
}

TARGET_AVX512 void avx512_store(const Linear *work, int64_t row, int64_t first, int64_t tokens,
                                const float *out) {
    for (int64_t t = first; t < first + tokens; t++, out += 16) {
        __m512 values = _mm512_loadu_ps(out);
        if (work->bias) values = plus_sixteen(values, work->bias, work->bias_dtype, row);
        if (work->residual)
            values = plus_sixteen(values, work->residual + t * work->residual_stride,
                                  work->residual_dtype, row);
        uint8_t *to = work->y + t * work->y_stride + row * dtype_bytes(work->y_dtype);
        if (work->y_dtype == F32) {
            _mm512_storeu_ps(to, values);
        } else if (work->y_dtype == F16) {
            _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph(values, 0));
        } else { /* as to_bf16() does */
            __m512i bits = _mm512_castps_si512(values), upper = _mm512_srli_epi32(bits, 16);
            __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
            __m512i up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, up), 16);
            rounded = _mm512_mask_or_epi32(rounded, _mm512_cmpunord_ps_mask(values, values),
                                           upper, _mm512_set1_epi32(0x40));
            _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(rounded));
        }
    }
}

/* As KERNEL(quantize_token) does, a vector at a time. */
TARGET_AVX512 static void quantize_token(const void *x, int dtype, int64_t cols, int as_float,
                                         uint8_t *to, int64_t chunk_stride, float *scale,
                                         float *shift, int32_t *offset, int tokens) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    float all = 0.0f;
    (void)as_float;
    for (int64_t first = 0; first < cols; first += 64, to += chunk_stride) {
        __m512 values[4];
        __m512i largest = _mm512_setzero_si512(), whole[4];
        UNROLL for (int i = 0; i < 4; i++) {
            values[i] = sixteen_floats(x, dtype, first + 16 * i, cols);
            __m512i bits = _mm512_and_si512(_mm512_castps_si512(values[i]), magnitude);
            largest = _mm512_max_epi32(largest, bits);
        }
        float most = float_of((uint32_t)_mm512_reduce_max_epi32(largest));
        __m512 inverse = _mm512_set1_ps(most > 0.0f ? 127.0f / most : 0.0f);
        UNROLL for (int i = 0; i < 4; i++) {
            whole[i] = _mm512_cvtps_epi32(_mm512_mul_ps(values[i], inverse));
            _mm_storeu_si128((__m128i *)(to + 16 * i), _mm512_cvtepi32_epi8(whole[i]));
        }
        int32_t low = _mm512_reduce_add_epi32(_mm512_add_epi32(whole[0], whole[1]));
        int32_t high = _mm512_reduce_add_epi32(_mm512_add_epi32(whole[2], whole[3]));
        *scale = most / 127.0f;
        all += *scale * (float)(low + high);
        scale += tokens;
        offset[0] = -8 * low;
        offset[tokens] = -8 * high;
        offset += 2 * tokens;
    }
    *shift = -128.0f * all;
}

/* Up to eight tokens in a pass; more are halved, so that no pass has few. */
#define IN_EVEN_PASSES(target, name, ...)                                         \
    target static void name(const uint8_t *strip, const Tokens *x, float *out) {  \
        int passes = x->tokens > 8 ? 2 : 1, first = 0;                            \
        for (; passes; passes--) {                                                \
            int tokens = (x->tokens - first) / passes;                            \
            switch (tokens) { __VA_ARGS__ }                                       \
            first += tokens;                                                      \
        }                                                                         \
    }
#define CASE(count, call) \
    case count: call; break;

IN_EVEN_PASSES(TARGET_AVX512, int8_dot, CASE(1, int8_pass(strip, x, first, out, 1))
    CASE(2, int8_pass(strip, x, first, out, 2)) CASE(3, int8_pass(strip, x, first, out, 3))
    CASE(4, int8_pass(strip, x, first, out, 4)) CASE(5, int8_pass(strip, x, first, out, 5))
    CASE(6, int8_pass(strip, x, first, out, 6)) CASE(7, int8_pass(strip, x, first, out, 7))
    CASE(8, int8_pass(strip, x, first, out, 8)))

IN_EVEN_PASSES(TARGET_AVX512, int4_dot, CASE(1, int4_pass(strip, x, first, out, 1))
    CASE(2, int4_pass(strip, x, first, out, 2)) CASE(3, int4_pass(strip, x, first, out, 3))
    CASE(4, int4_pass(strip, x, first, out, 4)) CASE(5, int4_pass(strip, x, first, out, 5))
    CASE(6, int4_pass(strip, x, first, out, 6)) CASE(7, int4_pass(strip, x, first, out, 7))
    CASE(8, int4_pass(strip, x, first, out, 8)))

IN_EVEN_PASSES(TARGET_AVX512_BF16, bf16_dot, CASE(1, bf16_pass(strip, x, first, out, 1, 4))
    CASE(2, bf16_pass(strip, x, first, out, 2, 4)) CASE(3, bf16_pass(strip, x, first, out, 3, 2))
    CASE(4, bf16_pass(strip, x, first, out, 4, 2)) CASE(5, bf16_pass(strip, x, first, out, 5, 2))
    CASE(6, bf16_pass(strip, x, first, out, 6, 2)) CASE(7, bf16_pass(strip, x, first, out, 7, 2))
    CASE(8, bf16_pass(strip, x, first, out, 8, 2)))

IN_EVEN_PASSES(TARGET_AVX512_BF16, bf12_sums, CASE(1, bf12_pass(strip, x, first, out, 1, 4))
    CASE(2, bf12_pass(strip, x, first, out, 2, 4)) CASE(3, bf12_pass(strip, x, first, out, 3, 2))
    CASE(4, bf12_pass(strip, x, first, out, 4, 2)) CASE(5, bf12_pass(strip, x, first, out, 5, 2))
    CASE(6, bf12_pass(strip, x, first, out, 6, 2)) CASE(7, bf12_pass(strip, x, first, out, 7, 2))
    CASE(8, bf12_pass(strip, x, first, out, 8, 2)))

static void bf12_dot(const uint8_t *strip, const Tokens *x, float *out) {
    bf12_sums(strip, x, out);
    add_listed(strip, x, out);
}

const Preparation avx512_preparation = {avx512_convert_token, quantize_token,
                                        avx512_quantize_strip, bf12_groups, bf16_groups};

const Kernels avx512_kernels = {
    .prepare = &avx512_preparation,
    .bf16_as_float = 1,
    .store = avx512_store,
    .dot = {avx512_bf16_dot, int8_dot, int4_dot},
};

const Kernels avx512_bf16_kernels = {
    .prepare = &avx512_preparation,
    .store = avx512_store,
    .dot = {bf16_dot, int8_dot, int4_dot, bf12_dot},
};
#endif

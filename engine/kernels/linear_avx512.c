/* Kernels for AVX-512: integers by VNNI, bf16 by its own instruction or as floats. */
#include "native.h"
#if defined(HAVE_X86)
#include <immintrin.h>

#include "linear_bf12.h"

#define LANES 16
#define TARGET TARGET_AVX512
#define KERNEL(name) avx512_##name
#include "linear_lanes.h"

/* How far ahead integers are asked for: into the first-level cache, and before into the second. */
enum { NEAR_BYTES = 2048, FAR_BYTES = 6144 };

TARGET_AVX512 INLINE __m512i four_of(const uint8_t *token, int64_t offset) {
    int32_t four;
    memcpy(&four, token + offset, 4);
    return _mm512_set1_epi32(four);
}

/* One strip, or two side by side: the memory gives two streams more than one. */
TARGET_AVX512 INLINE void int8_pass(const uint8_t *const strips[], const int count,
                                    const Tokens *x, int first, float *const out[],
                                    const int tokens) {
    __m512 total[2][8];
    const uint8_t *weights[2];
    UNROLL for (int s = 0; s < count; s++) {
        weights[s] = strips[s] + INT8_HEAD_BYTES;
        UNROLL for (int t = 0; t < tokens; t++) total[s][t] = _mm512_setzero_ps();
    }
    const int64_t stride = x->token_stride, step = x->chunk_stride, chunks = x->chunks;
    const uint8_t *token = x->x + first * stride;
    const float *scale = x->scale + first;
    const int64_t end = bytes_of_chunks(FORMAT_INT8, chunks), jump = (count - 1) * end;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t offset = chunk * INT8_CHUNK_BYTES;
        const int64_t near = ahead_of(offset, NEAR_BYTES, end, jump);
        const int64_t far = ahead_of(offset, FAR_BYTES, end, jump);
        __m512i sum[2][8];
        UNROLL for (int s = 0; s < count; s++)
            UNROLL for (int t = 0; t < tokens; t++) sum[s][t] = _mm512_setzero_si512();
        UNROLL for (int quad = 0; quad < 16; quad++) {
            UNROLL for (int s = 0; s < count; s++) {
                const uint8_t *line = weights[s] + quad * 64;
                ask_twice(line, near, far);
                __m512i four = _mm512_loadu_si512(line);
                UNROLL for (int t = 0; t < tokens; t++) sum[s][t] = _mm512_dpbusd_epi32(
                    sum[s][t], four, four_of(token + t * stride, 4 * quad));
                IN_ORDER;
            }
        }
        UNROLL for (int s = 0; s < count; s++) {
            UNROLL for (int t = 0; t < tokens; t++) total[s][t] =
                _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[s][t]), _mm512_set1_ps(scale[t]),
                                total[s][t]);
            weights[s] += INT8_CHUNK_BYTES;
        }
        token += step;
        scale += x->tokens;
    }
    UNROLL for (int s = 0; s < count; s++)
        UNROLL for (int t = 0; t < tokens; t++) _mm512_storeu_ps(
            out[s] + (first + t) * 16,
            _mm512_mul_ps(_mm512_add_ps(total[s][t], _mm512_set1_ps(x->shift[first + t])),
                          _mm512_loadu_ps(strips[s])));
}

TARGET_AVX512 INLINE void int4_pass(const uint8_t *const strips[], const int count,
                                    const Tokens *x, int first, float *const out[],
                                    const int tokens) {
    const __m512i low = _mm512_set1_epi8(15), upper = _mm512_set1_epi32((int)0xffff0000u);
    __m512 total[2][8];
    const uint8_t *strip[2];
    UNROLL for (int s = 0; s < count; s++) {
        strip[s] = strips[s];
        UNROLL for (int t = 0; t < tokens; t++) total[s][t] = _mm512_setzero_ps();
    }
    const int64_t stride = x->token_stride, step = x->chunk_stride, chunks = x->chunks;
    const uint8_t *token = x->x + first * stride;
    const float *scale = x->scale + first;
    const int32_t *offset = x->offset + first;
    const int64_t end = bytes_of_chunks(FORMAT_INT4, chunks), jump = (count - 1) * end;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t near = ahead_of(chunk * INT4_CHUNK_BYTES, NEAR_BYTES, end, jump);
        const int64_t far = ahead_of(chunk * INT4_CHUNK_BYTES, FAR_BYTES, end, jump);
        UNROLL for (int s = 0; s < count; s++) {
            ask_twice(strip[s], near, far);
            __m512i scales = _mm512_loadu_si512(strip[s]);
            UNROLL for (int half = 0; half < 2; half++) {
                __m512i sum[8];
                UNROLL for (int t = 0; t < tokens; t++)
                    sum[t] = _mm512_set1_epi32(offset[half * x->tokens + t]);
                UNROLL for (int octet = 4 * half; octet < 4 * half + 4; octet++) {
                    const uint8_t *line = strip[s] + INT4_HEAD_BYTES + octet * 64;
                    ask_twice(line, near, far);
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
                __m512 row_scale =
                    _mm512_castsi512_ps(half ? _mm512_and_si512(scales, upper)
                                             : _mm512_slli_epi32(scales, 16));
                UNROLL for (int t = 0; t < tokens; t++) total[s][t] = _mm512_fmadd_ps(
                    _mm512_cvtepi32_ps(sum[t]),
                    _mm512_mul_ps(row_scale, _mm512_set1_ps(scale[t])), total[s][t]);
            }
            strip[s] += INT4_CHUNK_BYTES;
        }
        token += step;
        scale += x->tokens;
        offset += 2 * x->tokens;
    }
    UNROLL for (int s = 0; s < count; s++)
        UNROLL for (int t = 0; t < tokens; t++)
            _mm512_storeu_ps(out[s] + (first + t) * 16, total[s][t]);
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

#define INTEGER(dot, two, pass)                                                                  \
    IN_EVEN_PASSES(TARGET_AVX512, dot, CASE(1, pass(&strip, 1, x, first, &out, 1))               \
        CASE(2, pass(&strip, 1, x, first, &out, 2)) CASE(3, pass(&strip, 1, x, first, &out, 3))  \
        CASE(4, pass(&strip, 1, x, first, &out, 4)) CASE(5, pass(&strip, 1, x, first, &out, 5))  \
        CASE(6, pass(&strip, 1, x, first, &out, 6)) CASE(7, pass(&strip, 1, x, first, &out, 7))  \
        CASE(8, pass(&strip, 1, x, first, &out, 8)))                                             \
    TARGET_AVX512 static void two(const uint8_t *const strips[2], const Tokens *x,               \
                                  float *const out[2]) {                                         \
        switch (x->tokens) {                                                                     \
            CASE(1, pass(strips, 2, x, 0, out, 1)) CASE(2, pass(strips, 2, x, 0, out, 2))        \
            CASE(3, pass(strips, 2, x, 0, out, 3)) CASE(4, pass(strips, 2, x, 0, out, 4))        \
            CASE(5, pass(strips, 2, x, 0, out, 5)) CASE(6, pass(strips, 2, x, 0, out, 6))        \
            CASE(7, pass(strips, 2, x, 0, out, 7)) CASE(8, pass(strips, 2, x, 0, out, 8))        \
            default:                                                                             \
                dot(strips[0], x, out[0]);                                                       \
                dot(strips[1], x, out[1]);                                                       \
        }                                                                                        \
    }

INTEGER(int8_dot, int8_two, int8_pass)

INTEGER(int4_dot, int4_two, int4_pass)

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

const Kernels avx512_kernels = {
    .prepare = &avx512_preparation,
    .bf16_as_float = 1,
    .store = avx512_store,
    .dot = {avx512_bf16_dot, int8_dot, int4_dot},
    .two = {NULL, int8_two, int4_two},
};

const Kernels avx512_bf16_kernels = {
    .prepare = &avx512_preparation,
    .store = avx512_store,
    .dot = {bf16_dot, int8_dot, int4_dot, bf12_dot},
    .two = {NULL, int8_two, int4_two},
};
#endif

/* Round the sums, for AVX-512: tokens and weights as the kernels want them, and results. */
#include "native.h"
#if defined(HAVE_X86)
#include <immintrin.h>

#include "linear_bf12.h"

#define LANES 16
#define TARGET TARGET_AVX512
#define KERNEL(name) avx512_##name
#include "linear_lanes.h"

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

const Preparation avx512_preparation = {avx512_convert_token, quantize_token,
                                        avx512_quantize_strip, bf12_groups, bf16_groups};
#endif

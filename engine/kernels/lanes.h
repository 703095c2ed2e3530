/* A vector of floats for one instruction set: included, not compiled, with LANES, TARGET and
 * KERNEL as for linear_lanes.h, and one of LANES_AVX512, LANES_AVX2, LANES_NEON or none.
 *
 * Arithmetic is the compiler's vector extension; here is only what has no operator: conversions,
 * the exponential and its kin, sums across lanes. Memory holds float32, bfloat16, float16 or whole
 * numbers of 8 bits, which are only read; numbers in registers are float32. Where a function takes
 * a `dtype`, it is a constant after inlining.
 */
#include "native.h"

#include <stddef.h>

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

#define UNROLL _Pragma("GCC unroll 16")
#define LANE_FUNCTION TARGET __attribute__((unused)) INLINE

LANE_FUNCTION Floats splat(float x) { return x - (Floats){0}; }

/* Lanes of `where` are 0 or -1. */
LANE_FUNCTION Floats choose(Ints where, Floats yes, Floats no) {
    return (Floats)(((Ints)yes & where) | ((Ints)no & ~where));
}

/* Not-a-number stays not-a-number. */
LANE_FUNCTION Floats at_least(Floats x, float low) {
    return choose(x < splat(low), splat(low), x);
}

LANE_FUNCTION Floats at_most(Floats x, float high) {
    return choose(x > splat(high), splat(high), x);
}

/* ---- numbers in memory; to the nearest, ties to even ---- */

LANE_FUNCTION Floats from_halves(Halves h) {
#if defined(LANES_AVX512)
    return (Floats)_mm512_cvtph_ps((__m256i)h);
#elif defined(LANES_AVX2)
    return (Floats)_mm256_cvtph_ps((__m128i)h);
#elif defined(LANES_NEON)
    return (Floats)vcvt_f32_f16((float16x4_t)h);
#else
    Words bits = __builtin_convertvector(h, Words);
    Words magnitude = (bits & 0x7fff) << 13;
    Words finite = (Words)((Floats)magnitude * splat(0x1p112f));
    Words beyond = (Words)((Ints)magnitude >= (0x7c00 << 13)) & 0x7f800000u;
    return (Floats)(finite | beyond | (bits & 0x8000) << 16);
#endif
}

LANE_FUNCTION Halves to_halves(Floats x) {
#if defined(LANES_AVX512)
    return (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(LANES_AVX2)
    return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(LANES_NEON)
    return (Halves)vcvt_f16_f32((float32x4_t)x);
#else
    Halves h;
    for (int i = 0; i < LANES; i++) h[i] = to_f16(x[i]);
    return h;
#endif
}

LANE_FUNCTION Floats rounded_to_bfloats(Floats x) {
    Words bits = (Words)x;
    Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    return choose(x == x, (Floats)rounded, (Floats)(bits | 0x400000));
}

LANE_FUNCTION Halves to_bfloats(Floats x) {
    Words bits = (Words)rounded_to_bfloats(x) >> 16;
#if defined(LANES_AVX512)
    return (Halves)_mm512_cvtepi32_epi16((__m512i)bits);
#else
    return __builtin_convertvector(bits, Halves);
#endif
}

LANE_FUNCTION Floats from_bfloats(Halves h) {
#if defined(LANES_AVX512)
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#elif defined(LANES_AVX2)
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
    return (Floats)(__builtin_convertvector(h, Words) << 16);
#endif
}

/* So many whole numbers of 8 bits. */
LANE_FUNCTION Floats from_bytes(const void *from) {
#if defined(LANES_AVX512)
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from)));
#elif defined(LANES_AVX2)
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from)));
#elif defined(LANES_NEON)
    uint32_t four;
    memcpy(&four, from, sizeof four);
    return (Floats)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four)))));
#else
    Bytes x;
    memcpy(&x, from, sizeof x);
    return __builtin_convertvector(x, Floats);
#endif
}

/* One vector from element `at` on. */
LANE_FUNCTION Floats load(const void *from, int64_t at, int dtype) {
    Floats x;
    Halves h;
    if (dtype == I8) return from_bytes((const int8_t *)from + at);
    if (dtype == F32) {
        memcpy(&x, (const float *)from + at, sizeof x);
        return x;
    }
    memcpy(&h, (const uint16_t *)from + at, sizeof h);
    return dtype == BF16 ? from_bfloats(h) : from_halves(h);
}

LANE_FUNCTION void store(void *to, int64_t at, Floats x, int dtype) {
    if (dtype == F32) {
        memcpy((float *)to + at, &x, sizeof x);
        return;
    }
    Halves h = dtype == BF16 ? to_bfloats(x) : to_halves(x);
    memcpy((uint16_t *)to + at, &h, sizeof h);
}

/* The same for `count` < LANES elements; a lane without one is 0. */
LANE_FUNCTION Floats load_part(const void *from, int64_t at, int64_t count, int dtype) {
    uint32_t room[LANES] = {0};
    memcpy(room, (const char *)from + at * dtype_bytes(dtype), count * dtype_bytes(dtype));
    return load(room, 0, dtype);
}

LANE_FUNCTION void store_part(void *to, int64_t at, int64_t count, Floats x, int dtype) {
    uint32_t room[LANES];
    store(room, 0, x, dtype);
    memcpy((char *)to + at * dtype_bytes(dtype), room, count * dtype_bytes(dtype));
}

/* `count` elements from `at` on, where there may be fewer than a vector has lanes. */
LANE_FUNCTION Floats load_up_to(const void *from, int64_t at, int64_t count, int dtype) {
    return count >= LANES ? load(from, at, dtype) : load_part(from, at, count, dtype);
}

LANE_FUNCTION void store_up_to(void *to, int64_t at, int64_t count, Floats x, int dtype) {
    if (count >= LANES)
        store(to, at, x, dtype);
    else
        store_part(to, at, count, x, dtype);
}

/* What `x` is after it was stored. */
LANE_FUNCTION Floats rounded_to(Floats x, int dtype) {
    if (dtype == F32) return x;
    return dtype == BF16 ? rounded_to_bfloats(x) : from_halves(to_halves(x));
}

/* ---- across lanes ---- */

LANE_FUNCTION float sum_lanes(Floats x) {
#if defined(LANES_AVX512)
    return _mm512_reduce_add_ps((__m512)x);
#elif defined(LANES_NEON)
    return vaddvq_f32((float32x4_t)x);
#else
    float sum = 0;
    UNROLL for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
#endif
}

LANE_FUNCTION float largest_lane(Floats x) { /* none of them is not-a-number */
#if defined(LANES_AVX512)
    return _mm512_reduce_max_ps((__m512)x);
#elif defined(LANES_NEON)
    return vmaxnmvq_f32((float32x4_t)x);
#else
    float largest = -__builtin_inff();
    UNROLL for (int i = 0; i < LANES; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
#endif
}

/* Lane i of the result is the sum of x[i]. */
LANE_FUNCTION Floats sum_each(const Floats *x) {
#if defined(LANES_AVX512)
    __m512 a[8], b[4], c[2];
    UNROLL for (int i = 0; i < 8; i++) {
        __m512 even = (__m512)x[2 * i], odd = (__m512)x[2 * i + 1];
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(even, odd), _mm512_unpackhi_ps(even, odd));
    }
    UNROLL for (int i = 0; i < 4; i++) {
        __m512d even = _mm512_castps_pd(a[2 * i]), odd = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
    }
    UNROLL for (int i = 0; i < 2; i++)
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    return (Floats)_mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88),
                                 _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
#elif defined(LANES_AVX2)
    __m256 a[4];
    UNROLL for (int i = 0; i < 4; i++)
        a[i] = _mm256_hadd_ps((__m256)x[2 * i], (__m256)x[2 * i + 1]);
    __m256 low = _mm256_hadd_ps(a[0], a[1]), high = _mm256_hadd_ps(a[2], a[3]);
    return (Floats)_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                                 _mm256_permute2f128_ps(low, high, 0x31));
#elif defined(LANES_NEON)
    return (Floats)vpaddq_f32(vpaddq_f32((float32x4_t)x[0], (float32x4_t)x[1]),
                              vpaddq_f32((float32x4_t)x[2], (float32x4_t)x[3]));
#else
    Floats sums = {0};
    UNROLL for (int i = 0; i < LANES; i++) sums[i] = sum_lanes(x[i]);
    return sums;
#endif
}

/* ---- functions ---- */

/* e**x; 0 below -87, e**88 above 88. Cephes' expf: 2 units in the last place. */
LANE_FUNCTION Floats exponential(Floats x) {
    Floats y = at_most(at_least(x, -87.0f), 88.0f);
    const Floats magic = splat(12582912.0f); /* 1.5 * 2**23: adding it rounds to an integer */
    Floats shifted = y * 1.44269504088896341f + magic, whole = shifted - magic;
    Floats rest = y - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats poly = splat(1.9875691500e-4f);
    poly = poly * rest + 1.3981999507e-3f;
    poly = poly * rest + 8.3334519073e-3f;
    poly = poly * rest + 4.1665795894e-2f;
    poly = poly * rest + 1.6666665459e-1f;
    poly = poly * rest + 5.0000001201e-1f;
    poly = poly * rest * rest + rest + 1.0f;
    Floats power = (Floats)(((Ints)shifted - (Ints)magic + 127) << 23);
    return choose(x < splat(-87.0f), (Floats){0}, poly * power);
}

/* Cephes' tanhf. */
LANE_FUNCTION Floats hyperbolic_tangent(Floats x) {
    Floats magnitude = (Floats)((Words)x & 0x7fffffffu), square = x * x;
    Floats poly = splat(-5.70498872745e-3f);
    poly = poly * square + 2.06390887954e-2f;
    poly = poly * square - 5.37397155531e-2f;
    poly = poly * square + 1.33314422036e-1f;
    poly = poly * square - 3.33332819422e-1f;
    Floats small = poly * square * x + x;
    Floats large = 1.0f - 2.0f / (exponential(magnitude + magnitude) + 1.0f);
    large = (Floats)((Words)large | ((Words)x & 0x80000000u));
    return choose(magnitude < splat(0.625f), small, large);
}

/* A quotient of polynomials, as in Eigen: 4 units in the last place. */
LANE_FUNCTION Floats error_function(Floats x) {
    Floats y = at_most(at_least(x, -4.0f), 4.0f), square = y * y;
    Floats above = splat(-2.72614225801306e-10f);
    above = above * square + 2.77068142495902e-08f;
    above = above * square - 2.10102402082508e-06f;
    above = above * square - 5.69250639462346e-05f;
    above = above * square - 7.34990630326855e-04f;
    above = above * square - 2.95459980854025e-03f;
    above = above * square - 1.60960333262415e-02f;
    Floats below = splat(-1.45660718464996e-05f);
    below = below * square - 2.13374055278905e-04f;
    below = below * square - 1.68282697438203e-03f;
    below = below * square - 7.37332916720468e-03f;
    below = below * square - 1.42647390514189e-02f;
    return y * above / below;
}

/* Kernels for AMX: int8 and int4. */
#include "native.h"
#if defined(HAVE_X86)
#include <immintrin.h>

#include "linear_amx.h"

/* Fewer tokens than this are AVX-512's. */
enum { TILE_TOKENS_INT8 = 3, TILE_TOKENS_INT4 = 9 };

TARGET_AMX INLINE void ask_for_chunk(const uint8_t *chunk, int64_t near, int64_t far) {
    for (int line = 0; line < 16; line++) ask_twice(chunk + line * 64, near, far);
}

/* Integers have a scale for each chunk, so their sums leave the tiles after each: while the tiles
 * work on the next chunks, the vectors add up the sums of those before. */
typedef int32_t Sum[MAX_TOKENS][16];
typedef Sum Sums[4];

TARGET_AMX INLINE __m512 sum_of(const int32_t *sum) {
    return _mm512_cvtepi32_ps(_mm512_load_si512(sum));
}

TARGET_AMX INLINE void store_tiles(Sums sums) {
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
}

/* The sums of `chunks` chunks, each `apart` from the one before, whose scales begin at `scale`. */
TARGET_AMX INLINE void add_int8(float total[][16], Sum *sums, const float *scale, int chunks,
                                int tokens, int apart) {
    for (int t = 0; t < tokens; t++) {
        __m512 all = _mm512_load_ps(total[t]);
        for (int i = 0; i < chunks; i++)
            all = _mm512_fmadd_ps(sum_of(sums[i * apart][t]),
                                  _mm512_set1_ps(scale[i * tokens + t]), all);
        _mm512_store_ps(total[t], all);
    }
}

/* Four sums: of one strip's next chunks, or of two strips' with every load of tokens shared. */
TARGET_AMX INLINE void int8_sums(const uint8_t *const strips[], const int count, const Tokens *x,
                                 float *const out[]) {
    Sums sums __attribute__((aligned(64)));
    float total[2][MAX_TOKENS][16] __attribute__((aligned(64)));
    const int tokens = x->tokens, at_once = 4 / count;
    const uint8_t *weights[2], *token = x->x;
    const float *scale = x->scale;
    int64_t chunk = 0;
    for (int s = 0; s < count; s++) {
        weights[s] = strips[s] + INT8_HEAD_BYTES;
        for (int t = 0; t < tokens; t++)
            _mm512_store_ps(total[s][t], _mm512_set1_ps(x->shift[t]));
    }
#define TOKENS(a) _tile_loadd(a, token, x->token_stride); token += x->chunk_stride;
#define ONE(sum, s, a, b)                 \
    ask_for_chunk(weights[s], near, far); \
    _tile_zero(sum);                      \
    _tile_loadd(b, weights[s], 64);       \
    _tile_dpbsud(sum, a, b);              \
    weights[s] += INT8_CHUNK_BYTES;
    int64_t near = TILE_PREFETCH_BYTES, far = LATER_BYTES;
    const int64_t end = bytes_of_chunks(FORMAT_INT8, x->chunks), jump = (count - 1) * end;
    for (; chunk + at_once <= x->chunks; chunk += at_once) {
        const int64_t offset = chunk * INT8_CHUNK_BYTES;
        near = ahead_of(offset, TILE_PREFETCH_BYTES, end, jump);
        far = ahead_of(offset, LATER_BYTES, end, jump);
        if (count == 1) {
            TOKENS(4) ONE(0, 0, 4, 6) TOKENS(5) ONE(1, 0, 5, 7)
            TOKENS(4) ONE(2, 0, 4, 6) TOKENS(5) ONE(3, 0, 5, 7)
        } else {
            TOKENS(4) ONE(0, 0, 4, 6) ONE(1, 1, 4, 7)
            TOKENS(5) ONE(2, 0, 5, 6) ONE(3, 1, 5, 7)
        }
        if (chunk) {
            for (int s = 0; s < count; s++)
                add_int8(total[s], sums + s, scale, at_once, tokens, count);
            scale += at_once * tokens;
        }
        store_tiles(sums);
    }
    if (chunk) {
        for (int s = 0; s < count; s++)
            add_int8(total[s], sums + s, scale, at_once, tokens, count);
        scale += at_once * tokens;
    }
    for (; chunk < x->chunks; chunk++, scale += tokens) {
        TOKENS(4) ONE(0, 0, 4, 6)
        _tile_stored(0, sums[0], 64);
        if (count == 2) {
            ONE(1, 1, 4, 7)
            _tile_stored(1, sums[1], 64);
        }
        for (int s = 0; s < count; s++) add_int8(total[s], sums + s, scale, 1, tokens, count);
    }
#undef ONE
#undef TOKENS
    for (int s = 0; s < count; s++) {
        __m512 row_scale = _mm512_loadu_ps(strips[s]);
        for (int t = 0; t < tokens; t++)
            _mm512_storeu_ps(out[s] + t * 16,
                             _mm512_mul_ps(_mm512_load_ps(total[s][t]), row_scale));
    }
}

TARGET_AMX void amx_int8_dot(const uint8_t *strip, const Tokens *x, float *out) {
    if (x->tokens < TILE_TOKENS_INT8)
        avx512_bf16_kernels.dot[FORMAT_INT8](strip, x, out);
    else
        int8_sums(&strip, 1, x, &out);
}

TARGET_AMX void amx_int8_two(const uint8_t *const strips[2], const Tokens *x,
                             float *const out[2]) {
    if (x->tokens < TILE_TOKENS_INT8)
        avx512_bf16_kernels.two[FORMAT_INT8](strips, x, out);
    else
        int8_sums(strips, 2, x, out);
}

TARGET_AMX INLINE void halves_apart(const uint8_t *strip, uint8_t *to) {
    const __m512i low = _mm512_set1_epi8(15), zero = _mm512_set1_epi8(8);
    for (int octet = 0; octet < 8; octet++) {
        __m512i both = _mm512_loadu_si512(strip + INT4_HEAD_BYTES + octet * 64);
        __m512i even = _mm512_and_si512(both, low);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        _mm512_store_si512(to + octet * 128, _mm512_sub_epi8(even, zero));
        _mm512_store_si512(to + octet * 128 + 64, _mm512_sub_epi8(odd, zero));
    }
}

/* The sums of one or two chunks, two each, whose scales are in the chunks themselves. */
TARGET_AMX INLINE void add_int4(float total[][16], Sums sums, const uint8_t *strip,
                                const float *scale, int chunks, int tokens) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000u);
    __m512 row_scale[4];
    for (int i = 0; i < chunks; i++) {
        __m512i pairs = _mm512_loadu_si512(strip + i * INT4_CHUNK_BYTES);
        row_scale[2 * i] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
        row_scale[2 * i + 1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
    }
    for (int t = 0; t < tokens; t++) {
        __m512 all = _mm512_load_ps(total[t]);
        for (int i = 0; i < chunks; i++) {
            __m512 both = _mm512_mul_ps(sum_of(sums[2 * i][t]), row_scale[2 * i]);
            both = _mm512_fmadd_ps(sum_of(sums[2 * i + 1][t]), row_scale[2 * i + 1], both);
            all = _mm512_fmadd_ps(both, _mm512_set1_ps(scale[i * tokens + t]), all);
        }
        _mm512_store_ps(total[t], all);
    }
}

/* A tile cannot be loaded from what was just written without waiting for the write to reach the
 * cache: several chunks are made bytes first, then multiplied. */
enum { CHUNKS_AT_ONCE = 8 };

TARGET_AMX void amx_int4_dot(const uint8_t *strip, const Tokens *x, float *out) {
    if (x->tokens < TILE_TOKENS_INT4) {
        avx512_bf16_kernels.dot[FORMAT_INT4](strip, x, out);
        return;
    }
    uint8_t bytes[CHUNKS_AT_ONCE][1024] __attribute__((aligned(64)));
    Sums sums __attribute__((aligned(64)));
    float total[MAX_TOKENS][16] __attribute__((aligned(64)));
    const int tokens = x->tokens;
    memset(total, 0, tokens * sizeof *total);
    const uint8_t *token = x->x;
    const float *scale = x->scale;
#define ONE(sum, which, half, a, b)                                   \
    _tile_zero(sum);                                                  \
    _tile_loadd(b, bytes[chunk + which] + 512 * half, 64);            \
    _tile_loadd(a, token + which * x->chunk_stride + 32 * half, x->token_stride); \
    _tile_dpbssd(sum, a, b);
    for (int64_t left = x->chunks; left > 0; left -= CHUNKS_AT_ONCE) {
        int chunks = left < CHUNKS_AT_ONCE ? (int)left : CHUNKS_AT_ONCE;
        for (int chunk = 0; chunk < chunks; chunk++)
            halves_apart(strip + chunk * INT4_CHUNK_BYTES, bytes[chunk]);
        written(bytes);
        for (int chunk = 0; chunk < chunks; chunk += 2) {
            for (int line = 0; line < 18; line++)
                _mm_prefetch(strip + PREFETCH_BYTES + line * 64, _MM_HINT_T0);
            ONE(0, 0, 0, 4, 6) ONE(1, 0, 1, 5, 7)
            if (chunk + 1 < chunks) {
                ONE(2, 1, 0, 4, 6) ONE(3, 1, 1, 5, 7)
            }
            if (chunk) {
                add_int4(total, sums, strip - 2 * INT4_CHUNK_BYTES, scale, 2, tokens);
                scale += 2 * tokens;
            }
            store_tiles(sums);
            strip += 2 * INT4_CHUNK_BYTES;
            token += 2 * x->chunk_stride;
        }
        add_int4(total, sums, strip - 2 * INT4_CHUNK_BYTES, scale, 2 - chunks % 2, tokens);
        scale += 2 * tokens;
    }
#undef ONE
    memcpy(out, total, tokens * sizeof *total);
}

TARGET_AMX void amx_int4_two(const uint8_t *const strips[2], const Tokens *x,
                             float *const out[2]) {
    if (x->tokens < TILE_TOKENS_INT4) {
        avx512_bf16_kernels.two[FORMAT_INT4](strips, x, out);
        return;
    }
    amx_int4_dot(strips[0], x, out[0]);
    amx_int4_dot(strips[1], x, out[1]);
}
#endif

/* Kernels for AMX: a tile of up to 16 tokens times a chunk of a strip in one instruction.
 *
 * Few tokens stay with AVX-512, which reads as fast and needs no tiles.
 */
#include "native.h"
#if defined(HAVE_X86)
#include <immintrin.h>

#include "linear_bf12.h"
#include "tiles.h"

/* Fewer tokens than this are AVX-512's. */
enum { TILE_TOKENS_BF16 = 6, TILE_TOKENS_INT8 = 3, TILE_TOKENS_INT4 = 8 };
/* A tile is loaded at once, so its lines are asked for at once: from so near that the next chunks'
 * do not fill all buffers of the first-level cache. */
enum { TILE_PREFETCH_BYTES = 1024, LATER_BYTES = 3072 };
/* Tiles 0-3 are sums, 4 and 5 tokens, 6 and 7 weights. */
TARGET_AMX static void enter(int format, int tokens) {
    int deep = format == FORMAT_INT4 ? 8 : 16; /* int4 has a scale every 8 x 4 columns */
    TileShapes shapes = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        shapes.row_bytes[tile] = tile == 4 || tile == 5 ? 4 * deep : 64;
        shapes.rows[tile] = tile < 6 ? tokens : deep;
    }
    written(&shapes);
    _tile_loadconfig(&shapes);
}

TARGET_AMX static void leave(void) { _tile_release(); }

TARGET_AMX INLINE void prefetch(const uint8_t *from, int lines) {
    for (int line = 0; line < lines; line++)
        _mm_prefetch(from + line * 64, _MM_HINT_T0);
}

/* What is soon needed into the first-level cache, what is needed later into the second. */
TARGET_AMX INLINE void ask_twice(const uint8_t *line) {
    _mm_prefetch(line + TILE_PREFETCH_BYTES, _MM_HINT_T0);
    _mm_prefetch(line + LATER_BYTES, _MM_HINT_T1);
}

TARGET_AMX static void bf16_dot(const uint8_t *strip, const Tokens *x, float *out) {
    if (x->tokens < TILE_TOKENS_BF16) {
        avx512_bf16_kernels.dot[FORMAT_BF16](strip, x, out);
        return;
    }
    float sums[4][MAX_TOKENS][16] __attribute__((aligned(64)));
    const uint8_t *token = x->x;
    int64_t chunk = 0;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
#define ONE(sum, a, b)                                  \
    prefetch(strip + TILE_PREFETCH_BYTES, 16);          \
    _tile_loadd(b, strip, 64);                          \
    _tile_loadd(a, token, x->token_stride);             \
    _tile_dpbf16ps(sum, a, b);                          \
    strip += BF16_CHUNK_BYTES, token += x->chunk_stride;
    for (; chunk + 4 <= x->chunks; chunk += 4) {
        ONE(0, 4, 6) ONE(1, 5, 7) ONE(2, 4, 6) ONE(3, 5, 7)
    }
    for (; chunk < x->chunks; chunk++) {
        ONE(0, 4, 6)
    }
#undef ONE
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    for (int t = 0; t < x->tokens; t++)
        _mm512_storeu_ps(out + t * 16,
                         _mm512_add_ps(_mm512_add_ps(_mm512_load_ps(sums[0][t]),
                                                     _mm512_load_ps(sums[1][t])),
                                       _mm512_add_ps(_mm512_load_ps(sums[2][t]),
                                                     _mm512_load_ps(sums[3][t]))));
}

/* Two strips, two blocks of 16 tokens: each tile that is loaded is used twice. */
TARGET_AMX static void dot_2x2(const uint8_t *strips[2], const Tokens x[2], float *out) {
    const uint8_t *first = strips[0], *second = strips[1], *low = x[0].x, *high = x[1].x;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t chunk = 0; chunk < x[0].chunks; chunk++) {
        _tile_loadd(6, first, 64);
        _tile_loadd(4, low, 64);
        _tile_loadd(5, high, 64);
        _tile_loadd(7, second, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
        first += BF16_CHUNK_BYTES, second += BF16_CHUNK_BYTES;
        low += x[0].chunk_stride, high += x[1].chunk_stride;
    }
    _tile_stored(0, out, 64);
    _tile_stored(1, out + 256, 64);
    _tile_stored(2, out + 512, 64);
    _tile_stored(3, out + 768, 64);
}

/* Integers have a scale for each chunk, so their sums leave the tiles after each: while the tiles
 * work on the next chunks, the vectors add up the sums of those before. */
typedef int32_t Sums[4][MAX_TOKENS][16];

TARGET_AMX INLINE __m512 sum_of(const int32_t *sum) {
    return _mm512_cvtepi32_ps(_mm512_load_si512(sum));
}

TARGET_AMX INLINE void store_tiles(Sums sums) {
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
}

/* The sums of `chunks` (at most 4) chunks, whose scales begin at `scale`. */
TARGET_AMX INLINE void add_int8(float total[][16], Sums sums, const float *scale, int chunks,
                                int tokens) {
    for (int t = 0; t < tokens; t++) {
        __m512 all = _mm512_load_ps(total[t]);
        for (int i = 0; i < chunks; i++)
            all = _mm512_fmadd_ps(sum_of(sums[i][t]), _mm512_set1_ps(scale[i * tokens + t]), all);
        _mm512_store_ps(total[t], all);
    }
}

TARGET_AMX static void int8_dot(const uint8_t *strip, const Tokens *x, float *out) {
    if (x->tokens < TILE_TOKENS_INT8) {
        avx512_bf16_kernels.dot[FORMAT_INT8](strip, x, out);
        return;
    }
    Sums sums __attribute__((aligned(64)));
    float total[MAX_TOKENS][16] __attribute__((aligned(64)));
    const int tokens = x->tokens;
    const uint8_t *weights = strip + INT8_HEAD_BYTES, *token = x->x;
    const float *scale = x->scale;
    int64_t chunk = 0;
    for (int t = 0; t < tokens; t++) _mm512_store_ps(total[t], _mm512_set1_ps(x->shift[t]));
#define ONE(sum, a, b)                                     \
    prefetch(weights + PREFETCH_BYTES, 16);                \
    _tile_zero(sum);                                       \
    _tile_loadd(b, weights, 64);                           \
    _tile_loadd(a, token, x->token_stride);                \
    _tile_dpbsud(sum, a, b);                               \
    weights += INT8_CHUNK_BYTES, token += x->chunk_stride;
    for (; chunk + 4 <= x->chunks; chunk += 4) {
        ONE(0, 4, 6) ONE(1, 5, 7) ONE(2, 4, 6) ONE(3, 5, 7)
        if (chunk) {
            add_int8(total, sums, scale, 4, tokens);
            scale += 4 * tokens;
        }
        store_tiles(sums);
    }
    if (chunk) {
        add_int8(total, sums, scale, 4, tokens);
        scale += 4 * tokens;
    }
    for (; chunk < x->chunks; chunk++, scale += tokens) {
        ONE(0, 4, 6)
        _tile_stored(0, sums[0], 64);
        add_int8(total, sums, scale, 1, tokens);
    }
#undef ONE
    __m512 row_scale = _mm512_loadu_ps(strip);
    for (int t = 0; t < tokens; t++)
        _mm512_storeu_ps(out + t * 16, _mm512_mul_ps(_mm512_load_ps(total[t]), row_scale));
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

TARGET_AMX static void int4_dot(const uint8_t *strip, const Tokens *x, float *out) {
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
            prefetch(strip + PREFETCH_BYTES, 18);
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

/* A chunk of bf12 as a tile of bf16. */
TARGET_AMX INLINE void widen_chunk(const uint8_t *from, __m512i high, uint8_t *tile) {
    for (int group = 0; group < GROUPS; group++, from += GROUP_BYTES) {
        ask_twice(from);
        __m512i codes = _mm512_loadu_si512(from);
        IN_ORDER;
        for (int two = 0; two < 2; two++, tile += 128) {
            const uint8_t *line = from + 64 + 64 * two;
            ask_twice(line);
            __m512i lines[2];
            two_lines(_mm512_loadu_si512(line), codes, two, high, lines);
            _mm512_store_si512(tile, lines[0]);
            _mm512_store_si512(tile + 64, lines[1]);
            IN_ORDER;
        }
    }
}

/* Chunks become tiles so far ahead of the tile that is loaded. */
enum { TILES_AHEAD = 2, TILES_KEPT = 4 };

/* One strip, or two side by side: the memory gives two streams more than one. Each strip has one
 * sum, so that its result is the same alone and beside another. */
TARGET_AMX INLINE void bf12_sums(const uint8_t *const strips[], const int count, const Tokens *x,
                                 float *const out[]) {
    uint8_t tiles[TILES_KEPT][2][BF16_CHUNK_BYTES] __attribute__((aligned(64)));
    float sums[2][MAX_TOKENS][16] __attribute__((aligned(64)));
    const int64_t stride = x->token_stride, step = x->chunk_stride, chunks = x->chunks;
    const uint8_t *from[2], *token = x->x;
    __m512i high[2];
    for (int s = 0; s < count; s++) {
        high[s] = high_bytes(strips[s]);
        from[s] = strips[s] + BF12_HEAD_BYTES;
    }
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t chunk = -TILES_AHEAD; chunk < chunks; chunk++) {
        int64_t ahead = chunk + TILES_AHEAD;
        for (int s = 0; ahead < chunks && s < count; s++, from[s - 1] += BF12_CHUNK_BYTES)
            widen_chunk(from[s], high[s], tiles[ahead % TILES_KEPT][s]);
        if (chunk < 0) continue;
        written(tiles);
        _tile_loadd(4, token, stride);
        _tile_loadd(6, tiles[chunk % TILES_KEPT][0], 64);
        _tile_dpbf16ps(0, 4, 6);
        if (count == 2) {
            _tile_loadd(7, tiles[chunk % TILES_KEPT][1], 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        token += step;
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    for (int s = 0; s < count; s++) {
        memcpy(out[s], sums[s], x->tokens * sizeof *sums[s]);
        add_listed(strips[s], x, out[s]);
    }
}

TARGET_AMX static void bf12_dot(const uint8_t *strip, const Tokens *x, float *out) {
    bf12_sums(&strip, 1, x, &out);
}

TARGET_AMX static void bf12_two(const uint8_t *const strips[2], const Tokens *x,
                                float *const out[2]) {
    bf12_sums(strips, 2, x, out);
}

const Kernels amx_kernels = {
    .prepare = &avx512_preparation,
    .dot = {bf16_dot, int8_dot, int4_dot, bf12_dot},
    .dot_2x2 = dot_2x2,
    .bf12_two = bf12_two,
    .store = avx512_store,
    .enter = enter,
    .leave = leave,
};
#endif

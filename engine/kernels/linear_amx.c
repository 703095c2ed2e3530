/* Kernels for AMX: a tile of up to 16 tokens times a chunk of a strip in one instruction. Those for
 * integers are in a file of their own.
 *
 * Few tokens stay with AVX-512, which reads as fast and needs no tiles.
 */
#include "native.h"
#if defined(HAVE_X86)
#include <immintrin.h>

#include "linear_amx.h"
#include "linear_bf12.h"

/* Fewer tokens than this are AVX-512's. */
enum { TILE_TOKENS_BF16 = 6 };

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
    for (int line = 0; line < 16; line++)               \
        _mm_prefetch(strip + TILE_PREFETCH_BYTES + line * 64, _MM_HINT_T0); \
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

/* A chunk of bf12 as a tile of bf16. */
TARGET_AMX INLINE void widen_chunk(const uint8_t *from, __m512i high, uint8_t *tile,
                                   int64_t near, int64_t far) {
    for (int group = 0; group < GROUPS; group++, from += GROUP_BYTES) {
        ask_twice(from, near, far);
        __m512i codes = _mm512_loadu_si512(from);
        IN_ORDER;
        for (int two = 0; two < 2; two++, tile += 128) {
            const uint8_t *line = from + 64 + 64 * two;
            ask_twice(line, near, far);
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
    const int64_t end = chunks * BF12_CHUNK_BYTES;
    const int64_t jump = count * bytes_of_chunks(FORMAT_BF12, chunks) - end;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t chunk = -TILES_AHEAD; chunk < chunks; chunk++) {
        int64_t ahead = chunk + TILES_AHEAD;
        const int64_t near = ahead_of(ahead * BF12_CHUNK_BYTES, TILE_PREFETCH_BYTES, end, jump);
        const int64_t far = ahead_of(ahead * BF12_CHUNK_BYTES, LATER_BYTES, end, jump);
        for (int s = 0; ahead < chunks && s < count; s++, from[s - 1] += BF12_CHUNK_BYTES)
            widen_chunk(from[s], high[s], tiles[ahead % TILES_KEPT][s], near, far);
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
    .dot = {bf16_dot, amx_int8_dot, amx_int4_dot, bf12_dot},
    .dot_2x2 = dot_2x2,
    .two = {NULL, amx_int8_two, amx_int4_two, bf12_two},
    .store = avx512_store,
    .enter = enter,
    .leave = leave,
};
#endif

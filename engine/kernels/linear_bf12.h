/* bf12: bf16 weights in 12 bits each, exactly.
 *
 * The low byte of a weight stays. Of high bytes (sign, and all but the last bit of the exponent) a
 * strip has few: four bits say which of 16. The few weights with another one are listed behind the
 * rest, with their places; there the strip says the same low byte below the least of its high ones.
 *
 *   head   64 bytes: the 16 high bytes, then how many weights are listed (32 bits).
 *   chunk  of 32 columns, 768 bytes: four groups, each of four lines of bf16's layout (A to D):
 *          64 bytes of codes, low halves for A and B, high halves for C and D, then 64 low bytes of
 *          A and B, then those of C and D. A and B alternate by 8 weights, C and D too: so
 *          processors interleave bytes.
 *   list   room for two weights a chunk and eight more; whole lines of 64 bytes.
 */
#ifndef COMBOIO_LINEAR_BF12_H
#define COMBOIO_LINEAR_BF12_H

#include "linear.h"

enum { GROUP_BYTES = 192, GROUP_BF16_BYTES = 256, GROUPS = 4 };

typedef struct {
    uint32_t at; /* column * 16 + row */
    uint16_t bits;
    uint16_t unused;
} Listed;
_Static_assert(sizeof(Listed) == LISTED_BYTES, "what strip_bytes() reckons with");

typedef struct {
    uint8_t high[16]; /* by code: sign * 8 + how far below `top`, or 7 for zero */
    uint32_t listed;
} Bf12Head;

INLINE const Listed *list_of(const uint8_t *strip, int64_t chunks) {
    return (const Listed *)(strip + BF12_HEAD_BYTES + chunks * BF12_CHUNK_BYTES);
}

INLINE uint32_t num_listed(const uint8_t *strip, int64_t chunks) {
    uint32_t count = ((const Bf12Head *)strip)->listed;
    /* What a disk or a caller made of it must not lead elsewhere. */
    return count <= list_room(chunks) ? count : 0;
}

/* What the groups say in place of a listed weight. */
INLINE uint16_t said_instead(const uint8_t *strip, uint16_t bits) {
    return (uint16_t)(strip[(bits >> 15) * 8 + 7] << 8 | (bits & 0xff));
}

/* Adds what the list has to the sums of bf16 tokens. */
INLINE void add_listed(const uint8_t *strip, const Tokens *x, float *out) {
    const Listed *list = list_of(strip, x->chunks);
    for (uint32_t i = 0, count = num_listed(strip, x->chunks); i < count; i++) {
        int64_t column = list[i].at / STRIP_ROWS;
        if (column >= x->chunks * 32) continue;
        float less = from_bf16(list[i].bits) - from_bf16(said_instead(strip, list[i].bits));
        const uint8_t *value = x->x + column / 32 * x->chunk_stride + column % 32 * 2;
        for (int t = 0; t < x->tokens; t++) {
            uint16_t bits;
            memcpy(&bits, value + t * x->token_stride, 2);
            out[t * STRIP_ROWS + list[i].at % STRIP_ROWS] += less * from_bf16(bits);
        }
    }
}

#if defined(HAVE_X86)
#include <immintrin.h>

/* Two lines of bf16 from their low bytes and their codes, which are the low halves of `codes` or
 * the high ones; `high` has the 16 high bytes in each quarter. */
TARGET_AVX512 INLINE void two_lines(__m512i low, __m512i codes, const int high_halves,
                                    __m512i high, __m512i lines[2]) {
    __m512i code = _mm512_and_si512(high_halves ? _mm512_srli_epi16(codes, 4) : codes,
                                    _mm512_set1_epi8(15));
    __m512i said = _mm512_shuffle_epi8(high, code);
    lines[0] = _mm512_unpacklo_epi8(low, said);
    lines[1] = _mm512_unpackhi_epi8(low, said);
}

TARGET_AVX512 INLINE __m512i high_bytes(const uint8_t *strip) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)strip));
}
#endif

/* A strip from bf16's layout; 0 where more weights would be listed than there is room for. */
int bf12_strip(const uint8_t *lines, int64_t chunks, uint8_t *strip);
/* And back. */
void bf16_strip(const uint8_t *strip, int64_t chunks, uint8_t *lines);

#endif

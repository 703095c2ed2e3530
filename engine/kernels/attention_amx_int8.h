/* Attention on AMX over keys and values in 8 bits.
 *
 * Keys go into tiles as they lie. A query becomes whole numbers of 15 bits, of which a key is
 * multiplied with the upper and the lower 8 one after the other: products and sums are exact, and a
 * query's own rounding, 1/32512 of its largest number, is far below that of bfloat16. Values meet
 * weights, which have no common scale, so they become bfloat16 in the first-level cache, a tile at a
 * time. The scales of tokens are factors of scores and weights.
 */
#include "attention_amx.h"

/* Steps from 0 to a query's largest number. */
enum { QUERY_STEPS = 127 * 128 };

/* 16 numbers of a query, of which 4 columns lie side by side in a row of a tile. */
TARGET INLINE void put_columns(char *to, __m512i whole) {
    __m128i bytes = _mm512_cvtepi32_epi8(whole);
    int32_t words[4];
    memcpy(words, &bytes, sizeof words);
    for (int i = 0; i < 4; i++) memcpy(to + i * 4 * LANES, words + i, 4);
}

/* Queries as [KV head][part][key tile][upper, lower][4 columns][lane][4]. */
TARGET static void take_split_queries(const Room *room, const Attention *all, const Run *run) {
    const Site *site = all->site;
    const int64_t group = site->heads / site->kv_heads, size = site->key_size;
    for (int64_t row = 0; row < site->heads * run->num_tokens; row++) {
        int64_t head = row / room->rows * group + row % group, token = row % room->rows / group;
        const char *from = all->queries.base + (run->first_row + token) * all->queries.token +
                           head * all->queries.head;
        const Place place = place_of(room, row);
        __m512i most = _mm512_setzero_si512(); /* as bits: not-a-number is larger than any number */
        for (int64_t at = 0; at < size; at += LANES)
            most = _mm512_max_epi32(most, (__m512i)((Ints)load(from, at, BF16) & 0x7fffffff));
        const float largest = float_of((uint32_t)_mm512_reduce_max_epi32(most));
        /* What is no number makes every score none; a query of next to nothing makes them 0. */
        const int usable = largest > 1e-30f && largest < __builtin_inff();
        const __m512 by = _mm512_set1_ps(usable ? QUERY_STEPS / largest : 0.0f);
        room->query_scales[place.group * LANES + place.lane] = largest / QUERY_STEPS;
        char *to = room->queries + place.head_part * room->key_tiles * 2 * TILE_BYTES;
        to += 4 * place.lane;
        for (int64_t at = 0; at < size; at += LANES) {
            __m512 query = (__m512)load(from, at, BF16);
            __m512i whole = _mm512_setzero_si512();
            if (usable) whole = _mm512_cvtps_epi32(_mm512_mul_ps(query, by));
            __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(64)), 7);
            char *tile = to + at / room->key_columns * 2 * TILE_BYTES +
                         at % room->key_columns * LANES;
            put_columns(tile, upper);
            put_columns(tile + TILE_BYTES,
                        _mm512_sub_epi32(whole, _mm512_slli_epi32(upper, 7)));
        }
    }
}

TARGET static void all_split_scores(const Room *room, const Memory *memory, int64_t head,
                                    int64_t heads, int64_t part, Ahead *ahead, int lines) {
    for (int64_t t = 0; t < memory->count; t += BLOCK_TOKENS) {
        const char *keys = memory->keys + memory->slots[t] * memory->key_apart +
                           head * room->key_tiles * room->key_columns;
        const char *query =
            room->queries + (head * room->parts + part) * room->key_tiles * 2 * TILE_BYTES;
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t i = 0; i < heads * room->key_tiles; i++) {
            _tile_loadd(5, keys, memory->key_apart);
            ask(ahead, lines);
            _tile_loadd(3, query, 64);
            ask(ahead, lines);
            _tile_dpbssd(0, 5, 3);
            _tile_loadd(3, query + TILE_BYTES, 64);
            ask(ahead, lines);
            _tile_dpbssd(1, 5, 3);
            keys += room->key_columns, query += 2 * TILE_BYTES;
        }
        _tile_stored(0, room->scores + t * LANES, 64);
        _tile_stored(1, room->low_scores + t * LANES, 64);
    }
}

/* What each lane's head has at token t; `of` is that of the group's first head. */
TARGET INLINE Floats lane_scales(const Room *room, const float *of, int64_t heads, int64_t t) {
    __m512 by = _mm512_set1_ps(of[t]);
    __mmask16 lanes = (__mmask16)((1 << room->width) - 1);
    for (int64_t i = 1; i < heads; i++) {
        of += sizeof(TileScales) / sizeof(float);
        lanes = (__mmask16)(lanes << room->width);
        by = _mm512_mask_mov_ps(by, lanes, _mm512_set1_ps(of[t]));
    }
    return (Floats)by;
}

/* What both parts of the queries gave becomes scores. */
TARGET static void scale_scores(const Room *room, int64_t group, int64_t heads, int64_t count) {
    const Floats by = load(room->query_scales, group * LANES, F32);
    for (int64_t t = 0; t < count; t++) {
        __m512 upper = _mm512_cvtepi32_ps(_mm512_loadu_si512(room->scores + t * LANES));
        __m512 lower = _mm512_cvtepi32_ps(_mm512_loadu_si512(room->low_scores + t * LANES));
        const Floats score = (Floats)(upper * 128.0f + lower);
        store(room->scores, t * LANES, score * by * lane_scales(room, room->scales->keys, heads, t),
              F32);
    }
}

/* 16 tokens' 32 columns of values, `apart` bytes from one another, become bfloat16. */
TARGET INLINE void widen_piece(uint16_t *to, const char *from, int64_t apart) {
    UNROLL for (int64_t t = 0; t < BLOCK_TOKENS; t++)
        widen_32(to + t * TILE_COLUMNS, from + t * apart);
    written(to);
}

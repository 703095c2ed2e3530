/* Attention on AMX over keys and values in 8 bits.
 *
 * Keys go into tiles as they lie. A query becomes whole numbers of 15 bits, of which a key is
 * multiplied with the upper and the lower 8 one after the other: products and sums are exact, and a
 * query's own rounding, 1/32512 of its largest number, is far below that of bfloat16. Values meet
 * weights, which have no common scale, so they become bfloat16 in the first-level cache, a tile at
 * a time, in such order that a product adds up two tokens. The scales of tokens are factors of
 * scores and weights.
 */
#include "attention_amx.h"

/* Steps from 0 to a query's largest number. */
enum { QUERY_STEPS = 127 * 128 };
/* Tokens that a tile of values holds, two to a row. */
enum { HALF_TOKENS = TILE_TOKENS / 2, TILE_WORDS = TILE_BYTES / 4 };

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

/* 16 tokens' weights [token][lane], rounded in their upper halves, from the tile's token t on. Two
 * neighbours are a word; once there are 32 tokens, words [pair][lane] become [lane][pair]. */
TARGET INLINE void put_weights(const Room *room, const __m512i rounded[16], int64_t t,
                               int64_t count) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000u);
    uint32_t *to = room->weights + t / HALF_TOKENS * HALF_TOKENS / 2 * LANES;
    const int64_t at = t % HALF_TOKENS / 2;
    UNROLL for (int i = 0; i < 8; i++)
        _mm512_store_si512(to + (at + i) * LANES,
                           _mm512_or_si512(_mm512_srli_epi32(rounded[2 * i], 16),
                                           _mm512_and_si512(rounded[2 * i + 1], upper)));
    if (!at && t + BLOCK_TOKENS < count) return;
    __m512i pairs[16], turned[16];
    UNROLL for (int i = 0; i < 16; i++)
        pairs[i] = i < 8 || at ? _mm512_load_si512(to + i * LANES) : _mm512_setzero_si512();
    turn_round(pairs, turned);
    UNROLL for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * LANES, turned[i]);
}

/* Two tokens' 16 columns become bfloat16, side by side in a word. */
TARGET INLINE __m512i widen_pair(const char *one, const char *other) {
    __m512i lower = _mm512_srli_epi32((__m512i)from_bytes(one), 16);
    return _mm512_or_si512(lower, (__m512i)from_bytes(other));
}

/* Head `head`, the group's number `i`. */
TARGET static void add_widened_values(const Room *room, const Memory *memory, int64_t head,
                                      int64_t i, float *sums, Ahead *ahead, int lines) {
    const int64_t bytes = TILE_COLUMNS * room->value_tiles, apart = memory->value_apart;
    for (int64_t tile = 0; tile < room->value_tiles; tile++) {
        float *upper_sums = sums + room->width * LANES;
        _tile_loadd(6, sums, 64);
        _tile_loadd(7, upper_sums, 64);
        for (int64_t t = 0; t < memory->count; t += HALF_TOKENS) {
            const int64_t half = t / HALF_TOKENS, at = head * bytes + tile * TILE_COLUMNS;
            /* Where there is no second block the first one has its place, with weights of 0. */
            const int64_t other = t + BLOCK_TOKENS < memory->count ? t + BLOCK_TOKENS : t;
            const char *blocks[2] = {memory->values + memory->slots[t] * apart + at,
                                     memory->values + memory->slots[other] * apart + at};
            uint32_t *lower = room->pieces + half * 2 * TILE_WORDS, *upper = lower + TILE_WORDS;
            for (int block = 0; block < 2; block++) {
                const char *from = blocks[block];
                UNROLL for (int pair = 0; pair < 8; pair++, from += 2 * apart) {
                    const int64_t place = (8 * block + pair) * LANES;
                    _mm512_store_si512(lower + place, widen_pair(from, from + apart));
                    _mm512_store_si512(upper + place,
                                       widen_pair(from + LANES, from + LANES + apart));
                }
                ask(ahead, lines);
            }
            written(lower);
            _tile_loadd(4, room->weights + (half * HALF_TOKENS / 2 + i * room->width) * LANES, 64);
            ask(ahead, lines);
            _tile_loadd(2, lower, 64);
            _tile_dpbf16ps(6, 4, 2);
            ask(ahead, lines);
            _tile_loadd(2, upper, 64);
            _tile_dpbf16ps(7, 4, 2);
        }
        _tile_stored(6, sums, 64);
        _tile_stored(7, upper_sums, 64);
        sums += 2 * room->width * LANES;
    }
}

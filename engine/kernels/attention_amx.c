/* Attention for AMX, for queries of bfloat16 whose heads are a multiple of 32 long; what else there
 * is goes to AVX-512.
 *
 * Keys and values go into tiles as they lie in their blocks; of those in 8 bits,
 * attention_amx_int8.h. Keys times queries are scores by [token][row], so each lane of a vector is
 * a row of its own and no softmax goes across lanes; where a KV head has few rows, several heads
 * share the 16 lanes. The instruction adds up products of neighbours: of two columns of a key, as
 * it should, but of two columns of a value as well. So values meet the weights twice, once with a 0
 * behind every weight and once with a 0 before it: the even columns, and the odd ones.
 */
#include "native.h"
#if defined(HAVE_X86)
#include <immintrin.h>

#define LANES_AVX512
#define LANES 16
#define TARGET TARGET_AMX
#define KERNEL(name) amx_##name
#define DOT_BFLOATS 1
#include "lanes.h"

#include "attention_amx.h"
#include "attention_amx_int8.h"

extern const AttentionKernels avx512bf16_attention_kernels;

static int make_room(Room *room, const Site *site, int64_t num_tokens) {
    room->rows = site->heads / site->kv_heads * num_tokens;
    room->sharing = room->rows < LANES ? LANES / room->rows : 1;
    room->parts = (room->rows + LANES - 1) / LANES;
    room->width = room->rows < LANES ? room->rows : LANES;
    const int wide = site->stored == I8 && site->key_size % (2 * TILE_COLUMNS) == 0;
    room->key_columns = wide ? 2 * TILE_COLUMNS : TILE_COLUMNS;
    room->key_tiles = site->key_size / room->key_columns;
    room->value_tiles = site->value_size / TILE_COLUMNS;
    const int64_t parts = site->kv_heads * room->parts;
    const int64_t bytes[] = {
        (site->stored == I8 ? 2 : 1) * parts * room->key_tiles * TILE_BYTES,
        4 * TILE_TOKENS * LANES,
        8 * TILE_TOKENS * LANES,
        2 * BLOCK_TOKENS * site->value_size,
        4 * parts * room->width * site->value_size,
        4 * parts * LANES,
        4 * parts * LANES,
        4 * parts * LANES,
        4 * TILE_TOKENS * LANES,
        room->sharing * (int64_t)sizeof(TileScales),
        TILE_TOKENS / BLOCK_TOKENS * TILE_BYTES,
    };
    int64_t total = 0;
    for (int i = 0; i < 11; i++) total += bytes[i];
    char *at = scratch(SCRATCH_ATTENTION + 1, total);
    if (!at) return 0;
    void *places[11];
    for (int i = 0; i < 11; at += bytes[i++]) places[i] = at;
    room->queries = places[0], room->scores = places[1], room->weights = places[2];
    room->values = places[3], room->sums = places[4];
    room->largest = places[5], room->weight = places[6];
    room->query_scales = places[7], room->low_scores = places[8];
    room->scales = places[9], room->pieces = places[10];
    memset(room->queries, 0, bytes[0]);
    memset(room->query_scales, 0, bytes[7]);
    memset(room->sums, 0, bytes[4]);
    return 1;
}

static void take_queries(const Room *room, const Attention *all, const Run *run) {
    const Site *site = all->site;
    const int64_t group = site->heads / site->kv_heads;
    for (int64_t row = 0; row < site->heads * run->num_tokens; row++) {
        int64_t head = row / room->rows * group + row % group, token = row % room->rows / group;
        const char *from = all->queries.base + (run->first_row + token) * all->queries.token +
                           head * all->queries.head;
        Place place = place_of(room, row);
        char *to =
            room->queries + place.head_part * room->key_tiles * TILE_BYTES + 4 * place.lane;
        for (int64_t pair = 0; pair < site->key_size / 2; pair++)
            memcpy(to + pair * 4 * LANES, from + 4 * pair, 4);
    }
}

/* Tiles 0 and 1 are scores, 2 values or keys, 3 queries, 4 weights, 5 keys in 8 bits; 6 and 7
 * sums. */
TARGET static void shape_tiles(const Room *room, int stored) {
    TileShapes shapes = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        shapes.row_bytes[tile] = 64;
        shapes.rows[tile] = tile < 4 ? 16 : (uint8_t)room->width;
    }
    shapes.rows[5] = 16;
    if (stored == I8) {
        shapes.row_bytes[5] = (uint16_t)room->key_columns;
        shapes.rows[3] = (uint8_t)(room->key_columns / 4);
    }
    written(&shapes);
    _tile_loadconfig(&shapes);
}

TARGET static void all_scores(const Room *room, const Memory *memory, int64_t head, int64_t heads,
                              int64_t part, Ahead *ahead, int lines) {
    const int64_t head_bytes = room->key_tiles * TILE_COLUMNS * 2;
    for (int64_t t = 0; t < memory->count; t += 32) {
        const char *low = memory->keys + memory->slots[t] * memory->key_apart + head * head_bytes;
        /* Where there is no second block the first one's scores are made twice. */
        const int64_t other = t + 16 < memory->count ? t + 16 : t;
        const char *high =
            memory->keys + memory->slots[other] * memory->key_apart + head * head_bytes;
        const char *query =
            room->queries + (head * room->parts + part) * room->key_tiles * TILE_BYTES;
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t i = 0; i < heads * room->key_tiles; i++) {
            _tile_loadd(3, query, 64);
            ask(ahead, lines);
            _tile_loadd(2, low, memory->key_apart);
            ask(ahead, lines);
            _tile_dpbf16ps(0, 2, 3);
            ask(ahead, lines);
            _tile_loadd(2, high, memory->key_apart);
            ask(ahead, lines);
            _tile_dpbf16ps(1, 2, 3);
            low += 64, high += 64, query += TILE_BYTES;
        }
        _tile_stored(0, room->scores + t * LANES, 64);
        _tile_stored(1, room->scores + (t + 16) * LANES, 64);
    }
}

/* 16 tokens' words [token][lane] to [lane][token]: their upper halves, lower ones in `to`, once
 * more as they are behind it. */
TARGET INLINE void turn_apart(const __m512i x[16], uint32_t *to) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000u);
    __m512i turned[16];
    turn_round(x, turned);
    UNROLL for (int j = 0; j < 16; j++) {
        _mm512_store_si512(to + j * 16, _mm512_srli_epi32(turned[j], 16));
        _mm512_store_si512(to + (j + 16) * 16, _mm512_and_si512(turned[j], upper));
    }
}

/* 2**x for what is then rounded to bfloat16; not-a-number stays that, below -126 is as -126. */
TARGET INLINE __m512 power_of_two(__m512 x) {
    const __m512 magic = _mm512_set1_ps(12582912.0f); /* adding it rounds to an integer */
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);
    __m512 shifted = _mm512_add_ps(x, magic);
    __m512 rest = _mm512_sub_ps(x, _mm512_sub_ps(shifted, magic));
    __m512 poly = _mm512_set1_ps(0.00967603f);
    poly = _mm512_fmadd_ps(poly, rest, _mm512_set1_ps(0.05550327f));
    poly = _mm512_fmadd_ps(poly, rest, _mm512_set1_ps(0.24022107f));
    poly = _mm512_fmadd_ps(poly, rest, _mm512_set1_ps(0.69314700f));
    poly = _mm512_fmadd_ps(poly, rest, _mm512_set1_ps(1.0f));
    __m512i power = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(poly), power));
}

/* Scores as they are to be compared; returns the largest of each lane, in units of `scale`. A lane
 * sees the tokens from `low` to before `high` of the tile. */
TARGET INLINE Floats largest_scores(const Room *room, const Site *site, int64_t count, Ints low,
                                    Ints high, int all_seen) {
    const Floats nothing = splat(-__builtin_inff());
    const float cap = (float)site->softcap, scale = (float)site->scale;
    float *scores = room->scores;
    Floats most[2] = {nothing, nothing};
    if (all_seen && cap == 0.0f) {
        for (int64_t t = 0; t < count; t += 2)
            UNROLL for (int i = 0; i < 2; i++)
                most[i] = (Floats)_mm512_max_ps((__m512)load(scores, (t + i) * LANES, F32),
                                                (__m512)most[i]);
        return (Floats)_mm512_max_ps((__m512)most[0], (__m512)most[1]);
    }
    for (int32_t t = 0; t < (count + 15) / 16 * 16; t++) {
        Floats score = load(scores, t * LANES, F32);
        if (cap != 0.0f) score = hyperbolic_tangent(score * (scale / cap)) * (cap / scale);
        score = choose((low <= t) & (high > t), score, nothing);
        most[0] = choose(score > most[0], score, most[0]);
        store(scores, t * LANES, score, F32);
    }
    return most[0];
}

/* Scores of so many heads become weights, with the scales of values in 8 bits in them. Returns
 * whether sums are to be rescaled, and with what. */
TARGET INLINE int soften(const Room *room, const Site *site, int64_t group, int64_t heads,
                         int64_t count, Ints low, Ints high, int all_seen, Floats *rescaled,
                         Ahead *ahead, int lines, const int stored) {
    const Floats nothing = splat(-__builtin_inff());
    const float *scores = room->scores;
    /* Powers of two: the logarithm's base is in the scale. */
    const __m512 scale = _mm512_set1_ps((float)(site->scale * 1.4426950408889634));
    Floats most = largest_scores(room, site, count, low, high, all_seen);
    Floats before = load(room->largest, group * LANES, F32);
    Ints grew = most > before;
    Floats now = choose(grew, most, before);
    store(room->largest, group * LANES, now, F32);
    /* Where nothing was seen so far, all weights are 0 and not what infinity less itself is. */
    now = choose(now == nothing, (Floats){0}, now);
    *rescaled = choose(grew, exponential((before - now) * (float)site->scale), splat(1.0f));
    const __m512 most_scaled = _mm512_mul_ps((__m512)now, scale);
    Floats total = {0};
    for (int64_t t = 0; t < count; t += 16) {
        __m512i rounded[16];
        UNROLL for (int i = 0; i < 16; i++) {
            ask(ahead, lines);
            __m512 score = _mm512_load_ps(scores + (t + i) * LANES);
            __m512 weight = power_of_two(_mm512_fmsub_ps(score, scale, most_scaled));
            total += (Floats)weight;
            if (stored == I8)
                weight *= (__m512)lane_scales(room, room->scales->values, heads, t + i);
            rounded[i] = (__m512i)((Words)weight + 0x8000); /* to the nearest in the upper half */
        }
        if (stored == I8)
            put_weights(room, rounded, t, count);
        else
            turn_apart(rounded, room->weights + t * 2 * LANES);
    }
    Floats weight = load(room->weight, group * LANES, F32);
    store(room->weight, group * LANES, weight * *rescaled + total, F32);
    return _mm512_cmpneq_epi32_mask((__m512i)grew, _mm512_setzero_si512()) != 0;
}

TARGET static void rescale(const Room *room, float *sums, const float *by) {
    for (int64_t tile = 0; tile < 2 * room->value_tiles; tile++)
        for (int64_t row = 0; row < room->width; row++, sums += LANES)
            store(sums, 0, load(sums, 0, F32) * by[row], F32);
}

/* Values of a block whose tokens are not all there: what nobody wrote may not be a number. */
TARGET static void some_values(const Room *room, const char *from, int64_t apart, int64_t first,
                               int64_t count) {
    const int64_t bytes = 2 * TILE_COLUMNS * room->value_tiles;
    for (int64_t t = 0; t < BLOCK_TOKENS; t++, from += apart) {
        char *to = (char *)room->values + t * bytes;
        if (t >= first && t < count)
            memcpy(to, from, bytes);
        else
            memset(to, 0, bytes);
    }
}

/* Head `head`, the group's number `i`. */
TARGET static void add_values(const Room *room, const Memory *memory, int64_t head, int64_t i,
                              float *sums, Ahead *ahead, int lines) {
    const int64_t bytes = 2 * TILE_COLUMNS * room->value_tiles, apart = memory->value_apart;
    const uint32_t *weights = room->weights + i * room->width * LANES;
    for (int64_t tile = 0; tile < room->value_tiles; tile++) {
        float *odd = sums + room->width * LANES;
        _tile_loadd(6, sums, 64);
        _tile_loadd(7, odd, 64);
        for (int64_t t = 0; t < memory->count; t += BLOCK_TOKENS) {
            const char *from = memory->values + memory->slots[t] * apart + head * bytes;
            int64_t first = memory->first - t, count = memory->count - t, stride = apart;
            ask(ahead, lines);
            if (first > 0 || count < BLOCK_TOKENS) {
                some_values(room, from, apart, first, count);
                written(room->values);
                from = (const char *)room->values, stride = bytes;
            }
            _tile_loadd(2, from + 64 * tile, stride);
            ask(ahead, lines);
            _tile_loadd(4, weights + t * 2 * LANES, 64);
            ask(ahead, lines);
            _tile_dpbf16ps(6, 4, 2);
            _tile_loadd(4, weights + (t * 2 + BLOCK_TOKENS) * LANES, 64);
            _tile_dpbf16ps(7, 4, 2);
        }
        _tile_stored(6, sums, 64);
        _tile_stored(7, odd, 64);
        sums += 2 * room->width * LANES;
    }
}

/* What the lanes of a group see of the tile that begins at position `at`. */
TARGET INLINE int bounds(const Room *room, const Site *site, const Run *run, int64_t part,
                         int64_t at, const Memory *memory, Ints *low, Ints *high) {
    const int64_t group = site->heads / site->kv_heads;
    int32_t from[LANES], to[LANES];
    int all_seen = memory->count % BLOCK_TOKENS == 0;
    for (int64_t lane = 0; lane < LANES; lane++) {
        int64_t row = room->parts > 1 ? part * LANES + lane : lane % room->width;
        int64_t position = run->start + row / group;
        int64_t begin = first_visible(site, position) - at, end = position + 1 - at;
        if (begin < memory->first) begin = memory->first;
        if (end > memory->count) end = memory->count;
        from[lane] = (int32_t)(begin < TILE_TOKENS ? begin : TILE_TOKENS);
        to[lane] = (int32_t)(end > 0 ? end : 0);
        all_seen &= begin <= 0 && end >= memory->count;
    }
    memcpy(low, from, sizeof *low);
    memcpy(high, to, sizeof *high);
    return all_seen;
}

/* The sums' columns in their order, beside each row's largest score and weight. */
TARGET static void hand_over(const Room *room, const Site *site, int64_t num_tokens, Partial out) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int64_t row = 0; row < site->heads * num_tokens; row++) {
        Place place = place_of(room, row);
        out.largest[row] = room->largest[place.group * LANES + place.lane] * (float)site->scale;
        out.weight[row] = room->weight[place.group * LANES + place.lane];
        const float *from = room->sums + (place.head_part * 2 * room->value_tiles * room->width +
                                          place.row) * LANES;
        float *to = out.sums + row * site->value_size;
        for (int64_t tile = 0; tile < room->value_tiles; tile++, to += 2 * LANES) {
            __m512 even = _mm512_load_ps(from), odd = _mm512_load_ps(from + room->width * LANES);
            int in_order = site->stored == I8; /* the lower columns, then the upper ones */
            _mm512_storeu_ps(to, in_order ? even : _mm512_permutex2var_ps(even, low, odd));
            _mm512_storeu_ps(to + LANES, in_order ? odd : _mm512_permutex2var_ps(even, high, odd));
            from += 2 * room->width * LANES;
        }
    }
}

TARGET static int stretch(const Attention *all, const Run *run, int64_t begin, int64_t end,
                          int64_t stop, Partial out) {
    const Site *site = all->site;
    const int64_t *table = all->tables + run->table, bytes = dtype_bytes((int)site->stored);
    if (site->dtype != BF16 || site->key_size % TILE_COLUMNS || site->value_size % TILE_COLUMNS ||
        site->heads / site->kv_heads * run->num_tokens < LEAST_ROWS || !(site->scale > 0.0))
        return avx512bf16_attention_kernels.stretch(all, run, begin, end, stop, out);
    Room room;
    if (!make_room(&room, site, run->num_tokens)) return 0;
    if (site->stored == I8)
        take_split_queries(&room, all, run);
    else
        take_queries(&room, all, run);
    const int64_t groups = (site->kv_heads + room.sharing - 1) / room.sharing * room.parts;
    for (int64_t i = 0; i < groups * LANES; i++) {
        room.largest[i] = -__builtin_inff();
        room.weight[i] = 0;
    }
    shape_tiles(&room, (int)site->stored);
    int64_t slots[TILE_TOKENS], count;
    Ahead ahead;
    for (int64_t at = begin / BLOCK_TOKENS * BLOCK_TOKENS; at < end; at += count) {
        count = end - at < TILE_TOKENS ? end - at : TILE_TOKENS;
        for (int64_t t = 0; t < TILE_TOKENS; t++)
            slots[t] = slot_of(table, t < count ? at + t : at);
        const Memory memory = {
            (const char *)site->keys, (const char *)site->values, slots,
            begin > at ? begin - at : 0, count,
            site->kv_heads * site->key_size * bytes, site->kv_heads * site->value_size * bytes,
            (int)site->stored,
        };
        look_ahead(&ahead, site, table, at + count, stop);
        const int64_t blocks = (count + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
        /* Evenly over the time that a tile takes, or the requests wait for one another. */
        const int quarter = ahead.lines / 4;
        const int64_t all_parts = site->kv_heads * room.parts;
        const int asks = site->stored == I8 ? 3 : 2; /* for a tile of keys */
        const int for_scores = share(quarter, all_parts * room.key_tiles * blocks * asks);
        const int for_weights = share(quarter, groups * BLOCK_TOKENS * blocks);
        const int turns = site->stored == I8 ? 2 : 3; /* of asking, for a block's 32 columns */
        const int for_values = share(2 * quarter, all_parts * room.value_tiles * blocks * turns);
        for (int64_t group = 0; group < groups; group++) {
            const int64_t part = group % room.parts, head = group / room.parts * room.sharing;
            const int64_t left = site->kv_heads - head;
            const int64_t heads = left < room.sharing ? left : room.sharing;
            Ints low, high;
            Floats rescaled;
            float by[LANES];
            int all_seen = bounds(&room, site, run, part, at, &memory, &low, &high), grew;
            if (memory.stored == I8) {
                for (int64_t i = 0; i < heads; i++)
                    take_scales(&room.scales[i], site, slots, count, head + i);
                all_split_scores(&room, &memory, head, heads, part, &ahead, for_scores);
                scale_scores(&room, group, heads, count);
                grew = soften(&room, site, group, heads, count, low, high, all_seen, &rescaled,
                              &ahead, for_weights, I8);
            } else {
                all_scores(&room, &memory, head, heads, part, &ahead, for_scores);
                grew = soften(&room, site, group, heads, count, low, high, all_seen, &rescaled,
                              &ahead, for_weights, BF16);
            }
            store(by, 0, rescaled, F32);
            for (int64_t i = 0; i < heads; i++) {
                float *sums = room.sums + ((head + i) * room.parts + part) * 2 *
                                              room.value_tiles * room.width * LANES;
                if (grew) rescale(&room, sums, by + i * room.width);
                written(sums);
                if (memory.stored == I8)
                    add_widened_values(&room, &memory, head + i, i, sums, &ahead, for_values);
                else
                    add_values(&room, &memory, head + i, i, sums, &ahead, for_values);
            }
        }
    }
    _tile_release();
    hand_over(&room, site, run->num_tokens, out);
    return 1;
}

TARGET static void finish(const Attention *all, const Run *run, float *partials, int64_t count) {
    avx512bf16_attention_kernels.finish(all, run, partials, count);
}

const AttentionKernels amx_attention_kernels = {stretch, finish, quantize};
#endif

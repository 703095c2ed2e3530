/* Attention over a stretch of KV blocks, once more for each width of vector; see lanes.h.
 *
 * Tokens go through in tiles: a tile's keys and values of one KV head are made float32 once, side
 * by side in the first-level cache, and serve all query heads and tokens of the run. The largest
 * score so far is kept beside the sums (arXiv:1805.02867), so memory is read once.
 *
 *   DOT_BFLOATS  where keys of bfloat16 are multiplied as they lie (AVX512_BF16)
 *   QUERY_ROWS  rows of queries that one pass over a tile's keys serves
 *   SUM_ROWS, SUM_VECTORS  rows and vectors of sums that stay in registers over a tile's values
 */
#include "attention.h"
#include "attention_int8.h"

/* Memory of one stretch; sizes in floats. */
typedef struct {
    float *queries;  /* [row][padded key size], of all KV heads; bfloat16 where DOT_BFLOATS */
    float *keys;     /* [token of the tile][padded key size]; bfloat16 where they are multiplied
                        as such and do not lie so */
    float *values;   /* [token of the tile][padded value size] */
    float *scores;   /* [row of one KV head][TILE_TOKENS] */
    float *rescaled; /* [row of one KV head]: what the sums so far are multiplied with */
} Workspace;

LANE_FUNCTION int make_workspace(Workspace *space, const Site *site, int64_t num_tokens) {
    int64_t key = padded(site->key_size), value = padded(site->value_size);
    int64_t rows = site->heads / site->kv_heads * num_tokens;
    int64_t sizes[5] = {site->heads * num_tokens * key, TILE_TOKENS * key, TILE_TOKENS * value,
                        rows * TILE_TOKENS, padded(rows)};
    int64_t total = 0;
    for (int i = 0; i < 5; i++) total += sizes[i];
    float *at = scratch(SCRATCH_ATTENTION + 1, total * sizeof(float));
    if (!at) return 0;
    float **places[5] = {&space->queries, &space->keys, &space->values, &space->scores,
                         &space->rescaled};
    for (int i = 0; i < 5; at += sizes[i++]) *places[i] = at;
    return 1;
}

/* `size` elements as float32, filled up with zeros to `padded(size)`. */
LANE_FUNCTION void widen(float *to, const void *from, int64_t size, int dtype) {
    int64_t at = 0;
#if defined(LANES_NEON)
    if (dtype == I8) at = widen_bytes(to, from, size);
#endif
    for (; at + LANES <= size; at += LANES) store(to, at, load(from, at, dtype), F32);
    if (at < size) {
        store(to, at, load_part(from, at, size - at, dtype), F32);
        at += LANES;
    }
    for (; at < padded(size); at += LANES) store(to, at, (Floats){0}, F32);
}

/* A tile's keys or values of one KV head. */
LANE_FUNCTION void widen_tile(float *to, const char *from, const int64_t *slots, int64_t first,
                              int64_t count, int64_t slot_bytes, int64_t size, int dtype,
                              Ahead *ahead, int lines) {
    for (int64_t t = first; t < count; t++) {
        ask(ahead, lines);
        widen(to + t * padded(size), from + slots[t] * slot_bytes, size, dtype);
    }
}

/* scores[row][token] of `rows` rows and LANES tokens. */
LANE_FUNCTION void dot_rows(float *scores, const float *queries, const float *keys, int64_t size,
                            const int rows) {
    Floats sum[QUERY_ROWS][LANES];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int t = 0; t < LANES; t++) sum[r][t] = (Floats){0};
    for (int64_t at = 0; at < size; at += LANES) {
        UNROLL for (int r = 0; r < rows; r++) {
            Floats query = load(queries + r * size, at, F32);
            UNROLL for (int t = 0; t < LANES; t++)
                sum[r][t] += query * load(keys + t * size, at, F32);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        store(scores + r * TILE_TOKENS, 0, sum_each(sum[r]), F32);
}

#if DOT_BFLOATS
/* The same for bfloat16 queries, and keys in a block, `apart` bytes from one another. */
LANE_FUNCTION void dot_bfloats(float *scores, const uint16_t *query, const char *keys,
                               int64_t apart, int64_t size) {
    __m512 sum[LANES];
    UNROLL for (int t = 0; t < LANES; t++) sum[t] = _mm512_setzero_ps();
    for (int64_t at = 0; at < size; at += 2 * LANES) {
        __m512bh pairs = (__m512bh)_mm512_loadu_si512(query + at);
        UNROLL for (int t = 0; t < LANES; t++)
            sum[t] = _mm512_dpbf16_ps(
                sum[t], pairs, (__m512bh)_mm512_loadu_si512(keys + t * apart + 2 * at));
    }
    store(scores, 0, sum_each((const Floats *)sum), F32);
}

TARGET static void all_scores_of_bfloats(const Workspace *space, const uint16_t *queries,
                                         int64_t rows, int64_t count, int64_t size,
                                         const char *keys, const int64_t *slots, int64_t apart,
                                         Ahead *ahead, int lines) {
    for (int64_t t = 0; t < count; t += LANES) {
        const char *block = keys + slots[t] * apart;
        for (int64_t r = 0; r < rows; r++) {
            ask(ahead, lines);
            dot_bfloats(space->scores + r * TILE_TOKENS + t, queries + r * size, block, apart,
                        size);
        }
    }
}
#endif

TARGET static void all_scores(const Workspace *space, const float *queries, int64_t rows,
                              int64_t count, int64_t size, Ahead *ahead, int lines) {
    for (int64_t t = 0; t < count; t += LANES) {
        int64_t r = 0;
        for (; r + QUERY_ROWS <= rows; r += QUERY_ROWS) {
            ask(ahead, lines);
            dot_rows(space->scores + r * TILE_TOKENS + t, queries + r * size,
                     space->keys + t * size, size, QUERY_ROWS);
        }
        for (; QUERY_ROWS > 1 && r < rows; r++)
            dot_rows(space->scores + r * TILE_TOKENS + t, queries + r * size,
                     space->keys + t * size, size, 1);
    }
}

/* Scores of one row become weights; `low` and `high` bound the tokens of the tile that it sees.
 * Scales of keys and values in 8 bits are taken account of here, where there is one number for each
 * token. */
LANE_FUNCTION void soften(const Site *site, float *scores, int64_t count, int64_t low,
                          int64_t high, float *largest, float *weight, float *rescaled,
                          const TileScales *scales, int stored) {
    *rescaled = 1.0f;
    if (low >= count || high <= 0) {
        memset(scores, 0, TILE_TOKENS * sizeof *scores);
        return;
    }
    Ints lane;
    UNROLL for (int i = 0; i < LANES; i++) lane[i] = i;
    const float scale = (float)site->scale, cap = (float)site->softcap;
    const int32_t first = low > 0 ? (int32_t)low : 0;
    const int32_t stop = (int32_t)(high < count ? high : count);
    Floats most = splat(-__builtin_inff());
    for (int32_t t = 0; t < TILE_TOKENS; t += LANES) {
        Floats score = load(scores, t, F32) * scale;
        if (stored == I8) score *= load(scales->keys, t, F32);
        if (cap != 0.0f) score = hyperbolic_tangent(score / cap) * cap;
        if (t < first || t + LANES > stop)
            score = choose((lane + t >= first) & (lane + t < stop), score,
                           splat(-__builtin_inff()));
        most = choose(score > most, score, most);
        store(scores, t, score, F32);
    }
    float before = *largest, now = largest_lane(most);
    if (now > before) {
        *rescaled = exponential(splat(before - now))[0];
        *largest = before = now;
    }
    Floats total = {0};
    for (int32_t t = 0; t < TILE_TOKENS; t += LANES) {
        Floats one = exponential(load(scores, t, F32) - before);
        total += one;
        if (stored == I8) one *= load(scales->values, t, F32);
        store(scores, t, one, F32);
    }
    *weight = *weight * *rescaled + sum_lanes(total);
}

/* sums[row] = sums[row] * rescaled[row] + sum over tokens of scores[row][token] * values[token] */
LANE_FUNCTION void add_values(float *sums, const float *scores, const float *rescaled,
                              const float *values, int64_t first, int64_t count, int64_t size,
                              const int rows, const int vectors) {
    Floats sum[SUM_ROWS][SUM_VECTORS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            sum[r][v] = load(sums + r * size, v * LANES, F32) * rescaled[r];
    for (int64_t t = first; t < count; t++) {
        Floats value[SUM_VECTORS];
        UNROLL for (int v = 0; v < vectors; v++)
            value[v] = load(values + t * size, v * LANES, F32);
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < vectors; v++)
                sum[r][v] += scores[r * TILE_TOKENS + t] * value[v];
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            store(sums + r * size, v * LANES, sum[r][v], F32);
}

TARGET static void add_all_values(const Workspace *space, float *sums, int64_t rows,
                                  int64_t first, int64_t count, int64_t size) {
    for (int64_t r = 0; r < rows;) {
        const float *scores = space->scores + r * TILE_TOKENS, *rescaled = space->rescaled + r;
        float *to = sums + r * size;
        int many = r + SUM_ROWS <= rows;
        int64_t at = 0;
        for (; at + SUM_VECTORS * LANES <= size; at += SUM_VECTORS * LANES) {
            if (many)
                add_values(to + at, scores, rescaled, space->values + at, first, count, size, SUM_ROWS,
                           SUM_VECTORS);
            else
                add_values(to + at, scores, rescaled, space->values + at, first, count, size, 1,
                           SUM_VECTORS);
        }
        for (; at < size; at += LANES) {
            if (many)
                add_values(to + at, scores, rescaled, space->values + at, first, count, size, SUM_ROWS,
                           1);
            else
                add_values(to + at, scores, rescaled, space->values + at, first, count, size, 1, 1);
        }
        r += many ? SUM_ROWS : 1;
    }
}

LANE_FUNCTION int stretch_of(const Attention *all, const Run *run, int64_t begin, int64_t end,
                             int64_t stop, Partial out, int dtype, int stored) {
    const Site *site = all->site;
    const int64_t *table = all->tables + run->table;
    const int64_t key_size = site->key_size, value_size = site->value_size;
    const int64_t group = site->heads / site->kv_heads, rows = group * run->num_tokens;
    const int64_t key_slot = site->kv_heads * key_size * dtype_bytes(stored);
    const int64_t value_slot = site->kv_heads * value_size * dtype_bytes(stored);
    const int by_bfloats = DOT_BFLOATS && dtype == BF16 && key_size % (2 * LANES) == 0;
    Workspace space;
    if (!make_workspace(&space, site, run->num_tokens)) return 0;
    for (int64_t row = 0; row < site->heads * run->num_tokens; row++) {
        int64_t head = row / rows * group + row % group, token = row % rows / group;
        const char *query = all->queries.base + (run->first_row + token) * all->queries.token +
                            head * all->queries.head;
        if (by_bfloats)
            memcpy((uint16_t *)space.queries + row * key_size, query, 2 * key_size);
        else
            widen(space.queries + row * padded(key_size), query, key_size, dtype);
        out.largest[row] = -__builtin_inff();
        out.weight[row] = 0;
        memset(out.sums + row * padded(value_size), 0, padded(value_size) * sizeof(float));
    }
    int64_t slots[TILE_TOKENS], count;
    TileScales scales = {{0}, {0}};
    Ahead ahead;
    /* Whole blocks: what lies before `begin` is not seen, and its values are not read. */
    for (int64_t at = begin / BLOCK_TOKENS * BLOCK_TOKENS; at < end; at += count) {
        const int64_t first = begin > at ? begin - at : 0;
        count = end - at < TILE_TOKENS ? end - at : TILE_TOKENS;
        for (int64_t t = 0; t < count; t++) slots[t] = slot_of(table, at + t);
        look_ahead(&ahead, site, table, at + count, stop);
        const int half = ahead.lines / 2;
        const int for_scores = share(half, site->kv_heads * ((count + LANES - 1) / LANES) *
                                               ((rows + QUERY_ROWS - 1) / QUERY_ROWS));
        const int for_values = share(half, site->kv_heads * count);
        for (int64_t head = 0; head < site->kv_heads; head++) {
            const char *keys = (const char *)site->keys + head * key_size * dtype_bytes(stored);
            const char *values =
                (const char *)site->values + head * value_size * dtype_bytes(stored);
            if (stored == I8) take_scales(&scales, site, slots, count, head);
#if DOT_BFLOATS
            if (by_bfloats) {
                const uint16_t *queries = (const uint16_t *)space.queries + head * rows * key_size;
                int64_t in_order[TILE_TOKENS];
                if (stored == I8)
                    widen_to_bfloats((uint16_t *)space.keys, keys, slots, in_order, count, key_slot,
                                     key_size);
                all_scores_of_bfloats(&space, queries, rows, count, key_size,
                                      stored == I8 ? (const char *)space.keys : keys,
                                      stored == I8 ? in_order : slots,
                                      stored == I8 ? 2 * key_size : key_slot, &ahead, for_scores);
            } else
#endif
            {
                widen_tile(space.keys, keys, slots, 0, count, key_slot, key_size, stored, &ahead,
                           0);
                all_scores(&space, space.queries + head * rows * padded(key_size), rows, count,
                           padded(key_size), &ahead, for_scores);
            }
            widen_tile(space.values, values, slots, first, count, value_slot, value_size, stored,
                       &ahead, for_values);
            for (int64_t row = 0; row < rows; row++) {
                int64_t position = run->start + row / group;
                int64_t low = first_visible(site, position) - at;
                soften(site, space.scores + row * TILE_TOKENS, count, low > first ? low : first,
                       position + 1 - at, out.largest + head * rows + row,
                       out.weight + head * rows + row, space.rescaled + row, &scales, stored);
            }
            add_all_values(&space, out.sums + head * rows * padded(value_size), rows, first,
                           count, padded(value_size));
        }
    }
    return 1;
}

LANE_FUNCTION void finish_as(const Attention *all, const Run *run, float *partials, int64_t count,
                             int dtype) {
    const Site *site = all->site;
    const int64_t group = site->heads / site->kv_heads, rows = group * run->num_tokens;
    const int64_t size = site->value_size, apart = partial_floats(site, run->num_tokens);
    const Partial first = partial_at(partials, site, run->num_tokens);
    for (int64_t row = 0; row < site->heads * run->num_tokens; row++) {
        int64_t head = row / rows * group + row % group, token = row % rows / group;
        float largest = -__builtin_inff(), weight = 0;
        for (int64_t i = 0; i < count; i++)
            if (first.largest[i * apart + row] > largest) largest = first.largest[i * apart + row];
        if (site->sinks) {
            float sink = ((const float *)site->sinks)[head];
            if (sink > largest) largest = sink;
            weight = exponential(splat(sink - largest))[0];
        }
        float *sums = first.sums + row * padded(size);
        for (int64_t i = 0; i < count; i++) {
            float factor = exponential(splat(first.largest[i * apart + row] - largest))[0];
            weight += factor * first.weight[i * apart + row];
            if (i == 0 && factor == 1.0f) continue;
            for (int64_t at = 0; at < size; at += LANES) {
                Floats more = load(sums + i * apart, at, F32) * factor;
                store(sums, at, i ? load(sums, at, F32) + more : more, F32);
            }
        }
        char *out = (char *)all->out.base + (run->first_row + token) * all->out.token +
                    head * all->out.head;
        int64_t at = 0;
        for (; at + LANES <= size; at += LANES)
            store(out, at, load(sums, at, F32) / weight, dtype);
        if (at < size) store_part(out, at, size - at, load(sums, at, F32) / weight, dtype);
    }
}

TARGET static int stretch(const Attention *all, const Run *run, int64_t begin, int64_t end,
                          int64_t stop, Partial out) {
    const int dtype = (int)all->site->dtype;
    if (all->site->stored == I8) return stretch_of(all, run, begin, end, stop, out, dtype, I8);
    switch (dtype) {
        case BF16: return stretch_of(all, run, begin, end, stop, out, BF16, BF16);
        case F16: return stretch_of(all, run, begin, end, stop, out, F16, F16);
        default: return stretch_of(all, run, begin, end, stop, out, F32, F32);
    }
}

TARGET static void finish(const Attention *all, const Run *run, float *partials, int64_t count) {
    switch (all->site->dtype) {
        case BF16: finish_as(all, run, partials, count, BF16); break;
        case F16: finish_as(all, run, partials, count, F16); break;
        default: finish_as(all, run, partials, count, F32);
    }
}

const AttentionKernels KERNEL(attention_kernels) = {stretch, finish, quantize};

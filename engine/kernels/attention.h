/* Attention of a step's tokens over KV blocks: what is asked for, and its pieces.
 *
 * A token's slot is block * 16 + offset; a site's keys are [slot][kv head][key_size], its values
 * [slot][kv head][value_size]. In 8 bits each token and head has a scale, [block][kv head][offset]
 * in bfloat16, so that those of a block are side by side where they are needed. The context of a
 * run is cut at multiples of STRETCH_TOKENS into stretches, each of which gives a partial softmax
 * (sums, their largest score, their weight); what a run gets depends on its own length alone,
 * neither on its neighbours nor on the threads.
 */
#ifndef COMBOIO_ATTENTION_H
#define COMBOIO_ATTENTION_H

#include "native.h"

enum { BLOCK_TOKENS = 16, TILE_TOKENS = 64, STRETCH_TOKENS = 512 };
enum { SEES_ALL = 0, SEES_WINDOW = 1, SEES_CHUNK = 2 };

/* What holds for every call of a site, as Python packs it. */
typedef struct {
    int64_t keys, values;             /* addresses */
    int64_t key_scales, value_scales; /* addresses, where `stored` is I8 */
    int64_t dtype;                    /* of queries, of new keys and values, and of the result */
    int64_t stored;                   /* of keys and values in memory: `dtype` or I8 */
    int64_t heads, kv_heads, key_size, value_size;
    int64_t rule, window;
    int64_t sinks; /* address of a float for each head, or 0 */
    double scale;
    double softcap; /* 0: none */
} Site;

/* A stretch of one sequence inside the step, as Python packs it. */
typedef struct {
    int64_t first_row, num_tokens, start;
    int64_t table;  /* where its block table begins, in `tables` */
    int64_t attend; /* 0: only its keys and values are written */
} Run;

/* Rows of heads: element e of head h of token t lies at base + t * token + h * head + e. */
typedef struct {
    const char *base;
    int64_t token, head; /* bytes */
} Rows;

typedef struct {
    const Site *site;
    const Run *runs;
    const int64_t *tables;
    int64_t num_runs;
    Rows queries, keys, values, out;
} Attention;

/* The partial softmax of one stretch, for each of the run's heads * num_tokens rows: row
 * (kv head, token, head within its group). */
typedef struct {
    float *largest, *weight;
    float *sums; /* [row][padded value size] */
} Partial;

INLINE int64_t padded(int64_t size) { return (size + 15) & ~(int64_t)15; }

INLINE int64_t partial_floats(const Site *site, int64_t num_tokens) {
    return padded(site->heads * num_tokens) * (2 + padded(site->value_size));
}

INLINE Partial partial_at(float *memory, const Site *site, int64_t num_tokens) {
    int64_t rows = padded(site->heads * num_tokens);
    return (Partial){memory, memory + rows, memory + 2 * rows};
}

/* The first position that a token at `position` sees; it sees all from there to itself. */
INLINE int64_t first_visible(const Site *site, int64_t position) {
    if (site->rule == SEES_ALL) return 0;
    if (site->rule == SEES_CHUNK) return position / site->window * site->window;
    return position < site->window ? 0 : position - site->window + 1;
}

INLINE int64_t slot_of(const int64_t *table, int64_t position) {
    return table[position / BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS;
}

/* Memory of the next tile, asked for a few lines at a time and in its own order while this tile is
 * computed: only that comes near the memory's speed. */
typedef struct {
    const char *at, *end; /* of the part that is being asked for */
    int next, parts;
    struct {
        const char *at, *end;
    } part[4 * TILE_TOKENS / BLOCK_TOKENS];
    int lines; /* of all parts together */
} Ahead;

INLINE void look_ahead(Ahead *ahead, const Site *site, const int64_t *table, int64_t begin,
                       int64_t end) {
    const char *memory[4] = {(const char *)site->keys, (const char *)site->values,
                             (const char *)site->key_scales, (const char *)site->value_scales};
    const int64_t bytes = dtype_bytes((int)site->stored);
    /* Of a token's head; a scale is bfloat16. */
    int64_t head[4] = {site->key_size * bytes, site->value_size * bytes, 2, 2};
    const int kinds = site->stored == I8 ? 4 : 2;
    ahead->at = ahead->end = NULL;
    ahead->next = ahead->parts = ahead->lines = 0;
    for (int64_t at = begin; at < begin + TILE_TOKENS && at < end; at += BLOCK_TOKENS)
        for (int i = 0; i < kinds; i++) {
            int64_t block = BLOCK_TOKENS * site->kv_heads * head[i];
            const char *from = memory[i] + table[at / BLOCK_TOKENS] * block;
            ahead->part[ahead->parts].at = from;
            ahead->part[ahead->parts++].end = from + block;
            ahead->lines += (int)(block / 64);
        }
}

INLINE void ask(Ahead *ahead, int lines) {
    const char *at = ahead->at;
    if (at >= ahead->end) {
        if (ahead->next == ahead->parts) return;
        at = ahead->part[ahead->next].at;
        ahead->end = ahead->part[ahead->next++].end;
    }
    const char *stop = at + 64 * lines < ahead->end ? at + 64 * lines : ahead->end;
    for (; at < stop; at += 64) __builtin_prefetch(at, 0, 2);
    ahead->at = at;
}

/* Lines of each of so many steps. */
INLINE int share(int lines, int64_t steps) { return (int)((lines + steps - 1) / steps); }

typedef struct {
    /* Positions [begin, end) of one run, while memory is asked for up to position `stop`; 0 where
     * there is no memory. */
    int (*stretch)(const Attention *all, const Run *run, int64_t begin, int64_t end, int64_t stop,
                   Partial out);
    /* The run's result from all its stretches, which lie `partial_floats` apart. */
    void (*finish)(const Attention *all, const Run *run, float *partials, int64_t count);
    /* The run's keys and values, rounded to 8 bits, to their slots. */
    void (*quantize)(const Attention *all, const Run *run);
} AttentionKernels;

#endif

/* Runs attention or the pointwise kernels on what comes in, for machines that are emulated.
 *
 * lanes_main neon|portable attention|pointwise < numbers > results; the test says what they are. */
#include <stdio.h>
#include <stdlib.h>

#include "attention.h"
#include "pointwise.h"

extern const AttentionKernels neon_attention_kernels, portable_attention_kernels;
extern const PointwiseKernels neon_pointwise_kernels, portable_pointwise_kernels;

static void *take(size_t bytes) {
    void *memory = malloc(bytes + 64);
    if (!memory || fread(memory, 1, bytes, stdin) != bytes) exit(3);
    return memory;
}

/* Keys and values that are given slot by slot, as `site` has them stored. */
static void put(const AttentionKernels *kernels, Site *site, int64_t slots) {
    const int64_t bytes = dtype_bytes((int)site->dtype);
    const int64_t key = site->key_size * bytes, value = site->value_size * bytes;
    char *keys = take(slots * site->kv_heads * key);
    char *values = take(slots * site->kv_heads * value);
    site->keys = (int64_t)keys, site->values = (int64_t)values;
    if (site->stored != I8) return;
    site->keys = (int64_t)malloc(slots * site->kv_heads * site->key_size + 64);
    site->values = (int64_t)malloc(slots * site->kv_heads * site->value_size + 64);
    site->key_scales = (int64_t)malloc(slots * site->kv_heads * 2);
    site->value_scales = (int64_t)malloc(slots * site->kv_heads * 2);
    int64_t *in_order = malloc(slots / BLOCK_TOKENS * sizeof *in_order);
    for (int64_t i = 0; i < slots / BLOCK_TOKENS; i++) in_order[i] = i;
    Run run = {.num_tokens = slots};
    Attention all = {.site = site, .runs = &run, .tables = in_order, .num_runs = 1,
                     .keys = {keys, site->kv_heads * key, key},
                     .values = {values, site->kv_heads * value, value}};
    kernels->quantize(&all, &run);
}

static int attention(const AttentionKernels *kernels) {
    Site *site = take(sizeof *site);
    Run *run = take(sizeof *run);
    int64_t *sizes = take(2 * sizeof *sizes); /* blocks in the table, slots */
    int64_t *table = take(sizes[0] * sizeof *table);
    const int64_t bytes = dtype_bytes((int)site->dtype), tokens = run->num_tokens;
    const int64_t key = site->key_size * bytes, value = site->value_size * bytes;
    put(kernels, site, sizes[1]);
    Rows queries = {take(tokens * site->heads * key), site->heads * key, key};
    Rows out = {calloc(tokens * site->heads, value), site->heads * value, value};
    Attention all = {site, run, table, 1, queries, {0}, {0}, out};
    int64_t begin = first_visible(site, run->start), stop = run->start + tokens, count = 0;
    int64_t apart = partial_floats(site, tokens);
    float *partials = malloc((stop / STRETCH_TOKENS + 1) * apart * sizeof(float));
    for (; begin < stop; count++) {
        int64_t end = (begin / STRETCH_TOKENS + 1) * STRETCH_TOKENS;
        Partial part = partial_at(partials + count * apart, site, tokens);
        if (!kernels->stretch(&all, run, begin, end < stop ? end : stop, stop, part)) return 4;
        begin = end;
    }
    kernels->finish(&all, run, partials, count);
    fwrite(out.base, 1, tokens * site->heads * value, stdout);
    return 0;
}

/* x, other: (rows, size) both. Out come the norm of x, x turned by tables made of `other`, and each
 * activation of x times `other`. */
static int pointwise(const PointwiseKernels *kernels) {
    int64_t *sizes = take(3 * sizeof *sizes); /* rows, size, dtype */
    int64_t rows = sizes[0], size = sizes[1], bytes = rows * size * dtype_bytes((int)sizes[2]);
    char *x = take(bytes), *other = take(bytes), *out = malloc(bytes);
    Norm norm = {.x = x, .weight = other, .out = out, .stride = size, .inner = 1, .rows = rows,
                 .size = size, .dtype = (int)sizes[2], .round_first = 1, .epsilon = 1e-5f};
    kernels->norm(&norm, 0, rows);
    fwrite(out, 1, bytes, stdout);
    for (int activation = SILU; activation <= RELU; activation++) {
        Gated gated = {x, other, out, size, size, size, rows, size, (int)sizes[2], activation};
        kernels->gated(&gated, 0, rows);
        fwrite(out, 1, bytes, stdout);
    }
    Rope rope = {x, other, other, size, size, size, rows, 1, size, (int)sizes[2], (int)sizes[2]};
    kernels->rope(&rope, 0, rows);
    fwrite(x, 1, bytes, stdout);
    return 0;
}

int main(int count, char **words) {
    if (count != 3) return 2;
    int neon = !strcmp(words[1], "neon");
    if (!strcmp(words[2], "attention"))
        return attention(neon ? &neon_attention_kernels : &portable_attention_kernels);
    return pointwise(neon ? &neon_pointwise_kernels : &portable_pointwise_kernels);
}

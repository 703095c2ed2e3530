/* Attention over KV blocks: keys and values are written, then read where they lie. */
#include "attention.h"
#include "python_arguments.h"

#include <stdatomic.h>

extern const AttentionKernels portable_attention_kernels, avx2_attention_kernels,
    avx512_attention_kernels, avx512bf16_attention_kernels, amx_attention_kernels,
    neon_attention_kernels;

static const AttentionKernels *kernels(void) {
#if defined(HAVE_X86)
    if (allowed_isa & ISA_AMX) return &amx_attention_kernels;
    if (allowed_isa & ISA_AVX512_BF16) return &avx512bf16_attention_kernels;
    if (allowed_isa & ISA_AVX512) return &avx512_attention_kernels;
    if (allowed_isa & ISA_AVX2) return &avx2_attention_kernels;
#elif defined(HAVE_NEON)
    if (allowed_isa & ISA_NEON) return &neon_attention_kernels;
#endif
    return &portable_attention_kernels;
}

static void write_rows(char *to, const Rows *rows, int64_t row, int64_t slot, int64_t heads,
                       int64_t head_bytes) {
    const char *from = rows->base + row * rows->token;
    to += slot * heads * head_bytes;
    if (rows->head == head_bytes) {
        memcpy(to, from, heads * head_bytes);
        return;
    }
    for (int64_t head = 0; head < heads; head++)
        memcpy(to + head * head_bytes, from + head * rows->head, head_bytes);
}

static void write_run(const Attention *all, const Run *run) {
    const Site *site = all->site;
    if (site->stored == I8) {
        kernels()->quantize(all, run);
        return;
    }
    const int64_t bytes = dtype_bytes((int)site->dtype);
    for (int64_t i = 0; i < run->num_tokens; i++) {
        int64_t slot = slot_of(all->tables + run->table, run->start + i);
        write_rows((char *)site->keys, &all->keys, run->first_row + i, slot, site->kv_heads,
                   site->key_size * bytes);
        write_rows((char *)site->values, &all->values, run->first_row + i, slot, site->kv_heads,
                   site->value_size * bytes);
    }
}

/* One stretch of one run; the list of them is the work that threads share. */
typedef struct {
    const Run *run;
    int64_t begin, end, index, of;
    float *partials; /* of the run's first stretch */
} Piece;

typedef struct {
    const Attention *all;
    const AttentionKernels *kernels;
    Piece *pieces;
    atomic_int out_of_memory;
} Work;

static void attend_pieces(void *context, int64_t begin, int64_t end) {
    Work *work = context;
    for (int64_t i = begin; i < end; i++) {
        Piece *piece = &work->pieces[i];
        int64_t tokens = piece->run->num_tokens, apart = partial_floats(work->all->site, tokens);
        Partial out =
            partial_at(piece->partials + piece->index * apart, work->all->site, tokens);
        /* What follows is asked for if it is this thread's. */
        int64_t stop = i + 1 < end && piece[1].run == piece->run ? piece[1].end : piece->end;
        if (!work->kernels->stretch(work->all, piece->run, piece->begin, piece->end, stop, out))
            atomic_store(&work->out_of_memory, 1);
        else if (piece->of == 1)
            work->kernels->finish(work->all, piece->run, piece->partials, 1);
    }
}

INLINE int64_t stretches(int64_t begin, int64_t end) {
    return (end - 1) / STRETCH_TOKENS - begin / STRETCH_TOKENS + 1;
}

static int attend(const Attention *all) {
    const Site *site = all->site;
    int64_t count = 0, floats = 0;
    for (int64_t i = 0; i < all->num_runs; i++) {
        const Run *run = &all->runs[i];
        write_run(all, run);
        if (!run->attend) continue;
        int64_t mine =
            stretches(first_visible(site, run->start), run->start + run->num_tokens);
        count += mine;
        floats += mine * partial_floats(site, run->num_tokens);
    }
    if (!count) return 1;
    char *memory = scratch(SCRATCH_ATTENTION, floats * sizeof(float) + count * sizeof(Piece));
    if (!memory) return 0;
    Work work = {all, kernels(), (Piece *)(memory + floats * sizeof(float)), 0};
    float *partials = (float *)memory;
    Piece *piece = work.pieces;
    for (int64_t i = 0; i < all->num_runs; i++) {
        const Run *run = &all->runs[i];
        if (!run->attend) continue;
        int64_t begin = first_visible(site, run->start), stop = run->start + run->num_tokens;
        int64_t of = stretches(begin, stop);
        for (int64_t index = 0; index < of; index++, piece++) {
            int64_t end = (begin / STRETCH_TOKENS + 1) * STRETCH_TOKENS;
            *piece = (Piece){run, begin, end < stop ? end : stop, index, of, partials};
            begin = end;
        }
        partials += of * partial_floats(site, run->num_tokens);
    }
    parallel_for(count, 1, attend_pieces, &work);
    if (atomic_load(&work.out_of_memory)) return 0;
    for (piece = work.pieces; piece < work.pieces + count; piece += piece->of)
        if (piece->of > 1) work.kernels->finish(all, piece->run, piece->partials, piece->of);
    return 1;
}

/* (plan, site: bytes; base, token stride, head stride of queries, keys, values, out) */
static PyObject *py_attend(PyObject *module, PyObject *const *args, Py_ssize_t num_args) {
    int64_t number[12];
    if (num_args < 2 || !PyBytes_Check(args[0]) || !PyBytes_Check(args[1]) ||
        PyBytes_GET_SIZE(args[1]) != sizeof(Site) || PyBytes_GET_SIZE(args[0]) < 8) {
        PyErr_SetString(PyExc_TypeError, "a plan and a site, as bytes, come first");
        return NULL;
    }
    if (!integers(args + 2, num_args - 2, 12, number)) return NULL;
    const int64_t *plan = (const int64_t *)PyBytes_AS_STRING(args[0]);
    const Site *site = (const Site *)PyBytes_AS_STRING(args[1]);
    const int64_t bytes = dtype_bytes((int)site->dtype);
    Rows rows[4];
    for (int i = 0; i < 4; i++)
        rows[i] = (Rows){(const char *)number[3 * i], number[3 * i + 1] * bytes,
                         number[3 * i + 2] * bytes};
    Attention all = {
        .site = site,
        .runs = (const Run *)(plan + 1),
        .tables = plan + 1 + plan[0] * (int64_t)(sizeof(Run) / sizeof(int64_t)),
        .num_runs = plan[0],
        .queries = rows[0],
        .keys = rows[1],
        .values = rows[2],
        .out = rows[3],
    };
    int done;
    Py_BEGIN_ALLOW_THREADS
    done = attend(&all);
    Py_END_ALLOW_THREADS
    if (!done) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

PyMethodDef attention_methods[] = {
    {"attend", (PyCFunction)(void (*)(void))py_attend, METH_FASTCALL, NULL},
    {NULL},
};

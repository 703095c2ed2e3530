/* y = x W^T for packed weights: prepares the tokens, hands strips to threads, writes the results.
 *
 * Tokens go 16 at a time; int8 and int4 round them to 8 bits, however many there are.
 */
#include "linear_bf12.h"

/* Strips that meet all tokens before the next ones do: they stay in the second-level cache. */
enum { PANEL_BYTES = 1 << 19 };
/* Tokens laid out at a time, a multiple of MAX_TOKENS. */
enum { BLOCK_TOKENS = 512 };
/* Work for which a second thread is worth waking. */
enum { PIECE_BYTES = 128 << 10 };

const Kernels *linear_kernels(void) {
#if defined(HAVE_X86)
    if (allowed_isa & ISA_AMX) return &amx_kernels;
    if (allowed_isa & ISA_AVX512_BF16) return &avx512_bf16_kernels;
    if (allowed_isa & ISA_AVX512) return &avx512_kernels;
    if (allowed_isa & ISA_AVX2) return &avx2_kernels;
#elif defined(HAVE_NEON)
    if (allowed_isa & ISA_DOTPROD) return &dotprod_kernels;
    if (allowed_isa & ISA_NEON) return &neon_kernels;
#endif
    return &portable_kernels;
}

static void store(const Linear *work, int64_t strip, int64_t first, int64_t tokens,
                  const float *out) {
    int64_t row = strip * STRIP_ROWS;
    int count = work->rows - row < STRIP_ROWS ? (int)(work->rows - row) : STRIP_ROWS;
    if (work->kernels->store && count == STRIP_ROWS) {
        work->kernels->store(work, row, first, tokens, out);
        return;
    }
    for (int64_t t = first; t < first + tokens; t++, out += STRIP_ROWS)
        for (int i = 0; i < count; i++) {
            float value = out[i];
            if (work->bias) value += load_element(work->bias, row + i, work->bias_dtype);
            if (work->residual)
                value += load_element(work->residual + t * work->residual_stride, row + i,
                                      work->residual_dtype);
            store_element(work->y + t * work->y_stride, row + i, work->y_dtype, value);
        }
}

/* Lays the block's tokens out in `memory`, which token_bytes() says the size of. */
static void lay_out(const Linear *work, int64_t first, int tokens, uint8_t *memory,
                    Tokens *block) {
    const Kernels *kernels = work->kernels;
    const Preparation *prepare = kernels->prepare;
    int floats = is_bf16(work->format);
    int64_t chunks = num_chunks(work->format, work->cols);
    int as_float = floats ? kernels->bf16_as_float : kernels->ints_as_float;
    const uint8_t *from = work->x + first * work->x_stride;
    block->tokens = tokens;
    block->chunks = chunks;
    block->token_stride = chunk_columns(work->format) * (as_float ? 4 : floats ? 2 : 1);
    block->chunk_stride = tokens * block->token_stride;
    if (floats && !as_float && work->x_dtype == BF16 && work->cols % 32 == 0 && tokens == 1) {
        block->x = from; /* as it stands; more tokens would compete for the same cache lines */
        return;
    }
    float *scale = (float *)(memory + chunks * block->chunk_stride);
    float *shift = scale + chunks * tokens;
    int32_t *offset = (int32_t *)(shift + tokens);
    block->x = memory;
    block->scale = scale;
    block->shift = shift;
    block->offset = offset;
    for (int t = 0; t < tokens; t++, from += work->x_stride) {
        uint8_t *to = memory + t * block->token_stride;
        if (floats)
            prepare->convert_token(from, work->x_dtype, work->cols, as_float, to,
                                   block->chunk_stride);
        else
            prepare->quantize_token(from, work->x_dtype, work->cols, as_float, to,
                                    block->chunk_stride, scale + t, shift + t, offset + t,
                                    tokens);
    }
}

/* The most that lay_out() needs for a token, a multiple of 64. */
static int64_t token_bytes(const Linear *work) {
    int64_t columns = num_chunks(FORMAT_INT8, work->cols) * 64;
    int as_float =
        is_bf16(work->format) ? work->kernels->bf16_as_float : work->kernels->ints_as_float;
    return (columns * (as_float ? 4 : 2) + columns / 64 * 12 + 4) / 64 * 64 + 64;
}

static void lay_out_task(void *context, int64_t begin, int64_t end) {
    Linear *work = context;
    for (int64_t block = begin; block < end; block++) {
        int64_t first = block * MAX_TOKENS, left = work->tokens - first;
        uint8_t *memory = work->memory + first * token_bytes(work);
        lay_out(work, first, left < MAX_TOKENS ? (int)left : MAX_TOKENS, memory,
                &work->blocks[block]);
    }
}

/* Strips one behind the other; the first is the matrix's strip `first`. */
typedef struct {
    const uint8_t *strips;
    int64_t first, strip_bytes;
    int format;
} Panel;

/* One or two strips times one or two blocks of tokens. */
static void multiply(const Linear *work, const Panel *panel, int64_t strip, int strips,
                     int64_t block, int blocks) {
    float out[2][2][MAX_TOKENS * STRIP_ROWS] __attribute__((aligned(64)));
    const Kernels *kernels = work->kernels;
    const uint8_t *from = panel->strips + (strip - panel->first) * panel->strip_bytes;
    const uint8_t *both[2] = {from, from + panel->strip_bytes};
    const Tokens *x = work->blocks + block;
    if (panel->format == FORMAT_BF16 && kernels->dot_2x2 && strips == 2 && blocks == 2)
        kernels->dot_2x2(both, x, out[0][0]);
    else if (kernels->two[panel->format] && strips == 2)
        for (int b = 0; b < blocks; b++)
            kernels->two[panel->format](both, x + b, (float *const[2]){out[0][b], out[1][b]});
    else
        for (int s = 0; s < strips; s++)
            for (int b = 0; b < blocks; b++)
                kernels->dot[panel->format](both[s], x + b, out[s][b]);
    for (int s = 0; s < strips; s++)
        for (int b = 0; b < blocks; b++)
            store(work, strip + s, (block + b) * MAX_TOKENS, x[b].tokens, out[s][b]);
}

/* A panel of bf12 as bf16, when many tokens meet it, or the kernels have nothing better; 0 without
 * memory. */
static int widen(const Linear *work, Panel *panel, int64_t strips) {
    int64_t chunks = num_chunks(FORMAT_BF12, work->cols);
    uint8_t *to = scratch(SCRATCH_STRIPS, strips * chunks * BF16_CHUNK_BYTES);
    if (!to) return 0;
    panel->format = FORMAT_BF16;
    panel->strip_bytes = chunks * BF16_CHUNK_BYTES;
    for (int64_t strip = 0; strip < strips; strip++)
        bf16_strip(panel->strips + strip * work->strip_bytes, chunks,
                   to + strip * panel->strip_bytes);
    panel->strips = to;
    return 1;
}

static void strips_task(void *context, int64_t begin, int64_t end) {
    Linear *work = context;
    const Kernels *kernels = work->kernels;
    int64_t blocks = (work->tokens + MAX_TOKENS - 1) / MAX_TOKENS;
    int64_t most = PANEL_BYTES / work->strip_bytes / 2 * 2 + 2;
    int widens = work->format == FORMAT_BF12 && (blocks > 1 || !kernels->dot[FORMAT_BF12]);
    for (int64_t first = begin; first < end; first += most) {
        int64_t last = first + most < end ? first + most : end;
        Panel panel = {work->strips + first * work->strip_bytes, first, work->strip_bytes,
                       work->format};
        if (widens && !widen(work, &panel, last - first)) {
            __atomic_store_n(&work->no_memory, 1, __ATOMIC_RELAXED);
            break;
        }
        for (int64_t block = 0, two; block < blocks; block += two) {
            int tokens = work->blocks[block].tokens;
            two = block + 1 < blocks && work->blocks[block + 1].tokens == tokens ? 2 : 1;
            if (kernels->enter) kernels->enter(panel.format, tokens);
            for (int64_t strip = first; strip < last; strip += 2)
                multiply(work, &panel, strip, last - strip < 2 ? 1 : 2, block, (int)two);
        }
    }
    if (kernels->leave) kernels->leave();
}

/* Up to BLOCK_TOKENS tokens; 0 without memory. */
static int some_tokens(Linear *work) {
    Tokens list[BLOCK_TOKENS / MAX_TOKENS];
    work->blocks = list;
    if (!(work->memory = scratch(SCRATCH_TOKENS, work->tokens * token_bytes(work)))) return 0;
    parallel_for((work->tokens + MAX_TOKENS - 1) / MAX_TOKENS, 2, lay_out_task, work);
    int64_t strips = num_strips(work->rows), pieces = num_threads() * 8;
    int64_t grain = (PIECE_BYTES + work->strip_bytes - 1) / work->strip_bytes;
    if (grain < strips / pieces) grain = strips / pieces;
    work->no_memory = 0;
    parallel_for(strips, (grain + 1) / 2 * 2, strips_task, work);
    return !work->no_memory;
}

int linear(const Linear *whole) {
    Linear part = *whole;
    part.kernels = linear_kernels();
    part.strip_bytes = strip_bytes(whole->format, whole->cols);
    for (int64_t first = 0; first < whole->tokens; first += BLOCK_TOKENS) {
        int64_t left = whole->tokens - first;
        part.tokens = left < BLOCK_TOKENS ? left : BLOCK_TOKENS;
        part.x = whole->x + first * whole->x_stride;
        part.y = whole->y + first * whole->y_stride;
        if (whole->residual) part.residual = whole->residual + first * whole->residual_stride;
        if (!some_tokens(&part)) return 0;
    }
    return 1;
}

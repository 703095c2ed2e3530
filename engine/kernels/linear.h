/* How a packed matrix lies in memory, and what a set of kernels for it consists of.
 *
 * A matrix of `rows` outputs and `cols` inputs is cut into strips of 16 rows; a strip is one
 * contiguous stream that a thread reads from front to back, as only that reaches the memory's
 * speed. Within a strip the columns follow in chunks of 64 bytes x 16 lanes; lane = row:
 *
 *   bf16  chunk of 32 columns, 1024 bytes: for each pair of columns, 16 rows x 2 bf16.
 *   int8  first 16 float scales, one per row. Chunk of 64 columns, 1024 bytes: for each four
 *         columns, 16 rows x 4 bytes; a byte is the weight / scale + 128.
 *   int4  chunk of 64 columns, 576 bytes: 16 pairs of bf16 scales (columns 0-31, columns 32-63),
 *         then for each eight columns 16 rows x 4 bytes, whose low halves are the first four
 *         columns and whose high halves are the next four; a half is the weight / scale + 8.
 *
 *   bf12  bf16 in three quarters of the room: linear_bf12.h.
 *
 * Rows and columns are filled up with zeros. Numbers are little-endian, the layout is the same on
 * every processor.
 */
#ifndef COMBOIO_LINEAR_H
#define COMBOIO_LINEAR_H

#include "native.h"

enum { FORMAT_BF16 = 0, FORMAT_INT8 = 1, FORMAT_INT4 = 2, FORMAT_BF12 = 3, FORMATS = 4 };
enum { STRIP_ROWS = 16, MAX_TOKENS = 16 };
enum { BF16_CHUNK_BYTES = 1024, INT8_CHUNK_BYTES = 1024, INT4_CHUNK_BYTES = 576 };
enum { BF12_CHUNK_BYTES = 768 };
enum { INT8_HEAD_BYTES = 64, INT4_HEAD_BYTES = 64, BF12_HEAD_BYTES = 64 };
/* How far ahead of its use memory is asked for. */
enum { PREFETCH_BYTES = 4096 };
/* Two asks get more from the memory than one: what is soon needed comes into the first-level
 * cache, which would not hold what is needed later; that comes into the second. */
INLINE void ask_twice(const uint8_t *line, int64_t near, int64_t far) {
    __builtin_prefetch(line + near, 0, 3);
    __builtin_prefetch(line + far, 0, 2);
}
/* Ends what is done with one line in an unrolled loop. Left alone, the compiler gathers the
 * prefetches of many lines in one place, and the memory gives a quarter less. */
#define IN_ORDER __asm__ volatile("" : : : "memory")

/* How far a line asked for is from the one `offset` bytes into a strip, if it is read `ahead` bytes
 * later: what comes after a strip's `end` is `jump` further. */
INLINE int64_t ahead_of(int64_t offset, int64_t ahead, int64_t end, int64_t jump) {
    return offset + ahead < end ? ahead : ahead + jump;
}

/* Whether the weights are bf16, however they lie. */
INLINE int is_bf16(int format) { return format == FORMAT_BF16 || format == FORMAT_BF12; }

INLINE int64_t chunk_columns(int format) { return is_bf16(format) ? 32 : 64; }

INLINE int64_t num_chunks(int format, int64_t cols) {
    return (cols + chunk_columns(format) - 1) / chunk_columns(format);
}

/* How many weights a strip of bf12 can list, at so many bytes each. */
enum { LISTED_BYTES = 8 };
INLINE int64_t list_room(int64_t chunks) { return 2 * chunks + 8; }

INLINE int64_t bytes_of_chunks(int format, int64_t chunks) {
    if (format == FORMAT_BF16) return chunks * BF16_CHUNK_BYTES;
    if (format == FORMAT_INT8) return INT8_HEAD_BYTES + chunks * INT8_CHUNK_BYTES;
    if (format == FORMAT_BF12)
        return BF12_HEAD_BYTES + chunks * BF12_CHUNK_BYTES +
               (list_room(chunks) * LISTED_BYTES + 63) / 64 * 64;
    return chunks * INT4_CHUNK_BYTES;
}

INLINE int64_t strip_bytes(int format, int64_t cols) {
    return bytes_of_chunks(format, num_chunks(format, cols));
}

INLINE int64_t num_strips(int64_t rows) { return (rows + STRIP_ROWS - 1) / STRIP_ROWS; }

/* Up to 16 tokens as a kernel wants them. Column k of token t lies at
 * x + (k / chunk) * chunk_stride + t * token_stride, and on from there within the chunk. */
typedef struct {
    int tokens;
    int64_t chunks;
    const uint8_t *x; /* bf16 or float for bf16 weights; int8, or float, for int8 and int4 */
    int64_t chunk_stride, token_stride; /* bytes */
    const float *scale;    /* [chunk][token]: what a unit of the int8 is worth */
    /* What the weights' own offset adds to a sum, negative: */
    const float *shift;    /* int8: [token], the 128, over all columns, before the row's scale */
    const int32_t *offset; /* int4: [chunk][half][token], the 8, in units of the int8 */
} Tokens;

/* out[token][row of the strip] = sum over the columns */
typedef void (*Dot)(const uint8_t *strip, const Tokens *x, float *out);
/* The same of two strips, to the last bit. */
typedef void (*Two)(const uint8_t *const strips[2], const Tokens *x, float *const out[2]);

/* Whose high bytes, without the sign, have a code in a strip of bf12: `count` from `top` down; if
 * that is 7, zero has the last one. */
typedef struct {
    uint8_t top, count;
} HighBytes;

/* What comes before the sums. */
typedef struct {
    /* One token: `cols` elements of `x`, then zeros up to the chunk's end. */
    void (*convert_token)(const void *x, int dtype, int64_t cols, int as_float, uint8_t *to,
                          int64_t chunk_stride);
    void (*quantize_token)(const void *x, int dtype, int64_t cols, int as_float, uint8_t *to,
                           int64_t chunk_stride, float *scale, float *shift, int32_t *offset,
                           int tokens);
    /* A strip from its rows: columns[k][row] */
    void (*quantize_strip)(int format, const float *columns, int64_t cols, uint8_t *strip);
    /* Groups of bf12 from bf16's lines, up to one with a weight that has no code: how many. NULL:
     * one by one. */
    int64_t (*bf12_groups)(const uint8_t *lines, int64_t groups, HighBytes chosen, uint8_t *to);
    /* And back; `high` are the 16 high bytes. NULL: one by one. */
    void (*bf16_groups)(const uint8_t *from, int64_t groups, const uint8_t *high, uint8_t *lines);
} Preparation;

typedef struct Linear Linear;

typedef struct {
    const Preparation *prepare;
    int bf16_as_float; /* the bf16 kernel wants tokens as float, not as bf16 */
    int ints_as_float; /* the int8 and int4 kernels want their integers as float */
    Dot dot[FORMATS];  /* by format; NULL for bf12: by way of bf16 */
    /* Two strips and two blocks of equally many tokens; NULL: four calls of dot[BF16]. */
    void (*dot_2x2)(const uint8_t *strips[2], const Tokens x[2], float *out /* [2][2][16][16] */);
    Two two[FORMATS];  /* two strips at once, which the memory gives faster; NULL: one by one */
    /* y of `tokens` tokens from `first` on and 16 rows from `row` on, bias and residual added;
     * NULL: one by one. */
    void (*store)(const Linear *work, int64_t row, int64_t first, int64_t tokens,
                  const float *out);
    /* Round every thread's work on strips; NULL: nothing to do. */
    void (*enter)(int format, int tokens);
    void (*leave)(void);
} Kernels;

extern const Preparation avx512_preparation;
void avx512_store(const Linear *work, int64_t row, int64_t first, int64_t tokens,
                  const float *out);
extern const Kernels portable_kernels;
extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels, amx_kernels;
extern const Kernels neon_kernels, dotprod_kernels;

/* Those of the best allowed instruction set. */
const Kernels *linear_kernels(void);

/* y = x W^T + bias + residual. Strides are in bytes, from one token to the next. */
struct Linear {
    int format;
    int64_t rows, cols;
    const uint8_t *strips;
    int64_t tokens;
    const uint8_t *x;
    int x_dtype;
    int64_t x_stride;
    uint8_t *y;
    int y_dtype;
    int64_t y_stride;
    const void *bias; /* or NULL */
    int bias_dtype;
    const uint8_t *residual; /* or NULL; may be y itself */
    int residual_dtype;
    int64_t residual_stride;
    /* What linear() itself adds: */
    const Kernels *kernels;
    int64_t strip_bytes;
    Tokens *blocks;  /* of 16 tokens */
    uint8_t *memory; /* where they lie */
    int no_memory;
};
int linear(const Linear *work); /* 0: no memory */

/* Rows of a matrix, packed or to be packed. Strides are in elements. */
typedef struct {
    int format;
    int64_t rows, cols;
    uint8_t *strips;
    uint8_t *matrix; /* its first row goes with the first row of `strips` */
    int dtype;
    int64_t row_stride, col_stride;
    int no_memory, no_room; /* set by pack() and unpack() */
} Pack;
/* 0: no memory, or no room in a list of bf12 */
int pack(Pack *work);
int unpack(Pack *work);

#endif

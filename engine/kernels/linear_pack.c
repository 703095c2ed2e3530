/* Weights into strips and back: from bf16, f16 or f32 of any strides, a range of strips a time. */
#include "linear_bf12.h"

/* bf16 of neighbouring columns: no arithmetic, so rows are copied four bytes at a time. */
static void copy_bf16_rows(const Pack *work, int64_t strip, uint8_t *to) {
    int64_t row = strip * STRIP_ROWS;
    int count = work->rows - row < STRIP_ROWS ? (int)(work->rows - row) : STRIP_ROWS;
    const uint16_t *from = (const uint16_t *)work->matrix + row * work->row_stride;
    for (int64_t k = 0; k < work->cols; k += 32, to += BF16_CHUNK_BYTES) {
        uint32_t *pairs = (uint32_t *)to;
        int64_t whole = (work->cols - k < 32 ? work->cols - k : 32) / 2;
        for (int r = 0; r < count; r++) {
            const uint16_t *mine = from + r * work->row_stride + k;
            for (int64_t pair = 0; pair < whole; pair++)
                memcpy(pairs + pair * 16 + r, mine + 2 * pair, 4);
            if (work->cols - k < 32 && work->cols % 2) pairs[whole * 16 + r] = mine[2 * whole];
        }
    }
}

static void copy_bf16(const Pack *work, int64_t strip, uint8_t *to) {
    int64_t row = strip * STRIP_ROWS;
    int count = work->rows - row < STRIP_ROWS ? (int)(work->rows - row) : STRIP_ROWS;
    for (int64_t k = 0; k < work->cols; k++) {
        uint16_t *mine = (uint16_t *)to + k / 2 * 32 + k % 2;
        int64_t at = row * work->row_stride + k * work->col_stride;
        for (int r = 0; r < count; r++, at += work->row_stride)
            mine[2 * r] = work->dtype == BF16
                              ? ((const uint16_t *)work->matrix)[at]
                              : to_bf16(load_element(work->matrix, at, work->dtype));
    }
}

/* columns[k][row] as floats */
static void gather(const Pack *work, int64_t strip, float *columns) {
    int64_t row = strip * STRIP_ROWS;
    int count = work->rows - row < STRIP_ROWS ? (int)(work->rows - row) : STRIP_ROWS;
    if (count < STRIP_ROWS) memset(columns, 0, work->cols * STRIP_ROWS * sizeof(float));
    for (int64_t first = 0; first < work->cols; first += 64) {
        int64_t last = work->cols < first + 64 ? work->cols : first + 64;
        for (int r = 0; r < count; r++) {
            int64_t at = (row + r) * work->row_stride + first * work->col_stride;
            float *to = columns + first * STRIP_ROWS + r;
            if (work->dtype == BF16)
                for (int64_t k = first; k < last; k++, at += work->col_stride, to += STRIP_ROWS)
                    *to = from_bf16(((const uint16_t *)work->matrix)[at]);
            else
                for (int64_t k = first; k < last; k++, at += work->col_stride, to += STRIP_ROWS)
                    *to = load_element(work->matrix, at, work->dtype);
        }
    }
}

/* A strip in bf16's layout. */
static void copy_strip(const Pack *work, int64_t strip, uint8_t *to) {
    int64_t bytes = num_chunks(FORMAT_BF16, work->cols) * BF16_CHUNK_BYTES;
    if (work->rows - strip * STRIP_ROWS < STRIP_ROWS)
        memset(to, 0, bytes);
    else if (work->cols % 32)
        memset(to + bytes - BF16_CHUNK_BYTES, 0, BF16_CHUNK_BYTES);
    if (work->dtype == BF16 && work->col_stride == 1)
        copy_bf16_rows(work, strip, to);
    else
        copy_bf16(work, strip, to);
}

/* Room for one strip while it is made: its columns as floats, or its lines of bf16. */
static void *strip_memory(Pack *work) {
    void *memory = scratch(SCRATCH_STRIPS, (work->cols + 31) / 32 * 32 * STRIP_ROWS * 4);
    if (!memory) __atomic_store_n(&work->no_memory, 1, __ATOMIC_RELAXED);
    return memory;
}

static void pack_task(void *context, int64_t begin, int64_t end) {
    Pack *work = context;
    const Kernels *kernels = linear_kernels();
    int64_t bytes = strip_bytes(work->format, work->cols);
    void *memory = work->format == FORMAT_BF16 ? NULL : strip_memory(work);
    if (work->format != FORMAT_BF16 && !memory) return;
    for (int64_t strip = begin; strip < end; strip++) {
        uint8_t *to = work->strips + strip * bytes;
        if (work->format == FORMAT_BF16) {
            copy_strip(work, strip, to);
        } else if (work->format == FORMAT_BF12) {
            copy_strip(work, strip, memory);
            if (!bf12_strip(memory, num_chunks(FORMAT_BF12, work->cols), to))
                __atomic_store_n(&work->no_room, 1, __ATOMIC_RELAXED);
        } else {
            gather(work, strip, memory);
            kernels->prepare->quantize_strip(work->format, memory, work->cols, to);
        }
    }
}

/* One weight as what it stands for. */
static float weight_at(int format, const uint8_t *strip, int64_t k, int row) {
    if (format == FORMAT_BF16)
        return from_bf16(((const uint16_t *)strip)[k / 2 * 32 + 2 * row + k % 2]);
    if (format == FORMAT_INT8) {
        int whole = (strip + INT8_HEAD_BYTES)[k / 4 * 64 + row * 4 + k % 4] - 128;
        return (float)whole * ((const float *)strip)[row];
    }
    strip += k / 64 * INT4_CHUNK_BYTES;
    k %= 64;
    float scale = from_bf16(((const uint16_t *)strip)[2 * row + k / 32]);
    int both = (strip + INT4_HEAD_BYTES)[k / 8 * 64 + row * 4 + k % 4];
    return (float)((k % 8 < 4 ? both & 15 : both >> 4) - 8) * scale;
}

static void unpack_task(void *context, int64_t begin, int64_t end) {
    Pack *work = context;
    int64_t bytes = strip_bytes(work->format, work->cols);
    int is_bf12 = work->format == FORMAT_BF12;
    void *memory = is_bf12 ? strip_memory(work) : NULL;
    if (is_bf12 && !memory) return;
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *strip = work->strips + row / STRIP_ROWS * bytes;
        if (is_bf12 && (row == begin || row % STRIP_ROWS == 0))
            bf16_strip(strip, num_chunks(FORMAT_BF12, work->cols), memory);
        int64_t at = row * work->row_stride;
        for (int64_t k = 0; k < work->cols; k++, at += work->col_stride)
            store_element(work->matrix, at, work->dtype,
                          weight_at(is_bf12 ? FORMAT_BF16 : work->format,
                                    is_bf12 ? memory : strip, k, (int)(row % STRIP_ROWS)));
    }
}

int pack(Pack *work) {
    work->no_memory = work->no_room = 0;
    parallel_for(num_strips(work->rows), 4, pack_task, work);
    return !work->no_memory && !work->no_room;
}

int unpack(Pack *work) {
    work->no_memory = 0;
    parallel_for(work->rows, STRIP_ROWS, unpack_task, work);
    return !work->no_memory;
}

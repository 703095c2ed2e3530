/* Packs and multiplies what stdin holds, so that kernels of another processor can be looked at.
 *
 * stdin: format, rows, cols, tokens as int64; weights and tokens as float.
 * stdout: the packed bytes; what they unpack to and the product, as float.
 */
#include "linear.h"

#include <stdio.h>
#include <stdlib.h>

static void *taken(size_t bytes) {
    void *memory = NULL;
    if (posix_memalign(&memory, 64, bytes + 64) || fread(memory, 1, bytes, stdin) != bytes) exit(3);
    return memory;
}

int main(int count, char **arguments) {
    const char *why_not = count > 1 ? allow_isa(arguments[1]) : "no kernels named";
    if (why_not) return fprintf(stderr, "%s\n", why_not), 2;
    int64_t *sizes = taken(32), rows = sizes[1], cols = sizes[2], tokens = sizes[3];
    size_t bytes = num_strips(rows) * strip_bytes((int)sizes[0], cols);
    float *weights = taken(rows * cols * 4), *x = taken(tokens * cols * 4);
    uint8_t *strips = NULL;
    if (posix_memalign((void **)&strips, 64, bytes)) return 3;
    float *y = calloc(rows * tokens, 4);
    Pack packing = {.format = (int)sizes[0], .rows = rows, .cols = cols, .strips = strips,
                    .matrix = (uint8_t *)weights, .dtype = F32, .row_stride = cols,
                    .col_stride = 1};
    Linear work = {.format = (int)sizes[0], .rows = rows, .cols = cols, .strips = strips,
                   .tokens = tokens, .x = (uint8_t *)x, .x_dtype = F32, .x_stride = cols * 4,
                   .y = (uint8_t *)y, .y_dtype = F32, .y_stride = rows * 4};
    if (!pack(&packing)) return 3;
    unpack(&packing);
    set_num_threads(2);
    if (!linear(&work)) return 3;
    fwrite(strips, 1, bytes, stdout);
    fwrite(weights, 4, rows * cols, stdout);
    fwrite(y, 4, rows * tokens, stdout);
    return fflush(stdout) ? 3 : 0;
}

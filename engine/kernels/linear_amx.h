/* What the files for packed matrices on AMX share. Tiles 0-3 are sums, 4 and 5 tokens, 6 and 7
 * weights. */
#ifndef COMBOIO_LINEAR_AMX_H
#define COMBOIO_LINEAR_AMX_H

#include "linear.h"
#include "tiles.h"

/* A tile is loaded at once, so its lines are asked for at once: from so near that the next chunks'
 * do not fill all buffers of the first-level cache. */
enum { TILE_PREFETCH_BYTES = 1024, LATER_BYTES = 3072 };

void amx_int8_dot(const uint8_t *strip, const Tokens *x, float *out);
void amx_int4_dot(const uint8_t *strip, const Tokens *x, float *out);
void amx_int8_two(const uint8_t *const strips[2], const Tokens *x, float *const out[2]);
void amx_int4_two(const uint8_t *const strips[2], const Tokens *x, float *const out[2]);

#endif

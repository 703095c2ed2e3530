/* What the files for AMX share: how tiles are told their shapes. */
#ifndef COMBOIO_TILES_H
#define COMBOIO_TILES_H

#include <stdint.h>

#include "native.h"

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileShapes;

/* gcc takes the tile instructions for ones that read no memory: what was written for them must be
 * there before. */
INLINE void written(const void *memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

#endif

/* What the files for attention on AMX share: a stretch's memory, and where a row of it stands. */
#ifndef COMBOIO_ATTENTION_AMX_H
#define COMBOIO_ATTENTION_AMX_H

#include "attention.h"
#include "attention_int8.h"
#include "tiles.h"

/* Of a tile of 16 rows. */
enum { TILE_BYTES = 1024 };
/* Columns that one tile has of bfloat16. */
enum { TILE_COLUMNS = 32 };
/* Heads with fewer rows than this leave the tiles mostly empty. */
enum { LEAST_ROWS = 2 };

/* A group is what fills the lanes: some KV heads, or a part of the rows of one. */
typedef struct {
    int64_t rows;    /* of one KV head: its query heads times the run's tokens */
    int64_t sharing; /* KV heads of a group; 1 where a head has several groups */
    int64_t parts;   /* groups of a KV head */
    int64_t width;   /* lanes that one head has in a group */
    int64_t key_columns;            /* of one tile */
    int64_t key_tiles, value_tiles; /* of one head */
    /* [KV head][part][key tile][pair of columns][lane][2] of bfloat16, where keys are of that; 0 in
     * others' lanes. */
    char *queries;
    float *scores;     /* [token of the tile][lane] */
    uint32_t *weights; /* [block of the tile][even, odd][lane][token of the block]; in 8 bits
                          [half of the tile][lane][pair of tokens] */
    uint16_t *values;  /* [token of a block][column]: one whose tokens are not all there */
    float *sums;       /* [KV head][part][32 columns][even, odd][row][column]; in 8 bits
                          [KV head][part][32 columns][lower, upper][row][column] */
    float *largest, *weight; /* [group][lane] */
    /* Where keys and values are of 8 bits; see attention_amx_int8.h. */
    float *query_scales; /* [group][lane] */
    int32_t *low_scores; /* [token of the tile][lane] */
    TileScales *scales;  /* [head of the group] */
    uint32_t *pieces;    /* [half of the tile][lower, upper 16 columns][pair of tokens][column] */
} Room;

/* Where a row of all rows stands: its group, its lane, and its place in the sums. */
typedef struct {
    int64_t group, lane, head_part, row;
} Place;

INLINE Place place_of(const Room *room, int64_t row) {
    int64_t head = row / room->rows, within = row % room->rows, part = within / LANES;
    int64_t lane = head % room->sharing * room->width + within % LANES;
    return (Place){head / room->sharing * room->parts + part, lane, head * room->parts + part,
                   within % LANES};
}

/* Keys of one stretch's tile: of token t at keys + slots[t] * apart. */
typedef struct {
    const char *keys, *values;
    const int64_t *slots;
    int64_t first, count; /* tokens that are there */
    int64_t key_apart, value_apart; /* bytes, from one token to the next */
    int stored;                     /* BF16 or I8 */
} Memory;

/* Words [row][column] to [column][row]. */
TARGET INLINE void turn_round(const __m512i x[16], __m512i to[16]) {
__m512i a[16], b[16], c[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4)
        UNROLL for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
        }
    UNROLL for (int i = 0; i < 16; i += 8)
        UNROLL for (int j = 0; j < 4; j++) {
            c[i + j] = _mm512_shuffle_i32x4(b[i + j], b[i + 4 + j], 0x88);
            c[i + 4 + j] = _mm512_shuffle_i32x4(b[i + j], b[i + 4 + j], 0xdd);
        }
    /* c[j] holds 128-bit lanes 0 and 2, c[4 + j] lanes 1 and 3, of the lower and the upper rows. */
    UNROLL for (int j = 0; j < 8; j++) {
        to[j] = _mm512_shuffle_i32x4(c[j], c[8 + j], 0x88);
        to[j + 8] = _mm512_shuffle_i32x4(c[j], c[8 + j], 0xdd);
    }
}

#endif

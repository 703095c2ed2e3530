/* Strips of bf16 into 12 bits and back; the layout is told in linear_bf12.h. */
#include "linear_bf12.h"

/* One line in so many is looked at before the high bytes are chosen. */
enum { SAMPLE_LINES = 8 };

/* How many of the weights that were looked at have a code. */
static int64_t have_code(const int64_t seen[128], HighBytes chosen) {
    int64_t count = chosen.count == 7 ? seen[0] : 0;
    for (int below = 0; below < chosen.count; below++) count += seen[chosen.top - below];
    return count;
}

/* Which high bytes get a code: of the largest weights, or of all but the outliers. Where exact
 * zeros are many, they get one instead of the least of the others. */
static HighBytes choose_high_bytes(const uint8_t *lines, int64_t chunks) {
    int64_t seen[128] = {0}, step = chunks < SAMPLE_LINES ? 1 : SAMPLE_LINES, most = -1;
    const int16_t *weights = (const int16_t *)lines;
    int16_t largest = 0;
    for (int64_t i = 0; i < chunks * 512; i++) {
        int16_t magnitude = weights[i] & 0x7fff;
        largest = magnitude > largest ? magnitude : largest;
    }
    for (int64_t line = 0; line < chunks * 16; line += step)
        for (int i = 1; i < 64; i += 2) seen[lines[line * 64 + i] & 0x7f]++;
    HighBytes best = {7, 8};
    for (int count = 8; count >= 7; count--)
        for (int top = 7; top < 128; top++) {
            HighBytes chosen = {(uint8_t)top, (uint8_t)count};
            int64_t now = have_code(seen, chosen);
            if (count == 7 && top == 7) continue; /* zero is counted twice */
            /* Of several the lowest, as small weights are never few; but up to the largest. */
            if (now > most || (now == most && count == best.count && top <= largest >> 8))
                most = now, best = chosen;
        }
    return best;
}

/* Where weight `i` of a group lies among its 128 bf16, for i < 64 those of the lines A and B. */
static int place_of(int i) {
    int pair = i / 64 * 64, granule = i % 64 / 16, byte = i % 16;
    return pair + byte / 8 * 32 + granule * 8 + byte % 8;
}

/* One group, some of whose weights have to be listed; 0 without room. */
static int list_group(const uint8_t *lines, int64_t group, HighBytes chosen, int64_t chunks,
                      uint8_t *strip) {
    const uint16_t *from = (const uint16_t *)(lines + group * GROUP_BF16_BYTES);
    uint8_t *to = strip + BF12_HEAD_BYTES + group * GROUP_BYTES;
    Bf12Head *head = (Bf12Head *)strip;
    Listed *list = (Listed *)list_of(strip, chunks);
    memset(to, 0, 64);
    for (int i = 0; i < 128; i++) {
        int place = place_of(i);
        uint16_t bits = from[place];
        uint8_t magnitude = bits >> 8 & 0x7f, below = (uint8_t)(chosen.top - magnitude);
        if (below >= chosen.count) {
            if (chosen.count == 8 || magnitude) {
                if (head->listed >= list_room(chunks)) return 0;
                /* The lines' own order: 16 rows x 2 columns, a line a pair of columns. */
                int64_t pair = group * GROUPS + place / 32;
                uint32_t at = (uint32_t)((pair * 2 + place % 2) * 16 + place % 32 / 2);
                list[head->listed++] = (Listed){at, bits, 0};
            }
            below = 7;
        }
        to[64 + i] = (uint8_t)bits;
        to[i % 64] |= (uint8_t)(((bits >> 15) * 8 | below) << (i < 64 ? 0 : 4));
    }
    return 1;
}

int bf12_strip(const uint8_t *lines, int64_t chunks, uint8_t *strip) {
    const Preparation *prepare = linear_kernels()->prepare;
    HighBytes chosen = choose_high_bytes(lines, chunks);
    Bf12Head *head = (Bf12Head *)strip;
    memset(strip, 0, BF12_HEAD_BYTES);
    for (int code = 0; code < 16; code++) {
        int magnitude = code % 8 < chosen.count ? chosen.top - code % 8 : 0;
        head->high[code] = (uint8_t)(code / 8 << 7 | magnitude);
    }
    for (int64_t group = 0, groups = chunks * GROUPS; group < groups; group++) {
        if (prepare->bf12_groups)
            group += prepare->bf12_groups(lines + group * GROUP_BF16_BYTES, groups - group, chosen,
                                          strip + BF12_HEAD_BYTES + group * GROUP_BYTES);
        if (group < groups && !list_group(lines, group, chosen, chunks, strip)) return 0;
    }
    uint8_t *rest = (uint8_t *)(list_of(strip, chunks) + head->listed);
    memset(rest, 0, strip + strip_bytes(FORMAT_BF12, chunks * 32) - rest);
    return 1;
}

static void bf16_groups(const uint8_t *from, int64_t groups, const uint8_t *high, uint8_t *lines) {
    for (; groups; groups--, from += GROUP_BYTES, lines += GROUP_BF16_BYTES)
        for (int i = 0; i < 128; i++) {
            int code = from[i % 64] >> (i < 64 ? 0 : 4) & 15;
            ((uint16_t *)lines)[place_of(i)] = (uint16_t)(high[code] << 8 | from[64 + i]);
        }
}

void bf16_strip(const uint8_t *strip, int64_t chunks, uint8_t *lines) {
    const Preparation *prepare = linear_kernels()->prepare;
    (prepare->bf16_groups ? prepare->bf16_groups : bf16_groups)(
        strip + BF12_HEAD_BYTES, chunks * GROUPS, strip, lines);
    const Listed *list = list_of(strip, chunks);
    for (uint32_t i = 0, count = num_listed(strip, chunks); i < count; i++) {
        uint32_t column = list[i].at / STRIP_ROWS, row = list[i].at % STRIP_ROWS;
        if (column < chunks * 32)
            ((uint16_t *)lines)[column / 2 * 32 + 2 * row + column % 2] = list[i].bits;
    }
}

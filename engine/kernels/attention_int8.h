/* Keys and values in 8 bits, once more for each width of vector; see lanes.h.
 *
 * A token's head is whole numbers from -127 to 127 and one scale, the largest magnitude over 127 in
 * bfloat16. The numbers are divided by the scale as it is kept, so that its own rounding only makes
 * the grid a little coarser or finer, and bfloat16's range holds for any model. A head with a
 * number that is none has a scale that is none: whoever judges a step by its result finds it. What
 * is written here is, to the last bit, what engine/kv_quantize.py writes.
 */
#include "attention.h"

enum { LARGEST = 127 };

/* Of one tile and one KV head; 0 where there is no token. */
typedef struct {
    float keys[TILE_TOKENS], values[TILE_TOKENS];
} TileScales;

LANE_FUNCTION void take_scales(TileScales *to, const Site *site, const int64_t *slots,
                               int64_t count, int64_t head) {
    for (int64_t t = 0; t < count; t += BLOCK_TOKENS) {
        const int64_t at =
            (slots[t] / BLOCK_TOKENS * site->kv_heads + head) * BLOCK_TOKENS;
        for (int64_t i = 0; i < BLOCK_TOKENS; i += LANES) {
            store(to->keys, t + i, load((const void *)site->key_scales, at + i, BF16), F32);
            store(to->values, t + i, load((const void *)site->value_scales, at + i, BF16), F32);
        }
    }
    for (int64_t t = count; t < TILE_TOKENS; t++) to->keys[t] = to->values[t] = 0;
}

LANE_FUNCTION void store_bytes(int8_t *to, Ints whole) {
#if defined(LANES_AVX512)
    _mm_storeu_si128((void *)to, _mm512_cvtepi32_epi8((__m512i)whole));
#else
    Bytes x = __builtin_convertvector(whole, Bytes);
    memcpy(to, &x, sizeof x);
#endif
}

LANE_FUNCTION void quantize_head(int8_t *to, uint16_t *scale, const char *from, int64_t size,
                                 int dtype) {
    Ints most = {0}; /* as bits: not-a-number is larger than any number */
    for (int64_t at = 0; at < size; at += LANES) {
        Ints bits = (Ints)load_up_to(from, at, size - at, dtype) & 0x7fffffff;
        most = (bits & (bits > most)) | (most & (bits <= most));
    }
    int32_t largest = 0;
    for (int i = 0; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
    *scale = to_bf16(float_of((uint32_t)largest) / LARGEST);
    const float step = from_bf16(*scale);
    if (!(step > 0) || step == __builtin_inff()) {
        memset(to, 0, size);
        return;
    }
    const Floats magic = splat(12582912.0f); /* 1.5 * 2**23: adding it rounds to an integer */
    for (int64_t at = 0; at < size; at += LANES) {
        Floats x = load_up_to(from, at, size - at, dtype) / step;
        x = at_most(at_least(x, -LARGEST), LARGEST) + magic;
        Ints whole = (Ints)x - (Ints)magic;
        if (at + LANES <= size) {
            store_bytes(to + at, whole);
        } else {
            int8_t rest[LANES];
            store_bytes(rest, whole);
            memcpy(to + at, rest, size - at);
        }
    }
}

LANE_FUNCTION void quantize_rows(int64_t to, int64_t scales, const Rows *rows, int64_t row,
                                 int64_t slot, int64_t heads, int64_t size, int dtype) {
    const char *from = rows->base + row * rows->token;
    int8_t *numbers = (int8_t *)to + slot * heads * size;
    uint16_t *scale = (uint16_t *)scales +
                      slot / BLOCK_TOKENS * heads * BLOCK_TOKENS + slot % BLOCK_TOKENS;
    for (int64_t head = 0; head < heads; head++)
        quantize_head(numbers + head * size, scale + head * BLOCK_TOKENS, from + head * rows->head,
                      size, dtype);
}

LANE_FUNCTION void quantize_as(const Attention *all, const Run *run, int dtype) {
    const Site *site = all->site;
    for (int64_t i = 0; i < run->num_tokens; i++) {
        const int64_t slot = slot_of(all->tables + run->table, run->start + i);
        const int64_t row = run->first_row + i;
        quantize_rows(site->keys, site->key_scales, &all->keys, row, slot, site->kv_heads,
                      site->key_size, dtype);
        quantize_rows(site->values, site->value_scales, &all->values, row, slot, site->kv_heads,
                      site->value_size, dtype);
    }
}

TARGET static void quantize(const Attention *all, const Run *run) {
    switch (all->site->dtype) {
        case BF16: quantize_as(all, run, BF16); break;
        case F16: quantize_as(all, run, F16); break;
        default: quantize_as(all, run, F32);
    }
}

#if defined(LANES_NEON)
/* As many of these numbers as fill whole vectors of bytes become float32; returns how many. */
LANE_FUNCTION int64_t widen_bytes(float *to, const int8_t *from, int64_t size) {
    int64_t at = 0;
    for (; at + 16 <= size; at += 16) {
        int8x16_t x = vld1q_s8(from + at);
        int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_high_s8(x);
        vst1q_f32(to + at, vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))));
        vst1q_f32(to + at + 4, vcvtq_f32_s32(vmovl_high_s16(low)));
        vst1q_f32(to + at + 8, vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))));
        vst1q_f32(to + at + 12, vcvtq_f32_s32(vmovl_high_s16(high)));
    }
    return at;
}
#endif

#if DOT_BFLOATS
/* 32 numbers: every one of them is a bfloat16. */
TARGET INLINE void widen_32(uint16_t *to, const void *from) {
    const __m512 low = (__m512)from_bytes(from), high = (__m512)from_bytes((const char *)from + 16);
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

/* A tile's keys of one KV head, without their scales, and where each of them then is. */
LANE_FUNCTION void widen_to_bfloats(uint16_t *to, const char *from, const int64_t *slots,
                                    int64_t *places, int64_t count, int64_t slot_bytes,
                                    int64_t size) {
    for (int64_t t = 0; t < count; t++) {
        places[t] = t;
        for (int64_t at = 0; at < size; at += 2 * LANES)
            widen_32(to + t * size + at, from + slots[t] * slot_bytes + at);
    }
}
#endif

/* What the C files of this folder share: element types, the kernels of this processor, threads.
 *
 * Nothing here knows torch: Python passes addresses, sizes and strides as plain integers.
 */
#ifndef COMBOIO_NATIVE_H
#define COMBOIO_NATIVE_H

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* Of what Python hands over and what lies packed on disks: raised, here and in native.py, whenever
 * arguments, structures or layouts change, so that neither meets the other of another version. */
enum { KERNELS_VERSION = 4 };

/* Element types, by the numbers that `engine.kernels.native.DTYPES` gives them. I8 is only for keys
 * and values in memory: attention_int8.h. */
enum { BF16 = 0, F16 = 1, F32 = 2, I8 = 3 };

INLINE int64_t dtype_bytes(int dtype) { return dtype == F32 ? 4 : dtype == I8 ? 1 : 2; }

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float from_bf16(uint16_t half) { return float_of((uint32_t)half << 16); }

/* To the nearest, ties to even; not-a-number stays not-a-number. */
INLINE uint16_t to_bf16(float value) {
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

INLINE float from_f16(uint16_t half) {
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    /* 2**112 moves the exponent's bias from 15 to 127, subnormal numbers included. */
    uint32_t finite = bits_of(float_of(magnitude) * 5.192296858534828e33f);
    uint32_t bits = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite;
    return float_of(bits | ((uint32_t)(half & 0x8000) << 16));
}

INLINE uint16_t to_f16(float value) {
    uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000;
    uint32_t magnitude = bits & 0x7fffffff;
    /* Adding 0.5 lets the adder round a subnormal result at the right bit. */
    uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
    uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
    half = magnitude >= 0x477ff000 ? 0x7c00 : half;
    half = magnitude > 0x7f800000 ? 0x7e00 : half;
    return (uint16_t)(half | sign);
}

INLINE float load_element(const void *from, int64_t index, int dtype) {
    if (dtype == F32) return ((const float *)from)[index];
    uint16_t half = ((const uint16_t *)from)[index];
    return dtype == BF16 ? from_bf16(half) : from_f16(half);
}

INLINE void store_element(void *to, int64_t index, int dtype, float value) {
    if (dtype == F32)
        ((float *)to)[index] = value;
    else
        ((uint16_t *)to)[index] = dtype == BF16 ? to_bf16(value) : to_f16(value);
}

/* Instruction sets a kernel can be written for; cpu.c says which are there. On x86-64 each but
 * AMX includes those before it; ISA_AVX512 stands for F, BW, VL, DQ and VNNI together. */
enum {
    ISA_AVX2 = 1,        /* with FMA and F16C */
    ISA_AVX512 = 2,
    ISA_AVX512_BF16 = 4,
    ISA_AMX = 8,         /* tiles, int8 and bf16, and the kernel's leave to use them */
    ISA_NEON = 16,
    ISA_DOTPROD = 32,
};

/* The instruction sets of this machine that COMBOIO_KERNELS and set_kernels() allow. */
extern unsigned allowed_isa;
unsigned detected_isa(void);
const char *allow_isa(const char *name); /* NULL, or why not */
const char *isa_name(void);              /* "avx512-vnni-bf16+amx" */

/* Compiled for an instruction set beyond the compiler's baseline, called only where it is. */
#if defined(__x86_64__) && defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 11)
#define HAVE_X86 1
#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define TARGET_AVX512 \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define TARGET_AVX512_BF16 \
    __attribute__(( \
        target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")))
#define TARGET_AMX \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni," \
                          "avx512bf16,amx-tile,amx-int8,amx-bf16")))
#elif defined(__aarch64__) && defined(__GNUC__)
#define HAVE_NEON 1
#if defined(__clang__)
#define TARGET_DOTPROD __attribute__((target("dotprod")))
#else
#define TARGET_DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#endif

/* Threads: `task` is called on [begin, end) pieces of [0, count), by this thread and the helpers,
 * each piece of `grain` units; returns when all are done. Runs here alone when the pool has one
 * thread, when there is one piece, and while another thread uses the pool. */
typedef void (*Task)(void *context, int64_t begin, int64_t end);
void parallel_for(int64_t count, int64_t grain, Task task, void *context);
int num_threads(void);
void set_num_threads(int threads);

/* Memory of this thread that lives until the thread ends, aligned to 64 bytes, of at least
 * `bytes`; the contents do not outlive the next call with the same slot. NULL: no memory. */
enum { SCRATCH_TOKENS = 0, SCRATCH_STRIPS = 1, SCRATCH_ATTENTION = 2, SCRATCH_SLOTS = 4 };
void *scratch(int slot, size_t bytes);

#endif

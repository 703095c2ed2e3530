/* Which instruction sets this processor has, and which of them may be used. */
#define _GNU_SOURCE
#include "native.h"

#include <stdio.h>
#include <stdlib.h>

#if defined(HAVE_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(HAVE_NEON) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(HAVE_NEON) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

unsigned allowed_isa = 0;

#if defined(HAVE_X86)
static int leaf7(unsigned subleaf, unsigned *b, unsigned *c, unsigned *d, unsigned *a) {
    return __get_cpuid_count(7, subleaf, a, b, c, d);
}

/* Tiles are 8 KiB of state a thread: Linux hands them out only when asked. */
static int leave_to_use_tiles(void) {
#if defined(__linux__) && defined(SYS_arch_prctl)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}

static unsigned detect(void) {
    unsigned found = 0, a, b, c, d;
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found |= ISA_AVX2;
    if (found && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni"))
        found |= ISA_AVX512;
    if ((found & ISA_AVX512) && leaf7(1, &b, &c, &d, &a) && (a >> 5 & 1)) found |= ISA_AVX512_BF16;
    if ((found & ISA_AVX512_BF16) && leaf7(0, &b, &c, &d, &a)) {
        unsigned amx = 1u << 22 | 1u << 24 | 1u << 25; /* bf16, tile, int8 */
        if ((d & amx) == amx && leave_to_use_tiles()) found |= ISA_AMX;
    }
    return found;
}
#elif defined(HAVE_NEON)
static unsigned detect(void) {
    unsigned found = ISA_NEON;
#if defined(__linux__)
    if (getauxval(AT_HWCAP) >> 20 & 1) found |= ISA_DOTPROD; /* HWCAP_ASIMDDP */
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    if (!sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, NULL, 0) && has)
        found |= ISA_DOTPROD;
#endif
    return found;
}
#else
static unsigned detect(void) { return 0; }
#endif

unsigned detected_isa(void) {
    static int asked = 0;
    static unsigned found = 0;
    if (!asked) found = detect();
    asked = 1;
    return found;
}

static const struct {
    const char *name;
    unsigned needs, allows;
} CHOICES[] = {
    {"auto", 0, ~0u},
    {"portable", 0, 0},
    {"avx2", ISA_AVX2, ISA_AVX2},
    {"avx512", ISA_AVX512, ISA_AVX2 | ISA_AVX512},
    {"avx512bf16", ISA_AVX512_BF16, ISA_AVX2 | ISA_AVX512 | ISA_AVX512_BF16},
    {"amx", ISA_AMX, ISA_AVX2 | ISA_AVX512 | ISA_AVX512_BF16 | ISA_AMX},
    {"neon", ISA_NEON, ISA_NEON},
    {"dotprod", ISA_DOTPROD, ISA_NEON | ISA_DOTPROD},
};

const char *allow_isa(const char *name) {
    for (size_t i = 0; i < sizeof CHOICES / sizeof *CHOICES; i++) {
        if (strcmp(name, CHOICES[i].name)) continue;
        if (CHOICES[i].needs & ~detected_isa()) return "this processor does not have it";
        allowed_isa = detected_isa() & CHOICES[i].allows;
        return NULL;
    }
    return "no such kernels";
}

const char *isa_name(void) {
    if (allowed_isa & ISA_AMX) return "avx512-vnni-bf16+amx";
    if (allowed_isa & ISA_AVX512_BF16) return "avx512-vnni-bf16";
    if (allowed_isa & ISA_AVX512) return "avx512-vnni";
    if (allowed_isa & ISA_AVX2) return "avx2";
    if (allowed_isa & ISA_DOTPROD) return "neon-dotprod";
    if (allowed_isa & ISA_NEON) return "neon";
    return "portable";
}

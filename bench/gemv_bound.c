/* What the memory gives one thread: y = W x, row by row, as plainly as it can be written.
 *
 * Four sums in 512 bits, memory asked for 4 KiB ahead. bench/kernels.py compiles it with
 * -march=native; without the instructions for bf16 it adds up the bytes, which is a read as well.
 */
#include <stdint.h>

#if defined(__AVX512BF16__)
#include <immintrin.h>

void gemv_bf16(const uint16_t *w, const uint16_t *x, float *y, long rows, long cols) {
    for (long row = 0; row < rows; row++, w += cols) {
        __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                         _mm512_setzero_ps()};
        for (long k = 0; k < cols; k += 128)
            for (int i = 0; i < 4; i++) {
                _mm_prefetch((const char *)(w + k + 32 * i) + 4096, _MM_HINT_T0);
                sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)_mm512_loadu_si512(w + k + 32 * i),
                                          (__m512bh)_mm512_loadu_si512(x + k + 32 * i));
                /* The compiler would gather the prefetches in one place, and read a quarter less. */
                __asm__ volatile("" : : : "memory");
            }
        y[row] = _mm512_reduce_add_ps(
            _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
    }
}
#else
void gemv_bf16(const uint16_t *w, const uint16_t *x, float *y, long rows, long cols) {
    (void)x;
    for (long row = 0; row < rows; row++, w += cols) {
        uint64_t sum[16] = {0};
        const uint64_t *from = (const uint64_t *)w;
        for (long k = 0; k < cols / 4; k += 16) {
            __builtin_prefetch((const char *)(from + k) + 4096);
            __builtin_prefetch((const char *)(from + k) + 4160);
            for (int i = 0; i < 16; i++) sum[i] += from[k + i];
        }
        for (int i = 1; i < 16; i++) sum[0] += sum[i];
        y[row] = (float)sum[0];
    }
}
#endif

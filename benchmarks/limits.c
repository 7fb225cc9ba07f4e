/* What one core can do at most: memory read rate, and multiply-add rate by type, as one line of JSON.
 *
 * Knows nothing of models. Each loop keeps enough independent accumulators to hide latency and touches no memory, so it
 * is a ceiling that no real kernel reaches. Build: cc -O2 -march=native limits.c -o limits
 */
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Best of `repeats` sequential reads of `bytes`, in GB/s. */
static double read_gb_s(const char *data, size_t bytes, int repeats) {
    double best = 0;
    for (int r = 0; r < repeats; r++) {
        double begin = now_s();
        __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
        for (size_t i = 0; i + 128 <= bytes; i += 128) {
            a = _mm256_xor_si256(a, _mm256_load_si256((const __m256i *)(data + i)));
            b = _mm256_xor_si256(b, _mm256_load_si256((const __m256i *)(data + i + 32)));
            c = _mm256_xor_si256(c, _mm256_load_si256((const __m256i *)(data + i + 64)));
            d = _mm256_xor_si256(d, _mm256_load_si256((const __m256i *)(data + i + 96)));
            _mm_prefetch(data + i + 4096, _MM_HINT_T0);
        }
        a = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
        double took = now_s() - begin;
        __asm__ volatile("" : : "x"(a));
        double rate = (double)bytes / took * 1e-9;
        if (rate > best) best = rate;
    }
    return best;
}

#define LOOPS 20000000L
#define KEEP10(R) __asm__ volatile("" : "+x"(R##0), "+x"(R##1), "+x"(R##2), "+x"(R##3), "+x"(R##4), "+x"(R##5), \
                                       "+x"(R##6), "+x"(R##7), "+x"(R##8), "+x"(R##9))
#define EACH10(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9)

static double fma_gflop_s(void) {
    __m256 m = _mm256_set1_ps(0.999f);
#define DECLARE(i) __m256 a##i = _mm256_set1_ps(1.0f + i);
#define STEP(i) a##i = _mm256_fmadd_ps(a##i, m, m);
    EACH10(DECLARE)
    double begin = now_s();
    for (long n = 0; n < LOOPS; n++) {
        EACH10(STEP)
        KEEP10(a);
    }
    return (double)LOOPS * 10 * 16 / (now_s() - begin) * 1e-9;
#undef DECLARE
#undef STEP
}

/* u8 x s8 into int32 with the instructions that AVX2 has: two multiplies and one add for 32 products. */
static double int8_avx2_gop_s(void) {
    __m256i w = _mm256_set1_epi8(3), one = _mm256_set1_epi16(1);
    __asm__ volatile("" : "+x"(w), "+x"(one)); /* keeps the products out of the compiler's hands */
#define DECLARE(i) __m256i a##i = _mm256_set1_epi8(1 + i);
#define STEP(i) a##i = _mm256_add_epi32(a##i, _mm256_madd_epi16(_mm256_maddubs_epi16(w, a##i), one));
    EACH10(DECLARE)
    double begin = now_s();
    for (long n = 0; n < LOOPS; n++) {
        EACH10(STEP)
        KEEP10(a);
    }
    return (double)LOOPS * 10 * 64 / (now_s() - begin) * 1e-9;
#undef DECLARE
#undef STEP
}

/* The same, summed in int16 for as long as that is exact, so that one multiply serves 32 products. */
static double int8_int16_gop_s(void) {
    __m256i w = _mm256_set1_epi8(3);
    __asm__ volatile("" : "+x"(w));
#define DECLARE(i) __m256i a##i = _mm256_set1_epi8(1 + i);
#define STEP(i) a##i = _mm256_add_epi16(a##i, _mm256_maddubs_epi16(w, a##i));
    EACH10(DECLARE)
    double begin = now_s();
    for (long n = 0; n < LOOPS; n++) {
        EACH10(STEP)
        KEEP10(a);
    }
    return (double)LOOPS * 10 * 64 / (now_s() - begin) * 1e-9;
#undef DECLARE
#undef STEP
}

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
static double vnni_gop_s(void) {
    __m512i w = _mm512_set1_epi8(3);
    __asm__ volatile("" : "+v"(w));
#define DECLARE(i) __m512i a##i = _mm512_set1_epi8(1 + i);
#define STEP(i) a##i = _mm512_dpbusd_epi32(a##i, w, w);
    EACH10(DECLARE)
    double begin = now_s();
    for (long n = 0; n < LOOPS; n++) {
        EACH10(STEP)
        __asm__ volatile("" : "+v"(a0), "+v"(a1), "+v"(a2), "+v"(a3), "+v"(a4), "+v"(a5), "+v"(a6), "+v"(a7), "+v"(a8),
                         "+v"(a9));
    }
    return (double)LOOPS * 10 * 128 / (now_s() - begin) * 1e-9;
#undef DECLARE
#undef STEP
}
#endif

int main(void) {
    size_t big = (size_t)1 << 30, model = (size_t)96 << 20;
    char *data = aligned_alloc(1 << 21, big + 8192 + (1 << 21) - 8192);
    if (data == NULL) return 1;
    for (size_t i = 0; i < big + 8192; i += 64) data[i] = (char)i;
    printf("{\"read_1gib_gb_s\": %.2f, \"read_96mib_gb_s\": %.2f", read_gb_s(data, big, 5), read_gb_s(data, model, 40));
    printf(", \"fp32_gflop_s\": %.1f, \"int8_gop_s\": %.1f", fma_gflop_s(), int8_avx2_gop_s());
    printf(", \"int8_int16_sums_gop_s\": %.1f", int8_int16_gop_s());
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    printf(", \"int8_vnni_gop_s\": %.1f", vnni_gop_s());
#endif
    printf("}\n");
    free(data);
    return 0;
}

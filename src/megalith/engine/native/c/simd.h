/* Sixteen lanes, on every machine.
 *
 * All kernels are written for vectors of 16 floats (vf) or 16 int32 (vi): one register on AVX-512, two on AVX2, four
 * on a 128-bit machine. They are built from the compiler's vector extensions, so each kernel exists once; only integer
 * dot products (dot_*.h) and a few conversions use intrinsics.
 *
 * Results must not depend on how a compiler schedules or contracts: files are compiled with -ffp-contract=off, and
 * every fused multiply-add is a call of vf_fma. A machine without FMA rounds twice, always.
 */
#ifndef MEGALITH_SIMD_H
#define MEGALITH_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && !defined(MEGALITH_EMULATE_AVX512)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define LANES 16
#define PARTS (64 / VECTOR_BYTES)
#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define EACH_PART UNROLL for (int part = 0; part < PARTS; part++)

typedef float fpart __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t ipart __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t upart __attribute__((vector_size(VECTOR_BYTES)));
/* The same types where memory is not aligned to a whole vector. */
typedef float fpart_any __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t ipart_any __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

typedef struct { fpart p[PARTS]; } vf;
typedef struct { ipart p[PARTS]; } vi;

#define PART_LANES (VECTOR_BYTES / 4)

INLINE vf vf_load(const float *from) {
    vf r;
    EACH_PART r.p[part] = *(const fpart_any *)(from + part * PART_LANES);
    return r;
}
INLINE void vf_store(float *to, vf x) { EACH_PART *(fpart_any *)(to + part * PART_LANES) = x.p[part]; }
INLINE vf vf_set(float x) {
    vf r;
    EACH_PART r.p[part] = x - (fpart){0};
    return r;
}
INLINE vf vf_add(vf x, vf y) { EACH_PART x.p[part] += y.p[part]; return x; }
INLINE vf vf_sub(vf x, vf y) { EACH_PART x.p[part] -= y.p[part]; return x; }
INLINE vf vf_mul(vf x, vf y) { EACH_PART x.p[part] *= y.p[part]; return x; }
INLINE vf vf_div(vf x, vf y) { EACH_PART x.p[part] /= y.p[part]; return x; }
INLINE vf vf_scale(vf x, float y) { EACH_PART x.p[part] *= y; return x; }

/* x * y + z */
INLINE vf vf_fma(vf x, vf y, vf z) {
#if VECTOR_BYTES == 64
    z.p[0] = (fpart)_mm512_fmadd_ps((__m512)x.p[0], (__m512)y.p[0], (__m512)z.p[0]);
#elif VECTOR_BYTES == 32
    EACH_PART z.p[part] = (fpart)_mm256_fmadd_ps((__m256)x.p[part], (__m256)y.p[part], (__m256)z.p[part]);
#else
    EACH_PART z.p[part] = x.p[part] * y.p[part] + z.p[part];
#endif
    return z;
}

INLINE vi vi_set(int32_t x) {
    vi r;
    EACH_PART r.p[part] = x - (ipart){0};
    return r;
}
INLINE vi vi_load(const int32_t *from) {
    vi r;
    EACH_PART r.p[part] = *(const ipart_any *)(from + part * PART_LANES);
    return r;
}
INLINE void vi_store(int32_t *to, vi x) { EACH_PART *(ipart_any *)(to + part * PART_LANES) = x.p[part]; }
INLINE vi vi_add(vi x, vi y) { EACH_PART x.p[part] += y.p[part]; return x; }
INLINE vf vf_from_bits(vi x) { vf r; EACH_PART r.p[part] = (fpart)x.p[part]; return r; }
INLINE vi vi_from_bits(vf x) { vi r; EACH_PART r.p[part] = (ipart)x.p[part]; return r; }
INLINE vf vf_from_int(vi x) { vf r; EACH_PART r.p[part] = __builtin_convertvector(x.p[part], fpart); return r; }

/* All ones where x < y. */
INLINE vi vf_less(vf x, vf y) { vi r; EACH_PART r.p[part] = x.p[part] < y.p[part]; return r; }
/* All ones where x < y, for int32. */
INLINE vi vi_less(vi x, vi y) { vi r; EACH_PART r.p[part] = x.p[part] < y.p[part]; return r; }
INLINE vf vf_select(vi mask, vf yes, vf no) {
#if VECTOR_BYTES == 32
    EACH_PART no.p[part] = (fpart)_mm256_blendv_ps((__m256)no.p[part], (__m256)yes.p[part], (__m256)mask.p[part]);
#else
    EACH_PART no.p[part] = (fpart)((mask.p[part] & (ipart)yes.p[part]) | (~mask.p[part] & (ipart)no.p[part]));
#endif
    return no;
}
/* Where either side is NaN both give y, as x86's instructions do. */
INLINE vf vf_max(vf x, vf y) {
#if VECTOR_BYTES == 64
    y.p[0] = (fpart)_mm512_max_ps((__m512)x.p[0], (__m512)y.p[0]);
    return y;
#elif VECTOR_BYTES == 32
    EACH_PART y.p[part] = (fpart)_mm256_max_ps((__m256)x.p[part], (__m256)y.p[part]);
    return y;
#else
    return vf_select(vf_less(y, x), x, y);
#endif
}
INLINE vf vf_min(vf x, vf y) {
#if VECTOR_BYTES == 64
    y.p[0] = (fpart)_mm512_min_ps((__m512)x.p[0], (__m512)y.p[0]);
    return y;
#elif VECTOR_BYTES == 32
    EACH_PART y.p[part] = (fpart)_mm256_min_ps((__m256)x.p[part], (__m256)y.p[part]);
    return y;
#else
    return vf_select(vf_less(x, y), x, y);
#endif
}
INLINE vf vf_abs(vf x) {
    vf r;
    EACH_PART r.p[part] = (fpart)((ipart)x.p[part] & 0x7fffffff);
    return r;
}

/* Across lanes, as one fixed tree: i and i + 8, then i + 4, i + 2, i + 1. */
typedef float f4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));

/* Quarters of a vector. */
INLINE void vf_quarters(vf x, f4 *q) {
#if VECTOR_BYTES == 32
    EACH_PART {
        q[2 * part] = (f4)_mm256_castps256_ps128((__m256)x.p[part]);
        q[2 * part + 1] = (f4)_mm256_extractf128_ps((__m256)x.p[part], 1);
    }
#else
    memcpy(q, &x, sizeof x);
#endif
}
INLINE float vf_sum(vf x) {
    f4 q[4];
    vf_quarters(x, q);
    f4 sum = (q[0] + q[2]) + (q[1] + q[3]);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}
INLINE int32_t vi_sum(vi x) {
    f4 q[4];
    vf_quarters(vf_from_bits(x), q);
    i4 sum = ((i4)q[0] + (i4)q[2]) + ((i4)q[1] + (i4)q[3]);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}
INLINE f4 f4_max(f4 x, f4 y) {
#if VECTOR_BYTES == 32
    return (f4)_mm_max_ps((__m128)x, (__m128)y);
#else
    i4 greater = x > y;
    return (f4)((greater & (i4)x) | (~greater & (i4)y));
#endif
}
INLINE float vf_largest(vf x) {
    f4 q[4];
    vf_quarters(x, q);
    f4 top = f4_max(f4_max(q[0], q[2]), f4_max(q[1], q[3]));
    float even = top[0] > top[2] ? top[0] : top[2], odd = top[1] > top[3] ? top[1] : top[3];
    return even > odd ? even : odd;
}

/* The nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves it in the low mantissa bits. */
#define ROUND_MAGIC 12582912.0f
INLINE vi vf_round(vf x) {
    vi r;
    EACH_PART r.p[part] = (ipart)(x.p[part] + ROUND_MAGIC) - 0x4b400000;
    return r;
}

/* Lanes that fit int8, as bytes. */
INLINE void vi_store_bytes(int8_t *to, vi x) {
#if VECTOR_BYTES == 64
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8((__m512i)x.p[0]));
#elif VECTOR_BYTES == 32
    __m256i words = _mm256_packs_epi32((__m256i)x.p[0], (__m256i)x.p[1]); /* within each half: its lanes 0-3, then 8-11 */
    words = _mm256_permute4x64_epi64(words, 0xd8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)to, bytes);
#else
    for (int i = 0; i < LANES; i++) to[i] = (int8_t)x.p[i / PART_LANES][i % PART_LANES];
#endif
}

/* exp(x), relative error below 2e-7 for x in [-87, 88]; below it gives exp(-87), above it exp(88). Cephes' degree-5
 * polynomial after taking away a multiple of ln 2 in two parts; the power of two is added to the exponent's bits. */
INLINE vf vf_exp(vf x) {
    x = vf_min(vf_max(x, vf_set(-87.0f)), vf_set(88.0f));
    vf shifted = vf_fma(x, vf_set(1.44269504f), vf_set(ROUND_MAGIC)); /* its low mantissa bits are the integer n */
    vf n = vf_sub(shifted, vf_set(ROUND_MAGIC));
    vf r = vf_fma(n, vf_set(-0.693359375f), x);
    r = vf_fma(n, vf_set(2.12194440e-4f), r);
    vf p = vf_set(1.9875691500e-4f);
    p = vf_fma(p, r, vf_set(1.3981999507e-3f));
    p = vf_fma(p, r, vf_set(8.3334519073e-3f));
    p = vf_fma(p, r, vf_set(4.1665795894e-2f));
    p = vf_fma(p, r, vf_set(1.6666665459e-1f));
    p = vf_fma(p, r, vf_set(5.0000001201e-1f));
    p = vf_fma(p, vf_mul(r, r), vf_add(r, vf_set(1.0f)));
    EACH_PART p.p[part] = (fpart)((ipart)p.p[part] + ((ipart)shifted.p[part] << 23));
    return p;
}

/* Sixteen IEEE half floats, exactly. */
INLINE vf vf_load_half(const uint16_t *from) {
    vf r;
#if VECTOR_BYTES == 64
    r.p[0] = (fpart)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif VECTOR_BYTES == 32
    EACH_PART r.p[part] = (fpart)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + part * PART_LANES)));
#else
    /* Shift exponent and mantissa into place and rescale by 2^112: right for zero, subnormals and all finite values. */
    EACH_PART {
        upart wide;
        for (int i = 0; i < PART_LANES; i++) wide[i] = from[part * PART_LANES + i];
        fpart magnitude = (fpart)((wide & 0x7fff) << 13) * 0x1p112f;
        r.p[part] = (fpart)((upart)magnitude | (wide & 0x8000) << 16);
    }
#endif
    return r;
}

/* bfloat16 pairs: 16 dwords, each an even element (low half) and an odd one (high half). */
INLINE vf vf_even_bf16(vi pairs) { vf r; EACH_PART r.p[part] = (fpart)(pairs.p[part] << 16); return r; }
INLINE vf vf_odd_bf16(vi pairs) {
    vf r;
    EACH_PART r.p[part] = (fpart)((upart)pairs.p[part] & 0xffff0000u);
    return r;
}

/* Bits of bfloat16 in the low half of each lane: rounded to nearest even; NaN stays NaN. */
INLINE vi vf_to_bf16(vf x) {
    vi r;
    EACH_PART {
        upart bits = (upart)x.p[part];
        ipart is_nan = (ipart)(bits & 0x7fffffff) > 0x7f800000;
        upart rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        r.p[part] = (is_nan & 0x7fc0) | (~is_nan & (ipart)rounded);
    }
    return r;
}

#endif

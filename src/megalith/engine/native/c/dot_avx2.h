/* Unsigned weights times signed activations on AVX2: 16 columns, four elements (a quad) at a time.
 *
 * vpmaddubsw adds pairs of products in saturating int16. A 4-bit weight makes a pair at most 2 * 15 * 127 = 3810, so
 * the eight quads of a group of 32 add up to at most 30480 < 32767: no saturation is possible, and widening to int32 is
 * needed once a group. An 8-bit weight is split into two nibbles, each with such a sum, put together as lo + 16 * hi.
 */
#ifndef MEGALITH_DOT_AVX2_H
#define MEGALITH_DOT_AVX2_H

#include "simd.h"

#define TILE_ROWS_4 4
#define TILE_ROWS_8 3
#define ROOM_BYTES 64

typedef struct { __m256i p[2]; } dot4;
typedef struct { __m256i lo[2], hi[2]; } dot8;
typedef struct { __m256i p[2]; } quad4;
typedef struct { __m256i lo[2], hi[2]; } quad8;
typedef __m256i quad_in;

/* Stops the compiler from regrouping a chain of sums: its balanced tree needs more registers than there are. */
#define KEEP_ORDER(x) __asm__("" : "+x"(x))

INLINE quad_in load_input(const int8_t *from) {
    int32_t four;
    memcpy(&four, from, 4);
    return _mm256_set1_epi32(four);
}
INLINE dot4 dot4_first(quad4 w, quad_in a) {
    dot4 r;
    UNROLL for (int i = 0; i < 2; i++) {
        r.p[i] = _mm256_maddubs_epi16(w.p[i], a);
        KEEP_ORDER(r.p[i]);
    }
    return r;
}
INLINE dot4 dot4_add(dot4 r, quad4 w, quad_in a) {
    UNROLL for (int i = 0; i < 2; i++) {
        r.p[i] = _mm256_add_epi16(r.p[i], _mm256_maddubs_epi16(w.p[i], a));
        KEEP_ORDER(r.p[i]);
    }
    return r;
}
INLINE vi dot4_sum(dot4 x) {
    vi r;
    UNROLL for (int i = 0; i < 2; i++) r.p[i] = (ipart)_mm256_madd_epi16(x.p[i], _mm256_set1_epi16(1));
    return r;
}
INLINE dot8 dot8_first(quad8 w, quad_in a) {
    dot8 r;
    UNROLL for (int i = 0; i < 2; i++) {
        r.lo[i] = _mm256_maddubs_epi16(w.lo[i], a);
        r.hi[i] = _mm256_maddubs_epi16(w.hi[i], a);
        KEEP_ORDER(r.lo[i]);
        KEEP_ORDER(r.hi[i]);
    }
    return r;
}
INLINE dot8 dot8_add(dot8 r, quad8 w, quad_in a) {
    UNROLL for (int i = 0; i < 2; i++) {
        r.lo[i] = _mm256_add_epi16(r.lo[i], _mm256_maddubs_epi16(w.lo[i], a));
        r.hi[i] = _mm256_add_epi16(r.hi[i], _mm256_maddubs_epi16(w.hi[i], a));
        KEEP_ORDER(r.lo[i]);
        KEEP_ORDER(r.hi[i]);
    }
    return r;
}
INLINE vi dot8_sum(dot8 x) {
    vi r;
    UNROLL for (int i = 0; i < 2; i++) {
        __m256i lo = _mm256_madd_epi16(x.lo[i], _mm256_set1_epi16(1));
        __m256i hi = _mm256_madd_epi16(x.hi[i], _mm256_set1_epi16(16));
        r.p[i] = (ipart)_mm256_add_epi32(lo, hi);
    }
    return r;
}

/* 64 packed bytes: quad i in the low nibbles, quad i + 4 in the high ones. `room` is for code that needs memory. */
INLINE void split_quads4(const uint8_t *from, uint8_t *room, quad4 *low, quad4 *high) {
    const __m256i mask = _mm256_set1_epi8(15);
    (void)room;
    UNROLL for (int i = 0; i < 2; i++) {
        __m256i x = _mm256_load_si256((const __m256i *)from + i);
        low->p[i] = _mm256_and_si256(x, mask);
        high->p[i] = _mm256_and_si256(_mm256_srli_epi16(x, 4), mask);
    }
}
INLINE quad8 split_quad8(const uint8_t *from, uint8_t *room) {
    quad4 low, high;
    split_quads4(from, room, &low, &high);
    return (quad8){{low.p[0], low.p[1]}, {high.p[0], high.p[1]}};
}

#endif

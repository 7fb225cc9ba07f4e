/* Unsigned weights times signed activations with AVX-512 VNNI: vpdpbusd adds a quad of products to int32 exactly.
 *
 * With MEGALITH_EMULATE_AVX512 the same code runs on any machine, lane by lane: the kernels around it are then the AVX-512
 * ones with their tile sizes, so that they can be tested where the instructions are missing.
 */
#ifndef MEGALITH_DOT_AVX512_H
#define MEGALITH_DOT_AVX512_H

#include "simd.h"

#define TILE_ROWS_4 12
#define TILE_ROWS_8 12

#ifndef MEGALITH_EMULATE_AVX512
#define ROOM_BYTES 64
typedef __m512i quad_in;
typedef __m512i quad_bytes;
INLINE quad_in load_input(const int8_t *from) {
    int32_t four;
    memcpy(&four, from, 4);
    return _mm512_set1_epi32(four);
}
INLINE vi dot_add(vi r, quad_bytes w, quad_in a) {
    r.p[0] = (ipart)_mm512_dpbusd_epi32((__m512i)r.p[0], w, a);
    return r;
}
/* 64 packed bytes: quad i in the low nibbles, quad i + 4 in the high ones. `room` is for code that needs memory. */
INLINE void split_quads4(const uint8_t *from, uint8_t *room, quad_bytes *low, quad_bytes *high) {
    const __m512i mask = _mm512_set1_epi8(15);
    __m512i x = _mm512_loadu_si512(from); /* records of some formats are multiples of 32 bytes only */
    (void)room;
    *low = _mm512_and_si512(x, mask);
    *high = _mm512_and_si512(_mm512_srli_epi16(x, 4), mask);
}
INLINE quad_bytes split_quad8(const uint8_t *from, uint8_t *room) {
    (void)room;
    return _mm512_loadu_si512(from);
}
#else
#define ROOM_BYTES 128
typedef const int8_t *quad_in;
typedef const uint8_t *quad_bytes;
INLINE quad_in load_input(const int8_t *from) { return from; }
static __attribute__((noinline)) vi dot_add(vi r, quad_bytes w, quad_in a) {
    int32_t lane[LANES];
    memcpy(lane, &r, 64);
    for (int c = 0; c < LANES; c++)
        for (int j = 0; j < 4; j++) lane[c] += w[4 * c + j] * a[j];
    memcpy(&r, lane, 64);
    return r;
}
static __attribute__((noinline)) void split_quads4(const uint8_t *from, uint8_t *room, quad_bytes *low, quad_bytes *high) {
    for (int i = 0; i < 64; i++) room[i] = from[i] & 15, room[i + 64] = from[i] >> 4;
    *low = room;
    *high = room + 64;
}
INLINE quad_bytes split_quad8(const uint8_t *from, uint8_t *room) {
    (void)room;
    return from;
}
#endif

typedef vi dot4;
typedef vi dot8;
typedef quad_bytes quad4;
typedef quad_bytes quad8;
#define dot4_add dot_add
#define dot8_add dot_add
#define dot4_first(w, a) dot_add(vi_set(0), w, a)
#define dot8_first(w, a) dot_add(vi_set(0), w, a)
#define dot4_sum(x) (x)
#define dot8_sum(x) (x)

#endif

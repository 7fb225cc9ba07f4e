/* Unsigned weights times signed activations in plain C with 128-bit vector extensions (SSE2, NEON, or none).
 *
 * Weights are widened to 16 bits when a panel is unpacked; a quad is then two 16-bit products a lane, each column's
 * four elements side by side. Products of 8-bit weights reach 255 * 127, so every pair is added in 32 bits.
 */
#ifndef MEGALITH_DOT_PORTABLE_H
#define MEGALITH_DOT_PORTABLE_H

#include "simd.h"

#define TILE_ROWS_4 2
#define TILE_ROWS_8 2
/* A working quad holds elements 0..3 of the 16 columns as four planes of 16 int16. */
#define QUAD_BYTES_4 128
#define QUAD_BYTES_8 128

typedef int16_t i16x8 __attribute__((vector_size(16)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef struct { const int16_t *plane; } quad_planes;
typedef struct { int16_t element[4]; } quad_in;

INLINE quad_in load_input(const int8_t *from) {
    quad_in a = {{from[0], from[1], from[2], from[3]}};
    return a;
}
INLINE quad_planes load_quad(const uint8_t *from) { return (quad_planes){(const int16_t *)from}; }
static __attribute__((noinline)) vi dot_add(vi r, quad_planes w, quad_in a) {
    int32_t lane[LANES];
    memcpy(lane, &r, 64);
    for (int c = 0; c < LANES; c++)
        lane[c] += w.plane[c] * a.element[0] + w.plane[16 + c] * a.element[1] + w.plane[32 + c] * a.element[2] +
                   w.plane[48 + c] * a.element[3];
    memcpy(&r, lane, 64);
    return r;
}
INLINE void unpack_quad8(const uint8_t *from, uint8_t *to) {
    int16_t *plane = (int16_t *)to;
    for (int c = 0; c < LANES; c++)
        for (int j = 0; j < 4; j++) plane[16 * j + c] = from[4 * c + j];
}
INLINE void unpack_quads4(const uint8_t *from, uint8_t *low, uint8_t *high) {
    int16_t *low_plane = (int16_t *)low, *high_plane = (int16_t *)high;
    for (int c = 0; c < LANES; c++)
        for (int j = 0; j < 4; j++) {
            low_plane[16 * j + c] = from[4 * c + j] & 15;
            high_plane[16 * j + c] = from[4 * c + j] >> 4;
        }
}

typedef vi dot4;
typedef vi dot8;
#define load_quad4 load_quad
#define load_quad8 load_quad
#define dot4_add dot_add
#define dot8_add dot_add
#define dot4_first(w, a) dot_add(vi_set(0), w, a)
#define dot8_first(w, a) dot_add(vi_set(0), w, a)
#define dot4_sum(x) (x)
#define dot8_sum(x) (x)
typedef quad_planes quad4;
typedef quad_planes quad8;

#endif

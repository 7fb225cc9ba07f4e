/* Unsigned weights times signed activations in plain C with 128-bit vector extensions (SSE2, NEON, or none).
 *
 * A quad is unpacked to four planes of 16 columns of int16, which compilers multiply and widen well. Products of 8-bit
 * weights reach 255 * 127, so everything is added in 32 bits.
 */
#ifndef MEGALITH_DOT_PORTABLE_H
#define MEGALITH_DOT_PORTABLE_H

#include "simd.h"

#define TILE_ROWS_4 6
#define TILE_ROWS_8 6
#define PLANES_BYTES (4 * LANES * 2)
#define ROOM_BYTES (2 * PLANES_BYTES)

typedef const int16_t *quad_planes;
typedef const int8_t *quad_in;

INLINE quad_in load_input(const int8_t *from) { return from; }
static __attribute__((noinline)) vi dot_add(vi r, quad_planes w, quad_in a) {
    int32_t lane[LANES];
    memcpy(lane, &r, 64);
    for (int c = 0; c < LANES; c++)
        lane[c] += w[c] * a[0] + w[16 + c] * a[1] + w[32 + c] * a[2] + w[48 + c] * a[3];
    memcpy(&r, lane, 64);
    return r;
}
static __attribute__((noinline)) void split_quads4(const uint8_t *from, uint8_t *room, quad_planes *low,
                                                   quad_planes *high) {
    int16_t *low_plane = (int16_t *)(void *)room, *high_plane = low_plane + 4 * LANES;
    for (int j = 0; j < 4; j++)
        for (int c = 0; c < LANES; c++) {
            low_plane[16 * j + c] = from[4 * c + j] & 15;
            high_plane[16 * j + c] = from[4 * c + j] >> 4;
        }
    *low = low_plane;
    *high = high_plane;
}
static __attribute__((noinline)) quad_planes split_quad8(const uint8_t *from, uint8_t *room) {
    int16_t *plane = (int16_t *)(void *)room;
    for (int j = 0; j < 4; j++)
        for (int c = 0; c < LANES; c++) plane[16 * j + c] = from[4 * c + j];
    return plane;
}

typedef vi dot4;
typedef vi dot8;
typedef quad_planes quad4;
typedef quad_planes quad8;
#define dot4_add dot_add
#define dot8_add dot_add
#define dot4_first(w, a) dot_add(vi_set(0), w, a)
#define dot8_first(w, a) dot_add(vi_set(0), w, a)
#define dot4_sum(x) (x)
#define dot8_sum(x) (x)

#endif

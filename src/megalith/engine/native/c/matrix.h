/* A weight matrix in panels of 16 output columns, and rows of activations in 8 bits. What is stored, not how it is used.
 *
 * y[row][column] = sum over groups g of 32 inputs of  d * s * (q . a) + m * s * sum(a)
 * with weight d * q + m (q unsigned, 4 or 8 bits) and activation s * a (a signed 8 bits, |a| <= 127).
 *
 * A panel is a run of records, one a group, in the order in which they are read. A record holds
 *   4 bits: 256 bytes; line i of 64 bytes has quad i (elements 4i..4i+3 of each column) in its low nibbles and
 *           quad i + 4 in its high ones: byte 4c + j belongs to column c, element j of the quad;
 *   8 bits: 512 bytes; line i of 64 bytes is quad i;
 *   then 16 scales d, and 16 minima m where the format has them (else m = -zero * d), in half floats where these hold
 *   the file's values exactly, else in floats.
 *
 * A bipolar matrix of n bits (bipolar.c) has groups of 64 inputs and instead of quads n bit planes, the lowest first: a
 * plane is two lines of 64 bytes, one for each half of the group, whose dword c holds 32 elements of column c. Then 16
 * scales in half floats.
 */
#ifndef MEGALITH_MATRIX_H
#define MEGALITH_MATRIX_H

#include <stddef.h>
#include <stdint.h>

#define GROUP 32
#define PANEL 16
#define QUADS (GROUP / 4)
#define BIPOLAR_GROUP 64
#define PLANE_WORDS(bits) (4 * (size_t)(bits)) /* of one row and group: low and high nibbles of both halves of each plane */

/* Panels from `first` on, up to the next span's or the last, of a matrix that lies in pieces of a window (window.c). */
struct span { int32_t piece, first; size_t offset; };

struct matrix {
    int32_t outputs, inputs; /* as given; panels are padded with zero columns */
    int32_t panels, groups;
    int32_t bits;        /* 4 or 8; 0: see planes */
    int32_t planes;      /* bits of a bipolar weight, or 0 */
    int32_t zero;        /* what a stored q stands for zero at, when there are no minima */
    int32_t wide_scales; /* floats instead of half floats */
    int32_t has_min;
    size_t record_bytes;
    size_t bytes;
    uint8_t *data; /* 64-byte aligned; records are multiples of 32 bytes */
    struct span *spans; /* instead of data, and owned */
    int32_t num_spans;
};

/* Rows of activations: a[row * inputs + k], and for each group its scale and scale * sum(a). For bipolar matrices
 * planes[row][group of 64][plane][half][low nibbles, high nibbles] and a scale for each such group. */
struct activations {
    int8_t *a;
    float *scale, *sum;
    uint32_t *planes;
    float *plane_scale;
    int32_t plane_bits; /* of an activation */
    int32_t rows, inputs, groups;
};

/* The activations from row `first` on. */
static inline struct activations activations_from(struct activations x, int first) {
    size_t row = (size_t)first, groups = (size_t)x.inputs / BIPOLAR_GROUP;
    x.a += row * x.inputs;
    x.scale += row * x.groups;
    x.sum += row * x.groups;
    x.planes += row * groups * PLANE_WORDS(x.plane_bits);
    x.plane_scale += row * groups;
    return x;
}

/* One product Y (+)= X W^T. Columns past `outputs` are never written. */
struct product {
    const struct matrix *w;
    const struct activations *x;
    float *y;
    ptrdiff_t y_stride;
    int32_t accumulate; /* start from what y holds, instead of zero */
};

#endif

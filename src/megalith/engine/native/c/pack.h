/* File formats, and how a matrix gets from one into panels and back. */
#ifndef MEGALITH_PACK_H
#define MEGALITH_PACK_H

#include "api.h"
#include "matrix.h"

struct format_info {
    int32_t block_elements, block_bytes; /* in the file */
    int32_t bits, zero, wide_scales, has_min, planes; /* in the panels: see struct matrix */
};
extern const struct format_info format_table[NATIVE_FORMATS];

float float_from_half(uint16_t half);

/* Bytes of one row of `inputs` weights in the file. */
size_t format_row_bytes(int format, int inputs);

/* Everything but the data of a matrix of this format and shape. `inputs` is a multiple of the format's block and of 32. */
void matrix_describe(struct matrix *w, int format, int outputs, int inputs);

/* Fill one panel from the rows of the file. Panels are independent: threads may share the work. */
void matrix_pack_panel(struct matrix *w, int format, const uint8_t *raw, int panel);

/* Row `row` as floats, times `scale`: the embedding of a token. Exact where the format is. */
void matrix_row(const struct matrix *w, int row, float scale, float *out);

#endif

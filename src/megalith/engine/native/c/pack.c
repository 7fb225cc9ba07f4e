/* From file formats to panels: every format is decoded a group of 32 at a time into q, d and m.
 *
 * Exact: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K keep their values bit for bit. Q6_K (groups of 16) and the float
 * formats are rounded to 8 bits with one float scale a group: at most 1/254 of the group's largest weight away.
 * Bipolar matrices keep their bit planes as the file has them.
 */
#include "pack.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A half float scale, then n planes of 64 bits: element e is bit e % 8 of byte e / 8. */
#define BIPOLAR(n) [NATIVE_BIPOLAR1 + n - 1] = {BIPOLAR_GROUP, 2 + 8 * n, 0, 0, 0, 0, n}

const struct format_info format_table[NATIVE_FORMATS] = {
    /* block elements, block bytes, bits, zero, wide scales, minima, planes */
    [NATIVE_F32] = {1, 4, 8, 128, 1, 0},    [NATIVE_F16] = {1, 2, 8, 128, 1, 0},   [NATIVE_BF16] = {1, 2, 8, 128, 1, 0},
    [NATIVE_Q8_0] = {32, 34, 8, 128, 0, 0}, [NATIVE_Q4_0] = {32, 18, 4, 8, 0, 0},  [NATIVE_Q4_1] = {32, 20, 4, 0, 0, 1},
    [NATIVE_Q5_0] = {32, 22, 8, 16, 0, 0},  [NATIVE_Q5_1] = {32, 24, 8, 0, 0, 1},  [NATIVE_Q4_K] = {256, 144, 4, 0, 1, 1},
    [NATIVE_Q5_K] = {256, 176, 8, 0, 1, 1}, [NATIVE_Q6_K] = {256, 210, 8, 128, 1, 0},
    BIPOLAR(1), BIPOLAR(2), BIPOLAR(3), BIPOLAR(4), BIPOLAR(5), BIPOLAR(6), BIPOLAR(7), BIPOLAR(8),
};

struct group_values {
    uint8_t q[GROUP];
    uint16_t d_half, m_half;
    float d, m;
};

float float_from_half(uint16_t half) {
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    float value;
    memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    if ((half & 0x7c00) == 0x7c00) value = half & 0x3ff ? NAN : INFINITY;
    return half & 0x8000 ? -value : value;
}

static uint16_t read_half(const uint8_t *from) { return (uint16_t)(from[0] | from[1] << 8); }

static void split_nibbles(const uint8_t *from, uint8_t *q) {
    for (int i = 0; i < 16; i++) {
        q[i] = from[i] & 15;
        q[i + 16] = from[i] >> 4;
    }
}

static void add_fifth_bits(const uint8_t *from, uint8_t *q) {
    uint32_t bits = from[0] | from[1] << 8 | from[2] << 16 | (uint32_t)from[3] << 24;
    for (int i = 0; i < GROUP; i++) q[i] |= (uint8_t)((bits >> i & 1) << 4);
}

/* The 6-bit scale and minimum of group g (0..7) of a K-quant super block. */
static void k_scale_min(const uint8_t *packed, int g, int *scale, int *min) {
    if (g < 4) {
        *scale = packed[g] & 63;
        *min = packed[g + 4] & 63;
    } else {
        *scale = (packed[g + 4] & 15) | (packed[g - 4] >> 6) << 4;
        *min = packed[g + 4] >> 4 | (packed[g] >> 6) << 4;
    }
}

static void decode_k(const uint8_t *block, int g, int fifth, struct group_values *to) {
    int scale, min;
    k_scale_min(block + 4, g, &scale, &min);
    to->d = float_from_half(read_half(block)) * (float)scale;
    to->m = -(float_from_half(read_half(block + 2)) * (float)min);
    const uint8_t *low = block + (fifth ? 48 : 16) + g / 2 * 32, *high = block + 16;
    for (int i = 0; i < GROUP; i++) {
        to->q[i] = g & 1 ? low[i] >> 4 : low[i] & 15;
        if (fifth) to->q[i] |= (uint8_t)((high[i] >> g & 1) << 4);
    }
}

static void decode_q6_k(const uint8_t *block, int g, float *x) {
    const uint8_t *low = block + g / 4 * 64 + (g & 1) * 32, *high = block + 128 + g / 4 * 32;
    const int8_t *scales = (const int8_t *)block + 192 + g * 2;
    float d = float_from_half(read_half(block + 208));
    for (int i = 0; i < GROUP; i++) {
        int nibble = (g & 2) ? low[i] >> 4 : low[i] & 15;
        int q = (nibble | (high[i] >> (g & 3) * 2 & 3) << 4) - 32;
        x[i] = d * (float)scales[i / 16] * (float)q;
    }
}

static void decode_floats(int format, const uint8_t *from, float *x) {
    for (int i = 0; i < GROUP; i++) {
        if (format == NATIVE_F32) {
            memcpy(x + i, from + 4 * i, 4);
        } else if (format == NATIVE_F16) {
            x[i] = float_from_half(read_half(from + 2 * i));
        } else {
            uint32_t bits = (uint32_t)read_half(from + 2 * i) << 16;
            memcpy(x + i, &bits, 4);
        }
    }
}

/* Symmetric rounding to -127..127, stored with zero at 128. */
static void round_group(const float *x, struct group_values *to) {
    float largest = 0;
    for (int i = 0; i < GROUP; i++) largest = fmaxf(largest, fabsf(x[i]));
    to->d = largest / 127.0f;
    for (int i = 0; i < GROUP; i++) to->q[i] = (uint8_t)(128 + (largest > 0 ? (int)lrintf(x[i] / to->d) : 0));
}

static void decode_group(int format, const uint8_t *row, int g, struct group_values *to) {
    const struct format_info *f = &format_table[format];
    const uint8_t *block = row + (size_t)g * GROUP / f->block_elements * f->block_bytes;
    float x[GROUP];
    switch (format) {
    case NATIVE_Q4_0:
        split_nibbles(block + 2, to->q);
        break;
    case NATIVE_Q4_1:
        split_nibbles(block + 4, to->q);
        break;
    case NATIVE_Q5_0:
        split_nibbles(block + 6, to->q);
        add_fifth_bits(block + 2, to->q);
        break;
    case NATIVE_Q5_1:
        split_nibbles(block + 8, to->q);
        add_fifth_bits(block + 4, to->q);
        break;
    case NATIVE_Q8_0:
        for (int i = 0; i < GROUP; i++) to->q[i] = (uint8_t)(block[2 + i] ^ 0x80);
        break;
    case NATIVE_Q4_K:
    case NATIVE_Q5_K:
        decode_k(block, g % 8, format == NATIVE_Q5_K, to);
        return;
    case NATIVE_Q6_K:
        decode_q6_k(block, g % 8, x);
        round_group(x, to);
        return;
    default:
        decode_floats(format, block, x);
        round_group(x, to);
        return;
    }
    to->d_half = read_half(block);
    to->m_half = f->has_min ? read_half(block + 2) : 0;
}

/* Column c of one record. */
static void put_group(const struct matrix *w, uint8_t *record, int c, const struct group_values *v) {
    if (w->bits == 4)
        for (int i = 0; i < QUADS / 2; i++)
            for (int j = 0; j < 4; j++)
                record[64 * i + 4 * c + j] = (uint8_t)(v->q[4 * i + j] | v->q[4 * (i + QUADS / 2) + j] << 4);
    else
        for (int i = 0; i < QUADS; i++) memcpy(record + 64 * i + 4 * c, v->q + 4 * i, 4);
    uint8_t *scales = record + (w->bits == 4 ? 256 : 512);
    if (w->wide_scales) {
        ((float *)scales)[c] = v->d;
        if (w->has_min) ((float *)scales)[PANEL + c] = v->m;
    } else {
        ((uint16_t *)scales)[c] = v->d_half;
        if (w->has_min) ((uint16_t *)scales)[PANEL + c] = v->m_half;
    }
}

/* Column c of one record of a bipolar matrix, from its block in the file. */
static void put_planes(const struct matrix *w, uint8_t *record, int c, const uint8_t *block) {
    for (int i = 0; i < 2 * w->planes; i++) memcpy(record + 64 * i + 4 * c, block + 2 + 4 * i, 4);
    memcpy(record + 2 * 64 * w->planes + 2 * c, block, 2);
}

void matrix_describe(struct matrix *w, int format, int outputs, int inputs) {
    const struct format_info *f = &format_table[format];
    *w = (struct matrix){
        .outputs = outputs,
        .inputs = inputs,
        .panels = (outputs + PANEL - 1) / PANEL,
        .groups = inputs / (f->planes ? BIPOLAR_GROUP : GROUP),
        .bits = f->bits,
        .planes = f->planes,
        .zero = f->zero,
        .wide_scales = f->wide_scales,
        .has_min = f->has_min,
        .record_bytes = (size_t)(f->bits * GROUP * PANEL / 8 + (f->wide_scales ? 64 : 32) * (1 + f->has_min)),
    };
    if (f->planes) w->record_bytes = (size_t)(f->planes * BIPOLAR_GROUP / 8 + 2) * PANEL;
    w->bytes = w->record_bytes * (size_t)w->panels * (size_t)w->groups;
}

size_t format_row_bytes(int format, int inputs) {
    return (size_t)inputs / format_table[format].block_elements * format_table[format].block_bytes;
}

static void pack_planes(struct matrix *w, int format, const uint8_t *raw, int panel) {
    const uint8_t padding[2 + BIPOLAR_GROUP] = {0};
    size_t row_bytes = format_row_bytes(format, w->inputs), block_bytes = (size_t)format_table[format].block_bytes;
    uint8_t *record = w->data + (size_t)panel * w->groups * w->record_bytes;
    for (int g = 0; g < w->groups; g++, record += w->record_bytes)
        for (int c = 0; c < PANEL; c++) {
            const uint8_t *row = raw + (size_t)(panel * PANEL + c) * row_bytes;
            put_planes(w, record, c, panel * PANEL + c < w->outputs ? row + (size_t)g * block_bytes : padding);
        }
}

void matrix_pack_panel(struct matrix *w, int format, const uint8_t *raw, int panel) {
    size_t row_bytes = format_row_bytes(format, w->inputs);
    uint8_t *record = w->data + (size_t)panel * w->groups * w->record_bytes;
    if (w->planes) {
        pack_planes(w, format, raw, panel);
        return;
    }
    for (int g = 0; g < w->groups; g++, record += w->record_bytes)
        for (int c = 0; c < PANEL; c++) {
            struct group_values v = {.d = 0};
            if (panel * PANEL + c < w->outputs) decode_group(format, raw + (size_t)(panel * PANEL + c) * row_bytes, g, &v);
            put_group(w, record, c, &v);
        }
}

/* Column c of one record of a bipolar matrix as floats. */
static void planes_row(const struct matrix *w, const uint8_t *record, int c, float scale, float *out) {
    uint16_t half;
    memcpy(&half, record + 2 * 64 * w->planes + 2 * c, 2);
    float d = float_from_half(half);
    for (int k = 0; k < BIPOLAR_GROUP; k++) {
        int code = 0;
        for (int i = 0; i < w->planes; i++) {
            uint32_t word;
            memcpy(&word, record + 64 * (2 * i + k / 32) + 4 * c, 4);
            code |= (int)(word >> k % 32 & 1) << i;
        }
        out[k] = d * (float)(2 * code - (1 << w->planes) + 1) * scale;
    }
}

void matrix_row(const struct matrix *w, int row, float scale, float *out) {
    int c = row % PANEL;
    const uint8_t *record = w->data + (size_t)(row / PANEL) * w->groups * w->record_bytes;
    if (w->planes) {
        for (int g = 0; g < w->groups; g++) planes_row(w, record + g * w->record_bytes, c, scale, out + g * BIPOLAR_GROUP);
        return;
    }
    for (int g = 0; g < w->groups; g++, record += w->record_bytes, out += GROUP) {
        const uint8_t *scales = record + (w->bits == 4 ? 256 : 512);
        float d, m = 0;
        if (w->wide_scales) {
            d = ((const float *)scales)[c];
            if (w->has_min) m = ((const float *)scales)[PANEL + c];
        } else {
            d = float_from_half(((const uint16_t *)scales)[c]);
            if (w->has_min) m = float_from_half(((const uint16_t *)scales)[PANEL + c]);
        }
        for (int k = 0; k < GROUP; k++) {
            int quad = k / 4, byte = 4 * c + k % 4;
            int q = w->bits == 8    ? record[64 * quad + byte]
                    : quad < QUADS / 2 ? record[64 * quad + byte] & 15
                                       : record[64 * (quad - QUADS / 2) + byte] >> 4;
            out[k] = (d * (float)(q - w->zero) + m) * scale;
        }
    }
}

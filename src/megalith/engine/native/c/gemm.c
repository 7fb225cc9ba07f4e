/* Y (+)= X W^T for 8-bit activations and packed weights: the one place where matrices are multiplied.
 *
 * Every output element is one chain of fused multiply-adds over the groups in ascending order, whatever the number of
 * rows, threads or panels: a row's result is the same bits alone and in any batch.
 *
 * A tile is a few rows against one panel of 16 columns. Weights are unpacked in registers and used for all rows of the
 * tile; a batch of many rows unpacks a panel again for each tile, which costs less than storing it unpacked would.
 */
#include "kernels.h"
#include "simd.h"

#if defined(MEGALITH_EMULATE_AVX512) || defined(__AVX512VNNI__)
#include "dot_avx512.h"
#elif defined(__AVX2__)
#include "dot_avx2.h"
#else
#include "dot_portable.h"
#endif

#define ROWS_IN_CACHE_BYTES (192 * 1024) /* activations that stay in a 512 KiB L2 cache beside the panels */
#define PREFETCH_BYTES 4096

/* Where a tile of rows starts: activations, their scales and sums, and the 16 outputs of each row. */
struct tile {
    const int8_t *a;
    const float *scale, *sum;
    size_t inputs, groups;
    float *y;
    size_t y_stride;
};

static struct tile tile_at(const struct product *job, int panel, int row) {
    const struct activations *x = job->x;
    return (struct tile){
        .a = x->a + (size_t)row * x->inputs,
        .scale = x->scale + (size_t)row * x->groups,
        .sum = x->sum + (size_t)row * x->groups,
        .inputs = (size_t)x->inputs,
        .groups = (size_t)x->groups,
        .y = job->y + row * job->y_stride + (ptrdiff_t)panel * PANEL,
        .y_stride = (size_t)job->y_stride,
    };
}

/* Scales and minima of one record. */
INLINE void load_scales(const struct matrix *w, const uint8_t *from, vf *d, vf *m) {
    if (w->wide_scales) {
        *d = vf_load((const float *)from);
        if (w->has_min) *m = vf_load((const float *)from + PANEL);
    } else {
        *d = vf_load_half((const uint16_t *)from);
        if (w->has_min) *m = vf_load_half((const uint16_t *)from + PANEL);
    }
    if (!w->has_min) *m = vf_scale(*d, (float)-w->zero);
}

/* f + the group's share: (q . a) * d * s + m * sum. The same three operations in every tile. */
INLINE vf with_group(vf f, vi dot, vf d, vf m, const struct tile *t, int row, int group) {
    f = vf_fma(vf_from_int(dot), vf_scale(d, t->scale[row * t->groups + group]), f);
    return vf_fma(m, vf_set(t->sum[row * t->groups + group]), f);
}

INLINE void load_sums(int rows, const struct tile *t, int accumulate, vf *f) {
    UNROLL for (int r = 0; r < rows; r++) f[r] = accumulate ? vf_load(t->y + r * t->y_stride) : vf_set(0);
}
INLINE void store_sums(int rows, const struct tile *t, const vf *f) {
    UNROLL for (int r = 0; r < rows; r++) vf_store(t->y + r * t->y_stride, f[r]);
}

INLINE void tile_4(int rows, const struct matrix *w, const uint8_t *record, int accumulate, const struct tile *t) {
    vf f[TILE_ROWS_4], d, m;
    dot4 acc[TILE_ROWS_4];
    _Alignas(64) uint8_t room[ROOM_BYTES];
    load_sums(rows, t, accumulate, f);
    for (int g = 0; g < w->groups; g++, record += w->record_bytes) {
        UNROLL for (int line = 0; line < 320; line += 64) __builtin_prefetch(record + PREFETCH_BYTES + line);
        UNROLL for (int i = 0; i < QUADS / 2; i++) {
            quad4 low, high;
            split_quads4(record + 64 * i, room, &low, &high);
            UNROLL for (int r = 0; r < rows; r++) {
                const int8_t *a = t->a + r * t->inputs + g * GROUP + 4 * i;
                quad_in first = load_input(a), second = load_input(a + GROUP / 2);
                acc[r] = i == 0 ? dot4_first(low, first) : dot4_add(acc[r], low, first);
                acc[r] = dot4_add(acc[r], high, second);
            }
        }
        load_scales(w, record + 256, &d, &m);
        UNROLL for (int r = 0; r < rows; r++) f[r] = with_group(f[r], dot4_sum(acc[r]), d, m, t, r, g);
    }
    store_sums(rows, t, f);
}

INLINE void tile_8(int rows, const struct matrix *w, const uint8_t *record, int accumulate, const struct tile *t) {
    vf f[TILE_ROWS_8], d, m;
    dot8 acc[TILE_ROWS_8];
    _Alignas(64) uint8_t room[ROOM_BYTES];
    load_sums(rows, t, accumulate, f);
    for (int g = 0; g < w->groups; g++, record += w->record_bytes) {
        UNROLL for (int line = 0; line < 576; line += 64) __builtin_prefetch(record + PREFETCH_BYTES + line);
        UNROLL for (int i = 0; i < QUADS; i++) {
            quad8 q = split_quad8(record + 64 * i, room);
            UNROLL for (int r = 0; r < rows; r++) {
                quad_in a = load_input(t->a + r * t->inputs + g * GROUP + 4 * i);
                acc[r] = i == 0 ? dot8_first(q, a) : dot8_add(acc[r], q, a);
            }
        }
        load_scales(w, record + 512, &d, &m);
        UNROLL for (int r = 0; r < rows; r++) f[r] = with_group(f[r], dot8_sum(acc[r]), d, m, t, r, g);
    }
    store_sums(rows, t, f);
}

/* One function for each number of rows, so that all of a tile is in registers. */
typedef void (*tile_kernel)(const struct matrix *, const uint8_t *, int, const struct tile *);
#define TILE(bits, rows)                                                                                       \
    static __attribute__((noinline)) void tile_##bits##_##rows(const struct matrix *w, const uint8_t *record, \
                                                               int accumulate, const struct tile *t) {        \
        tile_##bits(rows, w, record, accumulate, t);                                                          \
    }
#define TILES_3(bits) TILE(bits, 1) TILE(bits, 2) TILE(bits, 3)
#define TILES_4(bits) TILES_3(bits) TILE(bits, 4)
#define TILES_5(bits) TILES_4(bits) TILE(bits, 5)
#define TILES_6(bits) TILES_5(bits) TILE(bits, 6)
#define TILES_12(bits) \
    TILES_6(bits) TILE(bits, 7) TILE(bits, 8) TILE(bits, 9) TILE(bits, 10) TILE(bits, 11) TILE(bits, 12)
#define NAMES_3(bits) NULL, tile_##bits##_1, tile_##bits##_2, tile_##bits##_3
#define NAMES_4(bits) NAMES_3(bits), tile_##bits##_4
#define NAMES_5(bits) NAMES_4(bits), tile_##bits##_5
#define NAMES_6(bits) NAMES_5(bits), tile_##bits##_6
#define NAMES_12(bits)                                                                                      \
    NAMES_6(bits), tile_##bits##_7, tile_##bits##_8, tile_##bits##_9, tile_##bits##_10, tile_##bits##_11, \
        tile_##bits##_12
#define PASTE(a, b) a##b
#define UP_TO(list, rows) PASTE(list, rows)

UP_TO(TILES_, TILE_ROWS_4)(4)
UP_TO(TILES_, TILE_ROWS_8)(8)
static const tile_kernel kernels_4[] = {UP_TO(NAMES_, TILE_ROWS_4)(4)};
static const tile_kernel kernels_8[] = {UP_TO(NAMES_, TILE_ROWS_8)(8)};

/* Rows [first, last) against one panel, in tiles of nearly equal height. */
static void multiply_panel(const struct product *job, int panel, int first, int last) {
    const struct matrix *w = job->w;
    const tile_kernel *kernels = w->bits == 4 ? kernels_4 : kernels_8;
    const uint8_t *records = w->data + (size_t)panel * w->groups * w->record_bytes;
    int most = w->bits == 4 ? TILE_ROWS_4 : TILE_ROWS_8, tiles = (last - first + most - 1) / most;
    for (int row = first; tiles > 0; tiles--) {
        int rows = (last - row + tiles - 1) / tiles;
        struct tile t = tile_at(job, panel, row);
        kernels[rows](w, records, job->accumulate, &t);
        row += rows;
    }
}

void KERNEL(multiply)(const struct product *job, int first_panel, int last_panel) {
    int rows = job->x->rows, block = ROWS_IN_CACHE_BYTES / job->w->inputs;
    if (block < 4 * TILE_ROWS_4) block = 4 * TILE_ROWS_4;
    for (int first = 0; first < rows; first += block)
        for (int panel = first_panel; panel < last_panel; panel++)
            multiply_panel(job, panel, first, first + block < rows ? first + block : rows);
}

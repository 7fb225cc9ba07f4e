/* Y (+)= X W^T for 8-bit activations and packed weights: the one place where matrices are multiplied.
 *
 * Every output element is one chain of fused multiply-adds over the groups in ascending order, whatever the number of
 * rows, threads or chunks: a row's result is the same bits alone and in any batch.
 *
 * A thread takes panels. It unpacks a run of groups of one panel into a working panel that fits the L1 cache, then
 * passes all rows over it, a tile of rows at a time so that each loaded weight is used several times.
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

#define WORKING_QUAD_BYTES 12288 /* 4-bit and 8-bit runs both stay within about half of a 32 KiB L1 cache */
#define MAX_RUN_GROUPS (WORKING_QUAD_BYTES / (QUADS * QUAD_BYTES_4))
#define MAX_RUN_GROUPS_8 (2 * WORKING_QUAD_BYTES / (QUADS * QUAD_BYTES_8))
#define ROWS_IN_CACHE_BYTES (192 * 1024)
#define PREFETCH_BYTES 3072

struct working_panel {
    _Alignas(64) uint8_t quads[2 * WORKING_QUAD_BYTES];
    _Alignas(64) float d[48 * PANEL];
    _Alignas(64) float m[48 * PANEL];
};
_Static_assert(sizeof(struct working_panel) <= KERNEL_SCRATCH_BYTES, "scratch of a thread is too small");
_Static_assert(MAX_RUN_GROUPS <= 48 && MAX_RUN_GROUPS_8 <= 48, "scales of a run do not fit");

INLINE void unpack_scales(const struct matrix *w, const uint8_t *from, float *d, float *m) {
    if (w->wide_scales) {
        vf_store(d, vf_load((const float *)from));
        if (w->has_min) vf_store(m, vf_load((const float *)from + PANEL));
    } else {
        vf_store(d, vf_load_half((const uint16_t *)from));
        if (w->has_min) vf_store(m, vf_load_half((const uint16_t *)from + PANEL));
    }
    if (!w->has_min) vf_store(m, vf_scale(vf_load(d), (float)-w->zero));
}

/* Groups [first, first + count) of one panel. Prefetches what will be unpacked next. */
static void unpack_run(const struct matrix *w, int panel, int first, int count, struct working_panel *to) {
    const uint8_t *from = w->data + ((size_t)panel * w->groups + first) * w->record_bytes;
    for (int g = 0; g < count; g++, from += w->record_bytes) {
        for (size_t line = 0; line < w->record_bytes; line += 64) __builtin_prefetch(from + PREFETCH_BYTES + line);
        if (w->bits == 4) {
            uint8_t *quads = to->quads + (size_t)g * QUADS * QUAD_BYTES_4;
            UNROLL for (int i = 0; i < QUADS / 2; i++)
                unpack_quads4(from + 64 * i, quads + i * QUAD_BYTES_4, quads + (i + QUADS / 2) * QUAD_BYTES_4);
            unpack_scales(w, from + 256, to->d + g * PANEL, to->m + g * PANEL);
        } else {
            uint8_t *quads = to->quads + (size_t)g * QUADS * QUAD_BYTES_8;
            UNROLL for (int i = 0; i < QUADS; i++) unpack_quad8(from + 64 * i, quads + i * QUAD_BYTES_8);
            unpack_scales(w, from + 512, to->d + g * PANEL, to->m + g * PANEL);
        }
    }
}

/* Where a tile of rows starts: activations, their scales and sums, and the 16 outputs of each row. */
struct tile {
    const int8_t *a;
    const float *scale, *sum;
    size_t inputs, groups;
    float *y;
    size_t y_stride;
};

/* y += the group's share: (q . a) * d * s + m * sum. The same three operations in every kernel. */
INLINE void add_group(float *y, vi dot, vf d, vf m, float scale, float sum) {
    vf f = vf_fma(vf_from_int(dot), vf_scale(d, scale), vf_load(y));
    vf_store(y, vf_fma(m, vf_set(sum), f));
}

INLINE void tile_4(int rows, const struct working_panel *w, int count, const struct tile *t) {
    const uint8_t *quads = w->quads;
    for (int g = 0; g < count; g++, quads += QUADS * QUAD_BYTES_4) {
        dot4 acc[TILE_ROWS_4];
        UNROLL for (int i = 0; i < QUADS; i++) {
            quad4 q = load_quad4(quads + i * QUAD_BYTES_4);
            UNROLL for (int r = 0; r < rows; r++) {
                quad_in a = load_input(t->a + r * t->inputs + g * GROUP + 4 * i);
                acc[r] = i == 0 ? dot4_first(q, a) : dot4_add(acc[r], q, a);
            }
        }
        vf d = vf_load(w->d + g * PANEL), m = vf_load(w->m + g * PANEL);
        UNROLL for (int r = 0; r < rows; r++)
            add_group(t->y + r * t->y_stride, dot4_sum(acc[r]), d, m, t->scale[r * t->groups + g], t->sum[r * t->groups + g]);
    }
}

INLINE void tile_8(int rows, const struct working_panel *w, int count, const struct tile *t) {
    const uint8_t *quads = w->quads;
    for (int g = 0; g < count; g++, quads += QUADS * QUAD_BYTES_8) {
        dot8 acc[TILE_ROWS_8];
        UNROLL for (int i = 0; i < QUADS; i++) {
            quad8 q = load_quad8(quads + i * QUAD_BYTES_8);
            UNROLL for (int r = 0; r < rows; r++) {
                quad_in a = load_input(t->a + r * t->inputs + g * GROUP + 4 * i);
                acc[r] = i == 0 ? dot8_first(q, a) : dot8_add(acc[r], q, a);
            }
        }
        vf d = vf_load(w->d + g * PANEL), m = vf_load(w->m + g * PANEL);
        UNROLL for (int r = 0; r < rows; r++)
            add_group(t->y + r * t->y_stride, dot8_sum(acc[r]), d, m, t->scale[r * t->groups + g], t->sum[r * t->groups + g]);
    }
}

typedef void (*tile_kernel)(const struct working_panel *, int, const struct tile *);
#define TILE(bits, rows)                                                                                  \
    static __attribute__((noinline)) void tile_##bits##_##rows(const struct working_panel *w, int count, \
                                                               const struct tile *t) {                   \
        tile_##bits(rows, w, count, t);                                                                  \
    }
#define TILES_2(bits) TILE(bits, 1) TILE(bits, 2)
#define TILES_3(bits) TILES_2(bits) TILE(bits, 3)
#define TILES_4(bits) TILES_3(bits) TILE(bits, 4)
#define TILES_6(bits) TILES_4(bits) TILE(bits, 5) TILE(bits, 6)
#define TILES_12(bits) \
    TILES_6(bits) TILE(bits, 7) TILE(bits, 8) TILE(bits, 9) TILE(bits, 10) TILE(bits, 11) TILE(bits, 12)
#define NAMES_2(bits) NULL, tile_##bits##_1, tile_##bits##_2
#define NAMES_3(bits) NAMES_2(bits), tile_##bits##_3
#define NAMES_4(bits) NAMES_3(bits), tile_##bits##_4
#define NAMES_6(bits) NAMES_4(bits), tile_##bits##_5, tile_##bits##_6
#define NAMES_12(bits)                                                                                      \
    NAMES_6(bits), tile_##bits##_7, tile_##bits##_8, tile_##bits##_9, tile_##bits##_10, tile_##bits##_11, \
        tile_##bits##_12
#define PASTE(a, b) a##b
#define UP_TO(list, rows) PASTE(list, rows)

UP_TO(TILES_, TILE_ROWS_4)(4)
UP_TO(TILES_, TILE_ROWS_8)(8)
static const tile_kernel kernels_4[] = {UP_TO(NAMES_, TILE_ROWS_4)(4)};
static const tile_kernel kernels_8[] = {UP_TO(NAMES_, TILE_ROWS_8)(8)};

/* Rows [first, last) over the unpacked run that starts at group `first_group`, in tiles of nearly equal height. */
static void multiply_run(const struct product *job, const struct working_panel *w, int panel, int first_group, int count,
                         int first, int last) {
    const struct activations *x = job->x;
    const tile_kernel *kernels = job->w->bits == 4 ? kernels_4 : kernels_8;
    int most = job->w->bits == 4 ? TILE_ROWS_4 : TILE_ROWS_8;
    int tiles = (last - first + most - 1) / most;
    for (int row = first; tiles > 0; tiles--) {
        int rows = (last - row + tiles - 1) / tiles;
        struct tile t = {
            .a = x->a + (size_t)row * x->inputs + (size_t)first_group * GROUP,
            .scale = x->scale + (size_t)row * x->groups + first_group,
            .sum = x->sum + (size_t)row * x->groups + first_group,
            .inputs = (size_t)x->inputs,
            .groups = (size_t)x->groups,
            .y = job->y + row * job->y_stride + (ptrdiff_t)panel * PANEL,
            .y_stride = (size_t)job->y_stride,
        };
        kernels[rows](w, count, &t);
        row += rows;
    }
}

static void clear_panel(const struct product *job, int panel, int first, int last) {
    for (int row = first; row < last; row++) vf_store(job->y + row * job->y_stride + (ptrdiff_t)panel * PANEL, vf_set(0));
}

/* All runs of one panel, or only run `outer` of it, for rows [first, last). */
static void multiply_panel(const struct product *job, int panel, int outer, int runs, int first, int last,
                           struct working_panel *working) {
    const struct matrix *w = job->w;
    for (int run = outer < 0 ? 0 : outer; run < (outer < 0 ? runs : outer + 1); run++) {
        int group = (int)((int64_t)w->groups * run / runs);
        int count = (int)((int64_t)w->groups * (run + 1) / runs) - group;
        unpack_run(w, panel, group, count, working);
        multiply_run(job, working, panel, group, count, first, last);
    }
}

void KERNEL(multiply)(const struct product *job, int first_panel, int last_panel, void *scratch) {
    const struct matrix *w = job->w;
    int most = w->bits == 4 ? MAX_RUN_GROUPS : MAX_RUN_GROUPS_8, rows = job->x->rows;
    int runs = (w->groups + most - 1) / most;
    if (!job->accumulate)
        for (int panel = first_panel; panel < last_panel; panel++) clear_panel(job, panel, 0, rows);
    /* Few rows: their activations stay in the L2 cache, and a panel is streamed through once, in memory order. Many: one
     * run of groups at a time over all panels, so that the activations of that run stay in the cache instead. */
    if ((size_t)rows * w->inputs <= ROWS_IN_CACHE_BYTES) {
        for (int panel = first_panel; panel < last_panel; panel++)
            multiply_panel(job, panel, -1, runs, 0, rows, scratch);
        return;
    }
    int block = ROWS_IN_CACHE_BYTES / (most * GROUP);
    for (int first = 0; first < rows; first += block)
        for (int run = 0; run < runs; run++)
            for (int panel = first_panel; panel < last_panel; panel++)
                multiply_panel(job, panel, run, runs, first, first + block < rows ? first + block : rows, scratch);
}

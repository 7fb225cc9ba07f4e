/* What a model holds between steps. Internal to the library. */
#ifndef MEGALITH_MODEL_H
#define MEGALITH_MODEL_H

#include "kernels.h"
#include "pack.h"
#include "pool.h"

struct layer {
    struct matrix matrices[NATIVE_EMBED]; /* q, k, v, o, gate, up, down */
    float *vectors[NATIVE_TENSORS - NATIVE_MATRICES];
    int32_t window, rope;
};

/* Memory for one step, allocated once for max_rows. */
struct workspace {
    float *x;      /* [M, hidden] the residual stream */
    float *y;      /* [M, wide] q, k and v; then gate and up; then a post-normed block's output */
    float *mixed;  /* [M, heads * head_dim] attention's output */
    float *cosine, *sine; /* [2, M, head_dim / 2] */
    float *normed;        /* [threads, widest row] */
    float *logits;        /* [LOGIT_ROWS, padded vocabulary] */
    float *scores;        /* [threads, TILE_QUERIES, max positions] */
    float *sample;        /* [threads, SAMPLE_WORK_FLOATS] */
    struct activations a; /* room for the widest input of a matrix */
    struct tile_rows *tiles; /* [M] */
    size_t wide, score_stride, logit_stride, widest;
};

/* Rows [first, first + rows) of one sequence: one attention tile for each KV head and part of its query heads. */
struct tile_rows { int32_t sequence, first, rows; };

#define LOGIT_ROWS 32

struct native_model {
    struct native_config config; /* its pointers are not used after creation */
    const struct kernels *kernels;
    struct pool *pool;
    struct layer *layers;
    struct matrix embed, head_matrix;
    const struct matrix *head; /* the embedding when tied */
    struct native_window window; /* zeros: all weights stay in memory */
    int32_t held_piece;   /* of the window, while a step has one */
    const uint8_t *held;  /* where it lies; NULL: none */
    float *final_norm;
    float *rope_frequencies; /* [2, head_dim / 2] */
    struct arena *arena;     /* panels and vectors */
    uint16_t *kv, *host_kv;
    size_t block_elements, chunk_elements; /* bfloat16 values of a block; of K of one head's chunk */
    struct workspace work;
    int64_t weight_bytes, workspace_bytes;
    int64_t phase_ns[NATIVE_PHASES];
    char message[NATIVE_MESSAGE];
};

/* Pages of zeros, 2 MiB-aligned and asked to be huge, or NULL. */
void *pages_map(size_t bytes);
void pages_unmap(void *pages, size_t bytes);

/* Put a formatted message into `to` (NATIVE_MESSAGE bytes) and return `code`. */
int fail(char *to, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* NULL if this library or machine lacks it. `name` NULL means the best. */
const struct kernels *kernels_by_name(const char *name);

int workspace_create(native_model *model);
void workspace_destroy(native_model *model);

/* model.c: outputs and inputs that a tensor must have (inputs 0: a vector), and where a matrix is kept. */
void expected_shape(const struct native_config *c, int tensor, int *outputs, int *inputs);
int is_top(int tensor);
struct matrix *matrix_slot(native_model *model, int layer, int tensor);

/* window.c: the one piece that is held is given back for another (NULL: refused), or for none; a matrix's spans freed. */
const uint8_t *piece_hold(native_model *model, int piece);
void piece_drop(native_model *model);
void spans_free(struct matrix *w);

/* products.c: y[i] (+)= a W[i]^T for `count` matrices and the rows of work.a. The piece of a window that did not come, or -1;
 * adds to waited_ns the time that was spent waiting for pieces. */
int products_run(native_model *model, int count, const struct matrix *const *w, float *const *y, size_t stride,
                 int accumulate, int64_t *waited_ns);
int64_t now_ns(void);

/* check.c: everything that could make a step read or write outside what it owns. */
int check_config(const struct native_config *config, char *message);
int check_batch(native_model *model, const struct native_batch *batch);
int check_sampling(native_model *model, int32_t outputs, const struct native_sampling *sampling,
                   const struct native_result *result);
int check_sampling_arrays(int32_t outputs, int32_t vocab, const struct native_sampling *sampling,
                          const struct native_result *result, char *message);

#endif

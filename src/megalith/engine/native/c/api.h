/* The C interface that binding.py calls. Plain structs and pointers; every call checks its arguments and returns a code.
 *
 * A model is not thread-safe: one call at a time. No call keeps a pointer that it was given. Nothing is global.
 * Letters in the comments: M rows of a step, S sequences, N output rows, W block-table width, V vocabulary.
 */
#ifndef MEGALITH_API_H
#define MEGALITH_API_H

#include <stdint.h>

#define NATIVE_API __attribute__((visibility("default")))

enum native_code {
    NATIVE_OK = 0,
    NATIVE_BAD_ARGUMENT = 1, /* the message says which and why; nothing was changed */
    NATIVE_NO_MEMORY = 2,
    NATIVE_NO_TOKEN = 3, /* an output row has no token to give: all masked, or its logits are not numbers */
    NATIVE_NO_ISA = 4,   /* this library or this machine lacks the instruction set asked for */
    NATIVE_NO_WEIGHTS = 5, /* a callback of the window refused; the step ended there, and its rows have no result */
};

enum native_format {
    NATIVE_F32, NATIVE_F16, NATIVE_BF16, NATIVE_Q8_0, NATIVE_Q4_0, NATIVE_Q4_1, NATIVE_Q5_0, NATIVE_Q5_1,
    NATIVE_Q4_K, NATIVE_Q5_K, NATIVE_Q6_K,
    NATIVE_BIPOLAR1, NATIVE_BIPOLAR2, NATIVE_BIPOLAR3, NATIVE_BIPOLAR4, NATIVE_BIPOLAR5, NATIVE_BIPOLAR6, NATIVE_BIPOLAR7,
    NATIVE_BIPOLAR8,
    NATIVE_FORMATS
};

/* Tensors of a model. Layer -1 holds those before and after the layers. */
enum native_tensor {
    NATIVE_Q, NATIVE_K, NATIVE_V, NATIVE_O, NATIVE_GATE, NATIVE_UP, NATIVE_DOWN, /* matrices of a layer */
    NATIVE_EMBED, NATIVE_HEAD,                                                   /* matrices of layer -1 */
    NATIVE_MATRICES,
    NATIVE_ATTN_NORM = NATIVE_MATRICES, NATIVE_FFN_NORM, NATIVE_POST_ATTN_NORM, NATIVE_POST_FFN_NORM,
    NATIVE_Q_NORM, NATIVE_K_NORM, NATIVE_Q_BIAS, NATIVE_K_BIAS, NATIVE_V_BIAS, /* float vectors of a layer */
    NATIVE_FINAL_NORM,                                                        /* float vector of layer -1 */
    NATIVE_TENSORS
};

enum native_activation { NATIVE_SILU, NATIVE_GELU_TANH };

#define NATIVE_TOP 20 /* columns of top_ids and top_logprobs */
#define NATIVE_MESSAGE 256

struct native_config {
    int32_t num_layers, hidden, num_heads, num_kv_heads, head_dim, ffn, vocab;
    int32_t activation;
    int32_t tied_embeddings;
    int32_t qk_norm, post_norms, qkv_bias;
    float norm_eps, attention_scale, embedding_scale;
    const int32_t *windows; /* [num_layers] keys seen by each layer, itself included; 0: all */
    const int32_t *ropes;   /* [num_layers] 0 or 1: row of rope_frequencies */
    const float *rope_frequencies; /* [2, head_dim / 2] radians a position */
    int32_t max_context;    /* positions are below it */
    int32_t block_tokens, num_blocks, num_host_blocks;
    int32_t max_rows;
    int32_t threads;
    int32_t activation_bits; /* of what bipolar matrices are multiplied with; 0: the model has none */
    const char *isa; /* NULL: the best that library and machine have */
};

struct native_batch {
    int32_t num_rows, num_sequences, num_outputs, table_width;
    const int32_t *tokens;       /* [M] */
    const int32_t *positions;    /* [M], ascending by one within a sequence */
    const int32_t *row_starts;   /* [S + 1] */
    const int32_t *block_tables; /* [S, W] */
    const int32_t *output_rows;  /* [N], ascending */
};

/* As engine.batch.SamplingBatch says. */
struct native_sampling {
    const float *temperature;
    const int32_t *top_k;
    const float *top_p, *min_p, *repetition, *presence, *frequency;
    const uint64_t *seed, *draw;
    const int32_t *seen_starts, *seen_ids, *seen_counts;
    const int32_t *bias_starts, *bias_ids;
    const float *bias_values;
    const int32_t *mask_rows;
    const uint32_t *masks;
    const int32_t *targets, *num_logprobs;
    int32_t num_seen, num_bias, num_masks, mask_words;
};

struct native_result {
    int32_t *tokens;       /* [N] */
    float *logprobs;       /* [N] or NULL */
    int32_t *top_ids;      /* [N, NATIVE_TOP] or NULL */
    float *top_logprobs;   /* [N, NATIVE_TOP] or NULL */
};

enum native_phase {
    NATIVE_PHASE_EMBED, NATIVE_PHASE_NORM, NATIVE_PHASE_QKV, NATIVE_PHASE_ROPE, NATIVE_PHASE_ATTENTION,
    NATIVE_PHASE_OUT, NATIVE_PHASE_GATE_UP, NATIVE_PHASE_ACTIVATION, NATIVE_PHASE_DOWN, NATIVE_PHASE_HEAD,
    NATIVE_PHASE_SAMPLE, NATIVE_PHASE_WAIT, /* for weights of a window */
    NATIVE_PHASES
};

struct native_memory { int64_t weights, kv, host_kv, activations; };

typedef struct native_model native_model;
typedef struct native_matrix native_matrix;

/* Weights that are not in memory all the time (window.c). Matrices are cut into spans of whole panels, and spans lie in
 * pieces. A step uses q, k, v, o, gate, up and down of each layer, then the head for every LOGIT_ROWS outputs; it takes one
 * piece at a time, on the thread that called it, and the next one when a span lies in another. */
struct native_window {
    const uint8_t *(*acquire)(int32_t piece); /* where it lies now, 64-byte aligned; NULL ends the step */
    void (*release)(int32_t piece);
    int32_t (*embed)(const int32_t *tokens, int32_t rows, float *x); /* x [rows, hidden], scaled; 0 ends the step */
};

/* "sizeof" of every struct above, for the binding to compare with its own. Returns how many were written (at most `room`). */
NATIVE_API int32_t native_struct_sizes(int32_t *sizes, int32_t room);
/* Comma-separated names of the instruction sets in this library, best first; `usable` keeps those this machine has. */
NATIVE_API const char *native_isas(int32_t usable);

NATIVE_API int32_t native_create(const struct native_config *config, native_model **model, char *message);
NATIVE_API int32_t native_load(native_model *model, int32_t layer, int32_t tensor, int32_t format, const uint8_t *raw,
                               int64_t raw_bytes, int32_t outputs, int32_t inputs);
/* Instead of native_load, before native_ready: panels of a matrix from `first_panel` on are at `offset` of a piece. Spans
 * of a matrix are attached in order. */
NATIVE_API int32_t native_attach(native_model *model, int32_t layer, int32_t tensor, int32_t format, int32_t piece,
                                 int32_t first_panel, int64_t offset);
/* Who gives the pieces; the functions must outlive the model. */
NATIVE_API int32_t native_set_window(native_model *model, const struct native_window *window);
/* After the last tensor: says which one is missing. */
NATIVE_API int32_t native_ready(native_model *model);
NATIVE_API int32_t native_step(native_model *model, const struct native_batch *batch, const struct native_sampling *sampling,
                               const struct native_result *result);
/* Raw logits [N, V] of the output rows. */
NATIVE_API int32_t native_logits(native_model *model, const struct native_batch *batch, float *logits);
/* Copy blocks pair by pair between the device pool and the host pool. */
NATIVE_API int32_t native_swap(native_model *model, int32_t to_host, const int32_t *device_blocks, const int32_t *host_blocks,
                               int32_t count);
NATIVE_API const char *native_message(const native_model *model);
NATIVE_API const char *native_isa(const native_model *model);
NATIVE_API int64_t native_block_bytes(const native_model *model);
NATIVE_API void native_memory_bytes(const native_model *model, struct native_memory *memory);
/* Nanoseconds spent in each phase since the last reset. */
NATIVE_API void native_phase_ns(native_model *model, int64_t *ns, int32_t reset);
NATIVE_API void native_destroy(native_model *model);

/* Single kernels, for tests and micro-benchmarks. */
NATIVE_API int32_t native_matrix_create(int32_t format, const uint8_t *raw, int64_t raw_bytes, int32_t outputs, int32_t inputs,
                                        native_matrix **matrix);
NATIVE_API void native_matrix_destroy(native_matrix *matrix);
NATIVE_API int64_t native_matrix_bytes(const native_matrix *matrix);
NATIVE_API int32_t native_matrix_row(const native_matrix *matrix, int32_t row, float *out);
/* Bytes of the panels of a matrix, or -1 for a format or shape that cannot be. */
NATIVE_API int64_t native_packed_bytes(int32_t format, int32_t outputs, int32_t inputs);
/* Pack rows of a file into panels at `to`, which has native_packed_bytes; a matrix may be packed 16 n rows at a time. */
NATIVE_API int32_t native_pack(int32_t format, const uint8_t *raw, int64_t raw_bytes, int32_t outputs, int32_t inputs,
                               uint8_t *to, int64_t to_bytes);
/* Column 0..15 of one panel as floats, times `scale`. */
NATIVE_API int32_t native_panel_row(int32_t format, int32_t inputs, const uint8_t *panel, int32_t column, float scale,
                                    float *out);
/* Quantise x [rows, inputs] and multiply: y [rows, padded outputs]. */
NATIVE_API int32_t native_matrix_multiply(const native_matrix *matrix, const char *isa, const float *x, int32_t rows, float *y);
/* x [rows, inputs] to a [rows, inputs], scale and sum [rows, inputs / 32]. */
NATIVE_API int32_t native_quantize(const char *isa, const float *x, int32_t rows, int32_t inputs, int8_t *a, float *scale,
                                   float *sum);
/* The same for bipolar matrices: planes [rows, inputs / 64, bits, 2, 2] (matrix.h), scale [rows, inputs / 64]. */
NATIVE_API int32_t native_quantize_planes(const char *isa, const float *x, int32_t rows, int32_t inputs, int32_t bits,
                                          uint32_t *planes, float *scale);
/* Activations in planes times a bipolar matrix: y [rows, padded outputs]. */
NATIVE_API int32_t native_multiply_planes(const native_matrix *matrix, const char *isa, const uint32_t *planes,
                                          const float *scale, int32_t bits, int32_t rows, float *y);
/* Sample one row of logits [V]. */
NATIVE_API int32_t native_sample(const char *isa, const float *logits, int32_t vocab, const struct native_sampling *sampling,
                                 const struct native_result *result);

#endif

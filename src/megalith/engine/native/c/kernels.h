/* The kernels that exist once for each instruction set, and the table through which a model calls them.
 *
 * Each kernel file is compiled once for each instruction set with -DMEGALITH_ISA=avx2 and the like, which makes
 * multiply multiply_avx2. Kernels hold no state and never fail: whoever calls them has checked everything.
 */
#ifndef MEGALITH_KERNELS_H
#define MEGALITH_KERNELS_H

#include "api.h"
#include "matrix.h"

#define KERNEL_JOIN(name, isa) name##_##isa
#define KERNEL_EXPAND(name, isa) KERNEL_JOIN(name, isa)
#define KERNEL(name) KERNEL_EXPAND(name, MEGALITH_ISA)

#define CHUNK_TOKENS 16 /* tokens whose K (or V) of one head lie together */
#define TILE_QUERIES 24 /* most query vectors of one attention tile */

/* Some rows of one sequence against the K and V of one head.
 *
 * K of a chunk is [head_dim / 2][16 tokens][2] bfloat16, V is [8 token pairs][head_dim][2]: one dword load gives lanes of
 * tokens (K) or of dimensions (V), each with two consecutive elements, and no product needs a sum across lanes.
 */
struct attention_tile {
    const float *q; /* already scaled; row r, head h at r * q_stride + h * head_dim */
    float *out;     /* the same with out_stride */
    size_t q_stride, out_stride;
    int rows, heads, head_dim;
    const int32_t *positions; /* [rows] */
    int window;               /* keys seen, itself included; 0: all */
    const uint16_t *pool;     /* chunk c of the sequence: pool + table[c / chunks_in_block] * block_elements */
    const int32_t *table;     /*   + (c % chunks_in_block) * chunk_elements; K there, V at + v_offset */
    size_t block_elements, chunk_elements, v_offset;
    int chunks_in_block;
    float *scores; /* [rows * heads][score_stride] */
    size_t score_stride;
};

/* One output row to be sampled. `work` has SAMPLE_WORK_FLOATS(vocab): adjusted logits, then ranked candidates. */
#define SAMPLE_WORK_FLOATS(vocab) (3 * (((size_t)(vocab) + 15) / 16 * 16))
struct sample_row {
    const struct native_sampling *how;
    const struct native_result *to;
    int index; /* n */
    int vocab;
    const float *logits; /* raw; readable up to a multiple of 16 */
    float *work;
};

struct kernels {
    const char *name;
    /* Panels [first, last) of a product. */
    void (*multiply)(const struct product *job, int first, int last);
    /* Row i of x to row i of the activations: 8 bits with one scale for each group of 32. */
    void (*quantize)(const float *x, int row, const struct activations *to);
    /* The same for bipolar matrices and activations of plane_bits bits, with one scale for each group of 64. */
    void (*multiply_planes)(const struct product *job, int first, int last);
    void (*quantize_planes)(const float *x, int row, const struct activations *to);
    /* out = x / rms(x) * weight; n is a multiple of 16. In place when out == x. */
    void (*norm)(const float *x, const float *weight, int n, float eps, float *out);
    /* Rotate pairs (i, i + n / 2) by angles with these cosines and sines, then multiply by `scale`. */
    void (*rope)(float *x, const float *cosine, const float *sine, int n, float scale);
    /* gate = act(gate) * up */
    void (*activate)(int activation, float *gate, const float *up, int n);
    void (*add)(float *x, const float *y, int n);
    /* K and V of one token and head into their chunk, at token `slot` of 16. */
    void (*store_kv)(const float *k, const float *v, int head_dim, uint16_t *k_chunk, uint16_t *v_chunk, int slot);
    void (*attend)(const struct attention_tile *tile);
    /* NATIVE_OK or NATIVE_NO_TOKEN */
    int (*sample)(const struct sample_row *row);
};

#endif

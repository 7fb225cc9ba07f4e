/* One step: ragged rows of tokens in, K and V written, sampled tokens (or logits) out.
 *
 * Every phase is a task over rows, panels or attention tiles, so that one thread or many do the same arithmetic on the
 * same numbers. In the last layer only the output rows go on after attention.
 */
#include "model.h"

#include <math.h>
#include <string.h>

#define ROWS_PER_ITEM 4

/* What the tasks of one step share. */
struct step {
    native_model *model;
    const struct native_config *c;
    const struct native_batch *batch;
    const struct native_sampling *sampling;
    const struct native_result *result;
    float *logits_out; /* instead of sampling */
    struct layer *layer;
    int index;   /* of the layer */
    int rows;    /* in x now */
    int tiles, head_parts; /* head_parts: tiles that share one KV head because its query heads are many */
    int groups_of_32, planes; /* which activations the matrices want that read the row at hand */
    int first_output, outputs; /* of the run of output rows that is sampled now */
    int failed_output, lost_piece; /* -1: none */
    int64_t clock;
};

static void end_phase(struct step *s, int phase) {
    int64_t now = now_ns();
    s->model->phase_ns[phase] += now - s->clock;
    s->clock = now;
}

/* ---- rows ---- */

typedef void (*row_task)(struct step *s, int row, int worker);
struct row_job { struct step *s; row_task task; int rows; };

static void run_row_item(void *argument, int item, int worker) {
    struct row_job *job = argument;
    int last = (item + 1) * ROWS_PER_ITEM;
    for (int row = item * ROWS_PER_ITEM; row < last && row < job->rows; row++) job->task(job->s, row, worker);
}

static void each_row(struct step *s, row_task task, int rows) {
    struct row_job job = {s, task, rows};
    pool_run(s->model->pool, run_row_item, &job, (rows + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM);
}

static float *vector(const struct step *s, int tensor) { return s->layer->vectors[tensor - NATIVE_MATRICES]; }

static void embed_row(struct step *s, int row, int worker) {
    native_model *m = s->model;
    int half = s->c->head_dim / 2, position = s->batch->positions[row];
    (void)worker;
    if (m->window.embed == NULL)
        matrix_row(&m->embed, s->batch->tokens[row], s->c->embedding_scale, m->work.x + (size_t)row * s->c->hidden);
    for (int rope = 0; rope < 2; rope++) {
        size_t at = ((size_t)rope * s->c->max_rows + row) * half;
        for (int i = 0; i < half; i++) {
            float angle = (float)position * m->rope_frequencies[rope * half + i];
            m->work.cosine[at + i] = cosf(angle);
            m->work.sine[at + i] = sinf(angle);
        }
    }
}

/* Row `row` of the activations, as the matrices want it that read it. */
static void quantize(struct step *s, int row, const float *x) {
    if (s->groups_of_32) s->model->kernels->quantize(x, row, &s->model->work.a);
    if (s->planes) s->model->kernels->quantize_planes(x, row, &s->model->work.a);
}

/* The activations of the matrices that read `row` of x through the norm `weight`. */
static void norm_and_quantize(struct step *s, int row, int worker, const float *weight) {
    native_model *m = s->model;
    float *normed = m->work.normed + (size_t)worker * m->work.widest;
    m->kernels->norm(m->work.x + (size_t)row * s->c->hidden, weight, s->c->hidden, s->c->norm_eps, normed);
    quantize(s, row, normed);
}

static void attn_norm_row(struct step *s, int row, int worker) {
    norm_and_quantize(s, row, worker, vector(s, NATIVE_ATTN_NORM));
}
static void ffn_norm_row(struct step *s, int row, int worker) {
    norm_and_quantize(s, row, worker, vector(s, NATIVE_FFN_NORM));
}
static void final_norm_row(struct step *s, int row, int worker) {
    norm_and_quantize(s, row, worker, s->model->final_norm);
}

static void quantize_mixed_row(struct step *s, int row, int worker) {
    native_model *m = s->model;
    (void)worker;
    quantize(s, row, m->work.mixed + (size_t)row * s->c->num_heads * s->c->head_dim);
}

static void activate_row(struct step *s, int row, int worker) {
    native_model *m = s->model;
    float *gate = m->work.y + (size_t)row * m->work.wide;
    (void)worker;
    m->kernels->activate(s->c->activation, gate, gate + s->c->ffn, s->c->ffn);
    quantize(s, row, gate);
}

/* x += norm(y), for models that norm what a block gives before adding it. */
static void add_post_norm(struct step *s, int row, const float *weight) {
    native_model *m = s->model;
    float *y = m->work.y + (size_t)row * m->work.wide;
    m->kernels->norm(y, weight, s->c->hidden, s->c->norm_eps, y);
    m->kernels->add(m->work.x + (size_t)row * s->c->hidden, y, s->c->hidden);
}
static void post_attn_row(struct step *s, int row, int worker) {
    (void)worker;
    add_post_norm(s, row, vector(s, NATIVE_POST_ATTN_NORM));
}
static void post_ffn_row(struct step *s, int row, int worker) {
    (void)worker;
    add_post_norm(s, row, vector(s, NATIVE_POST_FFN_NORM));
}

/* Which sequence a row belongs to; rows are few and sequences ascend, so a binary search is plenty. */
static int sequence_of(const struct native_batch *b, int row) {
    int low = 0, high = b->num_sequences;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (b->row_starts[middle] <= row) low = middle;
        else high = middle;
    }
    return low;
}

/* Where K of the first chunk of a block lies, for this layer and KV head; V follows the K of the block's chunks. */
static size_t head_offset(const struct step *s, int kv_head) {
    size_t both = 2 * (size_t)s->c->block_tokens * s->c->head_dim;
    return ((size_t)s->index * s->c->num_kv_heads + kv_head) * both;
}

static void store_row(struct step *s, int row, const float *k, const float *v) {
    native_model *m = s->model;
    const struct native_batch *b = s->batch;
    int e = s->c->head_dim, position = b->positions[row], inside = position % s->c->block_tokens;
    int block = b->block_tables[(size_t)sequence_of(b, row) * b->table_width + position / s->c->block_tokens];
    for (int h = 0; h < s->c->num_kv_heads; h++) {
        uint16_t *k_chunk = m->kv + (size_t)block * m->block_elements + head_offset(s, h) +
                            (size_t)(inside / CHUNK_TOKENS) * m->chunk_elements;
        uint16_t *v_chunk = k_chunk + (size_t)s->c->block_tokens * e;
        m->kernels->store_kv(k + (size_t)h * e, v + (size_t)h * e, e, k_chunk, v_chunk, inside % CHUNK_TOKENS);
    }
}

/* Bias, q and k norms, rotary embedding, and K and V into their block. */
static void rope_row(struct step *s, int row, int worker) {
    native_model *m = s->model;
    const struct native_config *c = s->c;
    int e = c->head_dim, q_size = c->num_heads * e, kv_size = c->num_kv_heads * e;
    float *q = m->work.y + (size_t)row * m->work.wide, *k = q + q_size, *v = k + kv_size;
    size_t angles = ((size_t)s->layer->rope * c->max_rows + row) * (e / 2);
    (void)worker;
    if (c->qkv_bias) {
        m->kernels->add(q, vector(s, NATIVE_Q_BIAS), q_size);
        m->kernels->add(k, vector(s, NATIVE_K_BIAS), kv_size);
        m->kernels->add(v, vector(s, NATIVE_V_BIAS), kv_size);
    }
    for (int h = 0; h < c->num_heads + c->num_kv_heads; h++) {
        float *head = q + (size_t)h * e; /* k follows q */
        int is_q = h < c->num_heads;
        if (c->qk_norm) m->kernels->norm(head, vector(s, is_q ? NATIVE_Q_NORM : NATIVE_K_NORM), e, c->norm_eps, head);
        m->kernels->rope(head, m->work.cosine + angles, m->work.sine + angles, e, is_q ? c->attention_scale : 1.0f);
    }
    store_row(s, row, k, v);
}

/* ---- matrices ---- */

/* As products.c says; waiting for weights of a window is a phase of its own. */
static int multiply(struct step *s, int count, const struct matrix *const *w, float *const *y, size_t stride, int rows,
                    int accumulate) {
    int64_t waited_ns = 0;
    s->model->work.a.rows = rows;
    s->lost_piece = products_run(s->model, count, w, y, stride, accumulate, &waited_ns);
    s->model->phase_ns[NATIVE_PHASE_WAIT] += waited_ns;
    s->clock += waited_ns;
    return s->lost_piece < 0;
}

/* Activations that are filled next have this width and are read by these matrices. */
static void set_inputs(struct step *s, int inputs, const struct matrix *first, int count) {
    s->groups_of_32 = s->planes = 0;
    for (const struct matrix *w = first; w < first + count; w++) *(w->planes ? &s->planes : &s->groups_of_32) = 1;
    s->model->work.a.inputs = inputs;
    s->model->work.a.groups = inputs / GROUP;
}

/* ---- attention ---- */

/* Cut sequences into tiles of rows; in the last layer, tiles without an output row are left out. */
static void cut_tiles(struct step *s, int outputs_only) {
    const struct native_batch *b = s->batch;
    int heads = s->c->num_heads / s->c->num_kv_heads, next_output = 0;
    s->head_parts = (heads + TILE_QUERIES - 1) / TILE_QUERIES;
    int most = heads >= TILE_QUERIES ? 1 : TILE_QUERIES / heads;
    s->tiles = 0;
    for (int sequence = 0; sequence < b->num_sequences; sequence++)
        for (int row = b->row_starts[sequence]; row < b->row_starts[sequence + 1];) {
            int rows = b->row_starts[sequence + 1] - row;
            if (rows > most) rows = most;
            while (next_output < b->num_outputs && b->output_rows[next_output] < row) next_output++;
            int wanted = next_output < b->num_outputs && b->output_rows[next_output] < row + rows;
            if (wanted || !outputs_only) s->model->work.tiles[s->tiles++] = (struct tile_rows){sequence, row, rows};
            row += rows;
        }
}

static void attend_item(void *argument, int item, int worker) {
    struct step *s = argument;
    native_model *m = s->model;
    const struct native_config *c = s->c;
    int parts = s->head_parts, group = c->num_heads / c->num_kv_heads;
    int part = item % parts, kv_head = item / parts % c->num_kv_heads;
    const struct tile_rows *rows = &m->work.tiles[item / parts / c->num_kv_heads];
    int first_head = group * part / parts, last_head = group * (part + 1) / parts;
    size_t head = ((size_t)kv_head * group + first_head) * c->head_dim, out_stride = (size_t)c->num_heads * c->head_dim;
    struct attention_tile tile = {
        .q = m->work.y + (size_t)rows->first * m->work.wide + head,
        .out = m->work.mixed + (size_t)rows->first * out_stride + head,
        .q_stride = m->work.wide,
        .out_stride = out_stride,
        .rows = rows->rows,
        .heads = last_head - first_head,
        .head_dim = c->head_dim,
        .positions = s->batch->positions + rows->first,
        .window = s->layer->window,
        .pool = m->kv + head_offset(s, kv_head),
        .table = s->batch->block_tables + (size_t)rows->sequence * s->batch->table_width,
        .block_elements = m->block_elements,
        .chunk_elements = m->chunk_elements,
        .v_offset = (size_t)c->block_tokens * c->head_dim,
        .chunks_in_block = c->block_tokens / CHUNK_TOKENS,
        .scores = m->work.scores + (size_t)worker * TILE_QUERIES * m->work.score_stride,
        .score_stride = m->work.score_stride,
    };
    m->kernels->attend(&tile);
}

/* Only output rows go on: move them to the front of x and of attention's output. */
static void keep_outputs(struct step *s) {
    struct workspace *w = &s->model->work;
    size_t hidden = (size_t)s->c->hidden, heads = (size_t)s->c->num_heads * s->c->head_dim;
    for (int n = 0; n < s->batch->num_outputs; n++) {
        size_t row = (size_t)s->batch->output_rows[n];
        memmove(w->x + n * hidden, w->x + row * hidden, hidden * 4);
        memmove(w->mixed + n * heads, w->mixed + row * heads, heads * 4);
    }
    s->rows = s->batch->num_outputs;
}

/* ---- a layer ---- */

static int attention_block(struct step *s) {
    native_model *m = s->model;
    const struct native_config *c = s->c;
    const struct matrix *w = s->layer->matrices;
    int q_size = c->num_heads * c->head_dim, kv_size = c->num_kv_heads * c->head_dim, last = s->index == c->num_layers - 1;
    set_inputs(s, c->hidden, &w[NATIVE_Q], 3);
    each_row(s, attn_norm_row, s->rows);
    end_phase(s, NATIVE_PHASE_NORM);
    float *y = m->work.y;
    if (!multiply(s, 3, (const struct matrix *const[]){&w[NATIVE_Q], &w[NATIVE_K], &w[NATIVE_V]},
                  (float *const[]){y, y + q_size, y + q_size + kv_size}, m->work.wide, s->rows, 0))
        return 0;
    end_phase(s, NATIVE_PHASE_QKV);
    each_row(s, rope_row, s->rows);
    end_phase(s, NATIVE_PHASE_ROPE);
    if (s->index == 0 || last) cut_tiles(s, last);
    pool_run(m->pool, attend_item, s, s->tiles * c->num_kv_heads * s->head_parts);
    if (last) keep_outputs(s);
    if (s->rows == 0) return 1; /* a step without outputs ends here */
    end_phase(s, NATIVE_PHASE_ATTENTION);
    set_inputs(s, q_size, &w[NATIVE_O], 1);
    each_row(s, quantize_mixed_row, s->rows);
    float *to = c->post_norms ? y : m->work.x;
    if (!multiply(s, 1, (const struct matrix *const[]){&w[NATIVE_O]}, &to,
                  c->post_norms ? m->work.wide : (size_t)c->hidden, s->rows, !c->post_norms))
        return 0;
    if (c->post_norms) each_row(s, post_attn_row, s->rows);
    end_phase(s, NATIVE_PHASE_OUT);
    return 1;
}

static int ffn_block(struct step *s) {
    native_model *m = s->model;
    const struct native_config *c = s->c;
    const struct matrix *w = s->layer->matrices;
    float *y = m->work.y, *to = c->post_norms ? y : m->work.x;
    set_inputs(s, c->hidden, &w[NATIVE_GATE], 2);
    each_row(s, ffn_norm_row, s->rows);
    end_phase(s, NATIVE_PHASE_NORM);
    if (!multiply(s, 2, (const struct matrix *const[]){&w[NATIVE_GATE], &w[NATIVE_UP]},
                  (float *const[]){y, y + c->ffn}, m->work.wide, s->rows, 0))
        return 0;
    end_phase(s, NATIVE_PHASE_GATE_UP);
    set_inputs(s, c->ffn, &w[NATIVE_DOWN], 1);
    each_row(s, activate_row, s->rows);
    end_phase(s, NATIVE_PHASE_ACTIVATION);
    if (!multiply(s, 1, (const struct matrix *const[]){&w[NATIVE_DOWN]}, &to,
                  c->post_norms ? m->work.wide : (size_t)c->hidden, s->rows, !c->post_norms))
        return 0;
    if (c->post_norms) each_row(s, post_ffn_row, s->rows);
    end_phase(s, NATIVE_PHASE_DOWN);
    return 1;
}

/* ---- outputs ---- */

static void sample_item(void *argument, int item, int worker) {
    struct step *s = argument;
    native_model *m = s->model;
    struct sample_row row = {
        .how = s->sampling,
        .to = s->result,
        .index = s->first_output + item,
        .vocab = s->c->vocab,
        .logits = m->work.logits + (size_t)item * m->work.logit_stride,
        .work = m->work.sample + (size_t)worker * SAMPLE_WORK_FLOATS(s->c->vocab),
    };
    if (m->kernels->sample(&row) != NATIVE_OK) __atomic_store_n(&s->failed_output, row.index, __ATOMIC_RELAXED);
}

/* Logits of LOGIT_ROWS output rows at a time, so that their memory does not grow with the batch. */
static int give_outputs(struct step *s) {
    native_model *m = s->model;
    struct activations all = m->work.a;
    float *logits = m->work.logits;
    set_inputs(s, s->c->hidden, m->head, 1);
    each_row(s, final_norm_row, s->rows);
    all.inputs = m->work.a.inputs;
    all.groups = m->work.a.groups;
    for (s->first_output = 0; s->first_output < s->rows; s->first_output += LOGIT_ROWS) {
        s->outputs = s->rows - s->first_output < LOGIT_ROWS ? s->rows - s->first_output : LOGIT_ROWS;
        m->work.a = activations_from(all, s->first_output);
        if (!multiply(s, 1, &m->head, &logits, m->work.logit_stride, s->outputs, 0)) {
            m->work.a = all;
            return 0;
        }
        end_phase(s, NATIVE_PHASE_HEAD);
        if (s->logits_out != NULL)
            for (int n = 0; n < s->outputs; n++)
                memcpy(s->logits_out + (size_t)(s->first_output + n) * s->c->vocab, logits + n * m->work.logit_stride,
                       (size_t)s->c->vocab * 4);
        else
            pool_run(m->pool, sample_item, s, s->outputs);
        end_phase(s, NATIVE_PHASE_SAMPLE);
    }
    m->work.a = all;
    return 1;
}

static int no_weights(struct step *s) {
    return fail(s->model->message, NATIVE_NO_WEIGHTS, s->lost_piece < 0 ? "the embedding rows did not come"
                                                                        : "piece %d of the weights did not come",
                s->lost_piece);
}

static int run_layers(struct step *s) {
    native_model *m = s->model;
    if (m->window.embed != NULL && !m->window.embed(s->batch->tokens, s->rows, m->work.x)) return no_weights(s);
    each_row(s, embed_row, s->rows);
    end_phase(s, NATIVE_PHASE_EMBED);
    for (s->index = 0; s->index < s->c->num_layers; s->index++) {
        s->layer = &m->layers[s->index];
        if (!attention_block(s)) return no_weights(s);
        if (s->rows == 0) return NATIVE_OK;
        if (!ffn_block(s)) return no_weights(s);
    }
    return give_outputs(s) ? NATIVE_OK : no_weights(s);
}

static int run_step(struct step *s) {
    native_model *m = s->model;
    s->c = &m->config;
    s->rows = s->batch->num_rows;
    s->failed_output = s->lost_piece = -1;
    s->clock = now_ns();
    int code = run_layers(s);
    piece_drop(m);
    if (code != NATIVE_OK || s->failed_output < 0) return code;
    return fail(m->message, NATIVE_NO_TOKEN, "output %d has no token to give: every token is masked, or its logits are not numbers",
                s->failed_output);
}

int32_t native_step(native_model *model, const struct native_batch *batch, const struct native_sampling *sampling,
                    const struct native_result *result) {
    if (check_batch(model, batch) != NATIVE_OK || check_sampling(model, batch->num_outputs, sampling, result) != NATIVE_OK)
        return NATIVE_BAD_ARGUMENT;
    struct step s = {.model = model, .batch = batch, .sampling = sampling, .result = result};
    return run_step(&s);
}

int32_t native_logits(native_model *model, const struct native_batch *batch, float *logits) {
    if (check_batch(model, batch) != NATIVE_OK) return NATIVE_BAD_ARGUMENT;
    struct step s = {.model = model, .batch = batch, .logits_out = logits};
    return run_step(&s);
}

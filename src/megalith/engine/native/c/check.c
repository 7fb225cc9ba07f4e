/* Everything that could make a step read or write outside what it owns is refused here, with numbers. */
#include "model.h"

#include <math.h>
#include <stdlib.h>

#define REFUSE(...) return fail(message, NATIVE_BAD_ARGUMENT, __VA_ARGS__)

int check_config(const struct native_config *c, char *message) {
    const struct { const char *name; int64_t value, least, most; } ranges[] = {
        {"num_layers", c->num_layers, 1, 4096},      {"hidden", c->hidden, 32, 1 << 20},
        {"num_heads", c->num_heads, 1, 4096},        {"num_kv_heads", c->num_kv_heads, 1, 4096},
        {"head_dim", c->head_dim, 16, 4096},         {"ffn", c->ffn, 32, 1 << 22},
        {"vocab", c->vocab, 1, 1 << 24},             {"max_context", c->max_context, 1, 1 << 28},
        {"block_tokens", c->block_tokens, 16, 4096}, {"num_blocks", c->num_blocks, 1, INT32_MAX},
        {"num_host_blocks", c->num_host_blocks, 0, INT32_MAX}, {"max_rows", c->max_rows, 1, 1 << 20},
        {"threads", c->threads, 1, 1024},            {"activation_bits", c->activation_bits, 0, 8},
        {"activation", c->activation, NATIVE_SILU, NATIVE_GELU_TANH},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++)
        if (ranges[i].value < ranges[i].least || ranges[i].value > ranges[i].most)
            REFUSE("%s is %lld, but must be within %lld and %lld", ranges[i].name, (long long)ranges[i].value,
                   (long long)ranges[i].least, (long long)ranges[i].most);
    if (c->hidden % 32 || c->ffn % 32 || c->head_dim % 16 || c->block_tokens % 16 || c->num_heads * c->head_dim % 32)
        REFUSE("hidden %d, ffn %d and heads x head_dim %d must be multiples of 32, head_dim %d and block_tokens %d of 16",
               c->hidden, c->ffn, c->num_heads * c->head_dim, c->head_dim, c->block_tokens);
    if (c->num_heads % c->num_kv_heads) REFUSE("%d query heads over %d KV heads", c->num_heads, c->num_kv_heads);
    for (int i = 0; i < c->num_layers; i++)
        if (c->windows[i] < 0 || c->ropes[i] < 0 || c->ropes[i] > 1)
            REFUSE("layer %d has window %d and rope %d", i, c->windows[i], c->ropes[i]);
    return NATIVE_OK;
}

static int check_sequence(native_model *model, const struct native_batch *b, int s) {
    const struct native_config *c = &model->config;
    char *message = model->message;
    int first = b->row_starts[s], last = b->row_starts[s + 1];
    if (first < 0 || last <= first || last > b->num_rows)
        REFUSE("sequence %d has rows %d to %d of %d", s, first, last, b->num_rows);
    for (int row = first; row < last; row++) {
        if (b->tokens[row] < 0 || b->tokens[row] >= c->vocab)
            REFUSE("row %d has token %d; the vocabulary has %d", row, b->tokens[row], c->vocab);
        if (b->positions[row] < 0 || (row > first && b->positions[row] != b->positions[row - 1] + 1))
            REFUSE("row %d has position %d, which does not follow the row before", row, b->positions[row]);
    }
    int position = b->positions[last - 1];
    if (position >= c->max_context) REFUSE("position %d of sequence %d; the context is %d", position, s, c->max_context);
    if (position / c->block_tokens >= b->table_width)
        REFUSE("position %d of sequence %d needs %d blocks; the table has %d", position, s, position / c->block_tokens + 1,
               b->table_width);
    for (int i = 0; i <= position / c->block_tokens; i++) {
        int block = b->block_tables[(size_t)s * b->table_width + i];
        if (block < 0 || block >= c->num_blocks) REFUSE("sequence %d uses block %d of %d", s, block, c->num_blocks);
    }
    return NATIVE_OK;
}

int check_batch(native_model *model, const struct native_batch *b) {
    char *message = model->message;
    if (model->head == NULL) REFUSE("the model is not loaded");
    if (b->num_rows < 1 || b->num_rows > model->config.max_rows)
        REFUSE("%d rows; a step takes 1 to %d", b->num_rows, model->config.max_rows);
    if (b->num_sequences < 1 || b->num_sequences > b->num_rows || b->table_width < 1)
        REFUSE("%d sequences of table width %d in %d rows", b->num_sequences, b->table_width, b->num_rows);
    if (b->row_starts[0] != 0 || b->row_starts[b->num_sequences] != b->num_rows)
        REFUSE("row_starts runs from %d to %d, not from 0 to %d", b->row_starts[0], b->row_starts[b->num_sequences], b->num_rows);
    for (int s = 0; s < b->num_sequences; s++)
        if (check_sequence(model, b, s) != NATIVE_OK) return NATIVE_BAD_ARGUMENT;
    if (b->num_outputs < 0 || b->num_outputs > b->num_rows) REFUSE("%d outputs of %d rows", b->num_outputs, b->num_rows);
    for (int n = 0; n < b->num_outputs; n++)
        if (b->output_rows[n] < 0 || b->output_rows[n] >= b->num_rows || (n > 0 && b->output_rows[n] <= b->output_rows[n - 1]))
            REFUSE("output %d is row %d of %d, or not above the one before", n, b->output_rows[n], b->num_rows);
    return NATIVE_OK;
}

/* A CSR part: starts ascend from 0 to at most `count`, ids are in the vocabulary. */
static int check_sparse(const char *what, int outputs, int count, int vocab, const int32_t *starts, const int32_t *ids,
                        char *message) {
    if (starts[0] != 0 || starts[outputs] > count) REFUSE("%s ends at %d of %d", what, starts[outputs], count);
    for (int n = 0; n < outputs; n++)
        if (starts[n + 1] < starts[n]) REFUSE("%s of row %d starts at %d after %d", what, n + 1, starts[n + 1], starts[n]);
    for (int i = 0; i < starts[outputs]; i++)
        if (ids[i] < 0 || ids[i] >= vocab) REFUSE("%s has token %d; the vocabulary has %d", what, ids[i], vocab);
    return NATIVE_OK;
}

int check_sampling_arrays(int32_t outputs, int32_t vocab, const struct native_sampling *s, const struct native_result *r,
                          char *message) {
    if (check_sparse("seen", outputs, s->num_seen, vocab, s->seen_starts, s->seen_ids, message) != NATIVE_OK ||
        check_sparse("bias", outputs, s->num_bias, vocab, s->bias_starts, s->bias_ids, message) != NATIVE_OK)
        return NATIVE_BAD_ARGUMENT;
    for (int n = 0; n < outputs; n++) {
        if (s->mask_rows[n] < -1 || s->mask_rows[n] >= s->num_masks)
            REFUSE("output %d uses mask %d of %d", n, s->mask_rows[n], s->num_masks);
        if (s->targets[n] < -1 || s->targets[n] >= vocab) REFUSE("output %d has target %d of %d", n, s->targets[n], vocab);
        if (s->num_logprobs[n] < -1 || s->num_logprobs[n] > NATIVE_TOP)
            REFUSE("output %d asks for %d log probabilities; at most %d", n, s->num_logprobs[n], NATIVE_TOP);
        if (s->num_logprobs[n] >= 0 && (r->logprobs == NULL || r->top_ids == NULL || r->top_logprobs == NULL))
            REFUSE("output %d asks for log probabilities but there is no room for them", n);
        if (!(s->temperature[n] >= 0) || isinf(s->temperature[n]) || s->top_k[n] < 0 || !(s->top_p[n] > 0) ||
            !(s->min_p[n] >= 0 && s->min_p[n] <= 1) || !(s->repetition[n] > 0))
            REFUSE("output %d has temperature %g, top-k %d, top-p %g, min-p %g, repetition %g", n, (double)s->temperature[n],
                   s->top_k[n], (double)s->top_p[n], (double)s->min_p[n], (double)s->repetition[n]);
    }
    return NATIVE_OK;
}

int check_sampling(native_model *model, int32_t outputs, const struct native_sampling *s, const struct native_result *r) {
    return check_sampling_arrays(outputs, model->config.vocab, s, r, model->message);
}

/* Creating, filling and destroying a model; its memory. */
#define _GNU_SOURCE
#include "model.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define HUGE_PAGE ((size_t)2 << 20)
#define ARENA_BYTES ((size_t)64 << 20)

int fail(char *to, int code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(to, NATIVE_MESSAGE, format, arguments);
    va_end(arguments);
    return code;
}

static size_t up_to(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

void *pages_map(size_t bytes) {
    size_t length = up_to(bytes, HUGE_PAGE);
    char *raw = mmap(NULL, length + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) return NULL;
    char *pages = (char *)up_to((uintptr_t)raw, HUGE_PAGE);
    if (pages > raw) munmap(raw, (size_t)(pages - raw));
    munmap(pages + length, (size_t)(raw + HUGE_PAGE - pages));
    madvise(pages, length, MADV_HUGEPAGE); /* a wish: refusing costs speed only */
    return pages;
}

void pages_unmap(void *pages, size_t bytes) {
    if (pages != NULL) munmap(pages, up_to(bytes, HUGE_PAGE));
}

/* Weights live in a few large huge-page regions. */
struct arena {
    struct arena *older;
    size_t bytes, used;
};

static void *arena_take(struct arena **arena, size_t bytes) {
    bytes = up_to(bytes, 64);
    if (*arena == NULL || (*arena)->used + bytes > (*arena)->bytes) {
        size_t room = bytes + 64 > ARENA_BYTES ? up_to(bytes + 64, HUGE_PAGE) : ARENA_BYTES;
        struct arena *fresh = pages_map(room);
        if (fresh == NULL) return NULL;
        *fresh = (struct arena){.older = *arena, .bytes = room, .used = 64};
        *arena = fresh;
    }
    void *taken = (char *)*arena + (*arena)->used;
    (*arena)->used += bytes;
    return taken;
}

static void arena_destroy(struct arena *arena) {
    while (arena != NULL) {
        struct arena *older = arena->older;
        pages_unmap(arena, arena->bytes);
        arena = older;
    }
}

static size_t most(size_t a, size_t b) { return a > b ? a : b; }

int workspace_create(native_model *model) {
    const struct native_config *c = &model->config;
    struct workspace *w = &model->work;
    size_t rows = (size_t)c->max_rows, threads = (size_t)c->threads, hidden = (size_t)c->hidden, ffn = (size_t)c->ffn;
    size_t heads = (size_t)c->num_heads * c->head_dim, kv = (size_t)c->num_kv_heads * c->head_dim;
    size_t positions = up_to(most(16, (size_t)c->max_context), 16), vocab = up_to((size_t)c->vocab, 16);
    w->widest = most(hidden, most(heads, ffn));
    w->wide = most(most(heads + 2 * kv, 2 * ffn), hidden);
    w->score_stride = positions;
    w->logit_stride = vocab;
    w->a.plane_bits = c->activation_bits;
    size_t plane_groups = c->activation_bits > 0 ? rows * (w->widest / BIPOLAR_GROUP) : 0;
    struct { void **to; size_t bytes; } parts[] = {
        {(void **)&w->x, rows * hidden * 4},
        {(void **)&w->y, rows * w->wide * 4},
        {(void **)&w->mixed, rows * heads * 4},
        {(void **)&w->cosine, rows * c->head_dim * 4},
        {(void **)&w->sine, rows * c->head_dim * 4},
        {(void **)&w->normed, threads * w->widest * 4},
        {(void **)&w->logits, LOGIT_ROWS * vocab * 4},
        {(void **)&w->scores, threads * TILE_QUERIES * positions * 4},
        {(void **)&w->sample, threads * SAMPLE_WORK_FLOATS(c->vocab) * 4},
        {(void **)&w->a.a, rows * w->widest},
        {(void **)&w->a.scale, rows * (w->widest / GROUP) * 4},
        {(void **)&w->a.sum, rows * (w->widest / GROUP) * 4},
        {(void **)&w->a.planes, plane_groups * PLANE_WORDS(c->activation_bits) * 4},
        {(void **)&w->a.plane_scale, plane_groups * 4},
        {(void **)&w->tiles, rows * sizeof(struct tile_rows)},
    };
    size_t total = 0, count = sizeof parts / sizeof *parts;
    for (size_t i = 0; i < count; i++) total += up_to(parts[i].bytes, 128) + 128;
    char *base = pages_map(total);
    if (base == NULL) return NATIVE_NO_MEMORY;
    model->workspace_bytes = (int64_t)total;
    for (size_t i = 0, at = 0; i < count; i++) {
        *parts[i].to = base + at;
        at += up_to(parts[i].bytes, 128) + 128;
    }
    return NATIVE_OK;
}

void workspace_destroy(native_model *model) { pages_unmap(model->work.x, (size_t)model->workspace_bytes); }

static int allocate(native_model *model, const struct native_config *c) {
    size_t half = (size_t)c->head_dim / 2;
    model->layers = calloc((size_t)c->num_layers, sizeof *model->layers);
    model->rope_frequencies = malloc(2 * half * sizeof(float));
    model->pool = pool_create(c->threads);
    if (model->layers == NULL || model->rope_frequencies == NULL || model->pool == NULL) return NATIVE_NO_MEMORY;
    memcpy(model->rope_frequencies, c->rope_frequencies, 2 * half * sizeof(float));
    for (int i = 0; i < c->num_layers; i++) {
        model->layers[i].window = c->windows[i];
        model->layers[i].rope = c->ropes[i];
    }
    model->chunk_elements = (size_t)CHUNK_TOKENS * c->head_dim;
    model->block_elements = 2 * (size_t)c->num_layers * c->num_kv_heads * c->head_dim * c->block_tokens;
    model->kv = pages_map(model->block_elements * 2 * c->num_blocks);
    if (c->num_host_blocks > 0) model->host_kv = pages_map(model->block_elements * 2 * c->num_host_blocks);
    if (model->kv == NULL || (c->num_host_blocks > 0 && model->host_kv == NULL)) return NATIVE_NO_MEMORY;
    return workspace_create(model);
}

int32_t native_create(const struct native_config *config, native_model **model, char *message) {
    int code = check_config(config, message);
    if (code != NATIVE_OK) return code;
    const struct kernels *kernels = kernels_by_name(config->isa);
    if (kernels == NULL)
        return fail(message, NATIVE_NO_ISA, "no kernels for %s here; usable: %s", config->isa, native_isas(1));
    native_model *m = calloc(1, sizeof *m);
    if (m == NULL) return fail(message, NATIVE_NO_MEMORY, "out of memory");
    m->config = *config;
    m->kernels = kernels;
    code = allocate(m, config);
    if (code != NATIVE_OK) {
        native_destroy(m);
        return fail(message, code, "the machine refused the memory for %d KV blocks of %d tokens and their workspace",
                    config->num_blocks, config->block_tokens);
    }
    *model = m;
    return NATIVE_OK;
}

void native_destroy(native_model *model) {
    if (model == NULL) return;
    pool_destroy(model->pool);
    pages_unmap(model->kv, model->block_elements * 2 * model->config.num_blocks);
    pages_unmap(model->host_kv, model->block_elements * 2 * model->config.num_host_blocks);
    if (model->work.x != NULL) workspace_destroy(model);
    arena_destroy(model->arena);
    spans_free(&model->embed);
    spans_free(&model->head_matrix);
    for (int layer = 0; model->layers != NULL && layer < model->config.num_layers; layer++)
        for (int tensor = 0; tensor < NATIVE_EMBED; tensor++) spans_free(&model->layers[layer].matrices[tensor]);
    free(model->rope_frequencies);
    free(model->layers);
    free(model);
}

struct pack_task { struct matrix *to; int format; const uint8_t *raw; };

static void pack_panel(void *argument, int item, int worker) {
    struct pack_task *task = argument;
    (void)worker;
    matrix_pack_panel(task->to, task->format, task->raw, item);
}

void expected_shape(const struct native_config *c, int tensor, int *outputs, int *inputs) {
    int heads = c->num_heads * c->head_dim, kv = c->num_kv_heads * c->head_dim;
    const int shapes[NATIVE_TENSORS][2] = {
        [NATIVE_Q] = {heads, c->hidden},       [NATIVE_K] = {kv, c->hidden},
        [NATIVE_V] = {kv, c->hidden},          [NATIVE_O] = {c->hidden, heads},
        [NATIVE_GATE] = {c->ffn, c->hidden},   [NATIVE_UP] = {c->ffn, c->hidden},
        [NATIVE_DOWN] = {c->hidden, c->ffn},   [NATIVE_EMBED] = {c->vocab, c->hidden},
        [NATIVE_HEAD] = {c->vocab, c->hidden}, [NATIVE_ATTN_NORM] = {c->hidden, 0},
        [NATIVE_FFN_NORM] = {c->hidden, 0},    [NATIVE_POST_ATTN_NORM] = {c->hidden, 0},
        [NATIVE_POST_FFN_NORM] = {c->hidden, 0}, [NATIVE_Q_NORM] = {c->head_dim, 0},
        [NATIVE_K_NORM] = {c->head_dim, 0},    [NATIVE_Q_BIAS] = {heads, 0},
        [NATIVE_K_BIAS] = {kv, 0},             [NATIVE_V_BIAS] = {kv, 0},
        [NATIVE_FINAL_NORM] = {c->hidden, 0},
    };
    *outputs = shapes[tensor][0];
    *inputs = shapes[tensor][1];
}

int is_top(int tensor) { return tensor == NATIVE_EMBED || tensor == NATIVE_HEAD || tensor == NATIVE_FINAL_NORM; }

struct matrix *matrix_slot(native_model *model, int layer, int tensor) {
    if (tensor == NATIVE_EMBED) return &model->embed;
    if (tensor == NATIVE_HEAD) return &model->head_matrix;
    return &model->layers[layer].matrices[tensor];
}

static float **vector_slot(native_model *model, int layer, int tensor) {
    return tensor == NATIVE_FINAL_NORM ? &model->final_norm : &model->layers[layer].vectors[tensor - NATIVE_MATRICES];
}

static int load_vector(native_model *model, float **slot, const uint8_t *raw, int count) {
    *slot = arena_take(&model->arena, (size_t)count * 4);
    if (*slot == NULL) return fail(model->message, NATIVE_NO_MEMORY, "out of memory for weights");
    memcpy(*slot, raw, (size_t)count * 4);
    model->weight_bytes += (int64_t)count * 4;
    return NATIVE_OK;
}

static int load_matrix(native_model *model, struct matrix *slot, int format, const uint8_t *raw, int outputs, int inputs) {
    struct matrix w;
    matrix_describe(&w, format, outputs, inputs);
    w.data = arena_take(&model->arena, w.bytes);
    if (w.data == NULL) return fail(model->message, NATIVE_NO_MEMORY, "out of memory for weights");
    struct pack_task task = {&w, format, raw};
    pool_run(model->pool, pack_panel, &task, w.panels);
    *slot = w;
    model->weight_bytes += (int64_t)w.bytes;
    return NATIVE_OK;
}

int32_t native_load(native_model *model, int32_t layer, int32_t tensor, int32_t format, const uint8_t *raw,
                    int64_t raw_bytes, int32_t outputs, int32_t inputs) {
    const struct native_config *c = &model->config;
    int want_outputs, want_inputs;
    if (tensor < 0 || tensor >= NATIVE_TENSORS || layer < -1 || layer >= c->num_layers || is_top(tensor) != (layer == -1))
        return fail(model->message, NATIVE_BAD_ARGUMENT, "no tensor %d in layer %d", tensor, layer);
    expected_shape(c, tensor, &want_outputs, &want_inputs);
    if (outputs != want_outputs || inputs != want_inputs)
        return fail(model->message, NATIVE_BAD_ARGUMENT, "tensor %d of layer %d is %d x %d, not %d x %d", tensor, layer,
                    outputs, inputs, want_outputs, want_inputs);
    if (format < 0 || format >= NATIVE_FORMATS || (inputs == 0 && format != NATIVE_F32) ||
        (inputs > 0 && inputs % format_table[format].block_elements != 0))
        return fail(model->message, NATIVE_BAD_ARGUMENT, "tensor %d of layer %d cannot have format %d", tensor, layer, format);
    if (format_table[format].planes > 0 && c->activation_bits == 0)
        return fail(model->message, NATIVE_BAD_ARGUMENT, "tensor %d of layer %d is bipolar and the model has no activation bits",
                    tensor, layer);
    int64_t needed = inputs == 0 ? (int64_t)outputs * 4 : (int64_t)format_row_bytes(format, inputs) * outputs;
    if (raw == NULL || raw_bytes != needed)
        return fail(model->message, NATIVE_BAD_ARGUMENT, "tensor %d of layer %d has %lld bytes, not %lld", tensor, layer,
                    (long long)raw_bytes, (long long)needed);
    if (inputs == 0) return load_vector(model, vector_slot(model, layer, tensor), raw, outputs);
    return load_matrix(model, matrix_slot(model, layer, tensor), format, raw, outputs, inputs);
}

static int vector_needed(const struct native_config *c, int tensor) {
    switch (tensor) {
    case NATIVE_POST_ATTN_NORM: case NATIVE_POST_FFN_NORM: return c->post_norms;
    case NATIVE_Q_NORM: case NATIVE_K_NORM: return c->qk_norm;
    case NATIVE_Q_BIAS: case NATIVE_K_BIAS: case NATIVE_V_BIAS: return c->qkv_bias;
    default: return 1;
    }
}

/* In memory, or attached to a window that is there. */
static int matrix_there(const native_model *model, const struct matrix *w) {
    return w->data != NULL || (w->num_spans > 0 && model->window.acquire != NULL);
}

int32_t native_ready(native_model *model) {
    for (int tensor = 0; tensor < NATIVE_TENSORS; tensor++) {
        int first = is_top(tensor) ? -1 : 0, last = is_top(tensor) ? 0 : model->config.num_layers;
        if (tensor == NATIVE_HEAD && model->config.tied_embeddings) continue;
        for (int layer = first; layer < last; layer++) {
            int missing = tensor < NATIVE_MATRICES ? !matrix_there(model, matrix_slot(model, layer, tensor))
                                                   : vector_needed(&model->config, tensor) &&
                                                         *vector_slot(model, layer, tensor) == NULL;
            if (missing)
                return fail(model->message, NATIVE_BAD_ARGUMENT, "tensor %d of layer %d was not loaded", tensor, layer);
        }
    }
    model->head = model->config.tied_embeddings ? &model->embed : &model->head_matrix;
    return NATIVE_OK;
}

int32_t native_swap(native_model *model, int32_t to_host, const int32_t *device_blocks, const int32_t *host_blocks,
                    int32_t count) {
    const struct native_config *c = &model->config;
    for (int i = 0; i < count; i++)
        if (device_blocks[i] < 0 || device_blocks[i] >= c->num_blocks || host_blocks[i] < 0 ||
            host_blocks[i] >= c->num_host_blocks)
            return fail(model->message, NATIVE_BAD_ARGUMENT, "swap of block %d with host block %d: there are %d and %d",
                        device_blocks[i], host_blocks[i], c->num_blocks, c->num_host_blocks);
    size_t bytes = model->block_elements * 2;
    for (int i = 0; i < count; i++) {
        char *device = (char *)model->kv + bytes * device_blocks[i], *host = (char *)model->host_kv + bytes * host_blocks[i];
        memcpy(to_host ? host : device, to_host ? device : host, bytes);
    }
    return NATIVE_OK;
}

const char *native_message(const native_model *model) { return model->message; }
const char *native_isa(const native_model *model) { return model->kernels->name; }
int64_t native_block_bytes(const native_model *model) { return (int64_t)model->block_elements * 2; }

void native_memory_bytes(const native_model *model, struct native_memory *memory) {
    int64_t block = native_block_bytes(model);
    *memory = (struct native_memory){model->weight_bytes, block * model->config.num_blocks,
                                     block * model->config.num_host_blocks, model->workspace_bytes};
}

void native_phase_ns(native_model *model, int64_t *ns, int32_t reset) {
    memcpy(ns, model->phase_ns, sizeof model->phase_ns);
    if (reset) memset(model->phase_ns, 0, sizeof model->phase_ns);
}

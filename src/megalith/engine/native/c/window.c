/* Weights that are in memory only while a step needs them: pieces that callbacks give and take back. */
#include "model.h"

static int bad_shape(int format, int outputs, int inputs) {
    return format < 0 || format >= NATIVE_FORMATS || outputs < 1 || inputs < 1 || inputs % GROUP ||
           inputs % format_table[format].block_elements;
}

int32_t native_set_window(native_model *model, const struct native_window *window) {
    if (window->acquire == NULL || window->release == NULL || window->embed == NULL)
        return fail(model->message, NATIVE_BAD_ARGUMENT, "a window needs all of its functions");
    model->window = *window;
    return NATIVE_OK;
}

int32_t native_attach(native_model *model, int32_t layer, int32_t tensor, int32_t format, int64_t offset) {
    int outputs, inputs;
    if (tensor < 0 || tensor >= NATIVE_MATRICES || layer < -1 || layer >= model->config.num_layers ||
        is_top(tensor) != (layer == -1))
        return fail(model->message, NATIVE_BAD_ARGUMENT, "no matrix %d in layer %d", tensor, layer);
    expected_shape(&model->config, tensor, &outputs, &inputs);
    if (bad_shape(format, outputs, inputs) || offset < 0 || offset % 64 ||
        (format_table[format].planes > 0 && model->config.activation_bits == 0))
        return fail(model->message, NATIVE_BAD_ARGUMENT, "matrix %d of layer %d cannot be attached with format %d at %lld",
                    tensor, layer, format, (long long)offset);
    matrix_describe(matrix_slot(model, layer, tensor), format, outputs, inputs);
    if (layer >= 0) model->layers[layer].offsets[tensor] = (size_t)offset;
    else model->head_offset = (size_t)offset;
    return NATIVE_OK;
}

int piece_take(native_model *model, int layer, int piece, int first, int last) {
    uint8_t *base = (uint8_t *)model->window.acquire(piece); /* panels are only read */
    if (base == NULL) return 0;
    if (first == NATIVE_HEAD) {
        (model->config.tied_embeddings ? &model->embed : &model->head_matrix)->data = base + model->head_offset;
        return 1;
    }
    for (int tensor = first; tensor <= last; tensor++)
        model->layers[layer].matrices[tensor].data = base + model->layers[layer].offsets[tensor];
    return 1;
}

void piece_give(native_model *model, int piece) {
    if (model->window.release != NULL) model->window.release(piece);
}

int64_t native_packed_bytes(int32_t format, int32_t outputs, int32_t inputs) {
    struct matrix w;
    if (bad_shape(format, outputs, inputs)) return -1;
    matrix_describe(&w, format, outputs, inputs);
    return (int64_t)w.bytes;
}

int32_t native_pack(int32_t format, const uint8_t *raw, int64_t raw_bytes, int32_t outputs, int32_t inputs, uint8_t *to,
                    int64_t to_bytes) {
    struct matrix w;
    if (bad_shape(format, outputs, inputs) || raw_bytes != (int64_t)format_row_bytes(format, inputs) * outputs)
        return NATIVE_BAD_ARGUMENT;
    matrix_describe(&w, format, outputs, inputs);
    if (to_bytes != (int64_t)w.bytes) return NATIVE_BAD_ARGUMENT;
    w.data = to;
    for (int panel = 0; panel < w.panels; panel++) matrix_pack_panel(&w, format, raw, panel);
    return NATIVE_OK;
}

int32_t native_panel_row(int32_t format, int32_t inputs, const uint8_t *panel, int32_t column, float scale, float *out) {
    struct matrix w;
    if (bad_shape(format, PANEL, inputs) || column < 0 || column >= PANEL) return NATIVE_BAD_ARGUMENT;
    matrix_describe(&w, format, PANEL, inputs);
    w.data = (uint8_t *)panel; /* only read */
    matrix_row(&w, column, scale, out);
    return NATIVE_OK;
}

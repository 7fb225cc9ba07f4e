/* Weights that are in memory only while a step needs them: pieces that callbacks give and take back. */
#include "model.h"

#include <stdlib.h>

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

int32_t native_attach(native_model *model, int32_t layer, int32_t tensor, int32_t format, int32_t piece,
                      int32_t first_panel, int64_t offset) {
    int outputs, inputs;
    if (tensor < 0 || tensor >= NATIVE_MATRICES || layer < -1 || layer >= model->config.num_layers ||
        is_top(tensor) != (layer == -1))
        return fail(model->message, NATIVE_BAD_ARGUMENT, "no matrix %d in layer %d", tensor, layer);
    expected_shape(&model->config, tensor, &outputs, &inputs);
    struct matrix *w = matrix_slot(model, layer, tensor);
    int count = w->num_spans, after = count > 0 ? w->spans[count - 1].first + 1 : 0;
    int wrong = bad_shape(format, outputs, inputs) || piece < 0 || offset < 0 || offset % 64 || first_panel < after ||
                (count == 0 && first_panel != 0) || first_panel >= (outputs + PANEL - 1) / PANEL ||
                (format_table[format].planes > 0 && model->config.activation_bits == 0);
    if (wrong)
        return fail(model->message, NATIVE_BAD_ARGUMENT,
                    "panel %d of matrix %d of layer %d cannot be attached with format %d at %lld of piece %d", first_panel,
                    tensor, layer, format, (long long)offset, piece);
    if (count == 0) matrix_describe(w, format, outputs, inputs);
    struct span *spans = realloc(w->spans, sizeof *spans * (size_t)(count + 1));
    if (spans == NULL) return fail(model->message, NATIVE_NO_MEMORY, "out of memory for weights");
    spans[count] = (struct span){piece, first_panel, (size_t)offset};
    w->spans = spans;
    w->num_spans = count + 1;
    return NATIVE_OK;
}

void spans_free(struct matrix *w) {
    free(w->spans);
    w->spans = NULL;
    w->num_spans = 0;
}

const uint8_t *piece_hold(native_model *model, int piece) {
    if (model->held != NULL && model->held_piece == piece) return model->held;
    piece_drop(model);
    model->held = model->window.acquire(piece);
    model->held_piece = piece;
    return model->held;
}

void piece_drop(native_model *model) {
    if (model->held != NULL) model->window.release(model->held_piece);
    model->held = NULL;
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

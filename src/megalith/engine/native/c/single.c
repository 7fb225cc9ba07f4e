/* Single kernels behind plain calls, for tests and micro-benchmarks. */
#include "model.h"

#include <stdlib.h>
#include <string.h>

struct native_matrix { struct matrix w; };

int32_t native_matrix_create(int32_t format, const uint8_t *raw, int64_t raw_bytes, int32_t outputs, int32_t inputs,
                             native_matrix **matrix) {
    if (format < 0 || format >= NATIVE_FORMATS || outputs < 1 || inputs < 1 || inputs % GROUP ||
        inputs % format_table[format].block_elements || raw_bytes != (int64_t)format_row_bytes(format, inputs) * outputs)
        return NATIVE_BAD_ARGUMENT;
    native_matrix *m = calloc(1, sizeof *m);
    if (m == NULL) return NATIVE_NO_MEMORY;
    matrix_describe(&m->w, format, outputs, inputs);
    m->w.data = pages_map(m->w.bytes);
    if (m->w.data == NULL) {
        free(m);
        return NATIVE_NO_MEMORY;
    }
    for (int panel = 0; panel < m->w.panels; panel++) matrix_pack_panel(&m->w, format, raw, panel);
    *matrix = m;
    return NATIVE_OK;
}

void native_matrix_destroy(native_matrix *matrix) {
    pages_unmap(matrix->w.data, matrix->w.bytes);
    free(matrix);
}

int64_t native_matrix_bytes(const native_matrix *matrix) { return (int64_t)matrix->w.bytes; }

int32_t native_matrix_row(const native_matrix *matrix, int32_t row, float *out) {
    if (row < 0 || row >= matrix->w.outputs) return NATIVE_BAD_ARGUMENT;
    matrix_row(&matrix->w, row, 1.0f, out);
    return NATIVE_OK;
}

int32_t native_quantize(const char *isa, const float *x, int32_t rows, int32_t inputs, int8_t *a, float *scale, float *sum) {
    const struct kernels *kernels = kernels_by_name(isa);
    if (kernels == NULL) return NATIVE_NO_ISA;
    if (rows < 0 || inputs < GROUP || inputs % GROUP) return NATIVE_BAD_ARGUMENT;
    struct activations to = {.a = a, .scale = scale, .sum = sum, .rows = rows, .inputs = inputs, .groups = inputs / GROUP};
    for (int row = 0; row < rows; row++) kernels->quantize(x + (size_t)row * inputs, row, &to);
    return NATIVE_OK;
}

int32_t native_matrix_multiply(const native_matrix *matrix, const char *isa, const float *x, int32_t rows, float *y) {
    const struct kernels *kernels = kernels_by_name(isa);
    if (kernels == NULL) return NATIVE_NO_ISA;
    if (rows < 1 || matrix->w.planes) return NATIVE_BAD_ARGUMENT;
    size_t inputs = (size_t)matrix->w.inputs, groups = (size_t)matrix->w.groups;
    int8_t *a = malloc((size_t)rows * inputs);
    float *scale = malloc((size_t)rows * groups * 4), *sum = malloc((size_t)rows * groups * 4);
    int32_t code = NATIVE_NO_MEMORY;
    if (a != NULL && scale != NULL && sum != NULL) {
        struct activations to = {
            .a = a, .scale = scale, .sum = sum, .rows = rows, .inputs = matrix->w.inputs, .groups = matrix->w.groups};
        struct product job = {&matrix->w, &to, y, (ptrdiff_t)matrix->w.panels * PANEL, 0};
        for (int row = 0; row < rows; row++) kernels->quantize(x + (size_t)row * inputs, row, &to);
        kernels->multiply(&job, 0, matrix->w.panels);
        code = NATIVE_OK;
    }
    free(a);
    free(scale);
    free(sum);
    return code;
}

int32_t native_quantize_planes(const char *isa, const float *x, int32_t rows, int32_t inputs, int32_t bits, uint32_t *planes,
                               float *scale) {
    const struct kernels *kernels = kernels_by_name(isa);
    if (kernels == NULL) return NATIVE_NO_ISA;
    if (rows < 0 || inputs < BIPOLAR_GROUP || inputs % BIPOLAR_GROUP || bits < 1 || bits > 8) return NATIVE_BAD_ARGUMENT;
    struct activations to = {.planes = planes, .plane_scale = scale, .plane_bits = bits, .rows = rows, .inputs = inputs};
    for (int row = 0; row < rows; row++) kernels->quantize_planes(x + (size_t)row * inputs, row, &to);
    return NATIVE_OK;
}

int32_t native_multiply_planes(const native_matrix *matrix, const char *isa, const uint32_t *planes, const float *scale,
                               int32_t bits, int32_t rows, float *y) {
    const struct kernels *kernels = kernels_by_name(isa);
    if (kernels == NULL) return NATIVE_NO_ISA;
    if (rows < 1 || !matrix->w.planes || bits < 1 || bits > 8) return NATIVE_BAD_ARGUMENT;
    struct activations x = {.planes = (uint32_t *)planes, .plane_scale = (float *)scale, /* only read */
                            .plane_bits = bits, .rows = rows, .inputs = matrix->w.inputs};
    struct product job = {&matrix->w, &x, y, (ptrdiff_t)matrix->w.panels * PANEL, 0};
    kernels->multiply_planes(&job, 0, matrix->w.panels);
    return NATIVE_OK;
}

int32_t native_sample(const char *isa, const float *logits, int32_t vocab, const struct native_sampling *sampling,
                      const struct native_result *result) {
    const struct kernels *kernels = kernels_by_name(isa);
    char message[NATIVE_MESSAGE];
    if (kernels == NULL) return NATIVE_NO_ISA;
    int code = check_sampling_arrays(1, vocab, sampling, result, message);
    if (code != NATIVE_OK) return code;
    float *work = malloc(SAMPLE_WORK_FLOATS(vocab) * sizeof(float));
    if (work == NULL) return NATIVE_NO_MEMORY;
    struct sample_row row = {sampling, result, 0, vocab, logits, work};
    code = kernels->sample(&row);
    free(work);
    return code;
}

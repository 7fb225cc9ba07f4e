/* Products of the activations of a step with matrices, in memory or in pieces of a window, shared out over the threads. */
#define _GNU_SOURCE
#include "model.h"

#include <time.h>

int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Products of the same activations, whose panels are shared out over the threads. */
struct product_job {
    const struct kernels *kernels;
    struct product products[3];
    int count, first, last; /* panels, counted through all products */
    int per_item;
};

static void run_product_item(void *argument, int item, int worker) {
    struct product_job *job = argument;
    int first = job->first + item * job->per_item, last = first + job->per_item;
    (void)worker;
    if (last > job->last) last = job->last;
    for (int i = 0, base = 0; i < job->count; base += job->products[i++].w->panels) {
        int low = first > base ? first - base : 0, high = last - base, panels = job->products[i].w->panels;
        if (high > panels) high = panels;
        if (low < high)
            (job->products[i].w->planes ? job->kernels->multiply_planes : job->kernels->multiply)(&job->products[i], low, high);
    }
}

static void share_out(native_model *m, struct product_job *job) {
    int threads = pool_threads(m->pool), panels = job->last - job->first;
    /* About eight items a thread even out what the system takes away; fewer, longer ones would stream better. */
    job->per_item = threads == 1 ? panels : (panels + 8 * threads - 1) / (8 * threads);
    pool_run(m->pool, run_product_item, job, (panels + job->per_item - 1) / job->per_item);
}

/* One product with a matrix in pieces of a window. The piece that did not come, or -1. */
static int multiply_spans(native_model *m, const struct matrix *w, float *y, size_t stride, int accumulate,
                          int64_t *waited_ns) {
    for (int i = 0; i < w->num_spans; i++) {
        const struct span *span = &w->spans[i];
        int64_t begin = now_ns();
        const uint8_t *base = piece_hold(m, span->piece);
        *waited_ns += now_ns() - begin;
        if (base == NULL) return span->piece;
        struct matrix part = *w; /* as if all of it lay around the span; panels are only read */
        part.data = (uint8_t *)(uintptr_t)((uintptr_t)base + span->offset -
                                           (size_t)span->first * (size_t)w->groups * w->record_bytes);
        struct product_job job = {
            .kernels = m->kernels, .count = 1,
            .first = span->first, .last = i + 1 < w->num_spans ? span[1].first : w->panels,
            .products = {{&part, &m->work.a, y, (ptrdiff_t)stride, accumulate}},
        };
        share_out(m, &job);
    }
    return -1;
}

int products_run(native_model *m, int count, const struct matrix *const *w, float *const *y, size_t stride, int accumulate,
                 int64_t *waited_ns) {
    struct product_job job = {.kernels = m->kernels, .count = count};
    if (w[0]->num_spans > 0) {
        int lost = -1;
        for (int i = 0; i < count && lost < 0; i++) lost = multiply_spans(m, w[i], y[i], stride, accumulate, waited_ns);
        return lost;
    }
    for (int i = 0; i < count; i++) {
        job.products[i] = (struct product){w[i], &m->work.a, y[i], (ptrdiff_t)stride, accumulate};
        job.last += w[i]->panels;
    }
    share_out(m, &job);
    return -1;
}

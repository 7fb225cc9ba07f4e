/* From a row of logits to a token: what the reference sampler in engine/sampling.py says, step by step.
 *
 * Candidates rank by logit, then lowest id; the draw walks them in that order with u in [0, 1) from (seed, draw) alone.
 * Weights of ranked candidates are doubles. Only the mass of a whole row (no top-k) is summed from floats, in a fixed
 * order: it is right to about 1e-6, and only a draw or a top-p cut that close to an edge can differ from the reference.
 */
#include "kernels.h"
#include "simd.h"

#include <math.h>
#include <stdlib.h>

#define BLOCK 256

static uint64_t splitmix64(uint64_t seed, uint64_t index) {
    uint64_t z = seed + (index + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* The lowest id of the largest value; *value gets it (-inf when all are, NaN when any is). */
static int largest_of(const float *x, int n, float *value) {
    vf best = vf_set(-INFINITY), check = vf_set(0);
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        vf v = vf_load(x + i);
        best = vf_max(best, v);
        check = vf_add(check, vf_mul(v, vf_set(0))); /* NaN sticks; so does 0 * inf, which is looked at below */
    }
    float most = vf_largest(best);
    int odd = isnan(vf_sum(check));
    for (; i < n; i++) {
        odd |= isnan(x[i]);
        if (x[i] > most) most = x[i];
    }
    for (int j = 0; odd && j < n; j++)
        if (isnan(x[j])) {
            *value = NAN;
            return -1;
        }
    *value = most;
    for (i = 0; i + BLOCK <= n; i += BLOCK) { /* skip whole blocks without it */
        vf top = vf_load(x + i);
        for (int j = LANES; j < BLOCK; j += LANES) top = vf_max(top, vf_load(x + i + j));
        if (vf_largest(top) == most) break;
    }
    while (i < n && x[i] != most) i++;
    return i < n ? i : -1;
}

/* sum of exp((x - most) / temperature), relative error about 1e-6 */
static double exp_sum(const float *x, int n, float most, float temperature) {
    double total = 0;
    for (int i = 0; i < n; i += BLOCK) {
        vf sum = vf_set(0);
        int j = i, end = i + BLOCK < n ? i + BLOCK : n;
        for (; j + LANES <= end; j += LANES) {
            vf shifted = vf_div(vf_sub(vf_load(x + j), vf_set(most)), vf_set(temperature));
            /* vf_exp stops at exp(-87): what is smaller, such as a masked token, must count as nothing */
            sum = vf_add(sum, vf_select(vf_less(vf_set(-87.0f), shifted), vf_exp(shifted), vf_set(0)));
        }
        double rest = 0;
        for (; j < end; j++) rest += exp(((double)x[j] - most) / temperature);
        total += vf_sum(sum) + rest;
    }
    return total;
}

/* The `count` most likely tokens in order, ties by lowest id. */
static void top_tokens(const float *x, int n, int count, int32_t *ids, float *values) {
    int have = 0;
    for (int i = 0; i < n; i++) {
        if (have == count && !(x[i] > values[have - 1])) continue;
        int at = have < count ? have++ : have - 1;
        for (; at > 0 && x[i] > values[at - 1]; at--) {
            values[at] = values[at - 1];
            ids[at] = ids[at - 1];
        }
        values[at] = x[i];
        ids[at] = i;
    }
}

static void give_logprobs(const struct sample_row *row, double log_total, int token) {
    const struct native_result *to = row->to;
    int wanted = row->how->num_logprobs[row->index];
    if (to->logprobs == NULL || (wanted < 0 && row->how->targets[row->index] < 0)) return;
    to->logprobs[row->index] = (float)((double)row->logits[token] - log_total);
    if (wanted <= 0) return;
    int32_t *ids = to->top_ids + (size_t)row->index * NATIVE_TOP;
    float *values = to->top_logprobs + (size_t)row->index * NATIVE_TOP;
    top_tokens(row->logits, row->vocab, wanted < row->vocab ? wanted : row->vocab, ids, values);
    for (int i = 0; i < wanted; i++) values[i] = (float)(values[i] - log_total);
}

/* Bias, penalties and mask, in the order of SamplingParams. */
static void adjust(const struct sample_row *row, float *x) {
    const struct native_sampling *how = row->how;
    int n = row->index;
    for (int i = how->bias_starts[n]; i < how->bias_starts[n + 1]; i++) x[how->bias_ids[i]] += how->bias_values[i];
    for (int i = how->seen_starts[n]; i < how->seen_starts[n + 1]; i++) {
        float *value = &x[how->seen_ids[i]];
        *value = *value > 0 ? *value / how->repetition[n] : *value * how->repetition[n];
        if (how->seen_counts[i] > 0)
            *value -= how->presence[n] + how->frequency[n] * (float)how->seen_counts[i];
    }
    if (how->mask_rows[n] < 0) return;
    const uint32_t *mask = how->masks + (size_t)how->mask_rows[n] * how->mask_words;
    for (int i = 0; i < row->vocab; i++)
        if (i / 32 >= how->mask_words || !(mask[i / 32] >> i % 32 & 1)) x[i] = -INFINITY;
}

struct ranked { float value; int32_t id; };

static int by_rank(const void *left, const void *right) {
    const struct ranked *a = left, *b = right;
    if (a->value != b->value) return a->value > b->value ? -1 : 1;
    return a->id < b->id ? -1 : a->id > b->id;
}

/* How a row is drawn from: x_i has weight exp((x_i - most) / temperature). */
struct filter {
    float most;
    double temperature, top_p, min_p, u;
    int top_k; /* 0: off */
};

static double weight_of(const struct filter *f, float x) { return exp(((double)x - f->most) / f->temperature); }

/* The candidates in rank order, at least as many as the draw can need: the first k, or those that hold `mass`, or those
 * that reach min-p. Only tokens above a falling threshold are sorted, so that hardly ever a whole vocabulary is. */
static int ordered_candidates(const struct filter *f, const float *x, int n, double mass, struct ranked *to) {
    int have = 0;
    double reach = f->min_p > 0 ? -log(f->min_p) + 1e-6 : INFINITY; /* candidates below are cut by min-p anyway */
    for (double depth = 2;; depth *= 2) {
        float threshold = (float)(f->most - (depth < reach ? depth : reach) * f->temperature);
        int all = depth >= reach || depth > 1e30 || !(threshold > -3.4e38f);
        if (!(threshold > -3.4e38f)) threshold = -3.4028234e38f;
        double held = 0;
        have = 0;
        for (int i = 0; i < n; i++)
            if (x[i] >= threshold) {
                to[have++] = (struct ranked){x[i], i};
                if (f->top_k == 0) held += weight_of(f, x[i]);
            }
        if (all || have == n || (f->top_k > 0 ? have >= f->top_k : held > mass)) break;
    }
    qsort(to, (size_t)have, sizeof *to, by_rank);
    return f->top_k > 0 && f->top_k < have ? f->top_k : have;
}

/* One draw, in rank order. With top-k the mass is that of the first k, otherwise that of the whole row. */
static int draw(const struct filter *f, const float *x, int n, struct ranked *room) {
    double total = f->top_k > 0 ? 0 : exp_sum(x, n, f->most, (float)f->temperature);
    int filtered_by_min_p = f->min_p > 0 && f->top_p >= 1;
    double needed = filtered_by_min_p ? INFINITY : total * (f->top_p < 1 ? f->top_p : f->u);
    struct filter reach = *f;
    if (f->top_p < 1 || f->top_k > 0) reach.min_p = 0; /* their masses count candidates that min-p cuts later */
    int kept = ordered_candidates(&reach, x, n, needed, room);
    double mass = 0;
    if (f->top_k > 0)
        for (int i = 0; i < kept; i++) total += weight_of(f, room[i].value);
    if (f->top_p < 1) {
        int prefix = 0;
        while (prefix < kept && (prefix == 0 || mass < f->top_p * total)) mass += weight_of(f, room[prefix++].value);
        kept = prefix;
        total = mass;
    }
    if (f->min_p > 0) {
        int prefix = 0;
        for (mass = 0; prefix < kept; prefix++) {
            double weight = weight_of(f, room[prefix].value);
            if (weight < f->min_p && prefix > 0) break;
            mass += weight;
        }
        kept = prefix;
        total = mass;
    }
    double running = 0;
    for (int i = 0; i < kept; i++) {
        running += weight_of(f, room[i].value);
        if (running > f->u * total) return room[i].id;
    }
    return room[kept - 1].id;
}

static int choose(const struct sample_row *row) {
    const struct native_sampling *how = row->how;
    int n = row->index, vocab = row->vocab;
    int adjusted = how->bias_starts[n] < how->bias_starts[n + 1] || how->seen_starts[n] < how->seen_starts[n + 1] ||
                   how->mask_rows[n] >= 0;
    const float *x = row->logits;
    if (adjusted) {
        memcpy(row->work, row->logits, sizeof(float) * (size_t)vocab);
        adjust(row, row->work);
        x = row->work;
    }
    struct filter f = {
        .temperature = how->temperature[n],
        .top_p = how->top_p[n],
        .min_p = how->min_p[n],
        .top_k = how->top_k[n] < vocab ? how->top_k[n] : vocab,
        .u = (double)(splitmix64(how->seed[n], how->draw[n]) >> 40) * 0x1p-24,
    };
    int best = largest_of(x, vocab, &f.most);
    if (best < 0 || !(fabsf(f.most) <= 3.4028234e38f)) return -1;
    if (f.temperature <= 0) return best;
    return draw(&f, x, vocab, (struct ranked *)(void *)(row->work + (vocab + LANES - 1) / LANES * LANES));
}

int KERNEL(sample)(const struct sample_row *row) {
    const struct native_sampling *how = row->how;
    int n = row->index, token = how->targets[n];
    double log_total = 0;
    if (token >= 0 || how->num_logprobs[n] >= 0) {
        float most;
        if (largest_of(row->logits, row->vocab, &most) < 0) return NATIVE_NO_TOKEN;
        log_total = most + log(exp_sum(row->logits, row->vocab, most, 1.0f));
    }
    if (token < 0) token = choose(row);
    if (token < 0) return NATIVE_NO_TOKEN;
    row->to->tokens[n] = token;
    give_logprobs(row, log_total, token);
    return NATIVE_OK;
}

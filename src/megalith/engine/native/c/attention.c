/* Attention of a tile of query vectors over paged K and V, in two passes with the scores in between.
 *
 * A query's result does not depend on its tile: scores add over dimensions in order, the softmax and the sum over V add
 * over tokens in order from the sequence's start, and what a tile computes beyond a query's own keys enters as exact
 * zeros. Chunk boundaries are multiples of 16 positions whatever the step.
 */
#include "kernels.h"
#include "simd.h"

#define MASKED (-3.0e38f)
#define AHEAD 3      /* chunks that are prefetched before their turn */
#define RUN_CHUNKS 4 /* chunks of V that are added up in registers before the sums go back to memory */

/* A tile with the addresses of its query and output vectors. */
struct work {
    const struct attention_tile *tile;
    int queries, head_dim, origin, chunks; /* chunks counted from `origin`, the first that any query sees */
    size_t stride;                         /* of scores */
    const float *q[TILE_QUERIES];
    float *out[TILE_QUERIES];
};

INLINE const uint16_t *chunk_at(const struct attention_tile *t, int chunk) {
    int block = chunk, inside = 0;
    if (t->chunks_in_block > 1) {
        block = chunk / t->chunks_in_block;
        inside = chunk % t->chunks_in_block;
    }
    return t->pool + (size_t)t->table[block] * t->block_elements + (size_t)inside * t->chunk_elements;
}

INLINE vi load_pairs(const uint16_t *from) { return vi_load((const int32_t *)(const void *)from); }

/* Scores of `count` queries against `chunks` chunks of 16 tokens; fetches the chunks `next` meanwhile. */
INLINE void score(int count, int chunks, const struct work *w, int first, const uint16_t *const *k,
                  const uint16_t *const *next, float *to) {
    vf acc[6];
    const float *const *q = w->q + first;
    UNROLL for (int i = 0; i < count * chunks; i++) acc[i] = vf_set(0);
    for (int d = 0; d < w->head_dim; d += 2)
        UNROLL for (int c = 0; c < chunks; c++) {
            vi pairs = load_pairs(k[c] + d * CHUNK_TOKENS);
            __builtin_prefetch(next[c] + d * CHUNK_TOKENS);
            vf even = vf_even_bf16(pairs), odd = vf_odd_bf16(pairs);
            UNROLL for (int i = 0; i < count; i++) {
                acc[i * chunks + c] = vf_fma(vf_set(q[i][d]), even, acc[i * chunks + c]);
                acc[i * chunks + c] = vf_fma(vf_set(q[i][d + 1]), odd, acc[i * chunks + c]);
            }
        }
    UNROLL for (int i = 0; i < count; i++)
        UNROLL for (int c = 0; c < chunks; c++)
            vf_store(to + (size_t)(first + i) * w->stride + c * CHUNK_TOKENS, acc[i * chunks + c]);
}

/* All queries against one chunk, or against two when few queries leave registers free. */
static void score_chunks(const struct work *w, int chunks, const uint16_t *const *k, const uint16_t *const *next, float *to) {
    for (int first = 0; first < w->queries;) {
        int left = w->queries - first, count = left >= 6 ? 6 : left;
        if (chunks == 2) {
            if (count >= 3) count = 3, score(3, 2, w, first, k, next, to);
            else if (count == 2) score(2, 2, w, first, k, next, to);
            else score(1, 2, w, first, k, next, to);
        } else {
            if (count == 6) score(6, 1, w, first, k, next, to);
            else if (count >= 4) count = 4, score(4, 1, w, first, k, next, to);
            else if (count == 3) score(3, 1, w, first, k, next, to);
            else if (count == 2) score(2, 1, w, first, k, next, to);
            else score(1, 1, w, first, k, next, to);
        }
        first += count;
    }
}

/* K of a chunk that comes `AHEAD` later; past the last chunk, V, whose turn is next. */
INLINE const uint16_t *k_ahead(const struct work *w, int chunk) {
    chunk += AHEAD;
    if (chunk < w->chunks) return chunk_at(w->tile, w->origin + chunk);
    chunk -= w->chunks;
    return chunk_at(w->tile, w->origin + (chunk < w->chunks ? chunk : 0)) + w->tile->v_offset;
}

static void score_all(const struct work *w) {
    const struct attention_tile *t = w->tile;
    for (int c = 0, pair; c < w->chunks; c += pair) {
        pair = w->queries <= 3 && c + 1 < w->chunks ? 2 : 1;
        const uint16_t *k[2] = {chunk_at(t, w->origin + c), chunk_at(t, w->origin + c + pair - 1)};
        const uint16_t *next[2] = {k_ahead(w, c), k_ahead(w, c + pair - 1)};
        score_chunks(w, pair, k, next, t->scores + (size_t)c * CHUNK_TOKENS);
    }
}

static const int32_t lane_numbers[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* All ones in lanes whose token, counted from the chunk's first, is in [from, to). */
INLINE vi lanes_between(int from, int to) {
    vi lane = vi_load(lane_numbers), low = vi_less(lane, vi_set(from)), high = vi_less(lane, vi_set(to));
    EACH_PART high.p[part] &= ~low.p[part];
    return high;
}

/* Scores of tokens [begin, end) of the tile's chunks to exp(score - largest), others to 0. Returns their sum. */
static float soften(float *scores, int chunks, int begin, int end) {
    vf largest = vf_set(MASKED);
    for (int c = 0; c < chunks; c++) {
        int at = c * CHUNK_TOKENS;
        vf x = vf_load(scores + at);
        if (begin > at || end < at + CHUNK_TOKENS) {
            x = vf_select(lanes_between(begin - at, end - at), x, vf_set(MASKED));
            vf_store(scores + at, x);
        }
        largest = vf_max(largest, x);
    }
    vf top = vf_set(vf_largest(largest)), sum = vf_set(0);
    for (int c = 0; c < chunks; c++) {
        int at = c * CHUNK_TOKENS;
        vf e = vf_exp(vf_sub(vf_load(scores + at), top));
        if (begin > at || end < at + CHUNK_TOKENS) e = vf_select(lanes_between(begin - at, end - at), e, vf_set(0));
        vf_store(scores + at, e);
        sum = vf_add(sum, e);
    }
    return vf_sum(sum);
}

/* `chunks` chunks of V; of the last one only `tokens` tokens. p: their scores. */
struct value_run {
    const uint16_t *v[RUN_CHUNKS], *next[RUN_CHUNKS]; /* next: what is fetched meanwhile */
    const float *p;
    int chunks, tokens;
};

/* out[16 * wide dimensions from d] of `count` queries += p . V. */
INLINE void mix(int count, int wide, const struct work *w, int first, int d, const struct value_run *run) {
    vf acc[6];
    float *const *out = w->out + first;
    const float *p = run->p + (size_t)first * w->stride;
    UNROLL for (int i = 0; i < count; i++)
        UNROLL for (int j = 0; j < wide; j++) acc[i * wide + j] = vf_load(out[i] + d + j * LANES);
    for (int c = 0; c < run->chunks; c++, p += CHUNK_TOKENS) {
        const uint16_t *v = run->v[c] + 2 * d, *next = run->next[c] + 2 * d;
        int tokens = c + 1 < run->chunks ? CHUNK_TOKENS : run->tokens, token = 0;
        for (; token + 1 < tokens; token += 2, v += 2 * w->head_dim, next += 2 * w->head_dim)
            UNROLL for (int j = 0; j < wide; j++) {
                vi pairs = load_pairs(v + 2 * j * LANES);
                __builtin_prefetch(next + 2 * j * LANES);
                vf even = vf_even_bf16(pairs), odd = vf_odd_bf16(pairs);
                UNROLL for (int i = 0; i < count; i++) {
                    const float *weight = p + i * w->stride + token;
                    acc[i * wide + j] = vf_fma(vf_set(weight[0]), even, acc[i * wide + j]);
                    acc[i * wide + j] = vf_fma(vf_set(weight[1]), odd, acc[i * wide + j]);
                }
                }
        if (token < tokens) /* the other token of this pair is not written yet: its bits may be anything, even NaN */
            UNROLL for (int j = 0; j < wide; j++) {
                vf even = vf_even_bf16(load_pairs(v + 2 * j * LANES));
                UNROLL for (int i = 0; i < count; i++)
                    acc[i * wide + j] = vf_fma(vf_set(p[i * w->stride + token]), even, acc[i * wide + j]);
            }
    }
    UNROLL for (int i = 0; i < count; i++)
        UNROLL for (int j = 0; j < wide; j++) vf_store(out[i] + d + j * LANES, acc[i * wide + j]);
}

/* All dimensions of `count` queries, `wide` vectors of 16 at a time and what is left one at a time. */
#define MIX_ALL(count, wide)                                                                              \
    do {                                                                                                  \
        int d = 0;                                                                                        \
        for (; d + wide * LANES <= w->head_dim; d += wide * LANES) mix(count, wide, w, first, d, run);    \
        for (; wide > 1 && d < w->head_dim; d += LANES) mix(count, 1, w, first, d, run);                  \
        first += count;                                                                                   \
    } while (0)

static void mix_run(const struct work *w, const struct value_run *run) {
    for (int first = 0; first < w->queries;) {
        int left = w->queries - first;
        if (left >= 6) MIX_ALL(6, 1);
        else if (left >= 4) MIX_ALL(4, 1);
        else if (left == 3) MIX_ALL(3, 2);
        else if (left == 2) MIX_ALL(2, 2);
        else MIX_ALL(1, 4);
    }
}

static void mix_all(const struct work *w, int tokens) {
    const struct attention_tile *t = w->tile;
    for (int c = 0; c < w->chunks; c += RUN_CHUNKS) {
        struct value_run run = {.p = t->scores + (size_t)c * CHUNK_TOKENS, .tokens = CHUNK_TOKENS};
        for (; run.chunks < RUN_CHUNKS && c + run.chunks < w->chunks; run.chunks++) {
            int ahead = c + run.chunks + AHEAD;
            run.v[run.chunks] = chunk_at(t, w->origin + c + run.chunks) + t->v_offset;
            run.next[run.chunks] = ahead < w->chunks ? chunk_at(t, w->origin + ahead) + t->v_offset : run.v[run.chunks];
        }
        if (c + run.chunks == w->chunks) run.tokens = tokens - (w->chunks - 1) * CHUNK_TOKENS;
        mix_run(w, &run);
    }
}

INLINE int first_key(const struct attention_tile *t, int row) {
    int position = t->positions[row];
    return t->window > 0 && position >= t->window ? position - t->window + 1 : 0;
}

void KERNEL(attend)(const struct attention_tile *t) {
    int last = t->positions[t->rows - 1] + 1;
    struct work w = {.tile = t, .queries = t->rows * t->heads, .head_dim = t->head_dim, .stride = t->score_stride};
    w.origin = first_key(t, 0) / CHUNK_TOKENS;
    w.chunks = (last + CHUNK_TOKENS - 1) / CHUNK_TOKENS - w.origin;
    for (int i = 0; i < w.queries; i++) {
        int row = i / t->heads, head = i % t->heads;
        w.q[i] = t->q + (size_t)row * t->q_stride + (size_t)head * t->head_dim;
        w.out[i] = t->out + (size_t)row * t->out_stride + (size_t)head * t->head_dim;
        memset(w.out[i], 0, sizeof(float) * (size_t)t->head_dim);
    }
    score_all(&w);
    float inverse[TILE_QUERIES];
    for (int i = 0; i < w.queries; i++) {
        int row = i / t->heads, base = w.origin * CHUNK_TOKENS;
        inverse[i] = 1.0f / soften(t->scores + i * w.stride, w.chunks, first_key(t, row) - base, t->positions[row] + 1 - base);
    }
    mix_all(&w, last - w.origin * CHUNK_TOKENS);
    for (int i = 0; i < w.queries; i++)
        for (int d = 0; d < t->head_dim; d += LANES) vf_store(w.out[i] + d, vf_scale(vf_load(w.out[i] + d), inverse[i]));
}

/* Attention of a tile of query vectors over paged K and V, in two passes with the scores in between.
 *
 * A query's result does not depend on its tile: scores add over dimensions in order, the softmax and the sum over V add
 * over tokens in order from the sequence's start, and what a tile computes beyond a query's own keys enters as exact
 * zeros. Chunk boundaries are multiples of 16 positions whatever the step.
 */
#include "kernels.h"
#include "simd.h"

#define MASKED (-3.0e38f)
#define BLOCK_QUERIES 6 /* query vectors in registers at once */

INLINE const uint16_t *chunk_at(const struct attention_tile *t, int chunk) {
    return t->pool + (size_t)t->table[chunk / t->chunks_in_block] * t->block_elements +
           (size_t)(chunk % t->chunks_in_block) * t->chunk_elements;
}

INLINE const float *query_at(const struct attention_tile *t, int i) {
    return t->q + (size_t)(i / t->heads) * t->q_stride + (size_t)(i % t->heads) * t->head_dim;
}
INLINE float *out_at(const struct attention_tile *t, int i) {
    return t->out + (size_t)(i / t->heads) * t->out_stride + (size_t)(i % t->heads) * t->head_dim;
}

INLINE void prefetch_chunk(const uint16_t *from, size_t elements) {
    for (size_t i = 0; i < elements; i += 32) __builtin_prefetch(from + i);
}

/* Scores of `count` queries from `first` against `chunks` chunks of 16 tokens. */
INLINE void score(const struct attention_tile *t, int count, int chunks, int first, const uint16_t *const *k, float *to) {
    const float *q[BLOCK_QUERIES];
    vf acc[BLOCK_QUERIES * 2];
    UNROLL for (int i = 0; i < count; i++) q[i] = query_at(t, first + i);
    UNROLL for (int i = 0; i < count * chunks; i++) acc[i] = vf_set(0);
    for (int d = 0; d < t->head_dim; d += 2)
        UNROLL for (int c = 0; c < chunks; c++) {
            vi pairs = vi_load((const int32_t *)(const void *)(k[c] + d * CHUNK_TOKENS));
            vf even = vf_even_bf16(pairs), odd = vf_odd_bf16(pairs);
            UNROLL for (int i = 0; i < count; i++) {
                acc[i * chunks + c] = vf_fma(vf_set(q[i][d]), even, acc[i * chunks + c]);
                acc[i * chunks + c] = vf_fma(vf_set(q[i][d + 1]), odd, acc[i * chunks + c]);
            }
        }
    UNROLL for (int i = 0; i < count; i++)
        UNROLL for (int c = 0; c < chunks; c++)
            vf_store(to + (size_t)(first + i) * t->score_stride + c * CHUNK_TOKENS, acc[i * chunks + c]);
}

/* All queries of the tile against one chunk, or two when few queries leave registers free. */
static void score_chunks(const struct attention_tile *t, int queries, int chunks, const uint16_t *const *k, float *to) {
    for (int first = 0; first < queries;) {
        int left = queries - first;
        if (chunks == 2) {
            if (left >= 3) score(t, 3, 2, first, k, to), first += 3;
            else if (left == 2) score(t, 2, 2, first, k, to), first += 2;
            else score(t, 1, 2, first, k, to), first += 1;
        } else {
            if (left >= 6) score(t, 6, 1, first, k, to), first += 6;
            else if (left >= 4) score(t, 4, 1, first, k, to), first += 4;
            else if (left == 3) score(t, 3, 1, first, k, to), first += 3;
            else if (left == 2) score(t, 2, 1, first, k, to), first += 2;
            else score(t, 1, 1, first, k, to), first += 1;
        }
    }
}

static const int32_t lane_numbers[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* All ones in lanes whose token, counted from the chunk's first, is in [from, to). */
INLINE vi lanes_between(int from, int to) {
    vi lane = vi_load(lane_numbers), low = vi_less(lane, vi_set(from)), high = vi_less(lane, vi_set(to));
    EACH_PART high.p[part] &= ~low.p[part];
    return high;
}

/* Scores of tokens [begin, end) to exp(score - largest), others to 0. Returns their sum. Positions count from the
 * tile's first chunk. */
static float soften(float *scores, int chunks, int begin, int end) {
    vf largest = vf_set(MASKED);
    for (int c = 0; c < chunks; c++) {
        vi seen = lanes_between(begin - c * CHUNK_TOKENS, end - c * CHUNK_TOKENS);
        vf x = vf_select(seen, vf_load(scores + c * CHUNK_TOKENS), vf_set(MASKED));
        largest = vf_max(largest, x);
    }
    vf top = vf_set(vf_largest(largest)), sum = vf_set(0);
    for (int c = 0; c < chunks; c++) {
        vi seen = lanes_between(begin - c * CHUNK_TOKENS, end - c * CHUNK_TOKENS);
        vf e = vf_select(seen, vf_exp(vf_sub(vf_load(scores + c * CHUNK_TOKENS), top)), vf_set(0));
        vf_store(scores + c * CHUNK_TOKENS, e);
        sum = vf_add(sum, e);
    }
    return vf_sum(sum);
}

/* out[16 * wide dimensions from d] of `count` queries += p . V over the first `tokens` tokens of a chunk. */
INLINE void mix(const struct attention_tile *t, int count, int wide, int first, int d, const uint16_t *v, const float *p,
                int tokens) {
    vf acc[BLOCK_QUERIES * 2];
    float *out[BLOCK_QUERIES];
    UNROLL for (int i = 0; i < count; i++) {
        out[i] = out_at(t, first + i) + d;
        UNROLL for (int j = 0; j < wide; j++) acc[i * wide + j] = vf_load(out[i] + j * LANES);
    }
    p += (size_t)first * t->score_stride;
    for (int token = 0; token + 1 < tokens; token += 2)
        UNROLL for (int j = 0; j < wide; j++) {
            vi pairs = vi_load((const int32_t *)(const void *)(v + (size_t)token * t->head_dim + 2 * (d + j * LANES)));
            vf even = vf_even_bf16(pairs), odd = vf_odd_bf16(pairs);
            UNROLL for (int i = 0; i < count; i++) {
                const float *w = p + i * t->score_stride + token;
                acc[i * wide + j] = vf_fma(vf_set(w[0]), even, acc[i * wide + j]);
                acc[i * wide + j] = vf_fma(vf_set(w[1]), odd, acc[i * wide + j]);
            }
        }
    if (tokens & 1) /* the other token of this pair is not written yet: its bits must not be touched, they may be NaN */
        UNROLL for (int j = 0; j < wide; j++) {
            vi pairs = vi_load((const int32_t *)(const void *)(v + (size_t)(tokens - 1) * t->head_dim + 2 * (d + j * LANES)));
            UNROLL for (int i = 0; i < count; i++)
                acc[i * wide + j] = vf_fma(vf_set(p[i * t->score_stride + tokens - 1]), vf_even_bf16(pairs), acc[i * wide + j]);
        }
    UNROLL for (int i = 0; i < count; i++)
        UNROLL for (int j = 0; j < wide; j++) vf_store(out[i] + j * LANES, acc[i * wide + j]);
}

static void mix_chunk(const struct attention_tile *t, int queries, const uint16_t *v, const float *p, int tokens) {
    for (int first = 0; first < queries;) {
        int left = queries - first, count = left >= 6 ? 6 : left >= 3 ? 3 : left, d = 0;
        if (count == 6) {
            for (; d < t->head_dim; d += LANES) mix(t, 6, 1, first, d, v, p, tokens);
        } else {
            for (; d + LANES < t->head_dim; d += 2 * LANES) {
                if (count == 3) mix(t, 3, 2, first, d, v, p, tokens);
                else if (count == 2) mix(t, 2, 2, first, d, v, p, tokens);
                else mix(t, 1, 2, first, d, v, p, tokens);
            }
            for (; d < t->head_dim; d += LANES) {
                if (count == 3) mix(t, 3, 1, first, d, v, p, tokens);
                else if (count == 2) mix(t, 2, 1, first, d, v, p, tokens);
                else mix(t, 1, 1, first, d, v, p, tokens);
            }
        }
        first += count;
    }
}

INLINE int first_key(const struct attention_tile *t, int row) {
    int position = t->positions[row];
    return t->window > 0 && position >= t->window ? position - t->window + 1 : 0;
}

void KERNEL(attend)(const struct attention_tile *t) {
    int queries = t->rows * t->heads, last = t->positions[t->rows - 1] + 1;
    int origin = first_key(t, 0) / CHUNK_TOKENS, chunks = (last + CHUNK_TOKENS - 1) / CHUNK_TOKENS - origin;
    size_t half = (size_t)CHUNK_TOKENS * t->head_dim;
    for (int c = 0; c < chunks;) {
        int pair = queries <= 3 && c + 1 < chunks ? 2 : 1;
        const uint16_t *k[2] = {chunk_at(t, origin + c), chunk_at(t, origin + c + pair - 1)};
        for (int ahead = c + 2; ahead < c + 2 + pair && ahead < chunks; ahead++)
            prefetch_chunk(chunk_at(t, origin + ahead), half);
        score_chunks(t, queries, pair, k, t->scores + c * CHUNK_TOKENS);
        c += pair;
    }
    float inverse[TILE_QUERIES];
    for (int i = 0; i < queries; i++) {
        int row = i / t->heads, begin = first_key(t, row) - origin * CHUNK_TOKENS;
        int end = t->positions[row] + 1 - origin * CHUNK_TOKENS;
        inverse[i] = 1.0f / soften(t->scores + i * t->score_stride, chunks, begin, end);
        memset(out_at(t, i), 0, sizeof(float) * (size_t)t->head_dim);
    }
    for (int c = 0; c < chunks; c++) {
        int tokens = last - (origin + c) * CHUNK_TOKENS;
        if (c + 2 < chunks) prefetch_chunk(chunk_at(t, origin + c + 2) + t->v_offset, half);
        mix_chunk(t, queries, chunk_at(t, origin + c) + t->v_offset, t->scores + c * CHUNK_TOKENS,
                  tokens < CHUNK_TOKENS ? tokens : CHUNK_TOKENS);
    }
    for (int i = 0; i < queries; i++) {
        float *out = out_at(t, i);
        for (int d = 0; d < t->head_dim; d += LANES) vf_store(out + d, vf_scale(vf_load(out + d), inverse[i]));
    }
}

/* Elementwise kernels over one row: norms, 8-bit activations, rotary embedding, gated activation, K and V storage. */
#include "kernels.h"
#include "simd.h"

#include <math.h>

/* Within -127 and 127 whatever comes, NaN too: the products rely on it. A NaN shows in the row's scales. */
INLINE vi round_to_byte(vf x) { return vf_round(vf_min(vf_max(x, vf_set(-127.0f)), vf_set(127.0f))); }

void KERNEL(quantize)(const float *x, int row, const struct activations *to) {
    int8_t *a = to->a + (size_t)row * to->inputs;
    float *scale = to->scale + (size_t)row * to->groups, *sum = to->sum + (size_t)row * to->groups;
    for (int g = 0; g < to->groups; g++, x += GROUP, a += GROUP) {
        vf low = vf_load(x), high = vf_load(x + LANES);
        float largest = vf_largest(vf_max(vf_abs(low), vf_abs(high)));
        float inverse = largest > 0 ? 127.0f / largest : 0.0f;
        vi q[2] = {round_to_byte(vf_scale(low, inverse)), round_to_byte(vf_scale(high, inverse))};
        vi_store_bytes(a, q[0]);
        vi_store_bytes(a + LANES, q[1]);
        scale[g] = largest / 127.0f;
        sum[g] = scale[g] * (float)vi_sum(vi_add(q[0], q[1]));
    }
}

void KERNEL(norm)(const float *x, const float *weight, int n, float eps, float *out) {
    vf squares = vf_set(0);
    for (int i = 0; i < n; i += LANES) squares = vf_fma(vf_load(x + i), vf_load(x + i), squares);
    float factor = 1.0f / sqrtf(vf_sum(squares) / (float)n + eps);
    for (int i = 0; i < n; i += LANES)
        vf_store(out + i, vf_mul(vf_scale(vf_load(x + i), factor), vf_load(weight + i)));
}

void KERNEL(rope)(float *x, const float *cosine, const float *sine, int n, float scale) {
    float *restrict first = x, *restrict second = x + n / 2;
    for (int i = 0; i < n / 2; i++) {
        float a = first[i], b = second[i];
        first[i] = (a * cosine[i] - b * sine[i]) * scale;
        second[i] = (b * cosine[i] + a * sine[i]) * scale;
    }
}

/* x * sigmoid(y) = x / (1 + exp(-y)) */
INLINE vf gated(vf x, vf y) { return vf_div(x, vf_add(vf_set(1.0f), vf_exp(vf_sub(vf_set(0.0f), y)))); }

void KERNEL(activate)(int activation, float *gate, const float *up, int n) {
    if (activation == NATIVE_SILU) {
        for (int i = 0; i < n; i += LANES) {
            vf x = vf_load(gate + i);
            vf_store(gate + i, vf_mul(gated(x, x), vf_load(up + i)));
        }
        return;
    }
    /* gelu_tanh(x) = x / 2 * (1 + tanh(z)) = x * sigmoid(2 z),  z = sqrt(2 / pi) * (x + 0.044715 x^3) */
    for (int i = 0; i < n; i += LANES) {
        vf x = vf_load(gate + i);
        vf cube = vf_fma(vf_mul(vf_mul(x, x), x), vf_set(0.044715f), x);
        vf_store(gate + i, vf_mul(gated(x, vf_scale(cube, 1.5957691216f)), vf_load(up + i)));
    }
}

void KERNEL(add)(float *x, const float *y, int n) {
    for (int i = 0; i < n; i += LANES) vf_store(x + i, vf_add(vf_load(x + i), vf_load(y + i)));
}

void KERNEL(store_kv)(const float *k, const float *v, int head_dim, uint16_t *k_chunk, uint16_t *v_chunk, int slot) {
    uint16_t *k_to = k_chunk + 2 * slot, *v_to = v_chunk + slot / 2 * 2 * head_dim + (slot & 1);
    for (int i = 0; i < head_dim; i += LANES) {
        int32_t k_bits[LANES], v_bits[LANES];
        vi_store(k_bits, vf_to_bf16(vf_load(k + i)));
        vi_store(v_bits, vf_to_bf16(vf_load(v + i)));
        for (int j = 0; j < LANES; j += 2) {
            uint32_t pair = (uint32_t)k_bits[j] | (uint32_t)k_bits[j + 1] << 16;
            memcpy(k_to + (i + j) * CHUNK_TOKENS, &pair, 4); /* little-endian, as are all machines we build for */
        }
        for (int j = 0; j < LANES; j++) v_to[2 * (i + j)] = (uint16_t)v_bits[j];
    }
}

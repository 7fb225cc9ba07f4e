/* Products of bipolar integers, one pair of bit planes at a time, and rows of activations as bit planes.
 *
 * Every bit stands for +1 or -1, so a weight of p bits is sum_i (2 b_i - 1) 2^i, an odd integer, and so is an activation
 * of q bits. Over a group of G elements
 *   sum w a = G (2^p - 1) (2^q - 1) - 2 sum_ij 2^(i + j) popcount(w_i xor a_j),
 * exactly, in integers. After "Efficient Arbitrary Precision Acceleration for LLMs on GPU Tensor Cores", which has the
 * tensor cores do the popcounts; here vpshufb looks up the bits of 64 nibbles at once. The group's integer is turned into
 * a float times both scales and added in ascending order of groups: a row's result is the same bits alone and in a batch.
 */
#include "kernels.h"
#include "simd.h"

#if defined(__AVX2__)

#define BLOCK 4 /* planes of activations whose weights 1, 2, 4, 8 are in the looked-up bytes: 4 * 15 * 2 fits a byte */

/* Stops the compiler from regrouping sums, and from keeping every broadcast word in memory: both need more registers than
 * there are, and a broadcast costs no more than a load. */
#define KEEP_ORDER(x) __asm__("" : "+x"(x))
#define READ_AGAIN(pointer) __asm__("" : "+r"(pointer) : : "memory")

/* Bits of each nibble in the first half of a byte sum, times 2^j. */
INLINE __m256i lookup(int j) {
    const __m256i bits = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,
                                          0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    return _mm256_slli_epi16(bits, j); /* 4 << 3 stays in its byte */
}

/* Sums of 2^j popcount(w xor a_j) over `count` planes a and both halves, in pairs of bytes: at most 480 in each int16. */
INLINE __m256i block_sums(int count, const __m256i *w, const uint32_t *a) {
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i low = _mm256_setzero_si256(), high = low;
    UNROLL for (int h = 0; h < 2; h++) {
        __m256i w_low = _mm256_and_si256(w[h], mask), w_high = _mm256_and_si256(_mm256_srli_epi16(w[h], 4), mask);
        UNROLL for (int j = 0; j < count; j++) {
            __m256i a_low = _mm256_set1_epi32((int)a[4 * j + 2 * h]), a_high = _mm256_set1_epi32((int)a[4 * j + 2 * h + 1]);
            low = _mm256_add_epi8(low, _mm256_shuffle_epi8(lookup(j), _mm256_xor_si256(w_low, a_low)));
            high = _mm256_add_epi8(high, _mm256_shuffle_epi8(lookup(j), _mm256_xor_si256(w_high, a_high)));
            KEEP_ORDER(low);
            KEEP_ORDER(high);
        }
    }
    return _mm256_maddubs_epi16(_mm256_add_epi8(low, high), _mm256_set1_epi8(1));
}

INLINE vi group_sums(int bits, int planes, const uint8_t *record, const uint32_t *a) {
    __m256i total[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int i = 0; i < planes; i++, record += 2 * 64) {
        const __m256i weight = _mm256_set1_epi16((short)(1 << i));
        UNROLL for (int c = 0; c < 2; c++) {
            const __m256i *from = (const __m256i *)record + c;
            READ_AGAIN(a);
            const __m256i w[2] = {_mm256_load_si256(from), _mm256_load_si256(from + 2)};
            __m256i sums = block_sums(bits < BLOCK ? bits : BLOCK, w, a);
            if (bits > BLOCK)
                sums = _mm256_add_epi16(sums, _mm256_slli_epi16(block_sums(bits - BLOCK, w, a + 4 * BLOCK), BLOCK));
            total[c] = _mm256_add_epi32(total[c], _mm256_madd_epi16(sums, weight));
        }
    }
    vi r;
    memcpy(&r, total, sizeof r);
    return r;
}

#else

/* Bits of each lane. */
INLINE vi count_bits(vi x) {
    EACH_PART {
        upart v = (upart)x.p[part];
        v -= v >> 1 & 0x55555555;
        v = (v & 0x33333333) + (v >> 2 & 0x33333333);
        x.p[part] = (ipart)(((v + (v >> 4)) & 0x0f0f0f0f) * 0x01010101 >> 24);
    }
    return x;
}

INLINE vi group_sums(int bits, int planes, const uint8_t *record, const uint32_t *a) {
    vi total = vi_set(0);
    for (int i = 0; i < planes; i++)
        for (int h = 0; h < 2; h++, record += 64) {
            vi w = vi_load((const int32_t *)(const void *)record);
            for (int j = 0; j < bits; j++) {
                vi x = vi_set((int32_t)(a[4 * j + 2 * h] | a[4 * j + 2 * h + 1] << 4));
                EACH_PART x.p[part] ^= w.p[part];
                x = count_bits(x);
                EACH_PART total.p[part] += x.p[part] << (i + j);
            }
        }
    return total;
}

#endif

INLINE void multiply_row(int bits, const struct product *job, int panel, int row) {
    const struct matrix *w = job->w;
    const struct activations *x = job->x;
    const uint8_t *record = w->data + (size_t)panel * w->groups * w->record_bytes;
    const uint32_t *a = x->planes + (size_t)row * w->groups * PLANE_WORDS(bits);
    const float *scale = x->plane_scale + (size_t)row * w->groups;
    float *y = job->y + row * job->y_stride + (ptrdiff_t)panel * PANEL;
    const int32_t all_equal = BIPOLAR_GROUP * ((1 << w->planes) - 1) * ((1 << bits) - 1);
    vf f = job->accumulate ? vf_load(y) : vf_set(0);
    for (int g = 0; g < w->groups; g++, record += w->record_bytes, a += PLANE_WORDS(bits)) {
        vi dot = group_sums(bits, w->planes, record, a);
        EACH_PART dot.p[part] = all_equal - 2 * dot.p[part];
        vf d = vf_load_half((const uint16_t *)(const void *)(record + 2 * 64 * w->planes));
        f = vf_fma(vf_from_int(dot), vf_scale(d, scale[g]), f);
    }
    vf_store(y, f);
}

/* One function for each number of activation bits, so that its planes are unrolled. */
typedef void (*panel_kernel)(const struct product *job, int panel);
#define MULTIPLY_PANEL(bits)                                                                 \
    static __attribute__((noinline)) void multiply_panel_##bits(const struct product *job, int panel) { \
        for (int row = 0; row < job->x->rows; row++) multiply_row(bits, job, panel, row);    \
    }
MULTIPLY_PANEL(1) MULTIPLY_PANEL(2) MULTIPLY_PANEL(3) MULTIPLY_PANEL(4)
MULTIPLY_PANEL(5) MULTIPLY_PANEL(6) MULTIPLY_PANEL(7) MULTIPLY_PANEL(8)
static const panel_kernel panel_kernels[] = {
    NULL,
    multiply_panel_1, multiply_panel_2, multiply_panel_3, multiply_panel_4,
    multiply_panel_5, multiply_panel_6, multiply_panel_7, multiply_panel_8,
};

void KERNEL(multiply_planes)(const struct product *job, int first_panel, int last_panel) {
    for (int panel = first_panel; panel < last_panel; panel++) panel_kernels[job->x->plane_bits](job, panel);
}

/* Where the largest level lies, as a share of the group's largest magnitude: least error for normal values (64 of them),
 * which few levels serve best when they leave the tails to the outermost level. */
static const float shares[] = {0, 0.33f, 0.62f, 0.85f, 1, 1, 1, 1, 1};

/* Bit j of 32 codes, given less 128. */
INLINE uint32_t plane_of(const int8_t *codes, int j) {
#if defined(__AVX2__)
    __m256i x = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)codes), _mm256_set1_epi8((char)0x80));
    return (uint32_t)_mm256_movemask_epi8(_mm256_sll_epi16(x, _mm_cvtsi32_si128(7 - j)));
#else
    uint32_t plane = 0;
    for (int k = 0; k < 32; k++) plane |= (uint32_t)((codes[k] + 128) >> j & 1) << k;
    return plane;
#endif
}

void KERNEL(quantize_planes)(const float *x, int row, const struct activations *to) {
    const int bits = to->plane_bits, groups = to->inputs / BIPOLAR_GROUP;
    const float top = (float)((1 << bits) - 1);
    uint32_t *planes = to->planes + (size_t)row * groups * PLANE_WORDS(bits);
    float *scale = to->plane_scale + (size_t)row * groups;
    for (int g = 0; g < groups; g++, x += BIPOLAR_GROUP) {
        int8_t codes[BIPOLAR_GROUP];
        vf peak = vf_set(0);
        for (int i = 0; i < BIPOLAR_GROUP; i += LANES) peak = vf_max(vf_abs(vf_load(x + i)), peak);
        float reach = vf_largest(peak) * shares[bits];
        float inverse = reach > 0 ? top / (2 * reach) : 0.0f; /* one over the distance of two levels */
        for (int i = 0; i < BIPOLAR_GROUP; i += LANES) {
            vf level = vf_fma(vf_load(x + i), vf_set(inverse), vf_set(top / 2));
            vi code = vf_round(vf_min(vf_max(level, vf_set(0)), vf_set(top)));
            EACH_PART code.p[part] -= 128;
            vi_store_bytes(codes + i, code);
        }
        scale[g] = reach / top;
        for (int j = 0; j < bits; j++)
            for (int h = 0; h < 2; h++) {
                uint32_t plane = plane_of(codes + 32 * h, j);
                *planes++ = plane & 0x0f0f0f0f;
                *planes++ = plane >> 4 & 0x0f0f0f0f;
            }
    }
}

/* Attention of the newest token of each of several requests over all its keys.
 *
 * Softmax block by block of keys (Milakov and Gimelshein 2018, arXiv:1805.02867): products,
 * probabilities and sums are float32, keys and values are read once for the query heads that share
 * them. A request's sums are in the same order whatever requests are beside it.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#define BLOCK 64    /* keys, whose products wait for their maximum */
#define TOGETHER 4  /* query heads, whose sums fit into the registers */
#define WIDEST 256  /* numbers of a head */

typedef uint16_t bf16;

typedef struct {
    int64_t row;              /* of the query and the result */
    int64_t count;            /* of keys */
    const bf16 *keys, *values;  /* [H, count, D] */
    int64_t key_head, value_head;  /* from one head's to the next's; tokens lie side by side */
} Span;

typedef struct {
    float most[TOGETHER], total[TOGETHER]; /* of the products; of the exponentials */
    float sums[TOGETHER][WIDEST];
} State;

#define INLINE static inline __attribute__((always_inline))

/* exp(x) for x <= 0 to two units in the last place: 2^n times a polynomial of what is left */
INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-100.0f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504089f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145751953125f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860682030941723e-6f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* products[g][t] = scale * query_g . key_t */
INLINE void multiply_keys(const bf16 *query, int64_t query_head, const bf16 *keys, int64_t count,
                          int64_t width, float scale, const int heads,
                          float products[TOGETHER][BLOCK]) {
    for (int64_t t = 0; t < count; t++, keys += width) {
        __m512 sums[TOGETHER];
#pragma GCC unroll 4
        for (int g = 0; g < heads; g++) sums[g] = _mm512_setzero_ps();
        for (int64_t d = 0; d < width; d += 32) {
            const __m512bh numbers = (__m512bh)_mm512_loadu_si512(keys + d);
#pragma GCC unroll 4
            for (int g = 0; g < heads; g++)
                sums[g] = _mm512_dpbf16_ps(
                    sums[g], numbers, (__m512bh)_mm512_loadu_si512(query + g * query_head + d));
        }
#pragma GCC unroll 4
        for (int g = 0; g < heads; g++) products[g][t] = scale * _mm512_reduce_add_ps(sums[g]);
    }
}

/* Turn a block's products into exponentials, and what was summed before to the new maximum.
 * Returns what that multiplies the sums by. */
INLINE float weigh(float *products, int64_t count, float *most, float *total) {
    for (int64_t t = count; t < (count + 15) / 16 * 16; t++) products[t] = -INFINITY;
    __m512 largest = _mm512_set1_ps(*most);
    for (int64_t t = 0; t < count; t += 16)
        largest = _mm512_max_ps(largest, _mm512_loadu_ps(products + t));
    const float now = _mm512_reduce_max_ps(largest), before = expf(*most - now);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t t = 0; t < count; t += 16) {
        const __m512 powers =
            exponential(_mm512_sub_ps(_mm512_loadu_ps(products + t), _mm512_set1_ps(now)));
        const int64_t left = count - t;
        const __m512 kept = _mm512_maskz_mov_ps(left < 16 ? (1u << left) - 1 : 0xffff, powers);
        _mm512_storeu_ps(products + t, kept);
        sum = _mm512_add_ps(sum, kept);
    }
    *most = now;
    *total = *total * before + _mm512_reduce_add_ps(sum);
    return before;
}

/* sums_g = sums_g * before_g + the values, weighed */
INLINE void add_values(const bf16 *values, int64_t count, int64_t width, const int heads,
                       float products[TOGETHER][BLOCK], const float *before, State *state) {
    for (int64_t d = 0; d < width; d += 32) {
        __m512 low[TOGETHER], high[TOGETHER];
#pragma GCC unroll 4
        for (int g = 0; g < heads; g++) {
            const __m512 kept = _mm512_set1_ps(before[g]);
            low[g] = _mm512_mul_ps(_mm512_loadu_ps(state->sums[g] + d), kept);
            high[g] = _mm512_mul_ps(_mm512_loadu_ps(state->sums[g] + d + 16), kept);
        }
        const bf16 *value = values + d;
        for (int64_t t = 0; t < count; t++, value += width) {
            const __m512 first = _mm512_cvtpbh_ps((__m256bh)_mm256_loadu_epi16(value));
            const __m512 second = _mm512_cvtpbh_ps((__m256bh)_mm256_loadu_epi16(value + 16));
#pragma GCC unroll 4
            for (int g = 0; g < heads; g++) {
                const __m512 weight = _mm512_set1_ps(products[g][t]);
                low[g] = _mm512_fmadd_ps(weight, first, low[g]);
                high[g] = _mm512_fmadd_ps(weight, second, high[g]);
            }
        }
#pragma GCC unroll 4
        for (int g = 0; g < heads; g++) {
            _mm512_storeu_ps(state->sums[g] + d, low[g]);
            _mm512_storeu_ps(state->sums[g] + d + 16, high[g]);
        }
    }
}

INLINE void some_heads(const bf16 *query, int64_t query_head, const bf16 *keys,
                       const bf16 *values, int64_t count, int64_t width, float scale,
                       const int heads, bf16 *result) {
    State state;
    float products[TOGETHER][BLOCK], before[TOGETHER];
    for (int g = 0; g < heads; g++) {
        state.most[g] = -INFINITY, state.total[g] = 0;
        for (int64_t d = 0; d < width; d++) state.sums[g][d] = 0;
    }
    for (int64_t t = 0; t < count; t += BLOCK) {
        const int64_t here = count - t < BLOCK ? count - t : BLOCK;
        multiply_keys(query, query_head, keys + t * width, here, width, scale, heads, products);
        for (int g = 0; g < heads; g++)
            before[g] = weigh(products[g], here, &state.most[g], &state.total[g]);
        add_values(values + t * width, here, width, heads, products, before, &state);
    }
    for (int g = 0; g < heads; g++) {
        const __m512 share = _mm512_set1_ps(1.0f / state.total[g]);
        for (int64_t d = 0; d < width; d += 16)
            _mm256_storeu_epi16(result + g * width + d,
                                (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(
                                    _mm512_loadu_ps(state.sums[g] + d), share)));
    }
}

/* query [.., H, D] by row and head, result [.., H, D] without gaps, spans [N] */
void attend(const bf16 *query, bf16 *result, const Span *spans, int64_t num_spans, int64_t heads,
            int64_t key_heads, int64_t width, int64_t query_row, int64_t query_head, float scale,
            int threads) {
    const int64_t shares = heads / key_heads;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int64_t n = 0; n < num_spans; n++)
        for (int64_t h = 0; h < key_heads; h++) {
            const Span *span = spans + n;
            const bf16 *keys = span->keys + h * span->key_head;
            const bf16 *values = span->values + h * span->value_head;
            for (int64_t g = 0; g < shares; g += TOGETHER) {
                const int64_t head = h * shares + g;
                const bf16 *from = query + span->row * query_row + head * query_head;
                bf16 *to = result + (span->row * heads + head) * width;
#define CASE(some)                                                                          \
    case some:                                                                              \
        some_heads(from, query_head, keys, values, span->count, width, scale, some, to);    \
        break;
                switch (shares - g < TOGETHER ? shares - g : TOGETHER) {
                    CASE(1) CASE(2) CASE(3) CASE(4)
                }
            }
        }
}

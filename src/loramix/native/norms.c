/* Root-mean-square norms of bfloat16 rows, as transformers' models compute them, in one pass.
 *
 * y = w * x / sqrt(mean(x^2) + eps), in float32. Models differ in two ways: Gemma's weights are
 * 1 + w (`offset`), Llama's multiply what has been rounded already (`early`).
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#define MANY 32768 /* numbers, from which on a second thread is worth its call */

typedef uint16_t bf16;

static inline __m512 read16(const bf16 *from, __mmask16 which) {
    return _mm512_cvtpbh_ps((__m256bh)_mm256_maskz_loadu_epi16(which, from));
}

static inline __mmask16 within(int64_t left) { return left < 16 ? (1u << left) - 1 : 0xffff; }

static void normalise_row(const bf16 *x, const bf16 *weight, bf16 *y, int64_t width, float eps,
                          __m512 offset, int early) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t at = 0; at < width; at += 16) {
        const __m512 numbers = read16(x + at, within(width - at));
        squares = _mm512_fmadd_ps(numbers, numbers, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / (float)width;
    const __m512 scale = _mm512_set1_ps(1.0f / sqrtf(mean + eps));
    for (int64_t at = 0; at < width; at += 16) {
        const __mmask16 which = within(width - at);
        __m512 numbers = _mm512_mul_ps(read16(x + at, which), scale);
        if (early) numbers = _mm512_cvtpbh_ps(_mm512_cvtneps_pbh(numbers));
        numbers = _mm512_mul_ps(numbers, _mm512_add_ps(read16(weight + at, which), offset));
        _mm256_mask_storeu_epi16(y + at, which, (__m256i)_mm512_cvtneps_pbh(numbers));
    }
}

/* x, y [N, D], weight [D] */
void normalise(const bf16 *x, const bf16 *weight, bf16 *y, int64_t rows, int64_t width, float eps,
               float offset, int early, int threads) {
    const __m512 shift = _mm512_set1_ps(offset);
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width >= MANY)
    for (int64_t row = 0; row < rows; row++)
        normalise_row(x + row * width, weight, y + row * width, width, eps, shift, early);
}

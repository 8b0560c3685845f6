/* Few bfloat16 rows times a matrix, for CPUs with AVX512-BF16; tiles.py compiles and calls this.
 *
 * A matrix [O, K] lies in tiles of 16 outputs, [O / 16, K / 2, 16, 2]: one instruction multiplies
 * two neighbours of a row by theirs of 16 outputs. Sums are float32, each in the same order
 * whatever rows are beside its own, and rounded once.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define TALL 8 /* rows, and */
#define WIDE 2 /* tiles, at once: their sums fit into the registers */

typedef uint16_t bf16;

typedef struct {
    const bf16 *x;     /* [N, K], the pairs of a row side by side */
    const bf16 *tiles;
    const bf16 *scale; /* [N, O] for y = product * scale, NULL for y += product */
    bf16 *y;           /* [N, O] */
    int64_t rows, width, outputs, x_stride;
} Product;

static inline __attribute__((always_inline)) __m512 read16(const bf16 *from, __mmask16 which) {
    return _mm512_cvtpbh_ps((__m256bh)_mm256_maskz_loadu_epi16(which, from));
}

static inline __attribute__((always_inline)) void
finish(const Product *p, int64_t row, int64_t first, __m512 sum) {
    const int64_t left = p->outputs - first, at = row * p->outputs + first;
    const __mmask16 which = left < 16 ? (1u << left) - 1 : 0xffff;
    sum = p->scale ? _mm512_mul_ps(sum, read16(p->scale + at, which))
                   : _mm512_add_ps(sum, read16(p->y + at, which));
    _mm256_mask_storeu_epi16(p->y + at, which, (__m256i)_mm512_cvtneps_pbh(sum));
}

static inline __attribute__((always_inline)) void
block(const Product *p, int64_t row, const int tall, int64_t tile, const int wide) {
    const int64_t pairs = p->width / 2;
    const bf16 *x = p->x + row * p->x_stride, *matrix = p->tiles + tile * pairs * 32;
    __m512 sums[TALL][WIDE];
#pragma GCC unroll 8
    for (int n = 0; n < tall; n++)
#pragma GCC unroll 2
        for (int t = 0; t < wide; t++) sums[n][t] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++) {
        __m512bh weights[WIDE];
#pragma GCC unroll 2
        for (int t = 0; t < wide; t++) {
            const bf16 *here = matrix + (t * pairs + k) * 32;
            weights[t] = (__m512bh)_mm512_loadu_si512(here);
            _mm_prefetch(here + wide * pairs * 32, _MM_HINT_T1); /* of the tiles after these */
        }
#pragma GCC unroll 8
        for (int n = 0; n < tall; n++) {
            int32_t pair;
            memcpy(&pair, x + n * p->x_stride + 2 * k, sizeof pair);
            const __m512bh numbers = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
            for (int t = 0; t < wide; t++)
                sums[n][t] = _mm512_dpbf16_ps(sums[n][t], weights[t], numbers);
        }
    }
#pragma GCC unroll 8
    for (int n = 0; n < tall; n++)
#pragma GCC unroll 2
        for (int t = 0; t < wide; t++) finish(p, row + n, (tile + t) * 16, sums[n][t]);
}

#define CASE(tall) \
    case tall: \
        wide == WIDE ? block(p, row, tall, tile, WIDE) : block(p, row, tall, tile, 1); \
        break;

static void all_rows(const Product *p, int64_t tile, int wide) {
    for (int64_t row = 0; row < p->rows; row += TALL) {
        const int64_t left = p->rows - row;
        switch (left < TALL ? left : TALL) {
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
        }
    }
}

void multiply(const bf16 *x, const bf16 *tiles, const bf16 *scale, bf16 *y, int64_t rows,
              int64_t width, int64_t outputs, int64_t x_stride, int threads) {
    const Product p = {x, tiles, scale, y, rows, width, outputs, x_stride};
    const int64_t count = (outputs + 15) / 16;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t tile = 0; tile < count; tile += WIDE)
        all_rows(&p, tile, count - tile < WIDE ? 1 : WIDE);
}

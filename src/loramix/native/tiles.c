/* Few bfloat16 rows times a matrix, and an adapter's update with them.
 *
 * A matrix [O, K] lies in tiles of 16 outputs, G of them woven into one another:
 * [O / 16 / G, K / 2, G, 16, 2]. One instruction multiplies two neighbours of a row by theirs of 16
 * outputs. Sums are float32, each in the same order whatever rows are beside its own, and rounded
 * once. A second product of a few columns, an update's, may go into the same sums.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

/* Rows and tiles at once: their sums fit into the registers. */
#define TALL 8
#define WIDE 2
#define FEW 6 /* rows, for which ... */
#define WHOLE 4 /* woven tiles are read from end to end, as fast as memory gives them */

typedef uint16_t bf16;

typedef struct {
    const bf16 *x;     /* [N, K], the pairs of a row side by side */
    const bf16 *tiles;
    const bf16 *scale;  /* [N, O], or NULL, for y = product * scale */
    const bf16 *addend; /* [N, O], or [O] with a stride of 0, or NULL, for y = product + addend */
    bf16 *y;            /* [N, O] */
    const bf16 *thin;   /* [N, R], or NULL, for y = product + thin times ... */
    const bf16 *thin_tiles; /* [O / 16, R / 2, 16, 2] */
    int64_t rows, width, outputs, x_stride, addend_stride, woven, thin_width, thin_stride;
} Product;

static inline __attribute__((always_inline)) __m512 read16(const bf16 *from, __mmask16 which) {
    return _mm512_cvtpbh_ps((__m256bh)_mm256_maskz_loadu_epi16(which, from));
}

static inline __attribute__((always_inline)) void
finish(const Product *p, int64_t row, int64_t first, __m512 sum) {
    const int64_t left = p->outputs - first, at = row * p->outputs + first;
    const __mmask16 which = left < 16 ? (1u << left) - 1 : 0xffff;
    if (p->scale) sum = _mm512_mul_ps(sum, read16(p->scale + at, which));
    if (p->addend)
        sum = _mm512_add_ps(sum, read16(p->addend + row * p->addend_stride + first, which));
    _mm256_mask_storeu_epi16(p->y + at, which, (__m256i)_mm512_cvtneps_pbh(sum));
}

/* Add rows x [tall, 2 pairs] times tiles `to_next` apart, whose next pair is `to_pair` on. */
static inline __attribute__((always_inline)) void
accumulate(__m512 sums[TALL][WHOLE], const bf16 *x, int64_t x_stride, const int tall,
           const bf16 *here, int64_t to_next, const int wide, int64_t pairs, int64_t to_pair,
           int64_t ahead) {
    for (int64_t k = 0; k < pairs; k++, here += to_pair) {
        __m512bh weights[WHOLE];
#pragma GCC unroll 4
        for (int t = 0; t < wide; t++) {
            weights[t] = (__m512bh)_mm512_loadu_si512(here + t * to_next);
            if (wide < WHOLE) /* not end to end, so the CPU does not foresee what comes next */
                _mm_prefetch(here + t * to_next + ahead, _MM_HINT_T1);
        }
#pragma GCC unroll 8
        for (int n = 0; n < tall; n++) {
            int32_t pair;
            memcpy(&pair, x + n * x_stride + 2 * k, sizeof pair);
            const __m512bh numbers = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int t = 0; t < wide; t++)
                sums[n][t] = _mm512_dpbf16_ps(sums[n][t], weights[t], numbers);
        }
    }
}

static inline __attribute__((always_inline)) void
block(const Product *p, int64_t row, const int tall, int64_t tile, const int wide) {
    const int64_t pairs = p->width / 2, thin_pairs = p->thin_width / 2, woven = p->woven;
    const int64_t to_next = woven == 1 ? pairs * 32 : 32; /* from a tile to the one beside it */
    const bf16 *here = p->tiles + (tile / woven * woven * pairs + tile % woven) * 32;
    __m512 sums[TALL][WHOLE];
#pragma GCC unroll 8
    for (int n = 0; n < tall; n++)
#pragma GCC unroll 4
        for (int t = 0; t < wide; t++) sums[n][t] = _mm512_setzero_ps();
    accumulate(sums, p->x + row * p->x_stride, p->x_stride, tall, here, to_next, wide, pairs,
               woven * 32, wide * pairs * 32);
    if (p->thin)
        accumulate(sums, p->thin + row * p->thin_stride, p->thin_stride, tall,
                   p->thin_tiles + tile * thin_pairs * 32, thin_pairs * 32, wide, thin_pairs, 32,
                   wide * thin_pairs * 32);
#pragma GCC unroll 8
    for (int n = 0; n < tall; n++)
#pragma GCC unroll 4
        for (int t = 0; t < wide; t++) finish(p, row + n, (tile + t) * 16, sums[n][t]);
}

#define CASE(tall, wide) \
    case tall: block(p, row, tall, tile, wide); break;

static void one_tile(const Product *p, int64_t tile, int64_t row, int64_t tall) {
    switch (tall) {
        CASE(1, 1) CASE(2, 1) CASE(3, 1) CASE(4, 1) CASE(5, 1) CASE(6, 1) CASE(7, 1) CASE(8, 1)
    }
}

static void two_tiles(const Product *p, int64_t tile, int64_t row, int64_t tall) {
    switch (tall) {
        CASE(1, WIDE) CASE(2, WIDE) CASE(3, WIDE) CASE(4, WIDE)
        CASE(5, WIDE) CASE(6, WIDE) CASE(7, WIDE) CASE(8, WIDE)
    }
}

static void woven_tiles(const Product *p, int64_t tile, int64_t row, int64_t tall) {
    switch (tall) {
        CASE(1, WHOLE) CASE(2, WHOLE) CASE(3, WHOLE) CASE(4, WHOLE) CASE(5, WHOLE) CASE(6, WHOLE)
    }
}

void multiply(const bf16 *x, const bf16 *tiles, const bf16 *scale, const bf16 *addend, bf16 *y,
              const bf16 *thin, const bf16 *thin_tiles, int64_t rows, int64_t width,
              int64_t outputs, int64_t x_stride, int64_t addend_stride, int64_t woven,
              int64_t thin_width, int64_t thin_stride, int threads) {
    const Product p = {x, tiles, scale, addend, y, thin, thin_tiles, rows, width, outputs, x_stride,
                       addend_stride, woven, thin_width, thin_stride};
    const int64_t count = (outputs + 15) / 16, wide = woven == WHOLE && rows <= FEW ? WHOLE : WIDE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t tile = 0; tile < count; tile += wide)
        for (int64_t row = 0; row < rows; row += TALL) {
            const int64_t left = rows - row, tall = left < TALL ? left : TALL;
            if (wide == WHOLE) woven_tiles(&p, tile, row, tall);
            else if (count - tile < WIDE) one_tile(&p, tile, row, tall);
            else two_tiles(&p, tile, row, tall);
        }
}

/* Products of inputs that were rounded to 8 bits with packed codes, in whole numbers.

   64 bytes of a row are 256 codes, four in each byte. One instruction multiplies 64 of them, as
   they are (0, 1, 2 or 3), with as many inputs and adds up four; the sum of the inputs, which a
   code has too much, is where the sum begins. x[step, k, byte] = column 256 step + 4 byte + k. */
#include "native.h"

#ifdef TRILENS_NATIVE_FAST

#define ROWS 4
#define MOST 2

/* x[inputs, steps, 4, 64] of int8 from source[inputs, cols], zeros after the last column; less the
   sums of 16 columns each, sums[inputs, steps, 16]; and where scales stand. */
void trilens_native_prepare_int8(void *address) {
    Job *job = address;
    const int64_t steps = wide_steps(job);
    find_places(job);
    for (int64_t i = 0; i < job->batch; i++) {
        const int8_t *from = (const int8_t *)job->source + i * job->cols;
        for (int64_t step = 0; step < steps; step++) {
            int8_t *to = (int8_t *)job->x + WIDE * (i * steps + step);
            int32_t *sums = (int32_t *)job->sums + 16 * (i * steps + step);
            int64_t n = least(WIDE, job->cols - WIDE * step);
            if (n < WIDE) memset(to, 0, WIDE);
            memset(sums, 0, 64);
            for (int64_t column = 0; column < n; column++) {
                int8_t value = from[WIDE * step + column];
                to[64 * (column % 4) + column / 4] = value;
                sums[column / EDGE] -= value;
            }
        }
    }
}

/* Adds the products of 256 columns of a plane: those of the codes as they are, less the inputs
   themselves, of which a code has one too much. Exact. */
FAST INLINE void add_whole(
    __m512i sums[ROWS][MOST], const uint8_t *start, int64_t row_bytes, int64_t step, int64_t steps,
    const char *x, const int32_t *less, const int n_rows, const int n) {
    const __m512i mask = _mm512_set1_epi8(3);
    __m512i codes[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++) {
        codes[r] = wide_codes(start + r * row_bytes, step, row_bytes);
        /* rows follow each other in memory: the next block */
        _mm_prefetch(
            (const char *)start + n_rows * row_bytes + 64 * (n_rows * step + r), _MM_HINT_T0);
#pragma GCC unroll 2
        for (int i = 0; i < n; i++)
            sums[r][i] = _mm512_add_epi32(
                sums[r][i], _mm512_loadu_si512(less + 16 * (i * steps + step)));
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++)
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++) {
            __m512i lanes = _mm512_and_si512(_mm512_srli_epi16(codes[r], 2 * k), mask);
#pragma GCC unroll 2
            for (int i = 0; i < n; i++)
                sums[r][i] = _mm512_dpbusd_epi32(
                    sums[r][i], lanes, _mm512_loadu_si512(x + 64 * (4 * (i * steps + step) + k)));
        }
}

FAST INLINE __m512 scales_at(const Job *job, int64_t scale, int64_t row, int64_t step) {
    const Place *place = (const Place *)job->places + step;
    const float *from = (const float *)scale + row * job->scale_step + place->first;
    if (job->groups == 1) return _mm512_set1_ps(*from);
    int64_t left = job->groups - place->first;
    __mmask16 some = left >= 16 ? 0xffff : (__mmask16)((1 << left) - 1);
    return _mm512_permutexvar_ps(
        _mm512_loadu_si512(place->next), _mm512_maskz_loadu_ps(some, from));
}

FAST INLINE void start_at_zero(__m512i sums[ROWS][MOST], const int n_rows, const int n) {
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 2
        for (int i = 0; i < n; i++) sums[r][i] = _mm512_setzero_si512();
}

FAST INLINE void add_scaled(
    const Job *job, int64_t scale, int64_t row, int64_t step, __m512 totals[ROWS][MOST],
    __m512i sums[ROWS][MOST], const int n_rows, const int n) {
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++) {
        const __m512 factor = scales_at(job, scale, row + r, step);
#pragma GCC unroll 2
        for (int i = 0; i < n; i++)
            totals[r][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][i]), factor, totals[r][i]);
    }
}

/* `n_rows` rows with `n` inputs from `input` on; one scale for a row, or several. The last three
   are constants where this is inlined. */
FAST INLINE void int8_block(
    const Job *job, int64_t row, int64_t input, const int n_rows, const int n, const int one) {
    const int64_t steps = wide_steps(job), row_bytes = job->row_bytes;
    const char *x = (const char *)job->x + WIDE * input * steps;
    const int32_t *less = (const int32_t *)job->sums + 16 * input * steps;
    __m512i sums[ROWS][MOST];
    __m512 totals[ROWS][MOST];
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 2
        for (int i = 0; i < n; i++) totals[r][i] = _mm512_setzero_ps();
    for (int plane = 0; plane < 2; plane++) {
        const uint8_t *codes = (const uint8_t *)(plane ? job->second_codes : job->codes);
        const int64_t scale = plane ? job->second_scale : job->scale;
        if (!codes) break;
        start_at_zero(sums, n_rows, n);
        for (int64_t step = 0; step < steps; step++) {
            if (!one) start_at_zero(sums, n_rows, n);
            add_whole(sums, codes + row * row_bytes, row_bytes, step, steps, x, less, n_rows, n);
            if (!one) add_scaled(job, scale, row, step, totals, sums, n_rows, n);
        }
        if (one) add_scaled(job, scale, row, 0, totals, sums, n_rows, n);
    }
    if (job->offset)
        for (int64_t step = 0; step < steps; step++)
            for (int r = 0; r < n_rows; r++) {
                const __m512 offset = scales_at(job, job->offset, row + r, step);
                for (int i = 0; i < n; i++) {
                    __m512i minus = _mm512_loadu_si512(less + 16 * (i * steps + step));
                    totals[r][i] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(minus), offset, totals[r][i]);
                }
            }
#pragma GCC unroll 2
    for (int i = 0; i < n; i++) {
        float *out = (float *)(job->out + (input + i) * job->out_bytes) + row;
        const __m128 factor = _mm_set1_ps(((const float *)job->factors)[input + i]);
        if (n_rows == ROWS) {
            __m128 found = four_sums(totals[0][i], totals[1][i], totals[2][i], totals[3][i]);
            _mm_storeu_ps(out, _mm_mul_ps(found, factor));
        } else {
            out[0] = _mm512_reduce_add_ps(totals[0][i]) * _mm_cvtss_f32(factor);
        }
    }
}

#define EACH_INT8(n_rows, one)                                                                     \
    if (n == 1)                                                                                    \
        int8_block(job, row, input, n_rows, 1, one);                                               \
    else                                                                                           \
        int8_block(job, row, input, n_rows, 2, one);

/* out[i, row] = factors[i] . (x[i] . W[row]) in float32. A chunk of inputs stays in the cache while
   a thread goes through its stripes of rows. */
FAST void trilens_native_multiply_int8(void *address) {
    Job *job = address;
    const int64_t stripes = (job->rows + STRIPE - 1) / STRIPE;
    const int64_t chunk = MOST * job->chunk, chunks = (job->batch + chunk - 1) / chunk;
    for (;;) {
        int64_t number = take(job);
        if (number >= stripes * chunks) return;
        int64_t row = number % stripes * STRIPE, begin = number / stripes * chunk;
        int64_t stop = least(row + STRIPE, job->rows), end = least(begin + chunk, job->batch);
        while (row < stop) {
            int n_rows = stop - row >= ROWS ? ROWS : 1;
            for (int64_t input = begin; input < end; input += MOST) {
                int n = (int)least(MOST, end - input);
                if (n_rows == ROWS && job->groups == 1) {
                    EACH_INT8(ROWS, 1)
                } else if (n_rows == ROWS) {
                    EACH_INT8(ROWS, 0)
                } else {
                    EACH_INT8(1, 0)
                }
            }
            row += n_rows;
        }
    }
}

#else

void trilens_native_prepare_int8(void *address) { (void)address; }
void trilens_native_multiply_int8(void *address) { (void)address; }

#endif

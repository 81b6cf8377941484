/* Products of a few inputs with codes of three levels, whose time is that of decoding.

   64 bytes of a row are 256 codes, eight in each of 32 lanes. Shifted up, a code stands in the upper
   two bits of its lane, and these bits inverted are the bfloat16 number 2t: sign and the highest bit
   of the exponent. So a shift and one logical operation give 32 weights, without a scale: sums of 16
   columns get theirs once for 256 columns. Inputs lie in the order in which codes come:
   x[step, 7 - k, lane] = column 256 step + 8 lane + k. */
#include "native.h"

#ifdef TRILENS_NATIVE_FAST

#define TALL 8 /* rows of a block of one input */

/* Sums of 16 columns times 2 stay below 2^127 up to there, though nothing scales them yet. */
#define LARGE ((122 + 127) << 7)

/* x[inputs, steps, 8, 32], zeros after the last column; and where scales stand. Whether an input is
   too large for sums without a scale. */
void trilens_native_prepare_few(void *address) {
    Job *job = address;
    const int64_t steps = wide_steps(job);
    find_places(job);
    for (int64_t i = 0; i < job->batch; i++) {
        const uint16_t *from = (const uint16_t *)job->source + i * job->cols;
        for (int64_t step = 0; step < steps; step++) {
            uint16_t *to = (uint16_t *)job->x + WIDE * (i * steps + step);
            int64_t n = least(WIDE, job->cols - WIDE * step);
            if (n < WIDE) memset(to, 0, 2 * WIDE);
            for (int64_t column = 0; column < n; column++)
                to[32 * (7 - column % 8) + column / 8] = from[WIDE * step + column];
        }
    }
    const int16_t *all = (const int16_t *)job->source; /* signed: what any processor compares at once */
    int16_t most = 0;
    for (int64_t i = 0; i < job->batch * job->cols; i++) {
        int16_t size = all[i] & 0x7fff;
        most = size > most ? size : most;
    }
    job->large = most >= LARGE;
}

/* One of the eight products of a step, for all rows and inputs. */
FAST INLINE void product(
    __m512 sums[TALL][4], const __m512i *codes, const char *x, int64_t input_bytes, const int k,
    const int n_rows, const int n) {
    const __m512i mask = _mm512_set1_epi16((short)0xc000);
#pragma GCC unroll 8
    for (int r = 0; r < n_rows; r++) {
        __m512i lanes = _mm512_andnot_si512(_mm512_slli_epi16(codes[r], 2 * k), mask);
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            __m512bh input = (__m512bh)_mm512_loadu_si512(x + i * input_bytes + 64 * k);
            sums[r][i] = _mm512_dpbf16_ps(sums[r][i], (__m512bh)lanes, input);
        }
    }
}

/* One plane of `n_rows` rows with `n` inputs. All are constants where this is inlined. */
FAST INLINE void add_plane(
    const Job *job, const uint8_t *start, const float *scales, __m512 totals[TALL][4],
    const int n_rows, const int n) {
    const int64_t steps = wide_steps(job), row_bytes = job->row_bytes;
    const int64_t room = job->groups + 16;
    const Place *places = (const Place *)job->places;
    const char *x = (const char *)job->x;
    for (int64_t step = 0; step < steps; step++) {
        __m512i codes[TALL];
        __m512 sums[TALL][4];
#pragma GCC unroll 8
        for (int r = 0; r < n_rows; r++) {
            codes[r] = wide_codes(start + r * row_bytes, step, row_bytes);
            /* rows follow each other in memory: the next block */
            _mm_prefetch(
                (const char *)start + n_rows * row_bytes + 64 * (n_rows * step + r), _MM_HINT_T0);
#pragma GCC unroll 4
            for (int i = 0; i < n; i++) sums[r][i] = _mm512_setzero_ps();
        }
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++)
            product(sums, codes, x + 512 * step, 512 * steps, k, n_rows, n);
        const __m512i next = _mm512_loadu_si512(places[step].next);
#pragma GCC unroll 8
        for (int r = 0; r < n_rows; r++) {
            const float *from = scales + r * room + places[step].first;
            __m512 scale = _mm512_permutexvar_ps(next, _mm512_loadu_ps(from));
#pragma GCC unroll 4
            for (int i = 0; i < n; i++)
                totals[r][i] = _mm512_fmadd_ps(sums[r][i], scale, totals[r][i]);
        }
    }
}

FAST INLINE void few_rows(
    const Job *job, int64_t row, float *scales, const int n_rows, const int n) {
    __m512 totals[TALL][4];
#pragma GCC unroll 8
    for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) totals[r][i] = _mm512_setzero_ps();
    for (int plane = 0; plane < 2; plane++) {
        const uint8_t *codes = (const uint8_t *)(plane ? job->second_codes : job->codes);
        const float *scale = (const float *)(plane ? job->second_scale : job->scale);
        if (!codes) break;
        for (int r = 0; r < n_rows; r++)
            read_scales(
                job, scale + (row + r) * job->scale_step, 0.5f, scales + r * (job->groups + 16));
        add_plane(job, codes + row * job->row_bytes, scales, totals, n_rows, n);
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
        uint16_t *out = (uint16_t *)(job->out + i * job->out_bytes) + row;
        float found[TALL];
        if (n_rows == 1) {
            found[0] = _mm512_reduce_add_ps(totals[0][i]);
        } else {
#pragma GCC unroll 2
            for (int r = 0; r < n_rows; r += 4)
                _mm_storeu_ps(
                    found + r, four_sums(totals[r][i], totals[r + 1][i], totals[r + 2][i], totals[r + 3][i]));
        }
        for (int r = 0; r < n_rows; r++)
            out[r] = rounded(job->bias ? found[r] + ((const float *)job->bias)[row + r] : found[r]);
    }
}

#define EACH_FEW(n_rows)                                                                           \
    switch (job->batch) {                                                                          \
    case 1: few_rows(job, row, scales, n_rows, 1); break;                                          \
    case 2: few_rows(job, row, scales, n_rows, 2); break;                                          \
    case 3: few_rows(job, row, scales, n_rows, 3); break;                                          \
    default: few_rows(job, row, scales, n_rows, 4);                                                \
    }

/* As `trilens_native_multiply`, for up to four inputs that `prepare_few` made. */
FAST void trilens_native_multiply_few(void *address) {
    Job *job = address;
    float scales[TALL * (job->groups + 16)];
    memset(scales, 0, sizeof scales);
    for (;;) {
        int64_t row = STRIPE * take(job);
        if (row >= job->rows) return;
        int64_t stop = least(row + STRIPE, job->rows);
        while (row < stop) {
            if (job->batch == 1 && stop - row >= TALL) {
                few_rows(job, row, scales, TALL, 1);
                row += TALL;
            } else if (stop - row >= 4) {
                EACH_FEW(4)
                row += 4;
            } else {
                EACH_FEW(1)
                row++;
            }
        }
    }
}

#else

void trilens_native_prepare_few(void *address) { (void)address; }
void trilens_native_multiply_few(void *address) { (void)address; }

#endif

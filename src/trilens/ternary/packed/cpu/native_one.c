/* Products of one input in whole numbers, in registers.

   The input in bfloat16 is two limbs of int8, 14 bits and a sign, or three, 22 bits. 64 bytes of a
   row are 256 codes, four in each byte. One instruction takes the k-th code of each byte out, one for
   each limb multiplies 64 of them, as they are (0, 1, 2 or 3), and adds up four; what a code has too
   much of the input is where the sums begin. But for the rounding of the input, all is exact until
   the scale of a group is applied (to 24 bits: sums of three limbs have up to 28). With two limbs that is some eight cycles for 256 codes, and reading them from
   memory takes longer: so the next stripe is asked for while this one is multiplied. */
#include "native_limbs.h"

#ifdef TRILENS_NATIVE_FAST

#define ROWS 4
#define LAST 6 /* stripes */

/* x[steps, limbs, 4, 64] of int8, less their sums of 16 columns each, sums[steps, limbs, 16], where
   scales stand, and a factor, a power of two. `large` says whether the input cannot be held so. */
FAST void trilens_native_prepare_one(void *address) {
    Job *job = address;
    find_places(job);
    job->large = put_input(job, (const uint16_t *)job->source, 0, 0, (float *)job->factors, 1);
}

/* The k-th of the four codes of each byte. */
FAST INLINE __m512i codes_at(__m512i found, const int k) {
    const uint64_t low = (uint64_t)1 << (2 * k), high = low << 1; /* which bit becomes the first, second */
    if (k == 0) return _mm512_and_si512(found, _mm512_set1_epi8(3));
    return _mm512_gf2p8affine_epi64_epi8(
        found, _mm512_set1_epi64((int64_t)(low << 56 | high << 48)), 0);
}

/* Adds a step of 256 columns to the totals of each row. `scales` has room for those of a row, and 16
   more, which are not used. */
FAST INLINE void add_step(
    const Job *job, const uint8_t *codes, const char *ahead, const float *scales, int64_t step,
    __m512 totals[ROWS], const int n_rows, const int limbs) {
    const Place *place = (const Place *)job->places + step;
    const __m512i lanes = _mm512_loadu_si512(place->next);
    const char *x = (const char *)job->x + WIDE * limbs * step;
    const char *less = (const char *)job->sums + 64 * limbs * step;
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++) {
        const __m512i found = wide_codes(codes + r * job->row_bytes, step, job->row_bytes);
        __m512i all = _mm512_setzero_si512(); /* below 2^31: 16 columns times 3 times 2^22 */
        _mm_prefetch(ahead + r * job->row_bytes + 64 * step, _MM_HINT_T1);
#pragma GCC unroll 3
        for (int limb = limbs - 1; limb >= 0; limb--) { /* the high one first */
            __m512i sum = _mm512_loadu_si512(less + 64 * limb);
#pragma GCC unroll 4
            for (int k = 0; k < PART; k++)
                sum = _mm512_dpbusd_epi32(
                    sum, codes_at(found, k), _mm512_loadu_si512(x + WIDE * limb + 64 * k));
            all = _mm512_add_epi32(_mm512_slli_epi32(all, 8), sum);
        }
        const __m512 some = _mm512_loadu_ps(scales + r * (job->groups + 16) + place->first);
        totals[r] = _mm512_fmadd_ps(
            _mm512_cvtepi32_ps(all), _mm512_permutexvar_ps(lanes, some), totals[r]);
    }
}

/* Rows of a stripe; `rows_ahead`: how many rows further the thread's next stripe is. */
FAST INLINE void one_block(
    const Job *job, int64_t row, int64_t rows_ahead, float *scales, const int n_rows,
    const int limbs) {
    const float factor = *(const float *)job->factors; /* of the sums, small before they are large */
    __m512 totals[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++) totals[r] = _mm512_setzero_ps();
    for (int plane = 0; plane < 2; plane++) {
        const uint8_t *codes = (const uint8_t *)(plane ? job->second_codes : job->codes);
        const float *scale = (const float *)(plane ? job->second_scale : job->scale);
        if (!codes) break;
        codes += row * job->row_bytes;
        scale += row * job->scale_step;
        for (int r = 0; r < n_rows; r++, scale += job->scale_step) {
            read_scales(job, scale, factor, scales + r * (job->groups + 16));
            for (int64_t at = 0; at < job->scale_step; at += 16)
                _mm_prefetch((const char *)(scale + rows_ahead * job->scale_step + at), _MM_HINT_T1);
        }
        for (int64_t step = 0; step < wide_steps(job); step++)
            add_step(
                job, codes, (const char *)codes + rows_ahead * job->row_bytes, scales, step, totals,
                n_rows, limbs);
    }
    float found[ROWS];
    if (n_rows == ROWS)
        _mm_storeu_ps(found, four_sums(totals[0], totals[1], totals[2], totals[3]));
    else
        found[0] = _mm512_reduce_add_ps(totals[0]);
    for (int r = 0; r < n_rows; r++) {
        const float bias = job->bias ? ((const float *)job->bias)[row + r] : 0;
        ((uint16_t *)job->out)[row + r] = rounded(found[r] + bias);
    }
}

FAST INLINE void one_stripes(Job *job, float *scales, const int limbs) {
    int64_t row = STRIPE * take(job);
    while (row < job->rows) {
        /* known early, to be asked for; the last ones are left for whoever is done first */
        const int early = row + LAST * STRIPE < job->rows;
        const int64_t stop = least(row + STRIPE, job->rows);
        int64_t following = early ? STRIPE * take(job) : row + STRIPE;
        const int64_t ahead = following - row;
        for (; stop - row >= ROWS; row += ROWS) one_block(job, row, ahead, scales, ROWS, limbs);
        for (; row < stop; row++) one_block(job, row, ahead, scales, 1, limbs);
        row = early ? following : STRIPE * take(job);
    }
}

/* As `trilens_native_multiply`, for the one input that `prepare_one` made; without offsets. */
FAST void trilens_native_multiply_one(void *address) {
    Job *job = address;
    float scales[ROWS * (job->groups + 16)];
    memset(scales, 0, sizeof scales);
    if (job->limbs == 2)
        one_stripes(job, scales, 2);
    else
        one_stripes(job, scales, 3);
}

#else

void trilens_native_prepare_one(void *address) { (void)address; }
void trilens_native_multiply_one(void *address) { (void)address; }

#endif

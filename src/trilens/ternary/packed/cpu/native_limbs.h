/* How a few inputs in bfloat16 become whole numbers of two or three signed bytes (limbs). */
#ifndef TRILENS_NATIVE_LIMBS_H
#define TRILENS_NATIVE_LIMBS_H

#include "native.h"

#ifdef TRILENS_NATIVE_FAST

#define MOST_LIMBS 3
#define FINE 2048 /* numbers so large lose nothing that could be seen */
#define POOR 64   /* numbers below lose more than a hundredth */
#define PART 4    /* products of a step */
#define SIDE 16   /* rows of a tile */

/* Inputs of a tile, and its columns. */
static inline int64_t inputs_of_tile(const Job *job) {
    return least(job->batch, SIDE / (job->limbs * job->parts));
}

static inline int64_t tile_columns(const Job *job) {
    return job->limbs * job->parts * inputs_of_tile(job);
}

static inline int64_t group_of(const Job *job, int64_t column) {
    return job->groups > 1 ? least(column / job->group_cols, job->groups - 1) : 0;
}

/* The largest size of an input, as bits of bfloat16. */
FAST static uint16_t largest(const uint16_t *from, int64_t n) {
    uint16_t most = 0;
    for (int64_t column = 0; column < n; column++) {
        uint16_t size = from[column] & 0x7fff;
        most = size > most ? size : most;
    }
    return most;
}

/* One input: its columns of the tiles x, from `column` on, or (`one`) the limbs x, and their sums. What
   is less than 2^-14 of the largest number (2^-22 with three limbs) is lost: whether so many numbers
   are so small that it could be seen, most below FINE or an eighth below POOR, or one is not finite. */
FAST INLINE int put_input(
    const Job *job, const uint16_t *from, int64_t tile, int64_t column, float *back,
    const int one) {
    const int64_t steps = wide_steps(job), several = job->groups > 1;
    const int64_t n = one ? 1 : tile_columns(job), next_limb = one ? WIDE : 4;
    const __m128i turned = _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const uint16_t most = largest(from, job->cols);
    const uint32_t exponent = most >> 7, bits = 8 * job->limbs - 3; /* of the largest, and 127 */
    if (most && (exponent < 32 || exponent > 254)) return 1;
    const uint32_t times = (most ? 2 * 127 + bits - exponent : 0) << 23;
    const uint32_t back_bits = (most ? exponent - bits : 0) << 23;
    memcpy(back, &back_bits, 4);
    const __m512 factor = _mm512_castsi512_ps(_mm512_set1_epi32((int32_t)times));
    const __m512i fine = _mm512_set1_epi32(FINE);
    const __m512i zero = _mm512_setzero_si512();
    __m512 total = _mm512_setzero_ps(); /* of sizes, cut off there */
    __m512i sums[MOST_LIMBS] = {zero, zero, zero};
    int64_t numbers = 0, poor = 0; /* that are not 0 */
    for (int64_t part = 0; part < 16 * steps; part++) { /* 16 columns, all of one group */
        const int64_t step = part / 16, lane = part % 16;
        const int64_t group = group_of(job, 16 * part) - group_of(job, WIDE * step);
        const int64_t left = job->cols - 16 * part, at = column + job->limbs * group;
        const __mmask16 some = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1 << left) - 1) : 0;
        __m256i found = _mm256_maskz_loadu_epi16(some, from + 16 * part);
        __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(found), 16));
        __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(value, factor));
        const __mmask16 there = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        __m512i size = _mm512_min_epi32(_mm512_abs_epi32(whole), fine);
        numbers += __builtin_popcount(there);
        poor += __builtin_popcount(
            _mm512_mask_cmplt_epi32_mask(there, size, _mm512_set1_epi32(POOR)));
        total = _mm512_add_ps(total, _mm512_cvtepi32_ps(size));
        const int begins = lane == 0 || group_of(job, 16 * part - 16) != group_of(job, 16 * part);
        const int ends = lane == 15 || group_of(job, 16 * part + 16) != group_of(job, 16 * part);
        char *to = (char *)job->x;
        to += one ? WIDE * job->limbs * step + 4 * lane
                  : 4 * (n * (SIDE * PART * (tile * steps + step) + lane) + at);
        for (int64_t limb = 0; limb < job->limbs; limb++) {
            int32_t fours[PART]; /* the columns 4 i + k of each k */
            _mm_storeu_si128(
                (__m128i *)fours, _mm_shuffle_epi8(_mm512_cvtepi32_epi8(whole), turned));
            for (int k = 0; k < PART; k++)
                memcpy(to + 4 * n * SIDE * k + next_limb * limb, fours + k, 4);
            __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(whole, 24), 24);
            whole = _mm512_srai_epi32(_mm512_sub_epi32(whole, low), 8);
            if (one) {
                int32_t *less = (int32_t *)job->sums + 16 * (job->limbs * step + limb);
                less[lane] = -_mm512_reduce_add_epi32(low);
                continue;
            }
            sums[limb] = begins ? low : _mm512_add_epi32(sums[limb], low);
            if (!ends) continue;
            int32_t *less = (int32_t *)job->sums + n * (tile * steps + (several ? step : 0));
            less[at + limb] -= _mm512_reduce_add_epi32(sums[limb]);
        }
    }
    return 2 * _mm512_reduce_add_ps(total) < (float)numbers * FINE || 8 * poor > numbers;
}

#endif
#endif

/* Products of inputs that were rounded to 8 bits with packed codes, in whole numbers.

   64 bytes of a row are 256 codes, four in each byte. One instruction multiplies 64 of them, as
   they are (0, 1, 2 or 3), with as many inputs and adds up four; the sum of the inputs, which a
   code has too much, is where the sum begins. x[step, k, byte] = column 256 step + 4 byte + k.

   One input in bfloat16 is three of int8 (limbs), where that is faster than to multiply in bfloat16:
   products are exact, up to the scale of a group. */
#include "native.h"

#ifdef TRILENS_NATIVE_FAST

#define ROWS 4
#define MOST 2
#define LIMBS 3     /* bytes of one input in bfloat16 */
#define FINE 2048   /* numbers so large lose nothing that could be seen */

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

/* Adds the products of the codes of 256 columns of a plane, as they are, for each row and input. */
FAST INLINE void add_codes(
    __m512i sums[ROWS][LIMBS], const uint8_t *start, int64_t row_bytes, int64_t step, int64_t steps,
    const char *x, const int n_rows, const int n) {
    const __m512i mask = _mm512_set1_epi8(3);
    __m512i codes[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++) {
        codes[r] = wide_codes(start + r * row_bytes, step, row_bytes);
        /* rows follow each other in memory: the next block */
        _mm_prefetch(
            (const char *)start + n_rows * row_bytes + 64 * (n_rows * step + r), _MM_HINT_T0);
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++)
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++) {
            __m512i lanes = _mm512_and_si512(_mm512_srli_epi16(codes[r], 2 * k), mask);
#pragma GCC unroll 3
            for (int i = 0; i < n; i++)
                sums[r][i] = _mm512_dpbusd_epi32(
                    sums[r][i], lanes, _mm512_loadu_si512(x + 64 * (4 * (i * steps + step) + k)));
        }
}

/* And less the inputs themselves, of which a code has one too much: exact, before it is scaled. */
FAST INLINE void add_whole(
    __m512i sums[ROWS][LIMBS], const uint8_t *start, int64_t row_bytes, int64_t step, int64_t steps,
    const char *x, const int32_t *less, const int n_rows, const int n) {
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 2
        for (int i = 0; i < n; i++)
            sums[r][i] = _mm512_add_epi32(
                sums[r][i], _mm512_loadu_si512(less + 16 * (i * steps + step)));
    add_codes(sums, start, row_bytes, step, steps, x, n_rows, n);
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

FAST INLINE void start_at_zero(__m512i sums[ROWS][LIMBS], const int n_rows, const int n) {
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 2
        for (int i = 0; i < n; i++) sums[r][i] = _mm512_setzero_si512();
}

FAST INLINE void add_scaled(
    const Job *job, int64_t scale, int64_t row, int64_t step, __m512 totals[ROWS][MOST],
    __m512i sums[ROWS][LIMBS], const int n_rows, const int n) {
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
    __m512i sums[ROWS][LIMBS];
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

/* One input in bfloat16 as whole numbers of 22 bits and a sign, of three signed bytes:
   x[limbs, steps, 4, 64], and less their sums, sums[steps, 16]; factors[0] is what they are to be
   multiplied by, a power of two. What is less than 2^-22 of the largest number is lost: where most
   numbers are so small that it could be seen, or one is not finite, `large` says so. */
FAST void trilens_native_prepare_limbs(void *address) {
    Job *job = address;
    const int64_t steps = wide_steps(job);
    const uint16_t *from = (const uint16_t *)job->source;
    const __m128i turned = _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    uint16_t most = 0;
    find_places(job);
    for (int64_t column = 0; column < job->cols; column++) {
        uint16_t size = from[column] & 0x7fff;
        most = size > most ? size : most;
    }
    const uint32_t exponent = most >> 7; /* of the largest, and 127 */
    job->large = most && (exponent < 32 || exponent > 254);
    if (job->large) return;
    const uint32_t times = (most ? 2 * 127 + 21 - exponent : 0) << 23;
    const uint32_t back = (most ? exponent - 21 : 0) << 23;
    memcpy((void *)job->factors, &back, 4);
    const __m512 factor = _mm512_castsi512_ps(_mm512_set1_epi32((int32_t)times));
    const __m512i fine = _mm512_set1_epi32(FINE);
    __m512 total = _mm512_setzero_ps(); /* of sizes, cut off there */
    int64_t n = 0;                      /* numbers that are not 0 */
    for (int64_t part = 0; part < 16 * steps; part++) { /* 16 columns, of 16 parts of a step */
        const int64_t left = job->cols - 16 * part;
        const __mmask16 some = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1 << left) - 1) : 0;
        __m256i bits = _mm256_maskz_loadu_epi16(some, from + 16 * part);
        __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(value, factor));
        n += __builtin_popcount(_mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_NEQ_UQ));
        __m512i size = _mm512_min_epi32(_mm512_abs_epi32(whole), fine);
        total = _mm512_add_ps(total, _mm512_cvtepi32_ps(size));
        ((int32_t *)job->sums)[part] = -_mm512_reduce_add_epi32(whole);
        char *to = (char *)job->x + WIDE * (part / 16) + 4 * (part % 16);
        for (int64_t limb = 0; limb < LIMBS; limb++, to += WIDE * steps) {
            int32_t fours[4]; /* the columns 4 i + k of each k */
            _mm_storeu_si128(
                (__m128i *)fours, _mm_shuffle_epi8(_mm512_cvtepi32_epi8(whole), turned));
            for (int k = 0; k < 4; k++) memcpy(to + 64 * k, fours + k, 4);
            __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(whole, 24), 24);
            whole = _mm512_srai_epi32(_mm512_sub_epi32(whole, low), 8);
        }
    }
    job->large = 2 * _mm512_reduce_add_ps(total) < (float)n * FINE;
}

/* `scales` is room for those of each row, and 16 more, which are not used. */
FAST INLINE void limbs_block(const Job *job, int64_t row, float *scales, const int n_rows) {
    const int64_t steps = wide_steps(job), room = job->groups + 16;
    const Place *places = (const Place *)job->places;
    __m512 totals[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++) totals[r] = _mm512_setzero_ps();
    for (int plane = 0; plane < 2; plane++) {
        const uint8_t *codes = (const uint8_t *)(plane ? job->second_codes : job->codes);
        const float *scale = (const float *)(plane ? job->second_scale : job->scale);
        if (!codes) break;
        codes += row * job->row_bytes;
        for (int r = 0; r < n_rows; r++)
            read_scales(job, scale + (row + r) * job->scale_step, 1, scales + r * room);
        for (int64_t step = 0; step < steps; step++) {
            const __m512i less = _mm512_loadu_si512((const int32_t *)job->sums + 16 * step);
            const __m512i next = _mm512_loadu_si512(places[step].next);
            __m512i sums[ROWS][LIMBS];
#pragma GCC unroll 4
            for (int r = 0; r < n_rows; r++) {
                sums[r][0] = less;
                sums[r][1] = sums[r][2] = _mm512_setzero_si512();
            }
            add_codes(
                sums, codes, job->row_bytes, step, steps, (const char *)job->x, n_rows, LIMBS);
#pragma GCC unroll 4
            for (int r = 0; r < n_rows; r++) {
                /* below 2^31: 16 columns times 3 times 2^22 */
                __m512i high = _mm512_add_epi32(sums[r][1], _mm512_slli_epi32(sums[r][2], 8));
                __m512i all = _mm512_add_epi32(sums[r][0], _mm512_slli_epi32(high, 8));
                __m512 some = _mm512_loadu_ps(scales + r * room + places[step].first);
                totals[r] = _mm512_fmadd_ps(
                    _mm512_cvtepi32_ps(all), _mm512_permutexvar_ps(next, some), totals[r]);
            }
        }
    }
    const float factor = *(const float *)job->factors;
    float found[ROWS];
    if (n_rows == ROWS)
        _mm_storeu_ps(found, four_sums(totals[0], totals[1], totals[2], totals[3]));
    else
        found[0] = _mm512_reduce_add_ps(totals[0]);
    for (int r = 0; r < n_rows; r++) {
        const float bias = job->bias ? ((const float *)job->bias)[row + r] : 0;
        ((uint16_t *)job->out)[row + r] = rounded(found[r] * factor + bias);
    }
}

/* As `trilens_native_multiply`, for the one input that `prepare_limbs` made; without offsets. */
FAST void trilens_native_multiply_limbs(void *address) {
    Job *job = address;
    float scales[ROWS * (job->groups + 16)];
    memset(scales, 0, sizeof scales);
    for (;;) {
        int64_t row = STRIPE * take(job);
        if (row >= job->rows) return;
        int64_t stop = least(row + STRIPE, job->rows);
        for (; stop - row >= ROWS; row += ROWS) limbs_block(job, row, scales, ROWS);
        for (; row < stop; row++) limbs_block(job, row, scales, 1);
    }
}

#else

void trilens_native_prepare_int8(void *address) { (void)address; }
void trilens_native_multiply_int8(void *address) { (void)address; }
void trilens_native_prepare_limbs(void *address) { (void)address; }
void trilens_native_multiply_limbs(void *address) { (void)address; }

#endif

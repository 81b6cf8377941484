/* What the files of the library share: a job, and how codes become numbers in registers. */
#ifndef TRILENS_NATIVE_H
#define TRILENS_NATIVE_H

#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

EXPORT const char *trilens_native_job(void);
EXPORT const char *trilens_native_sources(void);
EXPORT int trilens_native_level(void);
EXPORT void trilens_native_prepare(void *address);
EXPORT void trilens_native_multiply(void *address);
EXPORT void trilens_native_unpack(void *address);
EXPORT void trilens_native_prepare_few(void *address);
EXPORT void trilens_native_multiply_few(void *address);
EXPORT void trilens_native_prepare_int8(void *address);
EXPORT void trilens_native_multiply_int8(void *address);
EXPORT void *PyInit__native(void);

/* The fields of a job have no other list: `trilens_native_job` tells them to `native.py`. */
#define FIELDS                                                                                     \
    next, first_row, rows, row_bytes, cols, group_cols, groups, scale_step, codes, scale,          \
        second_codes, second_scale, offset, batch, chunk, source, x, bias, sums, places, factors,  \
        out, out_bytes, large

typedef struct {
    int64_t FIELDS;
} Job;

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#include <immintrin.h>
#define TRILENS_NATIVE_FAST

#define FAST                                                                                       \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,avx512vnni")))
#define INLINE static inline __attribute__((always_inline))
#define STRIPE 32 /* rows that a thread takes at a time */
#define WIDE 256  /* columns of 64 bytes of codes */
#define EDGE 16   /* columns that one float of a sum holds, of 256 */

static inline int64_t take(Job *job) { /* the next stripe, as one of several threads */
    return __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* The sums of four vectors. */
FAST INLINE __m128 four_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* Where the scales of 256 columns stand in a row: the first one, and from there for each float. */
typedef struct {
    int64_t first;
    int64_t unused[7];
    int32_t next[16];
} Place;

static inline int64_t wide_steps(const Job *job) { return (job->cols + WIDE - 1) / WIDE; }

static inline void find_places(const Job *job) {
    Place *places = (Place *)job->places;
    for (int64_t step = 0; step < wide_steps(job); step++) {
        for (int64_t lane = 0; lane < 16; lane++) {
            int64_t column = WIDE * step + EDGE * lane;
            int64_t group = job->groups > 1 ? least(column / job->group_cols, job->groups - 1) : 0;
            if (lane == 0) places[step].first = group;
            places[step].next[lane] = (int32_t)(group - places[step].first);
        }
    }
}

/* The 64 bytes of codes of a step, zeros after the end of the row. */
FAST INLINE __m512i wide_codes(const uint8_t *row, int64_t step, int64_t row_bytes) {
    int64_t left = row_bytes - 64 * step;
    if (left >= 64) return _mm512_loadu_si512(row + 64 * step);
    return _mm512_maskz_loadu_epi8(((__mmask64)1 << left) - 1, row + 64 * step);
}

#endif
#endif

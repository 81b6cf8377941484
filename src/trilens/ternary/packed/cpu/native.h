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
EXPORT void trilens_native_prepare_one(void *address);
EXPORT void trilens_native_multiply_one(void *address);
EXPORT void trilens_native_prepare_limbs(void *address);
EXPORT void trilens_native_multiply_limbs(void *address);
EXPORT int trilens_native_tiles(void);
EXPORT void trilens_native_prepare_tiles(void *address);
EXPORT void trilens_native_multiply_tiles(void *address);
EXPORT void *PyInit__native(void);

/* The fields of a job have no other list: `trilens_native_job` tells them to `native.py`. */
#define FIELDS                                                                                     \
    next, first_row, rows, row_bytes, cols, group_cols, groups, scale_step, codes, scale,          \
        second_codes, second_scale, offset, batch, chunk, limbs, parts, span_steps, source, x,     \
        bias, sums, places, factors, out, out_bytes, large

typedef struct {
    int64_t FIELDS;
} Job;

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#include <immintrin.h>
#define TRILENS_NATIVE_FAST

#define FAST                                                                                       \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,avx512vnni,"   \
                          "gfni")))
#if defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define TRILENS_NATIVE_TILES
#define TILES                                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,avx512vnni,"   \
                          "gfni,amx-tile,amx-bf16,amx-int8")))
#endif
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

FAST INLINE __m512i eight(const void *from) { /* 64 bits, eight times, out of memory */
    return _mm512_broadcastq_epi64(_mm_loadl_epi64(from));
}

FAST INLINE __m512i four(const void *from) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(from));
}

/* Values of some groups of one row in bfloat16: 4 for one plane, 16 for two. */
FAST static inline void values_of_groups(
    const Job *job, int64_t row, int64_t first, int64_t groups, uint64_t *values) {
    const float *scale = (const float *)job->scale + row * job->scale_step + first;
    const __m512i sign = _mm512_set1_epi64(0x8000);
    if (job->second_codes || job->offset) {
        const float *second = (const float *)job->second_scale + row * job->scale_step + first;
        const float *offset = (const float *)job->offset + row * job->scale_step + first;
        const __m512 low = _mm512_set_ps(2, 1, 0, -1, 2, 1, 0, -1, 2, 1, 0, -1, 2, 1, 0, -1);
        const __m512 high = _mm512_set_ps(2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0, -1, -1, -1, -1);
        for (int64_t group = 0; group < groups; group++) {
            __m512 sum = _mm512_mul_ps(low, _mm512_set1_ps(scale[group]));
            if (job->second_codes) /* a factor of -1, 0, 1 or 2 rounds nothing */
                sum = _mm512_fmadd_ps(high, _mm512_set1_ps(second[group]), sum);
            if (job->offset) sum = _mm512_add_ps(sum, _mm512_set1_ps(offset[group]));
            __m256i found = (__m256i)_mm512_cvtneps_pbh(sum);
            if (job->second_codes)
                _mm256_storeu_si256((__m256i *)(values + 4 * group), found);
            else
                values[group] = (uint64_t)_mm256_extract_epi64(found, 0);
        }
        return;
    }
    for (int64_t group = 0; group < groups; group += 8) {
        __mmask8 some = groups - group >= 8 ? 0xff : (1 << (groups - group)) - 1;
        __m256 s = _mm256_maskz_loadu_ps(some, scale + group);
        __m128i near = (__m128i)_mm256_cvtneps_pbh(s);
        __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(near), 16);
        __m256 twice = _mm256_add_ps(_mm256_castsi256_ps(wide), _mm256_castsi256_ps(wide));
        __m512i one = _mm512_cvtepu16_epi64(near);
        __m512i two = _mm512_cvtepu32_epi64(_mm256_srli_epi32(_mm256_castps_si256(twice), 16));
        __m512i all = _mm512_or_si512(_mm512_xor_si512(one, sign), _mm512_slli_epi64(one, 32));
        all = _mm512_or_si512(all, _mm512_slli_epi64(two, 48));
        _mm512_mask_storeu_epi64(values + group, some, all);
    }
}

/* The scales of a row, as a dense layer of bfloat16 would hold them (exact for two planes, whose sums
   it rounds), times 1 or 1/2. */
FAST static inline void read_scales(const Job *job, const float *scale, float times, float *to) {
    for (int64_t group = 0; group < job->groups; group += 16) {
        const int64_t left = job->groups - group;
        const __mmask16 some = left >= 16 ? 0xffff : (__mmask16)((1 << left) - 1);
        __m512 found = _mm512_maskz_loadu_ps(some, scale + group);
        if (!job->second_codes) {
            __m512i near = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(found));
            found = _mm512_castsi512_ps(_mm512_slli_epi32(near, 16));
        }
        _mm512_storeu_ps(to + group, _mm512_mul_ps(found, _mm512_set1_ps(times)));
    }
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

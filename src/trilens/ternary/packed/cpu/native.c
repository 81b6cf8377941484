/* Products of bfloat16 inputs with packed codes, in the registers of processors that multiply
   bfloat16 (AVX-512 BF16, VBMI). Elsewhere `trilens_native_level` is 0 and nothing else is called.

   A plain C interface, without Python's headers: `native.py` loads the file and hands every
   function the address of a job, whose fields have the order of `native.JOB`. Several threads may
   run one job: each takes the next stripe of rows until none is left; no thread waits for another.

   64 bits of codes are 32 trits. One instruction spreads them over 32 lanes, a second looks their
   values {-s, 0, s, 2s} up, s being the scale of the group as a dense layer would hold it. */
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

EXPORT int trilens_native_level(void);
EXPORT void trilens_native_prepare(void *address);
EXPORT void trilens_native_multiply(void *address);
EXPORT void trilens_native_unpack(void *address);
EXPORT void *PyInit__native(void);

/* Build tools ask for it by name on some systems; the file is never imported. */
void *PyInit__native(void) { return 0; }

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#include <immintrin.h>

#define FAST __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi")))
#define STRIPE 32 /* rows that a thread takes at a time */
#define ROWS 4    /* of a block: with 6 inputs, 24 sums in registers */
#define MOST 6    /* inputs of a block */
#define TALL 8    /* rows of a block of one or two inputs */

typedef struct {
    int64_t next, first_row, rows, row_bytes, cols, group_cols, groups, scale_step;
    int64_t codes, scale, batch, chunk, source, x, bias, out, out_bytes;
} Job;

int trilens_native_level(void) {
    __builtin_cpu_init();
    /* the compiler's run time also asks the system whether it keeps these registers */
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}

/* {-s, 0, s, 2s} in bfloat16 for each group of one row. */
FAST static void values_of_row(const Job *job, int64_t row, uint64_t *values) {
    const float *scale = (const float *)job->scale + row * job->scale_step;
    const __m512i sign = _mm512_set1_epi64(0x8000);
    for (int64_t group = 0; group < job->groups; group += 8) {
        __mmask8 some = job->groups - group >= 8 ? 0xff : (1 << (job->groups - group)) - 1;
        __m256 s = _mm256_maskz_loadu_ps(some, scale + group);
        __m128i rounded = (__m128i)_mm256_cvtneps_pbh(s);
        __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(rounded), 16);
        __m256 twice = _mm256_add_ps(_mm256_castsi256_ps(wide), _mm256_castsi256_ps(wide));
        __m512i one = _mm512_cvtepu16_epi64(rounded);
        __m512i two = _mm512_cvtepu32_epi64(_mm256_srli_epi32(_mm256_castps_si256(twice), 16));
        __m512i all = _mm512_or_si512(_mm512_xor_si512(one, sign), _mm512_slli_epi64(one, 32));
        all = _mm512_or_si512(all, _mm512_slli_epi64(two, 48));
        _mm512_mask_storeu_epi64(values + group, some, all);
    }
}

FAST static inline __m512i spread(void) {
    /* where the eight bits of each byte begin; the upper byte of a lane is not looked at */
    char at[64];
    for (int i = 0; i < 64; i++) at[i] = (char)(2 * (i / 2));
    return _mm512_loadu_si512(at);
}

FAST static inline __m512i eight(const void *from) { /* 64 bits, eight times, out of memory */
    return _mm512_broadcastq_epi64(_mm_loadl_epi64(from));
}

FAST static inline __m512i decode(const void *codes, const uint64_t *values, __m512i order) {
    __m512i lanes = _mm512_multishift_epi64_epi8(order, eight(codes));
    return _mm512_permutexvar_epi16(lanes, eight(values));
}

/* The last step of a row may have fewer than eight bytes of codes: inputs are 0 there. */
static inline const uint8_t *last_codes(const uint8_t *row, int64_t at, int64_t end, uint64_t *to) {
    *to = 0;
    memcpy(to, row + at, end - at >= 8 ? 8 : (size_t)(end - at));
    return (const uint8_t *)to;
}

static inline uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* One step of 32 columns: codes of each row, and of each input where they begin. */
FAST static inline __attribute__((always_inline)) void add_step(
    __m512 sums[TALL][MOST], const uint8_t *const *codes, const uint64_t *values, int64_t groups,
    const char *x, __m512i order, const int n_rows, const int n) {
    __m512bh weights[TALL];
#pragma GCC unroll 8
    for (int r = 0; r < n_rows; r++)
        weights[r] = (__m512bh)decode(codes[r], values + r * groups, order);
#pragma GCC unroll 6
    for (int i = 0; i < n; i++) {
        __m512bh input = (__m512bh)_mm512_loadu_si512(x + 64 * i);
#pragma GCC unroll 8
        for (int r = 0; r < n_rows; r++) sums[r][i] = _mm512_dpbf16_ps(sums[r][i], weights[r], input);
    }
}

/* `n_rows` rows with `n` inputs from `input` on. Both are constants where this is inlined. */
FAST static inline __attribute__((always_inline)) void block(
    const Job *job, int64_t row, int64_t input, const uint64_t *values, const int n_rows,
    const int n) {
    const __m512i order = spread();
    const int64_t row_bytes = job->row_bytes, groups = job->groups;
    const int64_t steps = (job->cols + 31) / 32, whole = row_bytes / 8;
    const int64_t group_steps = groups > 1 ? job->group_cols / 32 : steps;
    const uint8_t *start = (const uint8_t *)job->codes + row * row_bytes;
    const char *x = (const char *)job->x + input * steps * 64;
    const uint8_t *codes[TALL];
    uint64_t last[TALL];
    __m512 sums[TALL][MOST];
#pragma GCC unroll 8
    for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 6
        for (int i = 0; i < n; i++) sums[r][i] = _mm512_setzero_ps();
    for (int64_t group = 0, step = 0; step < whole; group++) {
        const int64_t stop = step + group_steps < whole ? step + group_steps : whole;
        for (; step < stop; step++) {
#pragma GCC unroll 8
            for (int r = 0; r < n_rows; r++) codes[r] = start + r * row_bytes + 8 * step;
            /* rows follow each other in memory: the next block */
            if (n_rows == TALL || (n_rows == ROWS && (step & 1) == 0))
                _mm_prefetch((const char *)start + n_rows * (row_bytes + 8 * step), _MM_HINT_T0);
            add_step(sums, codes, values + group, groups, x + 64 * n * step, order, n_rows, n);
        }
    }
    if (whole < steps) {
        for (int r = 0; r < n_rows; r++)
            codes[r] = last_codes(start + r * row_bytes, 8 * whole, row_bytes, last + r);
        add_step(sums, codes, values + groups - 1, groups, x + 64 * n * whole, order, n_rows, n);
    }
#pragma GCC unroll 8
    for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 6
        for (int i = 0; i < n; i++) {
            float sum = _mm512_reduce_add_ps(sums[r][i]);
            if (job->bias) sum += ((const float *)job->bias)[row + r];
            uint16_t *out = (uint16_t *)(job->out + (input + i) * job->out_bytes);
            out[row + r] = rounded(sum);
        }
}

#define CASES(rows)                                                                         \
    switch (n) {                                                                                   \
    case 1: block(job, row, input, values, rows, 1); break;                                 \
    case 2: block(job, row, input, values, rows, 2); break;                                 \
    case 3: block(job, row, input, values, rows, 3); break;                                 \
    case 4: block(job, row, input, values, rows, 4); break;                                 \
    case 5: block(job, row, input, values, rows, 5); break;                                 \
    default: block(job, row, input, values, rows, 6);                                       \
    }

FAST static void rows_by_inputs(
    const Job *job, int64_t row, int n_rows, int64_t input, int n, const uint64_t *values) {
    if (n_rows == TALL) {
        if (n == 1)
            block(job, row, input, values, TALL, 1);
        else
            block(job, row, input, values, TALL, 2);
    } else if (n_rows == ROWS) {
        CASES(ROWS)
    } else {
        CASES(1)
    }
}

/* Inputs are multiplied in blocks of nearly equal numbers: where block `number` begins. */
static inline int64_t block_start(const Job *job, int64_t number) {
    int64_t blocks = (job->batch + MOST - 1) / MOST;
    return number * job->batch / blocks;
}

/* x[steps, inputs of a block, 32] for each block, zeros after the last column. */
void trilens_native_prepare(void *address) {
    Job *job = address;
    const int64_t blocks = (job->batch + MOST - 1) / MOST, steps = (job->cols + 31) / 32;
    for (;;) {
        int64_t number = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (number >= blocks) return;
        int64_t first = block_start(job, number), n = block_start(job, number + 1) - first;
        char *to = (char *)job->x + first * steps * 64;
        for (int64_t i = 0; i < n; i++) {
            const char *from = (const char *)job->source + (first + i) * 2 * job->cols;
            for (int64_t step = 0; step < steps; step++) {
                int64_t left = 2 * job->cols - 64 * step;
                char *line = to + 64 * (step * n + i);
                if (left < 64) memset(line, 0, 64);
                memcpy(line, from + 64 * step, left < 64 ? (size_t)left : 64);
            }
        }
    }
}

/* out[i, row] = x[i] . W[row] + bias[row], summed in float32, rounded once to bfloat16. A chunk of
   blocks stays in the cache while a thread goes through its stripes of rows. */
FAST void trilens_native_multiply(void *address) {
    Job *job = address;
    const int64_t stripes = (job->rows + STRIPE - 1) / STRIPE;
    const int64_t blocks = (job->batch + MOST - 1) / MOST;
    const int64_t chunks = (blocks + job->chunk - 1) / job->chunk;
    uint64_t values[TALL * job->groups];
    for (;;) {
        int64_t number = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (number >= stripes * chunks) return;
        int64_t row = number % stripes * STRIPE, begin = number / stripes * job->chunk;
        int64_t stop = row + STRIPE < job->rows ? row + STRIPE : job->rows;
        int64_t end = begin + job->chunk < blocks ? begin + job->chunk : blocks;
        while (row < stop) {
            int n_rows = stop - row >= ROWS ? ROWS : 1;
            if (job->batch <= 2 && stop - row >= TALL) n_rows = TALL;
            for (int r = 0; r < n_rows; r++)
                values_of_row(job, row + r, values + r * job->groups);
            for (int64_t b = begin; b < end; b++) {
                int64_t input = block_start(job, b);
                int n = (int)(block_start(job, b + 1) - input);
                rows_by_inputs(job, row, n_rows, input, n, values);
            }
            row += n_rows;
        }
    }
}

/* Rows of the matrix in bfloat16: out[row - first_row, cols], padded to 32 columns. */
FAST void trilens_native_unpack(void *address) {
    Job *job = address;
    const __m512i order = spread();
    int64_t steps = (job->cols + 31) / 32;
    int64_t group_steps = job->groups > 1 ? job->group_cols / 32 : steps;
    uint64_t values[job->groups];
    for (;;) {
        int64_t row = job->first_row + STRIPE * __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (row >= job->rows) return;
        int64_t stop = row + STRIPE < job->rows ? row + STRIPE : job->rows;
        for (; row < stop; row++) {
            const uint8_t *codes = (const uint8_t *)job->codes + row * job->row_bytes;
            char *out = (char *)job->out + (row - job->first_row) * job->out_bytes;
            values_of_row(job, row, values);
            for (int64_t step = 0; step < steps; step++) {
                uint64_t last;
                const uint8_t *from = codes + 8 * step;
                if (8 * step + 8 > job->row_bytes)
                    from = last_codes(codes, 8 * step, job->row_bytes, &last);
                __m512i found = decode(from, values + step / group_steps, order);
                _mm512_storeu_si512(out + 64 * step, found);
            }
        }
    }
}

#else

int trilens_native_level(void) { return 0; }
void trilens_native_prepare(void *address) { (void)address; }
void trilens_native_multiply(void *address) { (void)address; }
void trilens_native_unpack(void *address) { (void)address; }

#endif

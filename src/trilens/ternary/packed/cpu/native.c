/* Products of bfloat16 inputs with packed codes, in the registers of processors that multiply
   bfloat16 (AVX-512 BF16, VBMI, VNNI, GFNI). Elsewhere `trilens_native_level` is 0 and nothing else is
   called; it is 2 where there are matrix units as well (`native_tiles.c`).

   A plain C interface, without Python's headers: `native.py` loads the file and hands every
   function the address of a job, whose fields have the order of `native.JOB`. Several threads may
   run one job: each takes the next stripe of rows until none is left; no thread waits for another.

   64 bits of codes are 32 trits. One instruction spreads them over 32 lanes, a second looks their
   values up: {-s, 0, s, 2s}, plus an offset, or the 16 sums of two planes, as a dense layer would
   hold them. */
#include "native.h"

/* Build tools ask for it by name on some systems; the file is never imported. */
void *PyInit__native(void) { return 0; }

#define TEXT(...) #__VA_ARGS__
#define TEXT_OF(...) TEXT(__VA_ARGS__)

const char *trilens_native_job(void) { return TEXT_OF(FIELDS); }

/* A hash of the files that it was built of, which the build knows. */
#ifndef TRILENS_SOURCES
#define TRILENS_SOURCES unknown
#endif

const char *trilens_native_sources(void) { return TEXT_OF(TRILENS_SOURCES); }

#ifdef TRILENS_NATIVE_FAST

#define ROWS 4   /* of a block: with 6 inputs, 24 sums in registers */
#define MOST 6   /* inputs of a block */
#define MANY 4   /* blocks that are worth it to keep decoded weights for */
#define PANEL 32 /* steps of 32 columns whose values are kept for many inputs */

int trilens_native_level(void) {
    __builtin_cpu_init();
    /* the compiler's run time also asks the system whether it keeps these registers */
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
          __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni")))
        return 0;
    return trilens_native_tiles() ? 2 : 1;
}

/* Where the eight bits of each byte begin, `back` bits before the code of the lane. */
FAST static inline __m512i spread(int back) {
    char at[64];
    for (int i = 0; i < 64; i++) at[i] = (char)((2 * (i / 2) - back) & 63);
    return _mm512_loadu_si512(at);
}

/* 32 weights. The bits of a lane above its codes are not looked at: values are repeated. */
FAST INLINE __m512i decode(
    const void *codes, const void *second, const uint64_t *values, __m512i order, __m512i after,
    const int planes) {
    __m512i lanes = _mm512_multishift_epi64_epi8(order, eight(codes));
    if (planes == 1) return _mm512_permutexvar_epi16(lanes, eight(values));
    __m512i others = _mm512_multishift_epi64_epi8(after, eight(second));
    lanes = _mm512_ternarylogic_epi64(_mm512_set1_epi16(3), lanes, others, 0xca);
    return _mm512_permutexvar_epi16(lanes, four(values));
}

/* The last step of a row may have fewer than eight bytes of codes: inputs are 0 there. */
static inline const uint8_t *last_codes(const uint8_t *row, int64_t at, int64_t end, uint64_t *to) {
    *to = 0;
    memcpy(to, row + at, end - at >= 8 ? 8 : (size_t)(end - at));
    return (const uint8_t *)to;
}

/* Weights of `n_rows` rows, handed on one step of 32 columns after the other. */
typedef struct {
    const uint8_t *codes, *second;
    const uint64_t *values;
    int64_t row_bytes, groups, group_steps, steps;
    __m512i order, after;
} Rows;

FAST INLINE Rows rows_from(const Job *job, int64_t row, const uint64_t *values) {
    const int64_t steps = (job->cols + 31) / 32;
    Rows rows = {
        (const uint8_t *)job->codes + row * job->row_bytes,
        (const uint8_t *)job->second_codes + row * job->row_bytes,
        values,
        job->row_bytes,
        job->groups,
        job->groups > 1 ? job->group_cols / 32 : steps,
        steps,
        spread(0),
        spread(2)};
    return rows;
}

FAST INLINE __m512i weights_at(
    const Rows *rows, int r, int64_t step, int64_t group, const int planes, const int whole) {
    const uint8_t *codes = rows->codes + r * rows->row_bytes, *second = rows->second;
    if (planes == 2) second += r * rows->row_bytes;
    const uint64_t *values = rows->values + planes * planes * (r * rows->groups + group);
    uint64_t last, other;
    if (whole)
        return decode(codes + 8 * step, second + 8 * step, values, rows->order, rows->after, planes);
    codes = last_codes(codes, 8 * step, rows->row_bytes, &last);
    if (planes == 2) second = last_codes(second, 8 * step, rows->row_bytes, &other);
    return decode(codes, second, values, rows->order, rows->after, planes);
}

/* out[input .., row .. row + n_rows], summed up, with the bias, rounded. */
FAST INLINE void finish(
    const Job *job, int64_t row, int64_t input, __m512 sums[ROWS][MOST], const int n_rows,
    const int n) {
#pragma GCC unroll 6
    for (int i = 0; i < n; i++) {
        float found[ROWS];
        if (n_rows == ROWS)
            _mm_storeu_ps(found, four_sums(sums[0][i], sums[1][i], sums[2][i], sums[3][i]));
        else
            found[0] = _mm512_reduce_add_ps(sums[0][i]);
        uint16_t *out = (uint16_t *)(job->out + (input + i) * job->out_bytes) + row;
        for (int r = 0; r < n_rows; r++)
            out[r] = rounded(job->bias ? found[r] + ((const float *)job->bias)[row + r] : found[r]);
    }
}

FAST INLINE void add_products(
    __m512 sums[ROWS][MOST], const __m512i *weights, const char *x, const int n_rows, const int n) {
#pragma GCC unroll 6
    for (int i = 0; i < n; i++) {
        __m512bh input = (__m512bh)_mm512_loadu_si512(x + 64 * i);
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++)
            sums[r][i] = _mm512_dpbf16_ps(sums[r][i], (__m512bh)weights[r], input);
    }
}

/* `n_rows` rows with `n` inputs from `input` on. All are constants where this is inlined. */
FAST INLINE void block(
    const Job *job, int64_t row, int64_t input, const uint64_t *values, const int planes,
    const int n_rows, const int n) {
    const Rows rows = rows_from(job, row, values);
    const int64_t whole = job->row_bytes / 8;
    const char *x = (const char *)job->x + input * rows.steps * 64;
    __m512i weights[ROWS];
    __m512 sums[ROWS][MOST];
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 6
        for (int i = 0; i < n; i++) sums[r][i] = _mm512_setzero_ps();
    for (int64_t group = 0, step = 0; step < whole; group++) {
        const int64_t stop = least(step + rows.group_steps, whole);
        for (; step < stop; step++) {
#pragma GCC unroll 4
            for (int r = 0; r < n_rows; r++)
                weights[r] = weights_at(&rows, r, step, group, planes, 1);
            /* rows follow each other in memory: the next block */
            if (n_rows == ROWS && (step & 1) == 0) {
                _mm_prefetch((const char *)rows.codes + ROWS * (job->row_bytes + 8 * step), _MM_HINT_T0);
                if (planes == 2)
                    _mm_prefetch(
                        (const char *)rows.second + ROWS * (job->row_bytes + 8 * step), _MM_HINT_T0);
            }
            add_products(sums, weights, x + 64 * n * step, n_rows, n);
        }
    }
    if (whole < rows.steps) {
        for (int r = 0; r < n_rows; r++)
            weights[r] = weights_at(&rows, r, whole, rows.groups - 1, planes, 0);
        add_products(sums, weights, x + 64 * n * whole, n_rows, n);
    }
    finish(job, row, input, sums, n_rows, n);
}

/* Some steps of four rows whose weights are at hand: sums go on where they were left. */
FAST INLINE void panel_block(
    const Job *job, int64_t row, int64_t input, const char *panel, const char *x, int64_t steps,
    char *kept, int is_first, int is_last, const int n) {
    __m512 sums[ROWS][MOST];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 6
        for (int i = 0; i < n; i++)
            sums[r][i] = is_first ? _mm512_setzero_ps() : _mm512_load_ps(kept + 64 * (n * r + i));
    for (int64_t step = 0; step < steps; step++) {
        __m512i weights[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
            weights[r] = _mm512_load_si512(panel + 64 * (ROWS * step + r));
        add_products(sums, weights, x + 64 * n * step, ROWS, n);
    }
    if (is_last) {
        finish(job, row, input, sums, ROWS, n);
        return;
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 6
        for (int i = 0; i < n; i++) _mm512_store_ps(kept + 64 * (n * r + i), sums[r][i]);
}

#define EACH_NUMBER(call)                                                                          \
    switch (n) {                                                                                   \
    case 1: call(1); break;                                                                        \
    case 2: call(2); break;                                                                        \
    case 3: call(3); break;                                                                        \
    case 4: call(4); break;                                                                        \
    case 5: call(5); break;                                                                        \
    default: call(6);                                                                              \
    }

#define ONE_PLANE(n) block(job, row, input, values, 1, ROWS, n)
#define TWO_PLANES(n) block(job, row, input, values, 2, ROWS, n)
#define ONE_PLANE_ROW(n) block(job, row, input, values, 1, 1, n)
#define TWO_PLANES_ROW(n) block(job, row, input, values, 2, 1, n)
#define PANEL_BLOCK(n) panel_block(job, row, input, panel, x, steps, kept, is_first, is_last, n)

FAST static void rows_by_inputs(
    const Job *job, int64_t row, int n_rows, int64_t input, int n, const uint64_t *values) {
    if (n_rows == ROWS && job->second_codes) {
        EACH_NUMBER(TWO_PLANES)
    } else if (n_rows == ROWS) {
        EACH_NUMBER(ONE_PLANE)
    } else if (job->second_codes) {
        EACH_NUMBER(TWO_PLANES_ROW)
    } else {
        EACH_NUMBER(ONE_PLANE_ROW)
    }
}

FAST static void panel_by_inputs(
    const Job *job, int64_t row, int64_t input, int n, const char *panel, const char *x,
    int64_t steps, char *kept, int is_first, int is_last) {
    EACH_NUMBER(PANEL_BLOCK)
}

FAST INLINE void decode_panel(
    const Rows *rows, int64_t begin, int64_t end, char *panel, const int planes) {
    const int64_t whole = rows->row_bytes / 8;
    for (int64_t step = begin; step < end; step++) {
        const int64_t group = rows->groups > 1 ? step / rows->group_steps : 0;
        for (int r = 0; r < ROWS; r++) {
            if (step % 8 == 0) { /* rows follow each other in memory: the next four */
                const int64_t ahead = (ROWS + r) * rows->row_bytes + 8 * step;
                _mm_prefetch((const char *)rows->codes + ahead, _MM_HINT_T0);
                if (planes == 2) _mm_prefetch((const char *)rows->second + ahead, _MM_HINT_T0);
            }
            __m512i found = step < whole ? weights_at(rows, r, step, group, planes, 1)
                                         : weights_at(rows, r, step, group, planes, 0);
            _mm512_store_si512(panel + 64 * (ROWS * (step - begin) + r), found);
        }
    }
}

/* Inputs are multiplied in blocks of nearly equal numbers: where block `number` begins. */
static inline int64_t block_start(const Job *job, int64_t number) {
    int64_t blocks = (job->batch + MOST - 1) / MOST;
    return number * job->batch / blocks;
}

/* Four rows with many inputs: their weights are decoded once for all of them. */
FAST static void rows_by_panels(
    const Job *job, int64_t row, int64_t begin, int64_t end, const uint64_t *values, char *sums) {
    const Rows rows = rows_from(job, row, values);
    char panel[64 * ROWS * PANEL] __attribute__((aligned(64)));
    for (int64_t first = 0; first < rows.steps; first += PANEL) {
        const int64_t last = least(first + PANEL, rows.steps);
        if (job->second_codes)
            decode_panel(&rows, first, last, panel, 2);
        else
            decode_panel(&rows, first, last, panel, 1);
        for (int64_t b = begin; b < end; b++) {
            int64_t input = block_start(job, b);
            int n = (int)(block_start(job, b + 1) - input);
            panel_by_inputs(
                job, row, input, n, panel, (const char *)job->x + 64 * (input * rows.steps + n * first),
                last - first, sums + 64 * ROWS * (input - block_start(job, begin)), first == 0,
                last == rows.steps);
        }
    }
}

/* x[steps, inputs of a block, 32] for each block, zeros after the last column. */
void trilens_native_prepare(void *address) {
    Job *job = address;
    const int64_t blocks = (job->batch + MOST - 1) / MOST, steps = (job->cols + 31) / 32;
    for (;;) {
        int64_t number = take(job);
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
    const int64_t row_values = job->groups * (job->second_codes ? 4 : 1);
    uint64_t values[ROWS * row_values];
    char room[64 * ROWS * MOST * (blocks >= MANY ? job->chunk : 0) + 64];
    char *sums = (char *)(((uintptr_t)room + 63) & ~(uintptr_t)63);
    for (;;) {
        int64_t number = take(job);
        if (number >= stripes * chunks) return;
        int64_t row = number % stripes * STRIPE, begin = number / stripes * job->chunk;
        int64_t stop = least(row + STRIPE, job->rows), end = least(begin + job->chunk, blocks);
        while (row < stop) {
            int n_rows = stop - row >= ROWS ? ROWS : 1;
            for (int r = 0; r < n_rows; r++) values_of_groups(job, row + r, 0, job->groups, values + r * row_values);
            if (n_rows == ROWS && end - begin >= MANY) {
                rows_by_panels(job, row, begin, end, values, sums);
            } else {
                for (int64_t b = begin; b < end; b++) {
                    int64_t input = block_start(job, b);
                    int n = (int)(block_start(job, b + 1) - input);
                    rows_by_inputs(job, row, n_rows, input, n, values);
                }
            }
            row += n_rows;
        }
    }
}

FAST INLINE void unpack_row(const Job *job, int64_t row, const uint64_t *values, const int planes) {
    const Rows rows = rows_from(job, row, values);
    char *out = (char *)job->out + (row - job->first_row) * job->out_bytes;
    for (int64_t step = 0; step < rows.steps; step++) {
        const int64_t group = rows.groups > 1 ? step / rows.group_steps : 0;
        __m512i found = 8 * step + 8 <= job->row_bytes
                            ? weights_at(&rows, 0, step, group, planes, 1)
                            : weights_at(&rows, 0, step, group, planes, 0);
        _mm512_storeu_si512(out + 64 * step, found);
    }
}

/* Rows of the matrix in bfloat16: out[row - first_row, cols], padded to 32 columns. */
FAST void trilens_native_unpack(void *address) {
    Job *job = address;
    uint64_t values[4 * job->groups];
    for (;;) {
        int64_t row = job->first_row + STRIPE * take(job);
        if (row >= job->rows) return;
        int64_t stop = least(row + STRIPE, job->rows);
        for (; row < stop; row++) {
            values_of_groups(job, row, 0, job->groups, values);
            if (job->second_codes)
                unpack_row(job, row, values, 2);
            else
                unpack_row(job, row, values, 1);
        }
    }
}

#else

int trilens_native_level(void) { return 0; }
void trilens_native_prepare(void *address) { (void)address; }
void trilens_native_multiply(void *address) { (void)address; }
void trilens_native_unpack(void *address) { (void)address; }

#endif

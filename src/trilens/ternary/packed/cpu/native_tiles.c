/* Products in the tiles of processors with matrix units (AMX).

   A tile of weights is 16 rows of 32 columns, decoded into the cache; one of inputs is the same 32
   columns of up to 16 of them, in pairs. One instruction multiplies the two, and adds to 16 × 16 sums
   in float32. The 32 bytes of 128 columns of a row are put into 32 lanes, each byte twice, from which
   four steps take two bits each and look up the two bytes of a weight: lane i of step k holds column
   4 i + k. `prepare_tiles` brings inputs into that order.

   Up to 16 inputs the time is that of decoding: rows of the next four steps are decoded between the
   products of those before. With more, a panel of 32 rows is decoded once for a chunk of inputs,
   and multiplied two by two tiles at a time. */
#include "native_tiles.h"

#ifdef TRILENS_NATIVE_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define FOUR 4      /* steps that are decoded at a time: 128 columns, 32 bytes of codes */
#define DEEP 8      /* steps of a panel for many inputs: with as many of theirs, in the L1 cache */
#define AHEAD 2     /* steps of inputs that are asked for before */
#define WINDOW 64   /* groups of a row whose values are at hand */

/* Whether the processor has tiles, and the system lets this process use them. */
int trilens_native_tiles(void) {
    uint32_t a, b, c, d, low, high;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if ((d >> 22 & 13) != 13) return 0; /* AMX-BF16, AMX-TILE, AMX-INT8 */
    if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0; /* OSXSAVE */
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low >> 17 & 3) != 3) return 0;
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}

static inline int64_t width(const Job *job) { return least(job->batch, SIDE); }

static inline int64_t tile_steps(const Job *job) { return (job->cols + 127) / 128 * FOUR; }

/* x[blocks of 16 inputs, steps, 16 pairs of columns, inputs, 2], zeros where there is none. */
TILES void trilens_native_prepare_tiles(void *address) {
    Job *job = address;
    const int64_t blocks = (job->batch + SIDE - 1) / SIDE, steps = tile_steps(job);
    const int64_t n = width(job);
    const __mmask16 some = (__mmask16)((1 << n) - 1);
    uint16_t columns[FOUR][32]; /* of each step, in the first or the second 64 */
    for (int k = 0; k < FOUR; k++)
        for (int i = 0; i < 32; i++) columns[k][i] = (uint16_t)((4 * i + k) & 63);
    for (;;) {
        const int64_t number = take(job);
        if (number >= blocks) return;
        const int64_t here = least(SIDE, job->batch - SIDE * number);
        const char *from = (const char *)job->source + SIDE * number * 2 * job->cols;
        char *to = (char *)job->x + number * steps * 64 * SIDE;
        for (int64_t step = 0; step < steps; step++, to += 64 * n) {
            const __m512i low = _mm512_loadu_si512(columns[step % FOUR]);
            __m512i v[SIDE];
            for (int64_t i = 0; i < SIDE; i++) {
                __m512i parts[4];
                for (int64_t part = 0; part < 4 && i < here; part++) {
                    const int64_t column = 32 * (step / FOUR * FOUR + part), left = job->cols - column;
                    const __mmask32 there =
                        left >= 32 ? ~(__mmask32)0 : left > 0 ? ((__mmask32)1 << left) - 1 : 0;
                    parts[part] =
                        _mm512_maskz_loadu_epi16(there, from + i * 2 * job->cols + 2 * column);
                }
                v[i] = _mm512_setzero_si512();
                if (i < here)
                    v[i] = _mm512_mask_blend_epi16(
                        0xffff0000, _mm512_permutex2var_epi16(parts[0], low, parts[1]),
                        _mm512_permutex2var_epi16(parts[2], low, parts[3]));
            }
            if (n == 1) {
                _mm512_storeu_si512(to, v[0]);
                continue;
            }
            turn(v);
            for (int64_t pair = 0; pair < SIDE; pair++)
                _mm512_mask_storeu_epi32(to + 4 * n * pair, some, v[pair]);
        }
    }
}

/* 32 rows from `row` on; those after the last one of the matrix repeat it. */
typedef struct {
    const uint8_t *codes[2 * SIDE], *second[2 * SIDE];
    uint64_t *values; /* [32 rows, groups at hand, 4 or 16 weights]: low bytes, then high ones */
    int64_t first, groups, group_steps, steps, row_bytes;
    __m512i twice;
} Stripe;

TILES INLINE Stripe stripe_from(const Job *job, int64_t row, uint64_t *values) {
    Stripe stripe;
    uint8_t at[64];
    for (int i = 0; i < 64; i++) at[i] = (uint8_t)(i / 2);
    stripe.twice = _mm512_loadu_si512(at);
    stripe.values = values;
    stripe.steps = tile_steps(job);
    stripe.row_bytes = job->row_bytes;
    stripe.group_steps = job->groups > 1 ? job->group_cols / 32 : stripe.steps;
    for (int64_t r = 0; r < 2 * SIDE; r++) {
        int64_t at_row = least(row + r, job->rows - 1);
        stripe.codes[r] = (const uint8_t *)job->codes + at_row * job->row_bytes;
        stripe.second[r] = (const uint8_t *)job->second_codes + at_row * job->row_bytes;
    }
    return stripe;
}

/* Brings the values of the groups from that of a step on to hand, and says where they end. */
TILES static int64_t open_window(const Job *job, Stripe *stripe, int64_t row, int64_t step) {
    const int64_t each = job->second_codes ? 4 : 1;
    /* of 16-bit numbers in 8 bytes, or in 32, the low bytes before the high ones */
    const __m512i halves = _mm512_broadcast_i32x4(
        each == 1 ? _mm_set_epi8(15, 13, 11, 9, 14, 12, 10, 8, 7, 5, 3, 1, 6, 4, 2, 0)
                  : _mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0));
    const __m512i order = each == 1 ? _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0)
                                    : _mm512_set_epi64(7, 5, 6, 4, 3, 1, 2, 0);
    stripe->first = step / stripe->group_steps;
    stripe->groups = least(WINDOW, job->groups - stripe->first);
    for (int64_t r = 0; r < 2 * SIDE; r++) {
        uint64_t *to = stripe->values + r * each * WINDOW;
        values_of_groups(
            job, least(row + r, job->rows - 1), stripe->first, stripe->groups, to);
        for (int64_t at = 0; at < each * stripe->groups; at += 8) {
            __m512i found = _mm512_shuffle_epi8(_mm512_loadu_si512(to + at), halves);
            _mm512_storeu_si512(to + at, _mm512_permutexvar_epi64(order, found));
        }
    }
    /* after the last group there may be steps without inputs */
    const int64_t end = stripe->first + stripe->groups;
    return end < job->groups ? end * stripe->group_steps : stripe->steps;
}

/* The 32 bytes of codes of four steps, each twice; 0 after the end of the row. */
TILES INLINE __m512i codes_twice(const Stripe *stripe, const uint8_t *row, int64_t step) {
    const int64_t left = stripe->row_bytes - 8 * step;
    const __mmask32 there = left >= 32 ? ~(__mmask32)0 : left > 0 ? ((__mmask32)1 << left) - 1 : 0;
    __m256i codes = _mm256_maskz_loadu_epi8(there, row + 8 * step);
    return _mm512_permutexvar_epi8(stripe->twice, _mm512_castsi256_si512(codes));
}

/* The 16 bytes of values that belong to each of four steps: of a group, or of several. */
TILES INLINE __m512i table_at(
    const Stripe *stripe, const uint64_t *values, int64_t step, const int planes, const int same) {
    __m128i found[FOUR];
    for (int i = 0; i < (same ? 1 : FOUR); i++) {
        int64_t group = least((step + i) / stripe->group_steps - stripe->first, stripe->groups - 1);
        const uint64_t *from = values + planes * planes * group;
        found[i] = planes == 1 ? _mm_set1_epi64x((int64_t)*from) : _mm_loadu_si128((const void *)from);
    }
    if (same) return _mm512_broadcast_i32x4(found[0]);
    __m512i all = _mm512_inserti32x4(_mm512_castsi128_si512(found[0]), found[1], 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(all, found[2], 2), found[3], 3);
}

/* Four steps of one row, each into its tile: to[step * 2 tiles]. All in one group if `same`. */
TILES INLINE void decode_four(
    const Stripe *stripe, int64_t r, int64_t step, char *to, const int planes, const int same) {
    const uint64_t *values = stripe->values + r * planes * planes * WINDOW;
    const __m512i table = table_at(stripe, values, step, planes, same);
    const __m512i codes = codes_twice(stripe, stripe->codes[r], step);
    const __m512i mask = _mm512_set1_epi8(3);
    if (planes == 1) {
        const __m512i high = _mm512_set1_epi16(0x0400); /* the high byte is four later */
#pragma GCC unroll 4
        for (int k = 0; k < FOUR; k++) {
            __m512i at = _mm512_ternarylogic_epi64(_mm512_srli_epi16(codes, 2 * k), mask, high, 0xea);
            _mm512_store_si512(to + 2 * TILE * k, _mm512_shuffle_epi8(table, at));
        }
        return;
    }
    const __m512i other = table_at(stripe, values + 2, step, planes, same);
    const __m512i after = codes_twice(stripe, stripe->second[r], step);
    const __m512i low = _mm512_set1_epi16(0x00ff), nibble = _mm512_set1_epi8(15);
#pragma GCC unroll 4
    for (int k = 0; k < FOUR; k++) {
        __m512i next = k ? _mm512_srli_epi16(after, 2 * k - 2) : _mm512_slli_epi16(after, 2);
        __m512i at = _mm512_ternarylogic_epi64(mask, _mm512_srli_epi16(codes, 2 * k), next, 0xca);
        at = _mm512_and_si512(at, nibble);
        __m512i found = _mm512_ternarylogic_epi64(
            low, _mm512_shuffle_epi8(table, at), _mm512_shuffle_epi8(other, at), 0xca);
        _mm512_store_si512(to + 2 * TILE * k, found);
    }
}

/* out[inputs, row .. row + 16] of a tile of sums [16, n], with the bias, rounded. */
TILES static void finish_tile(
    const Job *job, int64_t row, int64_t input, int64_t n, const char *sums, int64_t stride) {
    const int64_t inputs = least(n, job->batch - input);
    if (row >= job->rows) return;
    const __mmask16 wide = (__mmask16)((1 << n) - 1);
    __m512i v[SIDE];
    for (int r = 0; r < SIDE; r++) v[r] = _mm512_maskz_loadu_epi32(wide, sums + r * stride);
    turn(v);
    for (int64_t i = 0; i < inputs; i++)
        put_sums(job, row, input + i, _mm512_castsi512_ps(v[i]));
}

/* One step of two tiles of weights with the one tile of inputs there is. */
#define FEW_PRODUCTS(first, second)                                                                \
    TILE_LOAD(6, x, 4 * n);                                                                        \
    TILE_LOAD(4, from, 64);                                                                        \
    TILE_PRODUCT(first, 4, 6);                                                                     \
    TILE_LOAD(5, from + TILE, 64);                                                                 \
    TILE_PRODUCT(second, 5, 6);

/* Eight rows of four steps. */
#define EIGHT_ROWS(eighth)                                                                         \
    for (int64_t r = 8 * eighth; r < 8 * eighth + 8; r++) {                                        \
        decode_four(stripe, r, step, to + TILE * (r / SIDE) + 64 * (r % SIDE), planes, same);      \
        if (odd) continue;                                                                         \
        _mm_prefetch((const char *)stripe->codes[r] + ahead, _MM_HINT_T0);                         \
        if (planes == 2) _mm_prefetch((const char *)stripe->second[r] + ahead, _MM_HINT_T0);       \
    }

TILES INLINE void few_inputs(
    const Job *job, Stripe *stripe, int64_t row, const int planes, const int same) {
    const int64_t n = width(job);
    char rooms[2][2 * FOUR * TILE] __attribute__((aligned(64)));
    char sums[4][TILE] __attribute__((aligned(64)));
    const char *x = (const char *)job->x;
    int64_t end = 0;
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int64_t step = 0, odd = 0;; step += FOUR, odd ^= 1) {
        char *to = rooms[odd];
        const char *from = rooms[odd ^ 1];
        const int more = step < stripe->steps;
        /* rows follow each other in memory: the next stripe */
        const int64_t ahead = 2 * SIDE * stripe->row_bytes + 8 * step;
        if (more && step >= end) end = open_window(job, stripe, row, step);
        if (more) { EIGHT_ROWS(0) }
        if (step) { FEW_PRODUCTS(0, 1) from += 2 * TILE, x += 64 * n; }
        if (more) { EIGHT_ROWS(1) }
        if (step) { FEW_PRODUCTS(2, 3) from += 2 * TILE, x += 64 * n; }
        if (more) { EIGHT_ROWS(2) }
        if (step) { FEW_PRODUCTS(0, 1) from += 2 * TILE, x += 64 * n; }
        if (more) { EIGHT_ROWS(3) }
        if (step) { FEW_PRODUCTS(2, 3) from += 2 * TILE, x += 64 * n; }
        if (!more) break;
    }
    TILE_STORE(0, sums[0], 64);
    TILE_STORE(1, sums[1], 64);
    TILE_STORE(2, sums[2], 64);
    TILE_STORE(3, sums[3], 64);
    for (int64_t tile = 0; tile < 2; tile++) {
        const __mmask16 wide = (__mmask16)((1 << n) - 1);
        for (int64_t r = 0; r < SIDE; r++) {
            char *to = sums[tile] + 64 * r;
            __m512 sum = _mm512_maskz_loadu_ps(wide, to);
            sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(wide, sums[tile + 2] + 64 * r));
            _mm512_store_ps(to, sum);
        }
        finish_tile(job, row + SIDE * tile, 0, n, sums[tile], 64);
    }
}

/* Some steps of 32 rows with two tiles of inputs, or one: sums go on where they were left. */
TILES INLINE void tile_block(
    const Job *job, int64_t row, int64_t input, const char *panel, const char *x, int64_t apart,
    int64_t steps, char *kept, int is_first, int is_last, const int two) {
    if (is_first) {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
    } else {
        TILE_LOAD(0, kept, 64);
        TILE_LOAD(1, kept + TILE, 64);
        if (two) {
            TILE_LOAD(2, kept + 2 * TILE, 64);
            TILE_LOAD(3, kept + 3 * TILE, 64);
        }
    }
    for (int64_t step = 0; step < steps; step++, panel += 2 * TILE, x += TILE) {
        for (int64_t line = AHEAD * TILE; line < (AHEAD + 1) * TILE; line += 64) {
            _mm_prefetch(x + line, _MM_HINT_T0);
            if (two) _mm_prefetch(x + apart + line, _MM_HINT_T0);
        }
        TILE_LOAD(6, x, 64);
        TILE_LOAD(4, panel, 64);
        TILE_PRODUCT(0, 4, 6);
        TILE_LOAD(5, panel + TILE, 64);
        TILE_PRODUCT(1, 5, 6);
        if (two) {
            TILE_LOAD(7, x + apart, 64);
            TILE_PRODUCT(2, 4, 7);
            TILE_PRODUCT(3, 5, 7);
        }
    }
    TILE_STORE(0, kept, 64);
    TILE_STORE(1, kept + TILE, 64);
    if (two) {
        TILE_STORE(2, kept + 2 * TILE, 64);
        TILE_STORE(3, kept + 3 * TILE, 64);
    }
    if (!is_last) return;
    for (int tile = 0; tile < (two ? 4 : 2); tile++)
        finish_tile(
            job, row + SIDE * (tile % 2), input + SIDE * (tile / 2), SIDE, kept + TILE * tile, 64);
}

TILES INLINE void many_inputs(
    const Job *job, Stripe *stripe, int64_t row, int64_t begin, int64_t end, char *kept,
    const int planes, const int same) {
    char panel[2 * DEEP * TILE] __attribute__((aligned(64)));
    int64_t window = 0;
    for (int64_t first = 0, last; first < stripe->steps; first = last) {
        if (first >= window) window = open_window(job, stripe, row, first);
        last = least(first + DEEP, window);
        for (int64_t step = first; step < last; step += FOUR)
            for (int64_t r = 0; r < 2 * SIDE; r++)
                decode_four(
                    stripe, r, step,
                    panel + TILE * (2 * (step - first) + r / SIDE) + 64 * (r % SIDE), planes, same);
        for (int64_t b = begin; b < end; b += 2) {
            const int64_t apart = stripe->steps * TILE;
            const char *x = (const char *)job->x + b * apart + first * TILE;
            char *sums = kept + 2 * TILE * (b - begin);
            if (b + 1 < end)
                tile_block(
                    job, row, SIDE * b, panel, x, apart, last - first, sums, first == 0,
                    last == stripe->steps, 1);
            else
                tile_block(
                    job, row, SIDE * b, panel, x, apart, last - first, sums, first == 0,
                    last == stripe->steps, 0);
        }
    }
}

#define EACH_KIND(call)                                                                            \
    if (job->second_codes && same) {                                                               \
        call(2, 1);                                                                                \
    } else if (job->second_codes) {                                                                \
        call(2, 0);                                                                                \
    } else if (same) {                                                                             \
        call(1, 1);                                                                                \
    } else {                                                                                       \
        call(1, 0);                                                                                \
    }
#define FEW(planes, same) few_inputs(job, &stripe, row, planes, same)
#define MANY(planes, same) many_inputs(job, &stripe, row, begin, end, kept, planes, same)

/* As `trilens_native_multiply`, for inputs that `prepare_tiles` made. */
TILES void trilens_native_multiply_tiles(void *address) {
    Job *job = address;
    const int64_t stripes = (job->rows + STRIPE - 1) / STRIPE;
    const int64_t blocks = (job->batch + SIDE - 1) / SIDE;
    const int64_t chunks = (blocks + job->chunk - 1) / job->chunk;
    const int64_t each = job->second_codes ? 4 : 1;
    uint64_t values[2 * SIDE * each * WINDOW];
    char room[blocks > 1 ? 2 * TILE * (job->chunk + 1) + 64 : 64];
    char *kept = (char *)(((uintptr_t)room + 63) & ~(uintptr_t)63);
    const Shapes before = shapes_in_use();
    shape_tiles(width(job));
    for (;;) {
        const int64_t number = take(job);
        if (number >= stripes * chunks) break;
        const int64_t row = number % stripes * STRIPE, begin = number / stripes * job->chunk;
        const int64_t end = least(begin + job->chunk, blocks);
        Stripe stripe = stripe_from(job, row, values);
        const int same = stripe.group_steps % FOUR == 0 || job->groups == 1;
        if (blocks == 1) {
            EACH_KIND(FEW)
        } else {
            EACH_KIND(MANY)
        }
    }
    give_back_tiles(&before);
}

#else

int trilens_native_tiles(void) { return 0; }
void trilens_native_prepare_tiles(void *address) { (void)address; }
void trilens_native_multiply_tiles(void *address) { (void)address; }

#endif

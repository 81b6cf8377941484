/* Products of a few inputs in the tiles of processors with matrix units (AMX), in whole numbers.

   An input in bfloat16 is two of int8 (limbs), 14 bits and a sign, or three, 22 bits; one input alone
   has no tiles (`native_one.c`). 64 bytes of a row are 256 codes, four in each byte; shifted and
   masked they are a row of a tile, as they are (0, 1, 2 or 3), and 16 rows of the matrix are a tile.
   The other tile has a column for each limb of each input, and for each group that the 256 columns
   belong to, zeros where they belong to another: so the sums of a group stay apart. They begin with
   what a code has too much of each input. The sums of several steps, a span, lie beside each other and
   are scaled at once; with one scale for a row, a span is all its steps, and has the same sums. But
   for the rounding of inputs, all is exact up to the scale of a group.

   The time is that of shifting and storing codes, and grows little with the inputs of one tile: with
   groups of 128 these are four of two limbs, or two of three. */
#include "native_tiles.h"

#ifdef TRILENS_NATIVE_TILES

static inline int64_t spans(const Job *job) {
    return (wide_steps(job) + job->span_steps - 1) / job->span_steps;
}

/* Where scales stand: of each span the first, and from there for each of its sums. */
static void find_spans(const Job *job) {
    const int64_t n = tile_columns(job), steps = wide_steps(job);
    Place *places = (Place *)job->places;
    for (int64_t span = 0; span < spans(job); span++) {
        const int64_t first = span * job->span_steps;
        places[span].first = group_of(job, WIDE * first);
        for (int64_t lane = 0; lane < 16; lane++) {
            const int64_t step = first + lane / n, part = lane / job->limbs % job->parts;
            int64_t group = least(group_of(job, WIDE * step) + part, job->groups - 1);
            if (step >= steps) group = job->groups; /* not there: a scale of 0 */
            places[span].next[lane] = (int32_t)(group - places[span].first);
        }
    }
}

/* x[tiles, steps, 4, 16, columns, 4] of int8, sums[tiles, steps, columns] (one scale for a row: all
   in the first step), and factors[inputs], powers of two. `large` says whether an input cannot be
   held so. */
FAST void trilens_native_prepare_limbs(void *address) {
    Job *job = address;
    const int64_t each = inputs_of_tile(job), steps = wide_steps(job), n = tile_columns(job);
    const int64_t tiles = (job->batch + each - 1) / each;
    find_spans(job);
    memset((void *)job->x, 0, tiles * steps * 4 * n * SIDE * PART);
    memset((void *)job->sums, 0, tiles * steps * 4 * n);
    for (int64_t i = 0; i < job->batch; i++) {
        const uint16_t *from = (const uint16_t *)job->source + i * job->cols;
        const int64_t column = i % each * job->parts * job->limbs;
        job->large = put_input(job, from, i / each, column, (float *)job->factors + i, 0);
        if (job->large) return;
    }
}

/* Eight rows of 64 bytes: a row of four tiles each. */
#define EIGHT_ROWS(eighth)                                                                         \
    for (int64_t r = 8 * eighth; r < 8 * eighth + 8; r++) {                                        \
        const __m512i found = wide_codes(rows[r], step, job->row_bytes);                           \
        char *to = rooms[odd] + TILE * (r / SIDE) + 64 * (r % SIDE);                               \
        _mm_prefetch(ahead + 64 * r, _MM_HINT_T1);                                                 \
        _mm512_store_si512(to, _mm512_and_si512(found, mask));                                     \
        _mm512_store_si512(to + 2 * TILE, _mm512_and_si512(_mm512_srli_epi16(found, 2), mask));    \
        _mm512_store_si512(to + 4 * TILE, _mm512_and_si512(_mm512_srli_epi16(found, 4), mask));    \
        _mm512_store_si512(to + 6 * TILE, _mm512_and_si512(_mm512_srli_epi16(found, 6), mask));    \
    }

/* One of the four products of a step, of two tiles of weights with one or two of inputs. */
#define PRODUCTS                                                                                   \
    TILE_LOAD(6, x, 4 * n);                                                                        \
    TILE_LOAD(4, from, 64);                                                                        \
    TILE_BYTES_PRODUCT(0, 4, 6);                                                                   \
    TILE_LOAD(5, from + TILE, 64);                                                                 \
    TILE_BYTES_PRODUCT(1, 5, 6);                                                                   \
    if (tiles == 2) {                                                                              \
        TILE_LOAD(7, x + apart, 4 * n);                                                            \
        TILE_BYTES_PRODUCT(2, 4, 7);                                                               \
        TILE_BYTES_PRODUCT(3, 5, 7);                                                               \
    }                                                                                              \
    from += 2 * TILE, x += 4 * n * SIDE;

typedef struct {
    float totals[2][2 * SIDE][16];
    int32_t sums[2][2][2 * SIDE][16]; /* of a span and of the one before; unused columns stay 0 */
} Sums;

#define START_SUMS(less)                                                                           \
    TILE_LOAD(0, less, 0);                                                                         \
    TILE_LOAD(1, less, 0);                                                                         \
    if (tiles == 2) {                                                                              \
        TILE_LOAD(2, less + n * steps, 0);                                                         \
        TILE_LOAD(3, less + n * steps, 0);                                                         \
    }

/* From a column on. */
#define STORE_SUMS(to, column)                                                                     \
    TILE_STORE(0, to[0][0] + column, 64);                                                          \
    TILE_STORE(1, to[0][SIDE] + column, 64);                                                       \
    if (tiles == 2) {                                                                              \
        TILE_STORE(2, to[1][0] + column, 64);                                                      \
        TILE_STORE(3, to[1][SIDE] + column, 64);                                                   \
    }

/* Adds the sums of a span, with the scales of its groups. */
TILES INLINE void add_sums(
    const Job *job, float totals[2][2 * SIDE][16], int32_t sums[2][2 * SIDE][16],
    const float *scales, int64_t span, const int tiles) {
    const Place *place = (const Place *)job->places + span;
    const __m512i lanes = _mm512_loadu_si512(place->next);
    scales += place->first;
#pragma GCC unroll 4
    for (int64_t r = 0; r < 2 * SIDE; r++, scales += job->groups + 16) {
        const __m512 scale = _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(scales));
        for (int tile = 0; tile < tiles; tile++) {
            __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums[tile][r]));
            sum = _mm512_fmadd_ps(sum, scale, _mm512_load_ps(totals[tile][r]));
            _mm512_store_ps(totals[tile][r], sum);
        }
    }
}

/* One plane of 32 rows: codes of a step are shifted between the products of the one before, and the
   sums of a span are added a step after they were stored, when they have left the processor. */
TILES INLINE void add_plane(
    const Job *job, const uint8_t *const *rows, const char *scales_ahead, const float *scales,
    Sums *kept, const int tiles) {
    const int64_t steps = wide_steps(job), n = tile_columns(job), one = job->groups == 1;
    const int64_t apart = steps * 4 * n * SIDE * PART;
    const __m512i mask = _mm512_set1_epi8(3);
    char rooms[2][2 * PART * TILE] __attribute__((aligned(64)));
    const char *x = (const char *)job->x;
    const int32_t *less = (const int32_t *)job->sums;
    const int64_t lines = one ? 0 : 2 * job->parts; /* of 64 bytes, of the next stripe's scales */
    int64_t stored = 0, added = 0, in_span = 0;     /* spans, and steps */
    for (int64_t step = 0, odd = 0; step <= steps; step++, odd ^= 1) {
        const char *from = rooms[odd ^ 1];
        /* rows follow each other in memory: the next stripe */
        const char *ahead = (const char *)rows[0] + 2 * SIDE * (job->row_bytes + 64 * step);
        const int more = step < steps;
        if (step == 1 || (step && !one)) { START_SUMS(less + n * (step - 1)) }
        if (more) { EIGHT_ROWS(0) }
        if (step) { PRODUCTS }
        if (more) { EIGHT_ROWS(1) }
        if (step) { PRODUCTS }
        for (int64_t line = 0; line < lines; line++, scales_ahead += 64)
            _mm_prefetch(scales_ahead, _MM_HINT_T1);
        if (added < stored) {
            add_sums(job, kept->totals, kept->sums[added & 1], scales, added, tiles);
            added++;
        }
        if (more) { EIGHT_ROWS(2) }
        if (step) { PRODUCTS }
        if (more) { EIGHT_ROWS(3) }
        if (!step) continue;
        PRODUCTS
        if (!one || !more) { STORE_SUMS(kept->sums[stored & 1], n * (one ? 0 : in_span)) }
        if (++in_span < job->span_steps && more) continue;
        stored++;
        in_span = 0;
    }
    add_sums(job, kept->totals, kept->sums[added & 1], scales, added, tiles);
}

/* out of the sums of 16 rows: of each input those of its limbs and groups. */
TILES static void finish_rows(const Job *job, int64_t row, int64_t tile, float sums[SIDE][16]) {
    const int64_t each = inputs_of_tile(job), n = tile_columns(job);
    if (row >= job->rows) return;
    __m512i v[SIDE];
    for (int r = 0; r < SIDE; r++) v[r] = _mm512_load_si512(sums[r]);
    turn(v);
    for (int64_t i = 0; i < least(each, job->batch - tile * each); i++) {
        const float factor = ((const float *)job->factors)[tile * each + i];
        __m512 limbs[MOST_LIMBS] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t step = 0; step < (job->groups > 1 ? job->span_steps : 1); step++)
            for (int64_t part = 0; part < job->parts * job->limbs; part++) {
                const __m512i found = v[step * n + i * job->parts * job->limbs + part];
                limbs[part % job->limbs] =
                    _mm512_add_ps(limbs[part % job->limbs], _mm512_castsi512_ps(found));
            }
        __m512 sum = _mm512_setzero_ps();
        for (int64_t limb = 0; limb < job->limbs; limb++) {
            const float times = factor * (float)(1 << 8 * limb); /* first: sums may be large */
            sum = _mm512_fmadd_ps(limbs[limb], _mm512_set1_ps(times), sum);
        }
        put_sums(job, row, tile * each + i, sum);
    }
}

TILES INLINE void limbs_stripe(
    const Job *job, int64_t row, float *scales, Sums *kept, const int tiles) {
    memset(kept->totals, 0, sizeof kept->totals);
    for (int plane = 0; plane < 2; plane++) {
        const uint8_t *codes = (const uint8_t *)(plane ? job->second_codes : job->codes);
        const float *scale = (const float *)(plane ? job->second_scale : job->scale);
        const uint8_t *rows[2 * SIDE]; /* those after the last one of the matrix repeat it */
        if (!codes) break;
        for (int64_t r = 0; r < 2 * SIDE; r++) {
            const int64_t here = least(row + r, job->rows - 1);
            rows[r] = codes + here * job->row_bytes;
            read_scales(job, scale + here * job->scale_step, 1, scales + r * (job->groups + 16));
        }
        const char *ahead = (const char *)(scale + (row + 2 * SIDE) * job->scale_step);
        add_plane(job, rows, ahead, scales, kept, tiles);
    }
    for (int tile = 0; tile < tiles; tile++)
        for (int block = 0; block < 2; block++)
            finish_rows(job, row + SIDE * block, tile, kept->totals[tile] + SIDE * block);
}

/* As `trilens_native_multiply`, for inputs that `prepare_limbs` made; without offsets. */
TILES void trilens_native_multiply_limbs(void *address) {
    Job *job = address;
    float scales[2 * SIDE * (job->groups + 16)];
    Sums kept __attribute__((aligned(64)));
    const Shapes before = shapes_in_use();
    memset(scales, 0, sizeof scales);
    memset(&kept, 0, sizeof kept);
    shape_tiles(tile_columns(job));
    for (;;) {
        const int64_t row = STRIPE * take(job);
        if (row >= job->rows) break;
        if (job->batch > inputs_of_tile(job))
            limbs_stripe(job, row, scales, &kept, 2);
        else
            limbs_stripe(job, row, scales, &kept, 1);
    }
    give_back_tiles(&before);
}

#else

void trilens_native_prepare_limbs(void *address) { (void)address; }
void trilens_native_multiply_limbs(void *address) { (void)address; }

#endif

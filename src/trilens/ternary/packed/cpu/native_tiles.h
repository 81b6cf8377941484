/* What the products in tiles share: the tiles' instructions and shapes, and how sums are written. */
#ifndef TRILENS_NATIVE_TILES_H
#define TRILENS_NATIVE_TILES_H

#include "native_limbs.h"

#ifdef TRILENS_NATIVE_TILES

#define TILE 1024 /* bytes */

#define TILE_LOAD(tile, from, stride)                                                              \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"((int64_t)(stride)) : "memory")
#define TILE_STORE(tile, to, stride)                                                               \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"((int64_t)(stride)) : "memory")
#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile ::)
#define TILE_PRODUCT(sums, weights, inputs)                                                        \
    __asm__ volatile("tdpbf16ps %%tmm" #inputs ", %%tmm" #weights ", %%tmm" #sums ::)
/* Unsigned bytes of weights with signed ones of inputs. */
#define TILE_BYTES_PRODUCT(sums, weights, inputs)                                                  \
    __asm__ volatile("tdpbusd %%tmm" #inputs ", %%tmm" #weights ", %%tmm" #sums ::)

typedef struct {
    uint8_t palette, start_row, unused[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((packed)) Shapes;

/* Whoever else multiplies in this thread's tiles, as llama.cpp does, may have shaped them once for
   all its products. */
TILES static inline Shapes shapes_in_use(void) {
    Shapes shapes;
    __asm__ volatile("sttilecfg %0" : "=m"(shapes));
    return shapes;
}

TILES static inline void give_back_tiles(const Shapes *before) {
    if (before->palette)
        __asm__ volatile("ldtilecfg %0" ::"m"(*before));
    else
        __asm__ volatile("tilerelease");
}

/* Tiles of 16 rows: sums 0-3 and inputs 6-7 have `n` columns of 4 bytes, weights 4-5 have 64 bytes. */
TILES static inline void shape_tiles(int64_t n) {
    Shapes shapes = {1, 0, {0}, {0}, {0}};
    for (int tile = 0; tile < 8; tile++) {
        shapes.rows[tile] = 16;
        shapes.bytes[tile] = tile == 4 || tile == 5 ? 64 : (uint16_t)(4 * n);
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
}

/* The 32-bit numbers of 16 vectors, turned. */
TILES INLINE void turn(__m512i v[SIDE]) {
    __m512i t[SIDE];
#pragma GCC unroll 8
    for (int i = 0; i < SIDE; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < SIDE; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* out[input, row .. row + 16] from sums, with the bias, rounded. */
TILES INLINE void put_sums(const Job *job, int64_t row, int64_t input, __m512 sum) {
    const int64_t rows = least(SIDE, job->rows - row);
    const __mmask16 some = (__mmask16)((1 << rows) - 1);
    if (job->bias)
        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(some, (const float *)job->bias + row));
    __m512i bits = _mm512_castps_si512(sum);
    __m512i high = _mm512_srli_epi32(bits, 16);
    __mmask16 nan = _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q);
    __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    __m512i near = _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd));
    near = _mm512_srli_epi32(near, 16);
    near = _mm512_mask_or_epi32(near, nan, high, _mm512_set1_epi32(0x40));
    uint16_t *out = (uint16_t *)(job->out + input * job->out_bytes) + row;
    _mm256_mask_storeu_epi16(out, some, _mm512_cvtepi32_epi16(near));
}

#endif
#endif

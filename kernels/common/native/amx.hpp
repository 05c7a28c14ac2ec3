// Matrix products of bf16 by AMX tiles, and the layouts that they take.
//
// A tile is 16 rows of 64 bytes, here always whole. C += A B takes A as 16 rows x 32 columns of bf16; B, 32 rows x 16
// columns, with its rows in pairs: 32-bit word (p, c) holds B[2p][c] and B[2p+1][c]; C as 16 x 16 floats. So from a
// matrix X packed as A tiles, transposing the 32-bit words of each gives B tiles of X^T; and from B tiles of X the same
// transposition gives A tiles of X^T.
//
// Only for sources that are compiled with AMX (CMakeLists.txt). Tile numbers are template arguments because they are
// part of the instruction. The compiler does not know what the tile instructions read and write: hence the clobbers.
#pragma once

#include <immintrin.h>

#include "common/native/isa/simd.hpp"

namespace linattn::LINATTN_ISA {

constexpr int tile = 512;  // elements of bf16

// Configures the calling thread's tiles; releases them at the end of the scope, so that a context switch need not save
// them.
class TileConfiguration {
public:
    TileConfiguration() {
        struct alignas(64) {
            std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
            std::uint16_t bytes_per_row[16] = {};
            std::uint8_t rows[16] = {};
        } layout;
        for (int t = 0; t < 8; ++t) layout.bytes_per_row[t] = 64, layout.rows[t] = 16;
        asm volatile("ldtilecfg %0" ::"m"(layout));
    }
    ~TileConfiguration() { asm volatile("tilerelease"); }
    TileConfiguration(const TileConfiguration&) = delete;
    TileConfiguration& operator=(const TileConfiguration&) = delete;
};

// stride: bytes from row to row; 0 repeats one row.
template <int T>
LINATTN_INLINE void load_tile(const void* from, Index stride = 64) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
LINATTN_INLINE void store_tile(void* to, Index stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
LINATTN_INLINE void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Tiles 0 to 3 are a block of 32 x 32 floats: 0 1 over 2 3.
LINATTN_INLINE void zero_block() {
    asm volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2\n\ttilezero %tmm3");
}
LINATTN_INLINE void load_block(const float* from, Index stride) {
    load_tile<0>(from, 4 * stride);
    load_tile<1>(from + 16, 4 * stride);
    load_tile<2>(from + 16 * stride, 4 * stride);
    load_tile<3>(from + 16 * stride + 16, 4 * stride);
}
LINATTN_INLINE void store_block(float* to, Index stride) {
    store_tile<0>(to, 4 * stride);
    store_tile<1>(to + 16, 4 * stride);
    store_tile<2>(to + 16 * stride, 4 * stride);
    store_tile<3>(to + 16 * stride + 16, 4 * stride);
}
// The block += [a0; a1] [b0 b1], with 32 terms in each sum.
LINATTN_INLINE void multiply_block(const Bf16* a0, const Bf16* a1, const Bf16* b0, const Bf16* b1,
                                   Index bytes_per_row_of_a = 64) {
    load_tile<4>(a0, bytes_per_row_of_a);
    load_tile<6>(b0);
    load_tile<7>(b1);
    load_tile<5>(a1, bytes_per_row_of_a);
    multiply_tiles<0, 4, 6>();
    multiply_tiles<1, 4, 7>();
    multiply_tiles<2, 5, 6>();
    multiply_tiles<3, 5, 7>();
}

// ---- vectors of bf16 ----

LINATTN_INLINE __m512i load_words(const void* p) { return _mm512_loadu_si512(p); }
LINATTN_INLINE void store_words(void* p, __m512i x) { _mm512_storeu_si512(p, x); }

// 32 elements, `low` first, rounded to nearest even.
LINATTN_INLINE __m512i round_to_bf16(Vec low, Vec high) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}
LINATTN_INLINE __mmask32 first_bits(Index n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }

// The transpose of 16 x 16 words, one row in each vector.
LINATTN_INLINE void transpose(__m512i (&r)[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

LINATTN_INLINE void transpose_tile(const Bf16* from, Bf16* to) {
    __m512i words[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) words[r] = load_words(from + 32 * r);
    transpose(words);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) store_words(to + 32 * r, words[r]);
}

// ---- packing ----

// 32 rows to be packed, of `width` elements; those that do not exist or do not count read as zeros, whatever they hold.
struct StripView {
    const Bf16* data;
    Index stride;
    int width;
    std::uint32_t alive;  // a bit for each row

    __m512i row(int r, int column) const {
        const __mmask32 lanes = (alive >> r) & 1 ? first_bits(width - column) : 0;
        return _mm512_maskz_loadu_epi16(lanes, data + r * stride + column);
    }
};

// Rows as A tiles of X: [columns / 32][2][tile].
LINATTN_INLINE void pack_rows(const StripView& x, int columns, Bf16* __restrict to) {
    LINATTN_ASSERT(columns % 32 == 0 && columns >= x.width);
    for (int c = 0; c < columns; c += 32)
        for (int r = 0; r < 32; ++r, to += 32) store_words(to, x.row(r, c));
}

// Rows as B tiles of X^T: [2][columns / 32][tile].
LINATTN_INLINE void pack_transposed(const StripView& x, int columns, Bf16* __restrict to) {
    LINATTN_ASSERT(columns % 32 == 0 && columns >= x.width);
    for (int r0 = 0; r0 < 32; r0 += 16)
        for (int c = 0; c < columns; c += 32, to += tile) {
            __m512i words[16];
#pragma GCC unroll 16
            for (int r = 0; r < 16; ++r) words[r] = x.row(r0 + r, c);
            transpose(words);
#pragma GCC unroll 16
            for (int r = 0; r < 16; ++r) store_words(to + 32 * r, words[r]);
        }
}

// Rows as B tiles of X: [columns / 16][tile].
LINATTN_INLINE void pack_pairs(const StripView& x, int columns, Bf16* __restrict to) {
    LINATTN_ASSERT(columns % 32 == 0 && columns >= x.width);
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (int c = 0; c < columns; c += 32, to += 2 * tile)
        for (int r = 0; r < 32; r += 2) {
            const __m512i even = x.row(r, c), odd = x.row(r + 1, c);
            store_words(to + 16 * r, _mm512_permutex2var_epi16(even, first, odd));
            store_words(to + tile + 16 * r, _mm512_permutex2var_epi16(even, second, odd));
        }
}

}  // namespace linattn::LINATTN_ISA

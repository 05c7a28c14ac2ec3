// Sums over keys in bf16 by AMX tiles: folding keys in, and reading them by 32 queries.
//
// Features of x are the products x_i x_j of i with pairs (j, j + 1), j even, j + 1 >= i, and then x itself as products
// with 1. Those that come twice (j < i) weigh nothing. 16 pairs are a step: 32 terms of a sum.
#pragma once

#include "common/native/threads.hpp"
#include "quadratic/amx_scores.hpp"

namespace linattn::LINATTN_ISA {

constexpr int keys_of_a_product = 256;  // that share features while these lie in the nearest cache

struct Features {
    int steps;
    std::int32_t* first;   // [16 steps]: i, or D for the constant 1
    std::int32_t* second;  // [16 steps]: j / 2
    float* weights;        // [32 steps]: what a product counts for in p(s) / factor

    Features(const Weights& w, int D, Scratch& scratch) {
        const int pairs = D / 2 * (D / 2 + 1) + D / 2;
        steps = (pairs + 15) / 16;
        first = scratch.take<std::int32_t>(16 * steps);
        second = scratch.take<std::int32_t>(16 * steps);
        weights = scratch.take<float>(32 * steps);
        const float linear = w.a1 / w.factor, square = w.a2 / w.factor;
        int pair = 0;
        for (int i = 0; i < D; ++i)
            for (int j = i / 2 * 2; j < D; j += 2)
                set(pair++, i, j, j < i ? 0 : j == i ? square : 2 * square, j + 1 == i ? square : 2 * square);
        for (int j = 0; j < D; j += 2) set(pair++, D, j, linear, linear);
        while (pair < 16 * steps) set(pair++, D, 0, 0, 0);
    }

    int count() const { return 32 * steps; }

private:
    void set(int pair, int i, int j, float even, float odd) {
        first[pair] = i, second[pair] = j / 2;
        weights[2 * pair] = even, weights[2 * pair + 1] = odd;
    }
};

// A stretch of keys of one head as both uses need them; strips of 32, an even number of them.
struct KeyChunk {
    PackedKeys packed;
    Bf16* k_pairs;       // B tiles of K: [strip][D / 16][tile]
    Bf16* k_transposed;  // A tiles of K^T: [strip][D / 16][tile]
    float* columns;      // K^T: [D + 1][capacity]; the last row is 1
    Index capacity;      // keys
    Index count = 0;     // keys

    KeyChunk(const Sizes& size, Index keys, Scratch& scratch) : capacity((keys + 63) / 64 * 64) {
        packed = {scratch.take<Bf16>(capacity * size.D), scratch.take<Bf16>(capacity * size.M),
                  scratch.take<std::uint32_t>(capacity / 32)};
        k_pairs = scratch.take<Bf16>(capacity * size.D);
        k_transposed = scratch.take<Bf16>(capacity * size.D);
        columns = scratch.take<float>((size.D + 1) * capacity);
        for (Index j = 0; j < capacity; ++j) columns[size.D * capacity + j] = 1;
    }

    Index strips() const { return (count + 63) / 64 * 2; }

    void pack_strip(const Sizes& size, Index i, const Strip& k, const Strip& v) {
        pack_transposed(k, size.D, packed.k + i * 32 * size.D);
        pack_pairs(v, size.M, packed.v + i * 32 * size.M);
        packed.alive[i] = k.alive;
        Bf16* pairs = k_pairs + i * 32 * size.D;
        Bf16* transposed = k_transposed + i * 32 * size.D;
        pack_pairs(k, size.D, pairs);
        for (int d = 0; d < size.D; d += 16, pairs += tile, transposed += tile) {
            transpose_tile(pairs, transposed);
            for (int r = 0; r < 16; ++r) {
                float* column = columns + (d + r) * capacity + 32 * i;
                store(column, load(transposed + 32 * r));
                store(column + 16, load(transposed + 32 * r + 16));
            }
        }
    }
};

// Sums over the keys of a head.
struct Sums {
    float* S;        // [features][M], unweighted
    Bf16* weighted;  // A tiles of (weights S)^T: [step][M / 16][tile]
    float* kk;       // [D][D]
    Bf16* kk_tiles;  // A tiles of it: [D / 16][D / 32][tile]
    float* k_sum;    // [D]
    float* v_sum;    // [M]
    Index n = 0;

    Sums(const Features& f, const Sizes& size, Scratch& scratch) {
        S = scratch.take<float>(f.count() * size.M);
        weighted = scratch.take<Bf16>(f.count() * size.M);
        kk = scratch.take<float>(size.D * size.D);
        kk_tiles = scratch.take<Bf16>(size.D * size.D);
        k_sum = scratch.take<float>(size.D);
        v_sum = scratch.take<float>(size.M);
    }
};

// ---- folding keys in ----

// Features f0 to f0 + rows of `keys` keys from `key` on, as rows of bf16, `keys_of_a_product` apart.
LINATTN_INLINE void key_features(const Features& f, const KeyChunk& chunk, int f0, int rows, Index key, int keys,
                                 Bf16* phi) {
    for (int r = f0; r < f0 + rows; ++r, phi += keys_of_a_product) {
        const float* a = chunk.columns + f.first[r / 2] * chunk.capacity + key;
        const float* b = chunk.columns + (2 * f.second[r / 2] + r % 2) * chunk.capacity + key;
        for (int j = 0; j < keys; j += 64) {
            store_words(phi + j, rounded(load(a + j) * load(b + j), load(a + j + 16) * load(b + j + 16)));
            store_words(phi + j + 32, rounded(load(a + j + 32) * load(b + j + 32), load(a + j + 48) * load(b + j + 48)));
        }
    }
}

// The weighted copy of one step of S.
LINATTN_INLINE void weigh_sums(const Features& f, const Sums& sums, int step, int M) {
    const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int m = 0; m < M; m += 16) {
        const float* S = sums.S + Index{32} * step * M + m;
        const float* weights = f.weights + 32 * step;
        __m512i words[16];
#pragma GCC unroll 16
        for (int p = 0; p < 16; ++p) {
            const Vec even = weights[2 * p] * load(S + 2 * p * M), odd = weights[2 * p + 1] * load(S + (2 * p + 1) * M);
            words[p] = _mm512_permutexvar_epi16(interleaved, rounded(even, odd));
        }
        transpose(words);
        Bf16* to = sums.weighted + (Index{step} * (M / 16) + m / 16) * tile;
#pragma GCC unroll 16
        for (int p = 0; p < 16; ++p) store_words(to + 32 * p, words[p]);
    }
}

// S += phi(K)^T V in the steps from `step0` to `step1`. The features of the next product are made while the tiles work
// on this one; `phi` holds those of two.
inline void add_products(const Features& f, const Sums& sums, const KeyChunk& chunk, int M, int step0, int step1,
                         bool read_next, Bf16* phi) {
    const Index keys = chunk.strips() * 32;
    Bf16 *now = phi, *next = phi + 32 * keys_of_a_product;
    const auto length = [&](Index key) { return static_cast<int>(least<Index>(keys_of_a_product, keys - key)); };
    if (step0 < step1) key_features(f, chunk, 32 * step0, 32, 0, length(0), now);
    for (int step = step0; step < step1; ++step) {
        for (Index key = 0; key < keys; key += keys_of_a_product) {
            const int strips = length(key) / 32, products = strips * (M / 32);
            const bool turns = key + keys_of_a_product >= keys;
            const int step_after = turns ? step + 1 : step;
            const Index key_after = turns ? 0 : key + keys_of_a_product;
            const int rows = step_after < step1 ? 32 : 0;
            int made = 0, done = 0;
            for (int m = 0; m < M; m += 32) {
                float* S = sums.S + Index{32} * step * M + m;
                load_block(S, M);
                for (int s = 0; s < strips; ++s) {
                    const Bf16* v = chunk.packed.v + ((key / 32 + s) * (M / 16) + m / 16) * tile;
                    multiply_block(now + 32 * s, now + 16 * keys_of_a_product + 32 * s, v, v + tile,
                                   2 * keys_of_a_product);
                    const int until = rows * ++done / products;
                    key_features(f, chunk, 32 * step_after + made, until - made, key_after, length(key_after),
                                 next + made * keys_of_a_product);
                    made = until;
                }
                store_block(S, M);
            }
            Bf16* const other = now;
            now = next, next = other;
        }
        if (read_next) weigh_sums(f, sums, step, M);
    }
}

// Rows i to i + 32 of kk += K^T K.
inline void add_squares(const Sums& sums, const KeyChunk& chunk, int D, int i) {
    for (int j = 0; j < D; j += 32) {
        float* kk = sums.kk + i * D + j;
        load_block(kk, D);
        for (Index s = 0; s < chunk.strips(); ++s) {
            const Bf16* a = chunk.k_transposed + (s * (D / 16) + i / 16) * tile;
            const Bf16* b = chunk.k_pairs + (s * (D / 16) + j / 16) * tile;
            multiply_block(a, a + tile, b, b + tile);
        }
        store_block(kk, D);
    }
    for (int r = i; r < i + 32; ++r)
        for (int j = 0; j < D; j += 32)
            store_words(sums.kk_tiles + (r / 16 * (D / 32) + j / 32) * tile + r % 16 * 32,
                        rounded(load(sums.kk + r * D + j), load(sums.kk + r * D + j + 16)));
}

// to[width] += sums over the rows that were packed as pairs.
LINATTN_INLINE void add_rows(const Bf16* pairs, Index strips, int width, float* to) {
    const __m512i one = _mm512_set1_epi16(0x3f80);
    for (int c = 0; c < width; c += 16) {
        Vec total = load(to + c);
        for (Index s = 0; s < strips; ++s)
            for (int p = 0; p < 16; ++p)
                total = _mm512_dpbf16_ps(
                    total, reinterpret_cast<__m512bh>(load_words(pairs + (s * (width / 16) + c / 16) * tile + 32 * p)),
                    reinterpret_cast<__m512bh>(one));
        store(to + c, total);
    }
}

// ---- reading ----

// What 32 queries need to read the sums.
struct Reader {
    float* doubled;  // [D + 1][64]: q_i twice for each query; the last row is 1
    float* paired;   // [D / 2][64]: q_2p and q_2p+1 for each query
    Bf16* phi;       // B tiles of features^T: two blocks of [steps_at_once][2][tile]
    float* out;      // [M][32]
    float* kkq;      // [D][32]: kk q

    static constexpr int steps_at_once = 4;

    Reader(const Sizes& size, Scratch& scratch) {
        doubled = scratch.take<float>((size.D + 1) * 64);
        paired = scratch.take<float>(size.D / 2 * 64);
        phi = scratch.take<Bf16>(4 * steps_at_once * tile);
        out = scratch.take<float>(size.M * 32);
        kkq = scratch.take<float>(size.D * 32);
        for (int i = 0; i < 64; ++i) doubled[size.D * 64 + i] = 1;
    }

    // q: B tiles of Q^T.
    void spread(const Bf16* q, int D) {
        for (int half = 0; half < 2; ++half)
            for (int p = 0; p < D / 2; ++p, q += 32)
                for (int part = 0; part < 32; part += 16) {
                    const Vec both = load(q + part);
                    float* at = doubled + 2 * p * 64 + 32 * half + part;
                    store(paired + p * 64 + 32 * half + part, both);
                    store(at, _mm512_moveldup_ps(both));
                    store(at + 64, _mm512_movehdup_ps(both));
                }
    }

    // `pairs` rows of B tiles from pair `pair` on, within one step.
    LINATTN_INLINE void features(const Features& f, int pair, int pairs, Bf16* to) const {
        for (int p = pair; p < pair + pairs; ++p, to += 32) {
            const float* a = doubled + f.first[p] * 64;
            const float* b = paired + f.second[p] * 64;
            store_words(to, rounded(load(a) * load(b), load(a + 16) * load(b + 16)));
            store_words(to + tile, rounded(load(a + 32) * load(b + 32), load(a + 48) * load(b + 48)));
        }
    }

    // out = v_sum's part + (weights S)^T phi(q). The next features are made while the tiles work on these.
    void products(const Features& f, const Sums& sums, float constant, int M) {
        for (int m = 0; m < M; ++m) {
            const Vec start = splat(constant * sums.v_sum[m]);
            store(out + 32 * m, start), store(out + 32 * m + 16, start);
        }
        Bf16 *now = phi, *next = phi + 2 * steps_at_once * tile;
        for (int s = 0; s < least(steps_at_once, f.steps); ++s) features(f, 16 * s, 16, now + 2 * s * tile);
        for (int step = 0; step < f.steps; step += steps_at_once) {
            const int steps = least(steps_at_once, f.steps - step);
            const int halves = 2 * least(steps_at_once, f.steps - step - steps), products = steps * (M / 32);
            int made = 0, done = 0;
            for (int m = 0; m < M; m += 32) {
                load_block(out + m * 32, 32);
                for (int s = 0; s < steps; ++s) {
                    const Bf16* S = sums.weighted + (Index{step + s} * (M / 16) + m / 16) * tile;
                    multiply_block(S, S + tile, now + 2 * s * tile, now + (2 * s + 1) * tile);
                    for (const int until = halves * ++done / products; made < until; ++made)
                        features(f, 16 * (step + steps) + 8 * made, 8, next + made / 2 * 2 * tile + made % 2 * 8 * 32);
                }
                store_block(out + m * 32, 32);
            }
            Bf16* const other = now;
            now = next, next = other;
        }
    }

    // l[32] = sum of p / factor over the folded keys.
    void row_sums(const Weights& w, const Sums& sums, const Bf16* q, int D, float* l) {
        for (int i = 0; i < D; i += 32) {
            zero_block();
            for (int j = 0; j < D; j += 32) {
                const Bf16* kk = sums.kk_tiles + (i / 16 * (D / 32) + j / 32) * tile;
                const Bf16* b = q + j / 32 * tile;
                multiply_block(kk, kk + D / 32 * tile, b, b + D / 32 * tile);
            }
            store_block(kkq + i * 32, 32);
        }
        const float linear = w.a1 / w.factor, square = w.a2 / w.factor, constant = w.a0 / w.factor;
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        for (int half = 0; half < 32; half += 16) {
            Vec total = splat(constant * static_cast<float>(sums.n));
            for (int j = 0; j < D; ++j) {
                const float* x = doubled + j * 64 + 2 * half;
                const Vec qj = _mm512_permutex2var_ps(load(x), even, load(x + 16));
                total += qj * (square * load(kkq + j * 32 + half) + linear * sums.k_sum[j]);
            }
            store(l + half, total);
        }
    }

    // acc[32][M] and the first of each 16 parts of row_sums += what the folded keys give to the queries.
    void read(const Weights& w, const Features& f, const Sums& sums, const Sizes& size, const Bf16* q, float* acc,
              float* parts) {
        float l[32];
        spread(q, size.D);
        products(f, sums, w.a0 / w.factor, size.M);
        row_sums(w, sums, q, size.D, l);
        for (int r = 0; r < 32; ++r) parts[16 * r] += l[r];
        for (int half = 0; half < 32; half += 16)
            for (int m = 0; m < size.M; m += 16) {
                __m512i words[16];
#pragma GCC unroll 16
                for (int r = 0; r < 16; ++r) words[r] = load_words(out + (m + r) * 32 + half);
                transpose(words);
#pragma GCC unroll 16
                for (int r = 0; r < 16; ++r) {
                    float* row = acc + (half + r) * size.M + m;
                    store(row, load(row) + reinterpret_cast<Vec>(words[r]));
                }
            }
    }
};

}  // namespace linattn::LINATTN_ISA

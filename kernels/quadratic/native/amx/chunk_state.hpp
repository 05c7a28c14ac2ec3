// The state, sums over keys in bf16 by AMX tiles: its features, and how keys are added. What queries get from it:
// chunk_output.hpp.
//
// Features of x are the products x_i x_j of i with pairs (j, j + 1), j even, j + 1 >= i, and then x itself as
// products with 1. Those that come twice (j < i) have weight 0. 16 pairs are a step: 32 terms of a sum.
#pragma once

#include "common/native/threads.hpp"
#include "quadratic/native/amx/score_tile.hpp"

namespace linattn::LINATTN_ISA::quadratic {

constexpr int rows_of_a_product = 256;  // that share features while these lie in the nearest cache

struct FeatureTable {
    int steps;
    std::int32_t* first;   // [16 steps]: i, or D for the constant 1
    std::int32_t* second;  // [16 steps]: j / 2
    float* weights;        // [32 steps]: what a product counts for in p(s) / factor

    FeatureTable(const ScorePolynomial& w, int D, Scratch& scratch) {
        const int pairs = D / 2 * (D / 2 + 1) + D / 2;
        steps = (pairs + 15) / 16;
        first = scratch.allocate<std::int32_t>(16 * steps);
        second = scratch.allocate<std::int32_t>(16 * steps);
        weights = scratch.allocate<float>(32 * steps);
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

// What an update adds to the state, in strips of 32 rows: x with values y, and z, which is x or a multiple of it.
struct StateUpdate {
    Bf16* y_pairs;       // B tiles of Y: [strip][M / 16][tile]
    Bf16* z_pairs;       // B tiles of Z: [strip][D / 16][tile]
    Bf16* x_transposed;  // A tiles of X^T: [strip][D / 16][tile]
    float* columns;      // X^T: [D + 1][capacity]; the last row is 1
    Index capacity;      // rows, a multiple of 64
    Index strips = 0;

    // Without y.
    StateUpdate(int D, Index rows, Scratch& scratch) : y_pairs(nullptr), capacity((rows + 63) / 64 * 64) {
        z_pairs = scratch.allocate<Bf16>(capacity * D);
        x_transposed = scratch.allocate<Bf16>(capacity * D);
        columns = scratch.allocate<float>((D + 1) * capacity);
        for (Index i = 0; i < capacity; ++i) columns[D * capacity + i] = 1;
    }

    // Strip i of X^T from B tiles of X.
    void transpose_strip(int D, Index i, const Bf16* x_pairs) {
        Bf16* transposed = x_transposed + i * 32 * D;
        for (int d = 0; d < D; d += 16, x_pairs += tile, transposed += tile) {
            transpose_tile(x_pairs, transposed);
            for (int r = 0; r < 16; ++r) {
                float* column = columns + (d + r) * capacity + 32 * i;
                store(column, load(transposed + 32 * r));
                store(column + 16, load(transposed + 32 * r + 16));
            }
        }
    }
};

// Sums over rows (x, y, z), and weighted copies of S for what reads it; null: not needed.
struct ChunkState {
    float* S;                    // sum of phi(x) y^T: [features][M]
    Bf16* by_column = nullptr;   // A tiles of (weights S)^T: [step][M / 16][tile]
    Bf16* by_feature = nullptr;  // A tiles of weights S: [step][M / 32][2][tile]
    float* moments;              // sum of x z^T: [D][D]
    Bf16* moment_tiles;          // A tiles of it: [D / 16][D / 32][tile]
    float* z_sum;                // [D]
    float* y_sum;                // [M]
    Index n = 0;

    ChunkState(const FeatureTable& f, const TileSizes& size, bool read_values, bool read_gradients, Scratch& scratch) {
        S = scratch.allocate<float>(f.count() * size.M);
        if (read_values) by_column = scratch.allocate<Bf16>(f.count() * size.M);
        if (read_gradients) by_feature = scratch.allocate<Bf16>(f.count() * size.M);
        moments = scratch.allocate<float>(size.D * size.D);
        moment_tiles = scratch.allocate<Bf16>(size.D * size.D);
        z_sum = scratch.allocate<float>(size.D);
        y_sum = scratch.allocate<float>(size.M);
    }

    void clear_steps(int step0, int step1, int M) {
        std::memset(S + Index{step0} * 32 * M, 0, Index{step1 - step0} * 32 * M * sizeof(float));
    }
    void clear_moments(const TileSizes& size) {
        std::memset(moments, 0, size.D * size.D * sizeof(float));
        std::memset(z_sum, 0, size.D * sizeof(float));
        std::memset(y_sum, 0, size.M * sizeof(float));
        n = 0;
    }
};

// ---- adding rows ----

// Features f0 to f0 + count of `rows` rows from `row` on, as rows of bf16, `rows_of_a_product` apart.
LINATTN_INLINE void make_row_features(const FeatureTable& f, const StateUpdate& x, int f0, int count, Index row,
                                      int rows, Bf16* phi) {
    for (int r = f0; r < f0 + count; ++r, phi += rows_of_a_product) {
        const float* a = x.columns + f.first[r / 2] * x.capacity + row;
        const float* b = x.columns + (2 * f.second[r / 2] + r % 2) * x.capacity + row;
        for (int j = 0; j < rows; j += 64) {
            const auto product = [&](int i) { return load(a + j + i) * load(b + j + i); };
            store_words(phi + j, round_to_bf16(product(0), product(16)));
            store_words(phi + j + 32, round_to_bf16(product(32), product(48)));
        }
    }
}

LINATTN_INLINE __m512i interleave_halves(__m512i halves) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, halves);
}

// The weighted copies of one step of S.
LINATTN_INLINE void refresh_copies(const FeatureTable& f, const ChunkState& state, int step, int M) {
    const float* weights = f.weights + 32 * step;
    const float* S = state.S + Index{32} * step * M;
    for (int m = 0; state.by_column != nullptr && m < M; m += 16) {
        __m512i words[16];
#pragma GCC unroll 16
        for (int p = 0; p < 16; ++p)
            words[p] = interleave_halves(round_to_bf16(weights[2 * p] * load(S + 2 * p * M + m),
                                                       weights[2 * p + 1] * load(S + (2 * p + 1) * M + m)));
        transpose(words);
        Bf16* to = state.by_column + (Index{step} * (M / 16) + m / 16) * tile;
#pragma GCC unroll 16
        for (int p = 0; p < 16; ++p) store_words(to + 32 * p, words[p]);
    }
    Bf16* to = state.by_feature + Index{step} * 32 * M;
    for (int m = 0; state.by_feature != nullptr && m < M; m += 32)
        for (int r = 0; r < 32; ++r, to += 32)
            store_words(to, round_to_bf16(weights[r] * load(S + r * M + m), weights[r] * load(S + r * M + m + 16)));
}

// S += phi(X)^T Y in the steps from `step0` to `step1`. The features of the next product are made while the tiles work
// on this one; `phi` holds those of two.
inline void update_products(const FeatureTable& f, const ChunkState& state, const StateUpdate& x, int M, int step0,
                            int step1, bool read_next, Bf16* phi) {
    const Index all = x.strips * 32;
    Bf16 *now = phi, *next = phi + 32 * rows_of_a_product;
    const auto length = [&](Index row) { return static_cast<int>(min<Index>(rows_of_a_product, all - row)); };
    if (step0 < step1) make_row_features(f, x, 32 * step0, 32, 0, length(0), now);
    for (int step = step0; step < step1; ++step) {
        for (Index row = 0; row < all; row += rows_of_a_product) {
            const int strips = length(row) / 32, products = strips * (M / 32);
            const bool turns = row + rows_of_a_product >= all;
            const int step_after = turns ? step + 1 : step;
            const Index row_after = turns ? 0 : row + rows_of_a_product;
            const int count = step_after < step1 ? 32 : 0;
            int made = 0, done = 0;
            for (int m = 0; m < M; m += 32) {
                float* S = state.S + Index{32} * step * M + m;
                load_block(S, M);
                for (int s = 0; s < strips; ++s) {
                    const Bf16* y = x.y_pairs + ((row / 32 + s) * (M / 16) + m / 16) * tile;
                    multiply_block(now + 32 * s, now + 16 * rows_of_a_product + 32 * s, y, y + tile,
                                   2 * rows_of_a_product);
                    const int until = count * ++done / products;
                    make_row_features(f, x, 32 * step_after + made, until - made, row_after, length(row_after),
                                      next + made * rows_of_a_product);
                    made = until;
                }
                store_block(S, M);
            }
            Bf16* const other = now;
            now = next, next = other;
        }
        if (read_next) refresh_copies(f, state, step, M);
    }
}

// Rows i to i + 32 of moments += X^T Z.
inline void update_moments(const ChunkState& state, const StateUpdate& x, int D, int i) {
    for (int j = 0; j < D; j += 32) {
        float* moments = state.moments + i * D + j;
        load_block(moments, D);
        for (Index s = 0; s < x.strips; ++s) {
            const Bf16* a = x.x_transposed + (s * (D / 16) + i / 16) * tile;
            const Bf16* b = x.z_pairs + (s * (D / 16) + j / 16) * tile;
            multiply_block(a, a + tile, b, b + tile);
        }
        store_block(moments, D);
    }
    for (int r = i; r < i + 32; ++r)
        for (int j = 0; j < D; j += 32)
            store_words(state.moment_tiles + (r / 16 * (D / 32) + j / 32) * tile + r % 16 * 32,
                        round_to_bf16(load(state.moments + r * D + j), load(state.moments + r * D + j + 16)));
}

// to[width] += sums over the rows that were packed as pairs.
LINATTN_INLINE void add_packed_rows(const Bf16* pairs, Index strips, int width, float* to) {
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

LINATTN_INLINE void update_vector_sums(const ChunkState& state, const StateUpdate& x, const TileSizes& size) {
    add_packed_rows(x.z_pairs, x.strips, size.D, state.z_sum);
    add_packed_rows(x.y_pairs, x.strips, size.M, state.y_sum);
}

}  // namespace linattn::LINATTN_ISA::quadratic

// Sums over keys in bf16 by AMX tiles: folding keys in, and reading them by 32 queries.
//
// Features of x are the products x_i x_j of i with pairs (j, j + 1), j even, j + 1 >= i, and then x itself as products
// with 1. Those that come twice (j < i) weigh nothing. 16 pairs are a step: 32 terms of a sum.
#pragma once

#include "common/native/threads.hpp"
#include "quadratic/amx_scores.hpp"

namespace linattn::LINATTN_ISA {

constexpr int rows_of_a_product = 256;  // that share features while these lie in the nearest cache

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

// Rows to be added to sums, in strips of 32: x with values y, and z, which is x or a multiple of it.
struct Addends {
    Bf16* y_pairs;       // B tiles of Y: [strip][M / 16][tile]
    Bf16* z_pairs;       // B tiles of Z: [strip][D / 16][tile]
    Bf16* x_transposed;  // A tiles of X^T: [strip][D / 16][tile]
    float* columns;      // X^T: [D + 1][capacity]; the last row is 1
    Index capacity;      // rows, a multiple of 64
    Index strips = 0;

    // Without y.
    Addends(int D, Index rows, Scratch& scratch) : y_pairs(nullptr), capacity((rows + 63) / 64 * 64) {
        z_pairs = scratch.take<Bf16>(capacity * D);
        x_transposed = scratch.take<Bf16>(capacity * D);
        columns = scratch.take<float>((D + 1) * capacity);
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

// Sums over rows (x, y, z), and copies of S with its weights for those who read them: null if nobody does.
struct Sums {
    float* S;                        // sum of phi(x) y^T: [features][M]
    Bf16* by_column = nullptr;       // A tiles of (weights S)^T: [step][M / 16][tile]
    Bf16* by_feature = nullptr;      // A tiles of weights S: [step][M / 32][2][tile]
    float* xz;                       // sum of x z^T: [D][D]
    Bf16* xz_tiles;                  // A tiles of it: [D / 16][D / 32][tile]
    float* z_sum;                    // [D]
    float* y_sum;                    // [M]
    Index n = 0;

    Sums(const Features& f, const Sizes& size, bool read_values, bool read_gradients, Scratch& scratch) {
        S = scratch.take<float>(f.count() * size.M);
        if (read_values) by_column = scratch.take<Bf16>(f.count() * size.M);
        if (read_gradients) by_feature = scratch.take<Bf16>(f.count() * size.M);
        xz = scratch.take<float>(size.D * size.D);
        xz_tiles = scratch.take<Bf16>(size.D * size.D);
        z_sum = scratch.take<float>(size.D);
        y_sum = scratch.take<float>(size.M);
    }

    void clear_steps(int step0, int step1, int M) {
        std::memset(S + Index{step0} * 32 * M, 0, Index{step1 - step0} * 32 * M * sizeof(float));
    }
    void clear_small(const Sizes& size) {
        std::memset(xz, 0, size.D * size.D * sizeof(float));
        std::memset(z_sum, 0, size.D * sizeof(float));
        std::memset(y_sum, 0, size.M * sizeof(float));
        n = 0;
    }
};

// ---- adding rows ----

// Features f0 to f0 + count of `rows` addends from `row` on, as rows of bf16, `rows_of_a_product` apart.
LINATTN_INLINE void row_features(const Features& f, const Addends& x, int f0, int count, Index row, int rows,
                                 Bf16* phi) {
    for (int r = f0; r < f0 + count; ++r, phi += rows_of_a_product) {
        const float* a = x.columns + f.first[r / 2] * x.capacity + row;
        const float* b = x.columns + (2 * f.second[r / 2] + r % 2) * x.capacity + row;
        for (int j = 0; j < rows; j += 64) {
            store_words(phi + j, rounded(load(a + j) * load(b + j), load(a + j + 16) * load(b + j + 16)));
            store_words(phi + j + 32, rounded(load(a + j + 32) * load(b + j + 32), load(a + j + 48) * load(b + j + 48)));
        }
    }
}

LINATTN_INLINE __m512i interleaved(__m512i halves) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, halves);
}

// The weighted copies of one step of S.
LINATTN_INLINE void refresh(const Features& f, const Sums& sums, int step, int M) {
    const float* weights = f.weights + 32 * step;
    const float* S = sums.S + Index{32} * step * M;
    for (int m = 0; sums.by_column != nullptr && m < M; m += 16) {
        __m512i words[16];
#pragma GCC unroll 16
        for (int p = 0; p < 16; ++p)
            words[p] = interleaved(rounded(weights[2 * p] * load(S + 2 * p * M + m),
                                           weights[2 * p + 1] * load(S + (2 * p + 1) * M + m)));
        transpose(words);
        Bf16* to = sums.by_column + (Index{step} * (M / 16) + m / 16) * tile;
#pragma GCC unroll 16
        for (int p = 0; p < 16; ++p) store_words(to + 32 * p, words[p]);
    }
    Bf16* to = sums.by_feature + Index{step} * 32 * M;
    for (int m = 0; sums.by_feature != nullptr && m < M; m += 32)
        for (int r = 0; r < 32; ++r, to += 32)
            store_words(to, rounded(weights[r] * load(S + r * M + m), weights[r] * load(S + r * M + m + 16)));
}

// S += phi(X)^T Y in the steps from `step0` to `step1`. The features of the next product are made while the tiles work
// on this one; `phi` holds those of two.
inline void add_products(const Features& f, const Sums& sums, const Addends& x, int M, int step0, int step1,
                         bool read_next, Bf16* phi) {
    const Index all = x.strips * 32;
    Bf16 *now = phi, *next = phi + 32 * rows_of_a_product;
    const auto length = [&](Index row) { return static_cast<int>(least<Index>(rows_of_a_product, all - row)); };
    if (step0 < step1) row_features(f, x, 32 * step0, 32, 0, length(0), now);
    for (int step = step0; step < step1; ++step) {
        for (Index row = 0; row < all; row += rows_of_a_product) {
            const int strips = length(row) / 32, products = strips * (M / 32);
            const bool turns = row + rows_of_a_product >= all;
            const int step_after = turns ? step + 1 : step;
            const Index row_after = turns ? 0 : row + rows_of_a_product;
            const int count = step_after < step1 ? 32 : 0;
            int made = 0, done = 0;
            for (int m = 0; m < M; m += 32) {
                float* S = sums.S + Index{32} * step * M + m;
                load_block(S, M);
                for (int s = 0; s < strips; ++s) {
                    const Bf16* y = x.y_pairs + ((row / 32 + s) * (M / 16) + m / 16) * tile;
                    multiply_block(now + 32 * s, now + 16 * rows_of_a_product + 32 * s, y, y + tile,
                                   2 * rows_of_a_product);
                    const int until = count * ++done / products;
                    row_features(f, x, 32 * step_after + made, until - made, row_after, length(row_after),
                                 next + made * rows_of_a_product);
                    made = until;
                }
                store_block(S, M);
            }
            Bf16* const other = now;
            now = next, next = other;
        }
        if (read_next) refresh(f, sums, step, M);
    }
}

// Rows i to i + 32 of xz += X^T Z.
inline void add_squares(const Sums& sums, const Addends& x, int D, int i) {
    for (int j = 0; j < D; j += 32) {
        float* xz = sums.xz + i * D + j;
        load_block(xz, D);
        for (Index s = 0; s < x.strips; ++s) {
            const Bf16* a = x.x_transposed + (s * (D / 16) + i / 16) * tile;
            const Bf16* b = x.z_pairs + (s * (D / 16) + j / 16) * tile;
            multiply_block(a, a + tile, b, b + tile);
        }
        store_block(xz, D);
    }
    for (int r = i; r < i + 32; ++r)
        for (int j = 0; j < D; j += 32)
            store_words(sums.xz_tiles + (r / 16 * (D / 32) + j / 32) * tile + r % 16 * 32,
                        rounded(load(sums.xz + r * D + j), load(sums.xz + r * D + j + 16)));
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

LINATTN_INLINE void add_small(const Sums& sums, const Addends& x, const Sizes& size) {
    add_rows(x.z_pairs, x.strips, size.D, sums.z_sum);
    add_rows(x.y_pairs, x.strips, size.M, sums.y_sum);
}

// ---- reading ----

// to[D][32] = xz x for 32 rows x, given as B tiles of X^T.
LINATTN_INLINE void multiply_squares(const Sums& sums, const Bf16* x, int D, float* to) {
    for (int i = 0; i < D; i += 32) {
        zero_block();
        for (int j = 0; j < D; j += 32) {
            const Bf16* xz = sums.xz_tiles + (i / 16 * (D / 32) + j / 32) * tile;
            const Bf16* b = x + j / 32 * tile;
            multiply_block(xz, xz + D / 32 * tile, b, b + D / 32 * tile);
        }
        store_block(to + i * 32, 32);
    }
}

// to[32][columns] += from^T, from[columns][32].
LINATTN_INLINE void add_transposed(const float* from, int columns, float factor, float* to) {
    for (int half = 0; half < 32; half += 16)
        for (int c = 0; c < columns; c += 16) {
            __m512i words[16];
#pragma GCC unroll 16
            for (int r = 0; r < 16; ++r) words[r] = load_words(from + (c + r) * 32 + half);
            transpose(words);
#pragma GCC unroll 16
            for (int r = 0; r < 16; ++r) {
                float* row = to + (half + r) * columns + c;
                store(row, load(row) + factor * reinterpret_cast<Vec>(words[r]));
            }
        }
}

// What 32 queries need to read the sums; `x` in their names is q.
struct Reader {
    float* doubled;  // [D + 1][64]: q_i twice for each query; the last row is 1
    float* paired;   // [D / 2][64]: q_2p and q_2p+1 for each query
    Bf16* phi;       // B tiles of features^T: two blocks of [steps_at_once][2][tile]
    float* out;      // [M][32]
    float* squares;  // [D][32]: xz q

    static constexpr int steps_at_once = 4;

    Reader(const Sizes& size, Scratch& scratch) {
        doubled = scratch.take<float>((size.D + 1) * 64);
        paired = scratch.take<float>(size.D / 2 * 64);
        phi = scratch.take<Bf16>(4 * steps_at_once * tile);
        out = scratch.take<float>(size.M * 32);
        squares = scratch.take<float>(size.D * 32);
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

    // out = constant y_sum + (weights S)^T phi(q). The next features are made while the tiles work on these.
    void products(const Features& f, const Sums& sums, float constant, int M) {
        for (int m = 0; m < M; ++m) {
            const Vec start = splat(constant * sums.y_sum[m]);
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
                    const Bf16* S = sums.by_column + (Index{step + s} * (M / 16) + m / 16) * tile;
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
        multiply_squares(sums, q, D, squares);
        const float linear = w.a1 / w.factor, square = w.a2 / w.factor, constant = w.a0 / w.factor;
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        for (int half = 0; half < 32; half += 16) {
            Vec total = splat(constant * static_cast<float>(sums.n));
            for (int j = 0; j < D; ++j) {
                const float* x = doubled + j * 64 + 2 * half;
                const Vec qj = _mm512_permutex2var_ps(load(x), even, load(x + 16));
                total += qj * (square * load(squares + j * 32 + half) + linear * sums.z_sum[j]);
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
        add_transposed(out, size.M, 1, acc);
    }
};

// The gradient to 32 rows x of sum(y . acc) + sum(minus l), where acc and l are what x reads.
struct GradientReader {
    float* x;        // [D + 1][32]; the last row is 1
    float* dx;       // [D + 1][32]; the last row means nothing
    float* u;        // [2][32][32]: gradients to the features of two steps
    float* squares;  // [D][32]: xz x

    GradientReader(const Sizes& size, Scratch& scratch) {
        x = scratch.take<float>((size.D + 1) * 32);
        dx = scratch.take<float>((size.D + 1) * 32);
        u = scratch.take<float>(2 * 32 * 32);
        squares = scratch.take<float>(size.D * 32);
        for (int i = 0; i < 32; ++i) x[size.D * 32 + i] = 1;
    }

    // x_transposed, y_transposed: B tiles of X^T and Y^T. minus: [32].
    void read(const Weights& w, const Features& f, const Sums& sums, const Sizes& size, const Bf16* x_transposed,
              const Bf16* y_transposed, const float* minus) {
        spread(x_transposed, size.D);
        std::memset(dx, 0, (size.D + 1) * 32 * sizeof(float));
        for (int step = 0; step <= f.steps; ++step) {
            if (step < f.steps) multiply(sums, step, size.M, y_transposed);
            if (step > 0) pull_back(f, step - 1, u + (step - 1) % 2 * 32 * 32);
        }
        multiply_squares(sums, x_transposed, size.D, squares);
        const float linear = w.a1 / w.factor, square = 2 * w.a2 / w.factor;
        for (int d = 0; d < size.D; ++d)
            for (int half = 0; half < 32; half += 16) {
                float* to = dx + d * 32 + half;
                store(to, load(to) + load(minus + half) * (square * load(squares + d * 32 + half) + linear * sums.z_sum[d]));
            }
    }

private:
    void spread(const Bf16* transposed, int D) {
        for (int half = 0; half < 32; half += 16)
            for (int p = 0; p < D / 2; ++p, transposed += 32) {
                const __m512i both = load_words(transposed);
                store_words(x + 2 * p * 32 + half, _mm512_slli_epi32(both, 16));
                store_words(x + (2 * p + 1) * 32 + half, _mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
            }
    }

    void multiply(const Sums& sums, int step, int M, const Bf16* y) {
        zero_block();
        const Bf16* S = sums.by_feature + Index{step} * 32 * M;
        for (int m = 0; m < M / 32; ++m)
            multiply_block(S + 2 * m * tile, S + (2 * m + 1) * tile, y + m * tile, y + (M / 32 + m) * tile);
        store_block(u + step % 2 * 32 * 32, 32);
    }

    // dx_i += u x_j and dx_j += u x_i for the products x_i x_j of a step; i stays the same for many of them.
    LINATTN_INLINE void pull_back(const Features& f, int step, const float* du) {
        for (int p = 16 * step; p < 16 * (step + 1);) {
            const int i = f.first[p];
            const Vec left = load(x + i * 32), right = load(x + i * 32 + 16);
            Vec sum_left = {}, sum_right = {};
            for (; p < 16 * (step + 1) && f.first[p] == i; ++p)
                for (int j = 2 * f.second[p]; j < 2 * f.second[p] + 2; ++j, du += 32) {
                    const Vec u_left = load(du), u_right = load(du + 16);
                    sum_left += u_left * load(x + j * 32);
                    sum_right += u_right * load(x + j * 32 + 16);
                    store(dx + j * 32, load(dx + j * 32) + u_left * left);
                    store(dx + j * 32 + 16, load(dx + j * 32 + 16) + u_right * right);
                }
            store(dx + i * 32, load(dx + i * 32) + sum_left);
            store(dx + i * 32 + 16, load(dx + i * 32 + 16) + sum_right);
        }
    }
};

}  // namespace linattn::LINATTN_ISA

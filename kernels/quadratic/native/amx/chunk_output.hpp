// What 32 queries get from the state by AMX tiles, and the gradients to them.
#pragma once

#include "quadratic/native/amx/chunk_state.hpp"

namespace linattn::LINATTN_ISA::quadratic {

// to[D][32] = moments x for 32 rows x, given as B tiles of X^T.
LINATTN_INLINE void multiply_moments(const ChunkState& state, const Bf16* x, int D, float* to) {
    for (int i = 0; i < D; i += 32) {
        zero_block();
        for (int j = 0; j < D; j += 32) {
            const Bf16* moments = state.moment_tiles + (i / 16 * (D / 32) + j / 32) * tile;
            const Bf16* b = x + j / 32 * tile;
            multiply_block(moments, moments + D / 32 * tile, b, b + D / 32 * tile);
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

// The contribution of earlier chunks to out and to the row sums of 32 queries q.
struct ChunkOutput {
    float* doubled;  // [D + 1][64]: q_i twice for each query; the last row is 1
    float* paired;   // [D / 2][64]: q_2p and q_2p+1 for each query
    Bf16* phi;       // B tiles of features^T: two blocks of [steps_at_once][2][tile]
    float* out;      // [M][32]
    float* squares;  // [D][32]: moments q

    static constexpr int steps_at_once = 4;

    ChunkOutput(const TileSizes& size, Scratch& scratch) {
        doubled = scratch.allocate<float>((size.D + 1) * 64);
        paired = scratch.allocate<float>(size.D / 2 * 64);
        phi = scratch.allocate<Bf16>(4 * steps_at_once * tile);
        out = scratch.allocate<float>(size.M * 32);
        squares = scratch.allocate<float>(size.D * 32);
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
    LINATTN_INLINE void features(const FeatureTable& f, int pair, int pairs, Bf16* to) const {
        for (int p = pair; p < pair + pairs; ++p, to += 32) {
            const float* a = doubled + f.first[p] * 64;
            const float* b = paired + f.second[p] * 64;
            store_words(to, round_to_bf16(load(a) * load(b), load(a + 16) * load(b + 16)));
            store_words(to + tile, round_to_bf16(load(a + 32) * load(b + 32), load(a + 48) * load(b + 48)));
        }
    }

    // out = constant y_sum + (weights S)^T phi(q). The next features are made while the tiles work on these.
    void products(const FeatureTable& f, const ChunkState& state, float constant, int M) {
        for (int m = 0; m < M; ++m) {
            const Vec start = splat(constant * state.y_sum[m]);
            store(out + 32 * m, start), store(out + 32 * m + 16, start);
        }
        Bf16 *now = phi, *next = phi + 2 * steps_at_once * tile;
        for (int s = 0; s < min(steps_at_once, f.steps); ++s) features(f, 16 * s, 16, now + 2 * s * tile);
        for (int step = 0; step < f.steps; step += steps_at_once) {
            const int steps = min(steps_at_once, f.steps - step);
            const int halves = 2 * min(steps_at_once, f.steps - step - steps), products = steps * (M / 32);
            int made = 0, done = 0;
            for (int m = 0; m < M; m += 32) {
                load_block(out + m * 32, 32);
                for (int s = 0; s < steps; ++s) {
                    const Bf16* S = state.by_column + (Index{step + s} * (M / 16) + m / 16) * tile;
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

    // l[32] = sum of p / factor over the keys in the state.
    void row_sums(const ScorePolynomial& w, const ChunkState& state, const Bf16* q, int D, float* l) {
        multiply_moments(state, q, D, squares);
        const float linear = w.a1 / w.factor, square = w.a2 / w.factor, constant = w.a0 / w.factor;
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        for (int half = 0; half < 32; half += 16) {
            Vec total = splat(constant * static_cast<float>(state.n));
            for (int j = 0; j < D; ++j) {
                const float* x = doubled + j * 64 + 2 * half;
                const Vec qj = _mm512_permutex2var_ps(load(x), even, load(x + 16));
                total += qj * (square * load(squares + j * 32 + half) + linear * state.z_sum[j]);
            }
            store(l + half, total);
        }
    }

    // acc[32][M] and the first of each 16 parts of row_sums += what the keys in the state give to the queries.
    void read(const ScorePolynomial& w, const FeatureTable& f, const ChunkState& state, const TileSizes& size,
              const Bf16* q, float* acc, float* row_sum_parts) {
        float l[32];
        spread(q, size.D);
        products(f, state, w.a0 / w.factor, size.M);
        row_sums(w, state, q, size.D, l);
        for (int r = 0; r < 32; ++r) row_sum_parts[16 * r] += l[r];
        add_transposed(out, size.M, 1, acc);
    }
};

// The gradient to 32 rows x of sum(y . acc) + sum(minus l), where acc and l are what ChunkOutput gives x.
struct ChunkDx {
    float* x;        // [D + 1][32]; the last row is 1
    float* dx;       // [D + 1][32]; the last row means nothing
    float* u;        // [2][32][32]: gradients to the features of two steps
    float* squares;  // [D][32]: moments x

    ChunkDx(const TileSizes& size, Scratch& scratch) {
        x = scratch.allocate<float>((size.D + 1) * 32);
        dx = scratch.allocate<float>((size.D + 1) * 32);
        u = scratch.allocate<float>(2 * 32 * 32);
        squares = scratch.allocate<float>(size.D * 32);
        for (int i = 0; i < 32; ++i) x[size.D * 32 + i] = 1;
    }

    // x_transposed, y_transposed: B tiles of X^T and Y^T. minus: [32].
    void read(const ScorePolynomial& w, const FeatureTable& f, const ChunkState& state, const TileSizes& size,
              const Bf16* x_transposed, const Bf16* y_transposed, const float* minus) {
        spread(x_transposed, size.D);
        std::memset(dx, 0, (size.D + 1) * 32 * sizeof(float));
        for (int step = 0; step <= f.steps; ++step) {
            if (step < f.steps) multiply(state, step, size.M, y_transposed);
            if (step > 0) accumulate_feature_dx(f, step - 1, u + (step - 1) % 2 * 32 * 32);
        }
        multiply_moments(state, x_transposed, size.D, squares);
        const float linear = w.a1 / w.factor, square = 2 * w.a2 / w.factor;
        for (int d = 0; d < size.D; ++d)
            for (int half = 0; half < 32; half += 16) {
                float* to = dx + d * 32 + half;
                const Vec slope = square * load(squares + d * 32 + half) + linear * state.z_sum[d];
                store(to, load(to) + load(minus + half) * slope);
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

    void multiply(const ChunkState& state, int step, int M, const Bf16* y) {
        zero_block();
        const Bf16* S = state.by_feature + Index{step} * 32 * M;
        for (int m = 0; m < M / 32; ++m)
            multiply_block(S + 2 * m * tile, S + (2 * m + 1) * tile, y + m * tile, y + (M / 32 + m) * tile);
        store_block(u + step % 2 * 32 * 32, 32);
    }

    // dx_i += u x_j and dx_j += u x_i for the products x_i x_j of a step; i stays the same for many of them.
    LINATTN_INLINE void accumulate_feature_dx(const FeatureTable& f, int step, const float* du) {
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

}  // namespace linattn::LINATTN_ISA::quadratic

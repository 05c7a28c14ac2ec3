// Tiles of scores: some queries against one block of keys. The inner loops of the direct form.
#pragma once

#include "common/native/packing.hpp"
#include "quadratic/native/quadratic.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using linattn::quadratic::Call;

// p = (a2 t + a1) t + a0 with t = s + start.
struct ScorePolynomial {
    float start, a2, a1, a0;
};

// To normalise, the polynomial is evaluated as c2 (s + b)^2 + r, which cannot turn negative by rounding where it
// touches zero. Otherwise its root may be far from all scores, and the square would lose their digits.
ScorePolynomial score_polynomial(const Call& call);

// Rows of a tile come in whole strips: every product's registers divide them.
constexpr int strip_rows = accumulators;

// A block of keys. `key_mask` is -1 for keys that count and 0 for others (masked, or beyond the last).
struct KeyBlock {
    const float* k;                // [D][key_block], transposed
    const std::int32_t* key_mask;  // [key_block]
    const float* v;                // [count][v_stride], 0 where masked
    Index v_stride;
    int count;
};

// key_mask[c] for the `count` first keys of a block, of which those count that keep[c] says; keep may be null.
void load_key_mask(const bool* keep, Index count, std::int32_t* key_mask);

// Add what a block of keys gives to `rows` (whole strips of) queries x [rows][round_up<width>(D)]: p(s) v to acc
// [rows][round_up<width>(M)], p(s) to l [rows][width], whose lanes are summed at the end. Query r sees keys
// c <= last + r.
void accumulate_out(const ScorePolynomial& f, const float* x, Index D, Index M, const KeyBlock& keys, Index last,
                    int rows, float* acc, float* l);

// The same for the backward pass: keys in both layouts.
struct KeyGradientBlock {
    const float* k;                // [D][key_block], transposed
    const float* v;                // [M][key_block], transposed
    const std::int32_t* key_mask;  // [key_block]
    const float* k_rows;           // [key_block][round_up<width>(D)]
    int count;
    float* dk;  // [key_block][round_up<width>(D)], added to; null: not asked for
    float* dv;  // [key_block][round_up<width>(M)], added to; null: not asked for
};

// The queries of a tile in the backward pass: dO' = dO / l, delta = dO'.out (dO and 0 if nothing is normalised).
struct QueryTile {
    const float* x;            // [rows][round_up<width>(D)]
    const float* dout_scaled;  // [rows][round_up<width>(M)]
    const float* delta;        // [rows]
    float* dx;                 // [rows][round_up<width>(D)], added to; null: not asked for
};

constexpr int gradient_rows = 48;  // the most rows of a tile: its two squares of scores stay in the first-level cache

// Add the gradients of a tile: dS = p'(s) (dO' V^T - delta), dx += dS K, dK += dS^T x, dV += p(s)^T dO'.
void accumulate_gradients(const ScorePolynomial& f, const QueryTile& queries, int count, Index D, Index M,
                          const KeyGradientBlock& keys, Index last);

}  // namespace linattn::LINATTN_ISA::quadratic

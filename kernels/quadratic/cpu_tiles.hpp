// Tiles of scores: some rows against one block of keys. What the direct form and the chunks of the other are made of.
#pragma once

#include "common/native/packing.hpp"
#include "quadratic/cpu.hpp"

namespace linattn::LINATTN_ISA {

// p = (a2 t + a1) t + a0 with t = s + start.
struct Similarity {
    float start, a2, a1, a0;
};

// To normalise, the polynomial is evaluated as c2 (s + b)^2 + r, which cannot turn negative by rounding where it touches
// zero. Otherwise its root may be far from all scores, and the square would lose their digits.
Similarity similarity(const quadratic::Call& call);

// Rows of a tile come in whole strips: every product's registers divide them.
constexpr int strip_rows = accumulators;

// Keys as rows meet them. `seen` is -1 for keys that count and 0 for others (masked, or beyond the last).
struct KeyBlock {
    const float* k;            // [D][key_block], transposed
    const std::int32_t* seen;  // [key_block]
    const float* v;            // [count][v_stride], 0 where masked
    Index v_stride;
    int count;
};

void mark_seen(const bool* keep, Index count, std::int32_t* seen);

// Add what a block of keys gives to `rows` (whole strips of) queries x [rows][padded(D)]: p(s) v to acc
// [rows][padded(M)], p(s) to l [rows][width], whose lanes are summed at the end. Row r sees keys c <= last + r.
void add_keys(const Similarity& p, const float* x, Index D, Index M, const KeyBlock& keys, Index last, int rows,
              float* acc, float* l);

}  // namespace linattn::LINATTN_ISA

// The state of a pass: sums over keys, in the layout that products read; or, backwards, the gradients to them.
#pragma once

#include "quadratic/native/features.hpp"
#include "quadratic/native/quadratic.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using linattn::quadratic::State;

// What an update adds. For keys: k, v; for queries: x = scale q, dO' (README.md), whose row sums have the gradient
// -delta.
struct StateUpdate {
    const float* x;         // [D + 1][tile_width]: x' = [1, x]
    const float* v;         // [tile_width][round_up<width>(M)]
    const float* moment_x;  // [D + 1][tile_width], and
    const float* moment;    // [tile_width][round_up<width>(D)]: their product is added to the moments
    int rows;
};

// One head's sums of phi(x) v^T, and beside them the moments: sums of x' x^T, from which row sums are computed.
// Features are cut into blocks that stay in the first-level cache while a chunk's rows meet them, columns into panels.
class ChunkState {
public:
    // Floats that `memory` must hold.
    static Index size(Index D, Index M);

    ChunkState(Index D, Index M, float* memory) : D_(D), M_(M), data_(memory) {}

    // Parts are what the members of a team share out: a block of features each; the last part is the moments.
    Index parts() const { return ceil_div(feature_count(D_), block_features) + 1; }

    void reset(Index part);
    // From or to head `index` of a canonical state. Only the symmetric half of its kk takes part here; the rest of it
    // is stored from the state that was loaded, or null.
    void load_state(Index part, const State& state, Index index);
    void store_state(Index part, const State& state, Index index, const State* loaded) const;

    // Add the products of weighted features with v, or the moments.
    void update(Index part, const StateUpdate& rows, const FeatureWeights& weights);
    // acc [tile_width][round_up<width>(M)] += weighted phi(x)^T S, for the part's features.
    void accumulate_out(Index part, const float* x, int rows, const FeatureWeights& weights, float* acc) const;
    // l [tile_width] += linear x.k_sum + square x^T kk x.
    void accumulate_row_sums(const float* x, const FeatureWeights& weights, float* l) const;
    // dx [D + 1][tile_width] += the gradient of accumulate_out's sum with acc's gradient vt [M][tile_width].
    void accumulate_dx(Index part, const float* x, const float* vt, const FeatureWeights& weights, float* dx) const;
    // dx += factor[lane] times the gradient of accumulate_row_sums' l.
    void accumulate_moments_dx(const float* x, const float* factor, const FeatureWeights& weights, float* dx) const;

private:
    static constexpr int block_features = 72;  // divisible by the rows of every micro-kernel

    bool is_moments(Index part) const { return part + 1 == parts(); }
    Index first(Index part) const { return part * block_features; }
    Index last(Index part) const { return min(first(part) + block_features, feature_count(D_)); }
    Index moment_rows() const { return round_up<4>(D_ + 1); }
    float* block(Index part) const { return data_ + part * ceil_div(M_, panel) * panel * block_features; }
    float* moment_row(Index a, Index e) const {
        return block(parts() - 1) + (e / panel * moment_rows() + a) * panel + e % panel;
    }
    void multiply_moments(const float* x, float* product) const;

    static constexpr Index panel = tile_width;  // columns of a panel, whose lines lie as close together as a tile's

    Index D_, M_;
    float* data_;
};

}  // namespace linattn::LINATTN_ISA::quadratic

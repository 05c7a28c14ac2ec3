#include "quadratic/native/chunked/chunk_state.hpp"

#include "common/native/threads.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using linattn::quadratic::State;

namespace {

// to (panels of `lines` lines) [f][m] += sum over i < n of left[f][i] * right[i][m], for f < rows.
void add_outer(const float* left, const float* right, Index stride, int n, Index rows, Index columns, float* to,
               Index lines) {
    for (Index m = 0; m < columns; m += tile_width, to += lines * tile_width)
        add_product<tile_width, 1>(left, right + m, stride, n, n, static_cast<int>(rows), to, tile_width,
                                   min<Index>(tile_width, columns - m));
}

// to[f][lane] = sum over m of from (panels of `lines` lines) [f][m] * right[m][lane], for f < rows.
void multiply_lanes(const float* from, Index lines, const float* right, Index columns, Index rows, float* to) {
    clear(to, rows * tile_width);
    for (Index m = 0; m < columns; m += tile_width, from += lines * tile_width) {
        const int n = static_cast<int>(min<Index>(tile_width, columns - m));
        add_product<tile_width, 1>(from, right + m * tile_width, tile_width, n, n, static_cast<int>(rows), to,
                                   tile_width, tile_width);
    }
}

// Where a canonical state keeps feature (a, b) of a head.
float* canonical_row(const State& state, Index index, Index D, Index M, Index a, Index b) {
    if (a == 0) return state.v_sum + index * M;
    if (b == 0) return state.kv + (index * D + a - 1) * M;
    return state.kkv + (index * (D * (D + 1) / 2) + (a - 1) * a / 2 + b - 1) * M;
}

}  // namespace

Index ChunkState::size(Index D, Index M) {
    const ChunkState sums(D, M, nullptr);
    return (sums.block(sums.parts() - 1) - sums.data_) + sums.moment_rows() * ceil_div(D, panel) * panel;
}

void ChunkState::reset(Index part) {
    const Index end = is_moments(part) ? size(D_, M_) : block(part + 1) - data_;
    clear(block(part), end - (block(part) - data_));
}

void ChunkState::load_state(Index part, const State& state, Index index) {
    reset(part);
    if (is_moments(part)) {
        const float *k_sum = state.k_sum + index * D_, *kk = state.kk + index * D_ * D_;
        for (Index e = 0; e < D_; ++e) {
            *moment_row(0, e) = k_sum[e];
            for (Index a = 0; a < D_; ++a) *moment_row(a + 1, e) = (kk[a * D_ + e] + kk[e * D_ + a]) / 2;
        }
        return;
    }
    for_features(first(part), last(part), unweighted, [&](Index f, Index a, Index b0, Index b1, float) {
        for (Index b = b0; b < b1; ++b) {
            const float* from = canonical_row(state, index, D_, M_, a, b);
            float* to = block(part) + (f - first(part) + b - b0) * panel;
            for (Index m = 0; m < M_; m += panel, to += block_features * panel)
                __builtin_memcpy(to, from + m, min(panel, M_ - m) * sizeof(float));
        }
    });
}

void ChunkState::store_state(Index part, const State& state, Index index, const State* loaded) const {
    if (is_moments(part)) {
        float *k_sum = state.k_sum + index * D_, *kk = state.kk + index * D_ * D_;
        const float* before = loaded == nullptr ? nullptr : loaded->kk + index * D_ * D_;
        for (Index e = 0; e < D_; ++e) {
            k_sum[e] = *moment_row(0, e);
            for (Index a = 0; a < D_; ++a) {
                const float rest = before == nullptr ? 0 : (before[a * D_ + e] - before[e * D_ + a]) / 2;
                kk[a * D_ + e] = *moment_row(a + 1, e) + rest;
            }
        }
        return;
    }
    for_features(first(part), last(part), unweighted, [&](Index f, Index a, Index b0, Index b1, float) {
        for (Index b = b0; b < b1; ++b) {
            float* to = canonical_row(state, index, D_, M_, a, b);
            const float* from = block(part) + (f - first(part) + b - b0) * panel;
            for (Index m = 0; m < M_; m += panel, from += block_features * panel)
                __builtin_memcpy(to + m, from, min(panel, M_ - m) * sizeof(float));
        }
    });
}

void ChunkState::update(Index part, const StateUpdate& rows, const FeatureWeights& weights) {
    LINATTN_ASSERT(0 <= part && part < parts() && rows.rows <= tile_width);
    if (is_moments(part))
        return add_outer(rows.moment_x, rows.moment, round_up<width>(D_), rows.rows, moment_rows(), round_up<width>(D_),
                         block(part), moment_rows());
    const Index f0 = first(part), f1 = last(part);
    alignas(64) float phi[block_features * tile_width];
    make_features(rows.x, f0, f1, weights, phi);
    add_outer(phi, rows.v, round_up<width>(M_), rows.rows, round_up<4>(f1 - f0), round_up<width>(M_), block(part),
              block_features);
}

void ChunkState::accumulate_out(Index part, const float* x, int rows, const FeatureWeights& weights, float* acc) const {
    const Index f0 = first(part), f1 = last(part);
    const int n = static_cast<int>(f1 - f0);
    alignas(64) float phi[block_features * tile_width];
    make_features(x, f0, f1, weights, phi);
    const float* from = block(part);
    for (Index m = 0; m < round_up<width>(M_); m += panel, from += block_features * panel)
        add_product<1, tile_width>(phi, from, panel, n, n, static_cast<int>(round_up<4>(rows)), acc + m,
                                   round_up<width>(M_), min(panel, round_up<width>(M_) - m));
}

void ChunkState::multiply_moments(const float* x, float* product) const {
    multiply_lanes(block(parts() - 1), moment_rows(), x + tile_width, D_, moment_rows(), product);
}

void ChunkState::accumulate_row_sums(const float* x, const FeatureWeights& weights, float* l) const {
    Scratch scratch;
    float* product = scratch.allocate<float>(moment_rows() * tile_width);
    multiply_moments(x, product);
    for (Index a = 0; a <= D_; ++a)
        for (int c = 0; c < tile_width; c += width) {
            const Vec y = (a == 0 ? weights.linear : weights.square) * load(x + a * tile_width + c);
            store(l + c, load(l + c) + y * load(product + a * tile_width + c));
        }
}

void ChunkState::accumulate_dx(Index part, const float* x, const float* vt, const FeatureWeights& weights,
                               float* dx) const {
    const Index f0 = first(part), f1 = last(part);
    alignas(64) float t[block_features * tile_width];
    multiply_lanes(block(part), block_features, vt, M_, round_up<4>(f1 - f0), t);
    accumulate_feature_dx(x, t, f0, f1, weights, dx);
}

void ChunkState::accumulate_moments_dx(const float* x, const float* factor, const FeatureWeights& weights,
                                       float* dx) const {
    Scratch scratch;
    float* product = scratch.allocate<float>(moment_rows() * tile_width);
    multiply_moments(x, product);
    for (Index a = 1; a <= D_; ++a) {
        const Vec k_sum = splat(weights.linear * *moment_row(0, a - 1));
        for (int c = 0; c < tile_width; c += width) {
            float* to = dx + a * tile_width + c;
            const Vec slope = k_sum + 2 * weights.square * load(product + a * tile_width + c);
            store(to, load(to) + load(factor + c) * slope);
        }
    }
}

}  // namespace linattn::LINATTN_ISA::quadratic

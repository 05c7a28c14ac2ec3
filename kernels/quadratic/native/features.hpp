// The features of the quadratic kernel, for tiles of 64 queries or keys that lie along the lanes of vectors.
//
// With x' = [1, x] the features are the products x'_a x'_b, a >= b, in the order a (a + 1) / 2 + b: 1 is (0, 0),
// x_a is (a + 1, 0). A tile holds x' as [D + 1][tile_width], so that each feature is a product of two of its lines,
// whatever D.
#pragma once

#include "common/native/matmul.hpp"
#include "common/native/packing.hpp"

namespace linattn::LINATTN_ISA::quadratic {

constexpr int tile_width = key_block;
constexpr int lane_group = widest * width;  // lanes of a tile that are worked on at once

LINATTN_INLINE Index feature_count(Index D) { return (D + 1) * (D + 2) / 2; }

// What 1, x_a, x_a^2 and x_a x_b (a > b) count for.
struct FeatureWeights {
    float one, linear, square, product;
};

constexpr FeatureWeights unweighted{1, 1, 1, 1};

// Call work(f, a, b0, b1, weight) for the features f0 to f1 in pieces of equal a and weight: f, f + 1, ... are the
// products of x'_a with x'_b0 to x'_b1.
template <class Work>
LINATTN_INLINE void for_features(Index f0, Index f1, const FeatureWeights& weights, const Work& work) {
    Index a = 0;
    while ((a + 1) * (a + 2) / 2 <= f0) ++a;
    for (Index f = f0; f < f1; ++a) {
        const Index first = a * (a + 1) / 2, end = min(f1 - first, a + 1);
        Index b = f - first;
        if (b == 0) {
            work(f, a, 0, 1, a == 0 ? weights.one : weights.linear);
            b = 1;
        }
        const Index squares = min(end, a);
        if (b < squares) work(first + b, a, b, squares, weights.product);
        if (a > 0 && end == a + 1) work(first + a, a, a, a + 1, weights.square);
        f = first + a + 1;
    }
}

// phi[f - f0] = weighted feature f of the tile x.
inline void make_features(const float* __restrict x, Index f0, Index f1, const FeatureWeights& weights,
                          float* __restrict phi) {
    LINATTN_ASSERT(0 <= f0 && f0 <= f1);
    for_features(f0, f1, weights, [&](Index f, Index a, Index b0, Index b1, float weight) {
        float* to = phi + (f - f0) * tile_width;
        for (int c = 0; c < tile_width; c += lane_group) {
            Vec left[widest];
#pragma GCC unroll 8
            for (int w = 0; w < widest; ++w) left[w] = weight * load(x + a * tile_width + c + w * width);
            for (Index b = b0; b < b1; ++b)
#pragma GCC unroll 8
                for (int w = 0; w < widest; ++w)
                    store(to + (b - b0) * tile_width + c + w * width,
                          left[w] * load(x + b * tile_width + c + w * width));
        }
    });
}

// dx' += the gradient to x' of the sum over f of t[f - f0] times weighted feature f. Line 0 of dx' is not kept.
inline void accumulate_feature_dx(const float* __restrict x, const float* __restrict t, Index f0, Index f1,
                                  const FeatureWeights& weights, float* __restrict dx) {
    LINATTN_ASSERT(0 <= f0 && f0 <= f1);
    for_features(f0, f1, weights, [&](Index f, Index a, Index b0, Index b1, float weight) {
        if (a == 0) return;
        const float *from = t + (f - f0) * tile_width, both = b0 == a ? 2 * weight : weight;
        const bool two = b0 > 0 && b0 < a;  // x'_b is neither the constant nor x'_a itself
        for (int c = 0; c < tile_width; c += lane_group) {
            Vec left[widest], total[widest] = {};
#pragma GCC unroll 8
            for (int w = 0; w < widest; ++w) left[w] = weight * load(x + a * tile_width + c + w * width);
            for (Index b = b0; b < b1; ++b) {
#pragma GCC unroll 8
                for (int w = 0; w < widest; ++w) {
                    const Vec dphi = load(from + (b - b0) * tile_width + c + w * width);
                    float* other = dx + b * tile_width + c + w * width;
                    total[w] += dphi * load(x + b * tile_width + c + w * width);
                    if (two) store(other, load(other) + dphi * left[w]);
                }
            }
#pragma GCC unroll 8
            for (int w = 0; w < widest; ++w) {
                float* mine = dx + a * tile_width + c + w * width;
                store(mine, load(mine) + both * total[w]);
            }
        }
    });
}

}  // namespace linattn::LINATTN_ISA::quadratic

// The feature maps and their derivatives, a vector at a time, and rows of tensors as features.
#pragma once

namespace linattn::feature_map {

// Numbered as in kernels/feature_map/maps.py.
enum class Map : int { identity, elu_plus_one, relu, relu_squared, exp };

}  // namespace linattn::feature_map

// The rest is compiled once for each instruction set (common/native/isa/simd.hpp); callers need the names alone.
#if defined(LINATTN_ISA)

#include "common/native/packing.hpp"

namespace linattn::LINATTN_ISA::feature_map {

using linattn::feature_map::Map;

template <Map map>
LINATTN_INLINE Vec phi(Vec x) {
    if constexpr (map == Map::elu_plus_one) return x > 0.0f ? x + 1.0f : exp(x > 0.0f ? Vec{} : x);
    if constexpr (map == Map::relu) return x < 0.0f ? Vec{} : x;  // NaN stays NaN
    if constexpr (map == Map::relu_squared) return x < 0.0f ? Vec{} : x * x;
    if constexpr (map == Map::exp) return exp(x);
    return x;
}

template <Map map>
LINATTN_INLINE Vec derivative(Vec x) {
    if constexpr (map == Map::elu_plus_one) return x > 0.0f ? splat(1.0f) : exp(x > 0.0f ? Vec{} : x);
    if constexpr (map == Map::relu) return x > 0.0f ? splat(1.0f) : Vec{};
    if constexpr (map == Map::relu_squared) return x < 0.0f ? Vec{} : 2.0f * x;
    if constexpr (map == Map::exp) return exp(x);
    return splat(1.0f);
}

// Call body.operator()<map, T>() for the map and the element type of a call.
template <class Body>
LINATTN_INLINE void dispatch_map(Map map, Dtype dtype, const Body& body) {
    dispatch_dtype(dtype, [&]<class T>(T) {
        switch (map) {
            case Map::identity: return body.template operator()<Map::identity, T>();
            case Map::elu_plus_one: return body.template operator()<Map::elu_plus_one, T>();
            case Map::relu: return body.template operator()<Map::relu, T>();
            case Map::relu_squared: return body.template operator()<Map::relu_squared, T>();
            case Map::exp: return body.template operator()<Map::exp, T>();
        }
    });
}

// to[r][0 .. round_up<width>(n)) = factor * phi(row r) for r < count, zeros behind n, up to row `rows`, and where
// keep[r] is false: a padding may hold anything, and phi(0) is not 0. keep may be null.
inline void pack_features(Map map, const RowView& from, Index count, Index n, float factor, const bool* keep,
                          Index rows, float* to) {
    const Index stride = round_up<width>(n);
    dispatch_map(map, from.dtype, [=]<Map m, class T> {
        for (Index r = 0; r < count; ++r) {
            const T* row = static_cast<const T*>(from.data) + r * from.stride;
            float* features = to + r * stride;
            if (keep != nullptr && !keep[r]) {
                clear(features, stride);
                continue;
            }
            Index i = 0;
            for (; i + width <= n; i += width) store(features + i, factor * phi<m>(load(row + i)));
            if (i < n) {
                const int left = static_cast<int>(n - i);
                store(features + i, first_lanes(factor * phi<m>(load_first(row + i, left)), left));
            }
        }
    });
    clear(to + count * stride, (rows - count) * stride);
}

// Row r of `to` = factor * gradient[r] * derivative(row r of `at`), and 0 where keep[r] is false. keep may be null.
inline void store_map_gradient(Map map, const float* gradient, const RowView& at, Index count, Index n, float factor,
                               const bool* keep, const RowView& to) {
    const Index stride = round_up<width>(n);
    dispatch_map(map, at.dtype, [=]<Map m, class T> {
        for (Index r = 0; r < count; ++r) {
            const T* x = static_cast<const T*>(at.data) + r * at.stride;
            T* row = static_cast<T*>(to.data) + r * to.stride;
            const bool counts = keep == nullptr || keep[r];
            for (Index i = 0; i < n; i += width) {
                const int left = static_cast<int>(min<Index>(width, n - i));
                const Vec given = left == width ? load(x + i) : load_first(x + i, left);
                const Vec gradient_at_x =
                    counts ? factor * load(gradient + r * stride + i) * derivative<m>(given) : Vec{};
                if (left == width)
                    store(row + i, gradient_at_x);
                else
                    store_first(row + i, gradient_at_x, left);
            }
        }
    });
}

}  // namespace linattn::LINATTN_ISA::feature_map

#endif

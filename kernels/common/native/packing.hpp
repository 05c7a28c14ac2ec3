// Rows of tensors, packed for the matrix products as fp32 padded with zeros, and results stored as rows of tensors.
#pragma once

#include <utility>

#include "common/native/isa/simd.hpp"

namespace linattn::LINATTN_ISA {

constexpr int key_block = 64;  // keys of one tile of scores

// Call body(x) with x of the element type that a dtype names.
template <class Body>
LINATTN_INLINE void dispatch_dtype(Dtype dtype, const Body& body) {
    switch (dtype) {
        case Dtype::fp32: return body(float{});
        case Dtype::bf16: return body(Bf16{});
        case Dtype::fp16: return body(Fp16{});
    }
}

// Rows t, t + 1, ... of head h of batch element b. Row r begins `r * stride` elements after `data`.
struct RowView {
    void* data;
    Index stride;
    Dtype dtype;
};

LINATTN_INLINE Index element_size(Dtype dtype) { return dtype == Dtype::fp32 ? 4 : 2; }

// Rows of fp32 to be read.
LINATTN_INLINE RowView row_view(const float* data, Index stride) {
    return {const_cast<float*>(data), stride, Dtype::fp32};
}

LINATTN_INLINE RowView row_view(const TensorView& tensor, Dtype dtype, Index b, Index h, Index t) {
    const Index offset = b * tensor.stride_b + h * tensor.stride_h + t * tensor.stride_t;
    return {static_cast<char*>(tensor.data) + offset * element_size(dtype), tensor.stride_t, dtype};
}

// Ask for a row that will be packed soon: the hardware's own prefetching stops at every page.
LINATTN_INLINE void prefetch_row(const RowView& from, Index r, Index n) {
    const Index size = element_size(from.dtype);
    const char* row = static_cast<const char*>(from.data) + r * from.stride * size;
    for (Index i = 0; i < n * size; i += 64) __builtin_prefetch(row + i);
}

// to[0 .. round_up<width>(n)) = factor * from[0 .. n), then zeros.
template <class T>
LINATTN_INLINE void load_row(const T* __restrict from, Index n, float factor, float* __restrict to) {
    Index i = 0;
    for (; i + width <= n; i += width) store(to + i, factor * load(from + i));
    if (i < n) store(to + i, factor * load_first(from + i, static_cast<int>(n - i)));
}

LINATTN_INLINE void clear(float* to, Index n) { __builtin_memset(to, 0, static_cast<std::size_t>(n) * sizeof(float)); }

// to[r][0 .. round_up<width>(n)) = factor * row r for r < count, zeros up to row `rows` and where keep[r] is false:
// whatever a row that does not count holds, NaN included, goes no further. keep may be null.
inline void pack_rows(const RowView& from, Index count, Index n, float factor, const bool* keep, Index rows,
                      float* __restrict to) {
    LINATTN_ASSERT(count >= 0 && rows >= count && (count == 0 || from.data != nullptr));
    const Index stride = round_up<width>(n);
    dispatch_dtype(from.dtype, [&]<class T>(T) {
        for (Index r = 0; r < count; ++r) {
            if (keep == nullptr || keep[r])
                load_row(static_cast<const T*>(from.data) + r * from.stride, n, factor, to + r * stride);
            else
                clear(to + r * stride, stride);
        }
    });
    clear(to + count * stride, (rows - count) * stride);
}

template <int... I>
LINATTN_INLINE Vec interleave(Vec a, Vec b, int from, std::integer_sequence<int, I...>) {
    return from == 0 ? __builtin_shufflevector(a, b, (I / 2 + I % 2 * width)...)
                     : __builtin_shufflevector(a, b, ((I + width) / 2 + I % 2 * width)...);
}

// Transpose a square of vectors: each round interleaves its two halves, log2(width) rounds turn the index around.
LINATTN_INLINE void transpose(Vec (&square)[width]) {
    constexpr auto lanes = std::make_integer_sequence<int, width>{};
#pragma GCC unroll 8
    for (int round = 1; round < width; round *= 2) {
        Vec next[width];
#pragma GCC unroll 16
        for (int i = 0; i < width / 2; ++i) {
            next[2 * i] = interleave(square[i], square[i + width / 2], 0, lanes);
            next[2 * i + 1] = interleave(square[i], square[i + width / 2], 1, lanes);
        }
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) square[i] = next[i];
    }
}

// to[i][c] = factor * row c at i, for i < n and c < key_block; zeros from row `count` <= key_block on and where keep[c]
// is false. keep may be null.
inline void pack_transposed(const RowView& from, Index count, Index n, float factor, const bool* keep,
                            float* __restrict to) {
    LINATTN_ASSERT(count >= 0 && count <= key_block && (count == 0 || from.data != nullptr));
    dispatch_dtype(from.dtype, [&]<class T>(T) {
        const T* rows = static_cast<const T*>(from.data);
        for (Index c = 0; c < key_block; c += width) {
            for (Index i = 0; i < n; i += width) {
                const int left = static_cast<int>(min<Index>(width, n - i));
                Vec square[width];
#pragma GCC unroll 16
                for (int a = 0; a < width; ++a) {
                    const T* row = rows + (c + a) * from.stride + i;
                    const bool counts = c + a < count && (keep == nullptr || keep[c + a]);
                    square[a] = !counts ? Vec{} : factor * (left == width ? load(row) : load_first(row, left));
                }
                transpose(square);
#pragma GCC unroll 16
                for (int a = 0; a < width; ++a)
                    if (a < left) store(to + (i + a) * key_block + c, square[a]);
            }
        }
    });
}

// Row r of `to` = factor * from[0 .. n).
LINATTN_INLINE void store_row(const float* __restrict from, Index n, float factor, const RowView& to, Index r) {
    LINATTN_ASSERT(to.data != nullptr);
    dispatch_dtype(to.dtype, [&]<class T>(T) {
        T* row = static_cast<T*>(to.data) + r * to.stride;
        Index i = 0;
        for (; i + width <= n; i += width) store(row + i, factor * load(from + i));
        if (i < n) store_first(row + i, factor * load(from + i), static_cast<int>(n - i));
    });
}

// Row r of `to` = from[0 .. n) / l, and 0 where l <= 0: such a row saw no key, or lost its sum to cancellation.
// Divided by one reciprocal and corrected by the remainder, which is as exact as a division and far from as slow;
// divided indeed where the reciprocal leaves the normal numbers.
LINATTN_INLINE void store_quotient(const float* __restrict from, Index n, float l, const RowView& to, Index r) {
    LINATTN_ASSERT(to.data != nullptr);
    const bool ordinary = l > 1e-30f && l < 1e30f;
    const float divisor = l <= 0 ? __builtin_inff() : l, reciprocal = 1 / divisor;
    const auto divided = [&](Vec x) {
        if (!ordinary) return x / divisor;
        const Vec about = x * reciprocal;
        return about + (x - about * divisor) * reciprocal;
    };
    dispatch_dtype(to.dtype, [&]<class T>(T) {
        T* row = static_cast<T*>(to.data) + r * to.stride;
        Index i = 0;
        for (; i + width <= n; i += width) store(row + i, divided(load(from + i)));
        if (i < n) store_first(row + i, divided(load(from + i)), static_cast<int>(n - i));
    });
}

}  // namespace linattn::LINATTN_ISA

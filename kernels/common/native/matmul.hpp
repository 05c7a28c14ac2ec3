// The one matrix product that all native kernels are made of: an R x W block of vectors kept in registers.
#pragma once

#include "simd.hpp"

namespace linattn::LINATTN_ISA {

// acc[r][w] += sum over i < n of a[r * row + i * step] * b[i * stride + w * width].
template <int R, int W>
LINATTN_INLINE void multiply_add(Vec (&acc)[R][W], const float* a, Index row, Index step, const float* b, Index stride,
                                 int n) {
    for (int i = 0; i < n; ++i) {
        Vec right[W];
#pragma GCC unroll 8
        for (int w = 0; w < W; ++w) right[w] = load(b + i * stride + w * width);
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) {
            const float left = a[r * row + i * step];
#pragma GCC unroll 8
            for (int w = 0; w < W; ++w) acc[r][w] += left * right[w];
        }
    }
}

// Six rows and as many vectors as then fill the registers; narrower panels take more rows.
constexpr int group_rows = 6;
constexpr int widest = accumulators / group_rows;
template <int W>
constexpr int panel_rows = accumulators / W;

// c[r][w * width ..] += sum over i < n of a[r * row + i * step] * b[i * stride + w * width ..].
// The sum over i is complete before it is added: a sum over very many keys then takes few additions to a large number.
template <int R, int W>
LINATTN_INLINE void add_tile(const float* a, Index row, Index step, const float* b, Index stride, int n, float* c,
                             Index c_stride) {
    Vec acc[R][W] = {};
    multiply_add(acc, a, row, step, b, stride, n);
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int w = 0; w < W; ++w) store(c + r * c_stride + w * width, load(c + r * c_stride + w * width) + acc[r][w]);
}

// Rows r, r + R, ... of a panel, as long as R are left. Returns the first row that is not done.
template <int R, int W, Index row, Index step>
LINATTN_INLINE int add_rows(const float* a, const float* b, Index stride, int n, int first, int r, int rows, float* c,
                            Index c_stride) {
    for (; r + R <= rows; r += R) {
        const int some = least(n, first + r + R - 1);
        if (some > 0) add_tile<R, W>(a + r * row, row, step, b, stride, some, c + r * c_stride, c_stride);
    }
    return r;
}

template <int W, Index row, Index step>
LINATTN_INLINE void add_panel(const float* a, const float* b, Index stride, int n, int first, int rows, float* c,
                              Index c_stride) {
    int r = add_rows<panel_rows<W>, W, row, step>(a, b, stride, n, first, 0, rows, c, c_stride);
    r = add_rows<4, W, row, step>(a, b, stride, n, first, r, rows, c, c_stride);
    add_rows<2, W, row, step>(a, b, stride, n, first, r, rows, c, c_stride);
}

// c[r][0 .. columns) += sum over i < n of a[r * row + i * step] * b[i * stride + 0 .. columns), for r < rows.
// a is 0 where i >= first + r, and first >= n says that it is 0 nowhere: what is 0 for certain is left out.
// columns is a multiple of width, and rows of 2.
template <Index row, Index step>
void add_product(const float* a, const float* b, Index stride, int n, int first, int rows, float* c, Index c_stride,
                 Index columns) {
    Index j = 0;
    for (; j + widest * width <= columns; j += widest * width)
        add_panel<widest, row, step>(a, b + j, stride, n, first, rows, c + j, c_stride);
    switch ((columns - j) / width) {
        case 3:
            if constexpr (widest > 3) add_panel<3, row, step>(a, b + j, stride, n, first, rows, c + j, c_stride);
            return;
        case 2:
            if constexpr (widest > 2) add_panel<2, row, step>(a, b + j, stride, n, first, rows, c + j, c_stride);
            return;
        case 1: return add_panel<1, row, step>(a, b + j, stride, n, first, rows, c + j, c_stride);
    }
}

}  // namespace linattn::LINATTN_ISA

// The one matrix product that all native kernels are made of: an R x W block of vectors kept in registers.
#pragma once

#include "common/native/isa/simd.hpp"

namespace linattn::LINATTN_ISA {

// acc[r][w] += sum over i < n of a[r * row + i * step] * b[i * stride + w * width].
template <int R, int W>
LINATTN_INLINE void multiply_add(Vec (&acc)[R][W], const float* __restrict a, Index row, Index step,
                                 const float* __restrict b, Index stride, int n) {
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

// sum over i < n of a[r * row + i * step] * b[i * stride + ...]. a is 0 where i >= seen + r: what is 0 for certain is
// left out.
struct Product {
    const float* a;
    Index row, step;
    const float* b;
    Index stride;
    Index n, seen = Index{1} << 40;
};

// The sums are complete before they are added to c: one over very many keys then takes few additions to a large
// number.
template <int R, int W, int terms>
LINATTN_INLINE void compute_tile(const Product (&products)[terms], Index r, float* c, Index c_stride, Index j,
                                 bool add) {
    Vec acc[R][W] = {};
#pragma GCC unroll 2
    for (int t = 0; t < terms; ++t) {
        const Product& p = products[t];
        const Index n = max<Index>(0, min(p.n, p.seen + r + R - 1));
        multiply_add(acc, p.a + r * p.row, p.row, p.step, p.b + j, p.stride, static_cast<int>(n));
    }
    float* const to = c + r * c_stride + j;
    if (add) {
#pragma GCC unroll 32
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
            for (int w = 0; w < W; ++w) acc[i][w] += load(to + i * c_stride + w * width);
    }
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
        for (int w = 0; w < W; ++w) store(to + i * c_stride + w * width, acc[i][w]);
}

template <int W, int terms>
LINATTN_INLINE void compute_panel(const Product (&products)[terms], int rows, float* c, Index c_stride, Index j,
                                  bool add) {
    constexpr int R = panel_rows<W>;
    int r = 0;
    for (; r + R <= rows; r += R) compute_tile<R, W>(products, r, c, c_stride, j, add);
    for (; r + 4 <= rows; r += 4) compute_tile<4, W>(products, r, c, c_stride, j, add);
    for (; r < rows; r += 2) compute_tile<2, W>(products, r, c, c_stride, j, add);
}

template <int terms>
LINATTN_INLINE void compute_panels(const Product (&products)[terms], int rows, Index columns, float* c, Index c_stride,
                                   bool add) {
    Index j = 0;
    for (; j + widest * width <= columns; j += widest * width)
        compute_panel<widest>(products, rows, c, c_stride, j, add);
    switch ((columns - j) / width) {
        case 3:
            if constexpr (widest > 3) compute_panel<3>(products, rows, c, c_stride, j, add);
            return;
        case 2:
            if constexpr (widest > 2) compute_panel<2>(products, rows, c, c_stride, j, add);
            return;
        case 1: return compute_panel<1>(products, rows, c, c_stride, j, add);
        default: return;
    }
}

// c [rows][columns] = (or, to add, +=) the sum of the products. columns is a multiple of width, and rows of 2; c is no
// part of a or b.
template <int terms>
void multiply(const Product (&products)[terms], int rows, Index columns, float* __restrict c, Index c_stride,
              bool add) {
    LINATTN_ASSERT(rows >= 0 && rows % 2 == 0 && columns >= 0 && columns % width == 0 && c_stride >= columns);
    compute_panels(products, rows, columns, c, c_stride, add);
}

// c += one product whose row and step the compiler knows, which makes every address in the inner loop a constant.
template <Index row, Index step>
void add_product(const float* __restrict a, const float* __restrict b, Index stride, Index n, Index seen, int rows,
                 float* __restrict c, Index c_stride, Index columns) {
    LINATTN_ASSERT(rows >= 0 && rows % 2 == 0 && n >= 0 && columns >= 0 && columns % width == 0);
    compute_panels<1>({{a, row, step, b, stride, n, seen}}, rows, columns, c, c_stride, true);
}

}  // namespace linattn::LINATTN_ISA

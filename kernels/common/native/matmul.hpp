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

}  // namespace linattn::LINATTN_ISA

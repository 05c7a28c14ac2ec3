// The first step of every backward pass: dO' = dO / l and delta = dO'.out.
#pragma once

#include "common/native/packing.hpp"

namespace linattn::LINATTN_ISA {

// For rows r < count: dout_scaled[r][0 .. stride) = dout[r] / l[r], then zeros from M on, and delta[r] = dout_scaled[r]
// . out[r]. Both are 0 where l[r] <= 0 (such a row was written as 0: store_quotient) and for rows from `count` to
// `rows`; NaN stays NaN. Not normalised, dout_scaled is dout and delta 0. `stride` is a multiple of width.
//
// delta is of dout_scaled as stored, rounded to Element: then it cancels what products make of it.
template <class Element>
void bwd_preprocess(const RowView& dout, const RowView& out, const float* l, bool normalize, Index count, Index M,
                    Index rows, Index stride, Element* __restrict dout_scaled, float* __restrict delta) {
    LINATTN_ASSERT(stride >= M && stride % width == 0 && rows >= count);
    dispatch_dtype(dout.dtype, [&]<class T>(T) {
        for (Index r = 0; r < rows; ++r) {
            Element* const to = dout_scaled + r * stride;
            delta[r] = 0;
            if (r >= count || (normalize && l[r] <= 0)) {
                __builtin_memset(to, 0, static_cast<std::size_t>(stride) * sizeof(Element));
                continue;
            }
            const T* const dout_row = static_cast<const T*>(dout.data) + r * dout.stride;
            const T* const out_row = static_cast<const T*>(out.data) + r * out.stride;
            Vec total{};
            for (Index m = 0; m < stride; m += width) {
                const int left = static_cast<int>(clamp<Index>(M - m, 0, width));
                const Vec x = load_some(dout_row + m, left);
                store(to + m, normalize ? x / l[r] : x);
                if (normalize) total += load(to + m) * load_some(out_row + m, left);
            }
            if (normalize) delta[r] = sum(total);
        }
    });
}

}  // namespace linattn::LINATTN_ISA

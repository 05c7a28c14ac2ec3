// What the AMX kernels of quadratic attention share: the similarity of a score, packed keys, and 32 queries against
// them.
#pragma once

#include "common/native/amx.hpp"
#include "quadratic/native/quadratic.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using linattn::quadratic::Call;

constexpr Index everything = Index{1} << 40;  // more keys than any sequence has

LINATTN_INLINE int pad_to_tile(Index size) { return static_cast<int>((size + 31) / 32 * 32); }

// p(s) from t = q.k, where s = scale t. Normalised, the square is completed: p = factor (y^2 + rest), y = t + start,
// so that no rounding turns p negative where it touches zero. Otherwise its root may be far from all scores, and
// p = (a2 t + a1) t + a0 keeps their digits. `factor` is left to the sums over keys.
struct ScorePolynomial {
    bool completed;
    float start, rest, factor;
    float a0, a1, a2;

    explicit ScorePolynomial(const Call& call) {
        const double scale = call.problem.scale, c0 = call.c0, c1 = call.c1, c2 = call.c2;
        const double square = c2 * scale * scale, shift = c1 / (2 * c2 * scale);
        double r = c0 - c1 * c1 / (4 * c2);
        if (r < 0 && -r <= 1e-6 * c0) r = 0;  // a perfect square, but for rounding
        constexpr double largest = 1e15;      // of y^2: far from overflow in sums over keys
        completed = call.problem.normalize && square > 1e-30 && shift * shift + r / square < largest;
        start = completed ? static_cast<float>(shift) : 0;
        rest = static_cast<float>(r / square);
        factor = completed ? static_cast<float>(square) : 1;
        a0 = static_cast<float>(c0), a1 = static_cast<float>(c1 * scale), a2 = static_cast<float>(square);
    }
};

// y is what the tiles hold: t + start.
template <bool Completed>
LINATTN_INLINE Vec similarity(const ScorePolynomial& w, Vec y) {
    if constexpr (Completed) return y * y + w.rest;
    return (w.a2 * y + w.a1) * y + w.a0;
}
// The derivative of `factor * similarity`, but for what `slope_factor` leaves to the sums.
template <bool Completed>
LINATTN_INLINE Vec slope(const ScorePolynomial& w, Vec y) {
    if constexpr (Completed) return y;
    return 2 * w.a2 * y + w.a1;
}
LINATTN_INLINE float slope_factor(const ScorePolynomial& w) { return w.completed ? 2 * w.factor : 1; }

// A bit for each of the `count` rows from `first` on: whether it exists and counts.
LINATTN_INLINE std::uint32_t rows_alive(const bool* key_mask, Index first, Index count) {
    std::uint32_t bits = first_bits(count - first);
    if (key_mask != nullptr)
        for (Index i = 0; i < 32 && first + i < count; ++i)
            if (!key_mask[first + i]) bits &= ~(1u << i);
    return bits;
}

// Rows `first` to `first` + 32 of one head, of which `count` exist.
LINATTN_INLINE StripView strip_view(const TensorView& x, Index batch, Index head, Index row0, Index first, Index count,
                                    Index width, const bool* key_mask = nullptr) {
    const Bf16* data = static_cast<const Bf16*>(x.data) + batch * x.stride_b + head * x.stride_h;
    return {data + (row0 + first) * x.stride_t, x.stride_t, static_cast<int>(width),
            rows_alive(key_mask, first, count)};
}

// Keys and values of a stretch of one head, in strips of 32; an even number of strips.
struct PackedKeys {
    Bf16* k;               // B tiles of K^T: [strip][2][D / 32][tile]
    Bf16* v;               // B tiles of V: [strip][M / 16][tile]
    std::uint32_t* alive;  // [strip]
};

// ---- 32 queries ----

struct TileSizes {
    int D, M;  // padded
};

constexpr int keys_at_once = 256;

// y[32][64] of 64 keys.
LINATTN_INLINE void scores(const Bf16* q, const Bf16* k, int D, const float* start, float* y) {
    const Index keys = D / 32 * tile;  // 16 of them
    for (int half = 0; half < 2; ++half, k += 2 * keys, y += 32) {
        load_tile<0>(start, 0);
        load_tile<1>(start, 0);
        load_tile<2>(start, 0);
        load_tile<3>(start, 0);
        for (int d = 0; d < D / 32; ++d)
            multiply_block(q + 2 * d * tile, q + (2 * d + 1) * tile, k + d * tile, k + keys + d * tile);
        store_block(y, 64);
    }
}

// Similarities of 32 x 64 scores as A tiles, two for each 32 keys, and their row sums in 16 parts. Row r sees `seen`
// + r of the keys. The sums are of what was rounded: then they belong to the products.
template <bool Completed, bool Masked>
LINATTN_INLINE void make_similarities(const ScorePolynomial& w, const float* y, Index seen, std::uint64_t alive,
                                      Bf16* p, float* sums) {
    const __m512i one = _mm512_set1_epi16(0x3f80);
    for (int r = 0; r < 32; ++r, y += 64, p += 32, sums += 16) {
        __m512i low = round_to_bf16(similarity<Completed>(w, load(y)), similarity<Completed>(w, load(y + 16)));
        __m512i high = round_to_bf16(similarity<Completed>(w, load(y + 32)), similarity<Completed>(w, load(y + 48)));
        if constexpr (Masked) {
            low = _mm512_maskz_mov_epi16(first_bits(seen + r) & static_cast<std::uint32_t>(alive), low);
            high = _mm512_maskz_mov_epi16(first_bits(seen + r - 32) & static_cast<std::uint32_t>(alive >> 32), high);
        }
        store_words(p, low);
        store_words(p + 2 * tile, high);
        Vec l = load(sums);
        l = _mm512_dpbf16_ps(l, reinterpret_cast<__m512bh>(low), reinterpret_cast<__m512bh>(one));
        l = _mm512_dpbf16_ps(l, reinterpret_cast<__m512bh>(high), reinterpret_cast<__m512bh>(one));
        store(sums, l);
    }
}

// acc[32][M] += sum of p v and sums[32][16] += sum of p, over at most `keys_at_once` keys. Query r sees `seen` + r of
// them.
template <bool Completed>
inline void attend(const ScorePolynomial& w, const TileSizes& size, const Bf16* q, const PackedKeys& keys, Index count,
                   Index seen, float* acc, float* sums) {
    LINATTN_ASSERT(size.D % 32 == 0 && size.M % 32 == 0 && count >= 0 && count <= keys_at_once);
    const Index visible = min(count, seen + 31);
    if (visible <= 0) return;
    alignas(64) float start[16], y[2][32 * 64];
    alignas(64) Bf16 p[32 * keys_at_once];
    store(start, splat(w.start));
    const int blocks = static_cast<int>((visible + 63) / 64);
    const Index k_block = 4 * (size.D / 32) * tile;
    // The tiles of one block are computed while the vectors work on the one before.
    scores(q, keys.k, size.D, start, y[0]);
    for (int b = 0; b < blocks; ++b) {
        if (b + 1 < blocks) scores(q, keys.k + (b + 1) * k_block, size.D, start, y[(b + 1) & 1]);
        const std::uint64_t alive = keys.alive[2 * b] | std::uint64_t{keys.alive[2 * b + 1]} << 32;
        const Index left = seen - 64 * b;
        if (left < 64 || alive != ~std::uint64_t{0})
            make_similarities<Completed, true>(w, y[b & 1], left, alive, p + 4 * b * tile, sums);
        else
            make_similarities<Completed, false>(w, y[b & 1], left, alive, p + 4 * b * tile, sums);
    }
    const int strips = static_cast<int>((visible + 31) / 32), M = size.M;
    for (int m = 0; m < M; m += 32) {
        load_block(acc + m, M);
        for (int s = 0; s < strips; ++s) {
            const Bf16* v = keys.v + (s * (M / 16) + m / 16) * tile;
            multiply_block(p + 2 * s * tile, p + (2 * s + 1) * tile, v, v + tile);
        }
        store_block(acc + m, M);
    }
}

// ---- results ----

// 32 rows of a head to be written; rows from `count` on do not exist.
struct StripTarget {
    Bf16* data;
    Index stride, count;
    int width;

    void store_row(int r, int column, Vec low, Vec high) const {
        if (r < count)
            _mm512_mask_storeu_epi16(data + r * stride + column, first_bits(width - column), round_to_bf16(low, high));
    }
};

LINATTN_INLINE StripTarget strip_target(const TensorView& x, Index batch, Index head, Index row0, Index first,
                                        Index count, Index width) {
    Bf16* data = static_cast<Bf16*>(x.data) + batch * x.stride_b + head * x.stride_h;
    return {data + (row0 + first) * x.stride_t, x.stride_t, count - first, static_cast<int>(width)};
}

// Writes 32 rows of out and l from the sums over keys. Rows whose similarities sum to nothing are 0.
LINATTN_INLINE void finish(const ScorePolynomial& w, bool normalize, int M, const float* acc, const float* sums,
                           const StripTarget& out, float* l) {
    for (int r = 0; r < 32 && r < out.count; ++r) {
        const float total = sum(load(sums + 16 * r));
        l[r] = total * w.factor;
        const bool nothing = normalize && total <= 0;
        const Vec divisor = splat(normalize ? total : 1 / w.factor);
        for (int m = 0; m < M; m += 32) {
            const Vec low = load(acc + r * M + m) / divisor, high = load(acc + r * M + m + 16) / divisor;
            out.store_row(r, m, nothing ? Vec{} : low, nothing ? Vec{} : high);
        }
    }
}

}  // namespace linattn::LINATTN_ISA::quadratic

#include "quadratic/native/score_tile.hpp"

#include "common/native/matmul.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using linattn::quadratic::Call;
namespace {

constexpr int panel = widest * width;  // keys whose scores with six rows fill the registers

// Which of the keys c, c + 1, ... of a block a query sees that sees none beyond `last`.
LINATTN_INLINE Lanes visible_lanes(const std::int32_t* key_mask, int c, int last) {
    Lanes counts;
    __builtin_memcpy(&counts, key_mask + c, sizeof counts);
    return counts & (lane_numbers() + c <= last);
}

LINATTN_INLINE bool all_set(const std::int32_t* key_mask) {
    std::int32_t every = -1;
    for (int c = 0; c < key_block; ++c) every &= key_mask[c];
    return every != 0;
}

// p(s) at t = s + start.
template <bool plain>
LINATTN_INLINE Vec similarity(const ScorePolynomial& f, Vec t) {
    return plain ? t * t : (f.a2 * t + f.a1) * t + f.a0;
}

template <bool plain>
LINATTN_INLINE Vec derivative(const ScorePolynomial& f, Vec t) {
    return plain ? t + t : 2 * f.a2 * t + f.a1;
}

bool is_plain(const ScorePolynomial& f) { return f.a2 == 1 && f.a1 == 0 && f.a0 == 0; }

// start(r) + a k for six queries a [n] and a panel of keys k [n][key_block].
template <class Start>
LINATTN_INLINE void multiply_panel(Vec (&t)[group_rows][widest], const Start& start, const float* a, Index n,
                                   const float* k) {
#pragma GCC unroll 32
    for (int r = 0; r < group_rows; ++r)
#pragma GCC unroll 8
        for (int w = 0; w < widest; ++w) t[r][w] = splat(start(r));
    multiply_add(t, a, round_up<width>(n), 1, k, key_block, static_cast<int>(n));
}

// The similarities p [group_rows][key_block] of six queries with the keys c to c + panel, and their sums to l.
template <bool plain, bool masked>
LINATTN_INLINE void compute_scores(const ScorePolynomial& f, const float* x, Index D, const KeyBlock& keys, int c,
                                   int last, float* p, float* l) {
    Vec t[group_rows][widest];
    multiply_panel(t, [&](int) { return f.start; }, x, D, keys.k + c);
#pragma GCC unroll 32
    for (int r = 0; r < group_rows; ++r) {
        Vec total = load(l + r * width);
#pragma GCC unroll 8
        for (int w = 0; w < widest; ++w) {
            Vec y = similarity<plain>(f, t[r][w]);
            if (masked) y = select(y, visible_lanes(keys.key_mask, c + w * width, last + r));
            total += y;
            store(p + r * key_block + c + w * width, y);
        }
        store(l + r * width, total);
    }
}

// accumulate_out for one strip.
template <bool plain, bool masked>
void accumulate_strip(const ScorePolynomial& f, const float* x, Index D, Index M, const KeyBlock& keys, int last,
                      float* acc, float* l) {
    alignas(64) float p[strip_rows * key_block];
    if (masked) clear(p, strip_rows * key_block);
    for (int r = 0; r < strip_rows; r += group_rows) {
        const int last_seen = min(keys.count, last + r + group_rows);
        for (int c = 0; c < last_seen; c += panel)
            compute_scores<plain, masked>(f, x + r * round_up<width>(D), D, keys, c, last + r, p + r * key_block,
                                          l + r * width);
    }
    add_product<key_block, 1>(p, keys.v, keys.v_stride, keys.count, last + 1, strip_rows, acc, round_up<width>(M),
                              round_up<width>(M));
}

// For six queries: p(s) and dS [group_rows][key_block].
template <bool plain, bool masked>
LINATTN_INLINE void compute_score_gradients(const ScorePolynomial& f, const QueryTile& queries, int r, Index D, Index M,
                                            const KeyGradientBlock& keys, int c, int last, float* p, float* ds) {
    Vec t[group_rows][widest];
    multiply_panel(t, [&](int) { return f.start; }, queries.x + r * round_up<width>(D), D, keys.k + c);
#pragma GCC unroll 32
    for (int i = 0; i < group_rows; ++i)
#pragma GCC unroll 8
        for (int w = 0; w < widest; ++w) store(p + i * key_block + c + w * width, t[i][w]);
    multiply_panel(
        t, [&](int i) { return -queries.delta[r + i]; }, queries.dout_scaled + r * round_up<width>(M), M, keys.v + c);
#pragma GCC unroll 32
    for (int i = 0; i < group_rows; ++i)
#pragma GCC unroll 8
        for (int w = 0; w < widest; ++w) {
            float* const at = p + i * key_block + c + w * width;
            const Vec score = load(at);
            Vec y = similarity<plain>(f, score), dy = derivative<plain>(f, score) * t[i][w];
            if (masked) {
                const Lanes where = visible_lanes(keys.key_mask, c + w * width, last + i);
                y = select(y, where), dy = select(dy, where);
            }
            store(at, y);
            store(ds + (at - p), dy);
        }
}

// accumulate_gradients for queries that all see some key, whole strips of them.
template <bool plain, bool masked>
void accumulate_tile_gradients(const ScorePolynomial& f, const QueryTile& queries, int count, Index D, Index M,
                               const KeyGradientBlock& keys, int last) {
    alignas(64) float p[gradient_rows * key_block], ds[gradient_rows * key_block];
    for (int r = 0; r < count; r += group_rows)
        for (int c = 0; c < key_block; c += panel)
            compute_score_gradients<plain, masked>(f, queries, r, D, M, keys, c, last + r, p + r * key_block,
                                                   ds + r * key_block);
    if (keys.dv != nullptr)
        add_product<1, key_block>(p, queries.dout_scaled, round_up<width>(M), count, count, key_block, keys.dv,
                                  round_up<width>(M), round_up<width>(M));
    if (keys.dk != nullptr)
        add_product<1, key_block>(ds, queries.x, round_up<width>(D), count, count, key_block, keys.dk,
                                  round_up<width>(D), round_up<width>(D));
    if (queries.dx != nullptr)
        add_product<key_block, 1>(ds, keys.k_rows, round_up<width>(D), keys.count, last + 1, count, queries.dx,
                                  round_up<width>(D), round_up<width>(D));
}

}  // namespace

ScorePolynomial score_polynomial(const Call& call) {
    const double c0 = call.c0, c1 = call.c1, c2 = call.c2;
    if (!call.problem.normalize) return {0, static_cast<float>(c2), static_cast<float>(c1), static_cast<float>(c0)};
    double r = c0 - c1 * c1 / (4 * c2);
    if (-1e-9 * c0 <= r && r <= 1e-9 * c0) r = max(r, 0.0);
    return {static_cast<float>(c1 / (2 * c2)), static_cast<float>(c2), 0, static_cast<float>(r)};
}

void load_key_mask(const bool* keep, Index count, std::int32_t* key_mask) {
    for (Index c = 0; c < key_block; ++c) key_mask[c] = c < count && (keep == nullptr || keep[c]) ? -1 : 0;
}

void accumulate_out(const ScorePolynomial& f, const float* x, Index D, Index M, const KeyBlock& keys, Index last,
                    int rows, float* acc, float* l) {
    LINATTN_ASSERT(rows % strip_rows == 0 && keys.count >= 0 && keys.count <= key_block);
    const bool plain = is_plain(f), whole = all_set(keys.key_mask);
    for (int r = 0; r < rows; r += strip_rows) {
        if (last + r + strip_rows <= 0) continue;
        // Far from the diagonal the distance does not matter, and must fit an int.
        const int near = static_cast<int>(min<Index>(last + r, key_block));
        const bool masked = !whole || near < key_block - 1;
        const auto strip = plain ? (masked ? accumulate_strip<true, true> : accumulate_strip<true, false>)
                                 : (masked ? accumulate_strip<false, true> : accumulate_strip<false, false>);
        strip(f, x + r * round_up<width>(D), D, M, keys, near, acc + r * round_up<width>(M), l + r * width);
    }
}

void accumulate_gradients(const ScorePolynomial& f, const QueryTile& queries, int count, Index D, Index M,
                          const KeyGradientBlock& keys, Index last) {
    LINATTN_ASSERT(count % strip_rows == 0 && count <= gradient_rows && keys.count <= key_block);
    if (last + count <= 0) return;
    const int blind = last < 0 ? static_cast<int>(-last) / strip_rows * strip_rows : 0;
    const int near = static_cast<int>(min<Index>(last + blind, key_block));
    const QueryTile seeing{queries.x + blind * round_up<width>(D), queries.dout_scaled + blind * round_up<width>(M),
                           queries.delta + blind,
                           queries.dx == nullptr ? nullptr : queries.dx + blind * round_up<width>(D)};
    const bool plain = is_plain(f), masked = near < key_block - 1 || !all_set(keys.key_mask);
    const auto tile = plain
                          ? (masked ? accumulate_tile_gradients<true, true> : accumulate_tile_gradients<true, false>)
                          : (masked ? accumulate_tile_gradients<false, true> : accumulate_tile_gradients<false, false>);
    tile(f, seeing, count - blind, D, M, keys, near);
}

}  // namespace linattn::LINATTN_ISA::quadratic

// Gradients of quadratic attention from blocks of scores, in bf16 by AMX tiles.
#pragma once

#include "common/native/bwd_preprocess.hpp"
#include "common/native/threads.hpp"
#include "quadratic/native/amx/score_tile.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using linattn::quadratic::BackwardCall;

// Scores are computed transposed, keys by queries, and so are what they lead to: P^T and dS^T are then rows of
// keys, the left factor of dV = P^T dO' and dK = dS^T Q, and pairs of keys, the right one of dQ^T = K^T dS^T.
constexpr int block_strips = 4;  // of 32 keys, or queries: a block of scores lies in the nearer caches

// 32 queries and their dO' and delta.
struct QueryStrip {
    Bf16* q_transposed;     // B tiles of Q^T: [2][D / 32][tile]
    Bf16* q_pairs;          // B tiles of Q: [D / 16][tile]
    Bf16* dout_transposed;  // B tiles of dO'^T, dO' = dO / l: [2][M / 32][tile]
    Bf16* dout_pairs;       // B tiles of dO': [M / 16][tile]
    float* minus_delta;     // [32], delta = rowsum(dO' out)
};

// The queries of a whole call, each sequence in strips of its own, head-major: [H][strips].
struct PackedQueries {
    const BackwardCall& call;
    TileSizes size;
    Index* first_strip;  // [sequences + 1]
    QueryStrip all;

    PackedQueries(const BackwardCall& call_, Scratch& scratch)
        : call(call_), size{pad_to_tile(call_.problem.D), pad_to_tile(call_.problem.M)} {
        const AttentionProblem& p = call.problem;
        first_strip = scratch.allocate<Index>(p.sequences + 1);
        first_strip[0] = 0;
        for (Index s = 0; s < p.sequences; ++s)
            first_strip[s + 1] = first_strip[s] + (sequence(p, s).queries + 31) / 32;
        const Index rows = 32 * count();
        all = {scratch.allocate<Bf16>(rows * size.D), scratch.allocate<Bf16>(rows * size.D),
               scratch.allocate<Bf16>(rows * size.M), scratch.allocate<Bf16>(rows * size.M),
               scratch.allocate<float>(rows)};
    }

    Index strips() const { return first_strip[call.problem.sequences]; }
    Index count() const { return call.problem.H * strips(); }

    // Of a head in a sequence.
    Index first(Index s, Index h) const { return h * strips() + first_strip[s]; }

    QueryStrip at(Index number) const {
        const Index D = number * 32 * size.D, M = number * 32 * size.M;
        return {all.q_transposed + D, all.q_pairs + D, all.dout_transposed + M, all.dout_pairs + M,
                all.minus_delta + number * 32};
    }

    // Calls work(number, sequence, head, first query) for the strips whose number is `thread` modulo `threads`.
    template <class Work>
    void each(int thread, int threads, const Work& work) const {
        Index s = 0, row = 0;  // row: of strips, over all heads
        for (Index n = thread; n < count(); n += threads) {
            const Index h = n / strips(), i = n % strips();
            if (h != row) s = 0, row = h;
            while (first_strip[s + 1] <= i) ++s;
            work(n, sequence(call.problem, s), h, 32 * (i - first_strip[s]));
        }
    }

    void pack(Index number, const Sequence& one, Index h, Index first) const {
        const AttentionProblem& p = call.problem;
        const QueryStrip to = at(number);
        const StripView q = strip_view(p.q, one.batch, h, one.first_query, first, one.queries, p.D);
        pack_transposed(q, size.D, to.q_transposed);
        pack_pairs(q, size.D, to.q_pairs);
        alignas(64) Bf16 dout_scaled[32 * 256];
        LINATTN_ASSERT(size.M <= 256);
        const auto view = [&](const TensorView& t) {
            return row_view(t, Dtype::bf16, one.batch, h, one.first_query + first);
        };
        const float* l = call.l + (one.batch * p.H + h) * p.Tq + one.first_query + first;
        bwd_preprocess(view(call.dout), view(call.out), l, p.normalize, min<Index>(32, one.queries - first), p.M, 32,
                       size.M, dout_scaled, to.minus_delta);
        for (int r = 0; r < 32; ++r) to.minus_delta[r] = -to.minus_delta[r];
        const StripView dout = {dout_scaled, size.M, size.M, ~0u};
        pack_transposed(dout, size.M, to.dout_transposed);
        pack_pairs(dout, size.M, to.dout_pairs);
    }
};

// Up to `block_strips` strips of the keys of a head, and their gradients.
struct KeyBlock {
    Bf16* k_rows;        // A tiles of K: [strip][D / 32][2][tile]
    Bf16* v_rows;        // A tiles of V: [strip][M / 32][2][tile]
    Bf16* k_transposed;  // A tiles of K^T: [strip][D / 16][tile]
    float* dk;           // [strip][32][D]
    float* dv;           // [strip][32][M]
    std::uint32_t alive[block_strips];
    Index first, strips;
};

// Scores and their gradients of a block of keys and queries: tiles of [strip of keys][strip of queries][2].
struct ScoreTiles {
    Bf16* p;         // A tiles of P^T
    Bf16* ds;        // A tiles of dS^T
    Bf16* ds_pairs;  // B tiles of dS^T, whose columns are queries in the order of `query_of_column`

    static Index at(Index key_strip, Index query_strip) { return (key_strip * block_strips + query_strip) * 2 * tile; }
};

// Interleaving two vectors works within 16 bytes: tile `half` of a strip then has its queries in this order.
LINATTN_INLINE int query_of_column(int half, int column) { return column / 4 * 8 + half * 4 + column % 4; }

// to[32][32] = start + A B, where 32 terms at a time stand at a, in two tiles, and at b and b + `second`.
LINATTN_INLINE void product(const Bf16* a, const Bf16* b, int size, const float* start, const float* start_right,
                            float* to) {
    load_tile<0>(start, 0);
    load_tile<1>(start_right, 0);
    load_tile<2>(start, 0);
    load_tile<3>(start_right, 0);
    for (int i = 0; i < size / 32; ++i)
        multiply_block(a + 2 * i * tile, a + (2 * i + 1) * tile, b + i * tile, b + (size / 32 + i) * tile);
    store_block(to, 32);
}

// Turns y and dP^T - delta of 32 keys x 32 queries into P^T and dS^T. Key r is seen from query `unseen` + r on.
template <bool Completed, bool Masked>
LINATTN_INLINE void compute_score_gradients(const ScorePolynomial& w, const float* y, const float* g, Index unseen,
                                            Bf16* p, Bf16* ds, Bf16* pairs) {
    for (int r = 0; r < 32; r += 2, pairs += 32) {
        __m512i two[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i, y += 32, g += 32, p += 32, ds += 32) {
            const Vec left = load(y), right = load(y + 16);
            __m512i weights = round_to_bf16(similarity<Completed>(w, left), similarity<Completed>(w, right));
            two[i] = round_to_bf16(slope<Completed>(w, left) * load(g), slope<Completed>(w, right) * load(g + 16));
            if constexpr (Masked) {
                const __mmask32 sees = ~first_bits(unseen + r + i);
                weights = _mm512_maskz_mov_epi16(sees, weights);
                two[i] = _mm512_maskz_mov_epi16(sees, two[i]);
            }
            store_words(p, weights);
            store_words(ds, two[i]);
        }
        store_words(pairs, _mm512_unpacklo_epi16(two[0], two[1]));
        store_words(pairs + tile, _mm512_unpackhi_epi16(two[0], two[1]));
    }
}

// Gradients from the scores of a block of keys and a block of queries.
template <bool Completed>
class BlockGradients {
public:
    // dq: sums over keys, [H][strips][D][32] with columns as in `query_of_column`, or null: not asked for.
    BlockGradients(const PackedQueries& queries, const ScorePolynomial& w, float* dq, Scratch& scratch)
        : queries_(queries), call_(queries.call), p_(call_.problem), size_(queries.size), w_(w), dq_(dq) {
        const Index rows = 32 * block_strips;
        keys_.k_rows = scratch.allocate<Bf16>(rows * size_.D);
        keys_.v_rows = scratch.allocate<Bf16>(rows * size_.M);
        keys_.k_transposed = scratch.allocate<Bf16>(rows * size_.D);
        keys_.dk = scratch.allocate<float>(rows * size_.D);
        keys_.dv = scratch.allocate<float>(rows * size_.M);
        scores_ = {scratch.allocate<Bf16>(rows * rows), scratch.allocate<Bf16>(rows * rows),
                   scratch.allocate<Bf16>(rows * rows)};
        y_ = scratch.allocate<float>(4 * 32 * 32);
        start_ = scratch.allocate<float>(16);
        store(start_, splat(w.start));
    }

    KeyBlock& keys() { return keys_; }

    // Keys j to j + 32 block_strips, or as many as there are.
    void load_keys(const Sequence& one, Index kv_head, Index j) {
        const bool* mask = p_.key_mask == nullptr ? nullptr : p_.key_mask + one.batch * p_.Tk + one.first_key;
        keys_.first = j;
        keys_.strips = (min<Index>(32 * block_strips, one.keys - j) + 31) / 32;
        for (Index a = 0; a < keys_.strips; ++a, j += 32) {
            const StripView k = strip_view(p_.k, one.batch, kv_head, one.first_key, j, one.keys, p_.D, mask);
            const StripView v = strip_view(p_.v, one.batch, kv_head, one.first_key, j, one.keys, p_.M, mask);
            pack_rows(k, size_.D, keys_.k_rows + a * 32 * size_.D);
            pack_rows(v, size_.M, keys_.v_rows + a * 32 * size_.M);
            Bf16* transposed = keys_.k_transposed + a * 32 * size_.D;
            pack_pairs(k, size_.D, transposed);
            for (int d = 0; d < size_.D; d += 16) transpose_tile(transposed + d * 32, transposed + d * 32);
            keys_.alive[a] = k.alive;
        }
        std::memset(keys_.dk, 0, keys_.strips * 32 * size_.D * sizeof(float));
        std::memset(keys_.dv, 0, keys_.strips * 32 * size_.M * sizeof(float));
    }

    void store_keys(const Sequence& one, Index kv_head) const {
        for (Index a = 0; a < keys_.strips; ++a) {
            const Index j = keys_.first + 32 * a;
            const auto write = [&](const TensorView& to, const float* from, int columns, Index width, float factor) {
                if (to.data == nullptr) return;
                const StripTarget rows = strip_target(to, one.batch, kv_head, one.first_key, j, one.keys, width);
                for (int r = 0; r < 32; ++r, from += columns) {
                    const bool counts = (keys_.alive[a] >> r) & 1;
                    for (int c = 0; c < columns; c += 32)
                        rows.store_row(r, c, counts ? load(from + c) * factor : Vec{},
                                       counts ? load(from + c + 16) * factor : Vec{});
                }
            };
            write(call_.dk, keys_.dk + a * 32 * size_.D, size_.D, p_.D, slope_factor(w_));
            write(call_.dv, keys_.dv + a * 32 * size_.M, size_.M, p_.M, w_.factor);
        }
    }

    // Adds the gradients from the scores of `count` strips of queries, from strip i on, with the loaded keys.
    void process_block(Index base, Index i, Index count) {
        Index from[block_strips];
        for (Index a = 0; a < keys_.strips; ++a) from[a] = first_seeing(a, i, count);
        if (from[0] >= count) return;
        compute_scores(base, i, count, from);
        for (Index a = 0; a < keys_.strips; ++a) {
            if (call_.dv.data != nullptr) add_packed_rows(base + i, from[a], count, a, true);
            if (call_.dk.data != nullptr) add_packed_rows(base + i, from[a], count, a, false);
        }
        for (Index b = 0; dq_ != nullptr && b < count; ++b) accumulate_dq(base + i + b, b, from);
    }

private:
    // The first strip of queries, from strip i on, of which one sees a key of strip a.
    Index first_seeing(Index a, Index i, Index count) const {
        if (!p_.is_causal) return 0;
        const Index query = keys_.first + 32 * a - p_.q_offset - 32 * i;  // the first, from strip i on
        return query <= 0 ? 0 : min(count, query / 32);
    }

    // The tiles of one pair of strips are computed while the vectors work on the pair before.
    void compute_scores(Index base, Index i, Index count, const Index* from) {
        Index a_before = -1, b_before = 0;
        int turn = 0;
        for (Index a = 0; a < keys_.strips; ++a)
            for (Index b = from[a]; b < count; ++b, turn ^= 1) {
                multiply(base + i + b, a, y_ + turn * 2 * 32 * 32);
                if (a_before >= 0) apply_scores(a_before, b_before, i, y_ + (turn ^ 1) * 2 * 32 * 32);
                a_before = a, b_before = b;
            }
        apply_scores(a_before, b_before, i, y_ + (turn ^ 1) * 2 * 32 * 32);
    }

    void multiply(Index number, Index a, float* y) {
        const QueryStrip q = queries_.at(number);
        product(keys_.k_rows + a * 32 * size_.D, q.q_transposed, size_.D, start_, start_, y);
        product(keys_.v_rows + a * 32 * size_.M, q.dout_transposed, size_.M, q.minus_delta, q.minus_delta + 16,
                y + 32 * 32);
    }

    void apply_scores(Index a, Index b, Index i, const float* y) {
        const Index at = ScoreTiles::at(a, b);
        const Index unseen = keys_.first + 32 * a - p_.q_offset - 32 * (i + b);
        if (p_.is_causal && unseen > -31)
            compute_score_gradients<Completed, true>(w_, y, y + 32 * 32, unseen, scores_.p + at, scores_.ds + at,
                                                     scores_.ds_pairs + at);
        else
            compute_score_gradients<Completed, false>(w_, y, y + 32 * 32, unseen, scores_.p + at, scores_.ds + at,
                                                      scores_.ds_pairs + at);
    }

    // dV += P^T dO' or dK += dS^T Q for strip a of the keys.
    void add_packed_rows(Index number, Index from, Index count, Index a, bool values) {
        const int columns = values ? size_.M : size_.D;
        float* sums = values ? keys_.dv + a * 32 * columns : keys_.dk + a * 32 * columns;
        const Bf16* left = values ? scores_.p : scores_.ds;
        const Bf16* right = values ? queries_.all.dout_pairs : queries_.all.q_pairs;
        if (from >= count) return;
        for (int c = 0; c < columns; c += 32) {
            load_block(sums + c, columns);
            for (Index b = from; b < count; ++b) {
                const Bf16* tiles = left + ScoreTiles::at(a, b);
                const Bf16* pairs = right + (number + b) * 32 * columns + c / 16 * tile;
                multiply_block(tiles, tiles + tile, pairs, pairs + tile);
            }
            store_block(sums + c, columns);
        }
    }

    // dQ^T += K^T dS^T for strip b of the queries.
    void accumulate_dq(Index number, Index b, const Index* from) {
        for (int d = 0; d < size_.D; d += 32) {
            float* sums = dq_ + number * 32 * size_.D + d * 32;
            load_block(sums, 32);
            for (Index a = 0; a < keys_.strips && from[a] <= b; ++a) {
                const Bf16* k = keys_.k_transposed + (a * (size_.D / 16) + d / 16) * tile;
                const Bf16* tiles = scores_.ds_pairs + ScoreTiles::at(a, b);
                multiply_block(k, k + tile, tiles, tiles + tile);
            }
            store_block(sums, 32);
        }
    }

    const PackedQueries& queries_;
    const BackwardCall& call_;
    const AttentionProblem& p_;
    const TileSizes size_;
    const ScorePolynomial& w_;
    float* dq_;
    KeyBlock keys_;
    ScoreTiles scores_;
    float *y_, *start_;
};

// Writes 32 rows of dq from the sums of all segments, `dq_stride` floats from each other.
inline void store_queries(const float* dq, Index segments, Index dq_stride, int D, float factor,
                          const StripTarget& to) {
    for (int d = 0; d < D; d += 32)
        for (int half = 0; half < 2; ++half) {
            __m512i words[2][16];
            for (int part = 0; part < 2; ++part) {
#pragma GCC unroll 16
                for (int r = 0; r < 16; ++r) {
                    const float* from = dq + (d + 16 * part + r) * 32 + 16 * half;
                    Vec total = load(from);
                    for (Index s = 1; s < segments; ++s) total += load(from + s * dq_stride);
                    words[part][r] = reinterpret_cast<__m512i>(total * factor);
                }
                transpose(words[part]);
            }
            for (int c = 0; c < 16; ++c)
                to.store_row(query_of_column(half, c), d, reinterpret_cast<Vec>(words[0][c]),
                             reinterpret_cast<Vec>(words[1][c]));
        }
}

// The backward pass from end to end: queries are packed, tasks are done as threads come free, each adding to the dq of
// its segment, and the segments' dq, `dq_stride` floats from one to the next, are put together.
template <class Work>
void compute_score_gradients(const PackedQueries& queries, const ScorePolynomial& w, const float* dq, Index segments,
                             Index dq_stride, Index tasks, const Work& work) {
    const AttentionProblem& p = queries.call.problem;
    const int D = queries.size.D;
    Queue queue;
    run_parallel(p.threads, [&](int thread, int threads) {
        const TileConfiguration tiles;
        queries.each(thread, threads, [&](Index number, const Sequence& one, Index h, Index first) {
            queries.pack(number, one, h, first);
        });
        if (threads > 1) barrier();
        for (Index task = queue.pop(); task < tasks; task = queue.pop()) work(task);
        if (threads > 1) barrier();
        if (dq != nullptr)
            queries.each(thread, threads, [&](Index number, const Sequence& one, Index h, Index first) {
                store_queries(dq + number * 32 * D, segments, dq_stride, D, slope_factor(w),
                              strip_target(queries.call.dq, one.batch, h, one.first_query, first, one.queries, p.D));
            });
    });
}

}  // namespace linattn::LINATTN_ISA::quadratic

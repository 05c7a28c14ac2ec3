// The kernels of one instruction set; the build compiles this file once for each (CMakeLists.txt).
//
// One task is a segment of one sequence for one key head and the query heads that share it. It walks chunks of keys:
// rows read the sums S = sum phi(k) v^T, z = sum phi(k) of earlier keys and the scores of their own chunk, which is
// then folded in. Where tasks would be fewer than threads, sequences are cut into segments whose sums are taken first.
#include "feature_map/native/chunk_state.hpp"

namespace linattn::LINATTN_ISA::feature_map {
namespace {

// ---- forward ----

void read_rows(const SegmentPlan& w, const Segment& part, QueryTile& q, Index i0, Index i1, const KeyChunk& keys,
               const ChunkState& sums) {
    if (i0 >= i1) return;
    const float *S = sums.S, *z = sums.z;
    for (Index g = 0; g < w.group; ++g) {
        q.load(w, part, part.head * w.group + g, i0, i1);
        float* l = q.row_sums(w, part);
        if (keys.count > 0) {
            q.score(w, part, keys, q.x, w.Dp, keys.kt, w.p.D, nullptr, q.tile);
            multiply<2>({{q.x, w.Dp, 1, S, w.Mp, w.p.D},
                         {q.tile, key_block, 1, keys.v, keys.v_stride, keys.count, q.seen(w, keys)}},
                        q.rows, w.Mp, q.sums, w.Mp, false);
        } else {
            multiply<1>({{q.x, w.Dp, 1, S, w.Mp, w.p.D}}, q.rows, w.Mp, q.sums, w.Mp, false);
        }
        const RowView out = q.at(w, part, w.call.out);
        for (int r = 0; r < q.count; ++r) {
            if (r < keys.ahead) {
                prefetch_row(keys.next_k, r, w.p.D);
                prefetch_row(keys.next_v, r, w.p.M);
            }
            Vec total{};
            for (Index d = 0; d < w.Dp; d += width) total += load(q.x + r * w.Dp + d) * load(z + d);
            for (Index c = 0; c < keys.count; c += width) total += load(q.tile + r * key_block + c);
            l[r] = sum(total);
            if (w.p.normalize)
                store_quotient(q.sums + r * w.Mp, w.p.M, l[r], out, r);
            else
                store_row(q.sums + r * w.Mp, w.p.M, 1, out, r);
        }
    }
}

// The sums over the keys of one segment alone. Causal, nobody reads those of the last one.
void sum_segment(const SegmentPlan& w, Index unit) {
    const Segment part = w.segment(unit);
    if (w.p.is_causal && part.index + 1 == part.count) return;
    Scratch scratch;
    KeyChunk keys(w, scratch);
    ChunkState sums(w, scratch, w.sums + unit * w.size(), part.last_key - part.first_key);
    sums.begin();
    for (Index j = part.first_key; j < part.last_key; j += w.chunk) {
        keys.load(w, part, j, min(j + w.chunk, part.last_key));
        keys.fold(w, sums);
    }
}

// The sums before a segment's first key: of the initial state and all earlier segments; of all segments if rows see
// all.
void sums_before(const SegmentPlan& w, const Segment& part, Index task, ChunkState& sums) {
    clear(sums.S, w.size());
    if (w.call.before != nullptr) add_state(w, *w.call.before, task, sums.S, sums.z);
    const Index end = w.p.is_causal ? part.index : part.count;
    for (Index i = 0; i < end; ++i) add_all(w.sums_of(task, i), w.size(), sums.S);
    sums.begin();
}

void forward_segment(const SegmentPlan& w, const ForwardCall& call, Index unit) {
    Scratch scratch;
    const Segment part = w.segment(unit);
    const Index task = unit / w.segments;
    ChunkState sums(w, scratch, part.last_key - part.first_key);
    KeyChunk keys(w, scratch);
    QueryTile queries(w, scratch);
    sums_before(w, part, task, sums);
    const auto read = [&](Index from, Index to) {
        keys.count = 0;
        for (Index i = from; i < to; i += w.chunk) read_rows(w, part, queries, i, min(i + w.chunk, to), keys, sums);
    };
    if (!w.p.is_causal) {
        read(part.first_row, part.last_row);
    } else {
        const bool last = part.index + 1 == part.count;
        read(part.first_row, w.row_of(part.sequence, part.first_key));
        for (Index j = part.first_key; j < part.last_key; j += w.chunk) {
            const Index end = min(j + w.chunk, part.last_key);
            const Index i0 = w.row_of(part.sequence, j), i1 = w.row_of(part.sequence, end);
            if (i0 == i1 && i0 == part.last_row && !(last && call.after != nullptr)) break;  // nobody reads on
            keys.load(w, part, j, end);
            if (i0 < i1) keys.transpose_keys(w);
            read_rows(w, part, queries, i0, i1, keys, sums);
            keys.fold(w, sums);
        }
        if (last) read(w.row_of(part.sequence, part.last_key), part.last_row);
    }
    if (call.after != nullptr && part.index + 1 == part.count) store_state(w, sums.S, sums.z, task, *call.after);
}

void count_keys(const ForwardCall& call) {
    const AttentionProblem& p = call.problem;
    for (Index s = 0; s < p.sequences; ++s) {
        const Sequence one = sequence(p, s);
        Index n = call.before == nullptr ? 0 : call.before->n[s];
        for (Index j = 0; j < one.keys; ++j)
            n += p.key_mask == nullptr || p.key_mask[one.batch * p.Tk + one.first_key + j];
        call.after->n[s] = n;
    }
}

// ---- backward ----

// What a gradient needs of the queries in a tile: dO' = dO / l, and delta, the change of the loss with each row's sum.
struct QueryGradients {
    float *dout_scaled, *delta;  // [chunk][Mp], [chunk]

    QueryGradients(const SegmentPlan& w, Scratch& scratch)
        : dout_scaled(scratch.allocate<float>(longest_chunk * w.Mp)), delta(scratch.allocate<float>(longest_chunk)) {}

    void load(const SegmentPlan& w, const BackwardCall& call, const Segment& part, const QueryTile& q) {
        bwd_preprocess(q.at(w, part, call.dout), q.at(w, part, call.out), q.row_sums(w, part), w.p.normalize, q.count,
                       w.p.M, q.rows, w.Mp, dout_scaled, delta);
    }
};

// dS += x^T dO', dz -= sum of delta x.
void fold_rows(const SegmentPlan& w, const QueryTile& q, const QueryGradients& rows, ChunkState& sums) {
    sums.fold(w, [&](float* dS, float* dz) {
        multiply<1>({{q.x, 1, w.Dp, rows.dout_scaled, w.Mp, q.count}}, static_cast<int>(round_up<4>(w.p.D)), w.Mp, dS,
                    w.Mp, true);
        for (int r = 0; r < q.count; ++r)
            for (Index d = 0; d < w.Dp; d += width)
                store(dz + d, load(dz + d) - rows.delta[r] * load(q.x + r * w.Dp + d));
    });
}

// S [D][Mp] as panels of key_block of its rows, each [M][key_block].
void transpose_sums(const SegmentPlan& w, float* S, float* panels) {
    for (Index d = 0; d < w.p.D; d += key_block, panels += w.p.M * key_block)
        pack_transposed(row_view(S + d * w.Mp, w.Mp), min<Index>(key_block, w.p.D - d), w.p.M, 1, nullptr, panels);
}

// c [rows][Dp] += a [rows][..] S^T, with S transposed in panels.
void add_through(const SegmentPlan& w, const float* a, Index stride, int rows, const float* panels, float* c) {
    for (Index d = 0; d < w.p.D; d += key_block, panels += w.p.M * key_block)
        multiply<1>({{a, stride, 1, panels, key_block, w.p.M}}, rows, round_up<width>(min<Index>(key_block, w.p.D - d)),
                    c + d, w.Dp, true);
}

struct SegmentBackward {
    const SegmentPlan& w;
    const BackwardCall& call;
    const Segment part;
    const Index task;
    Scratch scratch;
    KeyChunk keys;
    QueryTile queries;
    QueryGradients rows;
    ChunkState sums;
    float *panels, *other_tile, *gradient, *dv;

    SegmentBackward(const SegmentPlan& work, const BackwardCall& c, Index unit)
        : w(work), call(c), part(work.segment(unit)), task(unit / work.segments), keys(work, scratch),
          queries(work, scratch), rows(work, scratch),
          sums(work, scratch, part.last_key - part.first_key + part.last_row - part.first_row),
          panels(scratch.allocate<float>(round_up<key_block>(work.p.D) * work.p.M)),
          other_tile(scratch.allocate<float>(longest_chunk * key_block)),
          gradient(scratch.allocate<float>(longest_chunk * work.Dp)),
          dv(scratch.allocate<float>(longest_chunk * work.Mp)) {}

    void load_rows(Index g, Index i0, Index i1) {
        queries.load(w, part, part.head * w.group + g, i0, i1);
        rows.load(w, call, part, queries);
    }

    // Down: rows read the sums of earlier keys again, which lie transposed in `panels`.
    void query_gradients(Index i0, Index i1) {
        if (i0 >= i1) return;
        for (Index g = 0; g < w.group; ++g) {
            load_rows(g, i0, i1);
            for (int r = 0; r < queries.rows; ++r)
                for (Index d = 0; d < w.Dp; d += width)
                    store(gradient + r * w.Dp + d, -rows.delta[r] * load(sums.z + d));
            add_through(w, rows.dout_scaled, w.Mp, queries.rows, panels, gradient);
            if (keys.count > 0) {
                queries.score(w, part, keys, rows.dout_scaled, w.Mp, keys.vt, w.p.M, rows.delta, queries.tile);
                multiply<1>({{queries.tile, key_block, 1, keys.k, w.Dp, keys.count, queries.seen(w, keys)}},
                            queries.rows, w.Dp, gradient, w.Dp, true);
            }
            store_pulled_back(call.map, gradient, queries.at(w, part, w.p.q), queries.count, w.p.D, w.p.scale, nullptr,
                              queries.at(w, part, call.dq));
        }
    }

    void down() {
        sums_before(w, part, task, sums);
        transpose_sums(w, sums.S, panels);
        const auto read = [&](Index from, Index to) {
            keys.count = 0;
            for (Index i = from; i < to; i += w.chunk) query_gradients(i, min(i + w.chunk, to));
        };
        if (!w.p.is_causal) return read(part.first_row, part.last_row);
        read(part.first_row, w.row_of(part.sequence, part.first_key));
        for (Index j = part.first_key; j < part.last_key; j += w.chunk) {
            const Index end = min(j + w.chunk, part.last_key);
            const Index i0 = w.row_of(part.sequence, j), i1 = w.row_of(part.sequence, end);
            if (i0 == i1 && i0 == part.last_row) return;
            keys.load(w, part, j, end);
            keys.transpose_values(w);
            query_gradients(i0, i1);
            keys.fold(w, sums);
            transpose_sums(w, sums.S, panels);
        }
        if (part.index + 1 == part.count) read(w.row_of(part.sequence, part.last_key), part.last_row);
    }

    // Up: keys learn what later rows made of them, from the sums, now dS and dz, then from the rows of their own chunk,
    // which are folded in.
    void key_gradients(Index i0, Index i1) {
        const int count = round_up<4>(keys.count);
        for (int c = 0; c < count; ++c) __builtin_memcpy(gradient + c * w.Dp, sums.z, sizeof(float) * w.Dp);
        transpose_sums(w, sums.S, panels);
        add_through(w, keys.v, keys.v_stride, count, panels, gradient);
        multiply<1>({{keys.k, w.Dp, 1, sums.S, w.Mp, w.p.D}}, count, w.Mp, dv, w.Mp, false);
        for (Index g = 0; g < w.group && i0 < i1; ++g) {
            load_rows(g, i0, i1);
            queries.score(w, part, keys, queries.x, w.Dp, keys.kt, w.p.D, nullptr, queries.tile);
            queries.score(w, part, keys, rows.dout_scaled, w.Mp, keys.vt, w.p.M, rows.delta, other_tile);
            multiply<1>({{queries.tile, 1, key_block, rows.dout_scaled, w.Mp, queries.count}}, count, w.Mp, dv, w.Mp,
                        true);
            multiply<1>({{other_tile, 1, key_block, queries.x, w.Dp, queries.count}}, count, w.Dp, gradient, w.Dp,
                        true);
            fold_rows(w, queries, rows, sums);
        }
        const Index at = part.sequence.first_key + keys.j0, batch = part.sequence.batch;
        const auto rows_of = [&](const TensorView& tensor) {
            return row_view(tensor, w.p.dtype, batch, part.head, at);
        };
        if (call.dk.data != nullptr)
            store_pulled_back(call.map, gradient, rows_of(w.p.k), keys.count, w.p.D, 1, keys.keep, rows_of(call.dk));
        if (call.dv.data == nullptr) return;
        for (int c = 0; c < keys.count; ++c)
            store_row(dv + c * w.Mp, w.p.M, keys.keep == nullptr || keys.keep[c] ? 1 : 0, rows_of(call.dv), c);
    }

    void fold(Index from, Index to) {
        for (Index i = from; i < to; i += w.chunk)
            for (Index g = 0; g < w.group; ++g) {
                load_rows(g, i, min(i + w.chunk, to));
                fold_rows(w, queries, rows, sums);
            }
    }

    void up() {
        clear(sums.S, w.size());
        if (call.dafter != nullptr) add_state(w, *call.dafter, task, sums.S, sums.z);
        const Index first = w.p.is_causal ? part.index + 1 : 0;
        for (Index i = first; i < part.count; ++i) add_all(w.sums_of(w.tasks + task, i), w.size(), sums.S);
        sums.begin();
        const bool last = part.index + 1 == part.count;
        if (w.p.is_causal && last) fold(w.row_of(part.sequence, part.last_key), part.last_row);
        const Index chunks = ceil_div(part.last_key - part.first_key, w.chunk);
        for (Index c = chunks - 1; c >= 0; --c) {
            const Index j = part.first_key + c * w.chunk, end = min(j + w.chunk, part.last_key);
            keys.load(w, part, j, end);
            keys.transpose_keys(w);
            keys.transpose_values(w);
            if (w.p.is_causal)
                key_gradients(w.row_of(part.sequence, j), w.row_of(part.sequence, end));
            else
                key_gradients(0, 0);
        }
        if (call.dbefore == nullptr || part.index > 0) return;
        if (w.p.is_causal) fold(part.first_row, w.row_of(part.sequence, part.first_key));
        store_state(w, sums.S, sums.z, task, *call.dbefore);
    }

    // The gradient that the rows of this segment alone give to the sums before it.
    void sum_rows(float* dS) {
        if (w.p.is_causal && part.index == 0) return;  // read by nobody
        clear(sums.S, w.size());
        sums.begin();
        fold(part.first_row, part.last_row);
        __builtin_memcpy(dS, sums.S, sizeof(float) * w.size());
    }
};

}  // namespace

void forward(const ForwardCall& call) {
    Scratch scratch;
    SegmentPlan w(call, forward_chunk);
    // Sums of the segments are taken first, each by itself, where a segment needs those of others.
    const bool ahead = !w.p.is_causal || w.segments > 1;
    if (ahead) w.sums = scratch.allocate<float>(w.count() * w.size());
    run_parallel(call.problem.threads, [&](int thread, int threads) {
        if (ahead) {
            for (Index unit = thread; unit < w.count(); unit += threads) sum_segment(w, unit);
            barrier();
        }
        for (Index unit = thread; unit < w.count(); unit += threads) forward_segment(w, call, unit);
    });
    if (call.after != nullptr) count_keys(call);
}

void backward(const BackwardCall& call) {
    Scratch scratch;
    SegmentPlan w(call, backward_chunk);
    const bool ahead = !w.p.is_causal || w.segments > 1;
    if (ahead) w.sums = scratch.allocate<float>(2 * w.count() * w.size());
    run_parallel(call.problem.threads, [&](int thread, int threads) {
        if (ahead) {
            for (Index unit = thread; unit < w.count(); unit += threads) {
                sum_segment(w, unit);
                SegmentBackward(w, call, unit).sum_rows(w.sums + (w.count() + unit) * w.size());
            }
            barrier();
        }
        for (Index unit = thread; unit < w.count(); unit += threads) {
            SegmentBackward task(w, call, unit);
            if (call.dq.data != nullptr) task.down();
            if (call.dk.data != nullptr || call.dv.data != nullptr || call.dbefore != nullptr) task.up();
        }
    });
}

}  // namespace linattn::LINATTN_ISA::feature_map

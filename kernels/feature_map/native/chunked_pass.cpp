// The kernels of one instruction set; the build compiles this file once for each (CMakeLists.txt).
//
// One task is a segment of one sequence for one key head and the query heads that share it. It goes through chunks of
// keys: queries read the state over earlier keys and the scores of their own chunk, which is then added to the state.
// Where tasks would be fewer than threads, sequences are cut into segments whose states are computed first.
#include "feature_map/native/chunk_state.hpp"

namespace linattn::LINATTN_ISA::feature_map {
namespace {

// ---- forward ----

void process_queries(const SegmentPlan& plan, const Segment& part, QueryTile& q, Index i0, Index i1,
                     const KeyChunk& keys, const ChunkState& sums) {
    if (i0 >= i1) return;
    const float *S = sums.S, *z = sums.z;
    for (Index g = 0; g < plan.group; ++g) {
        q.load(plan, part, part.head * plan.group + g, i0, i1);
        float* l = q.l(plan, part);
        if (keys.count > 0) {
            q.score(plan, part, keys, q.x, plan.Dp, keys.kt, plan.p.D, nullptr, q.tile);
            multiply<2>({{q.x, plan.Dp, 1, S, plan.Mp, plan.p.D},
                         {q.tile, key_block, 1, keys.v, keys.v_stride, keys.count, q.seen(plan, keys)}},
                        q.rows, plan.Mp, q.sums, plan.Mp, false);
        } else {
            multiply<1>({{q.x, plan.Dp, 1, S, plan.Mp, plan.p.D}}, q.rows, plan.Mp, q.sums, plan.Mp, false);
        }
        const RowView out = q.at(plan, part, plan.call.out);
        for (int r = 0; r < q.count; ++r) {
            if (r < keys.prefetch_count) {
                prefetch_row(keys.next_k, r, plan.p.D);
                prefetch_row(keys.next_v, r, plan.p.M);
            }
            Vec total{};
            for (Index d = 0; d < plan.Dp; d += width) total += load(q.x + r * plan.Dp + d) * load(z + d);
            for (Index c = 0; c < keys.count; c += width) total += load(q.tile + r * key_block + c);
            l[r] = sum(total);
            if (plan.p.normalize)
                store_quotient(q.sums + r * plan.Mp, plan.p.M, l[r], out, r);
            else
                store_row(q.sums + r * plan.Mp, plan.p.M, 1, out, r);
        }
    }
}

// The state over the keys of one segment alone. Causal, that of the last one is not needed.
void sum_segment(const SegmentPlan& plan, Index unit) {
    const Segment part = plan.segment(unit);
    if (plan.p.is_causal && part.index + 1 == part.count) return;
    Scratch scratch;
    KeyChunk keys(plan, scratch);
    ChunkState sums(plan, scratch, plan.sums + unit * plan.size(), part.last_key - part.first_key);
    sums.begin();
    for (Index j = part.first_key; j < part.last_key; j += plan.chunk) {
        keys.load(plan, part, j, min(j + plan.chunk, part.last_key));
        keys.update(plan, sums);
    }
}

// The state before a segment's first key: the initial state and all earlier segments; all segments if queries see all.
void load_state_before(const SegmentPlan& plan, const Segment& part, Index task, ChunkState& sums) {
    clear(sums.S, plan.size());
    if (plan.call.before != nullptr) add_state(plan, *plan.call.before, task, sums.S, sums.z);
    const Index end = plan.p.is_causal ? part.index : part.count;
    for (Index i = 0; i < end; ++i) add_all(plan.segment_state(task, i), plan.size(), sums.S);
    sums.begin();
}

void forward_segment(const SegmentPlan& plan, const ForwardCall& call, Index unit) {
    Scratch scratch;
    const Segment part = plan.segment(unit);
    const Index task = unit / plan.segments;
    ChunkState sums(plan, scratch, part.last_key - part.first_key);
    KeyChunk keys(plan, scratch);
    QueryTile queries(plan, scratch);
    load_state_before(plan, part, task, sums);
    const auto read = [&](Index from, Index to) {
        keys.count = 0;
        for (Index i = from; i < to; i += plan.chunk)
            process_queries(plan, part, queries, i, min(i + plan.chunk, to), keys, sums);
    };
    if (!plan.p.is_causal) {
        read(part.first_query, part.last_query);
    } else {
        const bool last = part.index + 1 == part.count;
        read(part.first_query, plan.first_query_of(part.sequence, part.first_key));
        for (Index j = part.first_key; j < part.last_key; j += plan.chunk) {
            const Index end = min(j + plan.chunk, part.last_key);
            const Index i0 = plan.first_query_of(part.sequence, j), i1 = plan.first_query_of(part.sequence, end);
            const bool state_needed = last && call.after != nullptr;
            if (i0 == i1 && i0 == part.last_query && !state_needed) break;
            keys.load(plan, part, j, end);
            if (i0 < i1) keys.transpose_keys(plan);
            process_queries(plan, part, queries, i0, i1, keys, sums);
            keys.update(plan, sums);
        }
        if (last) read(plan.first_query_of(part.sequence, part.last_key), part.last_query);
    }
    if (call.after != nullptr && part.index + 1 == part.count) store_state(plan, sums.S, sums.z, task, *call.after);
}

void store_key_counts(const ForwardCall& call) {
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

// The queries of a tile in the backward pass: dO' = dO / l and delta = dO'.out (common/native/bwd_preprocess.hpp).
struct QueryGradients {
    float *dout_scaled, *delta;  // [chunk][Mp], [chunk]

    QueryGradients(const SegmentPlan& plan, Scratch& scratch)
        : dout_scaled(scratch.allocate<float>(longest_chunk * plan.Mp)), delta(scratch.allocate<float>(longest_chunk)) {
    }

    void load(const SegmentPlan& plan, const BackwardCall& call, const Segment& part, const QueryTile& q) {
        bwd_preprocess(q.at(plan, part, call.dout), q.at(plan, part, call.out), q.l(plan, part), plan.p.normalize,
                       q.count, plan.p.M, q.rows, plan.Mp, dout_scaled, delta);
    }
};

// dS += x^T dO', dz -= sum of delta x.
void update_state_gradient(const SegmentPlan& plan, const QueryTile& q, const QueryGradients& rows, ChunkState& sums) {
    sums.update(plan, [&](float* dS, float* dz) {
        multiply<1>({{q.x, 1, plan.Dp, rows.dout_scaled, plan.Mp, q.count}}, static_cast<int>(round_up<4>(plan.p.D)),
                    plan.Mp, dS, plan.Mp, true);
        for (int r = 0; r < q.count; ++r)
            for (Index d = 0; d < plan.Dp; d += width)
                store(dz + d, load(dz + d) - rows.delta[r] * load(q.x + r * plan.Dp + d));
    });
}

// S [D][Mp] as panels of key_block of its rows, each [M][key_block].
void transpose_sums(const SegmentPlan& plan, float* S, float* panels) {
    for (Index d = 0; d < plan.p.D; d += key_block, panels += plan.p.M * key_block)
        pack_transposed(row_view(S + d * plan.Mp, plan.Mp), min<Index>(key_block, plan.p.D - d), plan.p.M, 1, nullptr,
                        panels);
}

// c [rows][Dp] += a [rows][..] S^T, with S transposed in panels.
void add_product_with_state(const SegmentPlan& plan, const float* a, Index stride, int rows, const float* panels,
                            float* c) {
    for (Index d = 0; d < plan.p.D; d += key_block, panels += plan.p.M * key_block)
        multiply<1>({{a, stride, 1, panels, key_block, plan.p.M}}, rows,
                    round_up<width>(min<Index>(key_block, plan.p.D - d)), c + d, plan.Dp, true);
}

struct SegmentBackward {
    const SegmentPlan& plan;
    const BackwardCall& call;
    const Segment part;
    const Index task;
    Scratch scratch;
    KeyChunk keys;
    QueryTile queries;
    QueryGradients rows;
    ChunkState sums;
    float *panels, *dscores, *gradient, *dv;

    SegmentBackward(const SegmentPlan& work, const BackwardCall& c, Index unit)
        : plan(work), call(c), part(work.segment(unit)), task(unit / work.segments), keys(work, scratch),
          queries(work, scratch), rows(work, scratch),
          sums(work, scratch, part.last_key - part.first_key + part.last_query - part.first_query),
          panels(scratch.allocate<float>(round_up<key_block>(work.p.D) * work.p.M)),
          dscores(scratch.allocate<float>(longest_chunk * key_block)),
          gradient(scratch.allocate<float>(longest_chunk * work.Dp)),
          dv(scratch.allocate<float>(longest_chunk * work.Mp)) {}

    void load_rows(Index g, Index i0, Index i1) {
        queries.load(plan, part, part.head * plan.group + g, i0, i1);
        rows.load(plan, call, part, queries);
    }

    // dq of queries i0 to i1: from the state over earlier keys, transposed in `panels`, and from their own chunk.
    void accumulate_dq(Index i0, Index i1) {
        if (i0 >= i1) return;
        for (Index g = 0; g < plan.group; ++g) {
            load_rows(g, i0, i1);
            for (int r = 0; r < queries.rows; ++r)
                for (Index d = 0; d < plan.Dp; d += width)
                    store(gradient + r * plan.Dp + d, -rows.delta[r] * load(sums.z + d));
            add_product_with_state(plan, rows.dout_scaled, plan.Mp, queries.rows, panels, gradient);
            if (keys.count > 0) {
                queries.score(plan, part, keys, rows.dout_scaled, plan.Mp, keys.vt, plan.p.M, rows.delta, queries.tile);
                multiply<1>({{queries.tile, key_block, 1, keys.k, plan.Dp, keys.count, queries.seen(plan, keys)}},
                            queries.rows, plan.Dp, gradient, plan.Dp, true);
            }
            store_map_gradient(call.map, gradient, queries.at(plan, part, plan.p.q), queries.count, plan.p.D,
                               plan.p.scale, nullptr, queries.at(plan, part, call.dq));
        }
    }

    void query_pass() {
        load_state_before(plan, part, task, sums);
        transpose_sums(plan, sums.S, panels);
        const auto read = [&](Index from, Index to) {
            keys.count = 0;
            for (Index i = from; i < to; i += plan.chunk) accumulate_dq(i, min(i + plan.chunk, to));
        };
        if (!plan.p.is_causal) return read(part.first_query, part.last_query);
        read(part.first_query, plan.first_query_of(part.sequence, part.first_key));
        for (Index j = part.first_key; j < part.last_key; j += plan.chunk) {
            const Index end = min(j + plan.chunk, part.last_key);
            const Index i0 = plan.first_query_of(part.sequence, j), i1 = plan.first_query_of(part.sequence, end);
            if (i0 == i1 && i0 == part.last_query) return;
            keys.load(plan, part, j, end);
            keys.transpose_values(plan);
            accumulate_dq(i0, i1);
            keys.update(plan, sums);
            transpose_sums(plan, sums.S, panels);
        }
        if (part.index + 1 == part.count) read(plan.first_query_of(part.sequence, part.last_key), part.last_query);
    }

    // dk and dv of a chunk: from the gradient to the state, dS and dz, then from the queries of their own chunk, which
    // are added to that.
    void accumulate_dkv(Index i0, Index i1) {
        const int count = round_up<4>(keys.count);
        for (int c = 0; c < count; ++c) __builtin_memcpy(gradient + c * plan.Dp, sums.z, sizeof(float) * plan.Dp);
        transpose_sums(plan, sums.S, panels);
        add_product_with_state(plan, keys.v, keys.v_stride, count, panels, gradient);
        multiply<1>({{keys.k, plan.Dp, 1, sums.S, plan.Mp, plan.p.D}}, count, plan.Mp, dv, plan.Mp, false);
        for (Index g = 0; g < plan.group && i0 < i1; ++g) {
            load_rows(g, i0, i1);
            queries.score(plan, part, keys, queries.x, plan.Dp, keys.kt, plan.p.D, nullptr, queries.tile);
            queries.score(plan, part, keys, rows.dout_scaled, plan.Mp, keys.vt, plan.p.M, rows.delta, dscores);
            multiply<1>({{queries.tile, 1, key_block, rows.dout_scaled, plan.Mp, queries.count}}, count, plan.Mp, dv,
                        plan.Mp, true);
            multiply<1>({{dscores, 1, key_block, queries.x, plan.Dp, queries.count}}, count, plan.Dp, gradient, plan.Dp,
                        true);
            update_state_gradient(plan, queries, rows, sums);
        }
        const Index at = part.sequence.first_key + keys.j0, batch = part.sequence.batch;
        const auto rows_of = [&](const TensorView& tensor) {
            return row_view(tensor, plan.p.dtype, batch, part.head, at);
        };
        if (call.dk.data != nullptr)
            store_map_gradient(call.map, gradient, rows_of(plan.p.k), keys.count, plan.p.D, 1, keys.keep,
                               rows_of(call.dk));
        if (call.dv.data == nullptr) return;
        for (int c = 0; c < keys.count; ++c)
            store_row(dv + c * plan.Mp, plan.p.M, keys.keep == nullptr || keys.keep[c] ? 1 : 0, rows_of(call.dv), c);
    }

    void update(Index from, Index to) {
        for (Index i = from; i < to; i += plan.chunk)
            for (Index g = 0; g < plan.group; ++g) {
                load_rows(g, i, min(i + plan.chunk, to));
                update_state_gradient(plan, queries, rows, sums);
            }
    }

    void key_pass() {
        clear(sums.S, plan.size());
        if (call.dafter != nullptr) add_state(plan, *call.dafter, task, sums.S, sums.z);
        const Index first = plan.p.is_causal ? part.index + 1 : 0;
        for (Index i = first; i < part.count; ++i)
            add_all(plan.segment_state(plan.tasks + task, i), plan.size(), sums.S);
        sums.begin();
        const bool last = part.index + 1 == part.count;
        if (plan.p.is_causal && last) update(plan.first_query_of(part.sequence, part.last_key), part.last_query);
        const Index chunks = ceil_div(part.last_key - part.first_key, plan.chunk);
        for (Index c = chunks - 1; c >= 0; --c) {
            const Index j = part.first_key + c * plan.chunk, end = min(j + plan.chunk, part.last_key);
            keys.load(plan, part, j, end);
            keys.transpose_keys(plan);
            keys.transpose_values(plan);
            if (plan.p.is_causal)
                accumulate_dkv(plan.first_query_of(part.sequence, j), plan.first_query_of(part.sequence, end));
            else
                accumulate_dkv(0, 0);
        }
        if (call.dbefore == nullptr || part.index > 0) return;
        if (plan.p.is_causal) update(part.first_query, plan.first_query_of(part.sequence, part.first_key));
        store_state(plan, sums.S, sums.z, task, *call.dbefore);
    }

    // The gradient to the state before this segment from its own queries.
    void sum_segment_queries(float* dS) {
        if (plan.p.is_causal && part.index == 0) return;  // not needed
        clear(sums.S, plan.size());
        sums.begin();
        update(part.first_query, part.last_query);
        __builtin_memcpy(dS, sums.S, sizeof(float) * plan.size());
    }
};

}  // namespace

void forward(const ForwardCall& call) {
    Scratch scratch;
    SegmentPlan plan(call, forward_chunk);
    // The state of each segment is computed first where others need it.
    const bool prefetch_count = !plan.p.is_causal || plan.segments > 1;
    if (prefetch_count) plan.sums = scratch.allocate<float>(plan.count() * plan.size());
    run_parallel(call.problem.threads, [&](int thread, int threads) {
        if (prefetch_count) {
            for (Index unit = thread; unit < plan.count(); unit += threads) sum_segment(plan, unit);
            barrier();
        }
        for (Index unit = thread; unit < plan.count(); unit += threads) forward_segment(plan, call, unit);
    });
    if (call.after != nullptr) store_key_counts(call);
}

void backward(const BackwardCall& call) {
    Scratch scratch;
    SegmentPlan plan(call, backward_chunk);
    const bool prefetch_count = !plan.p.is_causal || plan.segments > 1;
    if (prefetch_count) plan.sums = scratch.allocate<float>(2 * plan.count() * plan.size());
    run_parallel(call.problem.threads, [&](int thread, int threads) {
        if (prefetch_count) {
            for (Index unit = thread; unit < plan.count(); unit += threads) {
                sum_segment(plan, unit);
                SegmentBackward(plan, call, unit).sum_segment_queries(plan.sums + (plan.count() + unit) * plan.size());
            }
            barrier();
        }
        for (Index unit = thread; unit < plan.count(); unit += threads) {
            SegmentBackward task(plan, call, unit);
            if (call.dq.data != nullptr) task.query_pass();
            if (call.dk.data != nullptr || call.dv.data != nullptr || call.dbefore != nullptr) task.key_pass();
        }
    });
}

}  // namespace linattn::LINATTN_ISA::feature_map

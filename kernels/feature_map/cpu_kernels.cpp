// The kernels of one instruction set; the build compiles this file once for each (CMakeLists.txt).
//
// One task is a segment of one sequence for one key head and the query heads that share it. It walks chunks of keys: rows
// read the sums S = sum phi(k) v^T, z = sum phi(k) of earlier keys and the scores of their own chunk, which is then folded
// in. Where tasks would be fewer than threads, sequences are cut into segments whose sums are taken first.
#include "common/native/matmul.hpp"
#include "common/native/packing.hpp"
#include "common/native/threads.hpp"
#include "feature_map/cpu.hpp"
#include "feature_map/cpu_maps.hpp"

namespace linattn::LINATTN_ISA {
namespace {

using feature_map::BackwardCall;
using feature_map::Call;
using feature_map::ForwardCall;
using feature_map::State;

constexpr int longest_chunk = key_block, usual_chunk = 48;  // 48: whole strips of registers at every width
constexpr Index shortest_segment = 4 * usual_chunk;
constexpr Index many_keys = 4096;  // and more: their sums are taken in two levels

LINATTN_INLINE int fours(Index rows) { return static_cast<int>(blocks(rows, 4) * 4); }
LINATTN_INLINE Index clamped(Index x, Index low, Index high) { return most(low, least(x, high)); }

// sum over i < n of a[r * row + i * step] * b[i * stride ...]. Row r needs no more than the first `seen + r` of n.
struct Product {
    const float* a;
    Index row, step;
    const float* b;
    Index stride;
    Index n, seen = Index{1} << 40;
};

template <int R, int W, int terms>
LINATTN_INLINE void tile(const Product (&products)[terms], Index r, Index j, float* c, Index c_stride, bool add) {
    Vec acc[R][W];
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
        for (int w = 0; w < W; ++w) acc[i][w] = add ? load(c + (r + i) * c_stride + j + w * width) : Vec{};
#pragma GCC unroll 2
    for (int t = 0; t < terms; ++t) {
        const Product& p = products[t];
        multiply_add(acc, p.a + r * p.row, p.row, p.step, p.b + j, p.stride,
                     static_cast<int>(clamped(p.seen + r + R - 1, 0, p.n)));
    }
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
        for (int w = 0; w < W; ++w) store(c + (r + i) * c_stride + j + w * width, acc[i][w]);
}

template <int W, int terms>
LINATTN_INLINE void panel(const Product (&products)[terms], int rows, Index j, float* c, Index c_stride, bool add) {
    constexpr int R = panel_rows<W>;
    int r = 0;
    for (; r + R <= rows; r += R) tile<R, W>(products, r, j, c, c_stride, add);
    for (; r + 4 <= rows; r += 4) tile<4, W>(products, r, j, c, c_stride, add);
    if (r < rows) tile<2, W>(products, r, j, c, c_stride, add);
}

// c [rows][columns] = (or, to add, +=) the sum of the products. rows: of 4; columns: of a vector.
template <int terms>
void multiply(const Product (&products)[terms], int rows, Index columns, float* c, Index c_stride, bool add) {
    Index j = 0;
    for (; j + widest * width <= columns; j += widest * width) panel<widest>(products, rows, j, c, c_stride, add);
    switch ((columns - j) / width) {
        case 3:
            if constexpr (widest > 3) panel<3>(products, rows, j, c, c_stride, add);
            return;
        case 2:
            if constexpr (widest > 2) panel<2>(products, rows, j, c, c_stride, add);
            return;
        case 1: return panel<1>(products, rows, j, c, c_stride, add);
    }
}

// Rows and keys of one segment of a sequence.
struct Segment {
    Sequence sequence;
    Index head;  // of keys
    Index first_row, last_row, first_key, last_key;
    Index index, count;
};

// What all threads agree on.
struct Work {
    const Call& call;
    const Problem& p;
    Index Dp, Mp, chunk, group, segments, tasks;
    float* sums;  // S and z of every segment, where there are several or rows see all keys; and, going back, dS and dz

    Work(const Call& c)
        : call(c), p(c.problem), Dp(padded(p.D)), Mp(padded(p.M)),
          chunk(clamped(c.chunk == 0 ? usual_chunk : c.chunk, 1, longest_chunk)), group(p.H / p.Hkv), segments(1),
          tasks(p.sequences * p.Hkv), sums(nullptr) {
        Index longest = 0;
        for (Index s = 0; s < p.sequences; ++s) longest = most(longest, sequence(p, s).keys);
        const Index wanted = blocks(p.threads, most<Index>(tasks, 1));
        segments = clamped(longest / shortest_segment, 1, wanted);
    }

    Index size() const { return Dp * Mp + Dp; }
    Index count() const { return tasks * segments; }
    float* sums_of(Index task, Index segment) const { return sums + (task * segments + segment) * size(); }

    // Row i of a sequence sees keys below i + q_offset + 1; so key j is seen by rows from here on.
    Index row_of(const Sequence& s, Index j) const { return clamped(j - p.q_offset, 0, s.queries); }

    Segment segment(Index unit) const {
        const Index task = unit / segments, i = unit % segments;
        const Sequence s = sequence(p, task / p.Hkv);
        const Index keys = blocks(blocks(s.keys, segments), chunk) * chunk;
        const Index j0 = least(i * keys, s.keys), j1 = i + 1 == segments ? s.keys : least(j0 + keys, s.keys);
        Segment part{s, task % p.Hkv, 0, 0, j0, j1, i, segments};
        if (p.is_causal) {
            part.first_row = i == 0 ? 0 : row_of(s, j0);
            part.last_row = i + 1 == segments ? s.queries : row_of(s, j1);
        } else {
            const Index rows = blocks(s.queries, segments);
            part.first_row = least(i * rows, s.queries);
            part.last_row = least(part.first_row + rows, s.queries);
        }
        return part;
    }

};

LINATTN_INLINE void add_all(const float* from, Index n, float* to) {
    for (Index i = 0; i < n; i += width) store(to + i, load(to + i) + load(from + i));
}

// S [Dp][Mp], z [Dp] += a canonical state's.
inline void add_state(const Work& w, const State& state, Index task, float* S, float* z) {
    const Index D = w.p.D, M = w.p.M;
    const float *fv = state.fv + task * D * M, *f_sum = state.f_sum + task * D;
    for (Index d = 0; d < D; ++d) {
        z[d] += f_sum[d];
        for (Index m = 0; m < M; ++m) S[d * w.Mp + m] += fv[d * M + m];
    }
}

inline void store_state(const Work& w, const float* S, const float* z, Index task, const State& state) {
    const Index D = w.p.D, M = w.p.M;
    for (Index d = 0; d < D; ++d) {
        state.f_sum[task * D + d] = z[d];
        __builtin_memcpy(state.fv + (task * D + d) * M, S + d * w.Mp, static_cast<std::size_t>(M) * sizeof(float));
    }
}

// S [Dp][Mp] and z [Dp], to which chunks are added. Of very many keys, where a chunk would be lost in the sum of all before
// it, recent ones have a sum of their own, which joins the others now and then.
struct Sums {
    const Index size;
    float *S, *z;
    float *recent, *settled;  // S = settled + recent; or null
    Index folds = 0;

    Sums(const Work& w, Scratch& scratch, float* memory, Index keys)
        : size(w.size()), S(memory), z(memory + w.Dp * w.Mp),
          recent(keys > many_keys ? scratch.take<float>(2 * size) : nullptr),
          settled(recent == nullptr ? nullptr : recent + size) {
        clear(S, size);
    }
    Sums(const Work& w, Scratch& scratch, Index keys) : Sums(w, scratch, scratch.take<float>(w.size()), keys) {}

    // Call this between setting S and adding the first chunk.
    void begin() {
        folds = 0;
        if (recent != nullptr) settle();
    }
    // Call add(S, z) for the sums that a chunk of rows or keys is to be added to.
    template <class Add>
    void fold(const Work& w, const Add& add) {
        float* to = recent == nullptr ? S : recent;
        add(to, to + w.Dp * w.Mp);
        if (recent == nullptr) return;
        for (Index i = 0; i < size; i += width) store(S + i, load(settled + i) + load(recent + i));
        if (++folds % (many_keys / usual_chunk) == 0) settle();
    }

private:
    void settle() {
        __builtin_memcpy(settled, S, sizeof(float) * size);
        clear(recent, size);
    }
};

// One chunk of keys, as features and values.
struct Keys {
    Index j0 = 0;
    int count = 0;
    const bool* keep = nullptr;
    float *k, *kt;         // [chunk][Dp] and, transposed, [D][key_block]
    float* packed_v;
    const float* v;        // [chunk][v_stride]
    Index v_stride;
    float* vt;             // [M][key_block]
    HeadRows next_k{}, next_v{};  // of the chunk that comes next, `ahead` rows: read early, as they are needed soon
    int ahead = 0;

    Keys(const Work& w, Scratch& scratch)
        : k(scratch.take<float>(longest_chunk * w.Dp)), kt(scratch.take<float>(w.Dp * key_block)),
          packed_v(scratch.take<float>(longest_chunk * w.Mp)), v(packed_v), v_stride(w.Mp),
          vt(scratch.take<float>(w.Mp * key_block)) {}

    void load(const Work& w, const Segment& part, Index from, Index to) {
        const Problem& p = w.p;
        j0 = from, count = static_cast<int>(to - from);
        const Index at = part.sequence.first_key + from, batch = part.sequence.batch;
        keep = p.key_mask == nullptr ? nullptr : p.key_mask + batch * p.Tk + at;
        const HeadRows keys = head_rows(p.k, p.dtype, batch, part.head, at);
        const HeadRows values = head_rows(p.v, p.dtype, batch, part.head, at);
        next_k = head_rows(p.k, p.dtype, batch, part.head, at + count);
        next_v = head_rows(p.v, p.dtype, batch, part.head, at + count);
        ahead = static_cast<int>(least<Index>(count, part.last_key - to));
        pack_features(w.call.map, keys, count, p.D, 1, keep, fours(count), k);
        if (p.dtype == Dtype::fp32 && keep == nullptr && p.M % width == 0 && count % 4 == 0) {
            v = static_cast<const float*>(values.data), v_stride = values.stride;
        } else {
            pack_rows(values, count, p.M, 1, keep, fours(count), packed_v);
            v = packed_v, v_stride = w.Mp;
        }
    }
    void transpose_keys(const Work& w) { pack_transposed({k, w.Dp, Dtype::fp32}, count, w.p.D, 1, nullptr, kt); }
    void transpose_values(const Work& w) {
        pack_transposed({const_cast<float*>(v), v_stride, Dtype::fp32}, count, w.p.M, 1, nullptr, vt);
    }
    // S += phi(k)^T v, z += sum of phi(k).
    void fold(const Work& w, Sums& sums) const {
        sums.fold(w, [&](float* S, float* z) {
            multiply<1>({{k, 1, w.Dp, v, v_stride, count}}, fours(w.p.D), w.Mp, S, w.Mp, true);
            for (int c = 0; c < count; ++c) add_all(k + c * w.Dp, w.Dp, z);
        });
    }
};

// Rows of one query head: up to a chunk of them, against the sums and the keys of a chunk (none: count 0).
struct Queries {
    float *x, *tile, *sums;  // scale phi(q) [chunk][Dp], scores [chunk][key_block], results [chunk][Mp or Dp]
    Index i0 = 0, head = 0;
    int count = 0, rows = 0;

    Queries(const Work& w, Scratch& scratch)
        : x(scratch.take<float>(longest_chunk * w.Dp)), tile(scratch.take<float>(longest_chunk * key_block)),
          sums(scratch.take<float>(longest_chunk * most(w.Dp, w.Mp))) {}

    HeadRows at(const Work& w, const Segment& part, const Rows& tensor) const {
        return head_rows(tensor, w.p.dtype, part.sequence.batch, head, part.sequence.first_query + i0);
    }
    float* row_sums(const Work& w, const Segment& part) const {
        return w.call.l + (part.sequence.batch * w.p.H + head) * w.p.Tq + part.sequence.first_query + i0;
    }
    void load(const Work& w, const Segment& part, Index query_head, Index from, Index to) {
        i0 = from, head = query_head, count = static_cast<int>(to - from), rows = fours(count);
        pack_features(w.call.map, at(w, part, w.p.q), count, w.p.D, w.p.scale, nullptr, rows, x);
    }
    // How many keys of a chunk row 0 sees; row r sees r more.
    Index seen(const Work& w, const Keys& keys) const {
        return w.p.is_causal ? i0 + w.p.q_offset - keys.j0 + 1 : keys.count;
    }
    // tile[r][c] = left[r] . right[c], 0 where row r does not see key c.
    void score(const Work& w, const Segment& part, const Keys& keys, const float* left, Index stride, const float* right, Index n,
               const float* minus, float* to) const {
        const Index columns = padded(keys.count), first = seen(w, keys);
        multiply<1>({{left, stride, 1, right, key_block, n}}, rows, columns, to, key_block, false);
        const HeadRows here = at(w, part, w.p.q);
        for (int r = 0; r < count; ++r, to += key_block) {
            if (i0 + count + r < part.sequence.queries) prefetch_row(here, count + r, w.p.D);
            const Index visible = w.p.is_causal ? clamped(first + r, 0, keys.count) : keys.count;
            Index c = 0;
            for (; minus != nullptr && c + width <= visible; c += width) store(to + c, LINATTN_ISA::load(to + c) - minus[r]);
            for (c = visible / width * width; c < columns; c += width) {
                const Vec score = LINATTN_ISA::load(to + c) - (minus == nullptr ? 0.0f : minus[r]);
                store(to + c, first_lanes(score, static_cast<int>(clamped(visible - c, 0, width))));
            }
        }
    }
};

LINATTN_INLINE float dot(const float* a, const float* b, Index n) {
    Vec total{};
    for (Index i = 0; i < n; i += width) total += load(a + i) * load(b + i);
    return sum(total);
}

// ---- forward ----

void read_rows(const Work& w, const Segment& part, Queries& q, Index i0, Index i1, const Keys& keys, const Sums& sums) {
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
        const HeadRows out = q.at(w, part, w.call.out);
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
void sum_segment(const Work& w, Index unit) {
    const Segment part = w.segment(unit);
    if (w.p.is_causal && part.index + 1 == part.count) return;
    Scratch scratch;
    Keys keys(w, scratch);
    Sums sums(w, scratch, w.sums + unit * w.size(), part.last_key - part.first_key);
    sums.begin();
    for (Index j = part.first_key; j < part.last_key; j += w.chunk) {
        keys.load(w, part, j, least(j + w.chunk, part.last_key));
        keys.fold(w, sums);
    }
}

// The sums before a segment's first key: of the initial state and all earlier segments; of all segments if rows see all.
void sums_before(const Work& w, const Segment& part, Index task, Sums& sums) {
    clear(sums.S, w.size());
    if (w.call.before != nullptr) add_state(w, *w.call.before, task, sums.S, sums.z);
    const Index end = w.p.is_causal ? part.index : part.count;
    for (Index i = 0; i < end; ++i) add_all(w.sums_of(task, i), w.size(), sums.S);
    sums.begin();
}

void forward_segment(const Work& w, const ForwardCall& call, Index unit) {
    Scratch scratch;
    const Segment part = w.segment(unit);
    const Index task = unit / w.segments;
    Sums sums(w, scratch, part.last_key - part.first_key);
    Keys keys(w, scratch);
    Queries queries(w, scratch);
    sums_before(w, part, task, sums);
    const auto read = [&](Index from, Index to) {
        keys.count = 0;
        for (Index i = from; i < to; i += w.chunk)
            read_rows(w, part, queries, i, least(i + w.chunk, to), keys, sums);
    };
    if (!w.p.is_causal) {
        read(part.first_row, part.last_row);
    } else {
        const bool last = part.index + 1 == part.count;
        read(part.first_row, w.row_of(part.sequence, part.first_key));
        for (Index j = part.first_key; j < part.last_key; j += w.chunk) {
            const Index end = least(j + w.chunk, part.last_key);
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
    const Problem& p = call.problem;
    for (Index s = 0; s < p.sequences; ++s) {
        const Sequence one = sequence(p, s);
        Index n = call.before == nullptr ? 0 : call.before->n[s];
        for (Index j = 0; j < one.keys; ++j)
            n += p.key_mask == nullptr || p.key_mask[one.batch * p.Tk + one.first_key + j];
        call.after->n[s] = n;
    }
}

// ---- backward ----

// The rows of `queries` as the gradient meets them: dout / l and delta, the change of the loss with each row's sum.
struct RowGradients {
    float *dout, *delta;  // [chunk][Mp], [chunk]

    RowGradients(const Work& w, Scratch& scratch)
        : dout(scratch.take<float>(longest_chunk * w.Mp)), delta(scratch.take<float>(longest_chunk)) {}

    void load(const Work& w, const BackwardCall& call, const Segment& part, const Queries& q, float* out) {
        pack_rows(q.at(w, part, call.dout), q.count, w.p.M, 1, nullptr, q.rows, dout);
        clear(delta, longest_chunk);
        if (!w.p.normalize) return;
        pack_rows(q.at(w, part, call.out), q.count, w.p.M, 1, nullptr, q.rows, out);
        const float* l = q.row_sums(w, part);
        for (int r = 0; r < q.count; ++r) {
            float* row = dout + r * w.Mp;
            for (Index m = 0; m < w.Mp; m += width)
                store(row + m, l[r] > 0 ? LINATTN_ISA::load(row + m) / l[r] : Vec{});
            delta[r] = l[r] > 0 ? dot(row, out + r * w.Mp, w.Mp) : 0;
        }
    }
};

// dS += x^T dout, dz -= sum of delta x.
void fold_rows(const Work& w, const Queries& q, const RowGradients& rows, Sums& sums) {
    sums.fold(w, [&](float* dS, float* dz) {
        multiply<1>({{q.x, 1, w.Dp, rows.dout, w.Mp, q.count}}, fours(w.p.D), w.Mp, dS, w.Mp, true);
        for (int r = 0; r < q.count; ++r)
            for (Index d = 0; d < w.Dp; d += width)
                store(dz + d, load(dz + d) - rows.delta[r] * load(q.x + r * w.Dp + d));
    });
}

// S [D][Mp] as panels of key_block of its rows, each [M][key_block].
void transpose_sums(const Work& w, float* S, float* panels) {
    for (Index d = 0; d < w.p.D; d += key_block, panels += w.p.M * key_block)
        pack_transposed({S + d * w.Mp, w.Mp, Dtype::fp32}, least<Index>(key_block, w.p.D - d), w.p.M, 1, nullptr, panels);
}

// c [rows][Dp] += a [rows][..] S^T, with S transposed in panels.
void add_through(const Work& w, const float* a, Index stride, int rows, const float* panels, float* c) {
    for (Index d = 0; d < w.p.D; d += key_block, panels += w.p.M * key_block)
        multiply<1>({{a, stride, 1, panels, key_block, w.p.M}}, rows, padded(least<Index>(key_block, w.p.D - d)), c + d,
                    w.Dp, true);
}

struct Backward {
    const Work& w;
    const BackwardCall& call;
    const Segment part;
    const Index task;
    Scratch scratch;
    Keys keys;
    Queries queries;
    RowGradients rows;
    Sums sums;
    float *panels, *other_tile, *gradient, *dv;

    Backward(const Work& work, const BackwardCall& c, Index unit)
        : w(work), call(c), part(work.segment(unit)), task(unit / work.segments), keys(work, scratch),
          queries(work, scratch), rows(work, scratch),
          sums(work, scratch, part.last_key - part.first_key + part.last_row - part.first_row),
          panels(scratch.take<float>(blocks(work.p.D, key_block) * key_block * work.p.M)),
          other_tile(scratch.take<float>(longest_chunk * key_block)),
          gradient(scratch.take<float>(longest_chunk * work.Dp)), dv(scratch.take<float>(longest_chunk * work.Mp)) {}

    void load_rows(Index g, Index i0, Index i1) {
        queries.load(w, part, part.head * w.group + g, i0, i1);
        rows.load(w, call, part, queries, queries.sums);
    }

    // Down: rows read the sums of earlier keys again, which lie transposed in `panels`.
    void query_gradients(Index i0, Index i1) {
        if (i0 >= i1) return;
        for (Index g = 0; g < w.group; ++g) {
            load_rows(g, i0, i1);
            for (int r = 0; r < queries.rows; ++r)
                for (Index d = 0; d < w.Dp; d += width)
                    store(gradient + r * w.Dp + d, -rows.delta[r] * load(sums.z + d));
            add_through(w, rows.dout, w.Mp, queries.rows, panels, gradient);
            if (keys.count > 0) {
                queries.score(w, part, keys, rows.dout, w.Mp, keys.vt, w.p.M, rows.delta, queries.tile);
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
            for (Index i = from; i < to; i += w.chunk) query_gradients(i, least(i + w.chunk, to));
        };
        if (!w.p.is_causal) return read(part.first_row, part.last_row);
        read(part.first_row, w.row_of(part.sequence, part.first_key));
        for (Index j = part.first_key; j < part.last_key; j += w.chunk) {
            const Index end = least(j + w.chunk, part.last_key);
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
        const int count = fours(keys.count);
        for (int c = 0; c < count; ++c) __builtin_memcpy(gradient + c * w.Dp, sums.z, sizeof(float) * w.Dp);
        transpose_sums(w, sums.S, panels);
        add_through(w, keys.v, keys.v_stride, count, panels, gradient);
        multiply<1>({{keys.k, w.Dp, 1, sums.S, w.Mp, w.p.D}}, count, w.Mp, dv, w.Mp, false);
        for (Index g = 0; g < w.group && i0 < i1; ++g) {
            load_rows(g, i0, i1);
            queries.score(w, part, keys, queries.x, w.Dp, keys.kt, w.p.D, nullptr, queries.tile);
            queries.score(w, part, keys, rows.dout, w.Mp, keys.vt, w.p.M, rows.delta, other_tile);
            multiply<1>({{queries.tile, 1, key_block, rows.dout, w.Mp, queries.count}}, count, w.Mp, dv, w.Mp, true);
            multiply<1>({{other_tile, 1, key_block, queries.x, w.Dp, queries.count}}, count, w.Dp, gradient, w.Dp, true);
            fold_rows(w, queries, rows, sums);
        }
        const Index at = part.sequence.first_key + keys.j0, batch = part.sequence.batch;
        const auto rows_of = [&](const Rows& tensor) { return head_rows(tensor, w.p.dtype, batch, part.head, at); };
        if (call.dk.data != nullptr)
            store_pulled_back(call.map, gradient, rows_of(w.p.k), keys.count, w.p.D, 1, keys.keep, rows_of(call.dk));
        if (call.dv.data == nullptr) return;
        for (int c = 0; c < keys.count; ++c)
            store_row(dv + c * w.Mp, w.p.M, keys.keep == nullptr || keys.keep[c] ? 1 : 0, rows_of(call.dv), c);
    }

    void fold(Index from, Index to) {
        for (Index i = from; i < to; i += w.chunk)
            for (Index g = 0; g < w.group; ++g) {
                load_rows(g, i, least(i + w.chunk, to));
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
        const Index chunks = blocks(part.last_key - part.first_key, w.chunk);
        for (Index c = chunks - 1; c >= 0; --c) {
            const Index j = part.first_key + c * w.chunk, end = least(j + w.chunk, part.last_key);
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
    Work w(call);
    // Sums of the segments are taken first, each by itself, where a segment needs those of others.
    const bool ahead = !w.p.is_causal || w.segments > 1;
    if (ahead) w.sums = scratch.take<float>(w.count() * w.size());
    in_parallel(call.problem.threads, [&](int thread, int threads) {
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
    Work w(call);
    const bool ahead = !w.p.is_causal || w.segments > 1;
    if (ahead) w.sums = scratch.take<float>(2 * w.count() * w.size());
    in_parallel(call.problem.threads, [&](int thread, int threads) {
        if (ahead) {
            for (Index unit = thread; unit < w.count(); unit += threads) {
                sum_segment(w, unit);
                Backward(w, call, unit).sum_rows(w.sums + (w.count() + unit) * w.size());
            }
            barrier();
        }
        for (Index unit = thread; unit < w.count(); unit += threads) {
            Backward task(w, call, unit);
            if (call.dq.data != nullptr) task.down();
            if (call.dk.data != nullptr || call.dv.data != nullptr || call.dbefore != nullptr) task.up();
        }
    });
}

}  // namespace linattn::LINATTN_ISA

// The parts of a pass over the chunks of a sequence: the segments it is cut into, the state (S = sum phi(k) v^T,
// z = sum phi(k)), chunks of keys and tiles of queries.
#pragma once

#include "common/native/bwd_preprocess.hpp"
#include "common/native/matmul.hpp"
#include "common/native/packing.hpp"
#include "common/native/threads.hpp"
#include "feature_map/native/feature_map.hpp"
#include "feature_map/native/maps.hpp"

namespace linattn::LINATTN_ISA::feature_map {

using linattn::feature_map::BackwardCall;
using linattn::feature_map::Call;
using linattn::feature_map::ForwardCall;
using linattn::feature_map::State;

// Whole strips of registers at every width. In a backward pass every chunk transposes
// the state, so chunks are longer.
constexpr int longest_chunk = key_block, forward_chunk = 24, backward_chunk = 48;
constexpr Index shortest_segment = 192;
constexpr Index many_keys = 4096;  // and more: the state is summed in two levels

// Queries and keys of one segment of a sequence.
struct Segment {
    Sequence sequence;
    Index head;  // of keys
    Index first_query, last_query, first_key, last_key;
    Index index, count;
};

// How a call is cut into segments: the same for all threads.
struct SegmentPlan {
    const Call& call;
    const AttentionProblem& p;
    Index Dp, Mp, chunk, group, segments, tasks;
    float* sums;  // S and z of every segment, where there are several or queries see all keys; backwards dS, dz too

    SegmentPlan(const Call& c, Index usual_chunk)
        : call(c), p(c.problem), Dp(round_up<width>(p.D)), Mp(round_up<width>(p.M)),
          chunk(clamp<Index>(c.chunk == 0 ? usual_chunk : c.chunk, 1, longest_chunk)), group(p.H / p.Hkv), segments(1),
          tasks(p.sequences * p.Hkv), sums(nullptr) {
        Index longest = 0;
        for (Index s = 0; s < p.sequences; ++s) longest = max(longest, sequence(p, s).keys);
        const Index useful = ceil_div(p.threads, max<Index>(tasks, 1));
        segments = clamp<Index>(longest / shortest_segment, 1, useful);
    }

    Index size() const { return Dp * Mp + Dp; }
    Index count() const { return tasks * segments; }
    float* segment_state(Index task, Index segment) const { return sums + (task * segments + segment) * size(); }

    // Query i of a sequence sees keys below i + q_offset + 1; so key j is seen by queries from here on.
    Index first_query_of(const Sequence& s, Index j) const { return clamp<Index>(j - p.q_offset, 0, s.queries); }

    Segment segment(Index unit) const {
        const Index task = unit / segments, i = unit % segments;
        const Sequence s = sequence(p, task / p.Hkv);
        const Index keys = ceil_div(ceil_div(s.keys, segments), chunk) * chunk;
        const Index j0 = min(i * keys, s.keys), j1 = i + 1 == segments ? s.keys : min(j0 + keys, s.keys);
        Segment part{s, task % p.Hkv, 0, 0, j0, j1, i, segments};
        if (p.is_causal) {
            part.first_query = i == 0 ? 0 : first_query_of(s, j0);
            part.last_query = i + 1 == segments ? s.queries : first_query_of(s, j1);
        } else {
            const Index rows = ceil_div(s.queries, segments);
            part.first_query = min(i * rows, s.queries);
            part.last_query = min(part.first_query + rows, s.queries);
        }
        return part;
    }
};

LINATTN_INLINE void add_all(const float* from, Index n, float* to) {
    for (Index i = 0; i < n; i += width) store(to + i, load(to + i) + load(from + i));
}

// S [Dp][Mp], z [Dp] += a canonical state's.
inline void add_state(const SegmentPlan& plan, const State& state, Index task, float* S, float* z) {
    const Index D = plan.p.D, M = plan.p.M;
    const float *fv = state.fv + task * D * M, *f_sum = state.f_sum + task * D;
    for (Index d = 0; d < D; ++d) {
        z[d] += f_sum[d];
        for (Index m = 0; m < M; ++m) S[d * plan.Mp + m] += fv[d * M + m];
    }
}

inline void store_state(const SegmentPlan& plan, const float* S, const float* z, Index task, const State& state) {
    const Index D = plan.p.D, M = plan.p.M;
    for (Index d = 0; d < D; ++d) {
        state.f_sum[task * D + d] = z[d];
        __builtin_memcpy(state.fv + (task * D + d) * M, S + d * plan.Mp, static_cast<std::size_t>(M) * sizeof(float));
    }
}

// S [Dp][Mp] and z [Dp], to which chunks are added. Of very many keys, where a chunk would be lost in the sum of all
// before it, recent ones have a sum of their own, which is merged now and then.
struct ChunkState {
    const Index size;
    float *S, *z;
    float *recent, *merged;  // S = merged + recent; or null
    Index updates = 0;

    ChunkState(const SegmentPlan& plan, Scratch& scratch, float* memory, Index keys)
        : size(plan.size()), S(memory), z(memory + plan.Dp * plan.Mp),
          recent(keys > many_keys ? scratch.allocate<float>(2 * size) : nullptr),
          merged(recent == nullptr ? nullptr : recent + size) {
        clear(S, size);
    }
    ChunkState(const SegmentPlan& plan, Scratch& scratch, Index keys)
        : ChunkState(plan, scratch, scratch.allocate<float>(plan.size()), keys) {}

    // Call this between setting S and adding the first chunk.
    void begin() {
        updates = 0;
        if (recent != nullptr) merge_recent();
    }
    // Call add(S, z) for the sums that a chunk of queries or keys is to be added to.
    template <class Add>
    void update(const SegmentPlan& plan, const Add& add) {
        float* to = recent == nullptr ? S : recent;
        add(to, to + plan.Dp * plan.Mp);
        if (recent == nullptr) return;
        for (Index i = 0; i < size; i += width) store(S + i, load(merged + i) + load(recent + i));
        if (++updates % (many_keys / plan.chunk) == 0) merge_recent();
    }

private:
    void merge_recent() {
        __builtin_memcpy(merged, S, sizeof(float) * size);
        clear(recent, size);
    }
};

// One chunk of keys, as features and values.
struct KeyChunk {
    Index j0 = 0;
    int count = 0;
    const bool* keep = nullptr;
    float *k, *kt;  // [chunk][Dp] and, transposed, [D][key_block]
    float* packed_v;
    const float* v;  // [chunk][v_stride]
    Index v_stride;
    float* vt;                   // [M][key_block]
    RowView next_k{}, next_v{};  // the next chunk's first `prefetch_count` rows
    int prefetch_count = 0;

    KeyChunk(const SegmentPlan& plan, Scratch& scratch)
        : k(scratch.allocate<float>(longest_chunk * plan.Dp)), kt(scratch.allocate<float>(plan.Dp * key_block)),
          packed_v(scratch.allocate<float>(longest_chunk * plan.Mp)), v(packed_v), v_stride(plan.Mp),
          vt(scratch.allocate<float>(plan.Mp * key_block)) {}

    void load(const SegmentPlan& plan, const Segment& part, Index from, Index to) {
        const AttentionProblem& p = plan.p;
        j0 = from, count = static_cast<int>(to - from);
        const Index at = part.sequence.first_key + from, batch = part.sequence.batch;
        keep = p.key_mask == nullptr ? nullptr : p.key_mask + batch * p.Tk + at;
        const RowView keys = row_view(p.k, p.dtype, batch, part.head, at);
        const RowView values = row_view(p.v, p.dtype, batch, part.head, at);
        next_k = row_view(p.k, p.dtype, batch, part.head, at + count);
        next_v = row_view(p.v, p.dtype, batch, part.head, at + count);
        prefetch_count = static_cast<int>(min<Index>(count, part.last_key - to));
        pack_features(plan.call.map, keys, count, p.D, 1, keep, round_up<4>(count), k);
        if (p.dtype == Dtype::fp32 && keep == nullptr && p.M % width == 0 && count % 4 == 0) {
            v = static_cast<const float*>(values.data), v_stride = values.stride;
        } else {
            pack_rows(values, count, p.M, 1, keep, round_up<4>(count), packed_v);
            v = packed_v, v_stride = plan.Mp;
        }
    }
    void transpose_keys(const SegmentPlan& plan) {
        pack_transposed(row_view(k, plan.Dp), count, plan.p.D, 1, nullptr, kt);
    }
    void transpose_values(const SegmentPlan& plan) {
        pack_transposed(row_view(v, v_stride), count, plan.p.M, 1, nullptr, vt);
    }
    // S += phi(k)^T v, z += sum of phi(k).
    void update(const SegmentPlan& plan, ChunkState& sums) const {
        sums.update(plan, [&](float* S, float* z) {
            multiply<1>({{k, 1, plan.Dp, v, v_stride, count}}, static_cast<int>(round_up<4>(plan.p.D)), plan.Mp, S,
                        plan.Mp, true);
            for (int c = 0; c < count; ++c) add_all(k + c * plan.Dp, plan.Dp, z);
        });
    }
};

// Queries of one head: up to a chunk of them, against the state and the keys of a chunk (none: count 0).
struct QueryTile {
    float *x, *tile, *sums;  // scale phi(q) [chunk][Dp], scores [chunk][key_block], results [chunk][Mp or Dp]
    Index i0 = 0, head = 0;
    int count = 0, rows = 0;

    QueryTile(const SegmentPlan& plan, Scratch& scratch)
        : x(scratch.allocate<float>(longest_chunk * plan.Dp)), tile(scratch.allocate<float>(longest_chunk * key_block)),
          sums(scratch.allocate<float>(longest_chunk * max(plan.Dp, plan.Mp))) {}

    RowView at(const SegmentPlan& plan, const Segment& part, const TensorView& tensor) const {
        return row_view(tensor, plan.p.dtype, part.sequence.batch, head, part.sequence.first_query + i0);
    }
    float* l(const SegmentPlan& plan, const Segment& part) const {
        return plan.call.l + (part.sequence.batch * plan.p.H + head) * plan.p.Tq + part.sequence.first_query + i0;
    }
    void load(const SegmentPlan& plan, const Segment& part, Index query_head, Index from, Index to) {
        i0 = from, head = query_head, count = static_cast<int>(to - from), rows = round_up<4>(count);
        pack_features(plan.call.map, at(plan, part, plan.p.q), count, plan.p.D, plan.p.scale, nullptr, rows, x);
    }
    // How many keys of a chunk query 0 sees; query r sees r more.
    Index seen(const SegmentPlan& plan, const KeyChunk& keys) const {
        return plan.p.is_causal ? i0 + plan.p.q_offset - keys.j0 + 1 : keys.count;
    }
    // tile[r][c] = left[r] . right[c], 0 where query r does not see key c.
    void score(const SegmentPlan& plan, const Segment& part, const KeyChunk& keys, const float* left, Index stride,
               const float* right, Index n, const float* minus, float* to) const {
        const Index columns = round_up<width>(keys.count), first = seen(plan, keys);
        multiply<1>({{left, stride, 1, right, key_block, n}}, rows, columns, to, key_block, false);
        const RowView here = at(plan, part, plan.p.q);
        for (int r = 0; r < count; ++r, to += key_block) {
            if (i0 + count + r < part.sequence.queries) prefetch_row(here, count + r, plan.p.D);
            const Index visible = plan.p.is_causal ? clamp<Index>(first + r, 0, keys.count) : keys.count;
            Index c = 0;
            for (; minus != nullptr && c + width <= visible; c += width)
                store(to + c, LINATTN_ISA::load(to + c) - minus[r]);
            for (c = visible / width * width; c < columns; c += width) {
                const Vec score = LINATTN_ISA::load(to + c) - (minus == nullptr ? 0.0f : minus[r]);
                store(to + c, first_lanes(score, static_cast<int>(clamp<Index>(visible - c, 0, width))));
            }
        }
    }
};

}  // namespace linattn::LINATTN_ISA::feature_map

#include "quadratic/native/chunked/chunk_schedule.hpp"

#include "common/native/packing.hpp"

namespace linattn::LINATTN_ISA::quadratic {

Index chunk_length(const Call& call) {
    if (call.chunk > 0) return call.chunk;
    const AttentionProblem& p = call.problem;
    const Index longest = p.D <= 16 ? 64 : p.D <= 32 ? 128 : 256, group = p.H / p.Hkv;
    return max<Index>(key_block, longest / group / key_block * key_block);
}

VisibleKeys::VisibleKeys(const AttentionProblem& p, const Sequence& s, Scratch& scratch)
    : all_(s.keys), keys_(s.keys), offset_(p.q_offset), is_causal_(p.is_causal) {
    if (p.key_mask == nullptr) return;
    const bool* counts = p.key_mask + s.batch * p.Tk + s.first_key;
    before_ = scratch.allocate<Index>(all_ + 1);
    positions_ = scratch.allocate<Index>(all_ + 1);
    keys_ = 0;
    for (Index j = 0; j < all_; ++j) {
        before_[j] = keys_;
        positions_[keys_] = j;
        keys_ += counts[j];
    }
    before_[all_] = keys_;
}

Index VisibleKeys::first_query_beyond(Index j, Index queries) const {
    Index low = 0, high = queries;
    while (low < high) {
        const Index middle = low + (high - low) / 2;
        if (seen(middle) > j)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

ChunkSchedule::ChunkSchedule(const VisibleKeys& visible, Index queries, bool is_causal, Index chunk, bool past)
    : visible_(visible), queries_(queries), chunk_(chunk), is_causal_(is_causal) {
    const Index keys = visible.keys();
    const bool from_scores = chunk == whole_sequence || keys == 0 || (!is_causal && !past && keys < direct_keys);
    if (from_scores) {
        is_causal_ = true;  // what queries see is said by `visible`
        chunk_ = first_ = max<Index>(keys, 1);
        key_spans_ = 1;
    } else if (is_causal) {
        first_ = min(max(chunk, direct_keys), keys);
        key_spans_ = 1 + ceil_div(keys - first_, chunk);
    } else {
        first_ = min(chunk, keys);
        key_spans_ = ceil_div(keys, chunk);
        query_spans_ = ceil_div(queries, chunk);
    }
}

ChunkSpan ChunkSchedule::span(Index index) const {
    const Index keys = visible_.keys();
    if (index >= key_spans_) {
        const Index i0 = (index - key_spans_) * chunk_;
        return {i0, min(i0 + chunk_, queries_), keys, keys};
    }
    const Index j0 = index == 0 ? 0 : first_ + (index - 1) * chunk_;
    const Index j1 = min(index == 0 ? first_ : j0 + chunk_, keys);
    if (!is_causal_) return {0, 0, j0, j1};
    return {index == 0 ? 0 : visible_.first_query_beyond(j0, queries_),
            index + 1 == key_spans_ ? queries_ : visible_.first_query_beyond(j1, queries_), j0, j1};
}

}  // namespace linattn::LINATTN_ISA::quadratic

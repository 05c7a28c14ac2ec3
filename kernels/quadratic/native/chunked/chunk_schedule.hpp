// How a sequence is cut into chunks: which queries read the state over which keys, and when these are added to it.
#pragma once

#include "common/native/threads.hpp"
#include "quadratic/native/quadratic.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using linattn::quadratic::Call;
using linattn::quadratic::direct_keys;

constexpr Index whole_sequence = 0;  // as the length of a chunk

// The length of a chunk: the caller's, or what is fastest.
Index chunk_length(const Call& call);

// The keys of a sequence that count, numbered without the masked ones between them. Query i sees the first seen(i).
class VisibleKeys {
public:
    VisibleKeys(const AttentionProblem& p, const Sequence& s, Scratch& scratch);

    Index keys() const { return keys_; }
    Index seen(Index i) const {
        if (!is_causal_) return keys_;
        const Index end = i + offset_ + 1;
        return end <= 0 ? 0 : end >= all_ ? keys_ : before_ == nullptr ? end : before_[end];
    }
    // Where key j lies in the sequence.
    Index position(Index j) const { return positions_ == nullptr ? j : positions_[j]; }
    bool contiguous() const { return positions_ == nullptr; }
    // The first of `queries` that sees more than j keys, or `queries`.
    Index first_query_beyond(Index j, Index queries) const;

private:
    Index all_, keys_, offset_;
    bool is_causal_;
    Index* before_ = nullptr;     // [all + 1]: how many keys count before each place
    Index* positions_ = nullptr;  // [keys]: the places of those that count
};

// Queries i0 to i1 read the state over the keys before j0 and the scores of keys j0 to j1, which are then added to it.
struct ChunkSpan {
    Index i0, i1, j0, j1;
};

// Causal: chunks of keys, each with the queries whose last key it holds. Not causal: all keys, then all queries.
class ChunkSchedule {
public:
    // past: whether there are keys in the state before this sequence.
    ChunkSchedule(const VisibleKeys& visible, Index queries, bool is_causal, Index chunk, bool past);

    Index count() const { return key_spans_ + query_spans_; }
    ChunkSpan span(Index index) const;

private:
    const VisibleKeys& visible_;
    Index queries_, chunk_, first_ = 0;
    bool is_causal_;
    Index key_spans_ = 0, query_spans_ = 0;  // spans that hold keys, and those that hold queries alone
};

}  // namespace linattn::LINATTN_ISA::quadratic

// How a sequence is cut into chunks: which keys are folded into the sums after which rows have read them.
#pragma once

#include "common/native/threads.hpp"
#include "quadratic/native/quadratic.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using linattn::quadratic::direct_keys;

// The keys of a sequence that count, numbered without the masked ones between them. Row i sees the first seen(i).
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
    // The first row of `rows` that sees more than j keys, or `rows`.
    Index first_row_beyond(Index j, Index rows) const;

private:
    Index all_, keys_, offset_;
    bool is_causal_;
    Index* before_ = nullptr;     // [all + 1]: how many keys count before each place
    Index* positions_ = nullptr;  // [keys]: the places of those that count
};

// Rows i0 to i1 read the sums of keys before j0 and the scores of those from j0 to j1, which are then folded in.
struct ChunkSpan {
    Index i0, i1, j0, j1;
};

// Causal: chunks of keys, each with the rows whose last key it holds. Not causal: all keys, then all rows.
class ChunkSchedule {
public:
    // `chunk` 0: one step of everything. past: whether keys stand in a state before this sequence's.
    ChunkSchedule(const VisibleKeys& visible, Index rows, bool is_causal, Index chunk, bool past);

    Index count() const { return folds_ + reads_; }
    ChunkSpan step(Index index) const;

private:
    const VisibleKeys& visible_;
    Index rows_, chunk_, first_ = 0;
    bool is_causal_;
    Index folds_ = 0, reads_ = 0;  // steps that hold keys, and those that hold rows alone
};

}  // namespace linattn::LINATTN_ISA::quadratic

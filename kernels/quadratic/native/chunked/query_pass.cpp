#include "quadratic/native/chunked/chunked_pass.hpp"

namespace linattn::LINATTN_ISA::quadratic {

using linattn::quadratic::Form;

namespace {

// The state alone needs no queries.
Sequence pass_sequence(QueryPass::Kind kind, const AttentionProblem& p, Index index) {
    Sequence s = sequence(p, index);
    if (kind == QueryPass::Kind::state) s.queries = 0;
    return s;
}

Index pass_chunk(QueryPass::Kind kind, const Call& call) {
    if (call.form == Form::direct && kind != QueryPass::Kind::state) return whole_sequence;
    if (call.form == Form::recurrent && kind == QueryPass::Kind::output) return direct_keys;
    return chunk_length(call);
}

}  // namespace

QueryPass::QueryPass(Kind kind, const Call& call, const State* after, const BackwardCall* backward,
                     Index sequence_index, Index kv_head, Team& team)
    : ChunkedPass(Direction::forwards, call, backward, sequence_index,
                  pass_sequence(kind, call.problem, sequence_index), kv_head, pass_chunk(kind, call),
                  {kind == Kind::output, kind == Kind::gradient}, team),
      kind_(kind), after_(after) {}

void QueryPass::read_state(Index part, Tile& target) const {
    if (part + 1 < state_.parts()) {
        if (collects_.values) state_.accumulate_out(part, target.x, target.rows, weights_, target.acc);
        if (collects_.gradients) state_.accumulate_dx(part, target.x, target.vt, weights_, target.dx);
    } else if (kind_ == Kind::output) {
        state_.accumulate_row_sums(target.x, weights_, target.l);
    } else if (collects_.gradients) {
        alignas(64) float factor[tile_width];
        for (int c = 0; c < tile_width; c += width) store(factor + c, -load(target.delta + c));
        state_.accumulate_moments_dx(target.x, factor, weights_, target.dx);
    }
}

void QueryPass::store_target(const Tile& target) {
    const Index b = sequence_.batch, M = round_up<width>(p_.M);
    if (kind_ == Kind::gradient)
        return store_lanes(target, backward_->dq, target.head, sequence_.first_query, p_.scale,
                           [&](int r) { return target.first + r; });
    const Index first = sequence_.first_query + target.first;
    const RowView out = row_view(call_.out, p_.dtype, b, target.head, first);
    for (int r = 0; r < target.rows; ++r) {
        call_.l[(b * p_.H + target.head) * p_.Tq + first + r] = target.l[r];
        if (p_.normalize)
            store_quotient(target.acc + r * M, p_.M, target.l[r], out, r);
        else
            store_row(target.acc + r * M, p_.M, 1, out, r);
    }
}

void QueryPass::finish() {
    if (after_ != nullptr && kv_head_ == 0) after_->n[sequence_index_] = past_ + visible_.keys();
}

}  // namespace linattn::LINATTN_ISA::quadratic
